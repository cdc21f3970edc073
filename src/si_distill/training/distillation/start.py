"""The networks that a distillation starts with: the student and the critic before training."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...critic import CriticNetwork
from ...data.augmentation import AUGMENT_LABELS
from ...errors import InputError
from ...loading import load_pipeline
from ...log_variance import LogVariance, load_log_variance
from ...models.extension import extend_network, fresh_network, with_learned_positions
from ...models.unet_edm2 import MPConv
from ...objectives import DistillationObjective
from ...pipelines import InterpolantPipeline, OneStepInterpolantPipeline, view_network
from ...schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from ..run.checkpoints import whole_checkpoints
from ..run.folder import CHECKPOINTS
from .config import CRITIC_STARTS, DistillConfig
from .flow_map import TIME_FEATURES, check_step, tells_second_time, told_second_time
from .levels import Levels
from .references import noise_channels

#: The critic in a checkpoint: the first network that Accelerate was given.
CRITIC_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class StartingStudent:
    """The student before training.

    Args:
        network: the teacher's copy, or a finished student's.
        scheduler: the teacher's path with the student's `init_time` and what its network predicts.
    """

    network: nn.Module
    scheduler: StochasticInterpolantScheduler

    @property
    def init_time(self) -> float:
        """The time of the one-step map."""
        return self.scheduler.config.init_time

    @property
    def noise_channels(self) -> int:
        """Channels of noise that the network sees next to a bridge's reference."""
        return self.scheduler.config.noise_channels


def starting_student(settings: DistillConfig, teacher: InterpolantPipeline) -> StartingStudent:
    """The teacher's copy, on a bridge with extra, randomly initialised noise channels; or a finished student.

    Raises:
        InputError: when the finished student does not fit the teacher, x̂0 cannot be had at the time, or the network cannot
            be given noise.
    """
    negated = settings.student_map == "negative_velocity"
    network, own = (_negated_student if negated else _plain_student)(settings, teacher)
    network = told_second_time(_positioned(settings, network), teacher, settings)
    interpolant, init_time = teacher.scheduler.interpolant, own["init_time"]
    prediction_type = own.get("prediction_type", teacher.scheduler.config.prediction_type)
    if init_time != 1 and not interpolant.gaussian_reference:
        raise InputError(f"`init_time` is {init_time}, but a bridge's student starts at its reference: leave it out.")
    if not interpolant.reaches_sample(init_time, prediction_type):
        raise InputError(
            f"`init_time` is {init_time}, where the teacher's {prediction_type} prediction says nothing about the "
            "sample (α = 0): leave it out, or set it below 1."
        )
    check_step(settings, init_time)
    few = settings.student_steps != [1]
    if few and not interpolant.gaussian_reference:
        raise InputError(
            f"`student_steps` is {settings.student_steps}, but a bridge's student has one step: leave it out."
        )
    if few and negated:
        raise InputError("`student_map` negative_velocity is a map of one step: leave `student_steps` out.")
    own |= {"student_steps": settings.student_steps if few else None, "timestep_shift": settings.student_shift}
    own["solver"] = settings.student_stepping if few else "euler"
    try:
        scheduler = type(teacher.scheduler).from_config(teacher.scheduler.config, **own)
    except ValueError as error:
        raise InputError(f"`init_time` is {init_time}: {error}") from None
    if settings.dropout is not None:
        set_dropout(network, settings.dropout)
    set_forced_normalization(network, settings.forced_weight_normalization)
    return StartingStudent(network, scheduler)


def _plain_student(settings: DistillConfig, teacher: InterpolantPipeline) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the settings of its scheduler that are not the teacher's."""
    interpolant, config = teacher.scheduler.interpolant, teacher.scheduler.config
    if settings.student is None:
        network = _with_noise(teacher.transformer, channels := noise_channels(settings, teacher))
        init_time = interpolant.default_init_time(config.prediction_type, config.timestep_type)
    else:
        student = load_pipeline(OneStepInterpolantPipeline, "student", settings.student, settings.trust_remote_code)
        network, init_time = student.transformer, student.scheduler.config.init_time
        channels = student.scheduler.config.noise_channels
        if settings.noise_channels not in (None, channels):
            raise InputError(
                f"`noise_channels` is {settings.noise_channels}, but the student {settings.student!r} has {channels}: "
                "leave it out."
            )
        difference = _difference(student, teacher, channels)
        if difference:
            raise InputError(
                f"The student {settings.student!r} does not fit the teacher {settings.teacher!r}: {difference}."
            )
    if settings.init_time is not None:
        asked = torch.tensor(settings.init_time, dtype=torch.float64)
        init_time = float(interpolant.nearest_time(asked, config.timestep_type))
    return network, {"init_time": init_time, "noise_channels": channels}


