"""ODE and SDE sampling on a stochastic interpolant, and the one-step map of a distilled student, as a Diffusers scheduler.

This file and its siblings `interpolant_{base,bridge,forward,paths,solvers,steps}.py` travel into the scheduler folder of
every saved pipeline: they import only torch and diffusers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .interpolant_base import Interpolant  # noqa: F401 - a helper's import: what travels is what is named here
from .interpolant_bridge import BridgeInterpolant  # noqa: F401 - as above
from .interpolant_forward import InterpolantForwardMixin
from .interpolant_names import PREDICTIONS  # noqa: F401 - as above
from .interpolant_paths import get_interpolant
from .interpolant_solvers import (
    SOLVERS,
    check_conventions,
    check_levels,
    check_path,
    check_reference,
    check_settings,
    check_solver,
    default_solver,
    evaluated_ends,
)
from .interpolant_steps import (
    Diffusion,
    Evaluation,
    Move,
    bridge_angle,
    first_bridge_step,
    multistep,
    noise_step,
    pinned_step,
    posterior_step,
    renoise_step,
    velocity_step,
)

#: More steps than anybody takes: they are listed before the first one.
MOST_STEPS = 100_000

__all__ = ["SOLVERS", "StochasticInterpolantScheduler", "StochasticInterpolantSchedulerOutput"]


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


class StochasticInterpolantScheduler(InterpolantForwardMixin, SchedulerMixin, ConfigMixin):
    """
    Solves dx/dt = v(x, t), or an SDE with the same marginals, from t = `init_time` (noise, or a bridge's reference) to t = 0
    (data) on an interpolant x_t = α x0 + β x1 + γ z.

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
    | `posterior` | N | Brownian motion between x_t and x̂0 (a bridge with noise; I²SB) |
    | `renoise` | N | fresh noise on x̂0: α_s x̂0 + β_s ε (students of several steps, consistency models) |

    Bridges have `posterior`, `euler` and `heun`. A PAIRED bridge's network predicts the sample and `step` is given the
    `reference` x1. Its ODE (first and second order in α/γ on x̂0, exact where that is constant) takes the first of its N
    steps, to t = 1 − `first_step_size`, with noise: from x1 alone it would give one sample only. `heun` evaluates 2 N − 2
    times there. An unpaired bridge is sampled by the `posterior` from x̂0, or by its ODE in t from the velocity. Steps
    are equal in the angle arcsin √t, in which γ is smooth.

    Args:
        num_train_timesteps (`int`): what `len(scheduler)` reports; times are continuous.
        interpolant (`str`): a registered family, e.g. `"linear"`, `"vp"`, `"edm"` or `"bridge"`.
        interpolant_kwargs (`dict`, *optional*): settings of the interpolant, e.g. `{"b0": 0.1, "b1": 20.0}`.
        prediction_type (`str`): what the network predicts: `"velocity"`, `"sample"`, `"epsilon"`, `"score"`,
            `"v_prediction"`, or `"edm"`, the raw output in EDM's preconditioning (see `Interpolant.convert`).
        solver (`str`, *optional*): one of the table; None is `"dpmpp_2m"` on `vp`, `ddpm` and `edm`, `"posterior"` on
            `bridge` if the network predicts the sample, otherwise `"euler"`.
        init_time (`float`): where sampling starts, in (0, 1]. A student keeps here the time it was trained at.
            1 on `bridge`.
        timestep_type (`str`): what the network is given for a time t: `"time"` (t itself), `"discrete"` (the step t (K − 1)
            of `ddpm`; all times are then moved to the nearest step) or `"log_sigma"` (¼ ln(β/α), EDM's c_noise).
        diffusion_form (`str`): d(t) in the SDE dx = [v − d score] dt + √(2 d) dW̄: `"sigma"` β, `"linear"` t, `"sbdm"`
            β D/α, `"constant"`, `"decreasing"` or `"increasing-decreasing"` (see `Diffusion`).
        diffusion_norm (`float`): what d is multiplied with.
        last_step (`str`, *optional*): the SDE's last step, from t = `last_step_size` to 0, without noise: `"mean"` of the
            SDE's step, `"tweedie"` the x̂0-prediction, `"euler"` the ODE's step. None: steps with noise down to t = 0.
        last_step_size (`float`): the last step's size in t.
        rtol, atol (`float`): tolerances of `"dopri5"` on a state of about unit variance.
        noise_channels (`int`): of a bridge's one-step student: channels of standard normal noise that its network sees
            after those of the reference. 0 is a deterministic map.
        first_step_size (`float`): size in t of the first step of a paired bridge's ODE, in (0, 1).
        timestep_scale (`float`): what t is multiplied with for the network; 1000 for many text-to-image models.
        reversed_time (`bool`): whether the network is given 1 − t: for networks trained with data at 1, such as SiT's.
        student_steps (`list[int]`, *optional*): rising numbers of steps that a student was trained for; its pipeline takes
            no others. None is a teacher, or a student of one step.
        timestep_shift (`float`): s in t ↦ s t / (1 + (s − 1) t), which moves equal steps towards noise (s > 1) as in SD3
            (Esser et al. 2024, eq. 23); t is relative to `init_time`. Not for bridges with noise.
        prediction_sign (`int`): 1, or -1 for a network that predicts minus `prediction_type`: a velocity that points to the
            data.

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
        noise_channels: int = 0,
        first_step_size: float = 1e-3,
        timestep_scale: float = 1.0,
        reversed_time: bool = False,
        prediction_sign: int = 1,
        student_steps: list[int] | None = None,
        timestep_shift: float = 1.0,
    ):
        check_settings(solver, init_time, diffusion_form, diffusion_norm, last_step, rtol, atol, first_step_size)
        check_conventions(timestep_type, timestep_scale, prediction_sign, reversed_time)
        check_levels(student_steps, timestep_shift)
        self.interpolant = get_interpolant(interpolant, **(interpolant_kwargs or {}))
        check_path(self.interpolant, prediction_type, init_time, noise_channels)
        if timestep_shift != 1 and self.interpolant.noisy:
            raise ValueError(
                "`timestep_shift` is for paths from noise; a bridge's steps are equal in an angle: leave it at 1."
            )
        self.network_time(torch.tensor(init_time))  # must be a number, and one that the interpolant has
        self.solver = solver or default_solver(self.interpolant, prediction_type)
        check_solver(self.interpolant, self.solver, prediction_type)
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
            self.set_timesteps(max(min(num_train_timesteps, self._max_steps, 1000), 2 if self.diffusion else 0))
        self.num_inference_steps: int | None = None

    @property
    def _pinned(self) -> bool:
        """Whether the ODE is that of a paired bridge, with its noise in the first step."""
        return self.interpolant.noisy and self.config.prediction_type == "sample" and self.solver != "posterior"

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
            num_inference_steps (`int`): number N of solver steps, at least 1, equally spaced from `init_time` to 0 (before
                `timestep_shift`). For an SDE at least 2: N − 1 steps to `last_step_size` and the last one; with
                `diffusion_form="sbdm"` it starts where β/α = 80 if α is 0 at `init_time`.
            device: where `timesteps` live.
            timesteps: instead of a number, the start of each step: falling times in (0, 1], without the final 0, which may
                be given where the path begins with noise (`ddpm`, `edm`). On a bridge the first is 1.

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
            if type(num_inference_steps) is not int or num_inference_steps < least:
                raise ValueError(
                    f"`num_inference_steps` must be an integer of at least {least}"
                    f"{' for an SDE' if self.diffusion else ''}, got {num_inference_steps!r}."
                )
            if num_inference_steps > MOST_STEPS:
                raise ValueError(f"`num_inference_steps` must be at most {MOST_STEPS:,}, got {num_inference_steps:,}.")
            if num_inference_steps > self._max_steps:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but a network with discrete timesteps knows only "
                    f"{self._max_steps} steps between `init_time` {self.config.init_time:g} and 0."
                )
            if self.diffusion and self.config.last_step is not None:
                times = torch.linspace(self._start_time, self.config.last_step_size, num_inference_steps)
                times = torch.cat([times, torch.zeros(1)])
            else:
                times = self._equal_steps(num_inference_steps)
            self._set_times(self._known(times), device)
            return
        starts = self._known(torch.as_tensor(timesteps, dtype=torch.float32).flatten().cpu())
        least = (
            0.0 if float(self.interpolant.coefficients(torch.zeros(())).beta) > 0 else torch.finfo(starts.dtype).tiny
        )
        if not len(starts) or not (least <= starts[-1] and starts[0] <= 1 and bool((starts.diff() < 0).all())):
            raise ValueError(f"`timesteps` must fall strictly and lie in (0, 1], got {starts.tolist()}.")
        if starts[0] != 1 and not self.interpolant.gaussian_reference:
            raise ValueError(f"On a bridge `timesteps` start at 1, at its reference, got {starts.tolist()}.")
        if self.diffusion and starts[0] > self._start_time:
            raise ValueError(
                f"`timesteps` start at {float(starts[0]):g}, where the SDE's diffusion is infinite; start at most at "
                f"{self._start_time:.4f}."
            )
        self._set_times(torch.cat([starts, torch.zeros(1)]), device)

    def _equal_steps(self, count: int) -> torch.Tensor:
        """Ends of `count` steps to 0, (count + 1,): equal in t, on a bridge with noise in the angle arcsin √t."""
        if not self.interpolant.noisy:
            shift = self.config.timestep_shift
            if shift == 1:
                return torch.linspace(self._start_time, 0.0, count + 1)
            t = torch.linspace(1.0, 0.0, count + 1)
            return self._start_time * shift * t / (1 + (shift - 1) * t)
        first = [1.0] if self._pinned and count > 1 else []
        start = torch.tensor(1 - self.config.first_step_size if first else 1.0, dtype=torch.float64)
        angles = torch.linspace(float(bridge_angle(start)), 0.0, count + 1 - len(first), dtype=torch.float64)
        return torch.cat([torch.tensor(first), torch.sin(angles).square().float()])

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
        evaluated = evaluated_ends(self.num_inference_steps, self.order, first=int(self._pinned))
        self._steps, self._ends = ([part[i] for part in evaluated] for i in (0, 1))
        self.timesteps = self._times[[step + end for step, end in evaluated]]
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._predicted: tuple[Evaluation, Move] | None = None
        self._before: Evaluation | None = None

    def _known(self, times: torch.Tensor) -> torch.Tensor:
        return self.interpolant.nearest_time(times, self.config.timestep_type)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Index in `timesteps` of a time, at the start of a step."""
        value = torch.as_tensor(timestep, dtype=self.timesteps.dtype, device=self.timesteps.device)
        at_start = torch.tensor(self._ends, device=value.device) == 0
        found = ((self.timesteps == value) & at_start).nonzero()
        if not len(found):
            raise ValueError(
                f"The time {float(value):g} is none of the scheduler's; pass the elements of `scheduler.timesteps`, "
                "which run from 1 to 0 and are not multiplied by 1000."
            )
        return int(found[0])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        reference: torch.Tensor | None = None,
    ) -> StochasticInterpolantSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One evaluation's step towards t = 0. Differentiable in `model_output` and `sample`.

        Args:
            model_output (`torch.Tensor` of shape (B, C, H, W)): the network's prediction at (`sample`, `timestep`), of
                the input that `scale_model_input` gives, as [`~InterpolantForwardMixin.signed`] makes it.
            timestep: the element of `timesteps` that the network saw.
            sample (`torch.Tensor` of shape (B, C, H, W)): x_t.
            generator (`torch.Generator` or a list of B of them, *optional*): of the noise of an SDE or a bridge.
            variance_noise (`torch.Tensor` of shape (B, C, H, W), *optional*): standard normal noise to use instead.
            return_dict (`bool`): whether to return an output object or a tuple.
            reference (`torch.Tensor` of shape (B, C, H, W), *optional*): x1 of a paired bridge, whose network saw it too.

        Raises:
            ValueError: before `set_timesteps`, after the last step, for a time that is none of `timesteps`, or a bridge
                whose prediction needs the reference, or must not have one.
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
        x1 = None if reference is None else reference.to(x)
        check_reference(
            self.interpolant,
            self.config.prediction_type,
            x1 is not None,
            needed=self._pinned and self.num_inference_steps > 1,
        )
        now = Evaluation(self.interpolant, output, x, self.timesteps[self._step_index], self.config.prediction_type, x1)
        to = self._times[self._steps[self._step_index] + 1]
        if self._predicted is not None:
            start, move = self._predicted
            previous, self._predicted = move.corrected(start, now), None
        elif self._step_index < len(self.timesteps) - 1:
            previous = self._step(now, to, generator, variance_noise)
        elif not self.diffusion:
            previous = now.last_step()
        elif self.config.last_step is None:
            previous = self.diffusion.step(now, to, self._noise(x, generator, variance_noise), corrected=False).x
        else:
            previous = self.diffusion.last_step(now, to, self.config.last_step)
        x0 = now.last_step()
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
        if self.solver == "posterior":
            return posterior_step(now, to, self._noise(now.x, generator, variance_noise))
        if self.solver == "renoise":
            return renoise_step(now, to, self._noise(now.x, generator, variance_noise))
        if self._pinned and float(now.at.gamma) == 0:
            return first_bridge_step(now, to, self._noise(now.x, generator, variance_noise))
        if self.diffusion:
            noise = self._noise(now.x, generator, variance_noise)
            move = self.diffusion.step(now, to, noise, corrected=self.order == 2)
        elif self._pinned:
            move = pinned_step(now, to)
        else:
            move = (noise_step if self.solver in ("ddim", "edm_heun") else velocity_step)(now, to)
        self._predicted = (now, move) if self.order == 2 else None
        return move.x

    def _noise(self, x, generator, variance_noise) -> torch.Tensor:
        if variance_noise is None:
            # In float32 whatever the dtype, so that all variants of a network see the same numbers.
            variance_noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return variance_noise.to(x)
