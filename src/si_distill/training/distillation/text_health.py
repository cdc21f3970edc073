"""What is watched of a student's images of prompts, in the terms of `training/evaluate.py`."""

import torch

from ...evaluation.formulas import prompt_distances, saturation
from ...visualization import to_uint8


def image_means(images: torch.Tensor, per_prompt: int) -> dict[str, float]:
    """Means of a line of the log, which `HealthMonitor` knows; of the teacher's images they are called `teacher_…`.

    Args:
        images: (P · K, C, H, W), about [-1, 1], K of each prompt after each other.
        per_prompt: K; with 1 there is no diversity to measure.

    Returns:
        `saturation`, the share of values that are 0 or 255 in eight bits, and `prompt_diversity`, the mean cosine distance
        between the pixels of two images of one prompt.
    """
    eight_bits = to_uint8(images)
    means = {"saturation": float(saturation(eight_bits).mean())}
    if per_prompt > 1:
        pixels = eight_bits.flatten(1).double() / 127.5 - 1
        means["prompt_diversity"] = float(prompt_distances(pixels, per_prompt).mean())
    return means
