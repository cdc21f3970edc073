"""Loads an autoencoder named by the user, with user-facing errors."""

from pathlib import Path

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from .errors import InputError
from .pipelines.interpolant_pipeline_folder import check_weights
from .places import check_place, failure
from .reading import check_shape


def load_vae(name: str) -> tuple[ModelMixin, float]:
    """An autoencoder, and the darkest pixel of the images that it is used with (see `LatentScaling`).

    Args:
        name: a folder or Hub id: of the autoencoder itself, or of a pipeline that has one.

    Raises:
        InputError: when it cannot be loaded.
    """
    subfolder, pixel_min = _vae_place(name)
    try:
        vae = AutoModel.from_pretrained(name, subfolder=subfolder)
        check_weights(vae, name, {})
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"Cannot load the autoencoder {name!r}: {failure(name, error)}") from error
    return vae, pixel_min


def describe_vae(name: str) -> tuple[ModelMixin, float]:
    """The same on the meta device, from its config alone.

    Raises:
        InputError: when that cannot be read.
    """
    subfolder, pixel_min = _vae_place(name)
    try:
        config = diffusers.AutoencoderKL.load_config(name, subfolder=subfolder)  # of any model
        with torch.device("meta"):
            return getattr(diffusers, config["_class_name"]).from_config(config), pixel_min
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"Cannot read the config of the autoencoder {name!r}: {failure(name, error)}") from error


def _vae_place(name: str) -> tuple[str | None, float]:
    """The sub-folder of the autoencoder, and the darkest pixel that the pipeline around it says."""
    check_place("autoencoder", name)
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError):  # no pipeline: the autoencoder itself, or nothing, which its own loading says
        return ("vae" if (Path(name) / "vae").is_dir() else None), -1.0
    try:
        check_shape(index, {"vae?": ([(str, None)], None), "vae_pixel_min?": float}, "the model_index.json")
    except ValueError as error:
        raise InputError(f"Cannot use the pipeline {name!r}: {error}.") from error
    if not (index.get("vae") or [None])[0]:
        raise InputError(f"The pipeline {name!r} has no autoencoder: its images are pixels, which need no encoding.")
    return "vae", index.get("vae_pixel_min", -1.0)
