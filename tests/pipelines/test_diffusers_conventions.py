"""What diffusers' own tests of pipelines (`PipelineTesterMixin`) ask of every pipeline, where it has a meaning here."""

import inspect

import pytest
import torch
from helpers import tiny_sit

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

FEW = dict(student_steps=[1, 3], solver="renoise")


def make(cls, scheduler=None, **further):
    pipeline = cls(tiny_sit(), StochasticInterpolantScheduler(**(scheduler or {})), **further)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    pipeline.transformer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return pipeline, rows


def call(pipeline, *labels, steps=3, **arguments):
    given = dict(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent")
    return pipeline(list(labels), **{**given, **arguments}).images


@pytest.mark.parametrize("cls", [InterpolantPipeline, OneStepInterpolantPipeline])
def test_a_call_has_the_arguments_of_every_pipeline(cls):
    taken = inspect.signature(cls.__call__).parameters
    assert {
        "num_inference_steps", "guidance_scale", "generator", "latents", "output_type", "return_dict",
        "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    } <= taken.keys()  # fmt: skip
    assert taken["callback_on_step_end_tensor_inputs"].default == cls._callback_tensor_inputs == ["latents"]


def test_a_teacher_says_what_its_call_does():
    pipeline, _ = make(InterpolantPipeline)
    assert (pipeline.num_timesteps, pipeline.guidance_scale, pipeline.interrupt) == (None, 1.0, False)
    for guidance_scale, guided in ((2.0, True), (0.0, True), (1.0, False)):
        call(pipeline, 0, guidance_scale=guidance_scale)
        assert (pipeline.num_timesteps, pipeline.guidance_scale) == (3, guidance_scale)
        assert pipeline.do_classifier_free_guidance is guided
    call(pipeline, 0, solver="heun")
    assert pipeline.num_timesteps == 5
    call(pipeline, 0, solver="dopri5")
    assert pipeline.num_timesteps is None


def test_a_callback_changes_the_guidance_of_the_steps_after_it():
    pipeline, rows = make(InterpolantPipeline)

    def more(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    call(pipeline, 0, guidance_scale=2.0, callback_on_step_end=more)
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps

    def off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    rows.clear()
    images = call(pipeline, 0, guidance_scale=2.0, callback_on_step_end=off)
    assert rows == [2, 1, 1]
    # Guidance that ends with the first step is guidance in an interval.
    expected = call(pipeline, 0, guidance_scale=2.0, guidance_interval=(0.9, 1.0))
    torch.testing.assert_close(images, expected)

    def wrong(pipe, step, timestep, tensors):
        pipe._guidance_scale = float("nan")

    with pytest.raises(ValueError, match="`guidance_scale` must be a number of at least 0"):
        call(pipeline, 0, callback_on_step_end=wrong)
    call(pipeline, 0)
    assert pipeline.guidance_scale == 1.0


@pytest.mark.parametrize(("cls", "scheduler"), [(InterpolantPipeline, {}), (OneStepInterpolantPipeline, FEW)])
def test_an_interrupted_call_evaluates_no_more_and_the_next_one_does(cls, scheduler):
    pipeline, rows = make(cls, scheduler)
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    images = call(pipeline, 0, callback_on_step_end=stop)
    assert len(rows) == len(seen) == 2
    assert torch.equal(images, seen[-1])
    call(pipeline, 0)
    assert len(rows) == 2 + 3


def test_a_callback_changes_latents():
    for cls in (InterpolantPipeline, OneStepInterpolantPipeline):
        pipeline, _ = make(cls)
        images = call(pipeline, 0, steps=1, callback_on_step_end=lambda *_, **__: {"latents": torch.zeros(1, 1, 8, 8)})
        assert not images.any()


def test_a_student_says_what_is_inside_itself():
    student, rows = make(OneStepInterpolantPipeline, FEW)
    call(student, 0)
    assert (student.num_timesteps, student.guidance_scale, student.do_classifier_free_guidance) == (3, 1.0, False)
    guided, rows = make(OneStepInterpolantPipeline, guidance={"scale": 4.0})
    call(guided, 0, steps=1)
    assert (guided.num_timesteps, guided.guidance_scale, guided.do_classifier_free_guidance) == (1, 4.0, True)
    assert rows == [2]


def test_a_batch_of_one_is_the_same_image_as_in_a_batch():
    for cls in (InterpolantPipeline, OneStepInterpolantPipeline):
        pipeline, _ = make(cls)
        generators = [[torch.Generator().manual_seed(seed) for seed in seeds] for seeds in ((0, 1, 2), (2,))]
        many = call(pipeline, 0, 1, 2, steps=1, generator=generators[0])
        one = call(pipeline, 2, steps=1, generator=generators[1])
        torch.testing.assert_close(many[2:], one, rtol=1e-4, atol=1e-5)
