"""Settings of texts."""

from dataclasses import dataclass

from ..errors import InputError
from ..settings import MOST_SAMPLES, at_least, positive, setting

#: Largest settings that make sense for any pipeline; each has its own limits below them.
MOST_TOKENS, MOST_PIXELS = 4096, 2**14


@dataclass
class TextConfig:
    """What a text-to-image pipeline is told, and the size of what it draws."""

    max_length: int | None = setting(
        None, "Most tokens of a text; the pipeline's own when not given. StableDiffusion and SDXL always take 77."
    )
    negative_prompt: str = setting("", "Text of the unconditional prediction, which guidance moves away from.")
    height: int | None = setting(None, "Height of images in pixels; with `width`, the pipeline's own when not given.")
    width: int | None = setting(None, "Width of images in pixels.")
    told_guidance: float | None = setting(
        None,
        "Guidance scale that a guidance-distilled network (FLUX.1-dev) is told in all roles; 3.5 when not given. No other "
        "network is told any.",
    )
    max_texts_in_memory: int = setting(
        1024,
        "Most distinct texts whose embeddings are kept in memory (SD3: 2.7 MB each in bfloat16). Of longer lists each "
        "batch is encoded when it is drawn, unless training/precompute_texts.py did it before.",
    )

    def __post_init__(self) -> None:
        if self.max_length is not None:
            at_least("text.max_length", self.max_length, 1, MOST_TOKENS)
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None:
                at_least(f"text.{name}", value, 1, MOST_PIXELS)
        if (self.height is None) != (self.width is None):
            raise InputError(
                f"`text.height` is {self.height} and `text.width` {self.width}: give both, or neither for the pipeline's "
                "own size."
            )
        if self.told_guidance is not None:
            positive("text.told_guidance", self.told_guidance)
        at_least("text.max_texts_in_memory", self.max_texts_in_memory, 0, MOST_SAMPLES)
