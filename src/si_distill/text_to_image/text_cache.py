"""Embeddings of texts on disk: each distinct text encoded once, and the text encoders are not needed any more.

A folder with

* `texts.json`, the manifest, written last: a folder without it is not finished;
* `texts_*.safetensors`: embeddings of some texts in a row, as the encoders gave them: `tokens/…` (ΣL, D) one text after
  the other with their `lengths` (N,), `pooled/…` (N, D); the negative text is the first of all;
* `prompts.safetensors`: the distinct texts in UTF-8, and the order in which the data set has them.
"""

import bisect
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import fingerprints
from ..errors import InputError
from ..files import whole_file, write_text
from ..reading import check_shape, parse_json, read_json
from .texts import Key, Row, length

MANIFEST, PROMPTS = "texts.json", "prompts.safetensors"
#: Name of a shard's metadata.
HEADER = "texts"
#: Raised when the meaning of the files changes.
FORMAT = 1
_RECIPE = {
    "pipeline": str,
    "encoder": {"name": str, "hash": (str, None)},
    "dtype": str,
    "max_length": (int, None),
    "negative_prompt": str,
    "texts_per_shard": int,
}
_SHARD = {"file": str, "texts": int, "bytes": int, "hash": str}
# What a manifest must hold (see `read_json`).
_SHAPE = {"recipe": _RECIPE, "prompts": int, "texts": int, "list": str, "shards": [_SHARD]}
#: What reading a file of someone else may raise.
_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True)
class Recipe:
    """What embeddings are made of; every shard says it.

    Args:
        pipeline: the class.
        encoder: `name` (folder or Hub id) and `hash` (see `encoder_hash`).
        dtype: of the encoders.
        max_length: most tokens of a text; None of pipelines that always take 77.
        negative_prompt: the text of the unconditional prediction.
        texts_per_shard: at most.
    """

    pipeline: str
    encoder: dict[str, Any]
    dtype: str
    max_length: int | None
    negative_prompt: str
    texts_per_shard: int

    def difference(self, other: "Recipe") -> str:
        """A readable list of differences that change the embeddings or the shards; a pipeline may have moved."""
        here, there = ({**asdict(each), "encoder": each.encoder["hash"]} for each in (self, other))
        return "; ".join(
            f"{name}: {here[name]!r} then, {there[name]!r} now" for name in here if here[name] != there[name]
        )


@dataclass(frozen=True)
class Shard:
    """The manifest's entry of a file: its name, how many texts it has, its size and the hash of its tensors."""

    file: str
    texts: int
    bytes: int
    hash: str


def is_text_cache(name: str) -> bool:
    """Whether the name of a data set is the folder of a cache of embeddings, or of one that is not finished."""
    path = Path(name)
    return path.is_dir() and ((path / MANIFEST).is_file() or next(path.glob("texts_*.safetensors*"), None) is not None)


def without_encoders(name: str) -> dict[str, None]:
    """The text encoders of a saved pipeline, left out: components for `load_stock_pipeline` when texts are in a cache."""
    return {part: None for part in DiffusionPipeline.load_config(name) if part.startswith("text_encoder")}


