"""What the one-step and the multi-step pipeline share: images, noise, decoding; labels are in a sibling.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch, diffusers and siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .interpolant_condition import Condition
from .interpolant_field import Field, Guidance
from .interpolant_latents import LatentScaling
from .interpolant_pipeline_images import UPSAMPLING_MODES, ImageInput, fit_images, read_images
from .interpolant_pipeline_labels import LabelsMixin, checked_names
from .interpolant_pipeline_network import NetworkView, view_network

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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


class InterpolantPipelineBase(LabelsMixin, DiffusionPipeline):
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
        image_upsampling (`dict`, *optional*): of a network that enlarges images: `{"factor": 2, "mode": "nearest"}` (or
            `"bicubic"`) is how images of size / factor are brought to the network's size, as in its training.

    Raises:
        ValueError: for an `id2label` whose keys are not classes of the network or whose values are not names, another
            `vae_pixel_min`, or an `image_upsampling` that cannot be done.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    # Of the present call, or the last one. Their names are diffusers': callbacks set the first and the last.
    _guidance_scale = 1.0
    _num_timesteps: int | None = None
    _interrupt = False

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        vae_pixel_min: float = -1.0,
        image_upsampling: dict | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        view = view_network(transformer)
        if vae_pixel_min not in (-1, 0):
            raise ValueError(f"`vae_pixel_min` is the darkest pixel for the VAE, -1 or 0, got {vae_pixel_min!r}.")
        self.register_to_config(
            id2label=checked_names(id2label, view.num_classes),
            vae_pixel_min=vae_pixel_min,
            image_upsampling=_checked_upsampling(image_upsampling, view),
        )
        self.image_processor = VaeImageProcessor()

    @property
    def network(self) -> NetworkView:
        """What the `transformer`, of whatever class, takes and gives."""
        return view_network(self.transformer)

    @property
    def guidance_scale(self) -> float:
        """w of the present call; a callback may set `_guidance_scale` for the steps after its own."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each evaluation of the present call has a row with the class and one without."""
        return self.guidance_scale != 1

    @property
    def num_timesteps(self) -> int | None:
        """How often the present call evaluates the network; None before the first call, and of `"dopri5"`."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the steps that are left are skipped; a callback, or another thread, sets `_interrupt`."""
        return self._interrupt

    @property
    def is_bridge(self) -> bool:
        """Whether sampling starts at an image instead of noise."""
        return not getattr(getattr(self.scheduler, "interpolant", None), "gaussian_reference", True)

    @property
    def image_channels(self) -> int:
        """Channels of the image that each call is given; 0 of a network that generates from noise alone."""
        return self.network.sample_shape[0] if self.is_bridge else self.network.condition_channels

    @property
    def noise_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the standard normal noise that `latents` may hold, or None where a call starts without any."""
        channels, *size = self.network.sample_shape
        channels = self.scheduler.config.noise_channels if self.is_bridge else channels
        return (channels, *size) if channels else None

    def prepare_image(
        self, image: ImageInput | None, num_images_per_input: int, device: torch.device
    ) -> torch.Tensor | None:
        """
        The images that the call starts from or is conditioned on, (B, C, sample_size, sample_size) in [-1, 1], each
        `num_images_per_input` times in a row; None of a network that takes none.

        Raises:
            ValueError: for an image of a network that takes none or none of one that does, a wrong size or number of
                channels, values out of range, or a number of images below 1.
            TypeError: for something else than images.
        """
        if type(num_images_per_input) is not int or num_images_per_input < 1:
            raise ValueError(f"`num_images_per_input` must be at least 1, got {num_images_per_input!r}.")
        channels, size = self.image_channels, self.network.sample_shape[-1]
        if not channels:
            if image is not None:
                raise ValueError("`image` was given, but this network generates from noise alone: leave it out.")
            if num_images_per_input != 1:
                raise ValueError(
                    f"`num_images_per_input` is {num_images_per_input}, but this network takes no image: pass more labels, "
                    "or a larger `batch_size`."
                )
            return None
        if image is None:
            raise ValueError(
                f"This network turns an image into another one: pass `image`, of {size}×{size} pixels and {channels} "
                f"channel{'s' if channels > 1 else ''}."
            )
        if self.vae is not None:
            raise ValueError(
                "This network works on latents, and images as input are not encoded: it cannot take `image`."
            )
        images = fit_images(read_images(image, channels), size, self.config.image_upsampling).to(device)
        return images.repeat_interleave(num_images_per_input, 0)

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
            ValueError: for an unknown output type or callback tensor, pictures of latents without a VAE, a list of
                generators or `latents` that do not fit the number of images, or `latents` that are no finite numbers.
            TypeError: for `latents` that are no tensor, or a `generator` that is none.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown `output_type` {output_type!r}. Choose one of: {', '.join(OUTPUT_TYPES)}.")
        channels = self.network.sample_shape[0]
        if output_type != "latent" and self.vae is None and channels > 3:
            raise ValueError(
                f"This network works on latents of {channels} channels, and there is no VAE to decode them: add one, or "
                "pass `output_type='latent'`."
            )
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; this pipeline offers "
                f"{self._callback_tensor_inputs}."
            )
        several = isinstance(generator, (list, tuple))
        for each in generator if several else [] if generator is None else [generator]:
            if not isinstance(each, torch.Generator):
                holds = "holds" if several else "is"
                raise TypeError(
                    f"`generator` {holds} a {type(each).__name__}; pass a `torch.Generator`, or a list of them, one for "
                    "each image."
                )
        if several and len(generator) != batch_size:
            raise ValueError(
                f"There are {len(generator)} generators for {batch_size} images; pass one for each image, or a single "
                "generator for the batch."
            )
        if latents is None:
            return
        if not torch.is_tensor(latents):
            raise TypeError(f"`latents` is a {type(latents).__name__}; it is a tensor of standard normal noise.")
        if self.noise_shape is None:
            raise ValueError(
                "`latents` were given, but sampling starts at `image` and draws noise on the way, if any: leave them out, "
                "and pass `generator` to make it reproducible."
            )
        shape = (batch_size, *self.noise_shape)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but {batch_size} images of this network need {shape}."
            )
        if not latents.is_floating_point():
            raise ValueError(
                f"`latents` is of {latents.dtype}; it is standard normal noise, of floating point numbers."
            )
        if not latents.isfinite().all():
            raise ValueError("`latents` holds values that are not finite.")

    def prepare_noise(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        Standard normal noise (B, *noise_shape), or None where none is taken.

        It is drawn in float32 whatever the network's dtype, so that all its variants see the same, and stays in float32
        (or wider): only the network computes in its own dtype.

        Args:
            latents (`torch.Tensor` of shape (B, *noise_shape), *optional*): noise to use instead.
        """
        if self.noise_shape is None:
            return None
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            shape = (batch_size, *self.noise_shape)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device=device, dtype=torch.promote_types(self.transformer.dtype, torch.float32))

    def prepare_latents(
        self, noise: torch.Tensor | None, image: torch.Tensor | None, init_noise_sigma: float
    ) -> torch.Tensor:
        """The state x_t at the first time, (B, C, H, W): noise times `init_noise_sigma`, or a bridge's image."""
        if not self.is_bridge:
            return noise * init_noise_sigma
        return image.to(torch.promote_types(self.transformer.dtype, torch.float32))

    def prepare_condition(
        self, labels: torch.Tensor | None, image: torch.Tensor | None, noise: torch.Tensor | None
    ) -> Condition:
        """What the network is told: the classes, and next to x_t, in its dtype, the image and a bridge student's noise."""
        seen = self.network.condition_image(image, noise if self.is_bridge else None)
        return Condition(labels, image=None if seen is None else seen.to(self.transformer.dtype))

    def field(self, scheduler: SchedulerMixin | None = None, guidance: Guidance | None = None) -> Field:
        """The network as a field on the path of the pipeline's scheduler, or of another one."""
        network = self.network
        return Field(network, scheduler or self.scheduler, network.null, guidance or Guidance(), self.transformer.dtype)

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
        """
        The output that the user asked for; one channel becomes a PIL image of mode "L".

        Raises:
            ValueError: for pictures of values that are not finite, which would look like any others.
        """
        if output_type == "latent":
            return latents
        images = self.decode(latents)
        damaged = int((~images.flatten(1).isfinite().all(1)).sum()) if output_type in ("pil", "np") else 0
        if damaged:
            raise ValueError(
                f"{damaged} of {len(images)} images hold values that are not finite: the weights are damaged, or too large "
                f"for {self.transformer.dtype}. Load the pipeline in float32 or bfloat16; if that does not help, save it "
                "again from before the training that left it so."
            )
        return self.image_processor.postprocess(images, output_type=output_type)


def _checked_upsampling(described: dict | None, view: NetworkView) -> dict[str, Any] | None:
    if described is None:
        return None
    factor, mode, size = described.get("factor"), described.get("mode"), view.sample_shape[-1]
    if set(described) != {"factor", "mode"} or mode not in UPSAMPLING_MODES:
        raise ValueError(
            f"`image_upsampling` is {described!r}; it holds a `factor` and a `mode`, one of: {', '.join(UPSAMPLING_MODES)}."
        )
    if not isinstance(factor, int) or factor < 2 or size % factor:
        raise ValueError(
            f"`image_upsampling` has the factor {factor!r}; it must be a whole number above 1 that divides {size}."
        )
    return dict(described)
