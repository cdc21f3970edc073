"""Settings of a data source."""

from dataclasses import dataclass

from ..settings import at_least, setting


@dataclass
class DataConfig:
    """Where images come from."""

    name: str = setting("digits", "`digits` (scikit-learn's 1,797 images), or what `datasets.load_dataset` takes.")
    data_files: str | None = setting(None, "Files or a glob for `datasets.load_dataset`, e.g. `data/*.parquet`.")
    split: str = setting("train", "The split to read.")
    image_column: str | None = setting(None, "Column of the images; found by its type when not given.")
    label_column: str | None = setting(
        None, "Column of the labels; found by its type when not given. `none`: no labels."
    )
    image_size: int = setting(8, "Height and width in pixels: centre crop and resize. `digits` is 8.")
    random_flip: bool = setting(False, "Exchange left and right in half of the images that training reads.")
    max_train_samples: int | None = setting(None, "Use only the first that many images.")

    def __post_init__(self) -> None:
        at_least("data.image_size", self.image_size, 1)
        if self.max_train_samples is not None:
            at_least("data.max_train_samples", self.max_train_samples, 1)
