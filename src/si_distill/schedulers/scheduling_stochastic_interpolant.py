"""ODE and SDE sampling on a stochastic interpolant, and the one-step map of a distilled student, as a Diffusers scheduler.

This file, `interpolant_base.py`, `interpolant_paths.py` and `interpolant_steps.py` travel into the scheduler folder of every
saved pipeline: they import only torch and diffusers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .interpolant_base import PREDICTIONS
from .interpolant_paths import get_interpolant
from .interpolant_steps import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    Diffusion,
    Evaluation,
    Move,
    multistep,
    noise_step,
    velocity_step,
)

SOLVERS = ("euler", "heun", "ddim", "edm_heun", "dpmpp_2m", "sde_euler", "sde_heun", "dopri5")
#: Paths whose β/α grows over many orders of magnitude, on which `dpmpp_2m` is the default.
DIFFUSION_PATHS = ("vp", "ddpm", "edm")


@dataclass
class StochasticInterpolantSchedulerOutput(BaseOutput):
    """
    Output of `StochasticInterpolantScheduler.step`.

    Args:
        prev_sample (`torch.Tensor` of shape (B, C, H, W)): x at the next, smaller time.
        pred_original_sample (`torch.Tensor` of shape (B, C, H, W)): the x̂0-prediction of this evaluation.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class StochasticInterpolantScheduler(SchedulerMixin, ConfigMixin):
    """
    Solves dx/dt = v(x, t), or an SDE with the same marginals, from t = `init_time` (noise) to t = 0 (data) on an
    interpolant x_t = α x0 + β x1.

    Times are real numbers in [0, 1]; `network_time` says what the network is given for them. The last step of the ODE's
    solvers returns the x̂0-prediction: on `linear` that is exactly the Euler step to 0, elsewhere it avoids derivatives that
    are infinite at t = 0. With one step the scheduler is therefore the one-step map G(x1) = x̂0(β(t) x1, t) at
    t = `init_time`.

    | solver | evaluations for N steps | what it is |
    |---|---|---|
    | `euler`, `heun` | N, 2 N − 1 | first and second order in t, on the velocity |
    | `ddim`, `edm_heun` | N, 2 N − 1 | first and second order in σ = β/α, on the noise x̂1: DDIM, EDM's Heun |
    | `dpmpp_2m` | N | DPM-Solver++(2M), second order in ln(α/β) from two evaluations |
    | `sde_euler`, `sde_heun` | N, 2 N − 1 | Euler–Maruyama and stochastic Heun for the reverse-time SDE |
    | `dopri5` | as the tolerances need | adaptive; the ODE in an angle, solved by the pipeline |

    Args:
        num_train_timesteps (`int`): what `len(scheduler)` reports; times are continuous.
        interpolant (`str`): `"linear"`, `"trigonometric"`, `"vp"`, `"ddpm"` or `"edm"`.
        interpolant_kwargs (`dict`, *optional*): settings of the interpolant, e.g. `{"b0": 0.1, "b1": 20.0}`.
        prediction_type (`str`): what the network predicts: `"velocity"`, `"sample"`, `"epsilon"`, `"score"`,
            `"v_prediction"`, or `"edm"`, the raw output in EDM's preconditioning (see `Interpolant.convert`).
        solver (`str`, *optional*): one of the table; None is `"dpmpp_2m"` on `vp`, `ddpm` and `edm`, otherwise `"euler"`.
        init_time (`float`): where sampling starts, in (0, 1]. A student keeps here the time it was trained at.
        timestep_type (`str`): what the network is given for a time t: `"time"` (t itself), `"discrete"` (the step t (K − 1)
            of `ddpm`; all times are then moved to the nearest step) or `"log_sigma"` (¼ ln(β/α), EDM's c_noise).
        diffusion_form (`str`): d(t) in the SDE dx = [v − d score] dt + √(2 d) dW̄: `"sigma"` β, `"linear"` t, `"sbdm"`
            β D/α, `"constant"`, `"decreasing"` or `"increasing-decreasing"` (see `Diffusion`).
        diffusion_norm (`float`): what d is multiplied with.
        last_step (`str`, *optional*): the SDE's last step, from t = `last_step_size` to 0, without noise: `"mean"` of the
            SDE's step, `"tweedie"` the x̂0-prediction, `"euler"` the ODE's step. None: steps with noise down to t = 0.
        last_step_size (`float`): the last step's size in t.
        rtol, atol (`float`): tolerances of `"dopri5"` on a state of about unit variance.

    Raises:
        ValueError: for a setting outside these ranges.
    """

    _compatibles: list = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        interpolant: str = "linear",
        interpolant_kwargs: dict[str, Any] | None = None,
        prediction_type: str = "velocity",
        solver: str | None = None,
        init_time: float = 1.0,
        timestep_type: str = "time",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.04,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ):
        for name, value, choices in (
            ("prediction_type", prediction_type, PREDICTIONS),
            ("solver", solver, (*SOLVERS, None)),
            ("diffusion_form", diffusion_form, DIFFUSION_FORMS),
            ("last_step", last_step, (*LAST_STEPS, None)),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}; choose one of: {', '.join(map(str, choices))}.")
        for name, value in (("diffusion_norm", diffusion_norm), ("rtol", rtol), ("atol", atol)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
        if not 0 < init_time <= 1:
            raise ValueError(f"`init_time` must lie in (0, 1], got {init_time}.")
        self.interpolant = get_interpolant(interpolant, **(interpolant_kwargs or {}))
        if not self.interpolant.reaches_sample(init_time, prediction_type):
            raise ValueError(
                f"A {prediction_type} prediction says nothing about the sample at `init_time` {init_time}, where the "
                f"interpolant {interpolant!r} has α = 0; start below, e.g. at "
                f"{self.interpolant.start_time(prediction_type):.4f}."
            )
        self.network_time(torch.tensor(init_time))  # must be a number, and one that the interpolant has
        self.solver = solver or ("dpmpp_2m" if interpolant in DIFFUSION_PATHS else "euler")
        self.register_to_config(solver=self.solver)  # a saved folder names it
        self.order = 2 if self.solver in ("heun", "edm_heun", "sde_heun") else 1
        self.diffusion = Diffusion(diffusion_form, diffusion_norm) if self.solver.startswith("sde_") else None
        if self.diffusion and not 0 < last_step_size < self._start_time:
            raise ValueError(
                f"`last_step_size` must lie between 0 and the start of sampling, {self._start_time:.4g}, got "
                f"{last_step_size}."
            )
        if self.solver == "dopri5":
            if timestep_type == "discrete":
                raise ValueError(
                    "The solver 'dopri5' needs a network that knows all times, and this one has discrete timesteps; choose "
                    "e.g. 'dpmpp_2m'."
                )
            self._set_times(torch.tensor([init_time, 0.0]))
        else:
            # What a scheduler shows before `set_timesteps`; no run.
            self.set_timesteps(max(min(num_train_timesteps, self._max_steps), 2 if self.diffusion else 0))
        self.num_inference_steps: int | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def init_noise_sigma(self) -> float:
        """β at the first time: what standard normal noise is multiplied with before the first step."""
        return float(self.interpolant.coefficients(self._times[0]).beta)

    @property
    def step_index(self) -> int | None:
        """Index of the current evaluation in `timesteps`; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index at which sampling begins; set by pipelines that start in the middle."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """
        What the network is given for the state `sample` at `timestep`: the state itself, scaled to unit variance for
        `prediction_type="edm"` (see `Interpolant.network_input`). `step` takes the state, not this.

        Args:
            sample (`torch.Tensor` of shape (B, C, H, W)): x_t.
            timestep: the time, a number or shape () or (B,); may be left out where nothing is scaled.
        """
        if timestep is None:
            if self.config.prediction_type == "edm":
                raise ValueError(
                    "`scale_model_input` was given no `timestep`, and an edm prediction's scale depends on it."
                )
            return sample
        t = torch.as_tensor(timestep, device=sample.device)
        return self.interpolant.network_input(sample, t, self.config.prediction_type)

    def network_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the network is given for the times `timestep`, in their shape (see `Interpolant.network_time`)."""
        return self.interpolant.network_time(timestep, self.config.timestep_type)

    @property
    def _max_steps(self) -> float:
        """Steps from `init_time` to 0 that a network with discrete timesteps can tell apart."""
        if self.config.timestep_type != "discrete":
            return float("inf")
        return max(1, int(self.network_time(torch.tensor(self.config.init_time))))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
    ) -> None:
        """
        Sets the times of the evaluations.

        Args:
            num_inference_steps (`int`): number N of solver steps, at least 1, equally spaced from `init_time` to 0. For an
                SDE at least 2: N − 1 steps to `last_step_size` and the last one. With `diffusion_form="sbdm"` it starts
                where β/α = 80 if α is 0 at `init_time`.
            device: where `timesteps` live.
            timesteps: instead of a number, the start of each step: falling times in (0, 1], without the final 0, which may
                be given where the path begins with noise (`ddpm`, `edm`).

        Times of a network with discrete timesteps are moved to its nearest steps.

        Raises:
            ValueError: when neither or both are given, or a value is out of range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either `num_inference_steps` or `timesteps`, not both and not neither.")
        if self.solver == "dopri5":
            raise ValueError(
                "The solver 'dopri5' chooses its own times as it goes: sample with `InterpolantPipeline`, or choose another "
                "solver."
            )
        if timesteps is None:
            least = 2 if self.diffusion else 1
            if not isinstance(num_inference_steps, int) or num_inference_steps < least:
                raise ValueError(
                    f"`num_inference_steps` must be an integer of at least {least}"
                    f"{' for an SDE' if self.diffusion else ''}, got {num_inference_steps!r}."
                )
            if num_inference_steps > self._max_steps:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but a network with discrete timesteps knows only "
                    f"{self._max_steps} steps between `init_time` {self.config.init_time:g} and 0."
                )
            if self.diffusion and self.config.last_step is not None:
                times = torch.linspace(self._start_time, self.config.last_step_size, num_inference_steps)
                times = torch.cat([times, torch.zeros(1)])
            else:
                times = torch.linspace(self._start_time, 0.0, num_inference_steps + 1)
            self._set_times(self._known(times), device)
            return
        starts = self._known(torch.as_tensor(timesteps, dtype=torch.float32).flatten().cpu())
        least = (
            0.0 if float(self.interpolant.coefficients(torch.zeros(())).beta) > 0 else torch.finfo(starts.dtype).tiny
        )
        if not len(starts) or not (least <= starts[-1] and starts[0] <= 1 and bool((starts.diff() < 0).all())):
            raise ValueError(f"`timesteps` must fall strictly and lie in (0, 1], got {starts.tolist()}.")
        if self.diffusion and starts[0] > self._start_time:
            raise ValueError(
                f"`timesteps` start at {float(starts[0]):g}, where the SDE's diffusion is infinite; start at most at "
                f"{self._start_time:.4f}."
            )
        self._set_times(torch.cat([starts, torch.zeros(1)]), device)

    @property
    def _start_time(self) -> float:
        """`init_time`, or below it where the diffusion there is infinite."""
        alpha = self.interpolant.coefficients(torch.tensor(self.config.init_time, dtype=torch.float64)).alpha
        infinite = self.diffusion and self.diffusion.form == "sbdm" and float(alpha) < 1e-6
        return self.interpolant.time_of_ratio(80.0) if infinite else self.config.init_time

    def _set_times(self, times: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Takes the ends of the steps (N + 1,), the last of them 0."""
        self.num_inference_steps = len(times) - 1
        self._times = times.to(device)
        # Order 2 evaluates the start and the end of each step; its last step, to t = 0, needs the start only.
        self.timesteps = (self._times[:-1].repeat_interleave(2)[:-1] if self.order == 2 else self._times[:-1]).clone()
        if self.order == 2:
            self.timesteps[1::2] = self._times[1:-1]
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._predicted: tuple[Evaluation, Move] | None = None
        self._before: Evaluation | None = None

    def _known(self, times: torch.Tensor) -> torch.Tensor:
        return self.interpolant.nearest_time(times, self.config.timestep_type)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Index in `timesteps` of a time, at the start of a step."""
        value = torch.as_tensor(timestep, dtype=self.timesteps.dtype, device=self.timesteps.device)
        found = (self.timesteps[:: self.order] == value).nonzero()
        if not len(found):
            raise ValueError(
                f"The time {float(value):g} is none of the scheduler's; pass the elements of `scheduler.timesteps`, "
                "which run from 1 to 0 and are not multiplied by 1000."
            )
        return int(found[0]) * self.order

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> StochasticInterpolantSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One evaluation's step towards t = 0. Differentiable in `model_output` and `sample`.

        Args:
            model_output (`torch.Tensor` of shape (B, C, H, W)): the network's prediction at (`sample`, `timestep`), of
                the input that `scale_model_input` gives.
            timestep: the element of `timesteps` that the network saw.
            sample (`torch.Tensor` of shape (B, C, H, W)): x_t.
            generator (`torch.Generator` or a list of B of them, *optional*): of an SDE's noise.
            variance_noise (`torch.Tensor` of shape (B, C, H, W), *optional*): standard normal noise to use instead.
            return_dict (`bool`): whether to return an output object or a tuple.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps(num_inference_steps)` before the first `step`.")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} evaluations of the {self.num_inference_steps} steps are done; call "
                "`set_timesteps` again for another run."
            )
        # Steps are small differences: they are added in float32 and the result goes back to the caller's dtype.
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        output = model_output.to(x.dtype)
        now = Evaluation(self.interpolant, output, x, self.timesteps[self._step_index], self.config.prediction_type)
        to = self._times[self._step_index // self.order + 1]
        if self._predicted is not None:
            start, move = self._predicted
            previous, self._predicted = move.corrected(start, now), None
        elif self._step_index < len(self.timesteps) - 1:
            previous = self._step(now, to, generator, variance_noise)
        elif not self.diffusion:
            previous = now.predicts("sample")
        elif self.config.last_step is None:
            previous = self.diffusion.step(now, to, self._noise(x, generator, variance_noise), corrected=False).x
        else:
            previous = self.diffusion.last_step(now, to, self.config.last_step)
        x0 = now.predicts("sample")
        self._step_index += 1
        previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return (previous, x0)
        return StochasticInterpolantSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def _step(self, now, to, generator, variance_noise) -> torch.Tensor:
        """x at the time `to` by the solver's first-order or multistep rule; keeps what its second evaluation corrects."""
        if self.solver == "dpmpp_2m":
            previous, self._before = multistep(now, self._before, to), now
            return previous
        if self.diffusion:
            noise = self._noise(now.x, generator, variance_noise)
            move = self.diffusion.step(now, to, noise, corrected=self.order == 2)
        else:
            move = (noise_step if self.solver in ("ddim", "edm_heun") else velocity_step)(now, to)
        self._predicted = (now, move) if self.order == 2 else None
        return move.x

    def _noise(self, x, generator, variance_noise) -> torch.Tensor:
        if variance_noise is None:
            # In float32 whatever the dtype, so that all variants of a network see the same numbers.
            variance_noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return variance_noise.to(x)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α x0 + β x1 for data `original_samples`, noise x1 and times (B,) in [0, 1]."""
        return self.interpolant.interpolate(original_samples, noise, timesteps)

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise` with the argument order of the flow-matching schedulers."""
        if noise is None:
            raise ValueError("`scale_noise` needs the noise x1.")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """İ_t = α' x0 + β' x1, the target of a velocity network."""
        return self.interpolant.velocity(sample, noise, timesteps)
