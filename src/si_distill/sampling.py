"""Pictures of a pipeline's classes: each image from a seed of its own, whatever the batch size."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .errors import InputError
from .pipelines.interpolant_pipeline_images import to_eight_bits


def class_names(pipeline: DiffusionPipeline, labels: list[int]) -> list[str]:
    """Short names of classes: the first synonym, or the number."""
    names = pipeline.config.id2label or {}
    return [str(names.get(label, label)).split(",")[0].strip() for label in labels]


def spread_labels(num_classes: int, count: int = 10) -> list[int]:
    """At most `count` classes, evenly spread over all."""
    count = min(count, num_classes)
    return [round(n * (num_classes - 1) / max(count - 1, 1)) for n in range(count)]


def open_images(files: list[str], channels: int) -> list[Image.Image]:
    """The image files, in grey or in colour, as a pipeline with this number of channels takes them (0: it takes none).

    Raises:
        InputError: when one cannot be read.
    """
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(to_eight_bits(image, channels))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"The image {file} cannot be read: {error}") from error
    return images


def sample_rows(
    pipeline: DiffusionPipeline,
    labels: list[int] | None,
    rows: int,
    seed: int,
    batch_size: int = 64,
    columns: int = 1,
    images: list[Image.Image] | None = None,
    **kwargs,
) -> list[list[Image.Image]]:
    """
    Rows of images, one column for each label or each given image.

    Row r is drawn from seed + r in every column, so that columns compare classes, or given images, on the same noise.

    Args:
        pipeline: a student or a teacher.
        labels: classes of the columns; None for an unconditional pipeline, whose image in row r and column c is drawn from
            seed + r · columns + c.
        rows: images of each label.
        seed: of the first row.
        batch_size: images generated at once; changes no image beyond rounding.
        columns: of an unconditional pipeline that takes no images.
        images: of a pipeline that takes images, one for each column; as many as labels, if there are any.
        kwargs: passed to the pipeline, e.g. `num_inference_steps`.
    """
    given = labels if images is None else images
    columns = columns if given is None else len(given)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    made: list[Image.Image] = []
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        # Nothing but the noise tells the columns of an unconditional pipeline without images apart.
        seeds = [seed + row if given is not None else seed + row * columns + column for row, column in batch]
        who: dict[str, Any] = {"batch_size": len(batch)} if given is None else {}
        if labels is not None:
            who["class_labels"] = [labels[column] for _, column in batch]
        if images is not None:
            who["image"] = [images[column] for _, column in batch]
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        made += pipeline(**who, generator=generators, **kwargs).images
    return [made[row * columns : (row + 1) * columns] for row in range(rows)]
