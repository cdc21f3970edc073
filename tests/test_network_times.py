"""What number a network is given for a time, and times that a network with discrete steps knows."""

import copy

import pytest
import torch
from helpers import tiny_sit
from interpolant_families import double
from trainer_builders import distillation

from si_distill import (
    Condition,
    Field,
    InterpolantPipeline,
    OneStepInterpolantPipeline,
    StochasticInterpolantScheduler,
    get_interpolant,
)
from si_distill.choices import TIME_SAMPLERS
from si_distill.errors import InputError
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, TIMESTEP_TYPES
from si_distill.training.config import TeacherConfig
from si_distill.training.times import TimeSampler

K = 10
DDPM = dict(num_train_timesteps=K, beta_start=0.01, beta_end=0.6)


def test_time_is_t_itself():
    t = double(0.0, 0.3, 1.0)
    for name in GAUSSIAN_INTERPOLANTS:
        assert get_interpolant(name).network_time(t, "time") is t


@pytest.mark.parametrize("steps", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_times_are_the_steps_of_ddpm(steps, dtype):
    it = get_interpolant("ddpm", num_train_timesteps=steps)
    t = (torch.arange(steps, dtype=torch.float64) / (steps - 1)).to(dtype)
    given = it.network_time(t, "discrete")
    assert given.dtype == torch.int64
    assert torch.equal(given, torch.arange(steps))
    assert torch.equal(it.nearest_time(t, "discrete"), t)
    between = t[:-1] + 0.4 / (steps - 1)
    assert torch.equal(it.nearest_time(between, "discrete"), t[:-1])


def test_log_sigma_is_edm_s_noise_input():
    it = get_interpolant("edm")
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    root = 0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))
    torch.testing.assert_close(it.network_time(t, "log_sigma"), 0.25 * 7 * root.log(), rtol=1e-12, atol=0)
    linear = get_interpolant("linear").network_time(double(0.2, 0.75), "log_sigma")
    torch.testing.assert_close(linear, 0.25 * double(0.25, 3.0).log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_log_sigma_is_refused_where_it_is_infinite(t):
    with pytest.raises(ValueError, match=rf"not finite at all of the times \[{t}\] on the interpolant 'linear'"):
        get_interpolant("linear").network_time(double(t), "log_sigma")


@pytest.mark.parametrize("name", [name for name in GAUSSIAN_INTERPOLANTS if name != "ddpm"])
def test_only_ddpm_has_discrete_steps(name):
    with pytest.raises(
        ValueError, match=rf"'discrete' needs the steps of the interpolant 'ddpm', and '{name}' has none"
    ):
        get_interpolant(name).network_time(double(0.5), "discrete")
    with pytest.raises(ValueError, match="'discrete' needs the steps"):
        StochasticInterpolantScheduler(interpolant=name, timestep_type="discrete")
    with pytest.raises(ValueError, match="'discrete' needs the steps"):
        TimeSampler(interpolant=get_interpolant(name), timestep_type="discrete")


def test_settings_say_which_times_a_network_cannot_be_given():
    with pytest.raises(InputError, match="not finite at all of the times"):
        TeacherConfig(output_dir="x", timestep_type="log_sigma")
    with pytest.raises(InputError, match="'discrete' needs the steps"):
        TeacherConfig(output_dir="x", timestep_type="discrete", t_min=0.1)
    with pytest.raises(ValueError, match=r"`timestep_type` is 'steps'.*time, discrete, log_sigma"):
        StochasticInterpolantScheduler(timestep_type="steps")
    with pytest.raises(ValueError, match="not finite at all of the times"):
        StochasticInterpolantScheduler(timestep_type="log_sigma")


def test_students_and_terms_start_where_the_network_can_be_told_the_time(tmp_path):
    teacher = tmp_path / "teacher"
    network = StochasticInterpolantScheduler(timestep_type="log_sigma", init_time=0.98)
    InterpolantPipeline(tiny_sit(num_classes=10), network).save_pretrained(teacher)
    with pytest.raises(InputError, match=r"`init_time` is 1.0: .*not finite at all of the times"):
        distillation(teacher, tmp_path / "run", "--init_time", 1.0)
    own = ["--adversarial.kind", "encoder", "--adversarial.t_min", 0.0, "--adversarial.t_max", 1.0]
    with pytest.raises(InputError, match=r"Adversarial times: .*not finite at all of the times"):
        distillation(teacher, tmp_path / "run", *own)
    trainer = distillation(teacher, tmp_path / "run")
    assert trainer.start.init_time == pytest.approx(2.5 / 3.5)  # β/α = 2.5 on `linear`
    assert trainer.iteration()[1]


def scheduler(timestep_type="discrete", **config):
    kwargs = {"interpolant": "ddpm", "interpolant_kwargs": DDPM, "prediction_type": "epsilon"}
    return StochasticInterpolantScheduler(**{**kwargs, "timestep_type": timestep_type, **config})


def steps_of(times):
    return (torch.as_tensor(times, dtype=torch.float64) * (K - 1)).tolist()


def test_sampling_times_are_steps_that_the_network_knows():
    sched = scheduler()
    sched.set_timesteps(4)  # 9, 6.75, 4.5, 2.25, 0
    assert steps_of(sched.timesteps) == pytest.approx([9, 7, 4, 2], abs=1e-5)
    sched.set_timesteps(timesteps=[0.99, 0.52, 0.3])
    assert steps_of(sched.timesteps) == pytest.approx([9, 5, 3], abs=1e-5)
    sched.set_timesteps(9)
    assert steps_of(sched.timesteps) == pytest.approx(range(9, 0, -1), abs=1e-5)
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 10, .*knows only 9 steps"):
        sched.set_timesteps(10)
    with pytest.raises(ValueError, match="must fall strictly"):
        sched.set_timesteps(timesteps=[0.52, 0.51])


def test_a_student_s_step_is_the_nearest_one():
    it = get_interpolant("ddpm", **DDPM)
    init_time = it.default_init_time("epsilon", "discrete")
    assert steps_of(init_time) == pytest.approx(round(it.time_of_ratio(2.5) * (K - 1)))
    sched = scheduler(init_time=0.52)
    sched.set_timesteps(1)
    assert steps_of(sched.timesteps) == pytest.approx([5], abs=1e-5)
    assert sched.init_noise_sigma == pytest.approx(float(it.coefficients(double(5 / 9)).beta), rel=1e-6)


@pytest.mark.parametrize("name", TIME_SAMPLERS)
def test_training_times_are_the_nearest_steps(name):
    it = get_interpolant("ddpm", **DDPM)
    law = dict(name=name, t_min=0.1, t_max=0.9, interpolant=it)
    u = torch.linspace(0.01, 0.99, 50)
    t, continuous = TimeSampler(**law, timestep_type="discrete")(u), TimeSampler(**law)(u)
    assert t.dtype == u.dtype
    assert torch.equal(t, it.nearest_time(continuous, "discrete"))
    assert (t - continuous).abs().max() <= 0.5 / (K - 1) + 1e-6


@pytest.mark.parametrize("timestep_type", TIMESTEP_TYPES)
def test_pipelines_and_fields_give_the_network_the_same_number(timestep_type):
    network, seen = tiny_sit(num_classes=3), []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[1][:2]))
    sched = scheduler(timestep_type, init_time=5 / 9)
    pipe = InterpolantPipeline(network, sched)
    pipe.set_progress_bar_config(disable=True)
    student = OneStepInterpolantPipeline(network, sched)
    field, told = pipe.field(), Condition(torch.tensor([0, 2]))
    x1, t = torch.randn(2, 1, 8, 8), torch.full((2,), 5 / 9)
    with torch.no_grad():
        field.predict(x1, t, told)
        made = field.one_step(x1, 5 / 9, told)
        pipe([0, 2], num_inference_steps=1, latents=x1)
        image = student([0, 2], latents=x1, output_type="latent").images
    expected = sched.interpolant.network_time(t, timestep_type)
    assert len(seen) == 4
    for given in seen:
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made, image, rtol=1e-5, atol=1e-5)


