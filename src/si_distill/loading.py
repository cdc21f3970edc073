"""Loading of a pipeline or an autoencoder that the user named, with an error for people."""

from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .conversion.diffusers_teachers import convert_diffusers, saved_class
from .errors import InputError
from .pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from .pipelines.interpolant_pipeline_folder import check_weights

#: In the folder of a converted EDM2 teacher: the log-variance of its checkpoint, which no prediction needs.
LOG_VARIANCE = "log_variance.safetensors"

Pipeline = TypeVar("Pipeline", InterpolantPipeline, OneStepInterpolantPipeline)


def load_pipeline(cls: type[Pipeline], role: str, name: str, **kwargs: Any) -> Pipeline:
    """The pipeline in a folder or of a Hub id; a teacher may also be diffusers' own (see `convert_diffusers`).

    Args:
        cls: the pipeline's class.
        role: what the user calls it, for the error: "teacher" or "student".
        name: the folder or Hub id.
        kwargs: of `from_pretrained`, e.g. `dtype`, `revision`; not for diffusers' own.

    Raises:
        InputError: when it cannot be loaded; the text says why.
    """
    own = {kind.__name__ for kind in (InterpolantPipeline, OneStepInterpolantPipeline)}
    if cls is InterpolantPipeline and not kwargs and saved_class(name) not in {*own, None}:
        return convert_diffusers(name)
    try:
        return cls.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load the {role} {name!r}: {error}") from error


def load_log_variance(name: str) -> dict[str, torch.Tensor] | None:
    """What a converted EDM2 teacher keeps of its checkpoint's log-variance u(σ): `freqs`, `phases`, `weight`; else None.

    Args:
        name: the teacher's folder or Hub id.

    Raises:
        InputError: when the file is there and cannot be read.
    """
    path = Path(name) / LOG_VARIANCE
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, LOG_VARIANCE))
        except (EntryNotFoundError, HFValidationError):
            return None
        except OSError as error:
            raise InputError(f"Cannot load {LOG_VARIANCE} of the teacher {name!r}: {error}") from error
    if not path.is_file():
        return None
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if set(weights) != {"freqs", "phases", "weight"}:
        raise InputError(f"{path} must hold freqs, phases and weight, but it holds {', '.join(sorted(weights))}.")
    return weights


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
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"Cannot load the autoencoder {name!r}: {error}") from error
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
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"Cannot read the config of the autoencoder {name!r}: {error}") from error


def _vae_place(name: str) -> tuple[str | None, float]:
    """The sub-folder of the autoencoder, and the darkest pixel that the pipeline around it says."""
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError):  # no pipeline: the autoencoder itself, or nothing, which its own loading says
        return ("vae" if (Path(name) / "vae").is_dir() else None), -1.0
    if (index.get("vae") or [None])[0] is None:
        raise InputError(f"The pipeline {name!r} has no autoencoder: its images are pixels, which need no encoding.")
    return "vae", index.get("vae_pixel_min", -1.0)
