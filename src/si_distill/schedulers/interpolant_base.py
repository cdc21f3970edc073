"""What all stochastic interpolants share: x_t, conversions between predictions and of times.

It imports only torch and its siblings: a copy travels next to the scheduler into every saved pipeline (here:
`si_distill.interpolants`).

Conventions (Albergo, Boffi & Vanden-Eijnden 2023, "Stochastic Interpolants", eq. 2.1):

    x_t = α(t) x0 + β(t) x1 + γ(t) z,    t in [0, 1],    z ~ N(0, I)

`x0` is data (t = 0), `x1` the reference (t = 1), and a dot or `d_` is the derivative in t.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .interpolant_names import PREDICTIONS, TIMESTEP_TYPES

Noise = torch.Tensor | None


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
        """The factor κ in v − İ = κ (x̂0 − x0), with x_t and what the network sees next to it held fixed.

        κ = α' − β' α / β = −D / β where γ = 0 (x1 follows x0), infinite where β = 0. On a bridge whose network sees x1 it
        is z that follows: κ = α' − γ' α / γ.
        """
        pinned = self.d_alpha - self.d_gamma * self.alpha / self.gamma
        return torch.where(self.gamma == 0, -self.determinant / self.beta, pinned)

    def expand_as(self, x: torch.Tensor) -> "Coefficients":
        """The same coefficients, shape (B,) or (), in the dtype of `x` and broadcastable against it."""
        shape = (-1, *[1] * (x.ndim - 1)) if self.alpha.ndim else ()
        return Coefficients(*(getattr(self, name).reshape(shape).to(x.dtype) for name in self.__dataclass_fields__))


class Interpolant:
    """x_t = α(t) x0 + β(t) x1 with a Gaussian reference (γ = 0); bridges override what differs (`interpolant_bridge`).

    A family sets `name` and `_path`, and keeps its constructor's arguments as attributes of the same names: its `config`.
    """

    name: ClassVar[str]
    #: Whether x1 is standard normal noise: then β/α is a noise level, and there are scores, SDEs and likelihoods.
    gaussian_reference: ClassVar[bool] = True
    #: Whether γ is not zero, so that x_t and İ need z.
    noisy: bool = False
    #: What a network on this path can predict.
    predictions: ClassVar[tuple[str, ...]] = PREDICTIONS
    #: Ends of [0, 1] at which a derivative is infinite; training times keep `t_epsilon` away from them.
    singular_ends: ClassVar[tuple[float, ...]] = ()
    #: Whether α(1) > 0 is so small against β(1) that x̂0 would amplify a network's error: students then start below t = 1.
    starts_late: ClassVar[bool] = False
    #: Solver by default, where x1 is noise: `dpmpp_2m` where β/α grows over many orders of magnitude.
    default_solver: ClassVar[str] = "euler"
    #: Key of the family's paper in `model_cards/references.bib`, for model cards.
    citation: ClassVar[str | None] = None
    #: Number K of steps that a network with discrete timesteps knows; a setting of the family `ddpm`, the others have none.
    num_train_timesteps: int | None = None
    #: Standard deviation of the data that an `edm` prediction assumes; a setting of the family `edm`.
    sigma_data: float = 0.5

    def _path(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(α, β, α', β') at the float64 times `t`."""
        raise NotImplementedError

    def _gamma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(γ, γ') at the float64 times `t`."""
        return torch.zeros_like(t), torch.zeros_like(t)

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
        wide = precise(t)
        alpha, beta, d_alpha, d_beta = self._path(wide)
        gamma, d_gamma = self._gamma(wide)
        return Coefficients(*(value.to(t.dtype) for value in (alpha, beta, gamma, d_alpha, d_beta, d_gamma)))

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
        """x_t = α x0 + β x1 + γ z. Shapes: x0, x1, z (B, …), t (B,). Raises ValueError without the z of a `noisy` path."""
        self._check_noise(z)
        c = self.at(t, x0)
        x_t = c.alpha * x0 + c.beta * x1
        return x_t if z is None else x_t + c.gamma * z

    def velocity(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, z: Noise = None) -> torch.Tensor:
        """The conditional velocity İ_t = α' x0 + β' x1 + γ' z, the regression target of a velocity network."""
        self._check_noise(z)
        c = self.at(t, x0)
        velocity = c.d_alpha * x0 + c.d_beta * x1
        return velocity if z is None else velocity + c.d_gamma * z

    def target(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, space: str, z: Noise = None) -> torch.Tensor:
        """What a network that predicts `space` is regressed on: İ_t, x0, x1, −x1 / β, α x1 − β x0 or F (see `convert`).

        Least squares on F is EDM's weighted denoising loss: ‖F̂ − F‖² = `edm_weight` · ‖x̂0 − x0‖². Only İ_t contains z.
        """
        self.check_predictions(space)
        if space == "velocity":
            return self.velocity(x0, x1, t, z)
        return self._combine(x0, x1, self.at(t, x0), space)

    def convert(
        self,
        prediction: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        source: str,
        target: str,
        x1: torch.Tensor | None = None,
        z: Noise = None,
    ) -> torch.Tensor:
        """Turns one prediction at (x_t, t) into another, exactly. With D = α β' − α' β:

            x̂0 = (β' x_t − β v) / D        x̂1 = (α v − α' x_t) / D
            v  = α' x̂0 + β' x̂1             score = −x̂1 / β

        `v_prediction` is α x̂1 − β x̂0 (Salimans & Ho 2022, appendix D), the velocity in the angle of a path with
        α² + β² = 1. On any path x̂0 = (α x_t − β v) / (α² + β²) and x̂1 = (β x_t + α v) / (α² + β²).

        `edm` is the raw output F in EDM's preconditioning (Karras et al. 2022, table 1): with x = x_t / α, σ = β / α and
        s = σ_data, x̂0 = s² / (σ² + s²) x + σ s / √(σ² + s²) F. With n = √(β² + α² s²), finite also where α = 0:

            x̂0 = (α s² x_t + β s n F) / n²        x̂1 = (β x_t − α s n F) / n²        F = (β x̂0 − α s² x̂1) / (s n)

        Args:
            prediction: (B, …), the network's output.
            x_t: (B, …), the state, not what `network_input` makes of it.
            t: (B,) or scalar times in [0, 1].
            source, target: `"velocity"`, `"sample"` (x̂0), `"epsilon"` (x̂1), `"score"`, `"v_prediction"` or
                `"edm"` (F).
            x1, z: of bridges (see `BridgeInterpolant.convert`); not read where γ = 0.

        Raises ValueError for an unknown kind of prediction, or shapes that do not agree.
        """
        self.check_predictions(source, target)
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
        if kind == "v_prediction":
            total = c.alpha**2 + c.beta**2
            return (c.alpha * x_t - c.beta * prediction) / total, (c.beta * x_t + c.alpha * prediction) / total
        x1 = prediction if kind == "epsilon" else -c.beta * prediction
        return (x_t - c.beta * x1) / c.alpha, x1

    def _combine(self, x0, x1, c, kind):
        """The prediction that (x̂0, x̂1) amount to."""
        if kind in ("sample", "epsilon"):
            return x0 if kind == "sample" else x1
        if kind == "score":
            return -x1 / c.beta
        if kind == "v_prediction":
            return c.alpha * x1 - c.beta * x0
        if kind == "edm":
            return (c.beta * x0 - c.alpha * self.sigma_data**2 * x1) / (self.sigma_data * self._edm_norm(c))
        return c.d_alpha * x0 + c.d_beta * x1

    def _edm_norm(self, c: Coefficients) -> torch.Tensor:
        """n = √(β² + α² σ_data²), the standard deviation of x_t for data of standard deviation σ_data."""
        return torch.sqrt(c.beta**2 + c.alpha**2 * self.sigma_data**2)

    def network_input(self, x_t: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """What the network is given for x_t (B, …) at t, (B,) or scalar: for `edm` c_in x = x_t / n, otherwise x_t."""
        return x_t / self._edm_norm(self.at(t, x_t)) if prediction_type == "edm" else x_t

    def network_time(self, t: torch.Tensor, timestep_type: str) -> torch.Tensor:
        """The number that a network is given for the times `t`, floating point, in their shape:

        * `time`: t itself;
        * `discrete`: k = t (K − 1), an integer in 0 … K − 1, of a network trained on the K steps of `ddpm`;
        * `log_sigma`: ¼ ln σ with σ = β/α, EDM's c_noise (Karras et al. 2022, table 1).

        Raises ValueError for an unknown kind, `discrete` on another interpolant than `ddpm`, and `log_sigma` where β/α is
        0 or infinite.
        """
        self.check_timestep_type(timestep_type)
        if timestep_type == "time":
            return t
        if timestep_type == "discrete":
            return (precise(t) * (self.num_train_timesteps - 1)).round().long()
        c = self.coefficients(t.to(torch.promote_types(t.dtype, torch.float32)))
        log_sigma = 0.25 * torch.log(c.beta / c.alpha)
        if not torch.isfinite(log_sigma).all():
            raise ValueError(
                f"timestep_type='log_sigma' gives the network ln(β/α), which is not finite at all of the times "
                f"{t.flatten()[:8].tolist()} on the interpolant {self.name!r}: keep times (`t_min`, `t_max`, `init_time`) "
                "away from that end."
            )
        return log_sigma

    def nearest_time(self, t: torch.Tensor, timestep_type: str) -> torch.Tensor:
        """The times nearest to `t` that a network knows: with `discrete` timesteps k / (K − 1), otherwise `t` itself.

        Off that grid x_t would have another noise level than the network is told.
        """
        if timestep_type != "discrete":
            return t
        return (precise(self.network_time(t, timestep_type)) / (self.num_train_timesteps - 1)).to(t.dtype)

    def check_predictions(self, *kinds: str) -> None:
        """Raises ValueError for an unknown kind of prediction, or one that means nothing on this path."""
        for kind in kinds:
            if kind not in PREDICTIONS:
                raise ValueError(f"Unknown prediction {kind!r}. Choose one of: {', '.join(PREDICTIONS)}.")
            if kind not in self.predictions:
                raise ValueError(
                    f"A {kind} prediction needs Gaussian noise as the reference, which the interpolant {self.name!r} does "
                    f"not have. Choose one of: {', '.join(self.predictions)}."
                )

    def _check_noise(self, z: Noise) -> None:
        if z is None and self.noisy:
            raise ValueError(
                f"x_t and its velocity on the interpolant {self.name!r} contain γ z: pass z, standard normal noise."
            )

    def check_timestep_type(self, timestep_type: str) -> None:
        """Raises ValueError for an unknown kind of timesteps, or one that this path does not have."""
        if timestep_type != "time" and timestep_type in TIMESTEP_TYPES and not self.gaussian_reference:
            raise ValueError(
                f"timestep_type={timestep_type!r} tells the network a noise level, which the interpolant {self.name!r} "
                "does not have: use timestep_type='time'."
            )
        if timestep_type not in TIMESTEP_TYPES:
            raise ValueError(f"`timestep_type` is {timestep_type!r}; choose one of: {', '.join(TIMESTEP_TYPES)}.")
        if timestep_type == "discrete" and self.num_train_timesteps is None:
            raise ValueError(
                f"timestep_type='discrete' needs the steps of the interpolant 'ddpm', and {self.name!r} has none: use "
                "`ddpm`, or timestep_type='time'."
            )

    def edm_weight(self, t: torch.Tensor) -> torch.Tensor:
        """EDM's weight of ‖x̂0 − x0‖², (σ² + s²) / (σ s)² = n² / (β s)² in the symbols of `convert`; shape of `t`."""
        c = self.coefficients(t)
        return (self._edm_norm(c) / (c.beta * self.sigma_data)) ** 2

    def last_step(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, source: str, x1: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where a solver's step from (x_t, t) to t = 0 ends, (B, …): the x̂0-prediction.

        A velocity on a bridge does not determine x̂0 without x1: there it is Euler's step x_t − t v, which on `linear` is
        the same.
        """
        return self.convert(prediction, x_t, t, source, "sample", x1=x1)

    def time_of_ratio(self, ratio: float) -> float:
        """The time at which β/α = `ratio` (a noise level σ of EDM or SiD); see `times_of_ratios`."""
        return float(self.times_of_ratios(torch.tensor(ratio, dtype=torch.float64)))

    def times_of_ratios(self, ratios: torch.Tensor) -> torch.Tensor:
        """The times at which β/α takes the values `ratios`, in their shape and dtype, by 256-section; β/α grows with t.

        Raises ValueError when the interpolant does not reach a ratio within [0, 1].
        """
        wanted = precise(ratios)
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

    def middle_time(self) -> float:
        """The time at which β = α."""
        return self.time_of_ratio(1.0)

    def start_time(self, prediction_type: str, timestep_type: str = "time") -> float:
        """Where sampling begins: 1, or β/α = 80 (EDM's largest σ) if nothing is known of x̂0, or no ¼ ln σ, at t = 1."""
        return 1.0 if self._can_start(1.0, prediction_type, timestep_type) else self.time_of_ratio(80.0)

    def default_init_time(self, prediction_type: str, timestep_type: str = "time") -> float:
        """Where students start by default: 1 if x̂0 follows well from the prediction there, else β/α = 2.5 (SiD).

        Networks with discrete timesteps start at the step that is nearest to it.
        """
        end = self.coefficients(torch.tensor(1.0, dtype=torch.float64))
        late = self.starts_late and end.beta > 2.5 * end.alpha
        if not late and self._can_start(1.0, prediction_type, timestep_type):
            return 1.0
        return float(self.nearest_time(torch.tensor(self.time_of_ratio(2.5), dtype=torch.float64), timestep_type))

    def _can_start(self, t: float, prediction_type: str, timestep_type: str) -> bool:
        alpha = self.coefficients(torch.tensor(t, dtype=torch.float64)).alpha
        return self.reaches_sample(t, prediction_type) and (timestep_type != "log_sigma" or float(alpha) > 1e-6)

    def reaches_sample(self, t: float, prediction_type: str) -> bool:
        """Whether x̂0 can be had from the prediction at time t: from `epsilon` and `score` it is (x_t − β x̂1) / α."""
        alpha = self.coefficients(torch.tensor(t, dtype=torch.float64)).alpha
        return prediction_type not in ("epsilon", "score") or float(alpha) > 1e-6


def precise(values: torch.Tensor) -> torch.Tensor:
    """In float64, or float32 where the device has no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
