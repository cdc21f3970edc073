"""What a distillation starts from, loaded and checked against each other before anything is written."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..data import TrainingData, load_training_data
from ..data.augmentation import AUGMENT_LABELS
from ..data.latents import LatentDataset
from ..data.latents_format import is_latent_cache
from ..errors import InputError
from ..loading import load_pipeline
from ..models.extension import extend_network
from ..objectives import DistillationObjective
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline, view_network
from .config import DistillConfig
from .distillation_references import check_unseen, noise_channels


def load_teacher(settings: DistillConfig) -> InterpolantPipeline:
    """The teacher's pipeline.

    Raises:
        InputError: when it cannot be loaded, or lacks the null class that the settings need.
    """
    teacher = load_pipeline(InterpolantPipeline, "teacher", settings.teacher)
    check_guidance(settings, teacher)
    return teacher


def check_guidance(settings: DistillConfig, teacher: InterpolantPipeline) -> None:
    """Refuses guidance of, or label dropout beside, a teacher without a null class."""
    guided = settings.guidance_scale != 1 or settings.critic_guidance_scale != 1
    if teacher.network.null_class is None and (guided or settings.critic_class_dropout_prob > 0):
        raise InputError(
            f"guidance_scale={settings.guidance_scale}, critic_guidance_scale={settings.critic_guidance_scale} and "
            f"critic_class_dropout_prob={settings.critic_class_dropout_prob} need a null class, but the teacher was "
            "trained without label dropout, or without labels, and has no null class. Leave them at 1, 1 and 0."
        )


def fitting_objective(settings: DistillConfig, teacher: InterpolantPipeline) -> DistillationObjective:
    """The objective, in sample space where it would have no gradient in velocity space, or a bridge's teacher knows only
    the sample, and the user left the choice.

    Raises:
        InputError: when the user chose a space in which it has none, or it is not defined for the teacher.
    """
    objective = check_unseen(settings, settings.build_objective(), teacher)
    try:
        objective.check_interpolant(teacher.scheduler.interpolant)
    except ValueError as error:
        if "space" in settings.objective_kwargs:
            raise InputError(str(error)) from None
        return replace(objective, space="sample")
    return objective


@dataclass(frozen=True)
class StartingStudent:
    """The student before training.

    Args:
        network: the teacher's copy, or a finished student's.
        init_time: the time of its one-step map.
        noise_channels: channels of noise that it sees beside a bridge's reference.
    """

    network: nn.Module
    init_time: float
    noise_channels: int = 0


def starting_student(settings: DistillConfig, teacher: InterpolantPipeline) -> StartingStudent:
    """The teacher's copy, on a bridge with room for the student's noise that it does not heed yet; or a finished student.

    Raises:
        InputError: when the finished student does not fit the teacher, x̂0 cannot be had at the time, or the network cannot
            be given noise.
    """
    interpolant, config = teacher.scheduler.interpolant, teacher.scheduler.config
    prediction_type, timestep_type = config.prediction_type, config.timestep_type
    if settings.student is None:
        network = _with_noise(teacher.transformer, channels := noise_channels(settings, teacher))
        init_time = interpolant.default_init_time(prediction_type, timestep_type)
    else:
        student = load_pipeline(OneStepInterpolantPipeline, "student", settings.student)
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
        init_time = float(interpolant.nearest_time(asked, timestep_type))
    if init_time != 1 and not interpolant.gaussian_reference:
        raise InputError(f"`init_time` is {init_time}, but a bridge's student starts at its reference: leave it out.")
    if not interpolant.reaches_sample(init_time, prediction_type):
        raise InputError(
            f"`init_time` is {init_time}, where the teacher's {prediction_type} prediction says nothing about the sample "
            "(α = 0): leave it out, or set it below 1."
        )
    try:
        interpolant.network_time(torch.tensor(init_time), timestep_type)
    except ValueError as error:
        raise InputError(f"`init_time` is {init_time}: {error}") from None
    return StartingStudent(network, init_time, channels)


def _with_noise(network: nn.Module, channels: int) -> nn.Module:
    """A copy of the teacher's network that sees so many further channels.

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


