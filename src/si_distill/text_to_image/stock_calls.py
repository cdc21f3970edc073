"""Calls of stock pipelines: with a student's steps, and with a teacher's own settings."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from PIL import Image

from ..errors import InputError
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from .conventions import CONVENTIONS


def stock_scheduler(scheduler: StochasticInterpolantScheduler) -> diffusers.SchedulerMixin:
    """The stock scheduler with which a stock pipeline takes a student's steps.

    On `linear` it is `FlowMatchEulerDiscreteScheduler`. On `ddpm` it is `EulerDiscreteScheduler`: its step is DDIM's in
    x/α, and unlike `DDIMScheduler` it takes any times and starts from β(t) x1. For fresh noise at each step it is
    `LCMScheduler`, which starts from x1 itself: β is 0.998 at Stable Diffusion's last noise level.

    Raises:
        InputError: for a student that starts below t = 1 where the stock scheduler starts from pure noise.
    """
    config = scheduler.config
    renoise = config.solver == "renoise" and (config.student_steps or [1]) != [1]
    if config.init_time != 1 and (renoise or config.interpolant == "linear"):
        raise InputError(
            f"`init_time` is {config.init_time:g}, but the stock pipelines start at pure noise: a student that is to be "
            "used with them needs init_time 1."
        )
    if config.interpolant == "linear":
        return FlowMatchEulerDiscreteScheduler(shift=config.timestep_shift, stochastic_sampling=renoise)
    levels = dict(config.interpolant_kwargs, prediction_type=config.prediction_type, steps_offset=1)
    if renoise:
        return LCMScheduler(**levels, original_inference_steps=levels["num_train_timesteps"], clip_sample=False)
    return EulerDiscreteScheduler(**levels, timestep_spacing="trailing")


def student_times(
    scheduler: StochasticInterpolantScheduler, stock: diffusers.SchedulerMixin, count: int, equal_steps: bool
) -> dict[str, Any]:
    """The arguments of a stock call that takes the student's steps, the fewest that do."""
    scheduler.set_timesteps(count)
    wanted = scheduler.timesteps
    even = [(count - step) / count for step in range(count)]
    if isinstance(stock, FlowMatchEulerDiscreteScheduler):
        stock.set_timesteps(sigmas=even)
        given, further = stock.sigmas[:-1], {} if equal_steps else {"sigmas": even}
    else:
        wanted = scheduler.network_time(wanted).float()
        stock.set_timesteps(count)
        given, further = stock.timesteps.float(), {}
        if not torch.equal(given, wanted):
            further = {"timesteps": [round(time) for time in wanted.tolist()]}
            stock.set_timesteps(**further)
            given = stock.timesteps.float()
    if given.shape != wanted.shape or not torch.allclose(given, wanted, rtol=1e-5, atol=0):
        raise InputError(
            f"No call of the stock pipeline has the {count} times of this student, {wanted.tolist()}: a "
            f"{type(stock).__name__} makes {given.tolist()} of them."
        )
    return {"num_inference_steps": count, **further}


def teacher_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance_scale: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> list[Image.Image]:
    """
    One image for each prompt, by a stock pipeline with its own defaults.

    Args:
        pipeline: of a class in `CONVENTIONS`.
        prompts: the texts.
        steps: instead of the pipeline's own.
        guidance_scale: instead of the pipeline's own, and in its sense of it.
        generators: one for each prompt.
        height, width: in pixels, instead of the pipeline's own.

    Raises:
        InputError: for what the pipeline refuses.
    """
    unguided = CONVENTIONS[type(pipeline).__name__].unguided
    scale = "true_cfg_scale" if "true_cfg_scale" in unguided else "guidance_scale"
    given: dict[str, Any] = {name: value for name, value in unguided.items() if name != scale}
    if guidance_scale is not None:
        given[scale] = guidance_scale
        if scale == "true_cfg_scale":  # which has no effect without one
            given["negative_prompt"] = [" "] * len(prompts)
    own = {"num_inference_steps": steps, "height": height, "width": width}
    given |= {name: value for name, value in own.items() if value is not None}
    draws = None if generators is None else list(generators)
    try:
        return pipeline(prompt=list(prompts), generator=draws, **given).images
    except ValueError as error:
        raise InputError(f"The {type(pipeline).__name__} refuses this: {error}") from error


def prompt_rows(
    draw: Callable[[list[str], list[torch.Generator]], list[Image.Image]],
    prompts: Sequence[str],
    rows: int,
    seed: int,
    batch_size: int,
) -> list[list[Image.Image]]:
    """Rows of images, one column for each prompt; row r is drawn from seed + r in every column.

    Args:
        draw: makes an image of each prompt from its generator.
        prompts: of the columns.
        rows: images of each prompt.
        seed: of the first row.
        batch_size: images made at once.
    """
    places = [(row, prompt) for row in range(rows) for prompt in prompts]
    made: list[Image.Image] = []
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + row) for row, _ in batch]
        made += draw([prompt for _, prompt in batch], generators)
    return [made[row * len(prompts) : (row + 1) * len(prompts)] for row in range(rows)]
