"""The endless, shuffled and exactly resumable reading of a stream.

In each epoch the shards are put into another order and dealt out to all reading processes (the workers of all ranks), so
that each is read by one of them alone. A reader takes disjoint blocks of encoded images from its shards and gives those of
a block in a random order; where it stands is (epoch, block, place in the block, where the block starts in the data): a few
hundred bytes. Buffers that are refilled while they are drawn from cannot be resumed exactly.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec.asyn
import numpy as np
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..errors import InputError, TrainingStopped
from .batches import Batch, CorruptImages, logger, reading_processes
from .decoding import UnreadableImage

if TYPE_CHECKING:
    from .stream import ImageStream

#: Images that are taken from a shard at once; blocks consist of these.
CHUNK = 50


@dataclass(frozen=True)
class Place:
    """Where a reader stands.

    Args:
        epoch: how often it has been through its shards.
        block: number of the block in this epoch.
        position: images of the block that were given.
        shard: the reader's shards before the one in which the block starts.
        source: state of that shard where the block starts; None: at its beginning.
        row: number of the row in that shard with which the block starts.
    """

    epoch: int = 0
    block: int = 0
    position: int = 0
    shard: int = 0
    source: dict[str, Any] | None = None
    row: int = 0


@dataclass
class Delivery:
    """What a reader hands over: a batch with the reader's place after it, or why there is none.

    Args:
        place: of the reader.
        batch: uint8 images and labels.
        corrupt: images that were skipped for this batch, and what is wrong with them.
        failure: why reading cannot go on.
    """

    place: Place
    batch: Batch | None = None
    corrupt: dict[str, str] = field(default_factory=dict)
    failure: str | None = None

    def pin_memory(self) -> "Delivery":
        """In memory from which a GPU is fed while it computes; the data loader asks for it."""
        if self.batch is not None:
            self.batch = {name: value.pin_memory() for name, value in self.batch.items()}
        return self


def rows_of(chunk: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows from the columns of a chunk."""
    return [dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]


@dataclass
class Reader:
    """One of the processes that read.

    Args:
        stream: what is read.
        place: to go on from.
        number, readers: of this reader, and of all.
        seed: numbers that decide about the order.
    """

    stream: "ImageStream"
    place: Place
    number: int
    readers: int
    seed: tuple[int, ...]

    def _random(self, *counters: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, *counters])

    def rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Encoded examples without end, each with its place in the stream (shard and row, the same in every epoch); the
        reader's `place` stands behind each when it is given.

        Raises:
            InputError: when the reader's shards are empty.
        """
        while True:
            epoch, empty = self.place.epoch, self.place == Place(self.place.epoch)
            for block, start in self._blocks():
                empty = False
                here = self.place
                order = self._random(epoch, here.block, self.number).permutation(len(block))
                for position in range(here.position, len(block)):
                    self.place = Place(epoch, here.block, position + 1, *start)
                    yield block[order[position]]
                self.place = Place(epoch, here.block + 1, 0)
            if empty:
                raise InputError(
                    f"The shards of {self.stream.name!r} that one of {self.readers} reading processes was given hold no "
                    "images: launch fewer processes, or lower dataloader_num_workers."
                )
            self.place = Place(epoch + 1)

    def _blocks(self) -> Iterator[tuple[list[tuple[dict[str, Any], str]], tuple[int, dict[str, Any] | None, int]]]:
        """The rest of this epoch's blocks, each with where it starts: the place among the shards, in the shard, its row."""
        shards = self._random(self.place.epoch).permutation(self.stream.num_shards)[self.number :: self.readers]
        first, source, row = start = (self.place.shard, self.place.source, self.place.row)
        rows = []
        for n in range(first, len(shards)):
            shard = self.stream.shard(int(shards[n]))
            if n == first and source is not None:
                shard.load_state_dict(source)
            else:
                row = 0
            # `iter` with a batch size, for plain iteration would split the shard among the loader's workers once more.
            for chunk in shard.iter(batch_size=CHUNK):
                rows += [(values, f"shard {shards[n]}, row {row + i}") for i, values in enumerate(rows_of(chunk))]
                row += len(next(iter(chunk.values())))
                if len(rows) >= self.stream.config.shuffle_buffer_size:
                    yield rows, start
                    start, rows = (n, shard.state_dict(), row), []
        if rows:
            yield rows, start


