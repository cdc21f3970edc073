"""What a distillation starts from, loaded and checked against each other before anything is written."""

import copy
from dataclasses import replace

import torch
from torch import nn

from ..data import ImageDataset, load_images
from ..errors import InputError
from ..interpolants import Interpolant
from ..loading import load_pipeline
from ..objectives import DistillationObjective
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from .config import DistillConfig


def load_teacher(settings: DistillConfig) -> InterpolantPipeline:
    """The teacher's pipeline.

    Raises:
        InputError: when it cannot be loaded, lacks the null class that the settings need, or expects augmentation labels.
    """
    teacher = load_pipeline(InterpolantPipeline, "teacher", settings.teacher)
    saved = type(teacher.transformer).load_config(settings.teacher, subfolder="transformer")
    if saved.get("augment_dim"):
        raise InputError(
            f"The teacher {settings.teacher!r} was trained with augmentation labels, as EDM's are "
            f"(augment_dim={saved['augment_dim']} in its config), which {type(teacher.transformer).__name__} does not take: "
            "its predictions would be wrong. Use a teacher without augmentation."
        )
    guided = settings.guidance_scale != 1 or settings.critic_guidance_scale != 1
    if teacher.network.null_class is None and (guided or settings.critic_class_dropout_prob > 0):
        raise InputError(
            f"guidance_scale={settings.guidance_scale}, critic_guidance_scale={settings.critic_guidance_scale} and "
            f"critic_class_dropout_prob={settings.critic_class_dropout_prob} need a null class, but the teacher was "
            "trained without label dropout, or without labels, and has no null class. Leave them at 1, 1 and 0."
        )
    return teacher


def fitting_objective(settings: DistillConfig, interpolant: Interpolant) -> DistillationObjective:
    """The objective, in sample space where it would have no gradient in velocity space and the user left the choice.

    Raises:
        InputError: when the user chose a space in which it has none.
    """
    objective = settings.build_objective()
    try:
        objective.check_interpolant(interpolant)
    except ValueError as error:
        if "space" in settings.objective_kwargs:
            raise InputError(str(error)) from None
        return replace(objective, space="sample")
    return objective


def starting_student(settings: DistillConfig, teacher: InterpolantPipeline) -> tuple[nn.Module, float]:
    """The student's network and the time of its one-step map: the teacher's copy, or a finished student.

    Raises:
        InputError: when the finished student does not fit the teacher, or x̂0 cannot be had at the time.
    """
    interpolant, config = teacher.scheduler.interpolant, teacher.scheduler.config
    prediction_type, timestep_type = config.prediction_type, config.timestep_type
    if settings.student is None:
        network = copy.deepcopy(teacher.transformer)
        init_time = interpolant.default_init_time(prediction_type, timestep_type)
    else:
        student = load_pipeline(OneStepInterpolantPipeline, "student", settings.student)
        network, init_time = student.transformer, student.scheduler.config.init_time
        difference = _difference(student, teacher)
        if difference:
            raise InputError(
                f"The student {settings.student!r} does not fit the teacher {settings.teacher!r}: {difference}."
            )
    if settings.init_time is not None:
        asked = torch.tensor(settings.init_time, dtype=torch.float64)
        init_time = float(interpolant.nearest_time(asked, timestep_type))
    if not interpolant.reaches_sample(init_time, prediction_type):
        raise InputError(
            f"`init_time` is {init_time}, where the teacher's {prediction_type} prediction says nothing about the sample "
            "(α = 0): leave it out, or set it below 1."
        )
    return network, init_time


def load_fitting_images(settings: DistillConfig, teacher: InterpolantPipeline) -> ImageDataset:
    """The real images, of the teacher's shape and classes.

    Raises:
        InputError: when they cannot be loaded or do not fit.
    """
    data = load_images(settings.data)
    if teacher.vae is not None:
        raise InputError(
            f"The objective {settings.objective!r} or the adversarial term {settings.adversarial.kind!r} uses real data and "
            "the teacher works on latents: real images cannot be used without precomputed latents. Choose an objective "
            "without real data, e.g. sid, and no adversarial term."
        )
    wanted, classes = teacher.network.sample_shape, teacher.network.num_classes
    found = (data.channels, data.size, data.size)
    if found != wanted or (classes and len(data.class_names) != classes):  # unconditional: labels are ignored
        raise InputError(
            f"The teacher generates {classes} classes of shape {wanted}, but the data set {data.name} has "
            f"{len(data.class_names)} classes of shape {found}."
        )
    return data


def _difference(student: OneStepInterpolantPipeline, teacher: InterpolantPipeline) -> str | None:
    """What keeps a finished student from being one of this teacher, or None."""
    found, wanted = (
        {name: tuple(value.shape) for name, value in pipeline.transformer.state_dict().items()}
        for pipeline in (student, teacher)
    )
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            return f"{name} has the shape {found.get(name)} instead of {wanted.get(name)}"
    if student.scheduler.interpolant != teacher.scheduler.interpolant:
        return f"it lives on {student.scheduler.interpolant!r} instead of {teacher.scheduler.interpolant!r}"
    for setting in ("prediction_type", "timestep_type"):
        kinds = [pipeline.scheduler.config[setting] for pipeline in (student, teacher)]
        if kinds[0] != kinds[1]:
            return f"its scheduler has {setting}={kinds[0]} instead of {kinds[1]}"
    return None
