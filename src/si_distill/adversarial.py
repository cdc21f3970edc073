"""Adversarial terms that any objective of the family can carry: the critic's features tell real from generated images.

Two forms, with one loss: non-saturating binary cross-entropy on logits, BCE(l, 1) = softplus(−l), BCE(l, 0) = softplus(l).

* `encoder` (SiDA, Zhou et al. 2024): the logits are the mean over channels of the critic's hidden tokens after its middle
  block, one per token: no new parameters. The loss is an average over the whole batch of a device.
* `head` (DMD2, Yin et al. 2024; RealUID with GAN): a small network on the same tokens, with times of its own.

Only torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

KINDS = ("encoder", "head")


@dataclass(frozen=True)
class AdversarialTerm:
    """Kind and weights of an adversarial term, in the units of its publication.

    Args:
        kind: `encoder` or `head`.
        critic_weight: λ_D, published factor of the critic's term.
        generator_weight: λ_G, published factor of the generator's term.
        weights_of_sums: whether the published factors stand beside losses that are SUMS over the N = C·H·W values of a
            sample (SiDA, RealUID) and not means (DMD2). Our losses are means, so such factors are divided by N here, and
            nowhere else.
        generator_scale: the publication's factor of the generator's distillation loss (SiDA: 100 · ½, on the SiD term
            alone); ours has the factor 1, so the generator's adversarial weight is divided by it.
        clamp: the generator's logits are cut to ±clamp (SiDA: 10), or None.
        max_grad_value: each value of the critic's gradient is cut to ± this (SiDA's code: 1 for EDM teachers), or None.
    """

    kind: str
    critic_weight: float
    generator_weight: float
    weights_of_sums: bool = True
    generator_scale: float = 1.0
    clamp: float | None = None
    max_grad_value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Unknown adversarial term {self.kind!r}. Choose one of: {', '.join(KINDS)}.")
        if self.critic_weight < 0 or self.generator_weight < 0 or self.generator_scale <= 0:
            raise ValueError(
                f"Adversarial weights must not be negative, got {self.critic_weight} (critic), {self.generator_weight} "
                f"(generator) and scale {self.generator_scale}."
            )
        if self.max_grad_value is not None and not 0 < self.max_grad_value < float("inf"):
            raise ValueError(f"`max_grad_value` must be a positive number, got {self.max_grad_value}.")

    def critic_loss(self, real: torch.Tensor, fake: torch.Tensor, weight: torch.Tensor, values: int) -> torch.Tensor:
        """λ_D · mean(weight) · [BCE(real, 1) + BCE(fake, 0)], halved for `encoder`; a scalar.

        It is added to the critic's mean loss.

        Args:
            real, fake: logits (B, …) of real and generated images at the same times and noise.
            weight: (B,) the critic's loss weight in sample space; for `head` ones.
            values: N, the number of values of a sample.
        """
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        if self.kind == "encoder":
            loss = 0.5 * loss
        return self._per_mean(self.critic_weight, values) * weight.mean() * loss

    def generator_loss(self, fake: torch.Tensor, weight: torch.Tensor, values: int) -> torch.Tensor:
        """λ_G · mean(weight) · BCE(fake, 1), a scalar, to add to the generator's mean loss.

        SiDA publishes ½·100·(½ Σ ℓ)/d + ½·λ_G·N·BCE/d: its N cancels against the sum, so only the scale remains.

        Args:
            fake: logits (B, …) of generated images, with their gradient.
            weight: (B,) the factor 1/d of the `sid` weight for `encoder`; for `head` ones.
            values: N.
        """
        if self.clamp is not None:
            fake = fake.clamp(-self.clamp, self.clamp)
        factor = self.generator_weight / self.generator_scale
        if self.kind == "head":
            factor = self._per_mean(factor, values)
        return factor * weight.mean() * F.softplus(-fake).mean()

    def critic_grad_limit(self, values: int) -> float | None:
        """The cut of the critic's gradient beside our means, or None.

        Args:
            values: N.
        """
        return None if self.max_grad_value is None else self._per_mean(self.max_grad_value, values)

    def _per_mean(self, weight: float, values: int) -> float:
        return weight / values if self.weights_of_sums else weight
