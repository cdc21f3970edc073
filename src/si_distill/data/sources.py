"""Images that are read by index: scikit-learn's digits, and whatever `datasets` can load."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError
from .batches import IndexedData
from .columns import Columns, RowReader, check_label, find_columns, open_dataset
from .config import DataConfig
from .decoding import UnreadableImage
from .latents.format import images_of, is_latent_cache

logger = logging.getLogger(__name__)

#: Most classes of labels that are plain numbers.
MAX_CLASSES = 1_000_000
#: Images at the head of a data set that tell whether it is grey.
PROBE = 16


@dataclass(eq=False)
class ImageDataset(IndexedData):
    """Images in [-1, 1] with class labels (a `TrainingData`), square where they are not of a text-to-image pipeline.

    `dataset[i]` is a dict: `images`, a float32 tensor (C, height, width), `labels`, an int, and of pairs `reference`, an
    image of the same shape.

    Args:
        read: gives the uint8 tensor (C, height, width) of image i.
        labels: of all images.
        name: how results refer to the data.
        channels: 1 or 3.
        size: side, or height and width.
        class_names: names of the classes 0 … K − 1, or the captions that there are; empty for images without either, whose
            label is always 0.
        read_reference: gives the uint8 tensor (C, height, width) of the reference of image i, of pairs.
        max_corrupt: unreadable images that training may meet.
    """

    read: Callable[[int], torch.Tensor]
    labels: list[int]
    name: str
    channels: int
    size: int | tuple[int, int]
    class_names: list[str]
    read_reference: Callable[[int], torch.Tensor] | None = None
    max_corrupt: int = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"images": self.read(index).float() / 127.5 - 1, "labels": self.labels[index]}
        if self.read_reference is not None:
            item["reference"] = self.read_reference(index).float() / 127.5 - 1
        return item

    def read_all(self) -> tuple[torch.Tensor, list[int]]:
        """All images (N, C, height, width), uint8, and their labels."""
        return torch.stack([self.read(index) for index in range(len(self))]), list(self.labels)


def load_images(config: DataConfig, size: tuple[int, int] | None = None) -> ImageDataset:
    """The images that the settings describe, to be read by index, with the references that are their own.

    Args:
        config: of the data.
        size: height and width; squares of `image_size` when not given.

    Raises:
        InputError: when they cannot be found or read, have no labels and `label_column` does not say `none`, are a stream,
            or cannot be degraded as the settings say.
    """
    if is_latent_cache(config.name):
        raise InputError(
            f"{config.name} is a cache of latents, and images are needed here: give the data set that it was made from, "
            f"{images_of(config).name}."
        )
    if config.streaming:
        raise InputError(
            f"Images of {config.name!r} are needed by index here, which `data.streaming` does not give: set it to false, or "
            "give what was computed from them (`reference` with class_balance=uniform in an evaluation, `class_frequencies` "
            "in a distillation)."
        )
    if size and size[0] == size[1]:
        config, size = replace(config, image_size=size[0]), None
    data = digits(config) if config.name == "digits" else _from_table(config, size)
    config.build_degradation(data.channels)  # refuses what these images cannot undergo
    return data


def digits(config: DataConfig) -> ImageDataset:
    """scikit-learn's 1,797 digits, or a part of them.

    Raises:
        InputError: without scikit-learn, or for another size or split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "The digits come with scikit-learn, which is not installed: pip install 'si_distill[demo]'."
        ) from None
    if config.image_size != 8:
        raise InputError(f"The digits are 8×8 images; `data.image_size` is {config.image_size}.")
    if config.reference_column is not None:
        raise InputError(
            "The digits have no references of their own: set `data.degradation` instead of `data.reference_column`."
        )
    if config.caption_column is not None:
        raise InputError("The digits have no captions: leave `data.caption_column` out, or give `data.name`.")
    table = load_digits()
    part, unlabelled = _part(config.split, len(table.images)), config.label_column == "none"
    images = torch.from_numpy(table.images[part] / 16 * 255).round().to(torch.uint8)[:, None]
    labels = [0] * len(images) if unlabelled else table.target[part].tolist()
    labels = labels[: config.max_train_samples]
    names = [] if unlabelled else [str(n) for n in range(10)]
    return ImageDataset(images.__getitem__, labels, "sklearn-digits", 1, 8, names)


