"""Images with labels: scikit-learn's digits, and whatever `datasets` can load."""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from .batches import IndexedBatches
from .config import DataConfig


class ImageDataset(Dataset):
    """Square images in [-1, 1] with class labels.

    `dataset[i]` is a dict: `images`, a float32 tensor (C, size, size), and `labels`, an int.

    Args:
        read: gives the uint8 tensor (C, size, size) of image i.
        labels: of all images.
        name: how results refer to the data.
        channels: 1 or 3.
        size: height and width.
        class_names: names of the classes 0 … K − 1; empty for images without labels, whose label is always 0.
    """

    def __init__(
        self,
        read: Callable[[int], torch.Tensor],
        labels: list[int],
        name: str,
        channels: int,
        size: int,
        class_names: list[str],
    ):
        self.read = read
        self.labels = labels
        self.name = name
        self.channels = channels
        self.size = size
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": self.read(index).float() / 127.5 - 1, "labels": self.labels[index]}

    def batches(self, batch_size: int, **position: int) -> IndexedBatches:
        """Endless batches of one rank (see `TrainingData.batches`)."""
        return IndexedBatches(self, batch_size, **position)

    def read_all(self) -> tuple[torch.Tensor, list[int]]:
        """All images (N, C, size, size), uint8, and their labels."""
        return torch.stack([self.read(index) for index in range(len(self))]), list(self.labels)


def load_images(config: DataConfig) -> ImageDataset:
    """The images that the settings describe.

    Raises:
        InputError: when they cannot be found or read, or have no labels and `label_column` does not say `none`.
    """
    return _digits(config) if config.name == "digits" else _from_datasets(config)


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
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = ([0] * len(images) if _unlabelled(config) else digits.target.tolist())[: config.max_train_samples]
    names = [] if _unlabelled(config) else [str(n) for n in range(10)]
    return ImageDataset(images.__getitem__, labels, "sklearn-digits", 1, 8, names)


def _from_datasets(config: DataConfig) -> ImageDataset:
    import datasets

    try:
        table = datasets.load_dataset(config.name, data_files=config.data_files, split=config.split)
    except (FileNotFoundError, ValueError, ConnectionError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"Cannot load the data set {config.name!r} (data_files={config.data_files!r}, split={config.split!r}): "
            f"{error}. A gated data set needs its terms accepted on its page and HF_TOKEN set."
        ) from error
    image_column = config.image_column or _column(table, "image", lambda f: isinstance(f, datasets.Image))
    label_column = None
    if not _unlabelled(config):
        label_column = config.label_column or _column(table, "label", lambda f: isinstance(f, datasets.ClassLabel))
    for column in (image_column, label_column):
        if column is not None and column not in table.column_names:
            raise InputError(f"The data set has no column {column!r}; its columns are {table.column_names}.")
    names, labels = [], [0] * len(table)
    if label_column is not None:
        labels, feature = table[label_column], table.features[label_column]
        known = isinstance(feature, datasets.ClassLabel)
        names = list(feature.names) if known else [str(n) for n in range(max(labels) + 1)]
    # Decoded here and not inside datasets: an error there names no file and can end an iteration silently.
    table = table.cast_column(image_column, datasets.Image(decode=False))
    channels = 1 if _open(table[0][image_column], 0).mode in ("L", "1", "I;16", "I") else 3

    def read(index: int) -> torch.Tensor:
        image = _open(table[index][image_column], index).convert("L" if channels == 1 else "RGB")
        return _square(image, config.image_size)

    labels = list(labels)[: config.max_train_samples]
    return ImageDataset(read, labels, config.name, channels, config.image_size, names)


def _column(table: Any, kind: str, is_kind: Callable[[Any], bool]) -> str:
    found = [name for name, feature in table.features.items() if is_kind(feature)]
    if len(found) != 1:
        raise InputError(
            f"{'No' if not found else 'More than one'} {kind} column among {table.column_names}: "
            f"set `data.{kind}_column`{' (`none`: images without labels)' if kind == 'label' else ''}."
        )
    return found[0]


def _open(value: dict[str, Any], index: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
        image.load()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"Image number {index} of the data set cannot be read: {error}") from error
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
