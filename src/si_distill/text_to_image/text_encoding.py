"""Makes a cache of embeddings: each distinct text once, in shards that a kill leaves whole.

A shard belongs to one process, and each text is encoded by itself: neither the number of processes nor a kill changes what
is in a file.
"""

import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..conversion.diffusers_teachers import saved_class
from ..data.shard_making import make_shards
from ..errors import InputError
from ..files import LOCK, refuse_links
from ..launching import join_processes
from ..units import binary_size
from .config import PrecomputeTextsConfig
from .conventions import CONVENTIONS
from .notes import note
from .prompts import check_length, count_tokens, negative_prompt, read_prompts
from .teacher import load_stock_pipeline
from .text_cache import (
    MANIFEST,
    PROMPTS,
    Recipe,
    Shard,
    encoder_hash,
    is_text_cache,
    shard_header,
    texts_hash,
    whole_shard,
    write_manifest,
    write_prompts,
    write_shard,
)
from .texts import EncodedRows, Key, length
from .tokens import default_length

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def precompute_texts(settings: PrecomputeTextsConfig) -> None:
    """Encodes what is missing, then writes the manifest; collective.

    Raises:
        InputError: for a pipeline or texts that cannot be had, a folder that holds something else or cannot be written, or
            too little room.
    """
    if is_text_cache(settings.data.name):
        raise InputError(
            f"`data.name` is {settings.data.name}, a cache of embeddings already: give the prompts themselves."
        )
    state = join_processes(timeout=timedelta(hours=12))  # a process may wait for another one's last shards
    with state.main_process_first():  # one of them downloads
        prompts = read_prompts(settings.data)
        pipeline = load_encoders(settings.teacher, DTYPES[settings.dtype])
    check_length(settings.text.max_length, pipeline)
    longest = count_tokens(prompts, settings.text.max_length, pipeline)
    cache = _Cache(settings, pipeline, prompts, state)
    cache.check(longest)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    cache.make()


