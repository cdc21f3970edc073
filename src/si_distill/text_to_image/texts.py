"""Texts as networks are told them: from memory, from the encoders, or from a cache on disk.

Each text is encoded by itself. In a batch its embedding can be rounded differently in other company, and what a network
is told of a text would depend on the batch, the number of processes and the restart of a run.
"""

import copy
import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from .. import fingerprints
from ..errors import InputError
from ..pipelines.interpolant_condition import Condition
from .conventions import CONVENTIONS, Convention, Text

#: A text, and whether it stands for the unconditional prediction: some pipelines read that one in another way.
Key = tuple[str, bool]
#: What a network is told of one text, by the names of its arguments: tokens (L, D), pooled ones (D,), a mask (L,). Padding
#: that a mask hides is not part of it, except for one token of a text that has none.
Row = dict[str, torch.Tensor]

#: Lists of at least this many texts are encoded with a progress bar.
LONG = 64


class Rows(Protocol):
    """Where the embeddings of texts come from."""

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        """The embeddings of these texts, each the same whenever it is asked for."""

    def to(self, device: torch.device) -> None:
        """Does what is computed there."""


class HeldRows:
    """Embeddings in the memory of the CPU."""

    def __init__(self, held: dict[Key, Row]):
        self.held = held

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        return [self.held[key] for key in keys]

    def to(self, device: torch.device) -> None:
        pass


class EncodedRows:
    """
    Embeddings made when they are asked for. Those asked for last are kept: a text that the student, the critic and the
    teacher are told in one iteration is encoded once.

    Args:
        pipeline: of a class in `CONVENTIONS`, with its text encoders.
        max_length: most tokens of a text; the pipeline's own when not given.
        device: where its encoders are moved and run.
    """

    def __init__(self, pipeline: Any, max_length: int | None = None, device: torch.device | None = None):
        self.pipeline, self.max_length, self.device = pipeline, max_length, device
        self.convention = CONVENTIONS[type(pipeline).__name__]
        self._recent: OrderedDict[Key, Row] = OrderedDict()
        if device is not None:
            self.to(device)

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        for key in dict.fromkeys(keys):
            self._recent[key] = self._recent.pop(key) if key in self._recent else self.encode(key)
        found = [self._recent[key] for key in keys]
        while len(self._recent) > max(LONG, 2 * len(keys)):
            self._recent.popitem(last=False)
        return found

    @torch.no_grad()
    def encode(self, key: Key) -> Row:
        """The embedding of one text."""
        prompt, negative = key
        with without_warnings(self.pipeline):
            text = self.convention.encode(self.pipeline, [prompt], self.max_length, negative, self.device)
        mask = self.convention.mask
        if mask is None:
            return {name: value[0] for name, value in text.items()}
        text[mask] = text[mask].bool()
        length = int(text[mask].sum())
        if not text[mask][0, :length].all():
            raise InputError(
                f"The tokenizer of this {type(self.pipeline).__name__} fills texts up on the left: set its padding_side to "
                "right."
            )
        return {
            name: value[0, : max(1, length)].clone() for name, value in text.items()
        }  # without the padding's memory

    def to(self, device: torch.device) -> None:
        self.device = device
        for encoder in encoders(self.pipeline).values():
            encoder.to(device)
        self._recent.clear()


