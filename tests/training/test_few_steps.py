"""Students of several steps: their levels in training are those of the finished pipeline."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from gaussian_oracle import Gaussian
from helpers import tiny_sit
from test_modes_and_draws import weights
from test_trainers import lines
from trainer_builders import distillation

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler, get_interpolant, get_objective
from si_distill.hub.card import write_card
from si_distill.sample_noise import sample_seed
from si_distill.training.distillation.levels import Level, Levels

FEW = ["--student_steps", 1, 2, 4]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def run(teacher_folder, tmp_path_factory):
    """A finished run of three iterations."""
    folder = tmp_path_factory.mktemp("few") / "run"
    trainer = distillation(teacher_folder, folder, *FEW, "--max_steps", 3, "--eval_steps", 3, "--student_shift", 2)
    trainer.train()
    return trainer, folder


def assert_resumed_alike(teacher, place, steps, metric, *arguments):
    """A run that goes on after its second iteration has the weights and the log of one that was not stopped."""

    def run(folder, count, *further):
        lengths = ("--max_steps", count, "--save_steps", 2)
        trainer = distillation(teacher, place / folder, *arguments, *lengths, *further)
        trainer.train()
        return trainer

    whole, _, resumed = run("whole", steps), run("halves", 2), run("halves", steps, *LATEST)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    logs = [[line[metric] for line in lines(place / folder)] for folder in ("whole", "halves")]
    assert len(logs[0]) == steps
    assert logs[0] == logs[1]


def test_levels_of_all_counts_are_drawn_and_are_the_same_for_everybody():
    levels = Levels(StochasticInterpolantScheduler(student_steps=[1, 2, 4]), seed=3)
    assert levels.all == [Level(1, 0), Level(2, 1), Level(4, 1), Level(4, 2), Level(4, 3)]
    assert Levels.number([1, 2, 4]) == 5
    drawn = [levels.draw(step, -1) for step in range(3000)]
    assert drawn[:50] == [Levels(levels.scheduler, seed=3).draw(step, -1) for step in range(50)]
    # A third of the draws for each count, then each of its steps alike; all first steps are one level.
    shares = {level: drawn.count(level) / len(drawn) for level in levels.all}
    expected = {Level(1, 0): 1 / 3 + 1 / 6 + 1 / 12, Level(2, 1): 1 / 6} | {Level(4, k): 1 / 12 for k in (1, 2, 3)}
    for level, share in expected.items():
        assert abs(shares[level] - share) < 4 * (share / len(drawn)) ** 0.5
    assert Levels(StochasticInterpolantScheduler(), seed=3).draw(0, -1) == Level()


@pytest.mark.parametrize(("stepping", "count"), [("renoise", 2), ("ddim", 2), ("ddim", 4)])
def test_the_image_that_is_learned_from_is_the_finished_pipelines(teacher_folder, tmp_path, stepping, count):
    trainer = distillation(
        teacher_folder, tmp_path / "run", *FEW, "--student_stepping", stepping, "--student_shift", 3, "--max_steps", 1
    )
    trainer.setup()
    (batch,) = trainer._draw_batches()
    batch.level, batch.key = Level(count, count - 1), (5, -1, 0)
    learned = trainer._samples(batch)
    pipeline = trainer.pipeline()
    seeds = [sample_seed(trainer.settings.seed, "renoise", *batch.key, 0, index) for index in batch.indices]
    made = pipeline(
        batch.labels.tolist(),
        num_inference_steps=count,
        latents=batch.noise,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    )
    assert made.num_network_evaluations == count
    torch.testing.assert_close(learned, made.images, rtol=0, atol=1e-6)


def test_the_way_to_a_level_carries_no_gradient(run):
    trainer, _ = run
    (batch,) = trainer._draw_batches()
    batch.level = Level(4, 2)
    network = trainer.generator.module
    samples = trainer._trained_samples(batch)
    field, condition = trainer._student_field(network), trainer._told(batch, batch.labels)
    x_t, t = trainer.levels.state(field, batch.noise, batch.level, condition, trainer.noise, batch.key, batch.indices)
    assert not x_t.requires_grad
    last_only = field.sample(x_t, t, condition)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    grads = [torch.autograd.grad(images.square().sum(), parameters) for images in (samples, last_only)]
    assert any(gradient.any() for gradient in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--critic_draws", "fresh", "--generator_steps", 2, "--critic_sees_level", "true"],
        ["--student_stepping", "ddim", "--generator_steps", 2, "--objective", "realuid", "--data.name", "digits"],
        ["--adversarial.kind", "encoder", "--data.name", "digits", "--gradient_accumulation_steps", 2],
        ["--adversarial.kind", "head", "--data.name", "digits", "--objective", "dmd2", "--critic_sees_level", "true"],
    ],
)
def test_a_run_is_resumed_bit_for_bit(teacher_folder, tmp_path, arguments):
    assert_resumed_alike(teacher_folder, tmp_path, 5, "critic_loss", *arguments, *FEW)


def test_steps_of_one_are_the_student_of_before(teacher_folder, tmp_path):
    trainers = []
    for name, arguments in (("default", []), ("one", ["--student_steps", 1])):
        trainers.append(distillation(teacher_folder, tmp_path / name, *arguments, "--max_steps", 2))
        trainers[-1].train()
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, trainers), strict=True))
    config = json.loads((tmp_path / "one/scheduler/scheduler_config.json").read_text())
    assert (config["student_steps"], config["solver"]) == (None, "euler")


def test_a_critic_that_is_told_the_level_starts_as_the_teacher_and_learns_to_tell(teacher_folder, tmp_path):
    trainer = distillation(
        teacher_folder, tmp_path / "run", *FEW, "--critic_sees_level", "true", "--max_steps", 3, "--learning_rate", 0.01
    )
    trainer.setup()
    (batch,) = trainer._draw_batches()
    x_t, t, condition = batch.noise, torch.full((4,), 0.5), trainer._told(batch, batch.labels)

    def said():
        fields = [trainer._critic_field(trainer.critic.unwrapped, level) for level in trainer.levels.all]
        with torch.no_grad():
            return [field(x_t, t, condition, "velocity") for field in fields]

    teacher = trainer.teacher_field(x_t, t, condition, "velocity")
    assert all(torch.equal(one, teacher) for one in said())
    trainer.train()
    assert not torch.equal(*said()[:2])


def test_a_folder_keeps_its_steps_for_people_without_the_package(run, remote_code_cache):
    _, folder = run
    pipelines = [
        OneStepInterpolantPipeline.from_pretrained(folder),
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
    ]
    made = []
    for pipeline in pipelines:
        assert pipeline.trained_steps == [1, 2, 4]
        assert pipeline.scheduler.config.solver == "renoise"
        for steps in (None, 1, 2, 4):
            output = pipeline(
                [3, 7],
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )
            assert output.num_network_evaluations == (steps or 4)
            made.append(output.images)
        with pytest.raises(ValueError, match=r"`num_inference_steps` is 3, but this student has 1, 2, 4 steps"):
            pipeline([3], num_inference_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(made[:4], made[4:], strict=True))
    assert torch.equal(made[0], made[3])
    assert not torch.equal(made[1], made[2])
    write_card(folder)
    card = " ".join((folder / "README.md").read_text().split())
    for words in (
        "A few-step student: an image takes one or two or 4 evaluations",
        "1 or 2 or 4 steps only",
        "few-step",
    ):
        assert words in card
    assert "renoise, levels shifted by 2" in card


# What a step is.


@pytest.mark.parametrize(
    ("name", "config"), [("linear", {}), ("vp", {}), ("trigonometric", {}), ("edm", {}), ("ddpm", {})]
)
def test_a_chain_of_renoised_steps_keeps_the_variance_of_the_data(name, config):
    """x̂0 = A_t x has the data's variance S from any x_t with A_t² = S / (α² S + β²)."""
    variance, it = 0.3, get_interpolant(name, **config)
    scheduler = StochasticInterpolantScheduler(
        interpolant=name, solver="renoise", prediction_type="sample", init_time=it.default_init_time("sample")
    )
    scheduler.set_timesteps(4)

    def factor(t):
        c = it.coefficients(t.double())
        return (variance / (c.alpha**2 * variance + c.beta**2)).sqrt()

    # Each row is a direction of the noise: the state is linear in it, and the sum of squares is the variance.
    x = torch.zeros(5, dtype=torch.float64)
    first = it.coefficients(scheduler.timesteps[0].double())
    x[0] = (first.alpha**2 * variance + first.beta**2).sqrt()
    for step, t in enumerate(scheduler.timesteps):
        fresh = torch.zeros_like(x)
        fresh[step + 1 if step < 4 else 0] = 1
        x = scheduler.step(factor(t) * x, t, x, variance_noise=fresh).prev_sample
    torch.testing.assert_close(x.square().sum(), torch.tensor(variance, dtype=torch.float64), rtol=1e-6, atol=0)


