"""Bridges in the game: every preset plays, x_t is built from the pair's own reference, s = 0 is flow matching."""

import pytest
import torch
from helpers import tiny_sit
from PIL import Image
from trainer_builders import distillation

from si_distill import (
    Condition,
    Field,
    InterpolantPipeline,
    OneStepInterpolantPipeline,
    StochasticInterpolantScheduler,
    get_interpolant,
)
from si_distill.errors import InputError
from si_distill.objectives import PRESETS, get_objective
from si_distill.pipelines import view_network
from si_distill.training.distillation.losses import DistillationLosses, Draw, Images
from si_distill.training.dry_run.report import dry_run

PAIRS = ("--data.degradation", "downsample", "--data.degradation_kwargs", "{factor: 2}")


def save_teacher(folder, network=None, **scheduler):
    scheduler = StochasticInterpolantScheduler(**{"interpolant": "bridge", "prediction_type": "sample", **scheduler})
    network = network or tiny_sit(num_classes=10, condition_channels=1)
    InterpolantPipeline(network, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def paired_teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("paired"))


@pytest.fixture(scope="module")
def unpaired_teachers(tmp_path_factory):
    return {
        kind: save_teacher(
            tmp_path_factory.mktemp(kind), network=tiny_sit(num_classes=0), prediction_type=kind, solver=None
        )
        for kind in ("velocity", "sample")
    }


