#!/usr/bin/env python
"""Error of the fixed-step solvers on data whose flow or law is known exactly; prints two Markdown tables.

    python benchmarks/solver_errors.py

Data: three independent normal numbers with means −0.5, 0.3, 1 and standard deviations 0.4, 1, 1.6. The error is the largest
over 256 starting points of the distance of a number from the exact flow of its starting point.

Pairs, for bridges: x0 given x1 has those standard deviations, and the error is the largest one of the standard deviation of
what a solver makes of one x1 (its mean is exact: all steps are exact on the mean's path).
"""

import torch
from bench_tools import markdown_table

from si_distill import StochasticInterpolantScheduler
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS

MEAN, STD = torch.tensor([[-0.5, 0.3, 1.0], [0.4, 1.0, 1.6]], dtype=torch.float64)
SOLVERS = ("euler", "ddim", "dpmpp_2m", "heun", "edm_heun")
EVALUATIONS = (15, 63)
BRIDGE_SOLVERS, SCALES = ("posterior", "euler", "heun"), (0.3, 1.0, 2.0)


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


def bridge_error(scale: float, solver: str, evaluations: int) -> float:
    """Of the exact network; each row of the state carries one source of noise, and they add up in squares."""
    scheduler = StochasticInterpolantScheduler(
        interpolant="bridge", interpolant_kwargs={"scale": scale}, prediction_type="sample", solver=solver
    )
    # On pairs Heun's first step has one evaluation: 2 N − 2 in all.
    scheduler.set_timesteps((evaluations + 2) // 2 if scheduler.order == 2 else evaluations)
    x = x1 = torch.zeros(len(scheduler.timesteps), 3, dtype=torch.float64)
    for row, t in enumerate(scheduler.timesteps):
        c = scheduler.interpolant.coefficients(t.double())
        variance = c.alpha**2 * STD**2 + c.gamma**2
        x0 = MEAN + c.alpha * STD**2 * (x - c.alpha * MEAN) / variance if t < 1 else MEAN.expand_as(x)
        noise = torch.zeros_like(x)
        noise[row] = 1.0
        x = scheduler.step(x0, t, x, variance_noise=noise, reference=x1).prev_sample
    return float(((x - MEAN).square().sum(0).sqrt() - STD).abs().max())


def main() -> None:
    for title, error, paths, solvers in (
        ("path", largest_error, {f"`{name}`": name for name in GAUSSIAN_INTERPOLANTS}, SOLVERS),
        ("bridge of scale", bridge_error, {f"{scale:g}": scale for scale in SCALES}, BRIDGE_SOLVERS),
    ):
        rows = [
            [label, str(evaluations), *(f"{error(path, solver, evaluations):.3f}" for solver in solvers)]
            for label, path in paths.items()
            for evaluations in EVALUATIONS
        ]
        print(markdown_table([title, "evaluations", *(f"`{solver}`" for solver in solvers)], rows), end="\n\n")


if __name__ == "__main__":
    main()
