"""The nearest real images of generated ones in feature space: does the generator copy its training data?"""

from dataclasses import dataclass

import torch


@dataclass
class Neighbours:
    """Nearest real images.

    Args:
        distances: (N, k), Euclidean distances in feature space, rising.
        indices: (N, k), which of the real features.
    """

    distances: torch.Tensor
    indices: torch.Tensor


def nearest(features: torch.Tensor, real: torch.Tensor, count: int, leave_out_self: bool = False) -> Neighbours:
    """The `count` nearest of `real` (M, D) to each of `features` (N, D), exactly, in blocks of both.

    Args:
        features, real: on the device that computes.
        count: k, at most M, or M − 1 with `leave_out_self`.
        leave_out_self: that `features` is `real`, and no image is its own neighbour.
    """
    distances, indices = [], []
    for start in range(0, len(features), 4096):
        block = features[start : start + 4096]
        # Not by ‖x‖² + ‖y‖² − 2x·y: its rounding hides that a generated image is a copy.
        found = torch.cdist(block, real, compute_mode="donot_use_mm_for_euclid_dist")
        if leave_out_self:
            rows = torch.arange(len(block), device=found.device)
            found[rows, rows + start] = torch.inf
        values, places = found.topk(count, largest=False)
        distances.append(values.cpu())
        indices.append(places.cpu())
    return Neighbours(torch.cat(distances), torch.cat(indices))