class Texts:
    """
    A list of texts and the negative one, as the conditions that they are.

    All conditions have the same number of tokens, that of the longest text: what a network computes depends on the shape.

    Args:
        prompts: the texts.
        source: of their embeddings.
        convention: of the pipeline.
        negative_prompt: the text of the unconditional prediction.
        longest: tokens of the longest of `prompts`; without a mask all texts have the same number.
        told_guidance: the scale that a guidance-distilled network is told.
        device: where conditions are made; that of the embeddings when not given.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        source: Rows,
        convention: Convention,
        negative_prompt: str = "",
        longest: int = 0,
        told_guidance: float | None = None,
        device: torch.device | None = None,
    ):
        self.prompts, self.source, self.convention = list(prompts), source, convention  # callers may change theirs
        self.negative_prompt, self.told_guidance, self.device = negative_prompt, told_guidance, device
        self.width = max(longest, length(source.rows([(negative_prompt, True)])[0]))

    def __len__(self) -> int:
        return len(self.prompts)

    @functools.cached_property
    def hash(self) -> str:
        """Tells this list of texts from others."""
        return fingerprints.of_values(self.prompts)

    @property
    def null(self) -> Condition:
        """One row: the negative text."""
        return self._condition([(self.negative_prompt, True)])

    def condition(self, rows: torch.Tensor, **told: Any) -> Condition:
        """What networks are told of the texts in these rows, (B,); the row after the last one is the negative text."""
        negative = (self.negative_prompt, True)
        keys = [(self.prompts[row], False) if row < len(self) else negative for row in rows.tolist()]
        return self._condition(keys, **told)

    def _condition(self, keys: Sequence[Key], **told: Any) -> Condition:
        text = stacked(self.source.rows(keys), self.convention.mask, self.width)
        text = {name: value.to(self.device) for name, value in text.items()}
        if self.told_guidance is not None:
            told["guidance"] = torch.full((len(keys),), self.told_guidance, device=self.device)
        return Condition(text=text, **told)

    def renumbered(self, prompts: Sequence[str]) -> "Texts":
        """Some of these texts, or all, in another order; nothing is encoded again."""
        new = copy.copy(self)
        new.prompts = list(prompts)
        vars(new).pop("hash", None)
        return new

    def to(self, device: torch.device) -> "Texts":
        self.device = device
        self.source.to(device)
        return self


def length(row: Row) -> int:
    """Tokens of a text."""
    return max(len(value) for value in row.values() if value.ndim == 2)


def stacked(rows: Sequence[Row], mask: str | None, width: int) -> Text:
    """Embeddings (B, …); of a pipeline with a mask (B, width), texts are filled up with their last token, which it hides.

    A text without any token of its own is all padding, as it is in the pipeline.
    """
    if mask is None:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    sizes = [length(row) for row in rows]
    if max(sizes) > width:
        raise ValueError(f"a text has {max(sizes)} tokens, and its tokenizer counted at most {width}")
    lengths = torch.tensor(sizes, device=rows[0][mask].device)
    places = torch.arange(width, device=lengths.device).expand(len(rows), -1)
    taken = places.minimum(lengths[:, None] - 1)
    text = {name: torch.stack([row[name][of] for row, of in zip(rows, taken, strict=True)]) for name in rows[0]}
    return {**text, mask: text[mask] & (places < lengths[:, None])}


@contextmanager
def without_warnings(pipeline: Any) -> Iterator[None]:
    """Pipelines repeat the end of every text that they cut; `count_tokens` says once how many there are."""
    logger = logging.getLogger(type(pipeline).__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def encoders(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The text encoders that a pipeline has in memory, by component."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}


def encode_texts(
    pipeline: Any,
    prompts: Sequence[str],
    max_length: int | None = None,
    negative_prompt: str = "",
    device: torch.device | None = None,
    told_guidance: float | None = None,
) -> Texts:
    """Encodes texts and the negative one, each distinct text once, and keeps their embeddings in memory.

    Args:
        pipeline: of a class in `CONVENTIONS`, with its text encoders, which are moved to `device` meanwhile.
        prompts: the texts; not empty.
        max_length: most tokens of a text; the pipeline's own when not given.
        negative_prompt: the text of the unconditional prediction.
        device: where it is done, and where conditions are made.
        told_guidance: the scale that a guidance-distilled network is told.

    Raises:
        InputError: for no texts, or empty ones.
    """
    check_prompts(prompts)
    source, homes = EncodedRows(pipeline, max_length), {name: part.device for name, part in encoders(pipeline).items()}
    if device is not None:
        source.to(device)
    keys = [*((prompt, False) for prompt in dict.fromkeys(prompts)), (negative_prompt, True)]
    hidden = len(keys) < LONG or os.environ.get("RANK", "0") != "0"
    held = {
        key: {name: value.cpu() for name, value in source.encode(key).items()}
        for key in tqdm(keys, "encoding texts", unit="text", mininterval=0.5, disable=hidden)
    }
    for name, part in encoders(pipeline).items():
        part.to(homes[name])
    longest = max(map(length, held.values()))
    return Texts(prompts, HeldRows(held), source.convention, negative_prompt, longest, told_guidance, device)


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses a list without texts, or with empty ones.

    Raises:
        InputError: says which.
    """
    if not prompts:
        raise InputError("There are no prompts: the file or column is empty.")
    empty = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        some = ", ".join(str(row + 1) for row in empty[:5]) + (", …" if len(empty) > 5 else "")
        which = (
            f"Prompt {some} of {len(prompts):,} is" if len(empty) == 1 else f"Prompts {some} of {len(prompts):,} are"
        )
        raise InputError(f"{which} empty ({len(empty):,} in all): take empty ones out.")