def test_conventions_of_time_and_sign_are_the_schedulers():
    x, t = torch.randn(3, 2, dtype=torch.float64), double(0.1, 0.5, 0.9)
    foreign = dict(reversed_time=True, timestep_scale=1000.0, prediction_sign=-1)
    sched, given = StochasticInterpolantScheduler(**foreign), []

    def network(network_input, times, condition):
        given.append(times)
        return (-torch.sin(network_input),)

    assert torch.equal(Field(network, sched).predict(x, t, Condition()), torch.sin(x))
    torch.testing.assert_close(given[0], 1000 * (1 - t))


@pytest.mark.parametrize("cls", [InterpolantPipeline, OneStepInterpolantPipeline])
def test_pipelines_of_a_negated_network_give_the_same_images(cls, tmp_path):
    network = tiny_sit(num_classes=3)
    negated = copy.deepcopy(network)
    for parameter in negated.proj_out.parameters():
        parameter.data.neg_()
    steps = {"num_inference_steps": 3} if cls is InterpolantPipeline else {}
    images = []
    for each, sign in ((network, 1), (negated, -1)):
        cls(each, StochasticInterpolantScheduler(prediction_sign=sign)).save_pretrained(tmp_path / str(sign))
        pipe = cls.from_pretrained(tmp_path / str(sign))
        images.append(pipe([0, 2], latents=torch.ones(2, 1, 8, 8), output_type="latent", **steps).images)
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(timestep_scale=0), "`timestep_scale` must be a positive number, got 0"),
        (dict(prediction_sign=0), "`prediction_sign` must be 1 or -1, got 0"),
        (dict(timestep_type="log_sigma", init_time=0.9, reversed_time=True), "given t itself"),
    ],
)
def test_conventions_that_no_network_has_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        StochasticInterpolantScheduler(**config)
