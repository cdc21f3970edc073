"""Step rules of the samplers: from the network's predictions at x_t to x at the next, smaller time.

It imports only torch: a copy travels next to the scheduler into every saved pipeline.

Every rule is a first-order step and, for the solvers of order 2, a trapezoidal correction of it: with f the slope of the
rule at the start of the step and f' at its predicted end,

    predicted = first-order step          corrected = predicted + ½ span (f' − f)

A rule is exact where its slope is constant. That is what distinguishes them: in t the velocity, in σ = β/α (for x/α) the
noise x̂1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Evaluation:
    """One evaluation of the network, and what it says in any space.

    Args:
        interpolant: an `Interpolant`.
        prediction: (B, …), the network's output.
        x: (B, …), the state x_t.
        t: the time, shape ().
        kind: what the network predicts.
        reference: (B, …) x1 of a paired bridge.
    """

    interpolant: Any
    prediction: torch.Tensor
    x: torch.Tensor
    t: torch.Tensor
    kind: str
    reference: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.at = self.interpolant.at(self.t, self.x)

    def predicts(self, space: str) -> torch.Tensor:
        """The prediction as `velocity`, `sample` (x̂0), `epsilon` (x̂1) or `score`; see `Interpolant.convert`."""
        return self.interpolant.convert(self.prediction, self.x, self.t, self.kind, space, x1=self.reference)

    def last_step(self) -> torch.Tensor:
        """Where the step to t = 0 ends; see `Interpolant.last_step`."""
        return self.interpolant.last_step(self.prediction, self.x, self.t, self.kind, x1=self.reference)


Slope = Callable[[Evaluation], torch.Tensor]


@dataclass(frozen=True)
class Move:
    """A first-order step.

    Args:
        x: where it leads, (B, …).
        slope: the quantity that it takes for constant.
        span: what the slope is multiplied with, shape ().
    """

    x: torch.Tensor
    slope: Slope
    span: torch.Tensor

    def corrected(self, start: Evaluation, end: Evaluation) -> torch.Tensor:
        """The trapezoidal rule: second order. `end` is the evaluation at the time this move leads to."""
        return self.x + 0.5 * self.span * (self.slope(end) - self.slope(start))


def velocity_step(now: Evaluation, to: torch.Tensor) -> Move:
    """Euler's step of dx/dt = v to the time `to`: x + (s − t) v."""
    span = to - now.t
    return Move(now.x + span * now.predicts("velocity"), lambda e: e.predicts("velocity"), span)


def noise_step(now: Evaluation, to: torch.Tensor) -> Move:
    """The step that is exact for constant (x̂0, x̂1): x_s = α_s x̂0 + β_s x̂1.

    It is DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 with σ = 0), and Euler's step of
    d(x/α)/dσ = x̂1, σ = β/α; corrected it is Heun's method of EDM (Karras et al. 2022, algorithm 1). From α = 0, where σ is
    infinite, the correction is that of the same step in the form d(x/β)/d(α/β) = x̂0.
    """
    at, end = now.at, now.interpolant.at(to, now.x)
    x = end.alpha * now.predicts("sample") + end.beta * now.predicts("epsilon")
    if float(at.alpha) > 1e-6 * float(at.beta):
        return Move(x, lambda e: e.predicts("epsilon"), end.beta - end.alpha * at.beta / at.alpha)
    return Move(x, lambda e: e.predicts("sample"), end.alpha - at.alpha * end.beta / at.beta)


