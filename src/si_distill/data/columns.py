"""Opens a data set with `datasets` (with user-facing errors), finds its columns and reads its rows."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..places import check_place, similar_paths
from .config import DataConfig
from .decoding import UnreadableImage, decode, is_grey, stored_size, to_pixels

#: Formats of `datasets` whose reading runs what is in a file (pickles) or in the settings (SQL, connections).
PICKLED = ("pandas", "sql", "spark", "generator", "cache")


@dataclass(frozen=True)
class Columns:
    """Where images and labels are, and what the labels mean.

    Args:
        image: column of the images.
        label: column of the labels, or None for images without.
        class_names: of the classes 0 … K − 1; None when the labels are plain numbers, or captions.
        reference: column of each image's own reference, or None.
        captions: whether labels are captions, which have yet to be numbered.
    """

    image: str
    label: str | None
    class_names: list[str] | None
    reference: str | None = None
    captions: bool = False

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [name for name in (self.image, self.label, self.reference) if name is not None]


def open_dataset(config: DataConfig) -> Any:
    """The table, or with `streaming` the iterable, that `datasets.load_dataset` gives.

    Raises:
        InputError: when it cannot be found, is gated or the Hub cannot be reached; says what to do.
    """
    import datasets

    if config.name in PICKLED:
        raise InputError(
            f"`data.name` is {config.name!r}, a format of pickles or queries, which run what is in them: convert the data "
            "to Parquet."
        )
    check_place("data set", config.name)
    with explained(config):
        return datasets.load_dataset(
            config.name,
            config.config_name,
            data_files=config.data_files,
            split=config.split,
            streaming=config.streaming,
        )


@contextlib.contextmanager
def explained(config: DataConfig) -> Iterator[None]:
    """Turns whatever the first reading of a data set raises into an `InputError` that names it and says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # networks, archives and file formats have errors of all types
        cause = error.__cause__
        reason = f"{error} ({type(cause).__name__}: {cause})" if cause is not None else f"{error}"
        if type(cause).__name__ == "SchemaInferenceError":
            reason = "it has no rows: the files are empty."
        raise InputError(
            f"Cannot load the data set {config.name!r} (data_files={config.data_files!r}, split={config.split!r}): "
            f"{reason}{_advice(config, error)}"
        ) from error


def _advice(config: DataConfig, error: Exception) -> str:
    import datasets

    terms = (
        f"accept the terms on its page, https://huggingface.co/datasets/{config.name}, once, and set HF_TOKEN to a token of "
        "that account."
    )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"\nIf the data set is gated: {terms}"
    if isinstance(error, FileNotFoundError) and config.data_files:
        return similar_paths(config.data_files)
    if isinstance(error, ConnectionError):
        return (
            "\nThe Hub cannot be reached from here: check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or give files with "
            f"`data.data_files`. If the data set is gated: {terms}"
        )
    return ""


def check_label(label: Any, name: str, classes: int) -> None:
    """Refuses what is none of the classes 0 … K − 1: a missing label, or a number outside.

    Raises:
        InputError: says it.
    """
    if label is None or not 0 <= label < max(1, classes):
        raise InputError(
            f"An image of {name!r} has {'no label' if label is None else f'the label {label}'}, but there are {classes} "
            f"classes, 0 to {classes - 1}. (Splits for testing often have −1 in place of labels.)"
        )


