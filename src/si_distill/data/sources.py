"""Images with labels: scikit-learn's digits, and whatever `datasets` can load."""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from .batches import IndexedBatches, TrainingData
from .config import DataConfig
from .references import UnpairedData, references_config


class ImageDataset(Dataset):
    """Square images in [-1, 1] with class labels.

    `dataset[i]` is a dict: `images`, a float32 tensor (C, size, size), `labels`, an int, and of pairs `reference`, an image
    of the same shape.

    Args:
        read: gives the uint8 tensor (C, size, size) of image i.
        labels: of all images.
        name: how results refer to the data.
        channels: 1 or 3.
        size: height and width.
        class_names: names of the classes 0 … K − 1; empty for images without labels, whose label is always 0.
        read_reference: gives the uint8 tensor (C, size, size) of the reference of image i, of pairs.
    """

    def __init__(
        self,
        read: Callable[[int], torch.Tensor],
        labels: list[int],
        name: str,
        channels: int,
        size: int,
        class_names: list[str],
        read_reference: Callable[[int], torch.Tensor] | None = None,
    ):
        self.read = read
        self.labels = labels
        self.name = name
        self.channels = channels
        self.size = size
        self.class_names = class_names
        self.read_reference = read_reference

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"images": self.read(index).float() / 127.5 - 1, "labels": self.labels[index]}
        if self.read_reference is not None:
            item["reference"] = self.read_reference(index).float() / 127.5 - 1
        return item

    def batches(self, batch_size: int, **position: int) -> IndexedBatches:
        """Endless batches of one rank (see `TrainingData.batches`)."""
        return IndexedBatches(self, batch_size, **position)

    def read_all(self) -> tuple[torch.Tensor, list[int]]:
        """All images (N, C, size, size), uint8, and their labels."""
        return torch.stack([self.read(index) for index in range(len(self))]), list(self.labels)


def load_images(config: DataConfig) -> ImageDataset:
    """The images that the settings describe, with the references that are their own.

    Raises:
        InputError: when they cannot be found or read, have no labels and `label_column` does not say `none`, or cannot be
            degraded as the settings say.
    """
    data = _digits(config) if config.name == "digits" else _from_datasets(config)
    if config.degradation:
        try:
            config.build_degradation().check_channels(data.channels)
        except ValueError as error:
            raise InputError(f"`data.degradation` {config.degradation}: {error}") from None
    return data


def load_training_data(config: DataConfig, further_references: bool = False) -> TrainingData:
    """What a trainer reads: the images, beside those of a second data set if references are unpaired.

    Args:
        config: where they are.
        further_references: whether a batch has a second set of unpaired references, `other_reference`.

    Raises:
        InputError: as `load_images`, or when the two data sets differ in channels.
    """
    images = load_images(config)
    if config.reference_name is None:
        return images
    return UnpairedData(images, load_images(references_config(config)), further_references)


def _unlabelled(config: DataConfig) -> bool:
    return config.label_column == "none"


def _digits(config: DataConfig) -> ImageDataset:
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
    digits = load_digits()
    part = _part(config.split, len(digits.images))
    images = torch.from_numpy(digits.images[part] / 16 * 255).round().to(torch.uint8)[:, None]
    labels = [0] * len(images) if _unlabelled(config) else digits.target[part].tolist()
    labels = labels[: config.max_train_samples]
    names = [] if _unlabelled(config) else [str(n) for n in range(10)]
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


def _from_datasets(config: DataConfig) -> ImageDataset:
    import datasets

    try:
        table = datasets.load_dataset(config.name, data_files=config.data_files, split=config.split)
    except (FileNotFoundError, ValueError, ConnectionError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"Cannot load the data set {config.name!r} (data_files={config.data_files!r}, split={config.split!r}): "
            f"{error}. A gated data set needs its terms accepted on its page and HF_TOKEN set."
        ) from error
    label_column = None if _unlabelled(config) else config.label_column
    for column in (config.image_column, label_column, config.reference_column):
        if column is not None and column not in table.column_names:
            raise InputError(f"The data set has no column {column!r}; its columns are {table.column_names}.")
    image_column = config.image_column or _column(
        table, "image", lambda f: isinstance(f, datasets.Image), besides=config.reference_column
    )
    if not _unlabelled(config):
        label_column = label_column or _column(table, "label", lambda f: isinstance(f, datasets.ClassLabel))
    names, labels = [], [0] * len(table)
    if label_column is not None:
        labels, feature = table[label_column], table.features[label_column]
        known = isinstance(feature, datasets.ClassLabel)
        names = list(feature.names) if known else [str(n) for n in range(max(labels) + 1)]
    # Decoded here and not inside datasets: an error there names no file and can end an iteration silently.
    for column in filter(None, (image_column, config.reference_column)):
        table = table.cast_column(column, datasets.Image(decode=False))
    channels = _channels(table[0][image_column], 0)

    def read(index: int) -> torch.Tensor:
        image = _open(table[index][image_column], index).convert("L" if channels == 1 else "RGB")
        return _square(image, config.image_size)

    def read_reference(index: int) -> torch.Tensor:
        row = table[index]
        reference = _open(row[config.reference_column], index, "Reference")
        size = _open(row[image_column], index).size
        # Cropping and resizing would otherwise take different parts of the two.
        if reference.width * size[1] != reference.height * size[0]:
            raise InputError(
                f"Image number {index} of the data set has {size[0]}×{size[1]} pixels and its reference "
                f"{reference.width}×{reference.height}: the two of a pair must have the same shape."
            )
        return _square(reference.convert("L" if channels == 1 else "RGB"), config.image_size)

    if (
        config.reference_column is not None
        and (found := _channels(table[0][config.reference_column], 0, "Reference")) != channels
    ):
        raise InputError(
            f"The references in {config.reference_column!r} have {found} channel{'s' if found > 1 else ''} and the images "
            f"in {image_column!r} {channels}: a bridge needs the same of both."
        )
    labels = list(labels)[: config.max_train_samples]
    paired = read_reference if config.reference_column else None
    return ImageDataset(read, labels, config.name, channels, config.image_size, names, paired)


def _column(table: Any, kind: str, is_kind: Callable[[Any], bool], besides: str | None = None) -> str:
    found = [name for name, feature in table.features.items() if is_kind(feature) and name != besides]
    if len(found) != 1:
        raise InputError(
            f"{'No' if not found else 'More than one'} {kind} column among {table.column_names}: "
            f"set `data.{kind}_column`{' (`none`: images without labels)' if kind == 'label' else ''}."
        )
    return found[0]


def _channels(value: dict[str, Any] | None, index: int, kind: str = "Image") -> int:
    return 1 if _open(value, index, kind).mode in ("L", "1", "I;16", "I") else 3


def _open(value: dict[str, Any] | None, index: int, kind: str = "Image") -> Image.Image:
    if value is None:
        raise InputError(f"{kind} number {index} of the data set is missing: its column is empty there.")
    try:
        image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
        image.load()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{kind} number {index} of the data set cannot be read: {error}") from error
    return image


def _square(image: Image.Image, size: int) -> torch.Tensor:
    """Centre crop and resize to (C, size, size), uint8."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, -1).permute(2, 0, 1)
