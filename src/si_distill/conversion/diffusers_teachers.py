"""Diffusers' class-conditional and unconditional models as teachers: DiT, and UNets in pixel space.

Nothing is converted but the description: the network is diffusers' own. A DDPM schedule is the interpolant `ddpm`, and the
network is given the step number that it was trained with; a flow-matching schedule is `linear`, with times times 1,000.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..errors import InputError
from ..interpolants import Interpolant, get_interpolant
from ..pipelines import InterpolantPipeline
from ..pipelines.interpolant_pipeline_folder import check_weights
from ..pipelines.interpolant_pipeline_network import VIEWS
from ..places import check_place
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler

#: Diffusers' pipelines that can be teachers, and the component that is the network.
PIPELINES = {"DiTPipeline": "transformer", "DDPMPipeline": "unet", "DDIMPipeline": "unet"}
#: Diffusers' networks that can be teachers, each in a folder of its own next to that of a scheduler. The last is how
#: old folders name a DiT; diffusers opens it as one.
NETWORKS = (*(cls.__name__ for cls in VIEWS), "Transformer2DModel")
#: What these networks predict, in diffusers' words and in ours.
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def saved_class(source: str, role: str = "pipeline") -> str | None:
    """The name of the class that a folder or repository was saved from, or None when it does not say.

    Args:
        source: the folder or Hub id.
        role: what the user calls it, for the error.

    Raises:
        InputError: for a path that does not exist.
    """
    check_place(role, source)
    for reader in (DiffusionPipeline, diffusers.UNet2DModel):  # model_index.json, config.json
        try:
            name = reader.load_config(source)["_class_name"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        name = name[-1] if isinstance(name, list) and name else name  # a list names the folder's own module first
        return name if isinstance(name, str) else None
    return None


def convert_diffusers(source: str) -> InterpolantPipeline:
    """The teacher in a diffusers folder or repository.

    Args:
        source: a saved `DiTPipeline`, `DDPMPipeline` or `DDIMPipeline`, or the folder of a `DiTTransformer2DModel` or
            `UNet2DModel` that has a `scheduler` folder next to it.

    Returns:
        A pipeline with the same network as `transformer`, on `ddpm` with discrete timesteps or on `linear`, and its VAE and
        class names.

    Raises:
        InputError: when it cannot be loaded, is of another class, or its schedule or network cannot be used.
    """
    name = saved_class(source)
    if name not in (*PIPELINES, *NETWORKS):
        raise InputError(
            f"{source!r} was saved as {name or 'nothing that diffusers knows'}, which cannot be a teacher. Teachers are "
            f"InterpolantPipeline folders, diffusers' {', '.join(PIPELINES)}, or folders of {' or '.join(NETWORKS)} with a "
            "scheduler folder next to them."
        )
    try:
        network, scheduler, further = _load_pipeline(source) if name in PIPELINES else _load_network(source, name)
        check_weights(network, source, {})
        settings = scheduler_settings(scheduler)
        pipeline = InterpolantPipeline(network, StochasticInterpolantScheduler(**settings), **further)
        _check_channels(pipeline)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"Cannot use the {name} {source!r} as a teacher: {error}") from error
    return pipeline


def _load_pipeline(source: str) -> tuple[torch.nn.Module, SchedulerMixin, dict[str, Any]]:
    index = DiffusionPipeline.load_config(source)
    pipeline = DiffusionPipeline.from_pretrained(source)
    network = getattr(pipeline, PIPELINES[type(pipeline).__name__])
    # DiTPipeline itself keeps the names the other way round, and not in its config.
    return network, pipeline.scheduler, {"vae": getattr(pipeline, "vae", None), "id2label": index.get("id2label")}


def _load_network(source: str, name: str) -> tuple[torch.nn.Module, SchedulerMixin, dict[str, Any]]:
    folder = Path(source).resolve().parent / "scheduler"
    if not (folder / SchedulerMixin.config_name).is_file():
        raise ValueError(
            f"it says nothing of its noise levels, and there is no {folder}/{SchedulerMixin.config_name} next to it. Put "
            "the folder of its diffusers scheduler there, or pass the folder of the whole pipeline."
        )
    config = diffusers.DDPMScheduler.load_config(folder)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return getattr(diffusers, name).from_pretrained(source), scheduler, {}


def scheduler_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Arguments of our scheduler on which the network has the noise levels that it was trained with."""
    config, kind = scheduler.config, type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return _flow_settings(config)
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    if not {*names}.issubset(config) or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"its scheduler, a {kind}, has no beta schedule and is no FlowMatchEulerDiscreteScheduler: its noise levels are "
            "not known."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"its scheduler has prediction_type={prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}."
        )
    interpolant = get_interpolant("ddpm", **{name: config[name] for name in names})
    _check_noise_levels(interpolant, scheduler)
    return dict(
        interpolant="ddpm",
        interpolant_kwargs=interpolant.config,
        prediction_type=prediction_type,
        timestep_type="discrete",
        solver="ddim",
    )


def _flow_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """x_t = (1 − σ) x0 + σ x1 with a network that is given K σ and predicts x1 − x0: the path `linear` with t = σ.

    Of how diffusers spaces its steps only a fixed shift is kept; the rest is a choice of each sampling.
    """
    if config.get("invert_sigmas"):
        raise ValueError("its FlowMatchEulerDiscreteScheduler has invert_sigmas=True, times that run the other way.")
    return dict(
        interpolant="linear",
        prediction_type="velocity",
        timestep_scale=float(config["num_train_timesteps"]),
        timestep_shift=1.0 if config.get("use_dynamic_shifting") else float(config["shift"]),
        solver="euler",
    )


def _check_noise_levels(interpolant: Interpolant, scheduler: SchedulerMixin) -> None:
    theirs = scheduler.alphas_cumprod.double().cpu()
    ours = interpolant.coefficients(torch.linspace(0, 1, len(theirs), dtype=torch.float64)).alpha ** 2
    wrong = ((ours - theirs).abs() > 1e-5 * theirs).nonzero()
    if len(wrong):
        step = int(wrong[0])
        changes = {name: scheduler.config.get(name) for name in ("trained_betas", "rescale_betas_zero_snr")}
        raise ValueError(
            f"the noise levels of its {type(scheduler).__name__} are not those of its beta_schedule: at step {step} it has "
            f"alphas_cumprod {float(theirs[step]):.6g} instead of {float(ours[step]):.6g} ({changes} in its config)."
        )


def _check_channels(pipeline: InterpolantPipeline) -> None:
    channels = pipeline.network.sample_shape[0]
    out_channels = pipeline.transformer.config.out_channels or channels
    if out_channels not in (channels, 2 * channels):  # twice as many: a learned variance, which nothing here uses
        raise ValueError(f"its network takes {channels} channels and gives {out_channels}.")