class RowReader:
    """Decodes the images of a row.

    Args:
        columns: where they are.
        size: side, or height and width, of what is made of them.
        probe: encoded rows from the head of the data set, which tell whether it is grey: single grey images are usual
            among coloured ones.

    Attributes:
        channels: 1 if all images of these rows are grey, otherwise 3; 3 if images have captions.

    Raises:
        InputError: when none of these rows can be read, or references have other channels than images.
    """

    def __init__(self, columns: Columns, size: int | tuple[int, int], probe: list[dict[str, Any]]):
        self.columns = columns
        self.size = size
        found = _channels(columns.image, probe)
        self.channels = 3 if columns.captions else found  # text-to-image pipelines know no grey images
        if columns.reference is not None and (found := _channels(columns.reference, probe)) != self.channels:
            raise InputError(
                f"The references in {columns.reference!r} have {found} channel{'s' if found > 1 else ''} and the images in "
                f"{columns.image!r} {self.channels}: a bridge needs the same of both."
            )

    def image(self, row: dict[str, Any]) -> torch.Tensor:
        """(C, height, width), uint8.

        Raises:
            UnreadableImage: when it cannot be decoded.
        """
        return to_pixels(decode(row[self.columns.image]), self.channels, self.size)

    def reference(self, row: dict[str, Any]) -> torch.Tensor:
        """(C, height, width), uint8: the same part of the picture as `image`.

        Raises:
            UnreadableImage: when it cannot be decoded, or has another shape than the image.
        """
        try:
            reference = decode(row[self.columns.reference])
        except UnreadableImage as error:
            raise UnreadableImage(f"its reference: {error}") from error
        width, height = stored_size(row[self.columns.image])
        # Cropping and resizing would otherwise take different parts of the two.
        if reference.width * height != reference.height * width:
            raise UnreadableImage(
                f"it has {width}×{height} pixels and its reference {reference.width}×{reference.height}: the two of a pair "
                "must have the same shape"
            )
        return to_pixels(reference, self.channels, self.size)


def _channels(column: str, rows: list[dict[str, Any]]) -> int:
    grey, problem = [], "there are none"
    for row in rows:
        try:
            grey.append(is_grey(decode(row[column])))
        except UnreadableImage as error:
            problem = str(error)
    if not grey:
        raise InputError(f"None of the first images in {column!r} can be read: {problem}.")
    return 1 if all(grey) else 3


def find_columns(config: DataConfig, features: dict[str, Any]) -> Columns:
    """The columns that the settings name, or the only ones of their types.

    A WebDataset's `cls` is taken for the label.

    Args:
        config: of the data.
        features: the data set's, by column.

    Raises:
        InputError: when there is none, or more than one, or not the one that was named.
    """
    import datasets

    label, reference = None if config.label_column == "none" else config.label_column, config.reference_column
    for column in (config.image_column, label, reference, config.caption_column):
        if column is not None and column not in features:
            raise InputError(f"The data set has no column {column!r}; its columns are {list(features)}.")
    others = {name: feature for name, feature in features.items() if name != reference}
    pictures = {name: feature for name, feature in others.items() if _holds_images(feature)}
    image = config.image_column or _only(pictures or others, "image", datasets.Image, dict)
    for column in filter(None, (image, reference)):
        if not _holds_images(features[column]):
            raise InputError(
                f"The column {column!r} holds {features[column]}, which is not read as images: store the encoded files as "
                "binary, or write the file with `datasets`, whose `Image` column says what it is."
            )
    if config.caption_column is not None:
        kind = features[config.caption_column]
        if not isinstance(kind, datasets.Value) or "string" not in kind.dtype:
            raise InputError(
                f"The captions in {config.caption_column!r} are {kind}: one text for each image is needed. Give another "
                "`data.caption_column`."
            )
        return Columns(image, config.caption_column, None, reference, captions=True)
    if config.label_column == "none":
        return Columns(image, None, [], reference)
    if label is None:
        label = "cls" if "cls" in features else _only(features, "label", datasets.ClassLabel)
    kind = features[label]
    if isinstance(kind, datasets.ClassLabel):
        return Columns(image, label, list(kind.names), reference)
    if not isinstance(kind, datasets.Value) or "int" not in kind.dtype:
        raise InputError(
            f"The labels in {label!r} are {kind}: classes are ClassLabel or integers 0 … K − 1. Give another "
            "`data.label_column`, or `none`."
        )
    return Columns(image, label, None, reference)


def _holds_images(feature: Any) -> bool:
    """Whether a column holds encoded images: `datasets`' own type, bytes, or the struct that this type is stored as."""
    import datasets

    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, datasets.Image) or content == datasets.Value("binary")


def _only(features: dict[str, Any], kind: str, *of: type) -> str:
    """The only column of the first of these types that there is any of."""
    found: list[str] = []
    for each in of:
        found = found or [name for name, feature in features.items() if isinstance(feature, each)]
    if len(found) != 1:
        raise InputError(
            f"{'No' if not found else 'More than one'} {kind} column among {list(features)}: "
            f"set `data.{kind}_column`{' (`none`: images without labels)' if kind == 'label' else ''}."
        )
    return found[0]
