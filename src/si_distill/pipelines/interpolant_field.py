"""The one way to a prediction: a network of any parameterisation at (x_t, t, condition), with guidance.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch and siblings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .interpolant_condition import Condition

Network = Callable[[torch.Tensor, torch.Tensor, Condition], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Guidance:
    """
    Classifier-free guidance v_∅ + w (v_y − v_∅) (Ho & Salimans 2022).

    Args:
        scale (`float`): w ≥ 0; 1 is no guidance, 0 ignores the class.
        interval (`tuple[float, float]`): smallest and largest time with guidance (Kynkäänniemi et al. 2024, "Applying
            Guidance in a Limited Interval"); at others w is 1.
        channels (`int`, *optional*): guides only the first channels of the prediction; None is all of them.
        rescale (`Callable`, *optional*): `rescale(guided, conditional)`, what is made of both predictions, (B, …).

    Raises:
        ValueError: for values out of range.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    rescale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not (number and math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"`guidance_scale` must be a number of at least 0 (1 is no guidance), got {self.scale!r}.")
        pair = isinstance(self.interval, (tuple, list)) and len(self.interval) == 2
        low, high = self.interval if pair and all(isinstance(t, (int, float)) for t in self.interval) else (1, 0)
        if not 0 <= low < high <= 1:
            raise ValueError(f"`guidance_interval` must be two rising times in [0, 1], got {self.interval}.")
        if self.channels is not None and not (isinstance(self.channels, int) and self.channels > 0):
            raise ValueError(f"`guidance_channels` must be a number of channels or None, got {self.channels!r}.")

    def at(self, t: torch.Tensor) -> float | torch.Tensor:
        """w at the times: (B,) where it differs between them, otherwise a number."""
        low, high = self.interval
        if self.scale == 1 or (low <= 0 and high >= 1):
            return self.scale
        if t.ndim == 0:
            return self.scale if low <= float(t) <= high else 1.0
        return torch.where((t >= low) & (t <= high), self.scale, 1.0)


class Field:
    """
    A network's prediction at (x_t, t, condition), in whatever space is asked for.

    Args:
        network (`Callable`): called as `network(network_input, timesteps, condition)`, such as a `NetworkView`; gives a
            tuple whose first element is the prediction.
        scheduler ([`StochasticInterpolantScheduler`]): the path on which the network was trained, what it predicts, and
            which times it is given.
        null (`Condition` of one row, *optional*): no class and no text; needed for guidance.
        guidance (`Guidance`): how the prediction is guided.
        dtype (`torch.dtype`, *optional*): what the network's input is cast to; left as it is when not given.

    Attributes:
        evaluations (`int`): how often the network was evaluated for each row; with guidance each time counts 2.
    """

    def __init__(
        self,
        network: Network,
        scheduler: Any,
        null: Condition | None = None,
        guidance: Guidance = Guidance(),
        dtype: torch.dtype | None = None,
    ):
        self.network, self.scheduler, self.null, self.guidance, self.dtype = network, scheduler, null, guidance, dtype
        self.interpolant, self.prediction_type = scheduler.interpolant, scheduler.config.prediction_type
        self.evaluations = 0

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition, space: str) -> torch.Tensor:
        """
        The prediction in `space`, (B, …), in the dtype of `x_t`: networks may run in bfloat16, losses do not.

        Args:
            x_t (`torch.Tensor` of shape (B, …)): the state.
            t (`torch.Tensor` of shape (B,) or ()): times in [0, 1].
            condition (`Condition`): what the network is told; on a bridge its image is the pair's x1.
            space (`str`): one of `si_distill.interpolants.PREDICTIONS`.
        """
        return self.convert(self.predict(x_t, t, condition), x_t, t, condition, space)

    def convert(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, condition: Condition, space: str
    ) -> torch.Tensor:
        """The network's prediction in `space` (see `Interpolant.convert`)."""
        return self.interpolant.convert(prediction, x_t, t, self.prediction_type, space, x1=condition.image)

    def sample(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """x̂0, or where a bridge's prediction does not determine it Euler's step to t = 0 (`Interpolant.last_step`)."""
        prediction = self.predict(x_t, t, condition)
        return self.interpolant.last_step(prediction, x_t, t, self.prediction_type, x1=condition.image)

    def one_step(self, x1: torch.Tensor, t: float, condition: Condition) -> torch.Tensor:
        """
        The one-step generator G(x1) = x̂0-prediction at time `t` on the state β(t) x1.

        On `linear` with t = 1 it is one Euler step, x1 − v(x1, 1) (RealUID); SiD's "initial sigma" is the β/α at t.

        Args:
            x1 (`torch.Tensor` of shape (B, …)): standard normal noise, or the reference of a bridge.
            t (`float`): the generator's time `init_time`, in (0, 1]; 1 on a bridge.
            condition (`Condition`): what the network is told.
        """
        times = torch.full(x1.shape[:1], t, device=x1.device, dtype=torch.promote_types(x1.dtype, torch.float32))
        x_t = self.interpolant.at(times, x1).beta * x1
        prediction = self.predict(x_t, times, condition)
        return self.interpolant.last_step(prediction, x_t, times, self.prediction_type)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's own prediction, guided, (B, …) in the dtype of `x_t`."""
        return self.outputs(x_t, t, condition)[0]

    def outputs(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, ...]:
        """
        What one forward gives: the guided prediction, (B, …) in the dtype of `x_t`, then anything else as it is with the
        class.

        Raises:
            ValueError: when guidance is asked of a network without a null class.
        """
        # Scaled before the cast: what the network sees has unit size, x_t itself may be 80 times that.
        network_input = self.interpolant.network_input(x_t, t, self.prediction_type).to(self.dtype or x_t.dtype)
        times = t.to(x_t.device, torch.promote_types(x_t.dtype, torch.float32))
        times = self.scheduler.network_time(times).expand(len(x_t))
        prediction, *others = self._guided(network_input, times, condition, self.guidance.at(t))
        return self.scheduler.signed(prediction).to(x_t.dtype), *others

    def _guided(self, network_input, times, condition, scale) -> tuple[torch.Tensor, ...]:
        """Both predictions in one forward. Their weights sum to 1: the formula holds for every kind of prediction."""
        if not torch.is_tensor(scale) and scale == 1:
            self.evaluations += 1
            return self.network(network_input, times, condition)
        if self.null is None:
            raise ValueError(
                f"`guidance_scale` is {scale}, but the network was trained without label dropout, or without labels, and "
                "has no null class to guide with. Use `guidance_scale=1.0`, or train it with `class_dropout_prob` above 0."
            )
        self.evaluations += 2
        both = Condition.cat(condition, condition.nulled(self.null))
        outputs = self.network(torch.cat([network_input] * 2), torch.cat([times] * 2), both)
        conditional, unconditional = outputs[0].chunk(2)
        if torch.is_tensor(scale):
            scale = scale.to(conditional.dtype).view(-1, *[1] * (conditional.ndim - 1))
        guided = unconditional + scale * (conditional - unconditional)
        if self.guidance.rescale is not None:
            guided = self.guidance.rescale(guided, conditional)
        if (channels := self.guidance.channels) is not None:
            guided = torch.cat([guided[:, :channels], conditional[:, channels:]], 1)
        return guided, *(None if extra is None else extra.chunk(2)[0] for extra in outputs[1:])
