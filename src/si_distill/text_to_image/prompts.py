"""Prompts of a data set, a text file or a cache of embeddings, as the texts that a pipeline is told."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.columns import explained, open_dataset
from ..data.config import DataConfig
from ..data.sources import without_mark
from ..errors import InputError
from .config import TextConfig
from .conventions import CONVENTIONS
from .notes import note
from .text_cache import TextCache, encoder_hash, is_text_cache
from .texts import EncodedRows, Texts, check_prompts, encode_texts, encoders
from .tokens import default_length

#: What FLUX.1-dev's own pipeline tells it unless it is told otherwise.
TOLD_GUIDANCE = 3.5


def load_texts(data: DataConfig, settings: TextConfig, pipeline: Any, device: torch.device) -> Texts:
    """The prompts that the settings describe, for a pipeline.

    Args:
        data: `name`, `data_files` and `caption_column` say where prompts are; `max_train_samples` takes the first ones.
        settings: of texts.
        pipeline: of a class in `CONVENTIONS`; of a cache of embeddings, its text encoders may be None.
        device: where texts are encoded and conditions are made.

    Raises:
        InputError: for prompts that cannot be found or are empty, and settings that the pipeline does not take.
    """
    if is_text_cache(data.name):
        return cached_texts(data, settings, pipeline, device)
    return texts_of(read_prompts(data), settings, pipeline, device)


def texts_of(prompts: Sequence[str], settings: TextConfig, pipeline: Any, device: torch.device) -> Texts:
    """Prompts that are at hand, such as captions, for a pipeline (see `load_texts`): encoded now, or as they are drawn."""
    told = told_guidance(settings, pipeline)
    check_length(settings.max_length, pipeline)
    negative = negative_prompt(settings, pipeline)
    check_prompts(prompts)
    if not encoders(pipeline):
        raise InputError(f"The {type(pipeline).__name__} was loaded without text encoders, which these prompts need.")
    longest = count_tokens(prompts, settings.max_length, pipeline)
    distinct = len(set(prompts))
    if distinct <= settings.max_texts_in_memory:
        return encode_texts(pipeline, prompts, settings.max_length, negative, device, told)
    note(
        f"{distinct:,} texts are more than `text.max_texts_in_memory` ({settings.max_texts_in_memory:,}): each batch is "
        "encoded when it is drawn, and the text encoders stay in memory (`si-distill precompute-texts` avoids both)."
    )
    source = EncodedRows(pipeline, settings.max_length, device)
    return Texts(prompts, source, source.convention, negative, longest, told, device)


def cached_texts(data: DataConfig, settings: TextConfig, pipeline: Any, device: torch.device) -> Texts:
    """The texts of a cache that `training/precompute_texts.py` made.

    Raises:
        InputError: when it is not whole, or its embeddings are not those that this pipeline would make.
    """
    kind, source = type(pipeline).__name__, pipeline.name_or_path
    told, negative = told_guidance(settings, pipeline), negative_prompt(settings, pipeline)
    cache = TextCache(data.name)
    recipe, found = cache.recipe, encoder_hash(source) if source else None
    compared = (
        ("pipeline", recipe.pipeline, kind),
        ("text.max_length", recipe.max_length, settings.max_length or default_length(pipeline)),
        ("text.negative_prompt", recipe.negative_prompt, negative),
    )
    if listing := "; ".join(f"{name}: {then!r} there, {now!r} here" for name, then, now in compared if then != now):
        raise InputError(
            f"The text cache {data.name} was made with other settings ({listing}): set them to what they were, or make a "
            "cache with `si-distill precompute-texts`."
        )
    if found is None or recipe.encoder["hash"] is None:
        note(
            f"the text encoders of {source or kind} are not on this machine: that {data.name} is of them is not checked."
        )
    elif found != recipe.encoder["hash"]:
        raise InputError(
            f"The text cache {data.name} was made with other text encoders, those of {recipe.encoder['name']} (hash "
            f"{recipe.encoder['hash']}), than {source} has (hash {found}). Make a cache with those: "
            f"si-distill precompute-texts --teacher {source} …"
        )
    prompts = cache.prompts[: data.max_train_samples]
    return Texts(prompts, cache, CONVENTIONS[kind], negative, cache.longest(prompts), told, device)


def read_prompts(data: DataConfig) -> list[str]:
    """The texts of a data set's column, or of a cache of embeddings, in order.

    Raises:
        InputError: when they cannot be read, there is no such column, or some are empty.
    """
    if is_text_cache(data.name):
        return TextCache(data.name).prompts[: data.max_train_samples]
    if data.name == "digits":
        raise InputError(
            "`data.name` is digits, images without captions: give prompts, such as a file with one on each line "
            "(--data.name text --data.data_files prompts.txt)."
        )
    if data.streaming and data.max_train_samples is None:
        raise InputError(
            "`data.streaming` is set, and prompts are needed by number: set `data.max_train_samples`, and that many are "
            "read from the head of the stream, or leave `data.streaming` out."
        )
    table = open_dataset(data)
    with explained(data):
        if data.streaming:
            table = table.take(data.max_train_samples)
            column = caption_column(data, table.features or table._resolve_features().features)
            prompts = [row[column] for row in table.select_columns([column])]
        else:
            column = caption_column(data, table.features)
            prompts = list(table.select_columns([column])[: data.max_train_samples or len(table)][column])
    prompts = [without_mark(prompt or "") for prompt in prompts]
    check_prompts(prompts)
    return prompts


def caption_column(data: DataConfig, features: dict[str, Any]) -> str:
    """The column that the settings name, or the only one of text.

    Raises:
        InputError: when there is none, more than one, or the one that was named holds something else.
    """
    import datasets

    kinds = [datasets.Value(kind) for kind in ("string", "large_string", "string_view")]
    texts = [name for name, feature in features.items() if feature in kinds]
    column = data.caption_column
    if column is None:
        if len(texts) != 1:
            raise InputError(
                f"{'More than one' if texts else 'No'} column of text among {list(features)}: set `data.caption_column`."
            )
        return texts[0]
    if column not in features:
        raise InputError(f"The data set has no column {column!r}; its columns are {list(features)}.")
    if column not in texts:
        raise InputError(
            f"The column {column!r} holds {features[column]}, not one text in each row: set `data.caption_column` to "
            f"{' or '.join(map(repr, texts)) or 'a column of text, which this data set does not have'}."
        )
    return column


def check_length(max_length: int | None, pipeline: Any) -> None:
    """Refuses a `max_length` that a pipeline does not take.

    Raises:
        InputError: says which it takes.
    """
    kind, most = type(pipeline).__name__, CONVENTIONS[type(pipeline).__name__].most_tokens
    if max_length is None:
        return
    if default_length(pipeline) is None:
        raise InputError(f"`text.max_length` is {max_length}, but a {kind} always takes 77 tokens: leave it out.")
    if most is not None and max_length > most(pipeline):
        raise InputError(f"`text.max_length` is {max_length}, but a {kind} takes at most {most(pipeline)} tokens.")


def count_tokens(prompts: Sequence[str], max_length: int | None, pipeline: Any) -> int:
    """Tokens of the longest prompt as the network gets it (see `Texts`); says how many prompts are cut.

    Raises:
        InputError: when what the pipeline puts around prompts leaves no token for them.
    """
    longest = 0
    for place, reading in enumerate(CONVENTIONS[type(pipeline).__name__].readings):
        tokenizer = getattr(pipeline, reading.tokenizer, None)
        if tokenizer is None:
            continue
        limit, (around,) = reading.limit(pipeline, max_length), reading.count(pipeline, [""])
        if around >= limit:
            raise InputError(
                f"`text.max_length` is {max_length or default_length(pipeline)}, but what a {type(pipeline).__name__} puts "
                f"around a prompt takes {around - reading.dropped(pipeline)} tokens: give a larger one."
            )
        counts = reading.count(pipeline, prompts)
        cut = [row for row, count in enumerate(counts) if count > limit]
        if cut:
            note(
                f"{len(cut):,} of {len(prompts):,} prompts are cut for `{reading.tokenizer}`, a {type(tokenizer).__name__}: "
                f"with what is put around them they have more than {limit} tokens (prompt {cut[0] + 1} has "
                f"{counts[cut[0]]})."
            )
        if place == 0:
            longest = min(max(counts), limit) - reading.dropped(pipeline)
    return longest


def told_guidance(settings: TextConfig, pipeline: Any) -> float | None:
    """The scale that the network of a pipeline is told; None of most, which are told none.

    Raises:
        InputError: when a scale is given to a network that is told none.
    """
    convention = CONVENTIONS[type(pipeline).__name__]
    network = getattr(pipeline, convention.network)
    if convention.told_guidance and network.config.guidance_embeds:
        if settings.told_guidance is None:
            note(f"this {type(pipeline).__name__} is guidance-distilled: it is told the scale {TOLD_GUIDANCE}.")
            return TOLD_GUIDANCE
        return settings.told_guidance
    if settings.told_guidance is not None:
        raise InputError(
            f"`text.told_guidance` is {settings.told_guidance}, but the network of this {type(pipeline).__name__} is told "
            "no scale: leave it out."
        )
    return None


def negative_prompt(settings: TextConfig, pipeline: Any) -> str:
    """The text of the unconditional prediction; what stands for an empty one is the pipeline's."""
    blank = CONVENTIONS[type(pipeline).__name__].blank
    if not settings.negative_prompt and blank:
        note(f"an empty negative prompt is {blank!r} to a {type(pipeline).__name__}.")
    return settings.negative_prompt or blank
