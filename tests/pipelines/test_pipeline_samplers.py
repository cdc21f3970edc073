"""Samplers of the teacher's pipeline: counts of evaluations, noise of each image, and the adaptive solver."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gaussian_networks import gaussian_teacher
from helpers import tiny_sit

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS
from si_distill.schedulers.scheduling_stochastic_interpolant import SOLVERS

stochastic = pytest.mark.parametrize("solver", ["sde_euler", "sde_heun"])


def make_teacher(scheduler=None, **config):
    pipe = InterpolantPipeline(tiny_sit(**config), StochasticInterpolantScheduler(**(scheduler or {})))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def counted(pipe, labels, **kwargs):
    """The output, and the rows that the network saw for each image."""
    rows = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    output = pipe(labels, generator=seeded(0), output_type="latent", **kwargs)
    hook.remove()
    return output, sum(rows) / len(labels)


class TestEvaluations:
    @pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "posterior"])  # which bridges have
    @pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
    def test_are_those_that_a_hook_counts(self, solver, guidance_scale):
        output, rows = counted(
            make_teacher(), [0, 1], num_inference_steps=4, solver=solver, guidance_scale=guidance_scale
        )
        assert output.num_network_evaluations == rows
        if solver != "dopri5":
            expected = 7 if solver.endswith("heun") else 4
            assert rows == expected * (1 if guidance_scale == 1 else 2)

    def test_guidance_costs_within_its_interval_only(self):
        pipe = make_teacher()
        settings = dict(num_inference_steps=4, guidance_scale=3.0)
        output, rows = counted(pipe, [0, 1], **settings, guidance_interval=(0.3, 0.8))  # of 1, 0.75, 0.5, 0.25
        assert output.num_network_evaluations == rows == 6
        everywhere, _ = counted(pipe, [0, 1], **settings)
        nowhere, _ = counted(pipe, [0, 1], **settings, guidance_interval=(0.8, 0.9))
        plain, _ = counted(pipe, [0, 1], num_inference_steps=4)
        assert torch.equal(nowhere.images, plain.images)
        assert not torch.equal(output.images, everywhere.images)

    def test_of_a_student_is_one(self):
        pipe = OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler())
        assert pipe([0, 1]).num_network_evaluations == 1
        assert len(pipe([0], return_dict=False)) == 1


def test_threads_share_a_pipeline():
    pipe = make_teacher()
    calls = [dict(num_inference_steps=steps, solver=solver) for steps in (3, 7) for solver in ("heun", "sde_euler")] * 3

    def call(settings):
        return pipe([0, 1], generator=seeded(0), output_type="latent", **settings)

    alone = [call(settings) for settings in calls]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(call, calls))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.num_network_evaluations == other.num_network_evaluations


def test_only_the_first_channels_are_guided_on_request():
    pipe = make_teacher(in_channels=4)
    noise = torch.randn(2, 4, 8, 8, generator=seeded(0))
    settings = dict(num_inference_steps=1, latents=noise, output_type="latent")
    plain = pipe([0, 1], **settings).images
    guided = pipe([0, 1], guidance_scale=3.0, **settings).images
    some = pipe([0, 1], guidance_scale=3.0, guidance_channels=3, **settings).images
    assert torch.equal(some[:, :3], guided[:, :3])
    torch.testing.assert_close(
        some[:, 3:], plain[:, 3:], rtol=0, atol=1e-5
    )  # batches of 2 and 4 rows round differently
    assert (some - guided)[:, 3:].abs().min() > 0


class TestNoise:
    @stochastic
    def test_of_an_image_comes_from_its_own_generator(self, solver):
        pipe, settings = make_teacher(), dict(num_inference_steps=4, solver=solver, output_type="latent")
        pair = pipe([0, 1], generator=seeded(1, 2), **settings).images
        other = pipe([0, 2], generator=seeded(1, 3), **settings).images
        alone = pipe([1], generator=[seeded(2)], **settings).images
        assert torch.equal(pair[0], other[0])
        torch.testing.assert_close(pair[1:], alone, rtol=1e-4, atol=1e-5)  # float32, another batch size

    @stochastic
    def test_is_reproducible_and_not_the_ode(self, solver):
        pipe, noise = make_teacher(), torch.randn(2, 1, 8, 8, generator=seeded(0))
        settings = dict(num_inference_steps=4, latents=noise, output_type="latent")
        first, again, other = (
            pipe([0, 1], solver=solver, generator=seeded(seed), **settings).images for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert (first - other).abs().min() > 1e-4
        assert not torch.equal(first, pipe([0, 1], **settings).images)

    def test_settings_of_a_call_are_for_that_call(self):
        pipe = make_teacher()
        settings = dict(num_inference_steps=4, solver="sde_euler", output_type="latent")
        norms = [{"diffusion_norm": 0.1}, {"diffusion_norm": 1.0}, None]
        weak, one, default = (pipe([0], generator=seeded(0), solver_kwargs=norm, **settings).images for norm in norms)
        assert torch.equal(one, default)
        assert not torch.equal(weak, default)
        sched = StochasticInterpolantScheduler.from_config(
            pipe.scheduler.config, solver="sde_euler", diffusion_norm=0.1
        )
        theirs = InterpolantPipeline(pipe.transformer, sched)
        assert torch.equal(theirs([0], 4, generator=seeded(0), output_type="latent").images, weak)


class TestAdaptive:
    @pytest.mark.parametrize("interpolant", GAUSSIAN_INTERPOLANTS)
    def test_reaches_the_exact_flow_within_its_tolerance(self, interpolant):
        teacher = gaussian_teacher(0.2, 0.5, interpolant=interpolant)
        noise = torch.randn(3, 1, 2, 2, generator=seeded(0))
        labels = torch.tensor([0, 1, 2])
        x = noise * teacher.scheduler.init_noise_sigma
        exact = teacher.transformer.law(labels).flow_to_data(teacher.scheduler.interpolant, x, torch.ones(1))
        errors, counts = [], []
        for tolerance in (1e-2, 1e-5):
            output = teacher(
                labels,
                solver="dopri5",
                solver_kwargs={"rtol": tolerance, "atol": tolerance},
                latents=noise,
                output_type="latent",
            )
            errors.append(float((output.images - exact).abs().max()))
            counts.append(output.num_network_evaluations)
        # `ddpm` ends at its first noise level, β = 0.01: the x̂0-prediction there is off by β²/(2 s²).
        assert errors[1] < (3e-4 if interpolant == "ddpm" else 5e-5) < errors[0]
        assert 10 < counts[0] < counts[1] < 200

    def test_of_a_float64_network_runs_in_float64(self):
        output = gaussian_teacher(0.2, 0.5)
        output.to(torch.float64)
        images = output([0], solver="dopri5", generator=seeded(0), output_type="latent").images
        assert images.dtype == torch.float64

    def test_progress_is_shown(self, capfd):
        pipe = make_teacher()
        pipe.set_progress_bar_config()
        pipe([0], solver="dopri5")
        assert "it/s" in capfd.readouterr().err

    def test_a_prediction_that_is_not_finite_is_named(self):
        pipe = make_teacher()
        for parameter in pipe.transformer.parameters():
            parameter.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="prediction at t = 1 is not finite"):
            pipe([0], solver="dopri5")
