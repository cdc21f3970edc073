"""Pictures of a pipeline's classes: each image from a seed of its own, whatever the batch size."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image


def class_names(pipeline: DiffusionPipeline, labels: list[int]) -> list[str]:
    """Short names of classes: the first synonym, or the number."""
    names = pipeline.config.id2label or {}
    return [str(names.get(label, label)).split(",")[0].strip() for label in labels]


def spread_labels(num_classes: int, count: int = 10) -> list[int]:
    """At most `count` classes, evenly spread over all."""
    count = min(count, num_classes)
    return [round(n * (num_classes - 1) / max(count - 1, 1)) for n in range(count)]


def sample_rows(
    pipeline: DiffusionPipeline,
    labels: list[int] | None,
    rows: int,
    seed: int,
    batch_size: int = 64,
    columns: int = 1,
    **kwargs,
) -> list[list[Image.Image]]:
    """
    Rows of images, one column for each label.

    Row r is drawn from seed + r in every column, so that columns compare classes on the same noise.

    Args:
        pipeline: a student or a teacher.
        labels: classes of the columns; None for an unconditional pipeline, whose image in row r and column c is drawn from
            seed + r · columns + c.
        rows: images of each label.
        seed: of the first row.
        batch_size: images generated at once; changes no image beyond rounding.
        columns: of an unconditional pipeline.
        kwargs: passed to the pipeline, e.g. `num_inference_steps`.
    """
    columns = columns if labels is None else len(labels)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    images: list[Image.Image] = []
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        if labels is None:
            seeds, who = [seed + row * columns + column for row, column in batch], {"batch_size": len(batch)}
        else:
            seeds, who = [seed + row for row, _ in batch], {"class_labels": [labels[column] for _, column in batch]}
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        images += pipeline(**who, generator=generators, **kwargs).images
    return [images[row * columns : (row + 1) * columns] for row in range(rows)]
