"""The images of a distillation: of the teacher's shape and classes, and enough of them."""

import torch

from ...data import TrainingData, load_training_data
from ...data.latents.dataset import LatentDataset
from ...data.latents.format import is_latent_cache
from ...errors import InputError
from ...pipelines import InterpolantPipeline
from .config import DistillConfig


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
            f"the teacher works on latents, but {name} are images. Encode them first: "
            f"si-distill precompute-latents --vae {settings.teacher} --data.name {name} --output_dir FOLDER; then give "
            "--data.name FOLDER. Or choose an objective without real data, e.g. sid, and no adversarial term."
        )
    data = load_training_data(settings.data, readers, teacher.network.num_classes, further_references=True)
    if isinstance(data, LatentDataset):
        if teacher.vae is None:
            raise InputError(
                f"{name} holds latents, and the teacher {settings.teacher!r} has no autoencoder to say whether they are its "
                "own: add it (`--vae` of `si-distill convert-teacher`), or give images if the teacher's are pixels."
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


def needs_labels_of_stream(settings: DistillConfig) -> bool:
    """Whether classes are to be those of a stream of images, which only reading it tells (as SiD's code does)."""
    streamed = settings.data.streaming and not is_latent_cache(settings.data.name)
    return settings.label_sampling == "empirical" and streamed and not settings.class_frequencies


def check_shares(shares: list[float], source: str, classes: int) -> None:
    """Refuses shares of other classes than the teacher's."""
    if len(shares) != classes:
        raise InputError(f"For empirical classes {source} {len(shares)} values, but the teacher has {classes} classes.")


def class_shares(
    settings: DistillConfig, teacher: InterpolantPipeline, data: TrainingData | None
) -> torch.Tensor | None:
    """Cumulative shares of the classes that generated images are drawn by, (K,); None where no shares are needed.

    Raises:
        InputError: when the shares are not those of the teacher's classes.
    """
    classes, shares = teacher.network.num_classes, settings.class_frequencies
    if settings.label_sampling != "empirical" or (data is not None and not shares):
        return None  # uniform, or the real images' own
    if not shares:
        images = load_training_data(settings.data)
        shares = torch.bincount(torch.tensor(images.labels), minlength=len(images.class_names)).tolist()
        check_shares(shares, f"the data set {settings.data.name} has", classes)
    cumulative = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return (cumulative / cumulative[-1]).float()
