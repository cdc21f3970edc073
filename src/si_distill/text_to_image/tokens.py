"""How the tokenizers of stock pipelines read a prompt: how many tokens it has, and how many of them are cut."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

#: Prompts that are counted in one call, and from how many on a progress bar is shown.
CHUNK, LONG = 1024, 2**16


def default_length(pipeline: Any) -> int | None:
    """Tokens that a pipeline takes unless it is told otherwise; None of a pipeline that cannot be told."""
    parameter = inspect.signature(type(pipeline).encode_prompt).parameters.get("max_sequence_length")
    return None if parameter is None else parameter.default


def sana_instruction(pipeline: Any) -> list[str]:
    """What Sana puts before prompts: a default of `__call__` alone."""
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default


@dataclass(frozen=True)
class Reading:
    """
    What one tokenizer of a pipeline reads of a prompt.

    Args:
        tokenizer: the component.
        frame: `frame(pipeline, prompt)` is the whole text, with what the pipeline puts around a prompt.
        dropped: `dropped(pipeline)` is how many tokens of the frame are not passed on to the network; they do not count
            towards `max_length`.
        fixed: whether the length is the tokenizer's own (CLIP), whatever `max_length` is.
    """

    tokenizer: str = "tokenizer"
    frame: Callable[[Any, str], str] = lambda pipeline, prompt: prompt
    dropped: Callable[[Any], int] = lambda pipeline: 0
    fixed: bool = False

    def limit(self, pipeline: Any, max_length: int | None) -> int:
        """Most tokens of a framed prompt; what is longer is cut."""
        if self.fixed:
            return getattr(pipeline, self.tokenizer).model_max_length
        return (max_length or default_length(pipeline) or 0) + self.dropped(pipeline)

    def count(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt in its frame, uncut."""
        tokenizer = getattr(pipeline, self.tokenizer)
        counts: list[int] = []
        hidden = len(prompts) < LONG or os.environ.get("RANK", "0") != "0"
        for start in tqdm(range(0, len(prompts), CHUNK), "counting tokens", mininterval=0.5, disable=hidden):
            texts = [self.frame(pipeline, prompt) for prompt in prompts[start : start + CHUNK]]
            counts += map(len, tokenizer(texts, verbose=False).input_ids)
        return counts


def _sana_frame(pipeline: Any, prompt: str) -> str:
    return "\n".join(sana_instruction(pipeline)) + pipeline._text_preprocessing([prompt])[0]


def _sana_dropped(pipeline: Any) -> int:
    return len(pipeline.tokenizer.encode("\n".join(sana_instruction(pipeline)))) - 2


def _chat_frame(pipeline: Any, prompt: str) -> str:
    return pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


CLIP, SECOND_CLIP = Reading("tokenizer", fixed=True), Reading("tokenizer_2", fixed=True)
SANA = Reading(frame=_sana_frame, dropped=_sana_dropped)
LUMINA2 = Reading(frame=lambda pipeline, prompt: f"{pipeline.system_prompt} <Prompt Start> {prompt}")
QWEN = Reading(
    frame=lambda pipeline, prompt: pipeline.prompt_template_encode.format(prompt),
    dropped=lambda pipeline: pipeline.prompt_template_encode_start_idx,
)
CHAT = Reading(frame=_chat_frame)