def starting_critic(
    settings: DistillConfig, teacher: InterpolantPipeline, objective: DistillationObjective
) -> nn.Module:
    """A copy of the teacher's network, which takes augmentation labels if there is augmentation.

    A teacher that was never told about augmentation gives its copy a map of the labels that is zero at first: the critic
    starts as the teacher all the same.

    Raises:
        InputError: when augmentation would leak into the images, or cannot be done.
    """
    network, dim = teacher.transformer, teacher.network.augment_dim
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
    if objective.uses_teacher_in_critic:
        raise InputError(
            f"{asked} the objective {settings.objective!r} needs the teacher in the critic's loss, and this teacher "
            "takes no augmentation labels: augmentation would leak into what is generated. Set it to 0, or train a teacher "
            "with it."
        )
    return extend_network(network, augment_dim=AUGMENT_LABELS)


def check_log_variance(settings: DistillConfig, objective: DistillationObjective, timestep_type: str) -> None:
    """Refuses a critic with a log-variance where it means nothing.

    Raises:
        InputError: when the critic's loss is no plain square, or the network's times are no noise levels.
    """
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


def class_shares(
    settings: DistillConfig, teacher: InterpolantPipeline, data: TrainingData | None
) -> torch.Tensor | None:
    """Cumulative shares of the classes that generated images are drawn by, (K,); None where no shares are needed.

    Raises:
        InputError: when the shares are not those of the teacher's classes.
    """
    classes = teacher.network.num_classes
    if settings.label_sampling is not None and not classes:
        raise InputError(
            f"`label_sampling` is {settings.label_sampling!r}, but the teacher has no classes: leave it out."
        )
    shares = settings.class_frequencies
    if settings.label_sampling != "empirical" or (data is not None and not shares):
        return None  # uniform, or the real images' own
    if not shares:
        if settings.data.streaming and not is_latent_cache(settings.data.name):
            raise InputError(
                f"`label_sampling` is empirical, and how frequent the classes of the stream {settings.data.name!r} are "
                "would be known only after reading all of it: give them as `class_frequencies`."
            )
        images = load_training_data(settings.data)
        shares = torch.bincount(torch.tensor(images.labels), minlength=len(images.class_names)).tolist()
    if len(shares) != classes:
        source = "`class_frequencies` has" if settings.class_frequencies else f"the data set {settings.data.name} has"
        raise InputError(f"For empirical classes {source} {len(shares)} values, but the teacher has {classes} classes.")
    cumulative = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return (cumulative / cumulative[-1]).float()


def load_fitting_images(settings: DistillConfig, teacher: InterpolantPipeline, readers: int = 1) -> TrainingData:
    """The images, of the teacher's shape and classes, with references if the data have them.

    Args:
        settings: of the distillation.
        teacher: its teacher.
        readers: processes that read, over all ranks.

    Raises:
        InputError: when they cannot be loaded or do not fit.
    """
    name = settings.data.name
    if teacher.vae is not None and not is_latent_cache(name):
        raise InputError(
            f"The objective {settings.objective!r} or the adversarial term {settings.adversarial.kind!r} uses real data and "
            f"the teacher works on latents, but {name} are images. Encode them first: python "
            f"training/precompute_latents.py --vae {settings.teacher} --data.name {name} --output_dir FOLDER; then give "
            "--data.name FOLDER. Or choose an objective without real data, e.g. sid, and no adversarial term."
        )
    data = load_training_data(settings.data, readers, teacher.network.num_classes, further_references=True)
    if isinstance(data, LatentDataset):
        if teacher.vae is None:
            raise InputError(
                f"{name} holds latents, and the teacher {settings.teacher!r} has no autoencoder to say whether they are its "
                "own: add it (`--vae` of training/convert_teacher.py), or give images if the teacher's are pixels."
            )
        data.check_vae(teacher.vae, teacher.config.vae_pixel_min, f"that of the teacher {settings.teacher!r}")
    wanted, classes = teacher.network.sample_shape, teacher.network.num_classes
    found = (data.channels, data.size, data.size)
    if found != wanted or (classes and len(data.class_names) != classes):  # unconditional: labels are ignored
        raise InputError(
            f"The teacher generates {classes} classes of shape {wanted}, but the data set {data.name} has "
            f"{len(data.class_names)} classes of shape {found}."
        )
    if teacher.network.condition_channels not in (0, data.channels):
        raise InputError(
            f"The teacher sees references of {teacher.network.condition_channels} channels, but those of the data set "
            f"{data.name} have {data.channels}."
        )
    return data


def _difference(student: OneStepInterpolantPipeline, teacher: InterpolantPipeline, channels: int) -> str | None:
    """What keeps a finished student with so many noise channels from being one of this teacher, or None."""
    found, wanted = (
        {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for network in (student.transformer, _with_noise(teacher.transformer, channels))
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