class TextCache:
    """A cache of embeddings (a `Rows` of `Texts`).

    Args:
        folder: of the cache.

    Raises:
        InputError: when it is not whole.

    Attributes:
        prompts: the data set's texts in its order.
        recipe: what the embeddings are made of.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        values = _read_manifest(self.folder)
        try:
            self.recipe, shards = Recipe(**values["recipe"]), [Shard(**shard) for shard in values["shards"]]
            texts, order = _read_prompts(self.folder, values["list"])
            self.prompts = [texts[place] for place in order]
            self._ends: list[list[int]] = [_shard_ends(self.folder / shard.file, shard) for shard in shards]
        except _DAMAGE as error:
            raise InputError(
                f"The text cache {self.folder} is damaged: {error}. Run `si-distill precompute-texts` again with the "
                f"settings of the cache (they are in its {MANIFEST}): what is whole is kept."
            ) from error
        self._first = [0, *itertools.accumulate(len(ends) for ends in self._ends)]
        if (len(self.prompts), len(texts) + 1) != (values["prompts"], self._first[-1]):
            raise InputError(
                f"The text cache {self.folder} is damaged: its {PROMPTS} and its shards do not fit together."
            )
        self._files = [shard.file for shard in shards]
        self._places = {(text, False): place for place, text in enumerate(texts, start=1)}
        self._places[self.recipe.negative_prompt, True] = 0
        self._opened: dict[int, Any] = {}

    def _place(self, key: Key) -> tuple[int, int, slice]:
        """The shard of a text, its number there, and where its tokens are."""
        place = self._places[key]
        number = bisect.bisect_right(self._first, place) - 1
        index, ends = place - self._first[number], self._ends[number]
        return number, index, slice(ends[index - 1] if index else 0, ends[index])

    def longest(self, prompts: Sequence[str]) -> int:
        """Tokens of the longest of these texts."""
        places = (self._place((prompt, False))[2] for prompt in set(prompts))
        return max(place.stop - place.start for place in places)

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        return [self._row(*self._place(key)) for key in keys]

    def _row(self, number: int, index: int, tokens: slice) -> Row:
        if number not in self._opened:
            self._opened[number] = safe_open(self.folder / self._files[number], framework="pt").__enter__()
        file, row = self._opened[number], {}
        for name in file.keys():  # noqa: SIM118  (no mapping)
            kind, _, argument = name.partition("/")
            if argument:
                row[argument] = file.get_slice(name)[tokens if kind == "tokens" else slice(index, index + 1)]
                row[argument] = row[argument] if kind == "tokens" else row[argument][0]
        return row

    def to(self, device: torch.device) -> None:
        pass


def encoder_hash(name: str) -> str | None:
    """What tells the text encoders of a saved pipeline from others: hash of the first values of each of their tensors.

    It reads little, and no encoder has to be loaded: a training with a cache does without them.

    Args:
        name: of the pipeline, a folder or the id of a repository that was downloaded before.

    Returns:
        None where its safetensors are not on this machine.
    """
    found = []
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        index = _stored(name, f"{part}/model.safetensors.index.json")
        files = ["model.safetensors"]
        if index is not None:
            files = sorted(set(read_json(index, {"weight_map": {str: str}})["weight_map"].values()))
        for path in [_stored(name, f"{part}/{Path(file).name}") for file in files]:
            if path is None:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        shape = file.get_slice(key).get_shape()
                        value = file.get_slice(key)[:1] if shape else file.get_tensor(key)
                        found.append((f"{part}.{key} {shape}", value))
            except (OSError, SafetensorError) as error:
                raise InputError(f"Cannot read the text encoder {path}: {error}") from error
    return fingerprints.of_tensors(sorted(found, key=lambda each: each[0])) if found else None


def _stored(name: str, file: str) -> Path | None:
    """A file of a pipeline's folder, or of the Hub's cache on this machine."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def texts_hash(keys: Sequence[Key]) -> str:
    """Hash of texts and what they stand for."""
    return fingerprints.of_values([list(key) for key in keys])


def write_shard(path: Path, recipe: Recipe, keys: Sequence[Key], rows: Sequence[Row], mask: str | None) -> Shard:
    """Writes the embeddings of some texts whole, or not at all."""
    tensors = {"lengths": torch.tensor([length(row) for row in rows])}
    for name, value in rows[0].items():
        if value.ndim == 2 or name == mask:
            tensors[f"tokens/{name}"] = torch.cat([row[name] for row in rows])
        else:
            tensors[f"pooled/{name}"] = torch.stack([row[name] for row in rows])
    digest = fingerprints.of_tensors(sorted(tensors.items()))
    header = {"file": path.name, "recipe": asdict(recipe), "texts": texts_hash(keys), "hash": digest}
    with whole_file(path) as file:
        file.write(save(tensors, metadata={HEADER: json.dumps(header)}))
    return Shard(path.name, len(keys), path.stat().st_size, digest)


