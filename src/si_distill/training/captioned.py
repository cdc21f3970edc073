"""What the trainers of text-to-image pipelines share: images with captions, and the precision of a base."""

from dataclasses import replace
from typing import Any

import torch

from ..data import TrainingData, load_training_data
from ..data.config import DataConfig
from ..data.latents.format import is_latent_cache
from ..errors import InputError
from ..text_to_image.text_cache import is_text_cache, without_encoders
from .config import TeacherConfig
from .distillation.config import DistillConfig
from .run.facts import describe_data


def load_captioned_images(data: DataConfig, size: tuple[int, int], readers: int = 1) -> TrainingData:
    """Images of one height and width whose labels are the numbers of their captions, or a cache of latents of such images.

    Raises:
        InputError: when `data.image_size` says another size, or a cache holds latents of another; see also
            `load_training_data`, which has the same `readers`.
    """
    data.check_size(size)
    if is_latent_cache(data.name):
        if size[0] != size[1]:
            raise InputError(
                f"{data.name} is a cache of latents, which are of squares, but images of {size[0]} × {size[1]} pixels are "
                "generated (`text.height` and `text.width`): give the images themselves as `data.name`."
            )
        data = replace(data, image_size=size[0])
    return load_training_data(data, readers, size=size)


def describe_captioned(data: DataConfig, images: TrainingData | None, size: tuple[int, int]) -> dict[str, Any] | None:
    """As `describe_data`, with the height and width that images are cropped to."""
    described = describe_data(data, images)
    return described and {**described, "size": list(size)}


def base_dtype(settings: TeacherConfig | DistillConfig) -> torch.dtype | None:
    """The type that a pipeline is loaded in: bfloat16 below adapters of a run in bfloat16, which are trained in float32."""
    return torch.bfloat16 if settings.mixed_precision == "bf16" and settings.lora_rank is not None else None


def idle_encoders(settings: DistillConfig) -> dict[str, None]:
    """The text encoders that a distillation never runs, left out of its teacher: those of a cache of texts.

    A student of its own weights is saved as a whole pipeline, encoders and all, and one that is measured needs them too.
    """
    alone = settings.lora_rank is not None and settings.eval_metric_steps is None
    return without_encoders(settings.teacher) if alone and is_text_cache(settings.data.name) else {}
