"""Every family of interpolants, and what perfect networks would say on it: shared by the tests of the paths."""

import pytest
import torch

from si_distill.interpolants import Interpolant

FAMILIES = {
    "linear": ("linear", {}),
    "trigonometric": ("trigonometric", {}),
    "vp": ("vp", {}),
    "vp-other": ("vp", dict(b0=0.5, b1=8.0)),
    "ddpm": ("ddpm", {}),
    "ddpm-scaled": ("ddpm", dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")),
    "ddpm-cosine": ("ddpm", dict(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")),
    "edm": ("edm", {}),
    "edm-other": ("edm", dict(sigma_min=0.01, sigma_max=20.0, rho=5.0, sigma_data=1.3)),
}
PRESERVING = [family for family in FAMILIES.values() if family[0] not in ("linear", "edm")]
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)

every_family = pytest.mark.parametrize(("name", "config"), FAMILIES.values(), ids=FAMILIES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth() -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and x1 at 25 times, as small images."""
    return noise(0, len(TIMES), 2, 3, 3), noise(1, len(TIMES), 2, 3, 3)


def exact_predictions(it: Interpolant, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """What perfect networks say when (x0, x1) is known."""
    alpha, beta = it.at(t, x0).alpha, it.at(t, x0).beta
    # EDM's definition (Karras et al. 2022, table 1): F = (x0 - c_skip x) / c_out.
    x, (c_skip, c_out, _) = it.interpolate(x0, x1, t) / it.at(t, x0).alpha, edm_preconditioning(it, t)
    edm = (x0 - c_skip * x) / c_out
    return {
        "velocity": it.velocity(x0, x1, t),
        "sample": x0,
        "epsilon": x1,
        "score": -x1 / beta,
        "v_prediction": alpha * x1 - beta * x0,
        "edm": edm,
    }


def edm_preconditioning(it: Interpolant, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(c_skip, c_out, c_in) of Karras et al. 2022, table 1, at the noise level of each of the times (B,)."""
    c = it.coefficients(t)
    sigma, data = (c.beta / c.alpha).reshape(-1, 1, 1, 1), it.sigma_data
    total = (sigma**2 + data**2).sqrt()
    return data**2 / total**2, sigma * data / total, 1 / total
