"""Images that are read while training, from anything that `datasets` streams."""

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from .batches import BatchIterator, TrainingData
from .columns import Columns, RowReader, check_label, explained, find_columns, open_dataset
from .config import DataConfig
from .latents.dataset import LatentDataset
from .latents.format import is_latent_cache
from .references import UnpairedData, references_config
from .sources import PROBE, ImageDataset, check_degradation, indexed, load_images
from .stream_reading import CHUNK, StreamBatches, rows_of


class ImageStream:
    """Square images with class labels that come in an order of their own (a `TrainingData`).

    Args:
        source: a `datasets.IterableDataset` of encoded images.
        reader: decodes its rows.
        config: of the data.
        class_names: names of the classes 0 … K − 1; empty for images without labels.
        count: number of images, if it is known.
    """

    def __init__(self, source: Any, reader: RowReader, config: DataConfig, class_names: list[str], count: int | None):
        self.source = source
        self.reader = reader
        self.config = config
        self.name = config.name
        self.channels = reader.channels
        self.size = config.image_size
        self.class_names = class_names
        self.count = count

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


def load_training_data(
    config: DataConfig, readers: int = 1, num_classes: int | None = None, further_references: bool = False
) -> TrainingData:
    """What a trainer reads: images, beside those of a second data set if references are unpaired, or a cache of latents.

    Args:
        config: of the data.
        readers: processes that read, over all ranks.
        num_classes: of the network, for streams whose labels are plain numbers.
        further_references: whether a batch has a second set of unpaired references, `other_reference`.

    Raises:
        InputError: when the data cannot be found or read, lack labels, or have fewer shards than there are readers; when two
            data sets differ in channels.
    """
    if is_latent_cache(config.name):
        return LatentDataset(config)
    if config.reference_name is not None:
        images = replace(
            config,
            reference_name=None,
            reference_files=None,
            reference_split="train",
            reference_column=None,
            coupling="independent",
        )
        return UnpairedData(
            load_training_data(images, readers, num_classes),
            load_training_data(references_config(config), readers),
            further_references,
        )
    if not config.streaming or config.name == "digits":
        return load_images(replace(config, streaming=False))
    data = _open_stream(config, readers, num_classes)
    check_degradation(config, data.channels)
    return data


def _open_stream(config: DataConfig, readers: int, num_classes: int | None) -> ImageDataset | ImageStream:
    source = open_dataset(config)
    if source.features is None:
        raise InputError(
            f"The data set {config.name!r} does not say what its columns hold, so that it cannot be streamed: convert it to "
            "Parquet or WebDataset."
        )
    columns = find_columns(config, source.features)
    # Decoded here and not inside datasets: an error there ends the iteration silently.
    source = source.decode(False).select_columns(columns.names)
    with explained(config):
        head = next(source.iter(batch_size=PROBE), None)
    if head is None:
        raise InputError(f"The data set {config.name!r} has no images in its split {config.split!r}.")
    if all(isinstance(image, dict) and image["bytes"] is None for image in head[columns.image]):
        return _listed(config, source, columns)
    names = columns.class_names
    if names is None:
        names = _numbered(config, columns, num_classes)
    splits = source.info.splits or {}
    count = splits[config.split].num_examples if config.split in splits else None
    if config.max_train_samples is not None:
        count = min(count or config.max_train_samples, config.max_train_samples)
    reader = RowReader(columns, config.image_size, rows_of(head))
    return ImageStream(_with_shards(config, source, readers), reader, config, names, count)


def _numbered(config: DataConfig, columns: Columns, num_classes: int | None) -> list[str]:
    count = config.num_classes or num_classes
    if not count:
        raise InputError(
            f"The labels in {columns.label!r} are plain numbers, and how many classes there are is not known before the "
            "stream has ended: set `data.num_classes`, or `data.label_column` to none."
        )
    return [str(n) for n in range(count)]


def _with_shards(config: DataConfig, source: Any, readers: int) -> Any:
    if source.num_shards < readers:
        with explained(config):
            source = source.reshard()  # Parquet: the row groups of the files
    if source.num_shards < readers:
        raise InputError(
            f"{config.name!r} has {source.num_shards} shard(s) (files, or row groups of Parquet files), but {readers} "
            "processes would read it (processes × dataloader_num_workers), each at least one of its own: launch fewer, "
            "lower dataloader_num_workers, or store the data in more files."
        )
    return source


def _listed(config: DataConfig, source: Any, columns: Columns) -> ImageDataset:
    """Single files, of which the stream gives paths only: with a list of them they are read by index, in any order."""
    paths, labels = [], []
    with explained(config):
        for chunk in source.iter(batch_size=CHUNK):
            for row in rows_of(chunk):
                stored = [row[c] or {} for c in (columns.image, columns.reference) if c is not None]
                paths.append([os.fsencode(image.get("path") or "") for image in stored])
                labels.append(0 if columns.label is None else row[columns.label])
            if len(paths) >= (config.max_train_samples or math.inf):
                break
    # One array of bytes: processes that read share it without counting references, which would copy the pages of a list.
    files = np.array(paths)

    def row(index: int) -> dict[str, Any]:
        image, *reference = ({"bytes": None, "path": os.fsdecode(path)} for path in files[index])
        return {columns.image: image, columns.reference: reference[0] if reference else None}

    return indexed(config, columns, row, labels[: config.max_train_samples])
