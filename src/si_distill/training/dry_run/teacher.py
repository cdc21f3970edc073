"""The dry run's networks of classes: teachers on torch's meta device, from the configs of a folder or from settings."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from torch import nn

from ...data.latents.format import is_latent_cache, read_manifest
from ...errors import InputError
from ...loading import OWN_CODE
from ...pipelines import InterpolantPipeline
from ...pipelines.interpolant_pipeline_folder import STOCK_LIBRARIES
from ...places import check_place, failure
from ...schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from ...settings import parse_settings
from ..build_network import CLASSES, FOREIGN_CLASSES, build_network
from ..config import TeacherConfig
from ..distillation.config import DistillConfig
from ..teacher import TeacherPlan, plan_teacher


def plan_on_meta(settings: TeacherConfig) -> TeacherPlan:
    """The plan of a teacher's training, on the meta device; the data set is not opened.

    Raises:
        InputError: for settings that a training refuses, or that say less of the images than the network needs.
    """
    # Images that have yet to be encoded are not what the network sees.
    shape = {"sample_size": settings.model.get("sample_size", settings.data.image_size)}
    if is_latent_cache(settings.data.name):
        manifest = read_manifest(settings.data.name)
        channels, size, _ = manifest.recipe.latent_shape
        shape = {"sample_size": size, "in_channels": channels, "num_classes": len(manifest.class_names)}
    elif settings.data.name == "digits":
        shape = {"sample_size": settings.data.image_size, "in_channels": 1, "num_classes": 10}
    missing = [name for name in ("in_channels", "num_classes") if name not in {**shape, **settings.model}]
    if missing:
        raise InputError(
            "A dry run does not open the data set, which says how many channels and classes there are: set "
            f"{' and '.join(f'`model.{name}`' for name in missing)}."
        )
    return plan_teacher(settings, "meta", **shape)


def described_teacher(settings: DistillConfig) -> tuple[InterpolantPipeline, str]:
    """The teacher on the meta device, and where its shape is from: the configs of its folder, or `teacher_model`.

    Raises:
        InputError: when its configs cannot be read, or its class may not be imported; or when `teacher_model`
            describes no network.
    """
    if settings.teacher_model and not os.path.isfile(f"{settings.teacher}/{InterpolantPipeline.config_name}"):
        return _from_description(settings.teacher_model), "not here; as `teacher_model` describes it"
    without = "A dry run without the teacher's folder needs `teacher_model`, its class and arguments."
    try:
        check_place("teacher", settings.teacher)
        index = InterpolantPipeline.load_config(settings.teacher)
        parts = {name: _on_meta(settings, name, index.get(name)) for name in ("transformer", "vae")}
        scheduler = StochasticInterpolantScheduler.from_pretrained(settings.teacher, subfolder="scheduler")
    except InputError as error:
        raise InputError(f"{error} {without}") from None
    except (OSError, ValueError) as error:
        reason = failure(settings.teacher, error)
        raise InputError(f"Cannot read the configs of the teacher {settings.teacher!r}: {reason} {without}") from error
    return InterpolantPipeline(parts["transformer"], scheduler, vae=parts["vae"]), "its configs were read"


def _from_description(described: dict[str, Any]) -> InterpolantPipeline:
    """The pipeline that `teacher_model` describes: a network and its scheduler, or the settings that train the teacher."""
    if "training" in described:
        if len(described) > 1:
            raise InputError("`teacher_model.training` cannot be combined with other settings of `teacher_model`.")
        training = parse_settings(TeacherConfig, ["--config", str(described["training"])])
        plan = plan_on_meta(training)
        return InterpolantPipeline(plan.network, plan.scheduler)
    arguments = dict(described)
    scheduler = arguments.pop("scheduler", {})
    if not isinstance(scheduler, dict):
        raise InputError(f"`teacher_model.scheduler` must be settings of the scheduler, got {scheduler!r}.")
    with torch.device("meta"):
        network = build_network(arguments, "teacher_model", CLASSES | FOREIGN_CLASSES)
    return InterpolantPipeline(network, _scheduler(scheduler))


def _scheduler(arguments: dict[str, Any]) -> StochasticInterpolantScheduler:
    try:
        return StochasticInterpolantScheduler(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"Cannot build the scheduler from `teacher_model.scheduler`: {error}") from error


def _on_meta(settings: DistillConfig, name: str, entry: list[str] | None) -> nn.Module | None:
    """A component of the teacher's folder, by the class that its index names."""
    if entry is None or entry[0] is None:
        return None
    library, class_name, folder = str(entry[0]), entry[1], settings.teacher
    if library.isidentifier() and (code := Path(folder, name, f"{library}.py")).is_file():
        if not settings.trust_remote_code:
            raise ValueError(OWN_CODE)
        return _own_on_meta(code, class_name)
    if library.split(".")[0] not in (*STOCK_LIBRARIES, "si_distill"):
        raise ValueError(
            f"its {name} has the class {class_name} of {library}, and only those of diffusers, transformers and si_distill, "
            "and those that the folder brings along, are imported."
        )
    cls = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder, subfolder=name))


def _own_on_meta(code: Path, class_name: str) -> nn.Module:
    """A network whose class is in a file of its folder, which runs."""
    try:
        cls = get_class_from_dynamic_module(
            str(code.parent), module_file=code.name, class_name=class_name, trust_remote_code=True
        )
        config = cls.load_config(code.parent)
        try:
            with torch.device("meta"):
                return cls.from_config(config)
        except (RuntimeError, NotImplementedError):  # it reads numbers while it is built
            return cls.from_config(config).to("meta")
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"its {class_name} cannot be built: {type(error).__name__}: {error}.") from error
