"""The flow-map term: the student's way from noise to its image moves as the teacher's field says.

Tong et al. 2025, "Flow Map Distillation Without Data" (FreeFlow), whose "prediction" it is: their "correction" is the
objective `cross_term_detached`. The student is told a second time s; with its x̂0-prediction D its map from t to s is

    X_{t,s}(x) = r x + q D(x, t, s),    r = β_s / β_t,    q = α_s − α_t r

DDIM's step while D does not depend on s, and the student's image at s = 0. It moves along the teacher's ODE,
∂_s X_{t,s} = v*(X_{t,s}, s), where

    R = (∂_s X_{t,s} − v*) / q' = D + (q/q') ∂_s D − (v* − r' x) / q' = 0

On `linear`, from t = 1, −R is FreeFlow's residual of velocities; in samples it does not depend on how a path counts its
time. The term's gradient at D is w R with w = 1 / (mean R² + c)^decay: nothing else in it is differentiated, and ∂_s D is a
difference of two forwards.
"""

from dataclasses import dataclass, replace
from math import floor, pi

import torch
from torch import nn

from ...errors import InputError
from ...interpolants import Interpolant
from ...models.extension import extend_network
from ...pipelines import Condition, Field, InterpolantPipeline, view_network
from ...pipelines.interpolant_pipeline_network import NetworkView
from ...sample_noise import SampleNoise
from ..parallel.blocks import has_dropout
from .config import DistillConfig

#: What s is multiplied with in the features that the network is told.
FREQUENCIES = (0.5 * pi, pi, 2 * pi, 4 * pi)
#: How many features there are.
TIME_FEATURES = 2 * len(FREQUENCIES)
#: c in the weight: residuals below its root count by their size alone.
RESIDUAL_FLOOR = 1e-3
#: Smallest step of the difference in bfloat16: at 0.005 its rounding exceeds R itself (benchmarks/flow_map_step.py).
BFLOAT16_STEP = 0.04


def time_features(s: torch.Tensor) -> torch.Tensor:
    """sin ωs and 1 − cos ωs of the times (B,), (B, `TIME_FEATURES`).

    All are 0 at s = 0: the finished student, which nobody tells a second time, is the map to the data.
    """
    angles = s.unsqueeze(-1) * s.new_tensor(FREQUENCIES)
    return torch.cat([torch.sin(angles), 1 - torch.cos(angles)], -1)


