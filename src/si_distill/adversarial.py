"""Adversarial terms that any objective of the family can carry: the critic's features tell real from generated images.

Two forms, with one loss: non-saturating binary cross-entropy on logits, BCE(l, 1) = softplus(−l), BCE(l, 0) = softplus(l).

* `encoder` (SiDA, Zhou et al. 2024): the logits are the mean over channels of the critic's hidden tokens after its middle
  block, one per token: no new parameters. The loss is an average over the whole batch of a device.
* `head` (DMD2, Yin et al. 2024; RealUID with GAN): a small network on the same features (see `si_distill.critic.HEADS`).

Factors are those of the publications: the losses they are added to are in published units too (`loss_reduction`,
`loss_scale`). Only torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .choices import ADVERSARIAL_COMBINATIONS, ADVERSARIAL_KINDS


@dataclass(frozen=True)
class AdversarialTerm:
    """Kind and factors of an adversarial term.

    Args:
        kind: `encoder` or `head`.
        critic_weight: λ_D, factor of the critic's term.
        generator_weight: λ_G, factor of the generator's term.
        combine: the generator minimises the `sum` of its two losses, or their `mean` (SiDA's code).
        clamp: the generator's logits are cut to ±clamp (SiDA: 10), or None.
    """

    kind: str
    critic_weight: float
    generator_weight: float
    combine: str = "sum"
    clamp: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("kind", ADVERSARIAL_KINDS), ("combine", ADVERSARIAL_COMBINATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Unknown {name} {getattr(self, name)!r} of an adversarial term. Choose one of: {', '.join(choices)}."
                )
        for name in ("critic_weight", "generator_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"The adversarial {name} must be finite and not negative, got {getattr(self, name)}.")

    def critic_loss(self, real: torch.Tensor, fake: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """λ_D · mean(weight) · [BCE(real, 1) + BCE(fake, 0)], halved for `encoder`; a scalar to add to the critic's loss.

        Args:
            real, fake: logits (B, …) of real and generated images.
            weight: (B,) the critic's loss weight in sample space; for `head` ones.
        """
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        if self.kind == "encoder":
            loss = 0.5 * loss
        return self.critic_weight * weight.mean() * loss

    def generator_loss(self, fake: torch.Tensor, weight: torch.Tensor, values: int) -> torch.Tensor:
        """λ_G · mean(weight) · BCE(fake, 1), times the number of values for `encoder`; a scalar.

        Args:
            fake: logits (B, …) of generated images, with their gradient.
            weight: (B,) the factor 1/d of the `sid` weight for `encoder`; for `head` ones.
            values: over which the generator's losses are summed: C·H·W, or 1 where they are means.
        """
        if self.clamp is not None:
            fake = fake.clamp(-self.clamp, self.clamp)
        factor = self.generator_weight * (values if self.kind == "encoder" else 1)
        return factor * weight.mean() * F.softplus(-fake).mean()

    def combined(self, distillation: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """The generator's loss of its two parts."""
        total = distillation + adversarial
        return total if self.combine == "sum" else 0.5 * total
