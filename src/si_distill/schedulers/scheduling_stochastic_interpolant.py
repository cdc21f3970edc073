"""ODE sampling on a stochastic interpolant, and the one-step map of a distilled student, as a Diffusers scheduler.

This file, `interpolant_base.py` and `interpolant_paths.py` travel into the scheduler folder of every saved pipeline: they
import only torch and diffusers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .interpolant_base import PREDICTIONS
from .interpolant_paths import get_interpolant

SOLVERS = ("euler", "heun", "ddim")


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
    Solves dx/dt = v(x, t) from t = `init_time` (noise) to t = 0 (data) on an interpolant x_t = α x0 + β x1.

    Times are real numbers in [0, 1]; `network_time` says what the network is given for them. The last step returns the
    x̂0-prediction: on `linear` that is exactly the Euler step to 0, elsewhere it avoids derivatives that are infinite at
    t = 0. With one step the scheduler is therefore the one-step map G(x1) = x̂0(β(t) x1, t) at t = `init_time`.

    Args:
        num_train_timesteps (`int`): what `len(scheduler)` reports; times are continuous.
        interpolant (`str`): `"linear"`, `"trigonometric"`, `"vp"`, `"ddpm"` or `"edm"`.
        interpolant_kwargs (`dict`, *optional*): settings of the interpolant, e.g. `{"b0": 0.1, "b1": 20.0}`.
        prediction_type (`str`): what the network predicts: `"velocity"`, `"sample"`, `"epsilon"`, `"score"`,
            `"v_prediction"`, or `"edm"`, the raw output in EDM's preconditioning (see `Interpolant.convert`).
        solver (`str`): `"euler"` (one evaluation a step), `"heun"` (second order, 2 N − 1 evaluations for N steps), or
            `"ddim"` (one evaluation a step, x = α x̂0 + β x̂1 at its end; Song et al. 2021, "Denoising Diffusion Implicit
            Models", eq. 12 with σ = 0), which is exact where x̂0 and x̂1 do not change, and Euler on `linear`.
        init_time (`float`): where sampling starts, in (0, 1]. A student keeps here the time it was trained at.
        timestep_type (`str`): what the network is given for a time t: `"time"` (t itself), `"discrete"` (the step t (K − 1)
            of `ddpm`; all times are then moved to the nearest step) or `"log_sigma"` (¼ ln(β/α), EDM's c_noise).

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
        solver: str = "euler",
        init_time: float = 1.0,
        timestep_type: str = "time",
    ):
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"`prediction_type` is {prediction_type!r}; choose one of: {', '.join(PREDICTIONS)}.")
        if solver not in SOLVERS:
            raise ValueError(f"`solver` is {solver!r}; choose one of: {', '.join(SOLVERS)}.")
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
        self.order = 2 if solver == "heun" else 1
        self.num_inference_steps: int | None = None
        self.set_timesteps(min(num_train_timesteps, self._max_steps))
        self.num_inference_steps = None

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
            num_inference_steps (`int`): number of solver steps, at least 1, equally spaced from `init_time` to 0.
            device: where `timesteps` live.
            timesteps: instead of a number, the start of each step: falling times in (0, 1], without the final 0.

        Times of a network with discrete timesteps are moved to its nearest steps.

        Raises:
            ValueError: when neither or both are given, or a value is out of range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either `num_inference_steps` or `timesteps`, not both and not neither.")
        if timesteps is None:
            if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
                raise ValueError(
                    f"`num_inference_steps` must be an integer of at least 1, got {num_inference_steps!r}."
                )
            if num_inference_steps > self._max_steps:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but a network with discrete timesteps knows only "
                    f"{self._max_steps} steps between `init_time` {self.config.init_time:g} and 0."
                )
            times = self._known(torch.linspace(self.config.init_time, 0.0, num_inference_steps + 1))
        else:
            starts = self._known(torch.as_tensor(timesteps, dtype=torch.float32).flatten().cpu())
            if not len(starts) or not (0 < starts[-1] and starts[0] <= 1 and bool((starts.diff() < 0).all())):
                raise ValueError(f"`timesteps` must fall strictly and lie in (0, 1], got {starts.tolist()}.")
            times = torch.cat([starts, torch.zeros(1)])
        self.num_inference_steps = len(times) - 1
        self._times = times.to(device)
        # Heun evaluates the start and the end of each step; its last step, to t = 0, needs the start only.
        self.timesteps = (self._times[:-1].repeat_interleave(2)[:-1] if self.order == 2 else self._times[:-1]).clone()
        if self.order == 2:
            self.timesteps[1::2] = self._times[1:-1]
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._predictor: tuple[torch.Tensor, torch.Tensor] | None = None

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
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> StochasticInterpolantSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One evaluation's step towards t = 0. Differentiable in `model_output` and `sample`.

        Args:
            model_output (`torch.Tensor` of shape (B, C, H, W)): the network's prediction at (`sample`, `timestep`), of
                the input that `scale_model_input` gives.
            timestep: the element of `timesteps` that the network saw.
            sample (`torch.Tensor` of shape (B, C, H, W)): x_t.
            generator: unused, the ODE draws no noise; part of every scheduler's signature.
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
        t = self.timesteps[self._step_index]
        kind = self.config.prediction_type
        x0 = self.interpolant.convert(output, x, t, kind, "sample")

        if self._step_index == len(self.timesteps) - 1:
            previous = x0
        elif self.config.solver == "ddim":
            x1 = self.interpolant.convert(output, x, t, kind, "epsilon")
            previous = self.interpolant.interpolate(x0, x1, self._times[self._step_index + 1])
        else:
            velocity = self.interpolant.convert(output, x, t, kind, "velocity")
            step = self._step_index // self.order
            width = self._times[step + 1] - self._times[step]
            if self._predictor is not None:
                start, first_velocity = self._predictor
                previous = start + 0.5 * width * (first_velocity + velocity)
                self._predictor = None
            else:
                previous = x + width * velocity
                self._predictor = (x, velocity) if self.order == 2 else None
        self._step_index += 1
        previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return (previous, x0)
        return StochasticInterpolantSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

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
