"""What the one-step and the multi-step pipeline share: labels, noise, decoding.

A copy of this file travels beside `pipeline.py` into every saved pipeline: it imports only torch, diffusers and siblings.
"""

import difflib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .interpolant_latents import LatentScaling
from .interpolant_pipeline_network import NetworkView, guided_outputs, view_network

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

ClassLabels = int | str | list[int | str] | torch.Tensor


@dataclass
class InterpolantPipelineOutput(ImagePipelineOutput):
    """
    Output of the pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): the B images, in the form of `output_type`.
        num_network_evaluations (`int`): how often the network was evaluated for each image; a forward with guidance, which
            has two rows for an image, counts 2.
    """

    num_network_evaluations: int


class InterpolantPipelineBase(DiffusionPipeline):
    """
    Image pipeline on a stochastic interpolant, with classes or without; subclasses write `__call__`.

    Args:
        transformer ([`ModelMixin`]): the network, called as `(hidden_states, timestep, class_labels)`; its config has
            `sample_size`, `in_channels` and `num_classes` (0: unconditional). Or diffusers' `DiTTransformer2DModel` or
            `UNet2DModel`.
        scheduler ([`SchedulerMixin`]): a `StochasticInterpolantScheduler`.
        vae ([`ModelMixin`], *optional*): `AutoencoderKL`, `AutoencoderTiny` or alike. Without one the network's images
            are pixels in [-1, 1].
        id2label (`dict`, *optional*): names of the classes, e.g. `{1: "goldfish, Carassius auratus"}`. A name may be a
            comma-separated list of synonyms.
        vae_pixel_min (`float`): the darkest pixel of the images that the VAE was used with, −1 or 0; the brightest is 1.
            Latents of EDM2 are those of images in [0, 1].

    Raises:
        ValueError: for an `id2label` whose keys are not classes of the network or whose values are not names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        vae_pixel_min: float = -1.0,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=_checked_names(id2label, view_network(transformer).num_classes), vae_pixel_min=vae_pixel_min
        )
        self.image_processor = VaeImageProcessor()

    @property
    def network(self) -> NetworkView:
        """What the `transformer`, of whatever class, takes and gives."""
        return view_network(self.transformer)

    def prepare_labels(
        self, class_labels: ClassLabels | None, batch_size: int | None, device: torch.device
    ) -> tuple[torch.Tensor | None, int]:
        """
        The classes (B,) on the device, or None for an unconditional network, and the number B of images.

        Raises:
            ValueError: for labels of an unconditional network or none of a conditional one, or a `batch_size` that is no
                number of images.
        """
        if self.network.num_classes:
            if class_labels is None or batch_size is not None:
                raise ValueError(
                    f"This network has {self.network.num_classes} classes: pass `class_labels`, one for each image, and no "
                    "`batch_size`."
                )
            labels = torch.tensor(self.get_label_ids(class_labels), device=device)
            return labels, len(labels)
        if class_labels is not None:
            raise ValueError("`class_labels` were given, but this network is unconditional: pass `batch_size` instead.")
        batch_size = 1 if batch_size is None else batch_size
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a number of images, at least 1, got {batch_size!r}.")
        return None, batch_size

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        The classes that a user's labels mean.

        Args:
            class_labels (`int`, `str`, `list` of these, or integer `torch.Tensor` of shape (B,)): a string is one
                label: a name of `id2label`, or one of its comma-separated synonyms.

        Returns:
            `list[int]`: B classes, each in 0 … num_classes − 1.

        Raises:
            ValueError: for no labels, an unknown or ambiguous name, or a class out of range.
            TypeError: for a label that is neither an integer nor a string.
        """
        if hasattr(class_labels, "tolist"):  # a tensor, a NumPy array or a NumPy number
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not len(class_labels):
            raise ValueError("`class_labels` is empty; pass at least one label.")
        return [self._class_of_name(label) if isinstance(label, str) else self._class(label) for label in class_labels]

    def _class(self, label: Any) -> int:
        try:
            if isinstance(label, bool):  # True would be taken for class 1
                raise TypeError
            value = operator.index(label)
        except TypeError:
            raise TypeError(
                f"{label!r} of type {type(label).__name__} is no class label; labels are integers or names (a flat list "
                "or tensor of them for a batch)."
            ) from None
        num_classes = self.network.num_classes
        if num_classes == 0:
            raise ValueError(f"The class {value} was given, but this network is unconditional: leave labels out.")
        if not 0 <= value < num_classes:
            raise ValueError(f"The class {value} is out of range: this network has the classes 0 to {num_classes - 1}.")
        return value

    def _class_of_name(self, name: str) -> int:
        id2label = self.config.id2label
        if not id2label:
            raise ValueError(
                f"The label {name!r} is a name, but this pipeline has no `id2label`; pass the number of the class, 0 to "
                f"{self.network.num_classes - 1}."
            )
        whole: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        for key, names in id2label.items():
            whole.setdefault(names.strip(), []).append(key)
            for synonym in names.split(","):
                synonyms.setdefault(synonym.strip(), []).append(key)
        found = whole.get(name.strip()) or synonyms.get(name.strip()) or []
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"The label {name!r} is the name of several classes: {', '.join(map(str, found))}. Pass the number."
            )
        close = difflib.get_close_matches(name.strip(), synonyms, n=3, cutoff=0.5)
        hint = (
            f" Did you mean {' or '.join(map(repr, close))}?" if close else f" One of them is {next(iter(synonyms))!r}."
        )
        raise ValueError(
            f"Unknown label {name!r}; `pipeline.config.id2label` names {len(id2label)} classes ({len(synonyms)} names)."
            f"{hint}"
        )

    def check_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> None:
        """
        Refuses what would fail, or silently mean something else, deep inside.

        Raises:
            ValueError: for an unknown output type or callback tensor, a list of generators or `latents` that do not fit
                the number of images.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown `output_type` {output_type!r}. Choose one of: {', '.join(OUTPUT_TYPES)}.")
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; this pipeline offers "
                f"{self._callback_tensor_inputs}."
            )
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(
                f"There are {len(generator)} generators for {batch_size} images; pass one for each image, or a single "
                "generator for the batch."
            )
        shape = self._latents_shape(batch_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but {batch_size} images of this network need {shape}."
            )

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return (batch_size, *self.network.sample_shape)

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        init_noise_sigma: float = 1.0,
    ) -> torch.Tensor:
        """
        The state x_t at the first time, (B, C, H, W): standard normal noise times `init_noise_sigma`.

        Noise is drawn in float32 whatever the network's dtype, so that all its variants see the same, and the state stays
        in float32 (or wider): only the network computes in its own dtype.

        Args:
            latents (`torch.Tensor` of shape (B, C, H, W), *optional*): standard normal noise to use instead.
        """
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            latents = randn_tensor(
                self._latents_shape(batch_size), generator=generator, device=device, dtype=torch.float32
            )
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        return latents.to(device=device, dtype=dtype) * init_noise_sigma

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
    ) -> torch.Tensor:
        """One forward of the network at (x_t, t), (B, C, H, W) and a scalar, in the network's dtype."""
        # Scaled before the cast: what the network sees has unit size, x_t itself may be 80 times that.
        network_input = self.scheduler.scale_model_input(latents, timestep)
        network_time = self.scheduler.network_time(timestep.to(device=latents.device, dtype=torch.float32))
        return guided_outputs(
            self.transformer,
            network_input.to(self.transformer.dtype),
            network_time.expand(len(latents)),
            class_labels,
            self.network.null_class,
            guidance_scale,
            guidance_channels=guidance_channels,
        )[0]

    def apply_callback(
        self,
        callback: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None,
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        tensor_inputs: list[str],
    ) -> torch.Tensor:
        """The state after the user's callback, which may return another."""
        if callback is None:
            return latents
        kwargs = {"latents": latents} if "latents" in tensor_inputs else {}
        return (callback(self, step, timestep, kwargs) or {}).get("latents", latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Images in [-1, 1], (B, channels, height, width), of the network's output: `latents` themselves without a VAE,
        otherwise what the VAE decodes, both scaled as [`LatentScaling`] says.
        """
        if self.vae is None:
            return latents
        scaling = LatentScaling.of(self.vae, self.config.vae_pixel_min)
        return scaling.decode_pixels(self.vae.decode(scaling.decode(latents).to(self.vae.dtype), return_dict=False)[0])

    def postprocess(self, latents: torch.Tensor, output_type: str) -> Any:
        """The output that the user asked for; one channel becomes a PIL image of mode "L"."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode(latents), output_type=output_type)


def _checked_names(id2label: dict | None, num_classes: int) -> dict[int, str] | None:
    if id2label is None:
        return None
    if num_classes == 0:
        raise ValueError("`id2label` names classes, but the network is unconditional: leave it out.")
    names = {}
    for key, name in id2label.items():
        try:
            number = int(key)  # JSON turns integer keys into strings
        except (TypeError, ValueError):
            raise ValueError(f"The key {key!r} of `id2label` is not the number of a class.") from None
        if not 0 <= number < num_classes or not isinstance(name, str):
            raise ValueError(
                f"`id2label` has the entry {key!r}: {name!r}; it maps classes, 0 to {num_classes - 1}, to names."
            )
        names[number] = name
    return names