@dataclass(eq=False)
class _ReadingWorker(IterableDataset):
    """What runs in a worker of the data loader, or without workers in the process that trains: one reader's batches."""

    stream: "ImageStream"
    batch_size: int
    rank: int
    world_size: int
    seed: tuple[int, ...]
    places: list[Place]
    first: int

    def __iter__(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        fsspec.asyn.reset_lock()  # its thread is not there any more in a forked process
        # The loader asks its workers in turn, from the first: the one whose turn it is comes first.
        turn = (self.first + (worker.id if worker else 0)) % len(self.places)
        number, readers = self.rank * len(self.places) + turn, self.world_size * len(self.places)
        reader = Reader(self.stream, self.places[turn], number, readers, self.seed)
        try:
            yield from self._batches(reader)
        except InputError as error:
            failure = str(error)
        except Exception as error:  # network, file system and file formats raise anything, and it must reach the user
            failure = f"Reading {self.stream.name!r} broke off: {type(error).__name__}: {error}"
        while True:
            yield Delivery(reader.place, failure=failure)

    def _batches(self, reader: Reader) -> Iterator[Delivery]:
        examples, corrupt = [], {}
        readable = reader.place.epoch  # the last epoch with an image that can be read
        for row, place in reader.rows():
            try:
                examples.append(self.stream.example(row))
                readable = reader.place.epoch
            except UnreadableImage as error:
                corrupt[place] = f"{self.stream.origin(row, place)}: {error}"
                if reader.place.epoch > readable + 1:
                    raise InputError(
                        f"The shards of {self.stream.name!r} that one of {reader.readers} reading processes was given hold "
                        f"no image that can be read. The last: {corrupt[place]}"
                    ) from error
                if len(corrupt) > self.stream.config.max_corrupt_images:
                    yield Delivery(reader.place, None, corrupt)
            if len(examples) == self.batch_size:
                yield Delivery(reader.place, default_collate(examples), corrupt)
                examples, corrupt = [], {}


class StreamBatches:
    """One rank's batches of a stream, read by processes of their own (a `BatchIterator`).

    Args:
        stream: what is read.
        batch_size, rank, world_size, seed, start, num_workers: see `TrainingData.batches`.
    """

    def __init__(
        self,
        stream: "ImageStream",
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start: int,
        num_workers: int,
    ):
        self._settings = dict(stream=stream, batch_size=batch_size, rank=rank, world_size=world_size)
        self._num_workers = num_workers
        self._start = start
        self._seed = (seed, 0)
        self._places = [Place()] * max(1, num_workers)
        self._turn = 0
        self._corrupt = CorruptImages(stream.config.max_corrupt_images, stream.name)
        self._deliveries: Iterator[Delivery] | None = None

    def __next__(self) -> Batch:
        if self._deliveries is None:
            worker = _ReadingWorker(**self._settings, seed=self._seed, places=list(self._places), first=self._turn)
            loader = DataLoader(worker, batch_size=None, **reading_processes(self._num_workers))
            self._deliveries = iter(loader)
        delivery = next(self._deliveries)
        self._corrupt.add(delivery.corrupt)
        if delivery.failure is not None:
            raise TrainingStopped(
                f"{delivery.failure} Once that is mended, a run with a checkpoint goes on with "
                "--resume_from_checkpoint latest."
            )
        self._places[self._turn] = delivery.place
        self._turn = (self._turn + 1) % len(self._places)
        return delivery.batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": list(self._seed),
            "places": [asdict(place) for place in self._places],
            "turn": self._turn,
            "corrupt": sorted(self._corrupt.keys),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is None:
            # Another order than that of the first start, or the same images would come once more.
            self._seed = (self._seed[0], self._start)
            logger.warning(
                "The place in %s is not known, because the number of processes or of dataloader_num_workers has changed: "
                "the data start in a new order. Networks, optimizers and noise go on exactly.",
                self._settings["stream"].name,
            )
            return
        if len(state["places"]) != len(self._places):
            return self.load_state_dict(None)
        self._seed = tuple(state["seed"])
        self._places = [Place(**place) for place in state["places"]]
        self._turn = state["turn"]
        self._corrupt.keys = set(state["corrupt"])

    @property
    def counts(self) -> dict[str, int]:
        return {"corrupt_images": len(self._corrupt.keys)}
