"""The trainers in this process: what an iteration does, what is refused, what a resumed run insists on."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import tiny_sit
from safetensors.torch import load_file
from trainer_builders import distillation, teaching

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError, TrainingStopped
from si_distill.objectives import PRESETS


def save_teacher(folder, seed=0, scheduler=None, **config):
    pipeline = InterpolantPipeline(
        tiny_sit(seed, **{"num_classes": 10, **config}), scheduler or StochasticInterpolantScheduler()
    )
    pipeline.save_pretrained(folder)
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What an iteration does.


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_critic_updates_share_one_forward_of_the_generator_with_its_update(teacher_folder, tmp_path, critic_steps):
    trainer = distillation(teacher_folder, tmp_path / "run", "--critic_steps", critic_steps)
    calls = {"generator": 0, "critic": 0, "teacher": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    trainer.generator.unwrapped.register_forward_hook(count("generator"))
    trainer.critic.unwrapped.register_forward_hook(count("critic"))
    trainer.teacher_pipeline.transformer.register_forward_hook(count("teacher"))
    trainer.iteration()
    assert calls == {"generator": 1, "critic": critic_steps + 1, "teacher": 1}


def test_each_side_of_the_game_moves_and_the_teacher_does_not(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run")
    networks = {
        "critic": trainer.critic.unwrapped,
        "student": trainer.generator.unwrapped,
        "average": trainer.averages.network,
        "teacher": trainer.teacher_pipeline.transformer,
    }
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    trainer.iteration()
    moved = {
        name: any(not torch.equal(p, q) for p, q in zip(network.parameters(), before[name], strict=True))
        for name, network in networks.items()
    }
    assert moved == {"critic": True, "student": True, "average": True, "teacher": False}
    assert all(p.grad is None for name in ("teacher", "average") for p in networks[name].parameters())
    # The generator's loss has gone through the critic without leaving a gradient in it.
    assert all(p.grad is None for p in trainer.critic.parameters)
    assert all(p.requires_grad for p in trainer.critic.parameters)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("interpolant", ["linear", "trigonometric", "vp", "ddpm", "edm"])
def test_every_preset_plays_on_every_interpolant(tmp_path, preset, interpolant):
    teacher = save_teacher(tmp_path / "t", scheduler=StochasticInterpolantScheduler(interpolant=interpolant))
    trainer = distillation(
        teacher, tmp_path / "run", "--objective", preset, "--critic_steps", 2, "--generator_steps", 2
    )
    metrics, finite = trainer.iteration()
    assert finite
    assert all(torch.isfinite(value) for value in metrics.values())
    assert metrics["generator_grad_norm"] > 0
    assert metrics["critic_grad_norm"] > 0


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "score", "v_prediction", "edm"])
def test_teachers_of_every_prediction_train_and_are_distilled(tmp_path, prediction_type):
    teaching(tmp_path / "t", "--prediction_type", prediction_type, "--t_min", 0.01, "--max_steps", 2).train()
    distillation(tmp_path / "t", tmp_path / "s", "--max_steps", 2).train()
    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "s")
    image = student([3], generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.isfinite(image).all()
    assert image.abs().max() < 100  # no blow-up where α is small


def test_micro_batches_give_the_update_of_one_large_batch(teacher_folder, tmp_path):
    runs = {}
    for name, size, count in (("large", 8, 1), ("micro", 2, 4)):
        trainer = distillation(
            teacher_folder, tmp_path / name, "--objective", "realuid", "--critic_steps", 2, "--generator_steps", 2,
            "--per_device_train_batch_size", size, "--gradient_accumulation_steps", count, "--adam_epsilon", 1e-3,
        )  # fmt: skip
        for _ in range(3):
            metrics, _ = trainer.iteration()
            trainer.step += 1
        runs[name] = {k: v.item() for k, v in metrics.items() if k != "sample_std"}  # no mean over micro-batches
    assert runs["micro"] == pytest.approx(runs["large"], rel=1e-4)


def test_bfloat16_runs_the_networks_and_keeps_the_weights_in_float32(teacher_folder, tmp_path):
    results = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)  # accelerate keeps one precision per process
        trainer = distillation(teacher_folder, tmp_path / precision, "--mixed_precision", precision)
        seen = []
        block = trainer.generator.unwrapped.transformer_blocks[0].attn.to_q
        block.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
        metrics, _ = trainer.iteration()
        assert seen[0] is (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert all(p.dtype == torch.float32 for p in trainer.generator.parameters)
        results[precision] = metrics["critic_loss"]
    assert results["bf16"].dtype == torch.float32
    assert results["bf16"] == pytest.approx(results["no"].item(), rel=0.05)


def test_the_student_in_training_is_the_pipeline_that_comes_out(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", "--max_steps", 3, "--init_time", 0.7)
    trainer.train()
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 9, 4])
    pipeline = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.scheduler.config.init_time == 0.7
    made = pipeline(labels, latents=noise, output_type="latent").images
    with torch.no_grad():
        x_t = 0.7 * noise  # β(0.7) on the linear path
        velocity = trainer.averages.network(x_t, torch.full((4,), 0.7), labels, return_dict=False)[0]
    torch.testing.assert_close(made, x_t - 0.7 * velocity, rtol=1e-5, atol=1e-6)


def test_guidance_changes_the_teacher_only(tmp_path):
    teacher = save_teacher(tmp_path / "t")
    trainers = {w: distillation(teacher, tmp_path / f"{w}", "--guidance_scale", w) for w in (1, 3)}
    losses = {w: trainer.iteration()[0] for w, trainer in trainers.items()}
    assert losses[1]["critic_loss"] == losses[3]["critic_loss"]
    assert losses[1]["field_distance"] != losses[3]["field_distance"]


def test_label_dropout_reaches_the_null_class_at_its_rate(tmp_path):
    trainer = teaching(tmp_path / "t", "--model.class_dropout_prob", 0.3, "--per_device_train_batch_size", 64)
    seen = []
    trainer.trained.unwrapped.class_embed.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    for _ in range(20):
        trainer.iteration()
        trainer.step += 1
    share = (torch.cat(seen) == 10).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 1280) ** 0.5)


# What is refused before anything is written.


def test_a_teacher_that_does_not_fit_is_named(teacher_folder, tmp_path):
    truncated = shutil.copytree(teacher_folder, tmp_path / "truncated")
    weights = truncated / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    reshaped = shutil.copytree(teacher_folder, tmp_path / "reshaped")
    config = reshaped / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    student = tmp_path / "student"
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    OneStepInterpolantPipeline(**teacher.components).save_pretrained(student)
    five_classes = save_teacher(tmp_path / "five", num_classes=5)
    no_null = save_teacher(tmp_path / "no_null", class_dropout_prob=0.0)
    for folder, arguments, words in (
        (tmp_path / "nowhere", [], "nowhere"),
        (truncated, [], "truncated"),
        (reshaped, [], "do not fit"),
        (student, [], "OneStepInterpolantPipeline"),
        (five_classes, ["--objective", "realuid"], "5 classes"),
        (no_null, ["--guidance_scale", 2], "no null class"),
    ):
        with pytest.raises(InputError, match=words):
            distillation(folder, tmp_path / "run", *arguments)
        assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_the_data_is_named(tmp_path):
    for arguments, words in (
        (["--model.sample_size", 16], "`model.sample_size` is 16, but the data set has 8"),
        (["--model.num_classes", 3], "`model.num_classes` is 3, but the data set has 10"),
        (["--model.num_layer", 3], "Unknown setting `model.num_layer`"),
        (["--model.patch_size", 3], "does not divide"),
        (["--model.preset", "SiT-M/2"], "Unknown preset 'SiT-M/2'"),
        (["--data.image_size", 16], "8×8"),
        (["--data.name", "no/such-set"], "Cannot load the data set 'no/such-set'"),
        (["--report_to", "no-such-tracker"], "no-such-tracker"),
    ):
        with pytest.raises(InputError, match=words):
            teaching(tmp_path / "run", *arguments)
        assert not (tmp_path / "run").exists()


# Run folders.


def test_a_folder_that_holds_another_run_is_not_touched(teacher_folder, tmp_path):
    folder = tmp_path / "run"
    distillation(teacher_folder, folder, "--max_steps", 2).train()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"already holds a run.*--resume_from_checkpoint latest"):
        distillation(teacher_folder, folder, "--max_steps", 2)
    with pytest.raises(InputError, match=r"other settings.*learning_rate: 0.0001 then, 0.5 now"):
        distillation(teacher_folder, folder, "--resume_from_checkpoint", "latest", "--learning_rate", 0.5)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    (folder / "notes.txt").write_text("mine")
    distillation(teacher_folder, folder, "--max_steps", 1, "--overwrite_output_dir").train()
    assert [line["step"] for line in lines(folder)] == [1]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_falling_learning_rate_is_not_resumed_to_another_length(teacher_folder, tmp_path):
    """The rate falls to 0 at max_steps: with another end the steps that were made would be off its curve."""
    for law in ("constant", "cosine"):
        distillation(teacher_folder, tmp_path / law, "--max_steps", 1, "--lr_scheduler_type", law).train()
    longer = ("--max_steps", 2, "--resume_from_checkpoint", "latest")
    distillation(teacher_folder, tmp_path / "constant", *longer, "--lr_scheduler_type", "constant").train()
    with pytest.raises(InputError, match=r"started with max_steps=1, where its cosine learning rate .* max_steps=2"):
        distillation(teacher_folder, tmp_path / "cosine", *longer, "--lr_scheduler_type", "cosine")


def test_a_folder_with_foreign_files_or_a_file_is_refused(teacher_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="holds files but no run"):
        distillation(teacher_folder, tmp_path / "photos")
    with pytest.raises(InputError, match="is a file"):
        distillation(teacher_folder, tmp_path / "file")


def test_a_damaged_newest_checkpoint_is_passed_over(teacher_folder, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    distillation(teacher_folder, whole, "--max_steps", 6).train()
    distillation(teacher_folder, folder, "--max_steps", 4, "--save_steps", 2).train()
    checkpoints = folder / "checkpoints"
    newest = checkpoints / "step_00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"is not a whole checkpoint: model.safetensors has .* bytes instead of"):
        distillation(
            teacher_folder, folder, "--max_steps", 6, "--resume_from_checkpoint", checkpoints / "step_00000004"
        ).train()
    distillation(teacher_folder, folder, "--max_steps", 6, "--resume_from_checkpoint", "latest").train()
    assert "Passing over step_00000004: model.safetensors has" in capsys.readouterr().out
    assert [line["generator_loss"] for line in lines(folder)] == [line["generator_loss"] for line in lines(whole)]
    for name, value in load_file(whole / "transformer/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(value, load_file(folder / "transformer/diffusion_pytorch_model.safetensors")[name])


def test_another_number_of_processes_goes_on_if_an_update_keeps_its_images(teacher_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    distillation(teacher_folder, folder, "--max_steps", 1).train()
    manifest = folder / "checkpoints" / "step_00000001" / "manifest.json"
    saved = json.loads(manifest.read_text())
    resume = ("--max_steps", 2, "--resume_from_checkpoint", "latest")
    manifest.write_text(json.dumps({**saved, "world_size": 2, "images_per_update": 8}))
    with pytest.raises(InputError, match=r"saved by 2 process\(es\) with 8 images per update; 1 .* have 4"):
        distillation(teacher_folder, folder, *resume).train()
    manifest.write_text(json.dumps({**saved, "sharded": True}))
    with pytest.raises(InputError, match="saved with FSDP2 and this run is without sharding"):
        distillation(teacher_folder, folder, *resume).train()
    manifest.write_text(json.dumps({**saved, "world_size": 2}))
    distillation(teacher_folder, folder, *resume).train()
    assert "saved by 2 process(es), this run has 1, with the same 4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "model_1.safetensors is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "model_1.safetensors has .* bytes instead of"),
        (lambda file: flip_a_bit(file), "model_1.safetensors is not what was written: its checksum differs"),
    ],
    ids=["missing", "cut", "flipped"],
)
def test_every_damage_to_a_checkpoint_is_seen(teacher_folder, tmp_path, damage, words):
    folder = tmp_path / "run"
    distillation(teacher_folder, folder, "--max_steps", 1).train()
    newest = folder / "checkpoints" / "step_00000001"
    damage(newest / "model_1.safetensors")
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, folder, "--max_steps", 2, "--resume_from_checkpoint", newest).train()


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


class Hostile:
    """Runs a command when it is unpickled freely."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"])
