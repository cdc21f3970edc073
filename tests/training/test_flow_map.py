"""The flow-map term: exact on Gaussians, and a term that changes nothing where it is not asked for."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from gaussian_oracle import Gaussian
from helpers import UNTOLD, tiny_sit
from interpolant_families import double, every_family, noise
from test_few_steps import assert_resumed_alike
from test_modes_and_draws import weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer_builders import distillation

from si_distill import Field, OneStepInterpolantPipeline, StochasticInterpolantScheduler, get_interpolant
from si_distill.interpolants import PREDICTIONS
from si_distill.models.extension import extend_network
from si_distill.pipelines import Condition, view_network
from si_distill.sample_noise import SampleNoise
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.distillation.flow_map import TIME_FEATURES, FlowMap, TwoTimeMap, time_features
from si_distill.training.distillation.terms import FlowMapConfig

DATA = Gaussian(double(0.5, -1.0, 0.2), double(0.4, 1.0, 1.7))
TERM = ["--flow_map.weight", 0.5]


def field(interpolant, said, prediction_type="velocity") -> Field:
    """A field whose network says `said(x_t, t, s)` in `prediction_type`; s is read from the features."""

    def network(network_input, t, condition):
        x_t = network_input
        if prediction_type == "edm":
            x_t = x_t * interpolant._edm_norm(interpolant.at(t, x_t))
        s = torch.zeros_like(t)
        if condition.augment is not None:
            sine, one_less_cosine = condition.augment[:, 0], condition.augment[:, TIME_FEATURES // 2]
            s = torch.atan2(sine, 1 - one_less_cosine) / (0.5 * torch.pi)
        return (said(x_t, t, s),)

    arguments = dict(interpolant=interpolant.name, interpolant_kwargs=interpolant.config)
    return Field(network, StochasticInterpolantScheduler(prediction_type=prediction_type, init_time=0.9, **arguments))


def teacher_of(data: Gaussian, interpolant, prediction_type="velocity") -> Field:
    return field(interpolant, lambda x, t, s: data.field(interpolant, x, t, prediction_type), prediction_type)


def exact_state(data: Gaussian, interpolant, x_t, t, s) -> torch.Tensor:
    """(x − α m) / √Σ is constant along the probability-flow ODE."""
    start, end = interpolant.at(t, x_t), interpolant.at(s, x_t)
    spreads = [(c.alpha**2 * data.std**2 + c.beta**2).sqrt() for c in (end, start)]
    return end.alpha * data.mean + spreads[0] / spreads[1] * (x_t - start.alpha * data.mean)


def exact_sample(data: Gaussian, interpolant, x_t, t, s) -> torch.Tensor:
    """The D whose map is exact."""
    way = TwoTimeMap(interpolant, x_t, t, s)
    return (exact_state(data, interpolant, x_t, t, s) - way.r * x_t) / way.q


def term_of(teacher: Field, **settings) -> FlowMap:
    config = DistillConfig(teacher="teacher", output_dir="run", flow_map=FlowMapConfig(weight=1.0, **settings))
    return FlowMap(config, teacher, init_time=0.9, told=0)


def states(count: int = 25) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t and s below t."""
    t = torch.linspace(0.3, 0.9, count, dtype=torch.float64)
    return noise(0, count, 3), t, t * torch.linspace(0.1, 0.95, count, dtype=torch.float64)


@every_family
def test_the_exact_map_has_no_residual(name, config):
    interpolant = get_interpolant(name, **config)
    x_t, t, s = states()
    x_t = x_t * interpolant.at(t, x_t).beta
    x0, d_x0 = torch.func.jvp(lambda s: exact_sample(DATA, interpolant, x_t, t, s), (s,), (torch.ones_like(s),))
    way = TwoTimeMap(interpolant, x_t, t, s)
    residual = way.residual(x0, d_x0, DATA.velocity(interpolant, way.state(x0), s))
    assert residual.abs().max() < 1e-11


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_whatever_the_network_predicts(prediction_type):
    interpolant = get_interpolant("vp")
    x_t, t, s = states()

    def said(x_t, t, s):
        return interpolant.convert(exact_sample(DATA, interpolant, x_t, t, s), x_t, t, "sample", prediction_type)

    student = field(interpolant, said, prediction_type)
    term = term_of(teacher_of(DATA, interpolant, prediction_type), step_size=1e-5)
    residual = term.gradient(student, x_t, t, s, UNTOLD)[2]
    assert residual.abs().max() < 1e-3
    # Euler's step, in contrast, is off.
    euler = field(interpolant, lambda x, t, s: DATA.field(interpolant, x, t, prediction_type), prediction_type)
    assert term.gradient(euler, x_t, t, s, UNTOLD)[2].abs().max() > 0.5


