"""Images in one network evaluation, or a few: the pipeline of a distilled student.

This file travels as `pipeline.py`, with its helpers, into every saved student: they import only torch, diffusers and
what diffusers requires.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .interpolant_condition import Condition  # noqa: F401 - a helper's import: what travels is what is named here
from .interpolant_field import Guidance
from .interpolant_latents import LatentScaling  # noqa: F401 - likewise
from .interpolant_pipeline_base import InterpolantPipelineBase, InterpolantPipelineOutput
from .interpolant_pipeline_folder import SelfContainedFolderMixin
from .interpolant_pipeline_images import ImageInput
from .interpolant_pipeline_labels import ClassLabels
from .interpolant_pipeline_network import NetworkView  # noqa: F401 - likewise


class OneStepInterpolantPipeline(SelfContainedFolderMixin, InterpolantPipelineBase):
    """
    Images from a one-step student G(x1, y) = x̂0(β(t) x1, t, y) at t = the scheduler's `init_time`. Of a bridge x1 is an
    image, and noise, if the student takes any, is seen next to it. A student that was trained for several steps (the
    scheduler's `student_steps`) goes on from x̂0 as the scheduler's solver says.

    Args:
        transformer ([`ModelMixin`]): the student, called as `(hidden_states, timestep, class_labels)`, with a `condition` if
            it has `condition_channels`.
        scheduler ([`SchedulerMixin`]): a `StochasticInterpolantScheduler` with the student's `init_time`.
        vae ([`ModelMixin`], *optional*): decodes latents; without one the student's images are pixels in [-1, 1].
        id2label (`dict`, *optional*): names of the classes, each a name or comma-separated synonyms.
        vae_pixel_min (`float`): the darkest pixel for the VAE, −1, or 0 for latents of EDM2.
        image_upsampling (`dict`, *optional*): how a network that enlarges takes small images, e.g.
            `{"factor": 2, "mode": "nearest"}`.
        guidance (`dict`, *optional*): of a student that was distilled with classifier-free guidance inside itself, such as
            `{"scale": 4.0, "channels": 3}`: it takes TWO network evaluations for an image. `channels` are the first ones of
            the prediction that are guided; None is all.

    Raises:
        ValueError: as the base class, and for a `guidance` that is not of this form or needs a null class.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        vae_pixel_min: float = -1.0,
        image_upsampling: dict | None = None,
        guidance: dict | None = None,
    ):
        super().__init__(transformer, scheduler, vae, id2label, vae_pixel_min, image_upsampling)
        if guidance is not None:
            try:
                Guidance(**guidance)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"`guidance` is {guidance!r}; it holds a `scale` of at least 0 and `channels`, a number or None: {error}"
                ) from None
            if self.network.null_class is None:
                raise ValueError("`guidance` needs a student with a null class, and this one has none.")
        self.register_to_config(guidance=guidance)

    @property
    def num_network_evaluations(self) -> int:
        """Evaluations of the network for one image: one for each step, two of a student with guidance inside itself."""
        return self.trained_steps[-1] * (1 if self.config.guidance is None else 2)

    @property
    def guidance_scale(self) -> float:
        """w inside the student itself; 1, and one evaluation for a step, of one that was distilled without."""
        return (self.config.guidance or {}).get("scale", 1.0)

    @property
    def trained_steps(self) -> list[int]:
        """The numbers of steps that the student was trained for, rising; a call takes the last by default."""
        return list(self.scheduler.config.get("student_steps") or [1])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int | None = None,
        image: ImageInput | None = None,
        num_images_per_input: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature, never changed
    ) -> InterpolantPipelineOutput | tuple[Any]:
        """
        Generates one image for each label or each given image, with exactly one evaluation of the network for each step
        (two of a student with `guidance`).

        Args:
            class_labels (`int`, `str`, `list` of these, or integer `torch.Tensor` of shape (B,)): classes,
                0 … num_classes − 1, or their names. Not given for an unconditional network.
            num_inference_steps (`int`, *optional*): one of `trained_steps`, the largest when not given; a one-step student
                has 1.
            guidance_scale (`float`): 1; the guidance of the teacher is already inside the student.
            generator (`torch.Generator` or a list of B of them, *optional*): makes the images reproducible; with a list,
                each image depends on its own generator only.
            latents (`torch.Tensor` of shape (B, *noise_shape), *optional*): standard normal noise: x1, or what a bridge's
                student sees next to x1.
            batch_size (`int`, *optional*): number of images B of an unconditional network; 1 when not given.
            image (PIL image, `np.ndarray`, `torch.Tensor`, or a list of these, *optional*): what a bridge starts from, or a
                network sees next to x_t: B images of the network's size and channels; of a network that enlarges also small
                ones (see `image_upsampling`). Arrays are (H, W, C) in [0, 1], tensors (C, H, W) in [-1, 1], both with or
                without a batch axis, or uint8.
            num_images_per_input (`int`): images for each given one, from different noise; they follow each other.
            output_type (`str`): `"pil"`, `"np"` (B, H, W, C) in [0, 1], `"pt"` (B, C, H, W) in [0, 1], or `"latent"`,
                the network's x̂0 before decoding.
            return_dict (`bool`): whether to return an `InterpolantPipelineOutput` or a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipeline, step, timestep, tensors)` before
                decoding; may return `{"latents": …}` to change them, and set `pipeline._interrupt` to skip further steps.
            callback_on_step_end_tensor_inputs (`list[str]`): the tensors that it sees; `"latents"` is the one there is.

        Examples:

        ```py
        >>> import torch
        >>> from si_distill import OneStepInterpolantPipeline

        >>> pipe = OneStepInterpolantPipeline.from_pretrained("runs/digits-student")
        >>> images = pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(0)).images

        >>> enlarge = OneStepInterpolantPipeline.from_pretrained("runs/digits-superres-student")
        >>> larger = enlarge(image=small, class_labels=[3, 7], num_images_per_input=4).images
        ```

        Returns:
            `InterpolantPipelineOutput` or `tuple`: `images` holds the B images.

        Raises:
            ValueError: for an argument out of range, or when steps or guidance are asked for.
            TypeError: for a label that is neither an integer nor a string.
        """
        # 1. Check inputs
        trained = self.trained_steps
        steps = trained[-1] if num_inference_steps is None else num_inference_steps
        if type(steps) is not int or steps not in trained:
            known = "one step" if trained == [1] else f"{', '.join(map(str, trained))} steps"
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}, but this student has {known}: it was not trained at "
                "other times. Leave the argument out, or sample the teacher with `InterpolantPipeline`."
            )
        if not isinstance(guidance_scale, (int, float)) or guidance_scale is True or guidance_scale != 1:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale!r}, but a student takes none: the guidance it was distilled "
                "with is already inside. Leave the argument out, or distill again with another teacher guidance."
            )
        device = self._execution_device
        image = self.prepare_image(image, num_images_per_input, device)
        labels, batch_size = self.prepare_labels(class_labels, batch_size, device, image, num_images_per_input)
        self.check_inputs(batch_size, generator, latents, output_type, callback_on_step_end_tensor_inputs)

        # 2. Prepare the times, the noise, and what the network sees next to x_t
        self.scheduler.set_timesteps(steps, device=device)
        noise = self.prepare_noise(batch_size, device, generator, latents)
        latents = self.prepare_latents(noise, image, self.scheduler.init_noise_sigma)
        condition = self.prepare_condition(labels, image, noise)

        # 3. The steps, of which the scheduler's last returns the x̂0-prediction
        field = self.field(guidance=Guidance(**(self.config.guidance or {})))
        self._num_timesteps, self._interrupt = len(self.scheduler.timesteps), False
        for step, timestep in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                break
            prediction = field.predict(latents, timestep, condition)
            latents = self.scheduler.step(prediction, timestep, latents, generator=generator, return_dict=False)[0]
            latents = self.apply_callback(
                callback_on_step_end, step, timestep, latents, callback_on_step_end_tensor_inputs
            )

        # 4. Decode
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        output = InterpolantPipelineOutput(images=images, num_network_evaluations=field.evaluations)
        return output if return_dict else (images,)
