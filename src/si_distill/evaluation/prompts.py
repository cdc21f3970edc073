"""The prompts of an evaluation: lines of a file, or the captions of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import fingerprints
from ..data import DataConfig, ImageDataset, load_images
from ..data.columns import open_dataset
from ..errors import InputError
from ..text_to_image.prompts import read_prompts


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


def load_prompts(file: str | None, data: DataConfig, per_prompt: int, num_samples: int | None) -> Prompts:
    """The first prompts of a file, one in each line, or of a data set.

    Args:
        file: the text file; None for the captions of `data`.
        data: whose `caption_column` holds the captions.
        per_prompt: images of each prompt.
        num_samples: images in all; None for all prompts.

    Raises:
        InputError: when they cannot be read, some are empty, or they are not as many as `num_samples` needs.
    """
    if file is not None and not Path(file).is_file():
        raise InputError(f"`prompts_file` {file} is not a file: give a text file with a prompt in each line.")
    name = data.name if file is None else Path(file).name
    texts = read_prompts(data if file is None else DataConfig(name="text", data_files=file))
    if num_samples is not None:
        if num_samples % per_prompt or num_samples > len(texts) * per_prompt:
            raise InputError(
                f"`num_samples` is {num_samples}, but it counts images: of {len(texts):,} prompts with {per_prompt} each "
                f"(`images_per_prompt`) it is a multiple of {per_prompt} up to {len(texts) * per_prompt:,}."
            )
        texts = texts[: num_samples // per_prompt]
    return Prompts(name, texts, per_prompt)


def captioned_images(data: DataConfig) -> ImageDataset | None:
    """The images of a data set that has a column of type `Image`, or an `image_column`; None of one of prompts alone.

    Raises:
        InputError: when they cannot be read.
    """
    import datasets

    if data.image_column is None:
        kinds = open_dataset(data).features.values()
        if not any(isinstance(kind, datasets.Image) for kind in kinds):
            return None
    return load_images(data)
