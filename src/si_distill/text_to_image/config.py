"""Settings of texts, and of `training/precompute_texts.py`."""

from dataclasses import dataclass, field

from ..data.config import DataConfig
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
        "batch is encoded when it is drawn, unless `si-distill precompute-texts` did it before.",
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, or None for the pipeline's own."""
        return None if self.height is None or self.width is None else (self.height, self.width)

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


@dataclass
class PrecomputeTextsConfig:
    """Which texts are encoded with which pipeline's encoders, and where the embeddings go."""

    teacher: str = setting("", "The text-to-image pipeline: a folder or a Hub id.")
    texts_dir: str = setting("", "Folder of the cache; a run that was cut off goes on there.")
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    dtype: str = setting(
        "bfloat16", "Type of the encoders and of what is stored, as it comes from them.", ("bfloat16", "float32")
    )
    texts_per_shard: int = setting(256, "Distinct texts in a file; what a kill can cost each process.")

    def __post_init__(self) -> None:
        if not self.teacher or not self.texts_dir:
            raise InputError("Give --teacher (a pipeline's folder or a Hub id) and --texts_dir (a folder).")
        at_least("texts_per_shard", self.texts_per_shard, 1, MOST_SAMPLES)
