"""Settings of a data source."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..choices import DEGRADATIONS
from ..errors import InputError
from ..settings import at_least, setting

if TYPE_CHECKING:
    from .degradations import Degradation

#: How images and references of two data sets meet in a batch.
COUPLINGS = ("independent", "optimal_transport")


@dataclass
class DataConfig:
    """Where images come from."""

    name: str = setting(
        "digits",
        "`digits` (scikit-learn's 1,797 images), or what `datasets.load_dataset` takes: a Hub id, a folder, a format.",
    )
    config_name: str | None = setting(None, "Configuration of a data set on the Hub that has several.")
    data_files: str | None = setting(None, "Files or a glob for `datasets.load_dataset`, e.g. `data/*.parquet`.")
    split: str = setting("train", "The split to read.")
    streaming: bool = setting(False, "Read while training instead of downloading and indexing first.")
    shuffle_buffer_size: int = setting(
        1000, "Number of encoded images of a stream that each reading process shuffles together."
    )
    image_column: str | None = setting(None, "Column of the images; found by its type when not given.")
    label_column: str | None = setting(
        None, "Column of the labels; found by its type when not given. `none`: no labels."
    )
    caption_column: str | None = setting(
        None, "Column of texts, for text-to-image: the prompts, or the captions of the images."
    )
    num_classes: int | None = setting(
        None, "Number of classes of a stream whose labels are plain numbers; the network's when not given."
    )
    image_size: int = setting(8, "Height and width in pixels: resize and centre crop. `digits` is 8.")
    random_flip: bool = setting(False, "Mirror half of the training images horizontally.")
    max_train_samples: int | None = setting(
        None, "Use only this many images, the first ones; of a stream, an equal share from each shard."
    )
    max_corrupt_images: int = setting(100, "Unreadable images that each process may skip before training stops.")
    reference_column: str | None = setting(
        None, "Column of each image's own reference (a pair); with `reference_name`, of that data set's images."
    )
    degradation: str | None = setting(
        None, "The reference is the image itself, degraded after crop and flip.", DEGRADATIONS
    )
    degradation_kwargs: dict = setting({}, "Settings of the degradation, e.g. {factor: 4} (docs/bridges.md).")
    reference_name: str | None = setting(
        None, "A second data set, of unpaired references: what `datasets.load_dataset` takes."
    )
    reference_files: str | None = setting(None, "Its files or glob, as `data_files`.")
    reference_split: str = setting("train", "Its split.")
    coupling: str = setting(
        "independent",
        "How unpaired images and references are paired; `optimal_transport` minimises, within each process's batch, the "
        "total squared distance.",
        COUPLINGS,
    )

    def __post_init__(self) -> None:
        at_least("data.image_size", self.image_size, 1, 2**14)
        at_least("data.shuffle_buffer_size", self.shuffle_buffer_size, 1)
        at_least("data.max_corrupt_images", self.max_corrupt_images, 0)
        for name in ("max_train_samples", "num_classes"):
            if getattr(self, name) is not None:
                at_least(f"data.{name}", getattr(self, name), 1)
        if self.caption_column is not None and self.label_column not in (None, "none"):
            raise InputError(
                f"`data.caption_column` {self.caption_column!r} and `data.label_column` {self.label_column!r} are both set, "
                "and each says what an image shows: leave one out."
            )
        self._check_references()

    def _check_references(self) -> None:
        if self.degradation and (self.reference_name or self.reference_column):
            other = "reference_name" if self.reference_name else "reference_column"
            raise InputError(
                f"`data.degradation` and `data.{other}` are both set, and each says where references come from: leave one "
                "out."
            )
        if self.degradation_kwargs and not self.degradation:
            raise InputError(
                "`data.degradation_kwargs` are set, but no `data.degradation`: name it, or leave them out."
            )
        if not self.reference_name:
            for name, default in (("reference_files", None), ("reference_split", "train"), ("coupling", "independent")):
                if getattr(self, name) != default:
                    raise InputError(
                        f"`data.{name}` is for unpaired references, but `data.reference_name` is not set: name the data "
                        "set of the references, or leave it out."
                    )
        self.build_degradation()

    @property
    def has_references(self) -> bool:
        """Whether images come with reference images."""
        return self.is_paired or self.reference_name is not None

    @property
    def is_paired(self) -> bool:
        """Whether each image has a reference of its own."""
        return self.degradation is not None or (self.reference_column is not None and self.reference_name is None)

    def describe_references(self) -> str | None:
        """What the references are, in words; None without any."""
        if self.degradation:
            settings = ", ".join(f"{name} {value}" for name, value in self.degradation_kwargs.items())
            return f"the images after {self.degradation}" + (f" ({settings})" if settings else "")
        if self.reference_name:
            files = f" ({self.reference_files})" if self.reference_files else ""
            return f"unpaired, {self.reference_name}{files}, split {self.reference_split}, coupling {self.coupling}"
        return f"of each pair, column {self.reference_column}" if self.reference_column else None

    def build_degradation(self, channels: int | None = None) -> "Degradation | None":
        """The degradation, or None.

        Args:
            channels: of the images, once they are known.

        Raises:
            InputError: for settings that it does not have, or a size or number of channels that it cannot be done at.
        """
        if self.degradation is None:
            return None
        from .degradations import get_degradation

        try:
            degradation = get_degradation(self.degradation, **self.degradation_kwargs)
            degradation.check_size(self.image_size)
            if channels is not None:
                degradation.check_channels(channels)
        except (ValueError, TypeError) as error:
            raise InputError(f"`data.degradation` {self.degradation}: {error}") from None
        return degradation

    @property
    def square(self) -> tuple[int, int] | None:
        """Height and width as `image_size` says, or None where it is not set."""
        return None if self.image_size == type(self).image_size else (self.image_size, self.image_size)

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuses an `image_size` that is not the height and width of generated images.

        Raises:
            InputError: says both.
        """
        if self.square not in (None, size):
            raise InputError(
                f"`data.image_size` is {self.image_size}, but images of {size[0]} × {size[1]} pixels (height and width) are "
                "generated: leave it out, and images are cropped to that size."
            )