def _part(split: str, count: int) -> slice:
    """Where a split of the digits begins and ends, in the syntax of `datasets`: `train`, `train[:80%]`, `train[1297:]`."""
    from datasets import ReadInstruction

    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({"train": count})
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"`data.split` is {split!r}: {error}. The digits have the split `train`, and parts of it: `train[:80%]`."
        ) from None
    return slice(part.from_, part.to)


def _from_table(config: DataConfig, size: tuple[int, int] | None) -> ImageDataset:
    import datasets

    table = open_dataset(config)
    columns = find_columns(config, table.features)
    labels = [0] * len(table) if columns.label is None else list(table[columns.label])
    labels = labels[: config.max_train_samples]
    if columns.captions:
        labels = [caption and without_mark(caption) for caption in labels]
        names = distinct_captions(config, labels)
        rows = {caption: row for row, caption in enumerate(names)}
        columns, labels = replace(columns, class_names=names), [rows[caption] for caption in labels]
    # Decoded here and not inside datasets: an error there names no file and can end an iteration silently.
    for column in filter(None, (columns.image, columns.reference)):
        table = table.cast_column(column, datasets.Image(decode=False))
    return indexed(config, columns, table.__getitem__, labels, size)


def distinct_captions(config: DataConfig, captions: list[str | None]) -> list[str]:
    """The texts that there are, in the order in which they come.

    Raises:
        InputError: for rows without a text.
    """
    empty = [row for row, caption in enumerate(captions) if not (caption and caption.strip())]
    if empty:
        raise InputError(
            f"{len(empty):,} of the {len(captions):,} captions in {config.caption_column!r} of {config.name!r} are empty "
            f"(the first in row {empty[0]}): take these rows out. Training has an empty text of its own, by dropout."
        )
    return list(dict.fromkeys(captions))


def without_mark(text: str) -> str:
    """A text without the byte order mark that some editors put first."""
    return text.removeprefix("\ufeff")


def _numbered_classes(config: DataConfig, labels: list[int]) -> list[str]:
    """Names of classes whose labels are plain numbers. Warns of classes without images, which a student would draw too."""
    count = config.num_classes or max(labels, default=0) + 1
    if count > MAX_CLASSES:
        raise InputError(
            f"The labels of {config.name!r} reach {count - 1:,}: classes are numbered 0 … K − 1, and no more than "
            f"{MAX_CLASSES:,} are supported. Number them anew, or set `data.label_column` to another column or to none."
        )
    empty = sorted(set(range(count)) - set(labels))
    if empty and labels:
        some = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        logger.warning(
            "%d of the %d classes of %s have no images (%s): the labels go from %d to %d, and classes count from 0. A "
            "teacher would learn nothing of them, and distillation draws them like all others. Number the labels from 0 "
            "without gaps, or store them as a ClassLabel with names.",
            len(empty), count, config.name, some, min(labels), max(labels),
        )  # fmt: skip
    return [str(n) for n in range(count)]


def indexed(
    config: DataConfig,
    columns: Columns,
    row: Callable[[int], dict[str, Any]],
    labels: list[int],
    size: tuple[int, int] | None = None,
) -> ImageDataset:
    """Images that are decoded when they are asked for.

    Args:
        config: of the data.
        columns: where images are.
        row: gives the encoded row i.
        labels: of the rows.
        size: height and width; squares of `image_size` when not given.

    Raises:
        InputError: without images, for a label that is no class, or when none of the first images can be read.
    """
    if not labels:
        raise InputError(f"The data set {config.name!r} has no images in its split {config.split!r}.")
    names = columns.class_names
    if names is None:
        names = _numbered_classes(config, [label for label in labels if label is not None])
    if columns.label is not None:
        for label in dict.fromkeys(labels):
            check_label(label, config.name, len(names))
    reader = RowReader(columns, size or config.image_size, [row(index) for index in range(min(PROBE, len(labels)))])

    def reading(what: Callable[[dict[str, Any]], torch.Tensor]) -> Callable[[int], torch.Tensor]:
        def read(index: int) -> torch.Tensor:
            try:
                return what(row(index))
            except UnreadableImage as error:
                raise UnreadableImage(f"Image number {index} of the data set cannot be read: {error}.") from error

        return read

    return ImageDataset(
        reading(reader.image),
        labels,
        config.name,
        reader.channels,
        reader.size,
        names,
        reading(reader.reference) if columns.reference else None,
        config.max_corrupt_images,
    )
