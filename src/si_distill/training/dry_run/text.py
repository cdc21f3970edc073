"""The dry run of a text-to-image pipeline: its networks as shapes alone, and what adapters on them need."""

import functools
import inspect
import os
from collections.abc import Container
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from ...errors import InputError
from ...pipelines import Condition
from ...text_to_image.conventions import CONVENTIONS
from ...text_to_image.network import TextNetwork
from ...text_to_image.teacher import TextToImageTeacher, check_whole, is_text_to_image, not_text_to_image
from ...units import binary_size
from ..captioned import idle_encoders
from ..config import TeacherConfig
from ..distillation.config import DistillConfig
from ..text_teacher import text_teacher
from .graphs import graph_sizes

#: Components of a stock pipeline that a dry run builds; the others are texts' and left out.
_BUILT = ("transformer", "unet", "vae", "scheduler")


def described_text_teacher(settings: DistillConfig) -> tuple[TextToImageTeacher, str] | None:
    """The stock pipeline on the meta device and where its shapes are from; None for other teachers.

    Raises:
        InputError: when its configs cannot be read, or `teacher_model` is not such a pipeline's.
    """
    here = os.path.isfile(f"{settings.teacher}/{DiffusionPipeline.config_name}")
    if "pipeline" in settings.teacher_model and not here:
        pipeline, source = _from_description(settings.teacher_model), "not here; as `teacher_model` describes it"
    elif here and is_text_to_image(settings.teacher):
        pipeline, source = _from_folder(settings.teacher, idle_encoders(settings)), "its configs were read"
    else:
        return None
    teacher = TextToImageTeacher(pipeline, settings.text.size, settings.lora_rank, tuple(settings.lora_targets))
    return _told_shapes(teacher, settings.text.max_length), source


def described_captioned(settings: TeacherConfig) -> TextToImageTeacher:
    """The stock pipeline that captioned images train, on the meta device; its configs are read from its folder or the Hub.

    Raises:
        InputError: when they cannot be read, or sizes or layers do not fit.
    """
    name = settings.model["pipeline"]
    if not is_text_to_image(name):
        raise InputError(not_text_to_image(name))
    return _told_shapes(text_teacher(_from_folder(name), settings), settings.text.max_length)


def _told_shapes(teacher: TextToImageTeacher, max_length: int | None) -> TextToImageTeacher:
    """The same, with a text of the longest kind that it can be told, as shapes."""
    convention = teacher.convention
    shapes = convention.text_shapes(teacher.transformer.base.config, max_length)
    real = convention.mask if convention.reads_mask else None
    text = {
        name: torch.ones(
            1, *shape, dtype=torch.bool if name == convention.mask else None, device="cpu" if name == real else "meta"
        )
        for name, shape in shapes.items()
    }
    teacher.transformer.null = Condition(text=text)
    return teacher


def _from_folder(folder: str, left_out: Container[str] = ()) -> DiffusionPipeline:
    """The pipeline of a folder, which needs no components that the run leaves out."""
    index = DiffusionPipeline.load_config(folder)
    check_whole(folder, index["_class_name"], given=left_out)
    try:
        parts = {name: _component(index[name][1], folder=folder, subfolder=name) for name in _BUILT if name in index}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"Cannot read the configs of the teacher {folder!r}: {error}") from error
    return _pipeline(index["_class_name"], parts)


def _from_description(described: dict[str, Any]) -> DiffusionPipeline:
    kind = described["pipeline"]
    if kind not in CONVENTIONS:
        raise InputError(f"`teacher_model.pipeline` is {kind!r}; known are {', '.join(CONVENTIONS)}.")
    signature = inspect.signature(getattr(diffusers, kind).__init__).parameters
    unknown = described.keys() - {"pipeline", *_BUILT}
    if unknown:
        raise InputError(f"`teacher_model` has {', '.join(sorted(unknown))}; a pipeline has {', '.join(_BUILT)} here.")
    try:
        parts = {}
        for name in _BUILT:
            if name in signature:
                annotated = signature[name].annotation
                given = dict(described.get(name, {}))
                parts[name] = _component(given.pop("class", getattr(annotated, "__name__", "")), given)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"Cannot build the {kind} that `teacher_model` describes: {error}") from error
    return _pipeline(kind, parts)


