"""Bridges: paths with noise in the middle, γ(t) ≠ 0, between data and any reference (conventions: `interpolant_base`).

It imports only torch: a copy travels next to the scheduler into every saved pipeline (here: `si_distill.interpolants`).

A pair (x0, x1) and noise z give x_t; a network that sees x_t (and, if the bridge is PAIRED, x1 next to it) cannot tell three
unknowns from two equations. So conversions of its predictions need one of them: x1 (pinned, z is eliminated), or E[z | x_t]
(x1 is eliminated). A network of an UNPAIRED bridge that predicts the velocity has neither and is used as it is.
"""

import math

import torch

from .interpolant_base import Interpolant, Noise, precise


class BridgeInterpolant(Interpolant):
    """x_t = (1 − t) x0 + t x1 + γ(t) z with any reference x1 (Albergo, Boffi & Vanden-Eijnden 2023, eq. 2.1).

    A subclass sets `name` and `_gamma`: γ and γ' at the times, γ > 0 inside (0, 1) and 0 at both ends.
    """

    gaussian_reference = False
    noisy = True
    predictions = ("velocity", "sample")
    singular_ends = (0.0, 1.0)

    def _path(self, t):
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def convert(self, prediction, x_t, t, source, target, x1: torch.Tensor | None = None, z: Noise = None):
        """Turns `velocity` into `sample` (x̂0) and back, at t in (0, 1), with x1 or z given. With r = γ'/γ:

            pinned (x1):  v = κ x̂0 + (β' − r β) x1 + r x_t,    κ = α' − r α        [from z = (x_t − α x̂0 − β x1) / γ]
            z:            the conversions of γ = 0 between x_t − γ z and v − γ' z

        On the Brownian bridge κ = −1/(2t), whatever the scale: v − İ = −(x̂0 − x0)/(2t).

        Args:
            prediction, x_t: (B, …).
            t: (B,) or scalar times.
            source, target: `"velocity"` or `"sample"`.
            x1: (B, …) the pair's reference, which the network saw too.
            z: (B, …) E[z | x_t] instead of x1, e.g. the prediction of a second network.

        Raises ValueError for another kind of prediction, or when neither or both of x1 and z are given.
        """
        if source == target or not self.noisy:
            return super().convert(prediction, x_t, t, source, target)
        self.check_predictions(source, target)
        if (x1 is None) == (z is None):
            raise ValueError(
                f"On the interpolant {self.name!r} a {source} prediction becomes a {target} only with the reference: pass "
                "x1=… (the pair's own, which the network saw too), or z=… (E[z | x_t]), one of the two. A network of an "
                "unpaired bridge, which does not see x1, is used for what it predicts."
            )
        given = z if x1 is None else x1
        if not prediction.shape == x_t.shape == given.shape:
            raise ValueError(
                f"The prediction {tuple(prediction.shape)}, x_t {tuple(x_t.shape)} and the reference or noise "
                f"{tuple(given.shape)} must have one shape."
            )
        c = self.at(t, x_t)
        if x1 is None:
            if source == "velocity":
                prediction = prediction - c.d_gamma * z
            converted = super().convert(prediction, x_t - c.gamma * z, t, source, target)
            return converted if target == "sample" else converted + c.d_gamma * z
        rate = c.d_gamma / c.gamma
        known = (c.d_beta - rate * c.beta) * x1 + rate * x_t
        return (prediction - known) / c.kappa if target == "sample" else c.kappa * prediction + known

    def last_step(self, prediction, x_t, t, source, x1=None):
        if source == "velocity" and x1 is None:
            return x_t - t.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype) * prediction
        return self.convert(prediction, x_t, t, source, "sample", x1=x1)

    def middle_time(self):
        return 0.5

    def edm_weight(self, t):
        raise ValueError(f"EDM's weight is one of noise levels β/α, which the interpolant {self.name!r} does not have.")

    def times_of_ratios(self, ratios):
        raise ValueError(
            f"On the interpolant {self.name!r} β/α is no noise level, because its reference is no noise: give times t."
        )


class BrownianBridge(BridgeInterpolant):
    """γ = s √(t (1 − t)): given its ends, x_t is Brownian motion of variance s² per unit of time.

    Liu et al. 2023, "I²SB: Image-to-Image Schrödinger Bridge", and Albergo et al. 2023, section 3.4. γ' is infinite at both
    ends. At scale 0 it is `linear` with another reference, and like it converts without x1.

    Args:
        scale: s ≥ 0, in the unit of the data.
    """

    name = "bridge"
    citation = "albergo2023stochastic"

    def __init__(self, scale: float = 1.0):
        if not (isinstance(scale, (int, float)) and 0 <= scale < math.inf):
            raise ValueError(f"`bridge` needs a finite scale >= 0, got {scale!r}.")
        self.scale = float(scale)

    @property
    def noisy(self) -> bool:
        return self.scale > 0

    @property
    def singular_ends(self) -> tuple[float, ...]:
        return (0.0, 1.0) if self.noisy else ()

    def _gamma(self, t):
        if not self.noisy:
            return super()._gamma(t)
        root = torch.sqrt(t * (1 - t))
        return self.scale * root, self.scale * (1 - 2 * t) / (2 * root)

    def posterior(
        self, x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, s: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """A sample of x_s given x_t and x0, for s < t: Brownian motion between them, whatever x1 was.

            x_s = (s/t) x_t + (1 − s/t) x0 + scale · √(s (t − s) / t) · n

        Args:
            x_t, x0, noise: (B, …); n is standard normal.
            t, s: times of shape (B,) or ().
        """
        later, earlier = precise(t), precise(s)
        later, share = (self._broadcast(value, x_t) for value in (later, earlier / later))
        std = self.scale * torch.sqrt(share * (1 - share) * later)
        return share * x_t + (1 - share) * x0 + std * noise

    def _broadcast(self, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value).to(x.dtype)
