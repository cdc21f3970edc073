"""Inputs of bridges in an evaluation: reference images by index, with their ground truth for pairs."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import fingerprints
from ..data import DataConfig, ImageDataset, load_images
from ..data.references import check_same_channels, reference_source, references_config
from ..sample_noise import SampleNoise


class Inputs:
    """The input of image i of an evaluation, which depends on the data, the seed and i alone.

    Pairs give their own reference, or the degraded image, whose random mask is a function of (seed, i). Unpaired references
    are those of their data set in order.

    Args:
        data: the images.
        config: its settings, which say where references come from.
        places: the image of the data set behind each image of the evaluation; its class and, of pairs, its truth.
        seed: of random masks.

    Raises:
        InputError: when unpaired references cannot be loaded or have other channels.
    """

    def __init__(self, data: ImageDataset, config: DataConfig, places: list[int], seed: int):
        self.data, self.config, self.places, self.seed = data, config, places, seed
        self._noise = SampleNoise(seed)
        self._degraded = reference_source(config) if config.degradation else None
        self._unpaired = None if config.is_paired else load_images(references_config(config))
        if self._unpaired is not None:
            check_same_channels(data, self._unpaired)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values; two of the same give the same inputs."""
        probe = self.read([i * (len(self.places) - 1) // 7 for i in range(8)])
        return {
            "references": self.config.describe_references(),
            "places": fingerprints.of_values(self.places),
            "probe": fingerprints.of_tensors([("inputs", probe)]),
        }

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, C, size, size) in [-1, 1], on the CPU."""
        if self._unpaired is not None:
            levels = [self._unpaired.read(i % len(self._unpaired)) for i in indices]
            return torch.stack(levels).float() / 127.5 - 1
        items = [self.data[self.places[i]] for i in indices]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "labels"}
        if self._degraded is not None:
            batch = self._degraded(batch, self._noise, indices=indices)
        return batch["reference"]

    def truth(self, indices: Sequence[int]) -> torch.Tensor | None:
        """The images themselves, (B, C, size, size), uint8; None without pairs."""
        if self._unpaired is not None:
            return None
        return torch.stack([self.data.read(self.places[i]) for i in indices])