def shard_header(path: Path) -> tuple[Recipe, str] | None:
    """What a shard says it is made of, and the hash of its texts; None of a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file)
            return Recipe(**header["recipe"]), header["texts"]
    except _DAMAGE:
        return None


def whole_shard(path: Path, keys: Sequence[Key]) -> Shard | None:
    """The entry of a shard that has these texts and the tensors that it says it has; None of any other."""
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file)
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        wanted = (path.name, texts_hash(keys), fingerprints.of_tensors(tensors.items()))
        if (header["file"], header["texts"], header["hash"]) == wanted:
            return Shard(path.name, len(keys), path.stat().st_size, header["hash"])
    except _DAMAGE:
        pass
    return None


def _header(file: Any) -> dict[str, Any]:
    shape = {"file": str, "recipe": _RECIPE, "texts": str, "hash": str}
    return parse_json((file.metadata() or {})[HEADER], shape)


def _shard_ends(path: Path, shard: Shard) -> list[int]:
    """Where the tokens of each text of a shard end; raises one of `_DAMAGE` when it is not the manifest's."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size != shard.bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {shard.bytes}")
    with safe_open(path, framework="pt") as file:
        found, lengths = _header(file)["hash"], file.get_tensor("lengths")
        if found != shard.hash:
            raise ValueError(f"{path.name} holds other embeddings (hash {found}) than the manifest says ({shard.hash})")
    if lengths.shape != (shard.texts,):
        raise ValueError(f"{path.name} does not have {shard.texts} texts")
    return lengths.cumsum(0).tolist()


def write_prompts(folder: Path, texts: Sequence[str], order: Sequence[int]) -> str:
    """Writes the distinct texts and where the data set has them, and gives the hash."""
    coded = [text.encode() for text in texts]
    ends = torch.tensor(list(itertools.accumulate(map(len, coded))))
    data = torch.frombuffer(bytearray(b"".join(coded)), dtype=torch.uint8)
    tensors = {"ends": ends, "order": torch.tensor(order), "text": data}
    with whole_file(folder / PROMPTS) as file:
        file.write(save(tensors))
    return fingerprints.of_tensors(tensors.items())


def _read_prompts(folder: Path, digest: str) -> tuple[list[str], list[int]]:
    with safe_open(folder / PROMPTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("ends", "order", "text")}
    if fingerprints.of_tensors(tensors.items()) != digest:
        raise ValueError(f"{PROMPTS} holds other texts than the manifest says")
    data = tensors["text"].numpy().tobytes()
    ends = [0, *tensors["ends"].tolist()]
    return [data[a:b].decode() for a, b in itertools.pairwise(ends)], tensors["order"].tolist()


def write_manifest(folder: Path, recipe: Recipe, prompts: int, listing: str, shards: Sequence[Shard]) -> None:
    """Writes the manifest, with a hash that reveals manual changes."""
    values = {
        "format": FORMAT,
        "prompts": prompts,
        "texts": sum(shard.texts for shard in shards),
        "recipe": asdict(recipe),
        "list": listing,
        "shards": [asdict(shard) for shard in shards],
    }
    write_text(folder / MANIFEST, json.dumps({**values, "hash": fingerprints.of_values(values)}, indent=1) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(
            f"The text cache {folder} has no {MANIFEST}: it is not finished. Run the command that makes it "
            "(`si-distill precompute-texts`) again; what is there is kept."
        )
    values = read_json(file, {"format": int, "hash": str}, "Restore it, or make the cache again.")
    written = values.pop("hash")
    if values["format"] != FORMAT:
        raise InputError(
            f"The text cache {folder} has format {values['format']}; this version reads {FORMAT}: make it again."
        )
    if written != fingerprints.of_values(values):
        raise InputError(
            f"{file} was changed after it was written: restore it, or run `si-distill precompute-texts` again with the "
            "settings of the cache."
        )
    try:
        check_shape(values, _SHAPE)
        strange = [shard["file"] for shard in values["shards"] if Path(shard["file"]).name != shard["file"]]
        if strange:
            raise ValueError(f"it names files elsewhere: {strange[0]}")
    except ValueError as error:
        raise InputError(f"{file} is not the manifest of a text cache: {error}.") from error
    return values
