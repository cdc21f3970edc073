"""What an update learns from: a micro-batch, and times and noise of its loss."""

from dataclasses import dataclass

import torch

from ...data.batches import Batch
from ...sample_noise import SampleNoise
from .levels import Level
from .losses import Draw
from .plan import Plan
from .terms import AdversarialConfig


@dataclass
class MicroBatch:
    """What generated images are made from, and the real images next to them.

    Args:
        noise: (B, …) what the student starts from or sees, or None for a deterministic map.
        labels: (B,) classes of the generated images.
        data: `images`, `labels` and `reference` as the recipe needs them; empty when it needs none.
        indices: places in the global batch.
        level: the student's step whose image it is.
        key: counters of this draw, of the noise on the way to the level.
    """

    noise: torch.Tensor | None
    labels: torch.Tensor
    data: Batch
    indices: range
    level: Level = Level()
    key: tuple[int, ...] = ()


def draw_for_loss(
    plan: Plan, term: AdversarialConfig, noise: SampleNoise, loss: str, counters: tuple[int, int], indices: range
) -> Draw:
    """Times and noise of one update's loss.

    Args:
        plan: whose times they are.
        term: the adversarial one, which may have its own.
        noise: the run's random numbers.
        loss: `critic` or `generator`.
        counters: the iteration, and the update in it.
        indices: places in the global batch.
    """
    times = plan.critic_times if loss == "critic" else plan.generator_times
    own_times, shape = plan.adversarial_times, plan.teacher.network.sample_shape
    u, normal = noise.uniform_and_normal(shape, loss, *counters, indices=indices)
    draw = Draw(times(u), normal)
    own = f"{loss}_adversarial"
    if term.own_noise:
        u, normal = noise.uniform_and_normal(shape, own, *counters, indices=indices)
        draw.adversarial = Draw(draw.t if own_times is None else own_times(u), normal)
    elif own_times is not None:
        draw.adversarial = Draw(own_times(noise.uniform(own, *counters, indices=indices)), normal)
    if term.real_apart and loss == "critic":
        u, normal = noise.uniform_and_normal(shape, "critic_adversarial_real", *counters, indices=indices)
        draw.adversarial_real = Draw((own_times or times)(u), normal)
    return draw
