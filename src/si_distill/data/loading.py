"""What a trainer reads, opened from its settings: indexed images, a stream, unpaired data sets, or a cache of latents."""

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from .batches import TrainingData
from .columns import Columns, RowReader, explained, find_columns, open_dataset
from .config import DataConfig
from .latents.dataset import LatentDataset
from .latents.format import is_latent_cache
from .references import UnpairedData, references_config
from .sources import PROBE, ImageDataset, indexed, load_images
from .stream import ImageStream
from .stream_reading import CHUNK, rows_of


def load_training_data(
    config: DataConfig,
    readers: int = 1,
    num_classes: int | None = None,
    further_references: bool = False,
    size: tuple[int, int] | None = None,
) -> TrainingData:
    """What a trainer reads: images, next to those of a second data set if references are unpaired, or a cache of latents.

    Args:
        config: of the data.
        readers: processes that read, over all ranks.
        num_classes: of the network, for streams whose labels are plain numbers.
        further_references: whether a batch has a second set of unpaired references, `other_reference`.
        size: height and width of images with captions; squares of `image_size` when not given.

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
        return load_images(replace(config, streaming=False), size)
    data = _open_stream(config, readers, num_classes)
    config.build_degradation(data.channels)  # refuses what these images cannot undergo
    return data


def _open_stream(config: DataConfig, readers: int, num_classes: int | None) -> ImageDataset | ImageStream:
    if config.caption_column is not None:
        raise InputError(
            "Images with captions are read by index, because the captions are numbered before training, which a stream "
            "(`data.streaming`) does not allow: set it to false."
        )
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
