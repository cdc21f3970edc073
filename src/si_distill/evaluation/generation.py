"""Images of a pipeline in memory, for small numbers of them; `shards.py` streams large ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from .samples import PipelineSource


@dataclass
class Generated:
    """Images of one generator.

    Args:
        images: (N, C, H, W), uint8.
        evaluations: network evaluations per image; a guided evaluation counts twice.
        images_per_second: over the whole generation, decoding included.
    """

    images: torch.Tensor
    evaluations: float
    images_per_second: float


def generate_images(
    pipeline: InterpolantPipeline | OneStepInterpolantPipeline,
    call: Callable[..., object],
    labels: list[int],
    seed: int,
    batch_size: int,
    description: str,
) -> Generated:
    """Generates one image for each label and counts what the network did.

    Args:
        pipeline, call, seed: see `PipelineSource`.
        labels: a class for each image; only their number matters to an unconditional network.
        batch_size: images at once.
        description: for the progress bar.
    """
    source = PipelineSource(pipeline, call, labels if pipeline.network.num_classes else None, seed, len(labels))
    starts = tqdm(range(0, len(labels), batch_size), desc=description, unit="batch")
    batches = [source.read(range(s, min(s + batch_size, len(labels)))) for s in starts]
    return Generated(
        torch.cat([batch.images for batch in batches]),
        sum(batch.rows for batch in batches) / len(labels),
        len(labels) / sum(batch.seconds for batch in batches),
    )
