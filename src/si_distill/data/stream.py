"""Images that are read while training, from anything that `datasets` streams."""

from dataclasses import dataclass
from typing import Any

from .batches import BatchIterator
from .columns import RowReader, check_label
from .config import DataConfig
from .stream_reading import StreamBatches


@dataclass
class ImageStream:
    """Square images with class labels that come in an order of their own (a `TrainingData`).

    Args:
        source: a `datasets.IterableDataset` of encoded images.
        reader: decodes its rows.
        config: of the data.
        class_names: names of the classes 0 … K − 1; empty for images without labels.
        count: number of images, if it is known.
    """

    source: Any
    reader: RowReader
    config: DataConfig
    class_names: list[str]
    count: int | None

    def __post_init__(self) -> None:
        self.name, self.size, self.channels = self.config.name, self.config.image_size, self.reader.channels

    @property
    def num_shards(self) -> int:
        """Parts that are read one after another, each by one process."""
        return self.source.num_shards

    def shard(self, number: int) -> Any:
        """One shard (a `datasets.IterableDataset`), or its share of `max_train_samples`."""
        part = self.source.shard(self.num_shards, number)
        total = self.config.max_train_samples
        if total is None:
            return part
        return part.take(total // self.num_shards + (number < total % self.num_shards))

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, start: int = 0, num_workers: int = 0
    ) -> BatchIterator:
        """Endless batches of one rank (see `TrainingData.batches`); `images` are uint8."""
        return StreamBatches(self, batch_size, rank, world_size, seed, start, num_workers)

    def origin(self, row: dict[str, Any], place: str) -> str:
        """Where the image in a row is from: its path, or its place in the stream."""
        value = row[self.reader.columns.image]
        return (value.get("path") if isinstance(value, dict) else None) or place

    def example(self, row: dict[str, Any]) -> dict[str, Any]:
        """The batch's entry: `images`, uint8 (C, size, size), `labels`, and of pairs `reference` like `images`.

        Raises:
            UnreadableImage: when an image cannot be decoded.
            InputError: when the label is none of the classes.
        """
        columns = self.reader.columns
        label = 0 if columns.label is None else row[columns.label]
        check_label(label, self.name, len(self.class_names))
        example = {"images": self.reader.image(row), "labels": label}
        if columns.reference is not None:
            example["reference"] = self.reader.reference(row)
        return example
