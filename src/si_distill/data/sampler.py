"""Which images a rank reads, as a function of the step alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(eq=False)
class GlobalBatchSampler(Sampler[list[int]]):
    """Endless batches from an endless row of shuffled epochs.

    Batch number n of rank r holds places (n · world_size + r) · batch_size … of that row, so that nothing but the step
    is needed to resume, and any number of ranks reads the same global batches.

    Args:
        length: number of images.
        batch_size: per rank.
        rank, world_size: this process and the number of processes.
        seed: of the shuffles; the shuffle of epoch e depends on (seed, e).
        start: the first batch number.
    """

    length: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    start: int = 0

    def __post_init__(self) -> None:
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start
        while True:
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [self._image_at(place) for place in range(first, first + self.batch_size)]
            batch += 1

    def _image_at(self, place: int) -> int:
        epoch, within = divmod(place, self.length)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = (epoch, torch.randperm(self.length, generator=generator).tolist())
        return self._epoch[1][within]
