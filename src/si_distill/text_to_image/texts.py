"""Texts as networks are told them: encoded once, by row."""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from ..pipelines.interpolant_condition import Condition
from .conventions import CONVENTIONS, Convention, Text

#: Texts that are encoded in one forward.
BATCH = 32


class Texts:
    """
    A list of texts and the empty one, as the conditions that they are.

    Args:
        prompts: the texts.
        text: their embeddings (N, …), row by row, the last row being that of the empty text.
        convention: of the pipeline.
        told_guidance: the scale that a guidance-distilled network is told.
    """

    def __init__(self, prompts: Sequence[str], text: Text, convention: Convention, told_guidance: float | None = None):
        self.prompts, self.text, self.convention, self.told_guidance = prompts, text, convention, told_guidance

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def null(self) -> Condition:
        """One row: the empty text."""
        return self.condition(torch.tensor([len(self)]))

    def condition(self, rows: torch.Tensor, **told: Any) -> Condition:
        """What networks are told of the texts in these rows, (B,)."""
        text = {name: value[rows.to(value.device)] for name, value in self.text.items()}
        if self.told_guidance is not None:
            told["guidance"] = torch.full(rows.shape, self.told_guidance, device=rows.device)
        return Condition(text=text, **told)

    def to(self, device: torch.device) -> "Texts":
        self.text = {name: value.to(device) for name, value in self.text.items()}
        return self


@torch.no_grad()
def encode_texts(
    pipeline: Any,
    prompts: Sequence[str],
    max_length: int | None = None,
    negative_prompt: str = "",
    device: torch.device | None = None,
    told_guidance: float | None = None,
) -> Texts:
    """Encodes texts and the negative one with a stock pipeline's encoders.

    Args:
        pipeline: of a class in `CONVENTIONS`.
        prompts: the texts; not empty.
        max_length: most tokens of a text; the pipeline's own when not given.
        negative_prompt: the text of the unconditional prediction.
        device: where it is done and kept.
        told_guidance: the scale that a guidance-distilled network is told.

    Raises:
        InputError: for no texts, or empty ones.
    """
    convention = CONVENTIONS[type(pipeline).__name__]
    if not prompts:
        raise InputError("There are no prompts: the file or column is empty.")
    empty = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise InputError(
            f"Prompt {empty[0] + 1} of {len(prompts)} is empty ({len(empty)} in all): take empty ones out."
        )
    parts = [
        convention.encode(pipeline, list(prompts[start : start + BATCH]), max_length, False, device)
        for start in range(0, len(prompts), BATCH)
    ]
    parts.append(convention.encode(pipeline, [negative_prompt], max_length, True, device))
    return Texts(prompts, joined(parts, convention.mask), convention, told_guidance)


def joined(parts: Sequence[Text], mask: str | None) -> Text:
    """Embeddings one after the other, padded to the longest text and cut where every text has ended.

    Only what a mask tells networks to leave out is cut or added: without one, padding is a part of the text.
    """
    if mask is None:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    places = [part[mask].any(0).nonzero().flatten().tolist() for part in parts]
    longest = 1 + max([0, *(place for those in places for place in those)])

    def fitted(value: torch.Tensor) -> torch.Tensor:
        value = value[:, :longest]
        return torch.nn.functional.pad(value, (*(0, 0) * (value.ndim - 2), 0, longest - value.shape[1]))

    return {name: torch.cat([fitted(part[name]) for part in parts]) for name in parts[0]}
