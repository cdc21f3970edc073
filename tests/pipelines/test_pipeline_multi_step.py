"""The teacher's pipeline: number of forwards, guidance, solvers, times."""

import pytest
import torch
from helpers import tiny_sit

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.pipelines import Condition, Guidance


@pytest.fixture
def teacher():
    return make_teacher()


def make_teacher(scheduler=None, **config):
    pipe = InterpolantPipeline(tiny_sit(**config), StochasticInterpolantScheduler(**(scheduler or {})))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 2), (3.0, 4), (0.0, 4)])
@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("heun", 9)])
def test_number_and_size_of_the_forwards(teacher, solver, evaluations, guidance_scale, rows):
    seen = []
    teacher.transformer.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    teacher([0, 1], num_inference_steps=5, solver=solver, guidance_scale=guidance_scale)
    assert seen == [rows] * evaluations


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_euler_equals_the_loop_written_out(teacher, guidance_scale):
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    labels, null = torch.tensor([1, 2]), torch.full((2,), 3)
    x = noise
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            times = torch.full((2,), t)
            conditional = teacher.transformer(x, times, labels).sample
            unconditional = teacher.transformer(x, times, null).sample
            x = x - 0.25 * (unconditional + guidance_scale * (conditional - unconditional))
    actual = teacher(
        labels, num_inference_steps=4, guidance_scale=guidance_scale, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)  # float32, other grouping over 4 steps


def test_heun_converges_faster_than_euler_and_leaves_the_scheduler_alone(teacher):
    def sample(steps, solver):
        return teacher([0, 1], steps, solver=solver, generator=seeded(), output_type="latent").images

    exact = sample(400, "heun")
    euler, heun = sample(40, "euler"), sample(40, "heun")
    assert (heun - exact).abs().max() < 0.5 * (euler - exact).abs().max()
    assert teacher.scheduler.config.solver == "euler"
    assert torch.equal(sample(40, None), euler)


def test_the_scheduler_s_own_solver_is_the_default():
    heun = make_teacher({"solver": "heun"})
    explicit = make_teacher()([0], 6, solver="heun", generator=seeded(), output_type="latent").images
    assert torch.equal(heun([0], 6, generator=seeded(), output_type="latent").images, explicit)


def test_explicit_times_replace_the_number_of_steps(teacher):
    timesteps = [1.0, 0.75, 0.5, 0.25]
    by_number = teacher([0], 4, generator=seeded(), output_type="latent").images
    by_times = teacher([0], timesteps=timesteps, generator=seeded(), output_type="latent").images
    assert torch.equal(by_number, by_times)
    uneven = teacher([0], timesteps=[1.0, 0.9, 0.5, 0.1], generator=seeded(), output_type="latent").images
    assert not torch.equal(by_number, uneven)


def test_user_latents_are_standard_normal_noise_scaled_to_the_first_time(teacher):
    noise = torch.randn(1, 1, 8, 8, generator=seeded())
    seen = []
    teacher.transformer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    teacher([0], timesteps=[0.6, 0.3], latents=noise)
    torch.testing.assert_close(seen[0], 0.6 * noise, rtol=1e-6, atol=0)  # β(0.6) = 0.6 on `linear`, in float32


def test_the_network_sees_float32_times_also_in_bfloat16(teacher):
    seen = []
    teacher.to(torch.bfloat16).transformer.register_forward_hook(
        lambda module, args, output: seen.append((args[0].dtype, args[1].dtype, tuple(args[1].shape)))
    )
    teacher([0, 1], num_inference_steps=2)
    assert seen == [(torch.bfloat16, torch.float32, (2,))] * 2


def test_callbacks_run_after_each_evaluation_and_steer_the_next(teacher):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = teacher([0], 4, output_type="pt", generator=seeded(), callback_on_step_end=callback).images
    assert steps == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert torch.equal(images, torch.full((1, 1, 8, 8), 0.5))


def test_progress_is_shown_for_each_evaluation(capfd):
    pipe = make_teacher()
    pipe.set_progress_bar_config()
    pipe([0], num_inference_steps=3, solver="heun")
    assert "5/5" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(solver="rk45"), "'rk45'.*euler, heun"),
        (dict(solver_kwargs={"diffusion": "sbdm"}), r"\['diffusion'\]; it takes the settings diffusion_form"),
        (dict(solver_kwargs={"diffusion_form": "none"}), "`diffusion_form` is 'none'"),
        (dict(solver="dopri5", timesteps=[0.5]), "chooses its own times: leave out `timesteps`"),
        (dict(solver="dopri5", callback_on_step_end=print), "leave out .*`callback_on_step_end`"),
        (dict(solver="dopri5", solver_kwargs={"rtol": 0.0}), "`rtol` must be a positive number, got 0.0"),
        (dict(guidance_interval=(0.5, 0.5)), r"two rising times in \[0, 1\], got \(0.5, 0.5\)"),
        (dict(guidance_channels=2), "`guidance_channels` is 2, but this network has 1 channels"),
        (dict(num_inference_steps=10**12), "must be at most 100,000"),
        (dict(num_inference_steps=True), "at least 1, got True"),
        (dict(guidance_interval=3), "`guidance_interval` must be two rising times"),
        (dict(num_inference_steps=0), "at least 1, got 0"),
        (dict(timesteps=[0.2, 0.8]), "fall strictly"),
        (dict(guidance_scale=-1.0), "at least 0.*-1.0"),
        (dict(guidance_scale=float("nan")), "at least 0.*nan"),
        (dict(latents=torch.zeros(2, 1, 8, 8)), r"\(2, 1, 8, 8\).*\(1, 1, 8, 8\)"),
    ],
)
def test_arguments_out_of_range_are_refused(teacher, kwargs, message):
    with pytest.raises(ValueError, match=message):
        teacher([0], **kwargs)


def test_guidance_needs_a_null_class():
    pipe = make_teacher(class_dropout_prob=0.0)
    pipe([0], num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"guidance_scale.* is 2.0.*no null class"):
        pipe([0], num_inference_steps=1, guidance_scale=2.0)


def test_guidance_interpolates_between_the_classes():
    network = tiny_sit()
    x, t, labels = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    with torch.no_grad():
        pipe = InterpolantPipeline(network, StochasticInterpolantScheduler())
        fields = [pipe.field(guidance=Guidance(scale)) for scale in (0.0, 1.0, 4.0)]
        unconditional, conditional, guided = (field.predict(x, t, Condition(labels)) for field in fields)
        # Batches of 2 and of 4 rows may round differently in float32.
        torch.testing.assert_close(unconditional, network(x, t, torch.full((2,), 3)).sample, rtol=0, atol=1e-5)
        assert torch.equal(conditional, network(x, t, labels).sample)
    torch.testing.assert_close(guided, 4 * conditional - 3 * unconditional, rtol=0, atol=1e-4)
    assert (conditional - unconditional).abs().max() > 1e-3