class TwoTimeMap:
    """X_{t,s} at states x_t (B, …) on a path from Gaussian noise, for times t and s (B,)."""

    def __init__(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor):
        start, end = interpolant.at(t, x_t), interpolant.at(s, x_t)
        self.x_t = x_t
        self.r, self.d_r = end.beta / start.beta, end.d_beta / start.beta
        self.q, self.d_q = end.alpha - start.alpha * self.r, end.d_alpha - start.alpha * self.d_r

    def state(self, x0: torch.Tensor) -> torch.Tensor:
        """X_{t,s}, (B, …), of the x̂0-prediction D."""
        return self.r * self.x_t + self.q * x0

    def residual(self, x0: torch.Tensor, d_x0: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """R, (B, …), of D, ∂_s D and v* at the state."""
        return x0 + (self.q * d_x0 - (velocity - self.d_r * self.x_t)) / self.d_q


@dataclass
class Paths:
    """Where the term looks.

    Args:
        rows: (B',) the images of the objective's micro-batch whose conditions these have.
        noise: (B', …) standard normal, where the paths start.
        t, s: (B',) from where to where the map goes.
        renoised: (B', …) the noise of the starts that are noised images, and where they are, (B'); None without such.
    """

    rows: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    s: torch.Tensor
    renoised: tuple[torch.Tensor, torch.Tensor] | None


class FlowMap:
    """The term of one run.

    Args:
        settings: of the run: the term's own, and the times of the losses.
        teacher: its field, guided where the term wants it.
        init_time: the student's.
        told: augmentation labels that the teacher's network takes; the second time's features come after them.
    """

    def __init__(self, settings: DistillConfig, teacher: Field, init_time: float, told: int):
        self.config, self.teacher, self.init_time, self.told = settings.flow_map, teacher, init_time, told
        self.interpolant, self.timestep_type = teacher.interpolant, teacher.scheduler.config.timestep_type
        self.lowest, self.highest = settings.t_min, settings.t_max

    def paths(self, noise: SampleNoise, shape: tuple[int, ...], indices: range, *counters: int) -> Paths:
        """The term's share of a micro-batch.

        Args:
            noise, counters: the run's random numbers, and the counters of this draw.
            shape: (C, H, W).
            indices: of the objective's images in the global batch: which of them are taken does not depend on how many
                processes share it.
        """
        ratio, step = self.config.ratio, self.config.step_size
        copies = torch.tensor([floor((i + 1) * ratio) - floor(i * ratio) for i in indices])
        rows, x1, uniform, again = [], [], [], []
        for copy in range(int(copies.max())):
            taken = (copies > copy).nonzero().flatten()
            of_rows = [indices[int(row)] for row in taken]
            u, normal = noise.uniform_and_normal(shape, "flow_map", *counters, copy, indices=of_rows)
            rows, x1, uniform = [*rows, taken.to(u.device)], [*x1, normal], [*uniform, u]
            if self.config.starts == "both":
                again.append(noise.uniform_and_normal(shape, "flow_map_start", *counters, copy, indices=of_rows))
        u, x1 = torch.cat(uniform), torch.cat(x1)
        t, renoised = torch.full_like(u, self.init_time), None
        if again:
            v, fresh = (torch.cat(values) for values in zip(*again, strict=True))
            where = v < 0.5
            low = self.lowest + step
            t = torch.where(where, self._known(low + 2 * v * (self.init_time - low)), t)
            renoised = fresh, where
        s = self._known(self.lowest + u * ((t - step).clamp(max=self.highest) - self.lowest))
        return Paths(torch.cat(rows), x1, t, s, renoised)

    def _known(self, t: torch.Tensor) -> torch.Tensor:
        return self.interpolant.nearest_time(t, self.timestep_type)

    def starts(self, student: Field, paths: Paths, condition: Condition) -> torch.Tensor:
        """x_t, (B', …), without a graph."""
        first = self.interpolant.at(torch.full_like(paths.t, self.init_time), paths.noise).beta * paths.noise
        if paths.renoised is None:
            return first
        fresh, where = paths.renoised
        with torch.no_grad():
            images = student.one_step(paths.noise, self.init_time, condition)
        states = self.interpolant.interpolate(images, fresh, paths.t)
        return torch.where(where.view(-1, *[1] * (states.ndim - 1)), states, first)

    def sample(
        self, student: Field, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """D(x_t, t, s), (B, …)."""
        features = time_features(s)
        told = torch.cat([features.new_zeros(len(features), self.told), features], 1)
        return student.sample(x_t, t, replace(condition, augment=told))

    def gradient(
        self, student: Field, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """D with its graph, the term's gradient there, both (B, …), and R (B, …)."""
        x0 = self.sample(student, x_t, t, s, condition)
        with torch.no_grad():
            step = self.config.step_size
            change = (self.sample(student, x_t, t, s + step, condition) - x0) / step
            way = TwoTimeMap(self.interpolant, x_t, t, s)
            residual = way.residual(x0, change, self.teacher(way.state(x0), s, condition, "velocity"))
            size = residual.flatten(1).square().mean(1).view(-1, *[1] * (x_t.ndim - 1))
            return x0, residual / (size + RESIDUAL_FLOOR) ** self.config.decay, residual


def tells_second_time(student: NetworkView, teacher: NetworkView) -> bool:
    """Whether a student's network has the term's features among what it is told, unlike its teacher's."""
    return teacher.augment_dim is not None and student.augment_dim == teacher.augment_dim + TIME_FEATURES


def told_second_time(network: nn.Module, teacher: InterpolantPipeline, settings: DistillConfig) -> nn.Module:
    """The student's network with a map of the second time that is zero at first, so that it still is DDIM's step of the
    teacher's; as it is if it has one already, or if there is no term.

    Raises:
        InputError: when the term does not fit the teacher, its network or the other settings.
    """
    term, known = settings.flow_map, teacher.network.augment_dim
    if not term.weight:
        return network
    asked, off = f"`flow_map.weight` is {term.weight:g}, but", "Set it to 0."
    if not teacher.scheduler.interpolant.gaussian_reference:
        raise InputError(f"{asked} the teacher is a bridge's, and the term is for paths from Gaussian noise. {off}")
    if settings.student_map == "negative_velocity":
        raise InputError(f"{asked} `student_map` negative_velocity is a map from one time alone. {off}")
    if known is None:
        raise InputError(
            f"{asked} a {type(network).__name__} cannot be told a second time: only networks with `augment_dim` can, SiT's "
            f"and EDM's. {off}"
        )
    dropout = has_dropout(network) if settings.dropout is None else settings.dropout > 0
    if dropout:
        raise InputError(
            f"{asked} the student has dropout, and the term's difference of two forwards would be one of two masks. Set "
            "`dropout` to 0."
        )
    if settings.per_device_train_batch_size * term.ratio < 1:
        raise InputError(
            f"`flow_map.batch_share` is {term.batch_share:g}: next to {settings.per_device_train_batch_size} images per "
            "device that is less than one. Raise it, or `per_device_train_batch_size`."
        )
    if settings.mixed_precision == "bf16" and term.step_size < BFLOAT16_STEP:
        raise InputError(
            f"`flow_map.step_size` is {term.step_size:g}: in bfloat16 the difference of two forwards so close to each other "
            f"is rounding. Set it to {BFLOAT16_STEP:g} or more, or `mixed_precision` to no."
        )
    if tells_second_time(view_network(network), teacher.network):
        return network
    return extend_network(network, augment_dim=known + TIME_FEATURES)


def check_step(settings: DistillConfig, init_time: float) -> None:
    """Refuses a finite difference that does not fit between the smallest time and the student's.

    Raises:
        InputError: see above.
    """
    if settings.flow_map.weight and not settings.t_min + 2 * settings.flow_map.step_size < init_time:
        raise InputError(
            f"`flow_map.step_size` is {settings.flow_map.step_size:g}, which does not fit twice between `t_min` "
            f"{settings.t_min:g} and the student's time {init_time:g}: lower it."
        )
