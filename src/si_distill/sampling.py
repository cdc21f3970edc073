"""Pictures of a pipeline's classes: each image from a seed of its own, whatever the batch size."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .visualization import image_grid


def class_names(pipeline: DiffusionPipeline, labels: list[int]) -> list[str]:
    """Short names of classes: the first synonym, or the number."""
    names = pipeline.config.id2label or {}
    return [str(names.get(label, label)).split(",")[0].strip() for label in labels]


def spread_labels(num_classes: int, count: int = 10) -> list[int]:
    """At most `count` classes, evenly spread over all."""
    count = min(count, num_classes)
    return [round(n * (num_classes - 1) / max(count - 1, 1)) for n in range(count)]


def sample_rows(
    pipeline: DiffusionPipeline, labels: list[int], rows: int, seed: int, batch_size: int = 64, **kwargs
) -> list[list[Image.Image]]:
    """
    Rows of images, one column for each label.

    Row r is drawn from seed + r in every column, so that columns compare classes on the same noise.

    Args:
        pipeline: a student or a teacher.
        labels: classes of the columns; for an unconditional pipeline its length alone counts, and the image in row r and
            column c is drawn from seed + r · columns + c.
        rows: images of each label.
        seed: of the first row.
        batch_size: images generated at once; changes no image beyond rounding.
        kwargs: passed to the pipeline, e.g. `num_inference_steps`.
    """
    conditional = pipeline.transformer.config.num_classes > 0
    places = [(row, column) for row in range(rows) for column in range(len(labels))]
    images: list[Image.Image] = []
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        seeds = [seed + (row if conditional else row * len(labels) + column) for row, column in batch]
        who = {"class_labels": [labels[column] for _, column in batch]} if conditional else {"batch_size": len(batch)}
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        images += pipeline(**who, generator=generators, **kwargs).images
    return [images[row * len(labels) : (row + 1) * len(labels)] for row in range(rows)]


def labelled_grid(pipeline: DiffusionPipeline, labels: list[int], rows: list[list[Image.Image]]) -> Image.Image:
    """One picture of rows of images with the names of the classes on top."""
    conditional = pipeline.transformer.config.num_classes > 0
    return image_grid(rows, column_titles=class_names(pipeline, labels) if conditional else None)
