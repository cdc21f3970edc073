"""The families of stochastic interpolants: α, β, γ and their derivatives (conventions: `interpolant_base`).

A family is a class that `register_interpolant` knows, here or outside the package; nothing else lists it.
It imports only torch: a copy travels next to the scheduler into every saved pipeline (here: `si_distill.interpolants`).
"""

import functools
import math
from typing import Any

import torch

from .interpolant_base import Interpolant
from .interpolant_bridge import BrownianBridge
from .interpolant_names import build_named

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
#: Families by name.
INTERPOLANTS: dict[str, type[Interpolant]] = {}


def register_interpolant(cls: type[Interpolant]) -> type[Interpolant]:
    """Makes a family known by its `name` to `get_interpolant`, and so to settings and schedulers; a decorator."""
    INTERPOLANTS[cls.name] = cls
    return cls


@register_interpolant
class LinearInterpolant(Interpolant):
    """Flow matching: α = 1 − t, β = t (Lipman et al. 2023, "Flow Matching for Generative Modeling", eq. 20)."""

    name = "linear"
    citation = "lipman2023flow"

    def _path(self, t):
        one = torch.ones_like(t)
        return 1 - t, t, -one, one


@register_interpolant
class TrigonometricInterpolant(Interpolant):
    """SiT's GVP: α = cos(πt/2), β = sin(πt/2) (Ma et al. 2024, "SiT", section 3.2)."""

    name = "trigonometric"
    citation = "albergo2023stochastic"

    def _path(self, t):
        half_pi = 0.5 * math.pi
        cos, sin = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return cos, sin, -half_pi * sin, half_pi * cos


@register_interpolant
class VPInterpolant(Interpolant):
    """Continuous variance-preserving diffusion: log α = −¼ t² (b1 − b0) − ½ t b0, β² = 1 − α².

    Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 33. β' is infinite at t = 0;
    α(1) is only 0.0066, so that a student starts at β/α = 2.5.
    """

    name = "vp"
    citation = "song2021score"
    singular_ends = (0.0,)
    starts_late = True
    default_solver = "dpmpp_2m"

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


@register_interpolant
class DDPMInterpolant(Interpolant):
    """Discrete variance-preserving diffusion: α² = ᾱ_k of a Diffusers beta schedule at k = t (K − 1), β² = 1 − α².

    Between the K steps log(α²/β²) is linear in t. Derivatives are the slopes of the pieces, at a step that of the piece
    which begins there. β(0) = √(1 − ᾱ_0) is 0.01 by default, not 0: t = 0 is the first noise level, all derivatives are
    finite and no end is singular. α(1) is 0.0064 by default: a student starts at β/α = 2.5, as on `vp`.

    The settings are those of diffusers' `DDPMScheduler`; `squaredcos_cap_v2` uses neither end of the betas.
    """

    name = "ddpm"
    citation = "ho2020ddpm"
    starts_late = True
    default_solver = "dpmpp_2m"

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


@register_interpolant
class EDMInterpolant(Interpolant):
    """Variance-exploding diffusion in EDM's times: α = 1, β = σ(t) = (σ_min^(1/ρ) + t (σ_max^(1/ρ) − σ_min^(1/ρ)))^ρ.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 5; t = 0 is σ_min, not 0,
    and no end is singular. A student starts at σ = 2.5 (SiD). The conditional velocity σ' x1 does not contain the sample.
    `sigma_data` is the standard deviation of the data that an `edm` prediction assumes.
    """

    name = "edm"
    citation = "karras2022edm"
    starts_late = True
    default_solver = "dpmpp_2m"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5):
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.rho, self.sigma_data = float(rho), float(sigma_data)
        if not (0 < sigma_min < sigma_max and rho > 0 and sigma_data > 0):
            raise ValueError(f"`edm` needs 0 < sigma_min < sigma_max, rho > 0 and sigma_data > 0, got {self.config}.")

    def _path(self, t):
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root = low + t * (high - low)
        return torch.ones_like(t), root**self.rho, torch.zeros_like(t), self.rho * (high - low) * root ** (self.rho - 1)


register_interpolant(BrownianBridge)

#: Those whose reference is Gaussian noise: noise levels, scores, SDEs and likelihoods are defined on them.
GAUSSIAN_INTERPOLANTS = tuple(name for name, cls in INTERPOLANTS.items() if cls.gaussian_reference)


def get_interpolant(name: str, **config: Any) -> Interpolant:
    """The interpolant of that name, e.g. `get_interpolant("vp", b0=0.1, b1=20.0)` or `get_interpolant("bridge", scale=1.0)`.

    Raises ValueError for an unknown name, or settings that the family does not have.
    """
    return build_named(INTERPOLANTS, "interpolant", name, config)


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
