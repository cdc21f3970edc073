"""A data set's images once, in order, in parts that do not depend on each other: slices of a table, shards of a stream."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import torch

from ..config import DataConfig
from ..decoding import UnreadableImage
from ..loading import load_training_data
from ..sources import ImageDataset
from ..stream import ImageStream

#: An image (C, size, size), uint8, and its label; or what is wrong with it.
Item = tuple[torch.Tensor, int] | UnreadableImage
#: Decodes one image; safe to call in any thread.
Job = Callable[[], Item]


class TableParts:
    """Slices of images that are read by index.

    Args:
        data: the images.
        size: images in a part.

    Attributes:
        count: number of parts.
        images: number of images.
        identity: plain values; two with the same ones have the same parts.
    """

    def __init__(self, data: ImageDataset, size: int):
        self.data, self.size = data, size
        self.images = len(data)
        self.count = -(-self.images // size)
        self.identity = {"images": self.images, "part_size": size}

    def _indices(self, part: int) -> range:
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def length(self, part: int) -> int:
        """Images of a part."""
        return len(self._indices(part))

    def jobs(self, part: int, start: int) -> Iterator[Job]:
        """The images of a part from place `start` on."""
        return (partial(self._read, index) for index in self._indices(part)[start:])

    def _read(self, index: int) -> Item:
        try:
            return self.data.read(index), self.data.labels[index]
        except UnreadableImage as error:
            return error


class StreamParts:
    """Shards of a stream; attributes and methods are those of `TableParts`, with None where nothing says a number.

    Args:
        data: the images.
    """

    def __init__(self, data: ImageStream):
        self.data, self.images, self.count = data, data.count, data.num_shards
        self.identity = {"images": data.count, "shards": data.num_shards}

    def length(self, part: int) -> None:
        return None

    def jobs(self, part: int, start: int) -> Iterator[Job]:
        return (partial(self._read, row) for row in self.data.shard(part).skip(start))

    def _read(self, row: dict[str, Any]) -> Item:
        try:
            example = self.data.example(row)
        except UnreadableImage as error:
            return error
        return example["images"], example["labels"]


def open_parts(config: DataConfig, size: int) -> TableParts | StreamParts:
    """The images that the settings describe; the parts of a table have `size` images.

    Raises:
        InputError: when they cannot be found or read.
    """
    data = load_training_data(config)
    return StreamParts(data) if isinstance(data, ImageStream) else TableParts(data, size)


def in_threads(jobs: Iterator[Job], threads: int, ahead: int) -> Iterator[Item]:
    """Results in the jobs' order.

    Args:
        jobs: to do; Pillow decodes without Python's lock.
        threads: that work at the same time.
        ahead: jobs that may be done before they are asked for.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(job) for job in islice(jobs, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(job) for job in islice(jobs, 1))
