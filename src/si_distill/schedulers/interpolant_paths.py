"""Stochastic interpolants: coefficients, their derivatives, and conversions between predictions.

The one home of these formulas. It imports only torch, because a copy of it travels beside the scheduler into every saved
pipeline; inside the package it is reached as `si_distill.interpolants`.

Conventions (Albergo, Boffi & Vanden-Eijnden 2023, "Stochastic Interpolants", eq. 2.1):

    x_t = α(t) x0 + β(t) x1 + γ(t) z,    t in [0, 1],    z ~ N(0, I)

`x0` is data (t = 0), `x1` the reference (t = 1), and a dot or `d_` is the derivative in t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

PREDICTIONS = ("velocity", "sample", "epsilon", "score")


@dataclass(frozen=True)
class Coefficients:
    """Values and time derivatives of α, β, γ at the same times; each field has the shape of `t`."""

    alpha: torch.Tensor
    beta: torch.Tensor
    gamma: torch.Tensor
    d_alpha: torch.Tensor
    d_beta: torch.Tensor
    d_gamma: torch.Tensor

    @property
    def determinant(self) -> torch.Tensor:
        """D = α β' − α' β: positive while the signal-to-noise ratio falls with t."""
        return self.alpha * self.d_beta - self.d_alpha * self.beta

    @property
    def kappa(self) -> torch.Tensor:
        """κ = α' − β' α / β = −D / β, the factor in v − İ = κ (x̂0 − x0). Infinite at t = 0."""
        return -self.determinant / self.beta

    def expand_as(self, x: torch.Tensor) -> "Coefficients":
        """The same coefficients, shape (B,) or (), in the dtype of `x` and broadcastable against it."""

        def shaped(value: torch.Tensor) -> torch.Tensor:
            return value.reshape(-1, *[1] * (x.ndim - 1)).to(dtype=x.dtype) if value.ndim else value.to(x.dtype)

        return Coefficients(*(shaped(getattr(self, name)) for name in self.__dataclass_fields__))


class Interpolant:
    """x_t = α(t) x0 + β(t) x1 with a Gaussian reference (γ = 0).

    A family sets `name` and `_path`; the constructor's arguments are its configuration and must be kept as attributes
    of the same names. Everything else follows from `_path`.
    """

    name: ClassVar[str]
    #: Ends of [0, 1] at which a derivative is infinite; training times keep `t_epsilon` away from them.
    singular_ends: ClassVar[tuple[float, ...]] = ()

    def _path(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(α, β, α', β') at the float64 times `t`."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments: `get_interpolant(it.name, **it.config)` rebuilds the object."""
        return dict(vars(self))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.config == other.config

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.config.items()))))

    def __repr__(self) -> str:
        return f"get_interpolant({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.config.items())])})"

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        """α, β, γ and their derivatives, in the dtype and shape of `t`.

        They are computed in float64 (float32 where the device has no float64) and cast last: near the ends they are
        differences of nearly equal numbers.

        Args:
            t: times in [0, 1], floating point, any shape.
        """
        if not t.is_floating_point():
            raise TypeError(f"Times must be floating point numbers in [0, 1], got dtype {t.dtype}.")
        precise = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        alpha, beta, d_alpha, d_beta = self._path(precise)
        zero = torch.zeros_like(precise)
        return Coefficients(*(value.to(t.dtype) for value in (alpha, beta, zero, d_alpha, d_beta, zero)))

    def at(self, t: torch.Tensor, x: torch.Tensor) -> Coefficients:
        """`coefficients(t)` broadcast against `x`; `t` is (B,) or a scalar, `x` is (B, …)."""
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
            raise ValueError(
                f"Times of shape {tuple(t.shape)} do not fit a batch of shape {tuple(x.shape)}: "
                f"pass one time for each sample, shape ({x.shape[0]},), or a single time."
            )
        # Times stay in their own (or a wider) precision until the coefficients are known: bfloat16 rounds 0.999 to 1.
        # Integers go on as they are, to be refused: as numbers of training steps they would give α = 1 − 999.
        wide = t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
        return self.coefficients(wide).expand_as(x)

    def interpolate(
        self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, z: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_t = α x0 + β x1 + γ z. Shapes: x0, x1, z (B, …), t (B,)."""
        c = self.at(t, x0)
        x_t = c.alpha * x0 + c.beta * x1
        return x_t if z is None else x_t + c.gamma * z

    def velocity(
        self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, z: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The conditional velocity İ_t = α' x0 + β' x1 + γ' z, the regression target of a velocity network."""
        c = self.at(t, x0)
        velocity = c.d_alpha * x0 + c.d_beta * x1
        return velocity if z is None else velocity + c.d_gamma * z

    def target(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, space: str) -> torch.Tensor:
        """What a network that predicts `space` is regressed on: İ_t, x0, x1 or −x1 / β."""
        if space == "velocity":
            return self.velocity(x0, x1, t)
        if space == "sample":
            return x0
        if space == "epsilon":
            return x1
        _check_prediction(space)
        return -x1 / self.at(t, x0).beta

    def convert(
        self,
        prediction: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        source: str,
        target: str,
    ) -> torch.Tensor:
        """Turns one prediction at (x_t, t) into another, exactly.

        With D = α β' − α' β:

            x̂0 = (β' x_t − β v) / D        x̂1 = (α v − α' x_t) / D
            v  = α' x̂0 + β' x̂1             score = −x̂1 / β

        Args:
            prediction: (B, …), the network's output.
            x_t: (B, …), its input.
            t: (B,) or scalar times in [0, 1].
            source, target: `"velocity"`, `"sample"` (x̂0), `"epsilon"` (x̂1) or `"score"`.

        Raises:
            ValueError: for an unknown kind of prediction, or shapes that do not agree.
        """
        _check_prediction(source)
        _check_prediction(target)
        if prediction.shape != x_t.shape:
            raise ValueError(
                f"The prediction has shape {tuple(prediction.shape)} and x_t has {tuple(x_t.shape)}; they must agree."
            )
        if source == target:
            return prediction
        c = self.at(t, x_t)
        if source == "velocity":
            if target == "sample":
                return (c.d_beta * x_t - c.beta * prediction) / c.determinant
            x1 = (c.alpha * prediction - c.d_alpha * x_t) / c.determinant
        elif source == "sample":
            x1 = (x_t - c.alpha * prediction) / c.beta
        else:
            x1 = prediction if source == "epsilon" else -c.beta * prediction
        if target == "epsilon":
            return x1
        if target == "score":
            return -x1 / c.beta
        x0 = prediction if source == "sample" else (x_t - c.beta * x1) / c.alpha
        return x0 if target == "sample" else c.d_alpha * x0 + c.d_beta * x1

    def one_step(
        self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, t: float, source: str
    ) -> torch.Tensor:
        """The one-step generator G(x1) = x̂0-prediction of `network` at time `t` on the input β(t) x1.

        On `linear` with t = 1 it is one Euler step, x1 − v(x1, 1) (RealUID); SiD's "initial sigma" is the time with
        that β/α (see `time_of_ratio`).

        Args:
            network: called once as `network(x_t, times)` with times of shape (B,) in float32 or wider.
            noise: x1, (B, …).
            t: the generator's time `init_time`, in (0, 1].
            source: what the network predicts.
        """
        times = torch.full(
            noise.shape[:1], t, device=noise.device, dtype=torch.promote_types(noise.dtype, torch.float32)
        )
        x_t = self.at(times, noise).beta * noise
        return self.convert(network(x_t, times).to(noise.dtype), x_t, times, source, "sample")

    def time_of_ratio(self, ratio: float) -> float:
        """The time at which β/α = `ratio` (a noise level σ of EDM or SiD), by bisection; β/α grows with t.

        Raises:
            ValueError: when the interpolant does not reach the ratio within [0, 1].
        """
        low, high = 0.0, 1.0
        end = self.coefficients(torch.tensor(1.0, dtype=torch.float64))
        if ratio <= 0 or (end.alpha > 0 and end.beta / end.alpha < ratio):
            raise ValueError(f"β/α = {ratio} is not reached by the interpolant {self.name!r} on (0, 1].")
        for _ in range(60):
            middle = 0.5 * (low + high)
            c = self.coefficients(torch.tensor(middle, dtype=torch.float64))
            low, high = (middle, high) if c.beta < ratio * c.alpha else (low, middle)
        return 0.5 * (low + high)

    def start_time(self, prediction_type: str) -> float:
        """The time at which sampling begins: 1, or β/α = 80 (EDM's largest noise level, Karras et al. 2022, table 1)
        where α(1) = 0 and the prediction says nothing about x̂0 there.
        """
        return 1.0 if self.reaches_sample(1.0, prediction_type) else self.time_of_ratio(80.0)

    def default_init_time(self, prediction_type: str) -> float:
        """Where a one-step student starts unless told otherwise: t = 1 if x̂0 follows from the prediction there,
        else β/α = 2.5 (SiD's initial sigma).
        """
        return 1.0 if self.reaches_sample(1.0, prediction_type) else self.time_of_ratio(2.5)

    def reaches_sample(self, t: float, prediction_type: str) -> bool:
        """Whether x̂0 can be had from the prediction at time t: from `epsilon` and `score` it is (x_t − β x̂1) / α."""
        alpha = self.coefficients(torch.tensor(t, dtype=torch.float64)).alpha
        return prediction_type in ("velocity", "sample") or float(alpha) > 1e-6


class LinearInterpolant(Interpolant):
    """Flow matching: α = 1 − t, β = t (Lipman et al. 2023, "Flow Matching for Generative Modeling", eq. 20)."""

    name = "linear"

    def _path(self, t):
        one = torch.ones_like(t)
        return 1 - t, t, -one, one


class TrigonometricInterpolant(Interpolant):
    """SiT's GVP: α = cos(πt/2), β = sin(πt/2) (Ma et al. 2024, "SiT", section 3.2)."""

    name = "trigonometric"

    def _path(self, t):
        half_pi = 0.5 * math.pi
        cos, sin = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return cos, sin, -half_pi * sin, half_pi * cos


class VPInterpolant(Interpolant):
    """Continuous variance-preserving diffusion: log α = −¼ t² (b1 − b0) − ½ t b0, β² = 1 − α².

    Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 33. β' is infinite at t = 0. At t = 1 α is
    only 0.0066, so that x̂0 would amplify a network's error; a student starts at β/α = 2.5, SiD's initial sigma.
    """

    name = "vp"
    singular_ends = (0.0,)

    def __init__(self, b0: float = 0.1, b1: float = 20.0):
        if not 0 < b0 < b1:
            raise ValueError(f"`vp` needs 0 < b0 < b1, got b0={b0} and b1={b1}.")
        self.b0, self.b1 = float(b0), float(b1)

    def _path(self, t):
        log_alpha = -0.25 * t**2 * (self.b1 - self.b0) - 0.5 * t * self.b0
        d_log_alpha = -0.5 * t * (self.b1 - self.b0) - 0.5 * self.b0
        alpha = torch.exp(log_alpha)
        beta = torch.sqrt(-torch.expm1(2 * log_alpha))
        return alpha, beta, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / beta

    def default_init_time(self, prediction_type: str) -> float:
        return self.time_of_ratio(2.5)


INTERPOLANTS: dict[str, type[Interpolant]] = {
    cls.name: cls for cls in (LinearInterpolant, TrigonometricInterpolant, VPInterpolant)
}


def get_interpolant(name: str, **config: Any) -> Interpolant:
    """The interpolant of that name, e.g. `get_interpolant("vp", b0=0.1, b1=20.0)`.

    Raises:
        ValueError: for an unknown name, or settings that the family does not have.
    """
    if name not in INTERPOLANTS:
        raise ValueError(f"Unknown interpolant {name!r}. Choose one of: {', '.join(INTERPOLANTS)}.")
    try:
        return INTERPOLANTS[name](**config)
    except TypeError as error:
        raise ValueError(f"The interpolant {name!r} does not take the settings {config}: {error}.") from None


def _check_prediction(kind: str) -> None:
    if kind not in PREDICTIONS:
        raise ValueError(f"Unknown prediction {kind!r}. Choose one of: {', '.join(PREDICTIONS)}.")
