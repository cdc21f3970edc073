"""Images by solving the ODE or an SDE of an interpolant in many steps: the pipeline of a teacher.

This file travels as `pipeline.py`, with its helpers, into every saved teacher: they import only torch, diffusers and
what diffusers requires.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .interpolant_condition import Condition  # noqa: F401 - a helper's import: what travels is what is named here
from .interpolant_field import Guidance
from .interpolant_latents import LatentScaling  # noqa: F401 - likewise
from .interpolant_pipeline_base import InterpolantPipelineBase, InterpolantPipelineOutput
from .interpolant_pipeline_folder import SelfContainedFolderMixin
from .interpolant_pipeline_images import ImageInput
from .interpolant_pipeline_labels import ClassLabels
from .interpolant_pipeline_network import NetworkView  # noqa: F401 - likewise
from .interpolant_probability_flow import ProbabilityFlow

#: Settings of the scheduler that a call may override.
SOLVER_SETTINGS = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size", "rtol", "atol", "first_step_size")


class InterpolantPipeline(SelfContainedFolderMixin, InterpolantPipelineBase):
    """
    Images from a teacher: dx/dt = v(x, t, y) from noise, or from the image of a bridge, to data, with classifier-free
    guidance.

    Args:
        transformer ([`ModelMixin`]): the teacher, called as `(hidden_states, timestep, class_labels)`, with a `condition` if
            it has `condition_channels`; guidance needs its `null_class`.
        scheduler ([`SchedulerMixin`]): a `StochasticInterpolantScheduler`.
        vae ([`ModelMixin`], *optional*): decodes latents; without one the images are pixels in [-1, 1].
        id2label (`dict`, *optional*): names of the classes, each a name or comma-separated synonyms.
        vae_pixel_min (`float`): the darkest pixel for the VAE, −1, or 0 for latents of EDM2.
        image_upsampling (`dict`, *optional*): how a network that enlarges takes small images, e.g.
            `{"factor": 2, "mode": "nearest"}`.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        solver: str | None = None,
        solver_kwargs: dict[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int | None = None,
        image: ImageInput | None = None,
        num_images_per_input: int = 1,
        timesteps: list[float] | torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature, never changed
    ) -> InterpolantPipelineOutput | tuple[Any]:
        """
        Generates one image for each label or each given image.

        Args:
            class_labels (`int`, `str`, `list` of these, or integer `torch.Tensor` of shape (B,)): classes,
                0 … num_classes − 1, or their names. Not given for an unconditional network.
            num_inference_steps (`int`): N, at least 1; not used when `timesteps` is given, or by `"dopri5"`.
            guidance_scale (`float`): w ≥ 0 in v_∅ + w (v_y − v_∅). 1 is no guidance; otherwise each forward has 2 B rows.
            guidance_interval (`tuple[float, float]`): smallest and largest time with guidance (Kynkäänniemi et al. 2024,
                "Applying Guidance in a Limited Interval"); at others w is 1.
            guidance_channels (`int`, *optional*): guides only the first channels, as SiT's sampler does with 3; None is all.
            solver (`str`, *optional*): `"euler"`, `"heun"`, `"ddim"`, `"edm_heun"`, `"dpmpp_2m"`, `"sde_euler"`,
                `"sde_heun"`, `"dopri5"`, or of a bridge `"posterior"` (see `StochasticInterpolantScheduler`); None takes the
                scheduler's.
            solver_kwargs (`dict`, *optional*): settings of the scheduler for this call: `diffusion_form`, `diffusion_norm`,
                `last_step`, `last_step_size` of an SDE, `rtol`, `atol` of `"dopri5"`, `first_step_size` of a bridge's ODE.
            generator (`torch.Generator` or a list of B of them, *optional*): makes the images reproducible; with a list,
                each image depends on its own generator only (with `"dopri5"` on the others within the tolerance: its steps
                are chosen for the batch).
            latents (`torch.Tensor` of shape (B, C, sample_size, sample_size), *optional*): standard normal noise x1; not of
                a bridge, which starts at `image`.
            batch_size (`int`, *optional*): number of images B of an unconditional network; 1 when not given.
            image (PIL image, `np.ndarray`, `torch.Tensor`, or a list of these, *optional*): what a bridge starts from, or a
                network sees next to x_t: B images of the network's size and channels; of a network that enlarges also small
                ones (see `image_upsampling`). Arrays are (H, W, C) in [0, 1], tensors (C, H, W) in [-1, 1], both with or
                without a batch axis, or uint8.
            num_images_per_input (`int`): images for each given one, from different noise; they follow each other.
            timesteps (`list[float]`, *optional*): the start of each step: falling times in (0, 1], without the final 0.
            output_type (`str`): `"pil"`, `"np"` (B, H, W, C) in [0, 1], `"pt"` (B, C, H, W) in [0, 1], or `"latent"`,
                the sampler's result before decoding.
            return_dict (`bool`): whether to return an `InterpolantPipelineOutput` or a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipeline, step, timestep, tensors)` after
                each evaluation; may return `{"latents": …}` to change them, and set `pipeline._guidance_scale` of the
                evaluations that follow, or `pipeline._interrupt` to skip them.
            callback_on_step_end_tensor_inputs (`list[str]`): the tensors that it sees; `"latents"` is the one there is.

        Examples:

        ```py
        >>> import torch
        >>> from si_distill import InterpolantPipeline

        >>> teacher = InterpolantPipeline.from_pretrained("runs/digits-teacher")
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = teacher([3, 7], num_inference_steps=25, guidance_scale=1.5, solver="heun", generator=generator).images
        ```

        Returns:
            `InterpolantPipelineOutput` or `tuple`: `images` holds the B images, and the output's `num_network_evaluations`
            counts network evaluations per image; a guided one counts 2.

        Raises:
            ValueError: for an argument out of range, or guidance of a network without a null class.
            TypeError: for a label that is neither an integer nor a string.
        """
        # 1. Check inputs
        guidance = Guidance(guidance_scale, guidance_interval, guidance_channels)
        if (guidance_channels or 1) > self.network.sample_shape[0]:
            raise ValueError(
                f"`guidance_channels` is {guidance_channels}, but this network has {self.network.sample_shape[0]} channels."
            )
        device = self._execution_device
        image = self.prepare_image(image, num_images_per_input, device)
        labels, batch_size = self.prepare_labels(class_labels, batch_size, device, image, num_images_per_input)
        self.check_inputs(batch_size, generator, latents, output_type, callback_on_step_end_tensor_inputs)

        # 2. Prepare the times
        scheduler = self._scheduler_with(solver, solver_kwargs)
        adaptive = getattr(scheduler, "solver", None) == "dopri5"
        if adaptive and (timesteps is not None or callback_on_step_end is not None):
            raise ValueError(
                "The solver 'dopri5' chooses its own times: leave out `timesteps` and `callback_on_step_end`, or choose "
                "another solver."
            )
        if not adaptive:
            steps = None if timesteps is not None else num_inference_steps
            scheduler.set_timesteps(steps, device=device, timesteps=timesteps)

        # 3. Prepare the noise, and what the network sees next to x_t
        noise = self.prepare_noise(batch_size, device, generator, latents)
        latents = self.prepare_latents(noise, image, scheduler.init_noise_sigma)
        condition = self.prepare_condition(labels, image, noise)
        # Only a paired bridge's network, which saw x1, can be told of it.
        told = {"reference": image} if self.is_bridge and condition.image is not None else {}

        # 4. Solve
        field = self.field(scheduler, guidance)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._num_timesteps = None if adaptive else len(scheduler.timesteps)
        if adaptive:
            config = scheduler.config
            flow = ProbabilityFlow(field, condition, config.init_time)
            with self.progress_bar(total=math.inf) as progress_bar:  # tqdm's way to say that the end is not known
                latents = flow.sample(latents, config.rtol, config.atol, progress_bar.update)
        else:
            with self.progress_bar(total=len(scheduler.timesteps)) as progress_bar:
                for step, timestep in enumerate(scheduler.timesteps):
                    if self.interrupt:
                        break
                    prediction = field.predict(latents, timestep, condition)
                    latents = scheduler.step(
                        prediction, timestep, latents, generator=generator, return_dict=False, **told
                    )[0]
                    latents = self.apply_callback(
                        callback_on_step_end, step, timestep, latents, callback_on_step_end_tensor_inputs
                    )
                    if callback_on_step_end is not None:  # calls without one can share the pipeline
                        field.guidance = replace(guidance, scale=self.guidance_scale)
                    progress_bar.update()

        # 5. Decode
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return InterpolantPipelineOutput(images=images, num_network_evaluations=field.evaluations)

    def _scheduler_with(self, solver: str | None, solver_kwargs: dict[str, Any] | None) -> SchedulerMixin:
        """A scheduler of its own for each call, so that calls can share the pipeline, with the call's settings."""
        unknown = set(solver_kwargs or ()) - set(SOLVER_SETTINGS)
        if unknown:
            raise ValueError(
                f"`solver_kwargs` has {sorted(unknown)}; it takes the settings {', '.join(SOLVER_SETTINGS)}."
            )
        changes = {**({} if solver is None else {"solver": solver}), **(solver_kwargs or {})}
        if changes and "solver" not in self.scheduler.config:
            raise ValueError(
                f"A {type(self.scheduler).__name__} has no choice of solvers: leave out `solver` and `solver_kwargs`."
            )
        return type(self.scheduler).from_config(self.scheduler.config, **changes)
