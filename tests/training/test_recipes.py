"""Adversarial terms, guidance, schedules and starting students in the real trainer."""

import pytest
import torch
from helpers import tiny_sit
from script_runs import ROOT
from test_trainers import distillation, lines, save_teacher

from si_distill import Condition, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError

RECIPES = sorted(path.stem for path in (ROOT / "configs/recipes").glob("*.yaml"))


def save_student(folder, seed=1, scheduler=None, **config):
    scheduler = scheduler or StochasticInterpolantScheduler(init_time=0.8)
    OneStepInterpolantPipeline(tiny_sit(seed, **{"num_classes": 10, **config}), scheduler).save_pretrained(folder)
    return folder


def recipe(name, teacher, folder, *arguments):
    return distillation(teacher, folder, "--config", ROOT / f"configs/recipes/{name}.yaml", *arguments)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plays(tmp_path, name):
    # EDM2's networks are given noise levels.
    edm2 = dict(interpolant="edm", prediction_type="edm", timestep_type="log_sigma") if name.endswith("edm2") else {}
    scheduler = StochasticInterpolantScheduler(**edm2, init_time=0.5)
    teacher = save_teacher(tmp_path / "teacher", scheduler=scheduler, patch_size=2)  # a map of 4 × 4, for heads
    student = save_student(tmp_path / "student", scheduler=scheduler, patch_size=2)
    trainer = recipe(
        name, teacher, tmp_path / "run", "--student", student, "--generator_start_images", 4,
        "--adversarial.start_images", 8, "--lr_warmup_steps", 0,
    )  # fmt: skip
    adversarial = trainer.adversarial
    before = [p.clone() for p in trainer.generator.parameters]
    seen = []
    for _ in range(3):
        metrics, finite = trainer.iteration()
        trainer.step += 1
        assert finite
        seen.append(metrics)
        moved = any(not torch.equal(p, q) for p, q in zip(trainer.generator.parameters, before, strict=True))
        assert moved == (trainer.step > 1)  # the first 4 images belong to the critic alone
    assert ["generator_loss" in metrics for metrics in seen] == [False, True, True]
    assert ("critic_adversarial_loss" in seen[0]) == (adversarial is not None)
    assert ["generator_adversarial_loss" in metrics for metrics in seen] == [False, False, adversarial is not None]


@pytest.mark.parametrize(
    ("objective", "kind", "drawn"), [("sid", "none", False), ("realuid", "none", True), ("sid", "encoder", True)]
)
def test_real_images_are_drawn_only_when_the_recipe_needs_them(tmp_path, objective, kind, drawn):
    teacher = save_teacher(tmp_path / "t")
    arguments = ["--objective", objective, "--adversarial.kind", kind, "--data.name", "no/such-data"]
    if drawn:
        with pytest.raises(InputError, match="Cannot load the data set 'no/such-data'"):
            distillation(teacher, tmp_path / "run", *arguments)
    else:
        assert distillation(teacher, tmp_path / "run", *arguments).iteration()[1]


def test_lines_of_the_log_are_means_over_the_iterations_that_had_the_value(teacher_folder, tmp_path):
    arguments = ["--max_steps", 8, "--generator_start_images", 20]  # of 4 a step: the generator learns from step 5 on
    for name, every in (("each", 1), ("windows", 4)):
        distillation(teacher_folder, tmp_path / name, *arguments, "--logging_steps", every).train()
    each, windows = lines(tmp_path / "each"), lines(tmp_path / "windows")
    assert [line["generator_loss"] for line in each[:5]] == [None] * 5
    assert windows[0]["generator_loss"] is None
    for key, rows in (("critic_loss", each[4:]), ("generator_loss", each[5:])):
        assert windows[1][key] == pytest.approx(sum(row[key] for row in rows) / len(rows))


@pytest.mark.parametrize("own_times", [False, True])
def test_prediction_and_logits_come_from_one_forward_of_the_critic(teacher_folder, tmp_path, own_times):
    times = ["--adversarial.t_min", 0.0, "--adversarial.t_max", 0.2] if own_times else []
    trainer = distillation(teacher_folder, tmp_path / "run", "--adversarial.kind", "head", *times)
    rows = []
    trainer.critic.unwrapped.network.register_forward_hook(lambda m, i, o: rows.append(len(o[0])))
    trainer.iteration()
    # 4 samples: the critic's update sees fakes and reals (twice with times of their own), the generator's only fakes.
    assert rows == ([12, 8] if own_times else [8, 4])


def test_adversarial_gradient_reaches_the_student_also_where_the_objective_is_detached(teacher_folder, tmp_path):
    norms = {}
    for weight in (0.0, 1e4):
        trainer = recipe(
            "dmd2",
            teacher_folder,
            tmp_path / f"{weight}",
            "--adversarial.generator_weight",
            weight,
            "--critic_steps",
            1,
        )
        norms[weight] = trainer.iteration()[0]["generator_grad_norm"].item()
    assert norms[1e4] > 10 * norms[0.0]


