"""Which network is in which mode, what updates share or draw afresh, and what each network is updated with."""

import json
from functools import partial

import pytest
import torch
from helpers import tiny_edm2, tiny_sit
from safetensors.torch import load_file, save_file
from test_recipes import save_student
from test_trainers import lines, save_teacher
from trainer_builders import distillation

from si_distill import Condition, InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.critic import CriticNetwork
from si_distill.errors import InputError
from si_distill.log_variance import LogVariance
from si_distill.models import EDMUNet2DModel
from si_distill.models.extension import fresh_network
from si_distill.training.times import TimeSampler

REAL = ["--objective", "realuid"]
FRESH = ["--critic_draws", "fresh"]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A teacher with dropout."""
    return save_teacher(tmp_path_factory.mktemp("dropping") / "t", dropout=0.3)


def listen(trainer):
    """(network, in training mode, with gradients, input, classes) of each forward from now on."""
    heard = []
    networks = {"student": trainer.generator, "critic": trainer.critic}
    modules = {name: trained.unwrapped for name, trained in networks.items()} | {
        "teacher": trainer.teacher_pipeline.transformer
    }
    for name, module in modules.items():

        def hook(module, args, name=name):
            classes = args[2].labels if isinstance(args[2], Condition) else args[2]
            heard.append((name, module.training, torch.is_grad_enabled(), args[0].detach(), classes))

        module.register_forward_pre_hook(hook)
    return heard


def weights(trainer):
    return [p.detach().clone() for network in (trainer.critic, trainer.generator) for p in network.parameters]


@pytest.mark.parametrize("draws", ["shared", "fresh"])
def test_only_the_network_that_is_updated_is_in_training_mode(dropping, tmp_path, draws):
    trainer = distillation(dropping, tmp_path / "run", "--critic_steps", 2, "--critic_draws", draws)
    heard = listen(trainer)
    _, finite = trainer.iteration()
    assert finite
    made = {
        "shared": [("student", False, False)] + 2 * [("critic", True, True)],
        "fresh": 2 * [("student", False, False), ("critic", True, True)],
    }[draws]
    judged = [("student", True, True), ("teacher", False, True), ("critic", False, True)]
    assert [call[:3] for call in heard] == made + judged
    networks = (
        trainer.critic.module,
        trainer.generator.module,
        trainer.averages.network,
        trainer.teacher_pipeline.transformer,
    )
    assert not any(module.training for network in networks for module in network.modules())


def test_shared_draws_are_one_forward_without_dropout_and_two_of_the_same_with_it(teacher_folder, dropping, tmp_path):
    for teacher, forwards in ((teacher_folder, 1), (dropping, 2)):
        trainer = distillation(teacher, tmp_path / str(forwards), "--critic_steps", 3)
        heard = listen(trainer)
        trainer.iteration()
        calls = [call for call in heard if call[0] == "student"]
        assert len(calls) == forwards
        assert all(torch.equal(call[3], calls[0][3]) and torch.equal(call[4], calls[0][4]) for call in calls)


def test_dropout_of_student_and_critic_may_be_others_than_the_teachers(dropping, tmp_path):
    trainer = distillation(dropping, tmp_path / "run", "--dropout", 0, "--critic_dropout", 0.05)
    heard = listen(trainer)
    trainer.iteration()
    assert len([call for call in heard if call[0] == "student"]) == 1
    rates = [
        {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)}
        for network in (trainer.generator.unwrapped, trainer.critic.unwrapped, trainer.teacher_pipeline.transformer)
    ]
    assert rates == [{0.0}, {0.05}, {0.3}]


def test_critics_dropout_does_not_reach_the_students_gradient(dropping, tmp_path):
    """Two masks of the critic's dropout in its own update cannot change what the student's update is, given the critic."""
    trainer = distillation(dropping, tmp_path / "run", "--dropout", 0)
    trainer.iteration()  # critic and teacher differ after it
    batch, gradients = trainer._micro_batch(0), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with trainer.critic.frozen() as critic, trainer.generator.training():
            samples = trainer._trained_samples(batch)
            loss = trainer._generator_loss(trainer._field(critic), batch, samples, 0).total
            gradients.append(torch.autograd.grad(loss, trainer.generator.parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("further", [[], ["--gradient_accumulation_steps", 2], ["--generator_first", "true"]])
def test_checkpointed_blocks_drop_in_the_backward_pass_what_they_dropped_before(dropping, tmp_path, further):
    found = []
    for checkpointing in ("false", "true"):
        trainer = distillation(
            dropping, tmp_path / checkpointing, *further, "--gradient_checkpointing", checkpointing, "--max_steps", 2
        )
        trainer.train()
        found.append(weights(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Draws.


def test_fresh_draws_are_others_for_each_update(teacher_folder, tmp_path):
    arguments = [*REAL, *FRESH, "--critic_steps", 2, "--generator_steps", 2, "--per_device_train_batch_size", 16]
    trainer = distillation(teacher_folder, tmp_path / "run", *arguments)
    assert trainer.settings.draws_per_iteration == 4
    drawn, draw = [], trainer._micro_batch

    def keep(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    trainer._micro_batch = keep
    heard = listen(trainer)
    for _ in range(2):
        assert trainer.iteration()[1]
        trainer.step += 1
    assert len(drawn) == 8
    for number, one in enumerate(drawn):
        assert torch.equal(one.labels, one.data["labels"])
        for other in drawn[:number]:
            assert not torch.equal(one.noise, other.noise)
            assert not torch.equal(one.data["images"], other.data["images"])
    inputs = [call[3] for call in heard if call[0] == "student"]
    assert len(inputs) == 8
    assert all(not torch.equal(a, b) for i, a in enumerate(inputs) for b in inputs[:i])


@pytest.mark.parametrize("draws", ["shared", "fresh"])
def test_student_first_then_the_critic_on_the_same_images(dropping, tmp_path, draws):
    trainer = distillation(
        dropping, tmp_path / "run", *REAL, "--dropout", 0, "--critic_steps", 3, "--generator_first", "true",
        "--critic_draws", draws,
    )  # fmt: skip
    order = []
    for name, network in (("student", trainer.generator), ("critic", trainer.critic)):
        network.optimizer.optimizer.register_step_pre_hook(lambda *_, name=name: order.append(name))
    used, losses = [], trainer.game_losses
    for name in ("generator_loss", "critic_loss"):

        def kept(compute, field, fake, *rest):
            used.append(fake.x0.detach())
            return compute(field, fake, *rest)

        setattr(losses, name, partial(kept, getattr(losses, name)))
    trainer.iteration()
    assert order == ["student", "critic", "critic", "critic"]
    same = [torch.equal(images, used[0]) for images in used]
    assert same == ([True] * 4 if draws == "shared" else [True, True, False, False])


@pytest.mark.parametrize(
    "arguments",
    [
        [*REAL, *FRESH],
        [*REAL, *FRESH, "--generator_first", "true", "--generator_steps", 2, "--generator_start_images", 8],
        [*REAL, "--gradient_accumulation_steps", 2],
    ],
    ids=["fresh", "student first", "micro-batches"],
)
def test_a_run_with_dropout_and_real_images_is_resumed_bit_for_bit(dropping, tmp_path, arguments):
    def run(folder, steps, *further):
        few = ("--max_steps", steps, "--critic_steps", 2, "--save_steps", 2)
        trainer = distillation(dropping, tmp_path / folder, *arguments, *few, *further)
        trainer.train()
        return trainer

    whole = run("whole", 5)
    run("halves", 2)
    resumed = run("halves", 5, *LATEST)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    names = ("critic_loss", "critic_grad_norm")
    logs = [[[line[name] for name in names] for line in lines(tmp_path / folder)] for folder in ("whole", "halves")]
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]


def test_reading_data_does_not_draw_from_the_generator_of_dropout(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", *REAL)
    state = torch.get_rng_state()
    trainer.next_batch(trainer.data, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_too_few_images_for_fresh_draws_are_refused(teacher_folder, tmp_path):
    few = [*REAL, "--critic_steps", 5, "--data.max_train_samples", 20]
    with pytest.raises(InputError, match=r"the 6 updates .* 4 real images each, 24 in all, but digits has 20.*shared"):
        distillation(teacher_folder, tmp_path / "run", *few, *FRESH)
    assert not (tmp_path / "run").exists()
    assert distillation(teacher_folder, tmp_path / "run", *few).iteration()[1]


# What each network is updated with.


def test_each_network_has_the_optimizer_that_its_settings_ask_for(teacher_folder, tmp_path):
    trainer = distillation(
        teacher_folder, tmp_path / "run", "--adam_beta1", 0.9, "--weight_decay", 0.01, "--max_grad_norm", 10,
        "--critic_adam_beta1", 0.0, "--critic_adam_beta2", 0.99, "--critic_adam_epsilon", 1e-6, "--critic_weight_decay", 0,
        "--critic_max_grad_norm", 5, "--critic_learning_rate", 2e-3, "--lr_warmup_steps", 4, "--critic_lr_warmup_steps", 2,
    )  # fmt: skip
    kinds, rates = [], []
    for network in (trainer.generator, trainer.critic):
        optimizer = network.optimizer.optimizer
        group = optimizer.param_groups[0]
        kinds.append(
            (type(optimizer).__name__, group["betas"], group["eps"], group["weight_decay"], network.max_grad_norm)
        )
    assert kinds == [("AdamW", (0.9, 0.999), 1e-8, 0.01, 10.0), ("Adam", (0.0, 0.99), 1e-6, 0.0, 5.0)]
    for _ in range(4):
        rates.append((trainer.generator.learning_rate, trainer.critic.learning_rate))
        trainer.iteration()
        trainer.step += 1
    expected = [(0.0, 0.0), (2.5e-5, 1e-3), (5e-5, 2e-3), (7.5e-5, 2e-3)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--critic_adam_beta1", 1], r"`critic_adam_beta1` must lie in \[0, 1\)"),
        (["--critic_weight_decay", -1], "`critic_weight_decay` must be finite and not negative"),
        (["--critic_adam_epsilon", 0], "`critic_adam_epsilon` must be a positive number"),
        (["--dropout", 1], r"`dropout` must lie in \[0, 1\)"),
        (["--loss_scale", "nan"], "`loss_scale` must be a number"),
        (["--student_guidance_channels", 3], "`student_guidance_channels` is 3, but the student is not guided"),
        (["--time_steps", 10, "--time_sampler", "logit_normal"], "Times from 10 steps are uniform ones"),
        (["--time_steps", 3, "--t_min", 0.6, "--t_max", 0.9], r"None of the 3 steps lies in \[0.6, 0.9\]"),
        (["--student_steps", 2, 1], r"`student_steps` must rise, each number once, got \[2, 1\]"),
        (["--student_steps", 2, 2], "`student_steps` must rise"),
        (["--student_steps", "[]"], r"`student_steps` holds numbers of steps of at least 1.*got \[\]"),
        (["--student_steps", 0], "`student_steps` holds numbers of steps of at least 1"),
        (["--student_steps", 10**6], "`student_steps` must be at most 1,000"),
        (["--student_steps", 4, "--student_shift", 0], "`student_shift` must be a positive number"),
        (["--critic_sees_level", "true"], "critic_sees_level=True is for a student of several steps"),
        (["--student_shift", 3, "--student_stepping", "ddim"], "student_shift=3.0 are for a student of several"),
        (["--student_steps", 4, "--student_stepping", "euler"], "choose one of: renoise, ddim"),
        (["--adversarial.features", "teacher"], "need a head to be trained"),
        (["--algorithm", 1], r"version 1 of the training algorithm, and this is version 2.*evaluation mode"),
    ],
)
def test_settings_that_cannot_work_are_refused(teacher_folder, tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_algorithm_is_not_resumed(teacher_folder, tmp_path):
    distillation(teacher_folder, tmp_path / "run", "--max_steps", 1).train()
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "algorithm: 2\n" in text
    for older in (
        text.replace("algorithm: 2\n", ""),
        text.replace("algorithm: 2\n", "algorithm: 1\nearlier_setting: 3\n"),
    ):
        config.write_text(older)
        with pytest.raises(InputError, match=r"cannot be resumed: it was started under version 1 .*without dropout"):
            distillation(teacher_folder, tmp_path / "run", "--max_steps", 2, *LATEST)


def test_averages_without_warm_up_have_their_decay_from_the_first_update(teacher_folder, tmp_path):
    for warm_up, expected in (("false", 0.9), ("true", 0.1)):
        trainer = distillation(
            teacher_folder, tmp_path / "run", "--ema_decay", 0.9, "--ema_warmup", warm_up, "--ema_extra", 0.99
        )
        assert trainer.averages.main.decay_at(0) == pytest.approx(expected)
        (further,) = trainer.averages.further.values()
        assert further.decay_at(0) == pytest.approx(0.99 if warm_up == "false" else 0.1)


def test_times_of_a_grid_are_its_steps_each_as_likely():
    sampler = TimeSampler("uniform", 0.02002002, 0.98098098, steps=1000)
    numbers = sampler((torch.arange(96_100, dtype=torch.float64) + 0.5) / 96_100) * 999
    assert torch.allclose(numbers, numbers.round(), atol=1e-9)
    found = torch.bincount(numbers.round().long(), minlength=1000)
    assert torch.equal(found > 0, (torch.arange(1000) >= 20) & (torch.arange(1000) <= 980))
    assert found[20:981].unique().tolist() == [100]


# What the critic starts from.


def critic_weights(trainer):
    return {name: value.clone() for name, value in trainer.critic.unwrapped.state_dict().items()}


def test_a_critic_may_start_at_random_or_from_another_runs(teacher_folder, tmp_path):
    first = distillation(teacher_folder, tmp_path / "first", "--max_steps", 2)
    first.train()
    head = ["--adversarial.kind", "head"]
    further = distillation(
        teacher_folder,
        tmp_path / "further",
        *head,
        "--critic_start",
        tmp_path / "first",
        "--student",
        tmp_path / "first",
    )
    found = critic_weights(further)
    assert all(torch.equal(found[name], value) for name, value in critic_weights(first).items())
    assert any(name.startswith("head.") for name in found)  # fresh
    further.iteration()
    random = distillation(teacher_folder, tmp_path / "random", "--critic_start", "random")
    same = [
        torch.equal(value, random.critic.unwrapped.state_dict()[name]) for name, value in critic_weights(first).items()
    ]
    assert not any(same)
    again = distillation(teacher_folder, tmp_path / "again", "--critic_start", "random")
    assert all(torch.equal(value, critic_weights(again)[name]) for name, value in critic_weights(random).items())


def test_a_critic_that_cannot_be_had_is_named(teacher_folder, tmp_path):
    with pytest.raises(InputError, match=r"neither one of teacher, random nor a run folder"):
        distillation(teacher_folder, tmp_path / "a", "--critic_start", tmp_path / "nowhere")
    distillation(teacher_folder, tmp_path / "first", "--max_steps", 1).train()
    other = save_teacher(tmp_path / "other", num_layers=1)
    wide = save_teacher(tmp_path / "wide", attention_head_dim=4)
    with pytest.raises(InputError, match=r"critic of .*first does not fit this teacher: .* has the shape"):
        distillation(wide, tmp_path / "b", "--critic_start", tmp_path / "first")
    assert distillation(other, tmp_path / "c", "--critic_start", "random").iteration()[1]
    (checkpoint,) = (tmp_path / "first" / "checkpoints").iterdir()
    (checkpoint / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="nor a run folder with a whole checkpoint"):
        distillation(teacher_folder, tmp_path / "d", "--critic_start", tmp_path / "first")


def test_a_unet_starts_at_random_as_torchcfms():
    from diffusers import UNet2DModel

    small = dict(sample_size=8, block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
    blocks = dict(down_block_types=["DownBlock2D", "AttnDownBlock2D"], up_block_types=["AttnUpBlock2D", "UpBlock2D"])
    network = fresh_network(UNet2DModel(in_channels=1, out_channels=1, **small, **blocks))
    zero = {name for name, value in network.named_parameters() if not value.any() and name.endswith("weight")}
    assert {"conv_out.weight", "mid_block.resnets.0.conv2.weight", "mid_block.attentions.0.to_out.0.weight"} <= zero
    assert not network(torch.randn(2, 1, 8, 8), 0.5).sample.any()


def test_a_critics_log_variance_is_the_teachers_own(tmp_path):
    scheduler = StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    teacher = tmp_path / "teacher"
    InterpolantPipeline(tiny_edm2(in_channels=1, num_classes=10), scheduler).save_pretrained(teacher)
    kept = {"freqs": torch.randn(128), "phases": torch.rand(128), "weight": 3 * torch.randn(1, 128)}
    save_file(kept, teacher / "log_variance.safetensors")
    trainer = distillation(teacher, tmp_path / "run", "--critic_log_variance", "true")
    level = torch.linspace(-1, 1, 5)
    features = 2**0.5 * torch.cos(level[:, None] * kept["freqs"] + kept["phases"])
    expected = features @ (kept["weight"] / kept["weight"].norm()).squeeze()  # of unit norm
    found = trainer.critic.unwrapped.log_variance(level)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # the norm has an ε of 1e-4
    assert trainer.iteration()[1]
    (teacher / "log_variance.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"log_variance\.safetensors cannot be read"):
        distillation(teacher, tmp_path / "run", "--critic_log_variance", "true")


def test_edm2s_forced_normalisation_can_be_switched_off(tmp_path):
    scheduler = StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    network = tiny_edm2(in_channels=1, num_classes=10)
    with torch.no_grad():
        network.out_conv.weight.mul_(3)
    InterpolantPipeline(network, scheduler).save_pretrained(tmp_path / "teacher")
    start = float(network.out_conv.weight.detach().square().mean().sqrt())
    for forced, length in (("true", 1.0), ("false", start)):
        trainer = distillation(
            tmp_path / "teacher", tmp_path / "run", "--forced_weight_normalization", forced, "--learning_rate", 1e-9
        )
        trainer.iteration()
        for trained in (trainer.critic.unwrapped.network, trainer.generator.unwrapped):
            assert trained.out_conv.weight.detach().square().mean().sqrt() == pytest.approx(length, rel=0.02)


# Heads.


@pytest.mark.parametrize("features", ["critic", "teacher"])
@pytest.mark.parametrize("head", ["mlp", "realuid"])
def test_heads_train_on_the_critics_or_the_teachers_features(tmp_path, head, features):
    teacher = save_teacher(tmp_path / "t", patch_size=2)
    trainer = distillation(
        teacher, tmp_path / "run", "--adversarial.kind", "head", "--adversarial.head", head, "--adversarial.features",
        features, "--adversarial.generator_weight", 100, "--objective", "dmd2", "--max_steps", 2,
    )  # fmt: skip
    before = [p.clone() for p in trainer.critic.unwrapped.head.parameters()]
    plain = distillation(teacher, tmp_path / "plain", "--objective", "dmd2")
    norms = [game.iteration()[0]["generator_grad_norm"] for game in (trainer, plain)]
    assert norms[0] > 2 * norms[1]  # the term's gradient reaches the student through a detached objective
    assert any(not torch.equal(p, q) for p, q in zip(trainer.critic.unwrapped.head.parameters(), before, strict=True))
    assert all(p.grad is None for p in trainer.teacher_pipeline.transformer.parameters())


def test_dmd2s_head_makes_one_logit_of_a_map_of_eight():
    network = EDMUNet2DModel(sample_size=16, in_channels=1, model_channels=32, channel_mult=[1, 1], num_blocks=1)
    critic = CriticNetwork(network, "head", "dmd2")
    shapes = [tuple(p.shape) for p in critic.head.parameters()]
    width = (32, 32, 4, 4)
    assert shapes == [width, (32,), (32,), (32,), width, (32,), (32,), (32,), (1, 32, 1, 1), (1,)]
    _, logits, _ = critic(torch.randn(2, 1, 16, 16), torch.zeros(2), Condition())
    assert logits.shape == (2, 1)
    with pytest.raises(ValueError, match=r"larger map than the 4 × 4 .*`adversarial\.head` to mlp"):
        CriticNetwork(
            EDMUNet2DModel(sample_size=8, in_channels=1, model_channels=32, channel_mult=[1, 1]), "head", "dmd2"
        )


# The public si-adistill code's student.


def test_a_guided_student_is_saved_loaded_and_counted(tmp_path):
    teacher = save_teacher(tmp_path / "t", in_channels=1)
    trainer = distillation(
        teacher, tmp_path / "run", "--student_map", "negative_velocity", "--student_guidance_scale", 4, "--max_steps", 1
    )
    trainer.train()
    saved = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run")
    assert saved.config.guidance == {"scale": 4.0, "channels": None}
    assert saved.scheduler.config.prediction_type == "sample"
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = saved([3, 7], latents=latents, output_type="latent")
    assert made.num_network_evaluations == 2
    network, t = saved.transformer, torch.full((2,), 0.5)
    with torch.no_grad():
        guided, plain = (network(latents, t, torch.tensor(y)).sample for y in ([3, 7], [10, 10]))
    torch.testing.assert_close(made.images, -plain - 4 * (guided - plain), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "model_index.json").read_text())["guidance"]["scale"] == 4.0


@pytest.mark.parametrize("conventions", [{}, dict(reversed_time=True, prediction_sign=-1, timestep_scale=0.5)])
def test_a_negated_student_is_minus_the_teachers_velocity_at_its_time(tmp_path, conventions):
    teacher = save_teacher(tmp_path / "t", scheduler=StochasticInterpolantScheduler(**conventions))
    trainer = distillation(teacher, tmp_path / "run", "--student_map", "negative_velocity", "--init_time", 0.3)
    x1, told = torch.randn(3, 1, 8, 8), Condition(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        velocity = trainer.teacher_field.predict(x1, torch.full((3,), 0.3), told)
        made = trainer._student_field(trainer.generator.unwrapped).one_step(x1, trainer.start.init_time, told)
    torch.testing.assert_close(made, -velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "further", "words"),
    [
        (dict(interpolant="vp"), [], "velocity networks on `linear`.*'vp'"),
        (dict(prediction_type="sample"), [], "predicts sample"),
        ({}, ["--student", "first"], "leave `student` out"),
    ],
)
def test_a_student_that_cannot_be_negated_is_refused(tmp_path, scheduler, further, words):
    save_student(tmp_path / "first")
    teacher = save_teacher(tmp_path / "t", scheduler=StochasticInterpolantScheduler(**scheduler))
    further = [tmp_path / word if word == "first" else word for word in further]
    with pytest.raises(InputError, match=words):
        distillation(teacher, tmp_path / "run", "--student_map", "negative_velocity", *further)


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        ({"scale": "4"}, "holds a `scale`"),
        ({"scale": 4.0, "channel": 3}, "holds a `scale`"),
        ({"scale": 2.0}, "null class"),
    ],
)
def test_guidance_of_a_student_that_cannot_be_is_refused(guidance, words):
    network = tiny_sit(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=words):
        OneStepInterpolantPipeline(network, StochasticInterpolantScheduler(), guidance=guidance)


def test_log_variance_of_a_checkpoint_is_kept_by_a_save(tmp_path):
    kept = {"freqs": torch.randn(8), "phases": torch.rand(8), "weight": torch.randn(1, 8)}
    module = LogVariance(kept)
    save_file(module.state_dict(), tmp_path / "u.safetensors")
    other = LogVariance({name: torch.zeros_like(value) + 1 for name, value in kept.items()})
    other.load_state_dict(load_file(tmp_path / "u.safetensors"))
    level = torch.randn(5)
    assert torch.equal(module(level), other(level))
