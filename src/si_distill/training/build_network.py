"""A network as settings describe it: its class, a published size, its arguments."""

import inspect
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from .. import models
from ..data.augmentation import AUGMENT_LABELS
from ..errors import InputError
from ..imports import import_named
from ..pipelines.interpolant_pipeline_network import VIEWS
from ..reading import check_arguments
from .config import TeacherConfig

#: The network of teachers that do not name another.
DEFAULT_CLASS = "SiTTransformer2DModel"
#: Networks of this package, which a teacher can be trained with.
CLASSES = {name: getattr(models, name) for name in models.__all__ if inspect.isclass(getattr(models, name))}
#: Networks of diffusers, which converted teachers may be of.
FOREIGN_CLASSES = {cls.__name__: cls for cls in VIEWS}


def build_network(
    described: dict[str, Any], section: str, classes: dict[str, type[ModelMixin]] = CLASSES
) -> ModelMixin:
    """The network, randomly initialised on torch's present default device.

    Args:
        described: `class`, one of `classes` (SiT when not given), `preset`, a name that the class's `from_preset` knows,
            and arguments of the class.
        section: name of the setting, for errors.
        classes: by name.

    Raises:
        InputError: for an unknown class, preset or argument, or sizes that do not fit.
    """
    arguments = dict(described)
    name, preset = arguments.pop("class", DEFAULT_CLASS), arguments.pop("preset", None)
    if name not in classes:
        raise InputError(f"`{section}.class` is {name!r}; choose one of: {', '.join(classes)}.")
    cls = classes[name]
    known = [argument for argument in inspect.signature(cls.__init__).parameters if argument != "self"]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise InputError(f"Unknown setting `{section}.{unknown[0]}`. Known: class, preset, {', '.join(known)}.")
    if preset is not None and not hasattr(cls, "from_preset"):
        raise InputError(f"`{section}.preset` is {preset!r}, but {name} has no named sizes: give its arguments.")
    try:
        check_arguments(cls.__init__, arguments)
        return cls(**arguments) if preset is None else cls.from_preset(preset, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"Cannot build the network from `{section}`: {error}") from error


def own_class(settings: TeacherConfig) -> dict[str, type[ModelMixin]]:
    """The classes to build the network of: the one that `model_class` names, imported, or this package's.

    Raises:
        InputError: when it cannot be imported, or is no class that pipelines can save and networks' views can see.
    """
    if settings.model_class is None:
        return CLASSES
    cls = import_named("model_class", settings.model_class)
    if not (inspect.isclass(cls) and issubclass(cls, ModelMixin) and issubclass(cls, ConfigMixin)):
        raise InputError(
            f"`model_class` {settings.model_class!r} is no diffusers network: it inherits from ModelMixin and ConfigMixin, "
            "and its constructor is decorated with register_to_config (docs/your-network.md shows one)."
        )
    return {settings.model_class: cls}


def with_inputs(arguments: dict[str, Any], settings: TeacherConfig) -> dict[str, Any]:
    """The arguments of `model` with what else the network is given in training: labels of augmentation, pairs' references.

    Raises:
        InputError: when `model` asks for others.
    """
    wanted = {
        "augment_dim": (
            AUGMENT_LABELS if settings.augment_prob else 0,
            f"augment_prob={settings.augment_prob}",
            "labels",
        ),
        "condition_channels": (
            arguments["in_channels"] if settings.data.is_paired else 0,
            f"data with{'' if settings.data.is_paired else 'out'} pairs",
            "channels of a reference",
        ),
    }
    for name, (size, reason, what) in wanted.items():
        if arguments.get(name, size) != size:
            raise InputError(f"`model.{name}` is {arguments[name]}, but {reason} gives {size} {what}: leave it out.")
    return {**arguments, **{name: size for name, (size, _, _) in wanted.items() if size}}
