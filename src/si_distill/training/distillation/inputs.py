"""Loads the starting point of a distillation and checks that its parts fit, before anything is written."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...critic import CriticNetwork
from ...data import TrainingData, load_training_data
from ...data.augmentation import AUGMENT_LABELS
from ...data.latents.dataset import LatentDataset
from ...data.latents.format import is_latent_cache
from ...errors import InputError
from ...loading import load_pipeline
from ...log_variance import LogVariance, load_log_variance
from ...models.extension import extend_network, fresh_network, negated_at, with_learned_positions
from ...models.unet_edm2 import MPConv
from ...objectives import DistillationObjective
from ...pipelines import InterpolantPipeline, OneStepInterpolantPipeline, view_network
from ..run.checkpoints import whole_checkpoints
from ..run.folder import CHECKPOINTS
from .config import CRITIC_STARTS, DistillConfig
from .references import check_unseen, noise_channels

#: The critic in a checkpoint: the first network that Accelerate was given.
CRITIC_WEIGHTS = "model.safetensors"


def load_teacher(settings: DistillConfig) -> InterpolantPipeline:
    """The teacher's pipeline.

    Raises:
        InputError: when it cannot be loaded, or lacks the null class that the settings need.
    """
    teacher = load_pipeline(InterpolantPipeline, "teacher", settings.teacher)
    check_guidance(settings, teacher)
    return teacher


def check_guidance(settings: DistillConfig, teacher: InterpolantPipeline) -> None:
    """Refuses guidance or label dropout of networks whose teacher has no null class."""
    scales = ("guidance_scale", "critic_guidance_scale", "student_guidance_scale")
    shares = ("critic_class_dropout_prob", "student_class_dropout_prob")
    wrong = [
        f"{name}={getattr(settings, name)}"
        for names, none in ((scales, 1), (shares, 0))
        for name in names
        if getattr(settings, name) != none
    ]
    if teacher.network.null_class is None and wrong:
        raise InputError(
            f"{' and '.join(wrong)} need a null class, but the teacher was trained without label dropout, or without "
            "labels, and has no null class. Leave scales of guidance at 1 and label dropout at 0."
        )


def fitting_objective(settings: DistillConfig, teacher: InterpolantPipeline) -> DistillationObjective:
    """The objective, in sample space where it would have no gradient in velocity space, or a bridge's teacher knows only
    the sample, and the user left the choice.

    Raises:
        InputError: when the user chose a space in which it has none, or it is not defined for the teacher.
    """
    objective = check_unseen(settings, settings.build_objective(), teacher)
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


@dataclass(frozen=True)
class StartingStudent:
    """The student before training.

    Args:
        network: the teacher's copy, or a finished student's.
        init_time: the time of its one-step map.
        prediction_type: what it predicts: the teacher's, or the sample (see `negated_at`).
        noise_channels: channels of noise that it sees next to a bridge's reference.
    """

    network: nn.Module
    init_time: float
    prediction_type: str
    noise_channels: int = 0


def starting_student(settings: DistillConfig, teacher: InterpolantPipeline) -> StartingStudent:
    """The teacher's copy, on a bridge with extra, randomly initialised noise channels; or a finished student.

    Raises:
        InputError: when the finished student does not fit the teacher, x̂0 cannot be had at the time, or the network cannot
            be given noise.
    """
    start = _negated_student(settings, teacher) or _plain_student(settings, teacher)
    start = replace(start, network=_positioned(settings, start.network))
    interpolant, timestep_type = teacher.scheduler.interpolant, teacher.scheduler.config.timestep_type
    init_time = start.init_time
    if init_time != 1 and not interpolant.gaussian_reference:
        raise InputError(f"`init_time` is {init_time}, but a bridge's student starts at its reference: leave it out.")
    if not interpolant.reaches_sample(init_time, start.prediction_type):
        raise InputError(
            f"`init_time` is {init_time}, where the teacher's {start.prediction_type} prediction says nothing about the "
            "sample (α = 0): leave it out, or set it below 1."
        )
    try:
        interpolant.network_time(torch.tensor(init_time), timestep_type)
    except ValueError as error:
        raise InputError(f"`init_time` is {init_time}: {error}") from None
    if settings.dropout is not None:
        set_dropout(start.network, settings.dropout)
    set_forced_normalization(start.network, settings.forced_weight_normalization)
    return start


def _plain_student(settings: DistillConfig, teacher: InterpolantPipeline) -> StartingStudent:
    interpolant, config = teacher.scheduler.interpolant, teacher.scheduler.config
    if settings.student is None:
        network = _with_noise(teacher.transformer, channels := noise_channels(settings, teacher))
        init_time = interpolant.default_init_time(config.prediction_type, config.timestep_type)
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
        init_time = float(interpolant.nearest_time(asked, config.timestep_type))
    return StartingStudent(network, init_time, config.prediction_type, channels)


def _negated_student(settings: DistillConfig, teacher: InterpolantPipeline) -> StartingStudent | None:
    """The public si-adistill code's student, or None where another is asked for."""
    if settings.student_map != "negative_velocity":
        return None
    config = teacher.scheduler.config
    if settings.student is not None:
        raise InputError("`student_map` negative_velocity starts from the teacher: leave `student` out.")
    if (config.interpolant, config.prediction_type, config.timestep_type) != ("linear", "velocity", "time"):
        raise InputError(
            f"`student_map` negative_velocity is for velocity networks on `linear`, but the teacher {settings.teacher!r} is "
            f"on {config.interpolant!r}, predicts {config.prediction_type} and takes {config.timestep_type}: leave it out."
        )
    try:
        network = negated_at(teacher.transformer, 0.5 if settings.init_time is None else settings.init_time)
    except ValueError as error:
        raise InputError(f"`student_map` negative_velocity: {error}") from None
    return StartingStudent(network, 1.0, "sample")


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


