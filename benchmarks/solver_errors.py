#!/usr/bin/env python
"""Error of the fixed-step ODE solvers on data whose flow is known exactly; prints a Markdown table.

    python benchmarks/solver_errors.py

Data: three independent normal numbers with means −0.5, 0.3, 1 and standard deviations 0.4, 1, 1.6. The error is the largest
over 256 starting points of the distance of a number from the exact flow of its starting point.
"""

import torch

from si_distill import StochasticInterpolantScheduler
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS

MEAN, STD = torch.tensor([[-0.5, 0.3, 1.0], [0.4, 1.0, 1.6]], dtype=torch.float64)
SOLVERS = ("euler", "ddim", "dpmpp_2m", "heun", "edm_heun")
EVALUATIONS = (15, 63)


def largest_error(interpolant: str, solver: str, evaluations: int) -> float:
    """Of the exact network, with steps for at most so many evaluations."""
    scheduler = StochasticInterpolantScheduler(interpolant=interpolant, prediction_type="sample", solver=solver)
    scheduler.set_timesteps((evaluations + 1) // 2 if scheduler.order == 2 else evaluations)
    noise = torch.randn(256, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start = scheduler.init_noise_sigma * noise
    for t in scheduler.timesteps:
        c = scheduler.interpolant.coefficients(t.double())
        x0 = MEAN + c.alpha * STD**2 / (c.alpha**2 * STD**2 + c.beta**2) * (x - c.alpha * MEAN)
        x = scheduler.step(x0, t, x).prev_sample
    c = scheduler.interpolant.coefficients(scheduler.timesteps[0].double())
    # (x − α m) / √(α² S + β²) is constant along the flow.
    exact = MEAN + STD * (start - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.beta**2).sqrt()
    return float((x - exact).abs().max())


def main() -> None:
    print("| path | evaluations |", " | ".join(f"`{solver}`" for solver in SOLVERS), "|")
    print("|" + "---|" * (2 + len(SOLVERS)))
    for interpolant in GAUSSIAN_INTERPOLANTS:
        for evaluations in EVALUATIONS:
            errors = (f"{largest_error(interpolant, solver, evaluations):.3f}" for solver in SOLVERS)
            print(f"| `{interpolant}` | {evaluations} |", " | ".join(errors), "|")


if __name__ == "__main__":
    main()
