"""Stochastic interpolants: coefficients, their derivatives, and conversions between predictions.

It imports only torch: a copy travels beside the scheduler into every saved pipeline (here: `si_distill.interpolants`).

Conventions (Albergo, Boffi & Vanden-Eijnden 2023, "Stochastic Interpolants", eq. 2.1):

    x_t = α(t) x0 + β(t) x1 + γ(t) z,    t in [0, 1],    z ~ N(0, I)

`x0` is data (t = 0), `x1` the reference (t = 1), and a dot or `d_` is the derivative in t.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

PREDICTIONS = ("velocity", "sample", "epsilon", "score", "edm")
Noise = torch.Tensor | None
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


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
        """κ = α' − β' α / β = −D / β, the factor in v − İ = κ (x̂0 − x0). Infinite where β = 0."""
        return -self.determinant / self.beta

    def expand_as(self, x: torch.Tensor) -> "Coefficients":
        """The same coefficients, shape (B,) or (), in the dtype of `x` and broadcastable against it."""
        shape = (-1, *[1] * (x.ndim - 1)) if self.alpha.ndim else ()
        return Coefficients(*(getattr(self, name).reshape(shape).to(x.dtype) for name in self.__dataclass_fields__))


class Interpolant:
    """x_t = α(t) x0 + β(t) x1 with a Gaussian reference (γ = 0).

    A family sets `name` and `_path`, and keeps its constructor's arguments as attributes of the same names: its `config`.
    """

    name: ClassVar[str]
    #: Ends of [0, 1] at which a derivative is infinite; training times keep `t_epsilon` away from them.
    singular_ends: ClassVar[tuple[float, ...]] = ()
    #: Whether α(1) > 0 is so small against β(1) that x̂0 would amplify a network's error: students then start below t = 1.
    starts_late: ClassVar[bool] = False
    #: Standard deviation of the data that an `edm` prediction assumes; a setting of the family `edm`.
    sigma_data: float = 0.5

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
        """α, β, γ and their derivatives, in the dtype and shape of the floating point times `t` in [0, 1].

        They are computed in float64 (float32 where the device has no float64) and cast last: near the ends they are
        differences of nearly equal numbers.
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
                f"Times of shape {tuple(t.shape)} do not fit a batch of shape {tuple(x.shape)}: pass one time for each "
                f"sample, shape ({x.shape[0]},), or a single time."
            )
        # Times stay in their own (or a wider) precision until the coefficients are known: bfloat16 rounds 0.999 to 1.
        # Integers go on as they are, to be refused: as numbers of training steps they would give α = 1 − 999.
        wide = t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
        return self.coefficients(wide).expand_as(x)

    def interpolate(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, z: Noise = None) -> torch.Tensor:
        """x_t = α x0 + β x1 + γ z. Shapes: x0, x1, z (B, …), t (B,)."""
        c = self.at(t, x0)
        x_t = c.alpha * x0 + c.beta * x1
        return x_t if z is None else x_t + c.gamma * z

    def velocity(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, z: Noise = None) -> torch.Tensor:
        """The conditional velocity İ_t = α' x0 + β' x1 + γ' z, the regression target of a velocity network."""
        c = self.at(t, x0)
        velocity = c.d_alpha * x0 + c.d_beta * x1
        return velocity if z is None else velocity + c.d_gamma * z

    def target(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, space: str) -> torch.Tensor:
        """What a network that predicts `space` is regressed on: İ_t, x0, x1, −x1 / β or F (see `convert`).

        Least squares on F is EDM's weighted denoising loss: ‖F̂ − F‖² = `edm_weight` · ‖x̂0 − x0‖².
        """
        _check_predictions(space)
        return self._combine(x0, x1, self.at(t, x0), space)

    def convert(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, source: str, target: str
    ) -> torch.Tensor:
        """Turns one prediction at (x_t, t) into another, exactly. With D = α β' − α' β:

            x̂0 = (β' x_t − β v) / D        x̂1 = (α v − α' x_t) / D
            v  = α' x̂0 + β' x̂1             score = −x̂1 / β

        `edm` is the raw output F in EDM's preconditioning (Karras et al. 2022, table 1): with x = x_t / α, σ = β / α and
        s = σ_data, x̂0 = s² / (σ² + s²) x + σ s / √(σ² + s²) F. With n = √(β² + α² s²), finite also where α = 0:

            x̂0 = (α s² x_t + β s n F) / n²        x̂1 = (β x_t − α s n F) / n²        F = (β x̂0 − α s² x̂1) / (s n)

        Args:
            prediction: (B, …), the network's output.
            x_t: (B, …), the state, not what `network_input` makes of it.
            t: (B,) or scalar times in [0, 1].
            source, target: `"velocity"`, `"sample"` (x̂0), `"epsilon"` (x̂1), `"score"` or `"edm"` (F).

        Raises ValueError for an unknown kind of prediction, or shapes that do not agree.
        """
        _check_predictions(source, target)
        if prediction.shape != x_t.shape:
            shapes = f"{tuple(prediction.shape)} and x_t has {tuple(x_t.shape)}"
            raise ValueError(f"The prediction has shape {shapes}; they must agree.")
        if source == target:
            return prediction
        c = self.at(t, x_t)
        return self._combine(*self._split(prediction, x_t, c, source), c, target)

    def _split(self, prediction, x_t, c, kind):
        """(x̂0, x̂1) of a prediction; one of them is not finite where the prediction does not determine it."""
        if kind == "velocity":
            x0 = (c.d_beta * x_t - c.beta * prediction) / c.determinant
            return x0, (c.alpha * prediction - c.d_alpha * x_t) / c.determinant
        if kind == "sample":
            return prediction, (x_t - c.alpha * prediction) / c.beta
        if kind == "edm":
            n = self._edm_norm(c)
            unit, scaled = x_t / n, self.sigma_data * prediction
            return (c.alpha * self.sigma_data**2 * unit + c.beta * scaled) / n, (c.beta * unit - c.alpha * scaled) / n
        x1 = prediction if kind == "epsilon" else -c.beta * prediction
        return (x_t - c.beta * x1) / c.alpha, x1

    def _combine(self, x0, x1, c, kind):
        """The prediction that (x̂0, x̂1) amount to."""
        if kind in ("sample", "epsilon"):
            return x0 if kind == "sample" else x1
        if kind == "score":
            return -x1 / c.beta
        if kind == "edm":
            return (c.beta * x0 - c.alpha * self.sigma_data**2 * x1) / (self.sigma_data * self._edm_norm(c))
        return c.d_alpha * x0 + c.d_beta * x1

    def _edm_norm(self, c: Coefficients) -> torch.Tensor:
        """n = √(β² + α² σ_data²), the standard deviation of x_t for data of standard deviation σ_data."""
        return torch.sqrt(c.beta**2 + c.alpha**2 * self.sigma_data**2)

    def network_input(self, x_t: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """What the network is given for x_t (B, …) at t, (B,) or scalar: for `edm` c_in x = x_t / n, otherwise x_t."""
        return x_t / self._edm_norm(self.at(t, x_t)) if prediction_type == "edm" else x_t

    def edm_weight(self, t: torch.Tensor) -> torch.Tensor:
        """EDM's weight of ‖x̂0 − x0‖², (σ² + s²) / (σ s)² = n² / (β s)² in the symbols of `convert`; shape of `t`."""
        c = self.coefficients(t)
        return (self._edm_norm(c) / (c.beta * self.sigma_data)) ** 2

    def one_step(
        self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, t: float, source: str
    ) -> torch.Tensor:
        """The one-step generator G(x1) = x̂0-prediction of `network` at time `t` on the input β(t) x1.

        On `linear` with t = 1 it is one Euler step, x1 − v(x1, 1) (RealUID); SiD's "initial sigma" is the β/α at t.

        Args:
            network: called once as `network(network_input, times)` with times of shape (B,) in float32 or wider.
            noise: x1, (B, …).
            t: the generator's time `init_time`, in (0, 1].
            source: what the network predicts.
        """
        wide = torch.promote_types(noise.dtype, torch.float32)
        times = torch.full(noise.shape[:1], t, device=noise.device, dtype=wide)
        x_t = self.at(times, noise).beta * noise
        prediction = network(self.network_input(x_t, times, source), times).to(noise.dtype)
        return self.convert(prediction, x_t, times, source, "sample")

    def time_of_ratio(self, ratio: float) -> float:
        """The time at which β/α = `ratio` (a noise level σ of EDM or SiD); see `times_of_ratios`."""
        return float(self.times_of_ratios(torch.tensor(ratio, dtype=torch.float64)))

    def times_of_ratios(self, ratios: torch.Tensor) -> torch.Tensor:
        """The times at which β/α takes the values `ratios`, in their shape and dtype, by 256-section; β/α grows with t.

        Raises ValueError when the interpolant does not reach a ratio within [0, 1].
        """
        wanted = ratios.to(torch.float32 if ratios.device.type == "mps" else torch.float64)
        grid = torch.linspace(0, 1, 257, dtype=wanted.dtype, device=wanted.device)
        c = self.coefficients(grid[[0, -1]])
        first, last = c.beta / c.alpha
        # Relative room of 1e-6: float32 rounding carries a ratio that was computed at an end past it.
        reached = (wanted > 0) & (wanted * (1 + 1e-6) >= first) & (wanted <= last * (1 + 1e-6))
        if not reached.all():
            wrong, ends = float(wanted[~reached][0]), f"{float(first):.4g} to {float(last):.4g}"
            raise ValueError(f"β/α = {wrong} is not reached by the interpolant {self.name!r}: on (0, 1] it is {ends}.")
        low, width = torch.zeros_like(wanted), 1.0
        for _ in range(7):  # 256⁷ > 2⁵³
            c = self.coefficients((low.unsqueeze(-1) + width * grid).clamp(max=1))
            below = (c.beta < wanted.unsqueeze(-1) * c.alpha).sum(-1)
            width /= 256
            low = low + width * (below - 1).clamp(0, 255)
        return (low + 0.5 * width).to(ratios.dtype)

    def start_time(self, prediction_type: str) -> float:
        """Where sampling begins: 1, or β/α = 80 (EDM's largest σ) if the prediction says nothing of x̂0 at t = 1."""
        return 1.0 if self.reaches_sample(1.0, prediction_type) else self.time_of_ratio(80.0)

    def default_init_time(self, prediction_type: str) -> float:
        """Where students start by default: 1 if x̂0 follows well from the prediction there, else β/α = 2.5 (SiD)."""
        end = self.coefficients(torch.tensor(1.0, dtype=torch.float64))
        late = self.starts_late and end.beta > 2.5 * end.alpha
        return self.time_of_ratio(2.5) if late or not self.reaches_sample(1.0, prediction_type) else 1.0

    def reaches_sample(self, t: float, prediction_type: str) -> bool:
        """Whether x̂0 can be had from the prediction at time t: from `epsilon` and `score` it is (x_t − β x̂1) / α."""
        alpha = self.coefficients(torch.tensor(t, dtype=torch.float64)).alpha
        return prediction_type in ("velocity", "sample", "edm") or float(alpha) > 1e-6


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

    Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 33. β' is infinite at t = 0;
    α(1) is only 0.0066, so that a student starts at β/α = 2.5.
    """

    name = "vp"
    singular_ends = (0.0,)
    starts_late = True

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


class DDPMInterpolant(Interpolant):
    """Discrete variance-preserving diffusion: α² = ᾱ_k of a Diffusers beta schedule at k = t (K − 1), β² = 1 − α².

    Between the K steps log(α²/β²) is linear in t. Derivatives are the slopes of the pieces, at a step that of the piece
    which begins there. β(0) = √(1 − ᾱ_0) is 0.01 by default, not 0: t = 0 is the first noise level, all derivatives are
    finite and no end is singular. α(1) is 0.0064 by default: a student starts at β/α = 2.5, as on `vp`.

    The settings are those of diffusers' `DDPMScheduler`; `squaredcos_cap_v2` uses neither end of the betas.
    """

    name = "ddpm"
    starts_late = True

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, beta_schedule="linear"
    ):
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"Unknown `beta_schedule` {beta_schedule!r}. Choose one of: {', '.join(BETA_SCHEDULES)}.")
        if num_train_timesteps not in range(2, 1_000_001) or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                "`ddpm` needs a whole num_train_timesteps >= 2 and 0 < beta_start <= beta_end < 1, got "
                f"num_train_timesteps={num_train_timesteps}, beta_start={beta_start} and beta_end={beta_end}."
            )
        self.num_train_timesteps, self.beta_schedule = int(num_train_timesteps), beta_schedule
        self.beta_start, self.beta_end = float(beta_start), float(beta_end)

    def _path(self, t):
        table = _log_snr_table(**self.config, device=t.device, dtype=t.dtype)
        position = t * (len(table) - 1)
        k = position.detach().floor().long().clamp(0, len(table) - 2)
        slope = table[k + 1] - table[k]
        log_snr = table[k] + (position - k) * slope
        alpha, beta = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        half = 0.5 * (len(table) - 1) * slope
        return alpha, beta, half * alpha * beta**2, -half * alpha**2 * beta


class EDMInterpolant(Interpolant):
    """Variance-exploding diffusion in EDM's times: α = 1, β = σ(t) = (σ_min^(1/ρ) + t (σ_max^(1/ρ) − σ_min^(1/ρ)))^ρ.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 5; t = 0 is σ_min, not 0,
    and no end is singular. A student starts at σ = 2.5 (SiD). The conditional velocity σ' x1 does not contain the sample.
    `sigma_data` is the standard deviation of the data that an `edm` prediction assumes.
    """

    name = "edm"
    starts_late = True

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5):
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.rho, self.sigma_data = float(rho), float(sigma_data)
        if not (0 < sigma_min < sigma_max and rho > 0 and sigma_data > 0):
            raise ValueError(f"`edm` needs 0 < sigma_min < sigma_max, rho > 0 and sigma_data > 0, got {self.config}.")

    def _path(self, t):
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root = low + t * (high - low)
        return torch.ones_like(t), root**self.rho, torch.zeros_like(t), self.rho * (high - low) * root ** (self.rho - 1)


INTERPOLANTS: dict[str, type[Interpolant]] = {
    cls.name: cls
    for cls in (LinearInterpolant, TrigonometricInterpolant, VPInterpolant, DDPMInterpolant, EDMInterpolant)
}


def get_interpolant(name: str, **config: Any) -> Interpolant:
    """The interpolant of that name, e.g. `get_interpolant("vp", b0=0.1, b1=20.0)`.

    Raises ValueError for an unknown name, or settings that the family does not have.
    """
    if name not in INTERPOLANTS:
        raise ValueError(f"Unknown interpolant {name!r}. Choose one of: {', '.join(INTERPOLANTS)}.")
    try:
        return INTERPOLANTS[name](**config)
    except TypeError as error:
        raise ValueError(f"The interpolant {name!r} does not take the settings {config}: {error}.") from None


def _check_predictions(*kinds: str) -> None:
    for kind in kinds:
        if kind not in PREDICTIONS:
            raise ValueError(f"Unknown prediction {kind!r}. Choose one of: {', '.join(PREDICTIONS)}.")


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table made under inference mode could not be used in training later
def _log_snr_table(num_train_timesteps, beta_start, beta_end, beta_schedule, device, dtype) -> torch.Tensor:
    """log(ᾱ_k / (1 − ᾱ_k)), (K,). ᾱ is computed in float32 as in diffusers' `DDPMScheduler`, to be the same numbers."""
    steps, kind = num_train_timesteps, dict(dtype=torch.float32, device="cpu")
    if beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, **kind)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, **kind) ** 2
    else:
        bars = [math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(steps + 1)]
        betas = torch.tensor([min(1 - bars[k + 1] / bars[k], 0.999) for k in range(steps)], **kind)
    bar = torch.cumprod(1 - betas, 0).double()
    return (torch.log(bar) - torch.log1p(-bar)).to(device, dtype)