def starting_critic(
    settings: DistillConfig, teacher: InterpolantPipeline, objective: DistillationObjective, load: bool = True
) -> CriticNetwork:
    """The critic before training: the teacher's copy, random weights, or the critic of another run.

    Args:
        settings, teacher, objective: of the distillation.
        load: whether weights are read where they do not come from `teacher` itself; a dry run reads none.

    Raises:
        InputError: when augmentation would leak into the images, the log-variance means nothing, the adversarial term's head
            does not fit the network, or the other run's critic cannot be had.
    """
    _check_log_variance(settings, objective, teacher.scheduler.config.timestep_type)
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
    """A copy of the teacher's network, which takes augmentation labels if there is augmentation.

    A teacher that was never told about augmentation gives its copy a map of the labels that is zero at first: the critic
    starts as the teacher all the same.
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


def needs_labels_of_stream(settings: DistillConfig) -> bool:
    """Whether classes are to be those of a stream of images, which only reading it tells (as SiD's code does)."""
    streamed = settings.data.streaming and not is_latent_cache(settings.data.name)
    return settings.label_sampling == "empirical" and streamed and not settings.class_frequencies


def check_enough_images(settings: DistillConfig, data: TrainingData | None, images_per_update: int) -> None:
    """Refuses fresh draws of more real images in an iteration than there are.

    Raises:
        InputError: with both numbers.
    """
    needed = settings.draws_per_iteration * images_per_update
    if settings.draws_per_iteration > 1 and data is not None and data.count is not None and data.count < needed:
        raise InputError(
            f"`critic_draws` is fresh: the {settings.draws_per_iteration} updates of an iteration draw {images_per_update} "
            f"real images each, {needed} in all, but {settings.data.name} has {data.count}. Set it to shared, or take a "
            "smaller batch."
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
    """Why a finished student with this many noise channels does not fit this teacher, or None."""
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