def test_renoise_is_stock_flow_matching_with_stochastic_sampling():
    network = tiny_sit(num_classes=0)
    pipeline = OneStepInterpolantPipeline(network, StochasticInterpolantScheduler(solver="renoise", student_steps=[4]))
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = pipeline(
        batch_size=3, latents=latents, generator=torch.Generator().manual_seed(2), output_type="latent"
    ).images
    stock = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x, generator = latents, torch.Generator().manual_seed(2)
    for timestep in stock.timesteps:
        with torch.no_grad():
            velocity = network(x, (timestep / 1000).expand(3), None).sample
        x = stock.step(velocity, timestep, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("told", [False, True])
def test_a_shared_critic_fixes_the_mixture_and_a_told_one_each_level(told):
    """On Gaussians, with the linear critic that fits best: where does the student's gradient vanish?"""
    it, objective = get_interpolant("linear"), get_objective("sid", alpha=1.0)
    variance = 0.5
    generator = torch.Generator().manual_seed(0)
    z, x1, t = (torch.randn(4000, generator=generator, dtype=torch.float64) for _ in range(3))
    t = 0.1 + 0.8 * torch.sigmoid(t)
    # Two levels whose mixture has the data's variance, and each of which has not.
    scales = [torch.tensor((variance * share) ** 0.5, dtype=torch.float64, requires_grad=True) for share in (0.6, 1.4)]
    teacher = Gaussian(torch.zeros((), dtype=torch.float64), torch.tensor(variance**0.5, dtype=torch.float64))

    def gradient(scale):
        fitted = scale.detach() if told else torch.tensor(variance**0.5, dtype=torch.float64)
        critic = Gaussian(torch.zeros((), dtype=torch.float64), fitted)
        x0 = scale * z
        x_t = it.interpolate(x0, x1, t)
        fields = (law.velocity(it, x_t, t).unsqueeze(1) for law in (critic, teacher))
        target = it.target(x0, x1, t, "velocity").unsqueeze(1)
        loss = objective.generator_loss(*fields, target, torch.ones_like(t)).mean()
        return torch.autograd.grad(loss, scale)[0]

    small, large = map(gradient, scales)
    if told:
        assert small < -1e-3 < 1e-3 < large  # each goes to the data's variance
    else:
        assert abs(small) < 1e-12
        assert abs(large) < 1e-12
