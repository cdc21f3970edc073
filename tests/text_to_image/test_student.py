"""Exported students in stock diffusers, in a process of its own that knows nothing of si_distill."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import ALL, FLOWS, build

from si_distill.errors import InputError
from si_distill.pipelines import Field
from si_distill.sample_noise import SampleNoise
from si_distill.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from si_distill.text_to_image.student import LORA_WEIGHTS, STUDENT, TextToImageStudent, is_text_student, load_student
from si_distill.text_to_image.teacher import TextToImageTeacher
from si_distill.text_to_image.texts import encode_texts
from si_distill.training.distillation.levels import Level, Levels

HERE = Path(__file__).parent
PROMPTS = ["a red fox in the snow", "two boats"]
#: Of images in [0, 1]. The same operations in the same precision: what is left is the order of additions.
TOLERANCE = 1e-4


def settings(name):
    return SimpleNamespace(
        max_length=None if name in ("sd15", "sdxl") else 64, told_guidance=3.5 if name == "flux" else None
    )


def disturbed(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def scheduler(teacher, **student):
    return StochasticInterpolantScheduler.from_config(
        teacher.scheduler.config, **{"solver": "ddim", "student_steps": [1, 4], **student}
    )


def shown(teacher, latents):
    return (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def our_images(teacher, network, scheduler, texts, x1):
    """The images of all numbers of steps: where the trainer's levels stand before the last step, and that step."""
    teacher.transformer.null = None
    field = Field(lambda x, t, c: network(x, t, guidance=c.guidance, **c.text), scheduler)
    condition, images = texts.condition(torch.arange(2)), {}
    for count in scheduler.config.student_steps:
        level = Level(count, count - 1)
        x_t, t = Levels(scheduler, 0).state(field, x1, level, condition, SampleNoise(0), (0,), range(2))
        images[str(count)] = shown(teacher, field.sample(x_t, t, condition))
    return images


@torch.no_grad()
def renoised_images(teacher, network, scheduler, texts, x1):
    """Four re-noising steps, with the noise that a stock call draws."""
    field = Field(lambda x, t, c: network(x, t, guidance=c.guidance, **c.text), scheduler)
    condition, pipeline = texts.condition(torch.arange(2)), teacher.pipeline
    torch.manual_seed(5)
    scheduler.set_timesteps(4)
    x_t = x1 * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = torch.randn_like(pipeline._pack_latents(x1, *x1.shape) if teacher.convention.packed else x1)
        if teacher.convention.packed:
            height, width = teacher.size
            noise = pipeline._unpack_latents(noise, height, width, pipeline.vae_scale_factor).view_as(x1)
        x_t = scheduler.step(field.predict(x_t, t, condition), t, x_t, variance_noise=noise, return_dict=False)[0]
    return shown(teacher, x_t)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(images of stock calls, our images), each by the names of calls, and the folder."""
    root = tmp_path_factory.mktemp("students")
    ours, jobs = {}, []
    for name in ALL:
        pipeline = build(name)
        pipeline.save_pretrained(root / name)
        told = settings(name)
        texts = encode_texts(pipeline, PROMPTS, told.max_length, told_guidance=told.told_guidance)
        teacher = TextToImageTeacher(pipeline, (32, 32), lora_rank=4)
        x1 = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
        latents = pipeline._pack_latents(x1, *x1.shape) if teacher.convention.packed else x1
        save_file({"latents": latents.contiguous()}, root / f"{name}.safetensors")
        student, style = (disturbed(copy.deepcopy(teacher.transformer), seed) for seed in (1, 2))
        # Shifted levels where the path has them; a number of steps whose times on SD's grid are no stock scheduler's.
        plain = scheduler(teacher, timestep_shift=1.0 if name in ("sd15", "sdxl") else 3.0)
        renoise = scheduler(teacher, solver="renoise", student_steps=[4])
        for folder, network, steps in (
            (f"{name}-lora", student, plain),
            (f"{name}-style", style, plain),
            (f"{name}-renoise", student, renoise),
        ):
            TextToImageStudent(teacher, network, steps, str(root / name), told).save_pretrained(root / folder)
        ours |= {f"{name}/{key}": value for key, value in our_images(teacher, student, plain, texts, x1).items()}
        ours[f"{name} renoise/4"] = renoised_images(teacher, student, renoise, texts, x1)
        ours[f"{name}/base"] = our_images(
            teacher, teacher.transformer, scheduler(teacher, student_steps=[1]), texts, x1
        )["1"]
        jobs += [
            {"name": name, "pipeline": name, "folder": f"{name}-lora", "whole": False, "stack": f"{name}-style"},
            {"name": f"{name} renoise", "pipeline": name, "folder": f"{name}-renoise", "whole": False, "stack": None},
        ]
        teacher = TextToImageTeacher(build(name), (32, 32))
        before = dict(teacher.pipeline.components), dict(teacher.pipeline.config)
        student = disturbed(copy.deepcopy(teacher.transformer), 1)
        full = TextToImageStudent(teacher, student, plain, str(root / name), told)
        full.save_pretrained(root / f"{name}-full")
        assert dict(teacher.pipeline.components) == before[0]
        assert dict(teacher.pipeline.config) == before[1]
        ours |= {f"{name} full/{key}": value for key, value in our_images(teacher, student, plain, texts, x1).items()}
        jobs.append({"name": f"{name} full", "pipeline": name, "folder": f"{name}-full", "whole": True, "stack": None})
    (root / "jobs.json").write_text(json.dumps(jobs))
    run = subprocess.run([sys.executable, HERE / "stock_calls.py", root], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return SimpleNamespace(theirs=load_file(root / "images.safetensors"), ours=ours, root=root)


def assert_images(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["", " full"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stock_call_makes_the_image_of_training(exported, name, kind, steps):
    assert_images(exported.theirs[f"{name}{kind}/{steps}"], exported.ours[f"{name}{kind}/{steps}"])
    assert (exported.ours[f"{name}{kind}/{steps}"] - exported.ours[f"{name}/base"]).abs().max() > 100 * TOLERANCE