def _negated_student(settings: DistillConfig, teacher: InterpolantPipeline) -> tuple[nn.Module, dict[str, Any]]:
    """The public si-adistill code's student −v(x1, t) of plain noise x1, with the teacher's own weights.

    It is a student like any other whose network predicts minus the sample at t = 1, where β = 1 on `linear`, and is told
    there the time that the teacher's is told at t.
    """
    config = teacher.scheduler.config
    if settings.student is not None:
        raise InputError("`student_map` negative_velocity starts from the teacher: leave `student` out.")
    if (config.interpolant, config.prediction_type, config.timestep_type) != ("linear", "velocity", "time"):
        raise InputError(
            f"`student_map` negative_velocity is for velocity networks on `linear`, but the teacher {settings.teacher!r} is "
            f"on {config.interpolant!r}, predicts {config.prediction_type} and takes {config.timestep_type}: leave it out."
        )
    t = torch.tensor(0.5 if settings.init_time is None else settings.init_time, dtype=torch.float64)
    return copy.deepcopy(teacher.transformer), {
        "init_time": 1.0,
        "prediction_type": "sample",
        "prediction_sign": -config.prediction_sign,
        "timestep_scale": float(teacher.scheduler.network_time(t)),
        "reversed_time": False,
    }


def set_dropout(network: nn.Module, probability: float) -> None:
    """Sets the probability of all of a network's dropout layers."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def set_forced_normalization(network: nn.Module, forced: bool) -> None:
    """Whether EDM2's layers normalise their stored weights in training."""
    for module in network.modules():
        if isinstance(module, MPConv):
            module.forced = forced


def _positioned(settings: DistillConfig, network: nn.Module) -> nn.Module:
    """The network, or with `learned_positions` a copy whose positions are trained too."""
    if not settings.learned_positions:
        return network
    try:
        return with_learned_positions(network)
    except ValueError as error:
        raise InputError(f"`learned_positions` does not fit the teacher: {error} Leave it out.") from None


def _with_noise(network: nn.Module, channels: int) -> nn.Module:
    """A copy of the teacher's network that sees this many further channels.

    Their weights are random: from zeros the gradient of what the noise does has a mean of zero, as nothing depends on it
    yet, and students on digits stayed nearly certain.
    """
    if not channels:
        return copy.deepcopy(network)
    try:
        seen = view_network(network).condition_channels
        return extend_network(network, zero=False, condition_channels=seen + channels)
    except ValueError as error:
        raise InputError(f"The student cannot see {channels} channels of noise: {error}") from None


