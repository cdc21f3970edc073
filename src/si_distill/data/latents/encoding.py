"""Makes a cache of latents: each image and its mirror image once through a VAE, in shards that a kill leaves whole.

A part of the images belongs to one process and ends in its own shards, so that neither the number of processes nor a kill
changes what is in a shard.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ...autoencoders import describe_vae, load_vae
from ...errors import InputError
from ...files import LOCK, delete, refuse_links
from ...fingerprints import hub_commit
from ...launching import join_processes
from ...pipelines import LatentScaling
from ...units import binary_size
from ..decoding import CROP, UnreadableImage
from ..shard_making import make_shards
from .config import LatentsConfig
from .format import MANIFEST, VAE_FOLDER, Manifest, Recipe, Shard, encoder_hash, shard_recipe, whole_shard, write_shard
from .parts import Item, StreamParts, TableParts, in_threads, open_parts

#: Settings of `data` that decide which images these are; a training chooses the others for itself.
IMAGE_SETTINGS = (
    "name config_name data_files split streaming image_column label_column caption_column num_classes image_size "
    "max_train_samples"
).split()
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def dry_run(settings: LatentsConfig) -> str:
    """What a run would make, from the VAE's config alone.

    Raises:
        InputError: when that cannot be read, or the VAE cannot encode images of that size.
    """
    return report(settings, describe_vae(settings.vae)[0], settings.data.max_train_samples)


def print_dry_run(settings: LatentsConfig) -> None:
    """Prints the report, once per run."""
    text = dry_run(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{text}\nDry run: nothing was loaded, encoded or written.", flush=True)


def precompute_latents(settings: LatentsConfig) -> None:
    """Encodes what is missing, then writes the manifest; collective.

    Raises:
        InputError: for a VAE or images that cannot be had, a folder that holds something else or cannot be written, too
            little room, too many images that cannot be read, latents that are not finite.
    """
    # A process may wait for another one's last part longer than the ten minutes after which NCCL gives up.
    state = join_processes(timeout=timedelta(hours=12))
    with state.main_process_first():  # one of them downloads
        vae, pixel_min = load_vae(settings.vae)
        images = open_parts(settings.data, settings.images_per_shard)
    if images.data.channels not in (1, vae.config.in_channels):
        raise InputError(
            f"The images of {settings.data.name} have {images.data.channels} channels, but the autoencoder {settings.vae} "
            f"takes {vae.config.in_channels}."
        )
    if images.count < state.num_processes and state.is_main_process:
        print(
            f"{settings.data.name} is read in {images.count} part(s): the other {state.num_processes - images.count} "
            "processes have nothing to do.",
            flush=True,
        )
    cache = _Cache(settings, images, vae, LatentScaling.of(vae, pixel_min), state)
    cache.check()
    if state.is_main_process:
        print(report(settings, vae, images.images), flush=True)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    cache.make()


def report(settings: LatentsConfig, vae: torch.nn.Module, images: int | None) -> str:
    """What is made and how large it is, for a person.

    Args:
        settings: of the run.
        vae: may be on the meta device.
        images: how many there are, or None when nothing says it.
    """
    size, shape = settings.data.image_size, latent_shape(vae, settings.data.image_size)
    each = _bytes_per_image(settings, shape)
    total = images or 1_000_000
    lines = {
        "vae": f"{settings.vae}: {type(vae).__name__}, {sum(p.numel() for p in vae.parameters()):,} parameters",
        "images": f"{settings.data.name}, split {settings.data.split}, {size} × {size} pixels",
        "latents": f"{' × '.join(map(str, shape))}, mean and standard deviation, {settings.dtype}, of each image and its "
        f"mirror image: {binary_size(each)}",
        "size": ("about " if images else "not known; a million images take ")
        + f"{binary_size(each * total)}"
        + (f" for {images:,} images" if images else "")
        + f", in files of up to {binary_size(each * settings.images_per_shard)}",
        "writes": f"{settings.output_dir}/: {MANIFEST}, shard_*.safetensors, {VAE_FOLDER}/",
    }
    return "\n".join(f"{name + ':':<8} {text}" for name, text in lines.items())


def latent_shape(vae: torch.nn.Module, size: int) -> list[int]:
    """[C, h, w] of images of that size, from shapes alone.

    Raises:
        InputError: when the VAE does not bring them back to that size.
    """
    with torch.device("meta"), torch.no_grad():
        copy = type(vae).from_config(vae.config)
        shape = list(encode(copy, torch.zeros(1, vae.config.in_channels, size, size))[0].shape[1:])
    if shape[1] * max(1, round(size / shape[1])) != size:
        raise InputError(
            f"`data.image_size` is {size}, which the autoencoder cannot halve without a rest: its latents would be "
            f"{shape[1]}×{shape[2]}. Take a multiple of {round(size / shape[1])}."
        )
    return shape


def encode(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (B, C, h, w) of the VAE's posterior; the latter is 0 of an autoencoder that has none."""
    posterior = vae.encode(pixels, return_dict=False)[0]
    if isinstance(posterior, torch.Tensor):
        return posterior, torch.zeros_like(posterior)
    return posterior.mean, posterior.std