def test_a_constant_residual_leads_to_the_error_at_the_end_that_it_should():
    """X' = k X + c against the teacher's k X, q' = −1/t: at s = 0 the two are c (1 − e^(−kt)) / k apart."""
    interpolant, k, c = get_interpolant("linear"), 0.7, 0.3
    x_t, t, s = states()

    def state(x_t, t, s, c):
        t, s = t.view(-1, 1), s.view(-1, 1)
        return torch.exp(k * (s - t)) * (x_t + c / k) - c / k

    def said(x_t, t, s, c=c):
        way = TwoTimeMap(interpolant, x_t, t, s)
        return interpolant.convert((state(x_t, t, s, c) - way.r * x_t) / way.q, x_t, t, "sample", "velocity")

    student, teacher = field(interpolant, said), field(interpolant, lambda x, t, s: k * x)
    residual = term_of(teacher, step_size=1e-6).gradient(student, x_t, t, s, UNTOLD)[2]
    torch.testing.assert_close(residual, -c * t.view(-1, 1).expand_as(residual), rtol=0, atol=1e-4)
    end = torch.zeros_like(s)
    found = student.sample(x_t, t, UNTOLD) - state(x_t, t, end, 0.0)
    torch.testing.assert_close(found, -c * (1 - torch.exp(-k * t.view(-1, 1))) / k * torch.ones_like(found))


