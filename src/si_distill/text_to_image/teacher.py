"""Stock text-to-image pipelines as teachers."""

import copy
import inspect
import math
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..conversion.diffusers_teachers import saved_class
from ..errors import InputError
from ..pipelines.interpolant_latents import LatentScaling
from ..pipelines.interpolant_pipeline_network import NetworkView, view_network
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from .adapters import Adapters
from .conventions import CONVENTIONS
from .network import TextNetwork
from .notes import note

#: What says of a folder that it is a student (see `student`).
STUDENT = "student.json"
#: In names of models that were distilled to a few steps.
_FEW_STEPS = re.compile(r"turbo|lightning|schnell|hyper-?sd|(?<![a-z])lcm(?![a-z])|(?<!\d)[1-8]-?step", re.IGNORECASE)


class TextToImageTeacher:
    """
    A stock pipeline as trainers see a teacher.

    Args:
        pipeline: of a class in `CONVENTIONS`.
        size: height and width in pixels; the pipeline's own when not given.
        lora_rank: rank of the adapters that copies of the network are; None makes copies networks.
        lora_targets: the layers that they change; the convention's when empty.

    Raises:
        InputError: for a size that its tokens do not divide, layers that it does not have, or a scheduler of another kind
            of model than such pipelines are.

    Attributes:
        transformer (`TextNetwork`): the network.
        scheduler: its path and times.
        vae: its autoencoder.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        size: tuple[int, int] | None = None,
        lora_rank: int | None = None,
        lora_targets: tuple[str, ...] = (),
    ):
        self.pipeline = pipeline
        self.convention = convention = CONVENTIONS[type(pipeline).__name__]
        base = getattr(pipeline, convention.network)
        self.size = size or self.default_size
        check_scheduler(pipeline)
        adapters = lora_rank and Adapters(base, lora_rank, lora_targets or convention.lora_targets)
        self.transformer = TextNetwork(base, convention, self.latent_shape, adapters or None)
        try:
            self.scheduler = StochasticInterpolantScheduler(**convention.path(pipeline))
        except ValueError as error:
            raise InputError(f"The scheduler of this {type(pipeline).__name__} does not fit: {error}") from error
        self.vae = pipeline.vae
        self.config: dict[str, Any] = {"id2label": None, "vae_pixel_min": -1.0, "image_upsampling": None}

    @property
    def network(self) -> NetworkView:
        return view_network(self.transformer)

    @property
    def default_size(self) -> tuple[int, int]:
        """The pipeline's own height and width."""
        side = getattr(self.pipeline, "default_sample_size", None)
        if side is None:
            side = getattr(getattr(self.pipeline, self.convention.network).config, "sample_size", None) or 128
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of latents of `size`."""
        factor = self.pipeline.vae_scale_factor
        unit = math.lcm(factor * self.convention.patch, self.convention.multiple)
        if any(side < unit or side % unit for side in self.size):
            raise InputError(
                f"`height` and `width` are {self.size[0]} and {self.size[1]}, but a {type(self.pipeline).__name__} makes "
                f"images whose sides are multiples of {unit} pixels."
            )
        network = getattr(self.pipeline, self.convention.network)
        channels = network.config.in_channels // (4 if self.convention.packed else 1)
        return channels, self.size[0] // factor, self.size[1] // factor

    def pipeline_with(self, network: TextNetwork, **components: Any) -> DiffusionPipeline:
        """A stock pipeline with another network, and other components; this one's own is not changed."""
        pipeline = copy.copy(self.pipeline)  # with the same components
        pipeline.register_modules(**{self.convention.network: network.base}, **components)
        return pipeline

    @property
    def _is_video(self) -> bool:
        """Whether the autoencoder is one of videos, here of one frame."""
        return type(self.vae).__name__ == "AutoencoderKLQwenImage"

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, 8 H, 8 W) or so, about [-1, 1]."""
        z = LatentScaling.of(self.vae).decode(latents).to(self.vae.dtype)
        images = self.vae.decode(z.unsqueeze(2) if self._is_video else z, return_dict=False)[0]
        return images[:, :, 0] if self._is_video else images

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the mean of their latents (B, C, H/8, W/8) or so."""
        images = images.to(self.vae.dtype)
        encoded = self.vae.encode(images.unsqueeze(2) if self._is_video else images, return_dict=False)[0]
        z = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
        return LatentScaling.of(self.vae).encode(z[:, :, 0] if self._is_video else z).float()


def is_text_to_image(name: str, role: str = "pipeline") -> bool:
    """Whether a folder or repository was saved from a class of `CONVENTIONS`; arguments and errors as of `saved_class`."""
    return saved_class(name, role) in CONVENTIONS


