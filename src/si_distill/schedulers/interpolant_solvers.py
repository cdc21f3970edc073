"""The samplers' names: which there are, on which paths, and which of a scheduler's settings go together.

It imports nothing but Python: a copy travels next to the scheduler into every saved pipeline.
"""

import itertools
import math
from typing import Any

SOLVERS = ("euler", "heun", "ddim", "edm_heun", "dpmpp_2m", "sde_euler", "sde_heun", "dopri5", "posterior", "renoise")
#: Solvers by which a student of several steps goes from one level to the next.
STUDENT_STEPPINGS = ("renoise", "ddim")
#: Solvers of a bridge: the others need the noise level β/α or the score of a Gaussian reference.
BRIDGE_SOLVERS = ("posterior", "euler", "heun")
DIFFUSION_FORMS = ("sigma", "linear", "sbdm", "constant", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler")


def check_settings(
    solver: str | None,
    init_time: float,
    diffusion_form: str,
    diffusion_norm: float,
    last_step: str | None,
    rtol: float,
    atol: float,
    first_step_size: float,
) -> None:
    """Raises ValueError for a setting of the scheduler that is out of range by itself."""
    for name, value, choices in (
        ("solver", solver, (*SOLVERS, None)),
        ("diffusion_form", diffusion_form, DIFFUSION_FORMS),
        ("last_step", last_step, (*LAST_STEPS, None)),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` is {value!r}; choose one of: {', '.join(map(str, choices))}.")
    for name, number in (("diffusion_norm", diffusion_norm), ("rtol", rtol), ("atol", atol)):
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number > 0):
            raise ValueError(f"`{name}` must be a positive number, got {number!r}.")
    if not 0 < init_time <= 1:
        raise ValueError(f"`init_time` must lie in (0, 1], got {init_time}.")
    if not 0 < first_step_size < 1:
        raise ValueError(f"`first_step_size` must lie in (0, 1), got {first_step_size}.")


def check_levels(student_steps: list[int] | None, timestep_shift: float) -> None:
    """Raises ValueError for numbers of steps that are none, or a shift that is not positive."""
    whole = isinstance(student_steps, (list, tuple)) and all(type(count) is int for count in student_steps)
    if student_steps is not None and not (whole and student_steps and 1 <= student_steps[0]):
        raise ValueError(
            f"`student_steps` holds numbers of steps of at least 1, e.g. [1, 2, 4], got {student_steps!r}."
        )
    if student_steps is not None and any(a >= b for a, b in itertools.pairwise(student_steps)):
        raise ValueError(f"`student_steps` must rise, each number once, got {student_steps!r}.")
    if not (isinstance(timestep_shift, (int, float)) and 0 < timestep_shift < math.inf):
        raise ValueError(f"`timestep_shift` must be a positive number (1 is none), got {timestep_shift!r}.")


def check_path(interpolant: Any, prediction_type: str, init_time: float, noise_channels: int) -> None:
    """Raises ValueError for a prediction, a start or a student's noise that the path does not have."""
    interpolant.check_predictions(prediction_type)
    check_determinant(interpolant, init_time)
    if not interpolant.reaches_sample(init_time, prediction_type):
        raise ValueError(
            f"A {prediction_type} prediction says nothing about the sample at `init_time` {init_time}, where the "
            f"interpolant {interpolant.name!r} has α = 0; start below, e.g. at "
            f"{interpolant.start_time(prediction_type):.4f}."
        )
    bridge = not interpolant.gaussian_reference
    if bridge and init_time != 1:
        raise ValueError(f"On a bridge sampling starts at its reference, `init_time` 1, got {init_time}.")
    if not isinstance(noise_channels, int) or noise_channels < 0 or (noise_channels and not bridge):
        raise ValueError(
            f"`noise_channels` is {noise_channels!r}; it is a number of channels, at least 0, of a bridge's student. On "
            "other interpolants the state itself is noise: leave it at 0."
        )


def check_conventions(timestep_type: str, timestep_scale: float, prediction_sign: int, reversed_time: bool) -> None:
    """Raises ValueError for times or a sign that no network is given or has."""
    if not (isinstance(timestep_scale, (int, float)) and 0 < timestep_scale < math.inf):
        raise ValueError(f"`timestep_scale` must be a positive number, got {timestep_scale!r}.")
    if timestep_type != "time" and (reversed_time or timestep_scale != 1):
        raise ValueError(
            f"`reversed_time` and `timestep_scale` are of networks that are given t itself, and this one has timestep_type="
            f"{timestep_type!r}: leave them out."
        )
    if prediction_sign not in (1, -1):
        raise ValueError(f"`prediction_sign` must be 1 or -1, got {prediction_sign!r}.")


def check_determinant(interpolant: Any, *times: float) -> None:
    """Raises ValueError for a path that is not finite, whose velocity says nothing about x0 at an end, inside or at one of
    these times, or whose derivatives are not those of its values.
    """
    import torch  # not above: settings that name the solvers are read before torch is loaded

    grid = torch.linspace(0, 1, 65, dtype=torch.float64)
    grid = torch.cat([grid[[0, -1]], torch.tensor(times, dtype=torch.float64), grid[1:-1]])
    path = interpolant.coefficients(grid)
    for t, determinant, *values in zip(grid, path.determinant, path.alpha, path.beta, path.gamma, strict=True):
        if not all(math.isfinite(value) for value in values):
            raise ValueError(
                f"The interpolant {interpolant.name!r} has values of α, β or γ at t = {t:g} that are not finite."
            )
        if not determinant >= 1e-12:
            raise ValueError(
                f"The interpolant {interpolant.name!r} has α β' − α' β = {determinant:.1g} at t = {t:g}, where its velocity "
                "says nothing about the sample: one step from there would divide by 0. Take a path whose β/α keeps growing."
            )
    step = 1e-4  # of central differences, between the grid's points: there a table of betas has its kinks
    middle = (grid[2 + len(times) : -1] + 0.37 / 64).clamp(max=1 - step)
    path, after, before = (interpolant.coefficients(middle + shift) for shift in (0, step, -step))
    for name in ("alpha", "beta", "gamma"):
        slope = (getattr(after, name) - getattr(before, name)) / (2 * step)
        given = getattr(path, f"d_{name}")
        wrong = (slope - given).abs() > 0.1 * (slope.abs() + getattr(path, name).abs()) + 1e-6
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"The interpolant {interpolant.name!r} gives {name}' = {given[at]:.4g} at t = {middle[at]:.4g}, where "
                f"{name} grows by {slope[at]:.4g}: `_path` or `_gamma` does not return the derivative."
            )


def default_solver(interpolant: Any, prediction_type: str) -> str:
    """The family's own; of a bridge `posterior` if it can be had, otherwise `euler`."""
    if interpolant.gaussian_reference:
        return interpolant.default_solver
    return "posterior" if prediction_type == "sample" and hasattr(interpolant, "posterior") else "euler"


def check_solver(interpolant: Any, solver: str, prediction_type: str) -> None:
    """Raises ValueError for a solver that the path, or the prediction on it, does not have."""
    name = interpolant.name
    if interpolant.gaussian_reference:
        if solver == "posterior":
            raise ValueError(
                f"The solver 'posterior' is for bridges, and {name!r} is none; its like here is 'sde_euler'."
            )
        return
    known = [each for each in BRIDGE_SOLVERS if each != "posterior" or hasattr(interpolant, "posterior")]
    if solver not in known:
        raise ValueError(
            f"The solver {solver!r} is not defined on the interpolant {name!r}; choose one of: {', '.join(known)}."
        )
    if prediction_type != "sample" and solver == "posterior":
        raise ValueError(
            f"The solver {solver!r} on the interpolant {name!r} needs a network that predicts the sample, and this one "
            f"predicts {prediction_type}; choose 'euler' or 'heun'."
        )


def check_reference(interpolant: Any, prediction_type: str, given: bool, needed: bool) -> None:
    """Raises ValueError when a step of a bridge lacks its reference, or is given one that it cannot use."""
    if needed and not given:
        raise ValueError(
            "This solver of a bridge whose network predicts the sample needs the pair's `reference`; without pairs use "
            "'posterior'."
        )
    if given and interpolant.noisy and prediction_type != "sample":
        raise ValueError(
            "A `reference` was given, but the network of this bridge predicts the velocity, which is infinite there: "
            "networks of paired bridges predict the sample, those of unpaired ones do not see the reference."
        )


def evaluated_ends(steps: int, order: int, first: int = 0) -> list[tuple[int, int]]:
    """(step, 0 for its start or 1 for its end) of each evaluation of the network.

    Order 2 evaluates both ends of a step, but of the last one, to t = 0, and of the `first` ones only the start.
    """
    both, one = (0, 1), (0,)
    return [(step, end) for step in range(steps) for end in (both if order == 2 and first <= step < steps - 1 else one)]