def load_encoders(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A stock pipeline of which only the text encoders are in memory; its network is a description without weights.

    Raises:
        InputError: when it cannot be loaded.
    """
    convention = CONVENTIONS.get(saved_class(name, "teacher") or "")
    if convention is None:
        return load_stock_pipeline(name)  # says what is wrong with it
    try:
        _, kind = DiffusionPipeline.load_config(name)[convention.network]
        cls = getattr(diffusers, kind)
        with torch.device("meta"):
            network = cls.from_config(cls.load_config(name, subfolder=convention.network))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"Cannot read what the {convention.network} of {name!r} is: {error}") from error
    return load_stock_pipeline(name, dtype, **{convention.network: network, "vae": None})


class _Cache:
    """The making of one cache.

    Args:
        settings: of the run.
        pipeline: with the encoders.
        prompts: of the data set, in order.
        state: this process.
    """

    def __init__(
        self, settings: PrecomputeTextsConfig, pipeline: DiffusionPipeline, prompts: Sequence[str], state: PartialState
    ):
        self.settings, self.prompts, self.state = settings, prompts, state
        self.folder = Path(settings.texts_dir)
        self.encoded = EncodedRows(pipeline, settings.text.max_length, state.device)
        self.recipe = Recipe(
            pipeline=type(pipeline).__name__,
            encoder={"name": settings.teacher, "hash": encoder_hash(settings.teacher)},
            dtype=settings.dtype,
            max_length=settings.text.max_length or default_length(pipeline),
            negative_prompt=negative_prompt(settings.text, pipeline),
            texts_per_shard=settings.texts_per_shard,
        )
        self.keys: list[Key] = [
            (self.recipe.negative_prompt, True),
            *((each, False) for each in dict.fromkeys(prompts)),
        ]
        size = settings.texts_per_shard
        self.parts = [self.keys[start : start + size] for start in range(0, len(self.keys), size)]

    def _path(self, number: int) -> Path:
        return self.folder / f"texts_{number:05d}.safetensors"

    def check(self, longest: int) -> None:
        """Refuses a folder that holds something else, or a disk without room; changes nothing.

        Args:
            longest: tokens of the longest text, where texts have their own lengths.
        """
        folder, shards = self.folder, sorted(self.folder.glob("texts_*.safetensors"))
        if folder.exists() and not folder.is_dir():
            raise InputError(f"`texts_dir` {folder} is a file, not a folder.")
        for path in folder.iterdir() if folder.is_dir() else ():
            if not path.name.startswith(("texts_", MANIFEST, PROMPTS, LOCK)):
                raise InputError(
                    f"`texts_dir` {folder} holds {path.name}, which is no part of a text cache: give a new folder."
                )
            refuse_links(folder, (path.name,))
        expected = {self._path(number).name: texts_hash(keys) for number, keys in enumerate(self.parts)}
        for path in shards:
            made_of = shard_header(path)
            if made_of is None:
                continue
            if difference := made_of[0].difference(self.recipe):
                raise InputError(
                    f"`texts_dir` {folder} holds embeddings that were made with other settings ({difference}). Use the same "
                    "to go on, or give another folder."
                )
            if made_of[1] != expected.get(path.name):
                raise InputError(
                    f"`texts_dir` {folder} holds embeddings of other texts ({path.name}): give another folder."
                )
        blank = self.encoded.encode(self.keys[0])
        tokens = length(blank) if self.encoded.convention.mask is None else max(longest, length(blank))
        each = sum(
            (tokens * value[0].numel() if value.ndim == 2 else value.numel()) * value.element_size()
            for value in blank.values()
        )
        needed = each * len(self.keys) - sum(path.stat().st_size for path in shards)
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise InputError(
                f"The embeddings that are still to be made take up to {binary_size(needed)}, but there are "
                f"{binary_size(free)} free in {place}: make room, or give another `texts_dir`."
            )
        if self.state.is_main_process:
            print(
                f"texts:  {len(self.prompts):,}, of which {len(self.keys) - 1:,} differ, of up to {tokens} tokens\n"
                f"size:   up to {binary_size(each)} each in {self.settings.dtype}, {binary_size(each * len(self.keys))} in "
                f"all\nwrites: {folder}/: {MANIFEST}, {PROMPTS}, texts_*.safetensors",
                flush=True,
            )
            if self.recipe.encoder["hash"] is None:
                note("the encoders are not safetensors: a training cannot check that its cache is of its own encoders.")

    def make(self) -> None:
        """Makes the shards that are missing, each process its own, then the manifest."""
        make_shards(self.folder, MANIFEST, "embeddings", self.state, self._encode_share, self._finish)

    def _encode_share(self) -> list[Shard]:
        state = self.state
        share = range(state.process_index, len(self.parts), state.num_processes)
        who = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        with tqdm(
            total=sum(len(self.parts[number]) for number in share),
            desc=f"{self.folder.name}{who}",
            unit="text",
            disable=not state.is_main_process,
            mininterval=0.5,
        ) as bar:
            return [self._encode_shard(self._path(number), self.parts[number], bar) for number in share]

    def _encode_shard(self, path: Path, keys: Sequence[Key], bar: tqdm) -> Shard:
        if path.exists():
            shard = whole_shard(path, keys)
            if shard is not None:
                bar.update(len(keys))
                bar.initial = bar.n  # the rate is that of this run
                return shard
            print(f"{path.name} is damaged: it is made again.", flush=True)
        rows = []
        for key in keys:
            rows.append({name: value.cpu() for name, value in self.encoded.encode(key).items()})
            bar.update()
        return write_shard(path, self.recipe, keys, rows, self.encoded.convention.mask)

    def _finish(self, shards: list[Shard]) -> None:
        missing = [shard.file for shard in shards if not (self.folder / shard.file).is_file()]
        if missing:
            raise InputError(
                f"{missing[0]} is not in {self.folder}: all processes must write to one shared file system."
            )
        places = {text: place for place, (text, _) in enumerate(self.keys[1:])}
        listing = write_prompts(self.folder, list(places), [places[prompt] for prompt in self.prompts])
        write_manifest(self.folder, self.recipe, len(self.prompts), listing, shards)
        size = binary_size(sum(shard.bytes for shard in shards))
        print(f"Finished: {len(self.prompts):,} texts, {size} in {self.folder}.", flush=True)
