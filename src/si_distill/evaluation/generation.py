"""The images that are evaluated: image i depends on (seed, i) alone, whatever the batch size."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from ..training.sample_noise import SampleNoise
from ..visualization import to_uint8


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
        pipeline: its `transformer` is watched.
        call: `call(class_labels=…, latents=…)`, or with `batch_size=…` where the network is unconditional, returns a
            pipeline output whose images are (B, C, H, W) in [0, 1] (`output_type="pt"`).
        labels: a class for each image; only their number matters to an unconditional network.
        seed: of the noise.
        batch_size: images at once.
        description: for the progress bar.
    """
    view = pipeline.network
    noise = SampleNoise(seed, pipeline._execution_device)
    rows = 0

    def count(module: torch.nn.Module, arguments: tuple, result: object) -> None:
        nonlocal rows
        rows += len(result[0])

    hook = pipeline.transformer.register_forward_hook(count)
    batches = []
    started = time.perf_counter()
    try:
        for start in tqdm(range(0, len(labels), batch_size), desc=description, unit="batch"):
            indices = range(start, min(start + batch_size, len(labels)))
            latents = noise.normal(view.sample_shape, "evaluation", indices=indices)
            what = {"class_labels": [labels[i] for i in indices]} if view.num_classes else {"batch_size": len(indices)}
            images = call(**what, latents=latents).images
            batches.append(to_uint8(images * 2 - 1).cpu())
    finally:
        hook.remove()
    seconds = time.perf_counter() - started
    return Generated(torch.cat(batches), rows / len(labels), len(labels) / seconds)