def _component(name: str, config: dict[str, Any] | None = None, **place: str) -> Any:
    """A model on the meta device, or a scheduler, from its config here or in a folder."""
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, (ModelMixin, SchedulerMixin))):
        raise ValueError(f"{name!r} is no model or scheduler of diffusers; give `class`.")
    if config is None:
        config = cls.load_config(place["folder"], subfolder=place["subfolder"])
    with torch.device("meta" if issubclass(cls, ModelMixin) else "cpu"):
        return cls.from_config(config)


def _pipeline(kind: str, parts: dict[str, Any]) -> DiffusionPipeline:
    cls = getattr(diffusers, kind)
    taken = inspect.signature(cls.__init__).parameters.values()
    rest = {p.name: None for p in taken if p.name != "self" and p.default is p.empty}
    further = {"requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
    return cls(**{**rest, **parts, **further})


# What it needs.


@functools.lru_cache(maxsize=8)
def text_graph_sizes(network: TextNetwork, checkpointed: bool, frozen: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """As `graph_sizes`, of a network on the meta device that is told a text.

    Args:
        network: the teacher's; with adapters one of them is measured, if there is any.
        checkpointed: whether blocks keep their inputs alone.
        frozen: the gradient goes through the network into its input.
    """
    adapters, base = network.adapters, network.base
    shape = (network.config.in_channels, *network.config.sample_size)
    worn = adapters.names[0] if adapters and adapters.names else None
    looked_at = TextNetwork(base, network.convention, shape, adapters, worn)
    flags = {parameter: parameter.requires_grad for parameter in base.parameters()}
    base.requires_grad_(False)
    looked_at.requires_grad_(not frozen)

    def forward(batch: int) -> object:
        x = torch.zeros(batch, *shape, device="meta", requires_grad=frozen)
        condition = network.null[torch.zeros(batch, dtype=torch.long)]
        guidance = torch.zeros(batch, device="meta") if network.convention.told_guidance else None
        return looked_at(x, torch.zeros(batch, device="meta"), guidance=guidance, **condition.text)

    checkpoint = adapters.checkpoint_blocks if adapters else base.enable_gradient_checkpointing
    try:
        return graph_sizes(base, forward, checkpoint if checkpointed else None)
    finally:
        base.disable_gradient_checkpointing()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def describe_texts(
    teacher: TextToImageTeacher, trained: TextNetwork, settings: DistillConfig | TeacherConfig
) -> dict[str, str]:
    """The lines on images, adapters and texts."""
    null, data, adapters = teacher.transformer.null, settings.data, teacher.transformer.adapters
    embeddings = [value for name, value in null.text.items() if name != teacher.convention.mask]
    shapes = " and ".join(" × ".join(map(str, value.shape[1:])) for value in embeddings)
    kept = sum(value[0].numel() for value in embeddings) * (2 if settings.mixed_precision == "bf16" else 4)
    limit = f", the first {data.max_train_samples:,}" if data.max_train_samples else ""
    files = f" ({data.data_files})" if data.data_files else ""
    lines = {"images": f"{teacher.size[0]} × {teacher.size[1]} pixels"}
    if adapters is not None:
        lines["adapters"] = (
            f"rank {adapters.rank} on {len(adapters.layers)} layers, {sum(p.numel() for p in trained.parameters()):,} "
            f"parameters each: {'student, critic' if isinstance(settings, DistillConfig) else 'the trained one'} and "
            "averages; the network is in memory once"
        )
    return lines | {
        "texts": f"{data.name}{files}{limit}; embeddings of at most {shapes} values, {binary_size(kept)} each"
    }