def test_the_difference_is_of_first_order_to_the_derivative():
    torch.manual_seed(0)
    interpolant = get_interpolant("linear")
    network = extend_network(tiny_sit(), augment_dim=TIME_FEATURES).double()
    torch.nn.init.normal_(network.augment_embed.weight, std=0.3)
    student = Field(view_network(network), StochasticInterpolantScheduler())
    x_t, t = noise(0, 4, 1, 8, 8), double(0.9, 0.7, 0.5, 0.4)
    s, condition = 0.6 * t, Condition(torch.arange(4))
    term = term_of(teacher_of(Gaussian(double(0.0), double(1.0)), interpolant))
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel has no forward derivative
        x0, d_x0 = torch.func.jvp(lambda s: term.sample(student, x_t, t, s, condition), (s,), (torch.ones_like(s),))
    way = TwoTimeMap(interpolant, x_t, t, s)
    exact = way.residual(x0, d_x0, term.teacher(way.state(x0), s, condition, "velocity"))
    errors = []
    for step in (0.01, 0.005):
        term.config = replace(term.config, step_size=step)
        errors.append((term.gradient(student, x_t, t, s, condition)[2] - exact).norm())
    assert 0 < errors[1] < 0.02 * exact.norm()
    assert 1.8 < errors[0] / errors[1] < 2.2


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_a_linear_student_reaches_the_teachers_map_by_the_term_alone(path):
    interpolant, data = get_interpolant(path), Gaussian(double(0.5), double(0.6))
    teacher = teacher_of(data, interpolant, "sample")
    slopes, shifts = (torch.zeros(TIME_FEATURES, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def said(
        x_t, t, s
    ):  # the teacher's x̂0 and an affine function of the state with coefficients linear in the features
        features = time_features(s)
        at = interpolant.at(t, x_t)
        scaled = x_t / (at.alpha**2 + at.beta**2).sqrt()
        return (
            data.x0_given(interpolant, x_t, t)
            + (features @ slopes + start[0]).view(-1, 1) * scaled
            + ((features @ shifts + start[1]).view(-1, 1))
        )

    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    student, term = field(interpolant, said, "sample"), term_of(teacher, decay=0.5)
    latents = noise(1, 4096, 1)
    images = [student.one_step(latents, 0.9, UNTOLD).detach()]
    optimizer = torch.optim.Adam([slopes, shifts, start], 0.02)
    random = SampleNoise(0)
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1200)
        paths = term.paths(random, (1,), range(64), step)
        x_t = term.starts(student, paths, UNTOLD).double()
        x0, gradient, _ = term.gradient(student, x_t, paths.t.double(), paths.s.double(), UNTOLD)
        optimizer.zero_grad()
        (x0 * gradient).mean().backward()
        optimizer.step()
    images.append(student.one_step(latents, 0.9, UNTOLD).detach())
    c = interpolant.at(double(0.9), latents)
    wanted = data.flow_to_data(interpolant, c.beta * latents, double(0.9))
    errors = [((made - wanted).square().mean() / wanted.var()).sqrt() for made in images]
    assert errors[1] < 0.1 < 0.5 < errors[0]


def test_at_first_the_student_is_the_teacher_whatever_it_is_told(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", *TERM, "--max_steps", 1)
    trainer.setup()
    student = trainer._student_field(trainer.generator.module)
    x_t, condition = noise(0, 4, 1, 8, 8).float(), Condition(torch.arange(4))
    t = torch.tensor([1.0, 0.9, 0.6, 0.3])
    for s in (torch.zeros(4), 0.5 * t, t):
        x0 = trainer.flow_map.sample(student, x_t, t, s, condition)
        assert torch.equal(x0, trainer.teacher_field.sample(x_t, t, condition))
        euler = x_t + (s - t).view(-1, 1, 1, 1) * trainer.teacher_field(x_t, t, condition, "velocity")
        made = TwoTimeMap(trainer.interpolant, x_t, t, s).state(x0)
        torch.testing.assert_close(made, euler, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("share", "count"), [(0.5, 8), (0.75, 24), (0.2, 2)])
@pytest.mark.parametrize("starts", ["prior", "both"])
def test_the_paths_do_not_depend_on_how_many_processes_draw_them(share, count, starts):
    term = term_of(teacher_of(DATA, get_interpolant("linear")), batch_share=share, starts=starts)

    def drawn(*parts):
        found = [(part, term.paths(SampleNoise(0), (1, 2, 2), part, 5)) for part in parts]
        rows = torch.cat([part[0] + paths.rows for part, paths in found])
        values = [torch.cat([getattr(paths, name) for _, paths in found]) for name in ("noise", "t", "s")]
        order = sorted(range(len(rows)), key=lambda i: (int(rows[i]), float(values[2][i])))
        return rows[order], *(value[order] for value in values)

    whole = drawn(range(8))
    assert len(whole[0]) == count
    starting = whole[2].unique().numel()  # all at one time, or about half of them
    assert starting == 1 if starts == "prior" else starting <= 0.8 * count + 1
    assert bool((whole[3] >= 0.02).all() and (whole[3] <= whole[2] - 0.0049).all())
    for one, other in zip(whole, drawn(range(4), range(4, 8)), strict=True):
        assert torch.equal(one, other)


def test_a_discrete_teacher_is_asked_at_its_own_times():
    config = dict(interpolant="ddpm", interpolant_kwargs=dict(num_train_timesteps=50, beta_end=0.3))
    scheduler = StochasticInterpolantScheduler(timestep_type="discrete", init_time=40 / 49, **config)
    term = term_of(Field(lambda *_: (), scheduler), starts="both")
    paths = term.paths(SampleNoise(0), (1, 2, 2), range(40))
    for times in (paths.t[paths.renoised[1]], paths.s):
        torch.testing.assert_close(times * 49, (times * 49).round())


def test_the_terms_gradient_has_the_size_that_is_asked_for(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", *TERM, "--max_steps", 1)
    trainer.setup()
    (batch,) = trainer._draw_batches()
    gradients = []
    for factor in (1, 3):
        trainer._follow_teacher(batch, factor * torch.ones(4, 1, 8, 8), 0)
        gradients.append([parameter.grad.clone() for parameter in trainer.generator.parameters])
        trainer.generator.optimizer.zero_grad()
    for one, three in zip(*gradients, strict=True):
        torch.testing.assert_close(3 * one, three)
    # What is added at the images: half the objective's size, which here is 8 for each of four.
    paths = trainer.flow_map.paths(trainer.noise, (1, 8, 8), batch.indices, 0, 0)
    student = trainer._student_field(trainer.generator.module)
    x_t = trainer.flow_map.starts(student, paths, Condition(batch.labels))
    x0, gradient, _ = trainer.flow_map.gradient(student, x_t, paths.t, paths.s, Condition(batch.labels))
    scale = 0.5 * 32 / gradient.flatten(1).norm(dim=1).sum()
    made = torch.autograd.grad((x0 * scale * gradient).sum(), trainer.generator.parameters)
    for one, other in zip(gradients[0], made, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--flow_map.starts", "both", "--gradient_accumulation_steps", 2, "--critic_draws", "fresh"],
        ["--generator_steps", 2, "--student_steps", 1, 2, "--objective", "cross_term_detached"],
        ["--flow_map.batch_share", 0.75, "--guidance_scale", 1.5, "--flow_map.guidance_t_max", 0.7],
    ],
)
def test_a_run_is_resumed_bit_for_bit(teacher_folder, tmp_path, arguments):
    assert_resumed_alike(teacher_folder, tmp_path, 4, "flow_map_residual", *TERM, *arguments)


def test_a_weight_of_zero_changes_no_bit(teacher_folder, tmp_path):
    off = ["--flow_map.weight", 0, "--flow_map.batch_share", 0.9, "--flow_map.starts", "both"]
    trainers = []
    for name, arguments in (("default", []), ("off", off), ("on", TERM)):
        trainers.append(distillation(teacher_folder, tmp_path / name, *arguments, "--max_steps", 2))
        trainers[-1].train()
    default, off, on = map(weights, trainers)
    assert all(torch.equal(a, b) for a, b in zip(default, off, strict=True))
    assert len(on) > len(off)


def test_a_student_needs_no_second_time(teacher_folder, tmp_path, remote_code_cache):
    folder = tmp_path / "run"
    trainer = distillation(teacher_folder, folder, *TERM, "--max_steps", 3, "--learning_rate", 0.01)
    trainer.train()
    assert bool(trainer.generator.unwrapped.augment_embed.weight.any())
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = [
        pipeline([3, 7], latents=latents, output_type="pt").images
        for pipeline in (
            trainer.pipeline(),
            OneStepInterpolantPipeline.from_pretrained(folder),
            DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
        )
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[1], made[2])
    # It can be trained further, with the term and without it.
    for name, arguments in (("with", TERM), ("without", [])):
        further = distillation(teacher_folder, tmp_path / name, "--student", folder, *arguments, "--max_steps", 1)
        further.train()
        assert further.generator.unwrapped.config.augment_dim == TIME_FEATURES
