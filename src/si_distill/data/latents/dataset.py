"""Latents that were encoded once, as a data set of their own."""

import bisect
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...autoencoders import load_vae
from ...errors import InputError
from ...pipelines import LatentScaling
from ..batches import Batch, IndexedData
from ..config import DataConfig
from .format import MANIFEST, VAE_FOLDER, Shard, encoder_hash, map_moments, read_manifest, shard_labels


class LatentDataset(IndexedData):
    """A cache of latents as a data set for networks that work on them (a `TrainingData`).

    `dataset[i]` is a dict: `latents_mean` and `latents_std` (2, C, h, w), of the image and its mirror image, in the VAE's
    scale and the stored type, and `labels`, an int. `sampled` makes a network's latents of a batch.

    Args:
        config: `name` is the folder; `image_size` that of its images. Columns, files and split were chosen when it was made.

    Raises:
        InputError: when the cache is not whole, or not of this size.
    """

    def __init__(self, config: DataConfig):
        if config.has_references:
            raise InputError(f"The latent cache {config.name} holds images alone: leave the references of `data` out.")
        self.folder = Path(config.name)
        self.manifest = manifest = read_manifest(self.folder)
        recipe = manifest.recipe
        size = recipe.data["image_size"]
        if config.image_size != size:
            raise InputError(
                f"`data.image_size` is {config.image_size}, but the latent cache {self.folder} was made from images of "
                f"{size}×{size} pixels: set it to {size}, or make another cache."
            )
        made_of = recipe.data.get("caption_column")
        if config.caption_column is not None and made_of is None:
            raise InputError(
                f"`data.caption_column` is {config.caption_column!r}, but the latent cache {self.folder} was made without "
                "captions: make another one, with this setting."
            )
        self.name = recipe.data["name"]
        self.channels, self.size, _ = recipe.latent_shape
        unlabelled = config.label_column == "none"
        self.class_names = [] if unlabelled else manifest.class_names
        self.scaling = LatentScaling(**{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.scaling.items()})
        labels = list(itertools.chain.from_iterable(map(self._labels, manifest.shards)))
        self.labels = ([0] * len(labels) if unlabelled else labels)[: config.max_train_samples]
        self._ends = list(itertools.accumulate(shard.images for shard in manifest.shards))
        self._mapped: dict[int, torch.Tensor] = {}

    def _labels(self, shard: Shard) -> list[int]:
        try:
            return shard_labels(self.folder / shard.file, shard)
        except ValueError as error:
            raise InputError(
                f"The latent cache {self.folder} is damaged: {shard.file}: {error}. Run `si-distill precompute-latents` "
                f"again with the settings of the cache (they are in its {MANIFEST}): what is whole is kept."
            ) from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect.bisect_right(self._ends, index)
        if number not in self._mapped:
            self._mapped[number] = map_moments(self.folder / self.manifest.shards[number].file)
        moments = self._mapped[number][index - self._ends[number]]  # counted from the shard's end
        return {"latents_mean": moments[:, 0], "latents_std": moments[:, 1], "labels": self.labels[index]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # a worker that is not forked maps the files itself

    def load_vae(self) -> torch.nn.Module:
        """The VAE that the cache was made with, from its own folder.

        Raises:
            InputError: when it cannot be loaded, or is another.
        """
        vae, _ = load_vae(str(self.folder / VAE_FOLDER))
        self.check_vae(vae, self.scaling.pixel_min, f"the VAE in {self.folder / VAE_FOLDER}")
        return vae

    def check_vae(self, vae: torch.nn.Module, pixel_min: float, role: str) -> None:
        """Refuses a VAE whose latents are others than those of the cache.

        Args:
            vae, pixel_min: of a pipeline.
            role: what it is, for the error.

        Raises:
            InputError: when it has other encoder weights or another scaling.
        """
        found, made_with = encoder_hash(vae), self.manifest.recipe.vae
        advice = "Make a cache with that one: si-distill precompute-latents --vae …"
        if found != made_with["encoder"]:
            raise InputError(
                f"The latent cache {self.folder} was made with another VAE, {made_with['name']} (hash of its encoder "
                f"{made_with['encoder']}), than {role} (hash {found}). {advice}"
            )
        now, then = asdict(LatentScaling.of(vae, pixel_min)), asdict(self.scaling)
        listing = "; ".join(f"{name}: {then[name]} there, {now[name]} here" for name in now if now[name] != then[name])
        if listing:
            raise InputError(
                f"The latent cache {self.folder} was made with another scaling than that of {role} ({listing}). {advice}"
            )


def sampled(batch: Batch, flip: torch.Tensor | None, noise: torch.Tensor, scaling: LatentScaling) -> Batch:
    """The batch with `images`, latents of a network, in the place of a VAE's moments: scaled mean + std · noise.

    Args:
        batch: `latents_mean` and `latents_std` (B, 2, C, h, w).
        flip: (B,), bool, which images are mirrored; None is none of them.
        noise: (B, C, h, w) standard normal numbers.
        scaling: between the VAE's latents and the network's.
    """
    rest = {name: value for name, value in batch.items() if name not in ("latents_mean", "latents_std")}
    rows = torch.arange(len(noise), device=noise.device)
    side = torch.zeros_like(rows) if flip is None else flip.long()
    mean, std = (batch[name][rows, side].float() for name in ("latents_mean", "latents_std"))
    return {"images": scaling.encode(mean + std * noise), **rest}
