"""What a distillation is going to do, resolved from its settings and its teacher: a run executes it, a dry run prints it."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ...adversarial import AdversarialTerm
from ...critic import CriticNetwork
from ...errors import InputError
from ...objectives import DistillationObjective
from ...pipelines import InterpolantPipeline
from ..times import TimeSampler
from .config import DistillConfig
from .images import check_shares, needs_labels_of_stream
from .levels import Levels
from .references import References, reference_roles
from .start import StartingStudent, starting_critic, starting_student


@dataclass(frozen=True)
class Plan:
    """A distillation before its first image.

    Args:
        teacher: its pipeline.
        objective, adversarial: the losses; None without an adversarial term.
        references: how reference images are used.
        critic, student: the networks that are trained.
        levels: the student's steps.
        critic_times, generator_times: the distributions of both losses' times.
        adversarial_times: that of the adversarial term's own times, or None.
        needs_images: whether real images, or their classes or references, are read.
    """

    teacher: InterpolantPipeline
    objective: DistillationObjective
    adversarial: AdversarialTerm | None
    references: References
    critic: CriticNetwork
    student: StartingStudent
    levels: Levels
    critic_times: TimeSampler
    generator_times: TimeSampler
    adversarial_times: TimeSampler | None
    needs_images: bool


def plan_distillation(settings: DistillConfig, teacher: InterpolantPipeline, load: bool = True) -> Plan:
    """Resolves and checks everything but the images.

    Args:
        settings: of the distillation.
        teacher: its pipeline, with weights or on the meta device.
        load: whether weights of other folders are read; otherwise networks have shapes alone.

    Raises:
        InputError: for what cannot work.
    """
    _check_guidance(settings, teacher)
    _check_classes(settings, teacher.network.num_classes)
    interpolant, timestep_type = teacher.scheduler.interpolant, teacher.scheduler.config.timestep_type
    settings.check_times(interpolant)
    objective, adversarial = _fitting_objective(settings, teacher), settings.adversarial.build()
    _check_log_variance(settings, objective, timestep_type)
    references = reference_roles(settings, teacher)
    with nullcontext() if load else torch.device("meta"):
        critic = starting_critic(settings, teacher, objective, load)
    student = starting_student(settings if load else replace(settings, student=None), teacher)
    return Plan(
        teacher,
        objective,
        adversarial,
        references,
        critic,
        student,
        Levels(student.scheduler, settings.seed),
        settings.build_time_sampler(interpolant, timestep_type),
        settings.build_generator_time_sampler(interpolant, timestep_type),
        settings.build_adversarial_time_sampler(interpolant, timestep_type),
        needs_images=objective.uses_real_data
        or adversarial is not None
        or references.needed
        or needs_labels_of_stream(settings),
    )


def _check_guidance(settings: DistillConfig, teacher: InterpolantPipeline) -> None:
    """Refuses guidance or label dropout of networks whose teacher has no null class."""
    roles = ("", "critic_", "critic_training_", "student_")
    scales = tuple(f"{role}guidance_scale" for role in roles)
    shares = ("critic_class_dropout_prob", "student_class_dropout_prob")
    wrong = [
        f"{name}={getattr(settings, name)}"
        for names, none in ((scales, 1), (shares, 0))
        for name in names
        if getattr(settings, name) != none
    ]
    if teacher.network.null is None and wrong:
        raise InputError(
            f"{' and '.join(wrong)} need a null class, but the teacher was trained without label dropout, or without "
            "labels, and has no null class. Leave scales of guidance at 1 and label dropout at 0."
        )


def _check_classes(settings: DistillConfig, classes: int) -> None:
    """Refuses a choice of classes that the teacher does not have."""
    if settings.label_sampling is not None and not classes:
        raise InputError(
            f"`label_sampling` is {settings.label_sampling!r}, but the teacher has no classes: leave it out."
        )
    if settings.class_frequencies:
        check_shares(settings.class_frequencies, "`class_frequencies` has", classes)


def _fitting_objective(settings: DistillConfig, teacher: InterpolantPipeline) -> DistillationObjective:
    """The objective, in sample space where it would have no gradient in velocity space, or a bridge's teacher knows only
    the sample, and the user left the choice.

    Raises:
        InputError: when the user chose a space in which it has none, or it is not defined for the teacher.
    """
    objective = _converting_objective(settings, teacher)
    if objective.critic_weight == "edm" and teacher.scheduler.config.interpolant != "edm":
        raise InputError(
            f"`critic_weight` edm is that of EDM's preconditioning, but the teacher {settings.teacher!r} is on the path "
            f"{teacher.scheduler.config.interpolant!r} and predicts {teacher.scheduler.config.prediction_type}: leave it "
            "out, or set it to uniform."
        )
    try:
        objective.check_interpolant(teacher.scheduler.interpolant)
    except ValueError as error:
        if "space" in settings.objective_kwargs:
            raise InputError(str(error)) from None
        return replace(objective, space="sample")
    return objective


def _converting_objective(settings: DistillConfig, teacher: InterpolantPipeline) -> DistillationObjective:
    """The objective, in the one space that the teacher's predictions have where they do not convert: on a bridge whose
    networks do not see x1, one of the sample plays in sample space, one of the velocity in velocity space and without
    weights that need x̂0.

    Raises:
        InputError: when the objective is not defined there.
    """
    objective = settings.build_objective()
    interpolant, prediction = teacher.scheduler.interpolant, teacher.scheduler.config.prediction_type
    if objective.critic_weight == "edm" and not interpolant.gaussian_reference:
        raise InputError("`critic_weight` edm is one of noise levels, which a bridge does not have: leave it out.")
    if not interpolant.noisy or teacher.network.condition_channels:
        return objective
    if prediction == "sample":
        if objective.space == "sample":
            return objective
        if "space" in settings.objective_kwargs:
            raise InputError(
                "`objective_kwargs.space` is velocity, but the teacher predicts the sample on a bridge whose network does "
                "not see the reference, so that its velocity is not known: leave it out, or set it to sample."
            )
        return replace(objective, space="sample")
    needed = [
        what
        for what, wanted in (
            ("space sample", objective.space == "sample"),
            ("weight sid", objective.weight == "sid"),
            ("the adversarial term encoder", settings.adversarial.kind == "encoder"),
        )
        if wanted
    ]
    if needed:
        raise InputError(
            f"The objective {settings.objective!r} needs the teacher's x̂0 ({', '.join(needed)}), but this teacher predicts "
            "the velocity of an unpaired bridge, which does not determine it: choose gap, cross_term, cross_term_detached "
            "or realuid, or train the teacher with prediction_type=sample."
        )
    return objective


def _check_log_variance(settings: DistillConfig, objective: DistillationObjective, timestep_type: str) -> None:
    """Refuses a critic with a log-variance where it means nothing."""
    if not settings.critic_log_variance:
        return
    if objective.uses_real_data or objective.uses_teacher_in_critic:
        raise InputError(
            f"`critic_log_variance` is for a critic's loss that is a square, but the objective {settings.objective!r} has "
            "terms of real data or of the teacher in it: set it to false, or choose e.g. sid."
        )
    if timestep_type != "log_sigma":
        raise InputError(
            f"`critic_log_variance` needs a teacher whose network is given ¼ ln σ, as EDM's and EDM2's are; this one has "
            f"timestep_type={timestep_type!r}. Set it to false."
        )
