"""The prompts of an evaluation: lines of a file, or the captions of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import fingerprints
from ..data import DataConfig, load_images
from ..data.columns import open_dataset
from ..errors import InputError
from ..places import similar_paths
from ..settings import settings_to_dict
from ..text_to_image.prompts import read_prompts
from ..text_to_image.text_cache import is_text_cache
from .samples import DatasetSource


@dataclass
class Prompts:
    """Prompts with some images of each: image i is of prompt i // per_prompt.

    Args:
        name: how results refer to them.
        texts: the prompts.
        per_prompt: images of each.
    """

    name: str
    texts: list[str]
    per_prompt: int = 1

    def __len__(self) -> int:
        """Number of images."""
        return len(self.texts) * self.per_prompt

    def of(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these images."""
        return [self.texts[i // self.per_prompt] for i in indices]

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values; two of the same are the same prompts of the same images."""
        return {
            "name": self.name,
            "prompts": len(self.texts),
            "hash": fingerprints.of_values(self.texts),
            "images_per_prompt": self.per_prompt,
        }


def load_prompts(
    file: str | None, data: DataConfig, per_prompt: int, num_samples: int | None, most: int | None = None
) -> Prompts:
    """The first prompts of a file, one in each line, or of a data set.

    Args:
        file: the text file; None for the captions of `data`.
        data: whose `caption_column` holds the captions.
        per_prompt: images of each prompt.
        num_samples: images in all; None for all prompts.
        most: images in all, at most, where `num_samples` is not given.

    Raises:
        InputError: when they cannot be read, some are empty, or they are not as many as `num_samples` needs.
    """
    if file is not None and not Path(file).is_file():
        raise InputError(
            f"`prompts_file` {file} is not a file: give a text file with a prompt in each line.{similar_paths(file)}"
        )
    name = data.name if file is None else Path(file).name
    texts = read_prompts(data if file is None else DataConfig(name="text", data_files=file))
    if num_samples is not None and (num_samples % per_prompt or num_samples > len(texts) * per_prompt):
        raise InputError(
            f"`num_samples` is {num_samples}, but it counts images: of {len(texts):,} prompts with {per_prompt} each "
            f"(`images_per_prompt`) it is a multiple of {per_prompt} up to {len(texts) * per_prompt:,}."
        )
    images = num_samples or most
    texts = texts[: max(1, images // per_prompt)] if images else texts
    return Prompts(name, texts, per_prompt)


def has_images(data: DataConfig) -> bool:
    """Whether a data set with captions has a column of type `Image`, or an `image_column`.

    Raises:
        InputError: when it cannot be opened.
    """
    import datasets

    if has_no_images(data):
        return False
    return data.image_column is not None or any(
        isinstance(kind, datasets.Image) for kind in open_dataset(data).features.values()
    )


def has_no_images(data: DataConfig) -> bool:
    """Whether settings say that a data set has no images with captions, without a look at it."""
    return data.caption_column is None or data.name == "text" or is_text_cache(data.name)


def captioned_images(data: DataConfig, size: tuple[int, int]) -> DatasetSource:
    """The images of a data set with captions, cropped to a height and a width.

    Raises:
        InputError: when they cannot be read, or `data.image_size` says another size.
    """
    data.check_size(size)
    return DatasetSource(load_images(data, size), {**settings_to_dict(data), "image_size": list(size)})


def no_real_images(what: str, section: str = "") -> InputError:
    """The error of a metric that cannot be had of prompts alone.

    Args:
        what: the setting that asks for it.
        section: of the settings of the evaluation, with the dot.
    """
    return InputError(
        f"{what}, which compares with real images, and there are none: set `{section}reference` (a file of their "
        f"statistics), give images with captions as `data` (`data.caption_column`) and no `{section}prompts_file`, or take "
        "a metric of prompts alone, clip_score or pick_score."
    )
