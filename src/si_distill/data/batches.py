"""Batches of a data set as trainers read them: dicts of tensors, endless, and exactly resumable.

A data set's item, and a batch, is a dict:

* `images`: (C, H, W) in [-1, 1], float32 — or uint8 levels, which `on_device` brings to [-1, 1] where the network is;
* `labels`: the class, an int;
* `reference` (data with references): (C', H, W), the image at t = 1, a pair's own or another's;
* `other_reference` (unpaired data, for students): a second one, independent of all.
"""

from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from .sampler import GlobalBatchSampler

Batch = dict[str, torch.Tensor]

#: Entries that are pictures, and change sides together when one is flipped.
PICTURES = ("images", "reference", "other_reference")


class BatchIterator(Protocol):
    """One rank's endless batches.

    `state_dict()` is plain data (JSON): what it takes to go on after the last batch that was handed out, on this rank.
    """

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingData(Protocol):
    """What a trainer needs of a data set.

    Attributes:
        name: how results refer to the data.
        channels: of an image.
        size: height and width of an image.
        class_names: names of the classes 0 … K − 1; empty for images without labels, whose label is always 0.
    """

    name: str
    channels: int
    size: int
    class_names: list[str]

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, start: int = 0, num_workers: int = 0
    ) -> BatchIterator:
        """Endless batches of one rank.

        Args:
            batch_size: per rank.
            rank, world_size: this process and the number of processes.
            seed: of the order.
            start: batches that this rank has had already. Data whose order is a function of this number need nothing
                else to resume; others go on from the state that `load_state_dict` is given before the first batch.
            num_workers: processes that read, per rank.
        """
        ...


class IndexedBatches:
    """Batches of data that are read by index: a function of (seed, batch number, rank), so there is no state to save.

    Args:
        data: indexed items, dicts.
        batch_size, rank, world_size, seed, start, num_workers: see `TrainingData.batches`.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        num_workers: int = 0,
    ):
        sampler = GlobalBatchSampler(len(data), batch_size, rank, world_size, seed, start)
        self._batches = iter(DataLoader(data, batch_sampler=sampler, num_workers=num_workers))

    def __next__(self) -> Batch:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, uint8 pictures as float32 in [-1, 1] (they travel in a quarter of the bytes)."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {name: value.float() / 127.5 - 1 if value.dtype == torch.uint8 else value for name, value in moved.items()}


def flipped(batch: Batch, flip: torch.Tensor) -> Batch:
    """The batch with left and right exchanged in the samples that `flip` (B,), bool, names."""
    flip = flip[:, None, None, None]
    return {
        name: torch.where(flip, value.flip(3), value) if name in PICTURES else value for name, value in batch.items()
    }
