"""The probability-flow ODE in a form without singular ends, and its adaptive solution.

A copy of this file travels next to `pipeline.py` into every saved pipeline of a teacher: it imports only torch, NumPy and,
when it is used, SciPy.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: The flow ends where β/α has this value (or at t = 0, where that is larger), and the x̂0-prediction takes over. On data
#: of standard deviation s the relative error of that is β² / (2 α² s²), below the tolerances in use.
END_RATIO = 1e-3


class ProbabilityFlow:
    """The flow of y = x_t / n, n = √(α² + β²), in the angle φ = arctan(β/α):

        y = cos φ x̂0 + sin φ x̂1          dy/dφ = u = cos φ x̂1 − sin φ x̂0          x̂0 = cos φ y − sin φ u

    where n u is the `v_prediction` of Salimans & Ho 2022 ("Progressive Distillation for Fast Sampling", appendix D).
    Every interpolant has the same ODE in these variables (the "TrigFlow" of Lu & Song 2024, "Simplifying, Stabilizing and
    Scaling Continuous-Time Consistency Models", section 3). Neither α = 0 nor an infinite α' or β' is singular in them and
    the state keeps about the size of the data, so that one tolerance serves all.

    Args:
        field: the network's `Field`; it is given times of shape (), float64.
        condition: what the network is told.
        start_time: the largest time, where the noise is.
    """

    def __init__(self, field: Any, condition: Any, start_time: float):
        self.field, self.condition, self.interpolant = field, condition, field.interpolant
        self.noise_angle = self._angle(start_time)
        self.data_angle = max(self._angle(0.0), math.atan(END_RATIO))

    @property
    def evaluations(self) -> int:
        """Evaluations of the network so far (see `Field`)."""
        return self.field.evaluations

    def _angle(self, t: float) -> float:
        at = self.interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
        return math.atan2(float(at.beta), float(at.alpha))

    def time(self, angle: float) -> torch.Tensor:
        """The time t of an angle φ, shape (), float64."""
        return torch.tensor(self.interpolant.time_of_ratio(math.tan(angle)), dtype=torch.float64)

    def velocity(self, y: torch.Tensor, angle: float) -> torch.Tensor:
        """u at (y, φ), in the shape and dtype of y (B, …); one evaluation of the network."""
        t = self.time(angle)
        at = self.interpolant.coefficients(t)
        n = float((at.alpha**2 + at.beta**2).sqrt())
        x = n * y
        u = self.field(x, t, self.condition, "v_prediction") / n
        if not torch.isfinite(u).all():
            raise ValueError(f"The network's prediction at t = {float(t):.6g} is not finite.")
        return u

    def sample(self, x: torch.Tensor, rtol: float, atol: float, on_step: Callable[[], object]) -> torch.Tensor:
        """x0 (B, …) from the noisy state `x` at the start time, by Dormand and Prince's pair of orders 5 and 4.

        The step is chosen for the batch as a whole: an image depends on the others in its batch within the tolerance.

        Args:
            rtol, atol: tolerances of the error of y in each step.
            on_step: called after each accepted step.
        """
        at = self.interpolant.coefficients(self.time(self.noise_angle))
        y = x / float((at.alpha**2 + at.beta**2).sqrt())

        def slope(angle: float, flat: np.ndarray) -> np.ndarray:
            return as_array(self.velocity(torch.as_tensor(flat).to(x).view_as(x), angle))

        flat, u = solve_adaptively(slope, self.noise_angle, self.data_angle, as_array(y), rtol, atol, on_step)
        x0 = math.cos(self.data_angle) * flat - math.sin(self.data_angle) * u
        return torch.as_tensor(x0).to(x).view_as(x)


def as_array(x: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor, flat, in float64: what SciPy integrates."""
    return x.detach().double().cpu().numpy().ravel()


def solve_adaptively(
    slope: Callable[[float, np.ndarray], np.ndarray],
    start: float,
    end: float,
    y: np.ndarray,
    rtol: float,
    atol: float,
    on_step: Callable[[], object],
) -> tuple[np.ndarray, np.ndarray]:
    """Integrates dy/ds = slope(s, y) from s = `start` to `end` with SciPy's `RK45`; gives y and dy/ds at the end.

    Raises:
        ImportError: without SciPy.
        ValueError: for tolerances that are not positive numbers.
        RuntimeError: when no step is small enough.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be a positive number, e.g. 1e-5, got {value}.")
    try:
        from scipy.integrate import RK45
    except ImportError as error:
        raise ImportError("The adaptive solver `dopri5` needs SciPy: pip install scipy.") from error
    solver = RK45(slope, start, y, end, rtol=rtol, atol=atol)
    while solver.status == "running":
        message = solver.step()
        if solver.status == "failed":
            raise RuntimeError(f"The adaptive solver stopped at {solver.t:.6g} of {start:.6g} to {end:.6g}: {message}")
        on_step()
    return solver.y, solver.f
