"""The levels of a student of several steps: from which of its steps an update takes the image, and how it gets there."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import InputError
from ...pipelines import Condition, Field
from ...pipelines.interpolant_field import Network
from ...sample_noise import SampleNoise
from ...schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


@dataclass(frozen=True)
class Level:
    """Step number `step`, from 0, of `count` steps. The first one is the same map whatever the count."""

    count: int = 1
    step: int = 0


class Levels:
    """What a student that is sampled with each of several numbers of steps learns from.

    Args:
        scheduler: the student's, whose `student_steps`, times and solver are those of the finished pipeline.
        seed: the run's seed.

    Raises:
        InputError: when the network does not know that many times.
    """

    def __init__(self, scheduler: StochasticInterpolantScheduler, seed: int):
        self.scheduler = scheduler
        self.counts = list(scheduler.config.student_steps or [1])
        self._shared = SampleNoise(seed)  # on the CPU: every rank draws the same level
        for count in self.counts:
            try:
                scheduler.set_timesteps(count)
            except ValueError as error:
                raise InputError(f"`student_steps` {self.counts} does not fit the teacher: {error}") from None

    @staticmethod
    def number(counts: list[int]) -> int:
        """How many levels there are: the first steps of all counts are one."""
        return 1 + sum(count - 1 for count in counts)

    @property
    def all(self) -> list[Level]:
        """Each level once."""
        return [Level(), *(Level(count, step) for count in self.counts for step in range(1, count))]

    def draw(self, *counters: int) -> Level:
        """The level of one draw of the whole batch: a count, then one of its steps, both uniform."""
        if self.counts == [1]:
            return Level()
        count = self.counts[int(self._shared.integers(len(self.counts), "levels", *counters, 0, indices=[0]))]
        step = int(self._shared.integers(count, "levels", *counters, 1, indices=[0]))
        return Level(count, step) if step else Level()

    @torch.no_grad()
    def state(
        self,
        field: Field,
        x1: torch.Tensor,
        level: Level,
        condition: Condition,
        noise: SampleNoise,
        key: tuple,
        indices: range,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t where the student stands at a level, (B, …), without a graph, and the time t, shape (B,).

        Args:
            field: the student's.
            x1: (B, …) standard normal noise.
            level: how far.
            condition: what the network is told.
            noise, key, indices: the run's random numbers, the counters of this draw and the samples' places in it.
        """
        self.scheduler.set_timesteps(level.count, device=x1.device)
        x_t = self.scheduler.init_noise_sigma * x1
        for step, t in enumerate(self.scheduler.timesteps[: level.step]):
            fresh = noise.normal(tuple(x1.shape[1:]), "renoise", *key, step, indices=indices)
            x_t = self.scheduler.step(
                field.predict(x_t, t, condition), t, x_t, variance_noise=fresh, return_dict=False
            )[0]
        return x_t, self.scheduler.timesteps[level.step].expand(len(x_t))

    def told(self, network: Network, level: Level) -> Network:
        """A critic's network that is told the level, one-hot where other networks have augmentation labels."""
        known = self.all
        one_hot = torch.nn.functional.one_hot(torch.tensor(known.index(level)), len(known))

        def called(*at: Any, **kwargs: Any) -> Any:
            if at:  # (x_t, t, condition); features alone have no condition
                x_t, t, condition = at
                labels = one_hot.to(x_t).expand(len(x_t), -1)
                at = (x_t, t, replace(condition, augment=labels))
            return network(*at, **kwargs)

        return called