def _bytes_per_image(settings: LatentsConfig, shape: list[int]) -> int:
    return 2 * 2 * shape[0] * shape[1] * shape[2] * DTYPES[settings.dtype].itemsize + 8  # and the label


class _Cache:
    """The making of one cache.

    Args:
        settings: of the run.
        images: to encode.
        vae: on the CPU.
        scaling: of its latents.
        state: this process.
    """

    def __init__(
        self,
        settings: LatentsConfig,
        images: TableParts | StreamParts,
        vae: torch.nn.Module,
        scaling: LatentScaling,
        state: PartialState,
    ):
        self.settings, self.images, self.scaling, self.state = settings, images, scaling, state
        self.folder = Path(settings.output_dir)
        self.skipped: list[str] = []
        recipe = Recipe(
            vae={
                "name": settings.vae,
                "revision": hub_commit(vae.config),
                "class": type(vae).__name__,
                "encoder": encoder_hash(vae),
            },
            scaling=asdict(scaling),
            data={name: getattr(settings.data, name) for name in IMAGE_SETTINGS},
            parts=images.identity,
            crop=CROP,
            latent_shape=latent_shape(vae, settings.data.image_size),
            dtype=settings.dtype,
            mixed_precision=settings.mixed_precision,
            images_per_shard=settings.images_per_shard,
        )
        self.recipe = Recipe(**json.loads(json.dumps(asdict(recipe))))  # as shards give it back
        self.vae = vae.requires_grad_(False).eval().to(state.device)

    def check(self) -> None:
        """Refuses a folder that holds something else, or a disk without room; changes nothing."""
        folder, shards = self.folder, sorted(self.folder.glob("shard_*.safetensors"))
        if folder.exists() and not folder.is_dir():
            raise InputError(f"`output_dir` {folder} is a file, not a folder.")
        for path in folder.iterdir() if folder.is_dir() else ():
            if not path.name.startswith(("shard_", MANIFEST, VAE_FOLDER, LOCK)):
                raise InputError(
                    f"`output_dir` {folder} holds {path.name}, which is no part of a latent cache: give a new folder."
                )
            refuse_links(folder, (path.name,))
        for path in shards:
            made_of = shard_recipe(path)
            difference = made_of.difference(self.recipe) if made_of is not None else ""
            if difference:
                raise InputError(
                    f"`output_dir` {folder} holds latents that were made with other settings ({difference}). Use the same "
                    "to go on, or give another folder."
                )
        if self.images.images is not None:
            needed = self.images.images * _bytes_per_image(self.settings, self.recipe.latent_shape)
            needed -= sum(path.stat().st_size for path in shards)
            place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(place).free
            if needed > free:
                raise InputError(
                    f"The latents that are still to be made take {binary_size(needed)}, but there are {binary_size(free)} "
                    f"free in {place}: make room, or give another `output_dir`."
                )

    def make(self) -> None:
        """Makes the shards that are missing, each process its parts, then the manifest."""
        make_shards(self.folder, MANIFEST, "latents", self.state, self._encode_share, self._finish)

    def _encode_share(self) -> list[Shard]:
        state, images = self.state, self.images
        share = range(state.process_index, images.count, state.num_processes)
        lengths = [images.length(part) for part in share]
        who = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        with tqdm(
            total=None if None in lengths else sum(lengths),
            desc=f"{self.folder.name}{who}",
            unit="img",
            disable=not state.is_main_process,
            mininterval=0.5,
        ) as bar:
            return [shard for part in share for shard in self._encode_part(part, bar)]

    def _encode_part(self, part: int, bar: tqdm) -> Iterator[Shard]:
        size, number, place = self.settings.images_per_shard, 0, 0
        while (path := self._path(part, number)).exists():
            shard = whole_shard(path)
            if shard is None:
                print(f"{path.name} is damaged: it is made again.", flush=True)
                break
            yield shard
            number, place = number + 1, place + shard.images + shard.skipped
            bar.update(shard.images + shard.skipped)
            bar.initial = bar.n  # the rate is that of this run
            if place < number * size:  # only the last one of a part is not full
                return
        if place == self.images.length(part):
            return
        items = in_threads(self.images.jobs(part, place), self.settings.num_threads, 2 * self.settings.batch_size)
        for first in items:
            yield self._encode_shard(self._path(part, number), chain([first], islice(items, size - 1)), bar)
            number += 1

    def _path(self, part: int, number: int) -> Path:
        return self.folder / f"shard_{part:05d}-{number:05d}.safetensors"

    def _encode_shard(self, path: Path, items: Iterator[Item], bar: tqdm) -> Shard:
        empty = torch.zeros(0, 2, 2, *self.recipe.latent_shape, dtype=DTYPES[self.settings.dtype])
        moments, labels, skipped = [empty], [], 0
        while batch := list(islice(items, self.settings.batch_size)):
            good = [item for item in batch if not isinstance(item, UnreadableImage)]
            skipped += len(batch) - len(good)
            self._count_skipped([str(item) for item in batch if isinstance(item, UnreadableImage)])
            if good:
                moments.append(self._moments(torch.stack([image for image, _ in good])))
                labels += [label for _, label in good]
            bar.update(len(batch))
        return write_shard(path, self.recipe, torch.cat(moments), torch.tensor(labels, dtype=torch.int64), skipped)

    def _count_skipped(self, problems: list[str]) -> None:
        self.skipped += problems
        limit = self.settings.data.max_corrupt_images
        if len(self.skipped) > limit:
            raise InputError(
                f"{len(self.skipped)} images of {self.settings.data.name} cannot be read, more than "
                f"`data.max_corrupt_images` = {limit}. The last: {self.skipped[-1]} What is whole is kept."
            )

    @torch.no_grad()
    def _moments(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 2, 2, C, h, w) of images (B, C, S, S), uint8: of each and of its mirror image, mean and deviation."""
        device = self.state.device
        pixels = self.scaling.encode_pixels(images.to(device).float() / 127.5 - 1)
        pixels = pixels.expand(-1, self.vae.config.in_channels, -1, -1)  # grey as three equal channels
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16"):
            mean, std = encode(self.vae, torch.cat([pixels, pixels.flip(3)]))
        dtype = DTYPES[self.settings.dtype]
        moments = torch.stack([mean, std], 1).to(dtype).unflatten(0, (2, len(images))).transpose(0, 1).cpu()
        if not moments.isfinite().all():
            raise InputError(
                f"The autoencoder gives latents that are not finite in {self.settings.dtype} (mixed_precision "
                f"{self.settings.mixed_precision}): take --dtype float32 and --mixed_precision no."
            )
        return moments.contiguous()

    def _finish(self, shards: list[Shard]) -> None:
        missing = [shard.file for shard in shards if not (self.folder / shard.file).is_file()]
        if missing:
            raise InputError(
                f"{missing[0]} is not in {self.folder}: all processes must write to one shared file system."
            )
        partial = self.folder / f"{VAE_FOLDER}.tmp"
        self.vae.save_pretrained(partial)
        delete(self.folder / VAE_FOLDER)
        partial.rename(self.folder / VAE_FOLDER)
        manifest = Manifest(self.recipe, self.images.data.class_names, shards)
        manifest.write(self.folder)
        unread = f", {manifest.skipped:,} more could not be read" if manifest.skipped else ""
        text = f"Finished: {manifest.images:,} images{unread}"
        print(f"{text}, {binary_size(sum(shard.bytes for shard in shards))} in {self.folder}.", flush=True)