@pytest.fixture(scope="module")
def unpaired_data(tmp_path_factory):
    """Arguments for the digits as images and 24 grey pictures as references."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(24):
        Image.new("L", (8, 8), 10 * n).save(folder / f"{n}.png")
    return ("--data.reference_name", "imagefolder", "--data.reference_files", f"{folder}/*.png")


def plays(trainer):
    metrics, finite = trainer.iteration()
    assert finite
    assert all(torch.isfinite(value) for value in metrics.values())
    assert metrics["generator_grad_norm"] > 0
    assert metrics["critic_grad_norm"] > 0
    return metrics


# The game itself.


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_plays_on_pairs(paired_teacher, tmp_path, preset):
    plays(distillation(paired_teacher, tmp_path / "run", "--objective", preset, *PAIRS, "--critic_steps", 2))


@pytest.mark.parametrize("term", ["encoder", "head"])
@pytest.mark.parametrize("own_times", [(), ("--adversarial.t_min", 0.1, "--adversarial.t_max", 0.3)])
def test_adversarial_terms_play_on_pairs(paired_teacher, tmp_path, term, own_times):
    metrics = plays(
        distillation(paired_teacher, tmp_path / "run", *PAIRS, "--adversarial.kind", term, *map(str, own_times))
    )
    assert "generator_adversarial_loss" in metrics


@pytest.mark.parametrize("coupling", ["independent", "optimal_transport"])
@pytest.mark.parametrize(("kind", "preset"), [("velocity", "gap"), ("velocity", "realuid"), ("sample", "sid")])
def test_unpaired_bridges_play(unpaired_teachers, unpaired_data, tmp_path, coupling, kind, preset):
    teacher = unpaired_teachers[kind]
    trainer = distillation(
        teacher, tmp_path / "run", "--objective", preset, *unpaired_data, "--data.coupling", coupling
    )
    plays(trainer)
    assert trainer.start.noise_channels == 0
    batch = trainer._micro_batch(0)
    start, x1 = trainer.references.start(batch.data), trainer.references.x1(batch.data["images"], batch.data)
    assert torch.equal(start, batch.data["other_reference"])
    assert torch.equal(x1.flatten(1).sort(0).values, batch.data["reference"].flatten(1).sort(0).values)
    with torch.no_grad():
        trainer.sample_grid()


def test_an_unpaired_bridge_of_the_sample_plays_gap_in_sample_space(unpaired_teachers, unpaired_data, tmp_path):
    trainer = distillation(unpaired_teachers["sample"], tmp_path / "run", "--objective", "gap", *unpaired_data)
    assert trainer.objective.space == "sample"
    plays(trainer)


def test_a_conditional_teacher_on_noise_is_distilled(tmp_path):
    teacher = save_teacher(tmp_path / "t", interpolant="linear", prediction_type="velocity")
    trainer = distillation(teacher, tmp_path / "run", *PAIRS, "--objective", "realuid")
    seen = []
    trainer.generator.unwrapped.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], kwargs["condition"])), with_kwargs=True
    )
    plays(trainer)
    x_t, condition = seen[0]
    assert not torch.equal(x_t, condition)
    with torch.no_grad():
        trainer.sample_grid()


def test_networks_see_the_pair_and_the_student_its_noise(paired_teacher, tmp_path):
    trainer = distillation(paired_teacher, tmp_path / "run", *PAIRS)
    seen = {"student": [], "critic": [], "teacher": []}
    networks = {
        "student": trainer.generator.unwrapped,
        "critic": trainer.critic.unwrapped.network,
        "teacher": trainer.teacher_pipeline.transformer,
    }
    for name, network in networks.items():
        network.register_forward_hook(
            lambda module, args, kwargs, output, name=name: seen[name].append((*args, kwargs["condition"])),
            with_kwargs=True,
        )
    batches = []
    next_batch = trainer.next_batch
    trainer.next_batch = lambda *args: batches.append(next_batch(*args)) or batches[-1]
    trainer.iteration()
    (batch,) = batches
    ((x, t, labels, condition),) = seen["student"]
    assert torch.equal(x, batch["reference"])  # x_t = x1 at t = 1
    assert (t == 1).all()
    assert torch.equal(labels, batch["labels"])  # the pair's class
    assert torch.equal(condition[:, :1], batch["reference"])
    assert condition[:, 1:].std() > 0.5  # the noise
    for _, t, labels, condition in seen["critic"] + seen["teacher"]:
        assert torch.equal(condition, batch["reference"])
        assert torch.equal(labels, batch["labels"])
        assert ((t >= 0.02) & (t <= 0.98)).all()


def test_the_student_starts_as_the_teacher_beside_its_noise_and_is_saved_with_it(paired_teacher, tmp_path):
    trainer = distillation(paired_teacher, tmp_path / "run", *PAIRS, "--max_steps", 2)
    teacher = InterpolantPipeline.from_pretrained(paired_teacher)
    reference, labels = torch.randn(3, 1, 8, 8).clamp(-1, 1), torch.tensor([1, 5, 7])
    said = teacher.field().sample(reference, torch.ones(3), Condition(labels, image=reference))

    def made(network, noise):
        told = Condition(labels, image=view_network(network).condition_image(reference, noise))
        return trainer._student_field(network).one_step(reference, 1.0, told)

    student = trainer.generator.unwrapped
    torch.testing.assert_close(made(student, torch.zeros(3, 1, 8, 8)), said)
    # From the first step on other noise is another sample: where it did nothing it would learn to do nothing.
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (made(student, noise) - said).abs().amax((1, 2, 3)).min() > 1e-3
    trainer.train()
    saved = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run")
    assert saved.scheduler.config.noise_channels == 1
    assert saved.network.condition_channels == 2
    expected = made(trainer.averages.network, noise)
    images = saved(labels, image=reference, latents=noise, output_type="latent").images
    torch.testing.assert_close(images, expected.detach(), rtol=1e-5, atol=1e-6)
    # A finished student goes on, with the noise that it has.
    further = distillation(paired_teacher, tmp_path / "further", *PAIRS, "--student", tmp_path / "run")
    assert further.start.noise_channels == 1
    plays(further)


def test_a_map_without_noise_is_deterministic(paired_teacher, tmp_path):
    trainer = distillation(paired_teacher, tmp_path / "run", *PAIRS, "--noise_channels", 0)
    assert trainer._student_noise("samples", 0, indices=range(2)) is None
    assert trainer.generator.unwrapped.config.condition_channels == 1
    assert trainer.pipeline().scheduler.config.noise_channels == 0
    plays(trainer)


# The losses, on networks that are functions.

COUNT, SHAPE = 6, (2, 3, 3)


def numbers(seed):
    return torch.randn(COUNT, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def affine_networks(reads_reference):
    """Teacher and critic, as functions with parameters of their own, and these parameters."""
    parameters = [torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64), torch.tensor([0.3, 0.5, -0.1]).double()]
    parameters[1].requires_grad_()

    def network(p):
        def forward(x, t, condition):
            said = p[0] * x + p[1] * t.reshape(-1, 1, 1, 1)
            return said + p[2] * condition.image if reads_reference else said, None, None

        return forward

    return [network(p) for p in parameters], parameters[1]


def play(interpolant, preset, prediction, reads_reference=False, **settings):
    """(critic loss, its gradient, generator loss, its gradient) of one draw."""
    (teacher, critic), parameters = affine_networks(reads_reference)
    objective = get_objective(preset, **settings)
    kwargs = dict(sees_reference=reads_reference)
    scheduler = StochasticInterpolantScheduler(
        interpolant=interpolant.name, interpolant_kwargs=interpolant.config, prediction_type=prediction
    )
    fields = [Field(network, scheduler) for network in (teacher, critic)]
    losses = DistillationLosses(objective, None, fields[0], 18, torch.enable_grad, **kwargs)
    x1, z = numbers(1), numbers(2)
    t = torch.linspace(0.1, 0.9, COUNT, dtype=torch.float64)
    draw = Draw(t, x1 if interpolant.gaussian_reference else z)
    samples = numbers(0).requires_grad_()
    labels = torch.zeros(COUNT, dtype=torch.long)
    told = Condition(labels, image=x1 if reads_reference else None)
    fake, real = (Images(x0, told, x1) for x0 in (samples, numbers(3)))
    critic_loss = losses.critic_loss(fields[1], Images(samples.detach(), told, x1), real, draw).total
    terms = losses.generator_loss(fields[1], fake, draw, judged=False)
    return (
        critic_loss,
        torch.autograd.grad(critic_loss, parameters)[0],
        terms.total,
        torch.autograd.grad(terms.total, samples)[0],
        *terms.logged().values(),
    )


@pytest.mark.parametrize(
    ("preset", "settings"), [("gap", {}), ("realuid", {}), ("cross_term_detached", {}), ("sid", {}), ("realsid", {})]
)
def test_at_scale_0_the_game_is_that_of_flow_matching_bit_for_bit(preset, settings):
    at_0 = play(get_interpolant("bridge", scale=0), preset, "velocity", **settings)
    linear = play(get_interpolant("linear"), preset, "velocity", **settings)
    assert all(torch.equal(a, b) for a, b in zip(at_0, linear, strict=True))
    assert not torch.equal(play(get_interpolant("bridge", scale=0.1), "gap", "velocity")[2], linear[2])


def test_the_critic_of_gap_is_matching_the_bridge():
    # In velocity space with x̂0 networks: mean of ‖v_ψ − İ‖² = ‖x̂0 − x_g‖² / (4 t²).
    bridge = get_interpolant("bridge", scale=0.5)
    loss = play(bridge, "gap", "sample", reads_reference=True)[0]
    (_, critic), _ = affine_networks(True)
    t, x1 = torch.linspace(0.1, 0.9, COUNT, dtype=torch.float64), numbers(1)
    x_t = bridge.interpolate(numbers(0), x1, t, numbers(2))
    said = critic(x_t, t, Condition(image=x1))[0]
    expected = ((said - numbers(0)).square().flatten(1).mean(1) / (4 * t**2)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("triple", [dict(), dict(alpha=0.9, beta=0.9)])
def test_velocity_and_sample_space_are_one_loss_on_pairs(triple):
    preset = "realuid" if triple else "gap"
    spaces = [
        play(get_interpolant("bridge"), preset, "sample", reads_reference=True, space=space, **triple)
        for space in ("velocity", "sample")
    ]
    for a, b in zip(*spaces, strict=True):
        torch.testing.assert_close(a, b)


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "starts from reference images.*data.degradation"),
        ((*PAIRS, "--augment_prob", "0.1"), "augmentation would move images and not their references"),
        ((*PAIRS, "--label_sampling", "uniform"), "a pair's class is that of its image"),
        ((*PAIRS, "--init_time", "0.7"), "a bridge's student starts at its reference"),
        ((*PAIRS, "--objective_kwargs", "{critic_weight: edm}"), "edm is one of noise levels"),
        ((*PAIRS, "--time_sampler", "karras"), "'karras' is one of noise levels"),
        ((*PAIRS, "--critic_log_variance", "true"), "log_variance` needs a teacher whose network is given ¼ ln σ"),
    ],
)
def test_settings_that_a_paired_bridge_cannot_have_are_refused(paired_teacher, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        distillation(paired_teacher, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("velocity", ("--objective", "sid"), r"needs the teacher's x̂0 \(space sample, weight sid\)"),
        ("velocity", ("--objective", "realsid"), r"\(weight sid\)"),
        ("velocity", ("--objective", "gap", "--adversarial.kind", "encoder"), "adversarial term encoder"),
        ("sample", ("--objective", "gap", "--objective_kwargs", "{space: velocity}"), "its velocity is not known"),
    ],
)
def test_presets_that_an_unpaired_bridge_does_not_have_are_refused(
    unpaired_teachers, unpaired_data, tmp_path, kind, arguments, message
):
    with pytest.raises(InputError, match=message):
        distillation(unpaired_teachers[kind], tmp_path / "run", *unpaired_data, *arguments)


def test_data_that_do_not_fit_the_teacher_are_refused(paired_teacher, teacher_folder, unpaired_data, tmp_path):
    for teacher, arguments, message in (
        (paired_teacher, unpaired_data, "the data are unpaired"),
        (teacher_folder, PAIRS, "neither starts from them nor sees them"),
        (teacher_folder, ("--noise_channels", "1"), "starts from noise"),
        (
            save_teacher(tmp_path / "velocity", prediction_type="velocity"),
            PAIRS,
            "predicts velocity, which says nothing at t = 1",
        ),
        (
            save_teacher(tmp_path / "three", network=tiny_sit(num_classes=10, condition_channels=3)),
            PAIRS,
            "references of 3 channels, but those of the data set sklearn-digits have 1",
        ),
    ):
        with pytest.raises(InputError, match=message):
            distillation(teacher, tmp_path / "run", *arguments)


def test_a_dry_run_says_what_the_student_starts_from(paired_teacher, tmp_path):
    trainer = distillation(paired_teacher, tmp_path / "run", *PAIRS)
    assert "one evaluation from the reference image, with 1 channels of noise" in dry_run(trainer.settings)