def multistep(now: Evaluation, before: Evaluation | None, to: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++(2M): second order with one evaluation a step (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    x_s = (β_s/β_t) x_t + (α_s − α_t β_s/β_t) D, where D is x̂0 extrapolated linearly in λ = ln(α/β) from this evaluation and
    the one before to the middle of the step. The first step, and one from α = 0, is `noise_step`.
    """
    x0 = now.predicts("sample")
    at, end = now.at, now.interpolant.at(to, now.x)
    if before is not None and float(before.at.alpha) > 0:
        this, last, next_ = (torch.log(c.alpha / c.beta) for c in (at, before.at, end))
        x0 = x0 + 0.5 * (next_ - this) / (this - last) * (x0 - before.predicts("sample"))
    ratio = end.beta / at.beta
    return ratio * now.x + (end.alpha - at.alpha * ratio) * x0


@dataclass(frozen=True)
class Diffusion:
    """The reverse-time SDE dx = [v − d score] dt + √(2 d) dW̄, which has the marginals of dx/dt = v for every d(t) ≥ 0.

    The forms of d are SiT's (Ma et al. 2024, "SiT", section 3.3 and its public sampler), here with t = 0 at the data, each
    multiplied by `norm`: `sigma` β, `linear` t, `sbdm` β D/α (the diffusion of the forward SDE; infinite where α = 0),
    `constant` 1, `decreasing` ¼ (1 − cos πt)², `increasing-decreasing` sin² πt.
    """

    form: str = "sigma"
    norm: float = 1.0

    def __call__(self, t: torch.Tensor, at: Any) -> torch.Tensor:
        """d at the time `t`, shape (); `at` are the interpolant's coefficients there."""
        if self.form == "sbdm":
            return self.norm * at.beta * at.determinant / at.alpha
        turn = math.pi * t
        forms = {"sigma": at.beta, "linear": t, "constant": torch.ones_like(t)}
        forms |= {"decreasing": 0.25 * (1 - torch.cos(turn)) ** 2, "increasing-decreasing": torch.sin(turn) ** 2}
        return self.norm * forms[self.form]

    def drift(self, e: Evaluation) -> torch.Tensor:
        """v − d score = v + d x̂1 / β."""
        return e.predicts("velocity") + self(e.t, e.at) / e.at.beta * e.predicts("epsilon")

    def step(self, now: Evaluation, to: torch.Tensor, noise: torch.Tensor, corrected: bool) -> Move:
        """Euler and Maruyama's step to the time `to` with standard normal `noise` (B, …).

        When it is going to be `corrected` the variance of its noise is the trapezoidal rule's: then the method has weak
        order 2 (noise is additive, so that the correction needs no other noise).
        """
        span = to - now.t
        d = self(now.t, now.at)
        if corrected:
            d = 0.5 * (d + self(to, now.interpolant.at(to, now.x)))
        return Move(now.x + span * self.drift(now) + (2 * d * span.abs()).sqrt() * noise, self.drift, span)

    def last_step(self, now: Evaluation, to: torch.Tensor, kind: str) -> torch.Tensor:
        """The step to t = 0 without noise: `mean` of the SDE's step, `tweedie` E[x0 | x_t], `euler` of the ODE."""
        if kind == "tweedie":
            return now.predicts("sample")
        if kind == "euler":
            return velocity_step(now, to).x
        return now.x + (to - now.t) * self.drift(now)


def renoise_step(now: Evaluation, to: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x̂0 noised again to the time `to`: α_s x̂0 + β_s ε (Song et al. 2023, "Consistency Models", algorithm 1)."""
    return now.interpolant.interpolate(now.last_step(), noise, to)


def posterior_step(now: Evaluation, to: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A sample of a Brownian bridge at the time `to` given x_t and x̂0 (see `BrownianBridge.posterior`).

    With x̂0 = E[x0 | x_t] or E[x0 | x_t, x1] it is Euler's step of the bridge's SDE, exact for constant x̂0 (Liu et al. 2023,
    "I²SB", eq. 4 and algorithm 2).
    """
    return now.interpolant.posterior(now.x, now.predicts("sample"), now.t, to, noise)


def first_bridge_step(now: Evaluation, to: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first step of a paired bridge's ODE, from t = 1, where x_t is x1 alone: x_s = α_s x̂0 + β_s x1 + γ_s n.

    Without its noise all samples of one x1 would be the same (Zheng et al. 2024, "Diffusion Bridge Implicit Models",
    section 3.2).
    """
    return now.interpolant.interpolate(now.predicts("sample"), now.reference, to, noise)


def pinned_step(now: Evaluation, to: torch.Tensor) -> Move:
    """The step of a paired bridge's ODE that is exact for constant x̂0: x_s = α_s x̂0 + β_s x1 + γ_s ẑ.

    It is Euler's step of dy/dη = x̂0 for y = (x − β x1) / γ and η = α / γ, in which γ' does not appear; corrected it is
    Heun's (Zheng et al. 2024, "Diffusion Bridge Implicit Models", eq. 12 with ρ = 0 and section 4).
    """
    at, end, x0 = now.at, now.interpolant.at(to, now.x), now.predicts("sample")
    span = end.alpha - at.alpha * end.gamma / at.gamma
    rest = end.gamma / at.gamma * (now.x - at.beta * now.reference)
    return Move(end.beta * now.reference + rest + span * x0, lambda e: e.predicts("sample"), span)


def bridge_angle(t: torch.Tensor) -> torch.Tensor:
    """φ = arcsin √t, in which √(t (1 − t)) = ½ sin 2φ is smooth."""
    return torch.asin(torch.sqrt(t))
