"""Batches of a data set as trainers read them: dicts of tensors, endless, and exactly resumable.

A data set's item, and a batch, is a dict:

* `images`: (C, H, W) in [-1, 1], float32 — or uint8 levels, which `on_device` brings to [-1, 1] where the network is;
* `labels`: the class, an int;
* `reference` (data with references): (C', H, W), the image at t = 1, a pair's own or another's;
* `other_reference` (unpaired data, for students): a second one, independent of all.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import TrainingStopped
from .decoding import UnreadableImage
from .sampler import GlobalBatchSampler

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]

#: Entries that are pictures, and change sides together when one is flipped.
PICTURES = ("images", "reference", "other_reference")


class BatchIterator(Protocol):
    """One rank's endless batches."""

    def __next__(self) -> Batch:
        """
        Raises:
            TrainingStopped: when the data cannot be read on, or too much of it is unreadable.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain data (JSON): what it takes to go on after the last batch that was handed out, on this rank."""
        ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on from `state`; before the first batch.

        None: the state was lost, or saved by another number of ranks or workers. Data whose order is a function of `start`
        lose nothing; others say that they start in a new order.
        """
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Totals of this rank for the log, by name; their sums over the ranks mean something."""
        ...


class TrainingData(Protocol):
    """What a trainer needs of a data set.

    Attributes:
        name: how results refer to the data.
        channels: of an image.
        size: height and width of an image.
        class_names: names of the classes 0 … K − 1; empty for images without labels, whose label is always 0.
        count: number of images, or None where only reading to the end would tell.
    """

    name: str
    channels: int
    size: int
    class_names: list[str]
    count: int | None

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


@dataclass
class CorruptImages:
    """Images that could not be read: each is told of once, and too many of them stop the training.

    Args:
        limit: how many a rank may meet.
        name: of the data.
    """

    limit: int
    name: str
    keys: set[str] = field(default_factory=set, init=False)

    def add(self, found: dict[str, str]) -> None:
        """Adds images, a key that stays the same in every epoch to what is wrong.

        Raises:
            TrainingStopped: when these are too many.
        """
        for key, problem in found.items():
            if key not in self.keys:
                logger.warning("Skipping an image of %s that cannot be read: %s", self.name, problem)
        self.keys |= found.keys()
        if len(self.keys) > self.limit:
            raise TrainingStopped(
                f"{len(self.keys)} images of {self.name} cannot be read (the last one: {list(found.values())[-1]}), more "
                f"than `data.max_corrupt_images` = {self.limit}. Mend the data, or raise the limit; a run with "
                "a checkpoint then goes on with --resume_from_checkpoint latest."
            )


class IndexedBatches:
    """Batches of data that are read by index: a function of (seed, batch number, rank).

    In place of an image that cannot be read stands the next one that can, always the same.

    Args:
        data: indexed items, dicts; an item that cannot be read raises `UnreadableImage`.
        batch_size, rank, world_size, seed, start, num_workers: see `TrainingData.batches`.
        max_corrupt: items that may be unreadable.
        name: of the data.
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
        max_corrupt: int = 0,
        name: str = "the data set",
    ):
        sampler = GlobalBatchSampler(len(data), batch_size, rank, world_size, seed, start)
        source = _Substituting(data, max_corrupt)
        self._loader = DataLoader(source, batch_sampler=sampler, collate_fn=_collate, **reading_processes(num_workers))
        self._batches: Iterator | None = None
        self._corrupt = CorruptImages(max_corrupt, name)

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch, corrupt = next(self._batches)
        self._corrupt.add(corrupt)
        if batch is None:
            raise TrainingStopped(
                f"No image of {self._corrupt.name} can be read. The last: {list(corrupt.values())[-1]}"
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"corrupt": sorted(self._corrupt.keys)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._corrupt.keys = set(state["corrupt"]) if state else set()

    @property
    def counts(self) -> dict[str, int]:
        return {"corrupt_images": len(self._corrupt.keys)} if self._corrupt.keys else {}


class IndexedData(Dataset):
    """Base of the data that are read by index (a `TrainingData` but for its description).

    A subclass sets `name` and `labels`, one for each item, and gives the items.
    """

    name: str
    labels: list[int]
    #: Items that may be unreadable.
    max_corrupt: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def count(self) -> int:
        return len(self)

    def batches(self, batch_size: int, **position: int) -> IndexedBatches:
        """Endless batches of one rank (see `TrainingData.batches`)."""
        return IndexedBatches(self, batch_size, **position, max_corrupt=self.max_corrupt, name=self.name)


class _Substituting(Dataset):
    def __init__(self, data: Dataset, max_corrupt: int):
        self.data, self.max_corrupt = data, max_corrupt

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, dict[str, str]]:
        corrupt: dict[str, str] = {}
        while len(corrupt) <= min(self.max_corrupt, len(self.data) - 1):
            place = (index + len(corrupt)) % len(self.data)
            try:
                return self.data[place], corrupt
            except UnreadableImage as error:
                corrupt[str(place)] = str(error)
        return None, corrupt


def _collate(items: list[tuple[dict[str, Any] | None, dict[str, str]]]) -> tuple[Batch | None, dict[str, str]]:
    corrupt = {key: problem for _, found in items for key, problem in found.items()}
    # An item is missing only where there are more corrupt ones than the limit, or no others: the batch will not be used.
    whole = [item for item, _ in items]
    return (None if None in whole else default_collate(whole)), corrupt


def reading_processes(number: int) -> dict[str, Any]:
    """Arguments of a `DataLoader` with this number of workers."""
    return dict(
        num_workers=number,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
        # By default a loader's seed comes from the process's generator, which dropout draws from: a resumed run, whose
        # loader starts later, would drop something else.
        generator=torch.Generator(),
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Makes a reading process live as long as the one that trains wants it to.

    Ctrl-C and Slurm's SIGTERM reach both, and the one that trains still needs batches then, to end its iteration. Its own
    SIGTERM, with which Python ends the processes that it started, must be obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS: there a SIGTERM to all processes costs the last iteration
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, uint8 pictures as float32 in [-1, 1] (they travel in a quarter of the bytes)."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {
        name: value.float().div_(127.5).sub_(1) if value.dtype == torch.uint8 else value
        for name, value in moved.items()
    }


def flipped(batch: Batch, flip: torch.Tensor) -> Batch:
    """The batch with left and right exchanged in the samples that `flip` (B,), bool, names."""
    flip = flip[:, None, None, None]
    return {
        name: torch.where(flip, value.flip(3), value) if name in PICTURES else value for name, value in batch.items()
    }