def _difference(student: OneStepInterpolantPipeline, teacher: InterpolantPipeline, channels: int) -> str | None:
    """Why a finished student with this many noise channels does not fit this teacher, or None."""
    fitting = _with_noise(teacher.transformer, channels)
    if tells_second_time(student.network, teacher.network):
        fitting = extend_network(fitting, augment_dim=teacher.network.augment_dim + TIME_FEATURES)
    found, wanted = (
        {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for network in (student.transformer, fitting)
    )
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            return f"{name} has the shape {found.get(name)} instead of {wanted.get(name)}"
    if student.scheduler.interpolant != teacher.scheduler.interpolant:
        return f"it lives on {student.scheduler.interpolant!r} instead of {teacher.scheduler.interpolant!r}"
    for setting in ("prediction_type", "timestep_type", "timestep_scale", "reversed_time", "prediction_sign"):
        kinds = [pipeline.scheduler.config[setting] for pipeline in (student, teacher)]
        if kinds[0] != kinds[1]:
            return f"its scheduler has {setting}={kinds[0]} instead of {kinds[1]}"
    return None


def starting_critic(
    settings: DistillConfig, teacher: InterpolantPipeline, objective: DistillationObjective, load: bool = True
) -> CriticNetwork:
    """The critic before training: the teacher's copy, random weights, or the critic of another run.

    Args:
        settings, teacher, objective: of the distillation.
        load: whether weights are read where they do not come from `teacher` itself; a dry run reads none.

    Raises:
        InputError: when augmentation would leak into the images, the adversarial term's head does not fit the network, or
            the other run's critic cannot be had.
    """
    term = settings.adversarial
    network = _positioned(settings, _critic_network(settings, teacher, objective))
    if settings.critic_start == "random":
        network = fresh_network(network)
    log_variance = None
    if settings.critic_log_variance:
        log_variance = LogVariance(load_log_variance(settings.teacher) if load else None)
    try:
        if term.features == "teacher":
            teacher.network.feature_width  # noqa: B018 - raises for a network without features
        critic = CriticNetwork(
            network,
            None if term.kind == "none" else term.kind,
            term.head,
            log_variance,
            own_features=term.features == "critic",
        )
    except ValueError as error:
        raise InputError(f"The adversarial term {term.kind!r} does not fit the teacher: {error}") from None
    if settings.critic_dropout is not None:
        set_dropout(critic, settings.critic_dropout)
    set_forced_normalization(critic, settings.forced_weight_normalization)
    if load and settings.critic_start not in CRITIC_STARTS:
        load_critic(critic, Path(settings.critic_start))
    return critic


def _critic_network(
    settings: DistillConfig, teacher: InterpolantPipeline, objective: DistillationObjective
) -> nn.Module:
    """A copy of the teacher's network, which takes augmentation labels if there is augmentation, or the student's level.

    A teacher that was never told about augmentation gives its copy a map of the labels that is zero at first: the critic
    starts as the teacher all the same.
    """
    network, dim = teacher.transformer, teacher.network.augment_dim
    if settings.critic_sees_level:
        if dim != 0 or settings.augment_prob:
            raise InputError(
                "`critic_sees_level` tells the critic the student's level where a network takes augmentation labels, but "
                f"the teacher, a {type(network).__name__}, takes {'none' if dim is None else dim} and `augment_prob` is "
                f"{settings.augment_prob}: set it to false."
            )
        return extend_network(network, augment_dim=Levels.number(settings.student_steps))
    if settings.augment_prob == 0:
        return copy.deepcopy(network)
    asked = f"`augment_prob` is {settings.augment_prob}, but"
    if teacher.vae is not None:
        raise InputError(f"{asked} the teacher works on latents, which cannot be flipped or moved: set it to 0.")
    if dim is None:
        raise InputError(
            f"{asked} a {type(network).__name__} takes no augmentation labels: augmentation would leak into what is "
            "generated. Set it to 0."
        )
    if dim == AUGMENT_LABELS:
        return copy.deepcopy(network)
    if dim:
        raise InputError(
            f"{asked} the teacher takes {dim} augmentation labels; this augmentation has {AUGMENT_LABELS}."
        )
    if objective.uses_teacher_in_critic or settings.adversarial.features == "teacher":
        what = f"objective {settings.objective!r}" if objective.uses_teacher_in_critic else "adversarial term"
        raise InputError(
            f"{asked} the {what} needs the teacher in the critic's loss, and this teacher "
            "takes no augmentation labels: augmentation would leak into what is generated. Set it to 0, or train a teacher "
            "with it."
        )
    return extend_network(network, augment_dim=AUGMENT_LABELS)


def load_critic(critic: CriticNetwork, run: Path) -> None:
    """Gives a critic the weights of the critic in the newest whole checkpoint of a run.

    A head or a log-variance that the run's critic did not have keeps its fresh weights, as in DMD2's second stage.

    Raises:
        InputError: when there is no checkpoint that holds it in one file, or its weights are of another network.
    """
    found = whole_checkpoints(run / CHECKPOINTS)
    if not found:
        raise InputError(
            f"`critic_start` is {str(run)!r}, which is neither one of {', '.join(CRITIC_STARTS)} nor a run folder with a "
            f"whole checkpoint under {CHECKPOINTS}/."
        )
    file = found[-1] / CRITIC_WEIGHTS
    if not file.is_file():
        raise InputError(
            f"`critic_start`: {found[-1]} has no {CRITIC_WEIGHTS}. A run with FSDP2 keeps its critic in pieces; resume "
            "that run instead, or repeat it without sharding."
        )
    try:
        weights = {name.removeprefix("module."): value for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise InputError(f"`critic_start`: {file} cannot be read: {error}") from error
    own = critic.state_dict()
    fresh = {name for name in own if name.startswith(("head.", "log_variance.")) and name not in weights}
    for name, value in own.items():
        if name not in fresh and (name not in weights or weights[name].shape != value.shape):
            shape = tuple(weights[name].shape) if name in weights else None
            raise InputError(
                f"`critic_start`: the critic of {run} does not fit this teacher: {name} has the shape {shape} instead of "
                f"{tuple(value.shape)}."
            )
    critic.load_state_dict({name: value if name in fresh else weights[name] for name, value in own.items()})