def check_scheduler(pipeline: DiffusionPipeline) -> None:
    """Refuses noise levels of another kind of model; the path may be the network's own, and then nothing else would notice.

    Raises:
        InputError: for a flow of a network that predicts noise, and the reverse.
    """
    scheduler, kind = pipeline.scheduler, type(pipeline).__name__
    flows = type(scheduler).__name__.startswith("FlowMatch")
    flows |= scheduler.config.get("prediction_type") == "flow_prediction"
    if flows != (CONVENTIONS[kind].network == "transformer"):
        raise InputError(
            f"The scheduler of this {kind} is a {type(scheduler).__name__}, which {'is' if flows else 'is not'} one of flow "
            f"matching, and the network of a {kind} {'does not match' if flows else 'matches'} flows: restore its own."
        )


def not_text_to_image(name: str) -> str:
    """Why a folder or repository cannot be loaded as a text-to-image pipeline, in a sentence."""
    if (Path(name) / STUDENT).is_file():
        return (
            f"{name!r} is a student's adapter and no pipeline: give the base that its {STUDENT} names, or write the two as "
            "one pipeline (`si-distill publish --merged`)."
        )
    known = f"the text-to-image pipelines known here: {', '.join(CONVENTIONS)}."
    if kind := saved_class(name):
        return f"{name!r} was saved as {kind}, which is none of {known}"
    what = "holds no pipeline" if Path(name).exists() else "is no folder, and was not found on the Hub"
    return f"{name!r} {what}: give one of {known}"


def warn_of_distilled(name: str, pipeline: DiffusionPipeline, scales: Sequence[float]) -> None:
    """Says of a teacher that was distilled before what that means for its students.

    Args:
        name: the folder or repository.
        pipeline: what was loaded from it.
        scales: of guidance, of all roles.
    """
    convention = CONVENTIONS[type(pipeline).__name__]
    told = getattr(pipeline, convention.network).config.guidance_embeds if convention.told_guidance else None
    if told and any(scale != 1 for scale in scales):
        note(
            f"this {type(pipeline).__name__} is guidance-distilled and has not learned empty prompts: guidance scales other "
            f"than 1 ({', '.join(f'{scale:g}' for scale in scales)}) lead its students away from it. Set "
            "`text.told_guidance` instead."
        )
    few = _FEW_STEPS.search(Path(name).name)
    reasons = (
        f"it has a {STUDENT}" if (Path(name) / STUDENT).is_file() else None,
        f"its name has {few[0]!r} in it" if few else None,
        "it is told no guidance, like FLUX.1-schnell" if told is False else None,
    )
    if why := " and ".join(filter(None, reasons)):
        note(
            f"the teacher {name!r} seems to be distilled to a few steps already ({why}). It knows few noise levels, and "
            "what it says at others does not guide a student: take the model that it was distilled from."
        )


def load_stock_pipeline(
    name: str, dtype: torch.dtype | None = None, revision: str | None = None, **components: Any
) -> DiffusionPipeline:
    """A stock text-to-image pipeline; `revision` is of a Hub id, `components` take the place of those that were saved, None
    leaves one out.

    Raises:
        InputError: when it cannot be loaded.
    """
    kind = saved_class(name)
    if kind not in CONVENTIONS:
        raise InputError(not_text_to_image(name))
    check_whole(name, kind, revision, components)
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(name, dtype=dtype, revision=revision, **components)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"Cannot load the {kind} {name!r}: {error}") from error
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
            # diffusers only warns, and leaves them without values.
            lost = [key for key, value in component.state_dict().items() if value.is_meta and part not in components]
            if lost:
                raise InputError(
                    f"The {part} of {name!r} lacks {len(lost)} tensors that its config asks for, e.g. {lost[0]}: the "
                    "weights and the config do not belong together. Restore them."
                )
    check_scheduler(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_whole(name: str, kind: str, revision: str | None = None, given: Container[str] = ()) -> None:
    """Refuses a pipeline that was saved without a component that it needs, or whose index does not say its class.

    Args:
        name: the folder or Hub id.
        kind: its class, one of `CONVENTIONS`.
        revision: of a Hub id.
        given: components that are not looked for.

    Raises:
        InputError: says which are missing.
    """
    cls = getattr(diffusers, kind)
    try:
        index = cls.load_config(name, revision=revision)
    except OSError:
        return  # the loading says why
    # Of SDXL's encoders either is optional to diffusers, but its network is told by both.
    optional = {part for part in cls._optional_components if not part.startswith(("text_encoder", "tokenizer"))}
    taken = inspect.signature(cls.__init__).parameters.values()
    needed = {p.name for p in taken if p.name != "self" and p.default is p.empty} - optional
    lost = [part for part in sorted(needed) if part not in given and not _names_class(index.get(part))]
    if lost:
        raise InputError(
            f"The {kind} {name!r} was saved without its {' and '.join(lost)}: give one that is whole, or load the missing "
            "part from the pipeline that this one is of, put it in, and save it again."
        )


def _names_class(entry: Any) -> bool:
    """Whether an entry of a pipeline's index is a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