def test_critic_and_generator_may_have_times_of_their_own(tmp_path):
    teacher = save_teacher(
        tmp_path / "t", scheduler=StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm")
    )
    trainer = distillation(
        teacher, tmp_path / "run", "--time_sampler", "lognormal", "--time_mean", -1.2, "--time_std", 1.2,
        "--generator_time_sampler", "karras", "--generator_t_max", 0.8, "--objective_kwargs", "{critic_weight: edm}",
        "--per_device_train_batch_size", 256,
    )  # fmt: skip
    seen = {"critic": [], "generator": []}

    def keep(module, arguments, _):
        seen["critic" if module.proj_out.weight.requires_grad else "generator"].append(arguments[1])

    trainer.critic.unwrapped.network.register_forward_hook(keep)
    _, finite = trainer.iteration()
    assert finite
    assert trainer.start.init_time == pytest.approx(trainer.interpolant.time_of_ratio(2.5))
    critic, generator = (torch.cat(seen[name]).double() for name in ("critic", "generator"))
    sigma = trainer.interpolant.coefficients(critic).beta
    assert sigma.log().mean() == pytest.approx(-1.2, abs=5 * 1.2 / 16)  # five standard errors of 256 draws
    assert generator.max() <= 0.8
    assert generator.mean() == pytest.approx(0.41, abs=5 * 0.23 / 16)  # uniform in EDM's own times


def test_a_finished_student_is_the_start_and_the_critic_starts_from_the_teacher(teacher_folder, tmp_path):
    student = save_student(tmp_path / "student")
    trainer = recipe("sid2a", teacher_folder, tmp_path / "run", "--student", student)
    started = OneStepInterpolantPipeline.from_pretrained(student)
    assert trainer.start.init_time == started.scheduler.config.init_time == 0.8
    for network, expected in (
        (trainer.generator.unwrapped, started.transformer),
        (trainer.averages.network, started.transformer),
        (trainer.critic.unwrapped.network, trainer.teacher_pipeline.transformer),
    ):
        for found, value in zip(network.parameters(), expected.parameters(), strict=True):
            assert torch.equal(found, value)
    assert trainer.pipeline().scheduler.config.init_time == 0.8


def test_a_student_that_does_not_fit_is_named(teacher_folder, tmp_path):
    for name, student, words in (
        (
            "layers",
            save_student(tmp_path / "1", num_layers=3),
            r"transformer_blocks\.2\..* has the shape .* instead of None",
        ),
        ("width", save_student(tmp_path / "2", attention_head_dim=4), r"has the shape \(8, .*instead of \(16, "),
        ("path", save_student(tmp_path / "3", scheduler=StochasticInterpolantScheduler(interpolant="vp")), "'vp'"),
        (
            "kind",
            save_student(tmp_path / "4", scheduler=StochasticInterpolantScheduler(prediction_type="sample")),
            "sample",
        ),
        ("teacher", teacher_folder, "InterpolantPipeline"),
    ):
        with pytest.raises(InputError, match=words):
            distillation(teacher_folder, tmp_path / name, "--student", student)


def test_guidance_of_the_critic_needs_and_uses_its_null_class(tmp_path):
    teacher = save_teacher(tmp_path / "t")
    trainer = distillation(
        teacher, tmp_path / "run", "--guidance_scale", 2, "--critic_guidance_scale", 3, "--critic_class_dropout_prob", 0.5,
        "--per_device_train_batch_size", 64,
    )  # fmt: skip
    labels = []
    trainer.critic.unwrapped.network.class_embed.register_forward_hook(lambda m, i, o: labels.append(i[0]))
    assert trainer.iteration()[1]
    trained, guided = labels
    assert len(trained) == 64
    assert 16 < (trained == 10).sum() < 48  # label dropout of one half, 64 draws
    assert len(guided) == 128  # one batched forward: classes and null classes
    assert (guided[64:] == 10).all()
    assert (guided[:64] != 10).all()


def test_guidance_outside_its_interval_is_none(tmp_path):
    teacher = save_teacher(tmp_path / "t")

    def field_at(*arguments):
        trainer = distillation(teacher, tmp_path / "run", *arguments)
        t = torch.tensor([0.1, 0.5, 0.9])
        x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return trainer.teacher_field(x_t, t, Condition(torch.tensor([1, 2, 3])), "velocity")

    plain, everywhere = field_at(), field_at("--guidance_scale", 3)
    middle = field_at("--guidance_scale", 3, "--guidance_t_min", 0.3, "--guidance_t_max", 0.7)
    torch.testing.assert_close(middle[[0, 2]], plain[[0, 2]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(middle[1], everywhere[1], rtol=1e-5, atol=1e-6)
    assert (everywhere - plain).abs().amin(0).max() > 1e-3


def test_dropout_is_a_function_of_the_step(tmp_path):
    teacher = save_teacher(tmp_path / "t", dropout=0.3)
    losses = []
    for run, other_draws in (("a", 0), ("b", 5)):
        trainer = distillation(teacher, tmp_path / run, "--max_steps", 3)
        torch.randn(other_draws)  # whatever else has used the process's generator
        trainer.train()
        losses.append([(line["critic_loss"], line["generator_loss"]) for line in lines(tmp_path / run)])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
