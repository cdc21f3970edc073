"""Two-dimensional targets of about unit variance, and a distance between point sets."""

import math

import torch


def gaussians(count: int, generator: torch.Generator) -> torch.Tensor:
    """Eight Gaussians of standard deviation 0.1 on a circle of radius √2, (count, 2)."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centers = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    return centers + 0.1 * torch.randn(count, 2, generator=generator)


def moons(count: int, generator: torch.Generator) -> torch.Tensor:
    """Two half circles that reach into each other, with noise, (count, 2)."""
    angle = torch.rand(count, generator=generator) * math.pi
    lower = torch.randint(2, (count,), generator=generator)
    upper_moon = torch.stack([angle.cos(), angle.sin()], 1)
    lower_moon = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    raw = torch.where(lower[:, None] == 1, lower_moon, upper_moon) + 0.05 * torch.randn(count, 2, generator=generator)
    return (raw - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


TARGETS = {"gaussians": gaussians, "moons": moons}


def sliced_wasserstein(first: torch.Tensor, second: torch.Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance of two point sets of equal size: √ of the mean over directions θ of W₂² of ⟨·, θ⟩.

    Args:
        first, second: (N, D).
        projections: number of directions, uniform on the sphere.
        seed: of the directions.
    """
    if first.shape != second.shape:
        raise ValueError(f"Both sets need the same shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(first.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    sorted_first, sorted_second = ((points.double() @ directions).sort(0).values for points in (first, second))
    return float((sorted_first - sorted_second).square().mean().sqrt())
