"""`from_pipe`: another pipeline on the same components, with all settings; also from a folder that carries its code."""

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny_sit
from latent_caches import tiny_autoencoder

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler


def student(**settings) -> OneStepInterpolantPipeline:
    """A student on latents with a setting of every kind."""
    return OneStepInterpolantPipeline(
        tiny_sit(in_channels=4, num_classes=3),
        StochasticInterpolantScheduler(),
        tiny_autoencoder(),
        **{
            "id2label": {0: "a", 1: "b", 2: "c"},
            "vae_pixel_min": 0.0,
            "guidance": {"scale": 2.0, "channels": 3},
            **settings,
        },
    )


def images(pipeline) -> torch.Tensor:
    return pipeline(["b", "c"], generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_the_settings_come_along():
    pipeline = student()
    again = OneStepInterpolantPipeline.from_pipe(pipeline)
    assert again.transformer is pipeline.transformer
    assert torch.equal(images(again), images(pipeline))
    scheduler = StochasticInterpolantScheduler.from_config(pipeline.scheduler.config)
    other = OneStepInterpolantPipeline.from_pipe(pipeline, scheduler=scheduler, vae_pixel_min=-1.0)
    assert other.scheduler is scheduler
    assert not torch.equal(images(other), images(pipeline))  # the brightness that it was told


def test_a_folder_with_its_code(tmp_path, remote_code_cache):
    pipeline = student()
    pipeline.save_pretrained(tmp_path / "student")
    carried = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert type(carried) is not OneStepInterpolantPipeline
    for cls in (type(carried), OneStepInterpolantPipeline):
        assert torch.equal(images(cls.from_pipe(carried)), images(pipeline))


def test_a_teacher_of_a_student_and_back():
    teacher = InterpolantPipeline.from_pipe(student())
    assert teacher.config.vae_pixel_min == 0.0
    assert OneStepInterpolantPipeline.from_pipe(teacher).config.guidance is None


def test_what_does_not_fit_is_a_sentence():
    pipeline = student()
    with pytest.raises(ValueError, match=r"from_pipe does not take steps; it takes transformer, scheduler"):
        OneStepInterpolantPipeline.from_pipe(pipeline, steps=3)
    dtype = OneStepInterpolantPipeline.from_pipe(student(), torch_dtype=torch.bfloat16).transformer.dtype
    assert dtype is torch.bfloat16