def test_nothing_that_a_checkpoint_holds_runs(teacher_folder, tmp_path, name):
    """With a manifest that was written again to match."""
    folder, sentinel = tmp_path / "run", tmp_path / "sentinel"
    distillation(teacher_folder, folder, "--max_steps", 1).train()
    checkpoint = folder / "checkpoints" / "step_00000001"
    torch.save({"state": Hostile(sentinel)}, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {
        file.name: file.stat().st_size for file in checkpoint.iterdir() if file.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with contextlib.suppress(InputError):  # Accelerate goes on without the random states, which nothing here uses
        distillation(teacher_folder, folder, "--max_steps", 2, "--resume_from_checkpoint", "latest").train()
    assert not sentinel.exists()


def test_old_checkpoints_go_only_when_new_ones_are_whole(teacher_folder, tmp_path):
    distillation(teacher_folder, tmp_path / "run", "--max_steps", 5, "--save_steps", 1, "--save_total_limit", 3).train()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000003", "step_00000004", "step_00000005"]


def test_losses_that_stay_not_finite_stop_the_run_and_leave_the_weights_alone(teacher_folder, tmp_path):
    folder = tmp_path / "run"
    distillation(teacher_folder, folder, "--max_steps", 2).train()
    trainer = distillation(teacher_folder, folder, "--max_steps", 50, "--resume_from_checkpoint", "latest")
    with torch.no_grad():
        trainer.teacher_pipeline.transformer.proj_out.bias.fill_(float("inf"))
    with pytest.raises(TrainingStopped, match=r"not finite in 10 iterations in a row .*smaller learning_rate"):
        trainer.train()
    saved = load_file(folder / "checkpoints" / "step_00000002" / "model_1.safetensors")  # after the critic's
    for name, parameter in trainer.generator.unwrapped.named_parameters():
        assert torch.equal(parameter, saved[name])
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000002"]


def test_the_sample_picture_does_not_disturb_training(teacher_folder, tmp_path):
    for name, every in (("often", 1), ("never", 1000)):
        distillation(teacher_folder, tmp_path / name, "--max_steps", 4, "--eval_steps", every).train()
    often, never = ([line["generator_loss"] for line in lines(tmp_path / name)] for name in ("often", "never"))
    assert often == never
    assert len(list((tmp_path / "often" / "samples").iterdir())) == 5
