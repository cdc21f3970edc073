"""Writes a converted checkpoint as a checked pipeline folder, or writes nothing."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..autoencoders import load_vae
from ..errors import InputError
from ..files import FolderLock
from ..log_variance import LOG_VARIANCE
from ..pipelines import Condition
from ..reading import read_yaml
from .converted import Converted


def check_output(folder: Path, overwrite: bool) -> None:
    """
    Raises:
        InputError: when `folder` cannot be written, or holds something that may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`out` {folder} is a file: give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"`out` {folder} is not empty: give a new folder, or add --overwrite.")
    FolderLock(folder).check()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`out` {folder} cannot be written: {error}.") from error


def fitting_vae(name: str, transformer: ModelMixin) -> ModelMixin:
    """The autoencoder in a folder (its own, or the `vae` of a pipeline) or of a Hub id.

    Raises:
        InputError: when it cannot be loaded, or its latents have other channels than the network.
    """
    vae, _ = load_vae(name)
    found, wanted = vae.config.get("latent_channels"), transformer.config.in_channels
    if found != wanted:
        raise InputError(
            f"The autoencoder {name!r} has latents of {found} channels, but the network works on {wanted}: it was trained "
            "with another one."
        )
    return vae


def load_id2label(name: str, num_classes: int) -> dict[int, str]:
    """Names of the classes from a JSON or YAML file, or those of ImageNet.

    Args:
        name: the file, with a mapping of numbers to names or a list of them under the key `id2label`; or `imagenet`.
        num_classes: of the network.

    Raises:
        InputError: when they cannot be read, or are not those of the network.
    """
    names: Any
    if name == "imagenet":
        from torchvision.models import ResNet50_Weights

        names = ResNet50_Weights.DEFAULT.meta["categories"]
    else:
        content = read_yaml(name, plain=True)  # JSON is YAML; names stay text
        names = content.get("id2label", content)
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        names = {int(number): str(text) for number, text in names.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"`id2label` {name} must hold a list of names, or numbers of classes and their names."
        ) from None
    if set(names) != set(range(num_classes)):
        raise InputError(
            f"`id2label` {name} names {len(names)} classes, {min(names, default=None)} to {max(names, default=None)}, but "
            f"the network has {num_classes}, 0 to {num_classes - 1}."
        )
    return names


def write_pipeline(converted: Converted, folder: Path) -> float:
    """
    Saves the pipeline next to `folder`, opens it again, samples, compares, and only then gives it its name.

    Returns:
        The root mean square of x̂0 from pure noise: near the data's own (0.3 to 1.2) for a trained network; a network
        whose time or sign was mistaken gives 2 or more (measured in docs/teachers.md).

    Raises:
        InputError: when the network's output is not finite, or differs after loading, or the folder cannot be written.
    """
    pipeline = converted.pipeline()
    before = _first_sample(pipeline, converted)
    if not before.isfinite().all():
        raise InputError("The converted network's output is not finite: the checkpoint's weights are damaged.")
    try:
        with _temporary_folder(folder) as temporary:
            pipeline.save_pretrained(temporary)
            if not torch.equal(before, _first_sample(type(pipeline).from_pretrained(temporary), converted)):
                raise InputError(f"The network gives other images after it was saved to {folder.parent} and loaded.")
            if converted.log_variance is not None:
                save_file(converted.log_variance, temporary / LOG_VARIANCE)
            FolderLock(folder).check()  # a run may have begun there since
            _replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"`out` {folder} cannot be written: {error}.") from error
    return float(before.square().mean().sqrt())


@torch.no_grad()
def _first_sample(pipeline: Any, converted: Converted) -> torch.Tensor:
    """x̂0 of two noise images, (2, C, H, W)."""
    pipeline.transformer.eval()
    config, interpolant = converted.scheduler.config, converted.scheduler.interpolant
    default = interpolant.default_init_time(config.prediction_type, config.timestep_type)
    init_time = config.init_time if converted.student else default
    noise = torch.randn(2, *pipeline.network.sample_shape, generator=torch.Generator().manual_seed(0))
    return pipeline.field().one_step(noise, init_time, Condition(labels=torch.zeros(2, dtype=torch.long)))


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder next to `folder`, removed unless it was renamed."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as private:
        temporary = Path(private) / folder.name
        temporary.mkdir()
        yield temporary


def _replace(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`; what is there is removed last."""
    if not folder.exists():
        temporary.rename(folder)
        return
    with _temporary_folder(folder) as old:
        folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            old.rename(folder)
            raise
