"""Adam with moments in 8 bits: what it changes, what it needs, what is refused."""

import importlib.metadata
from importlib.util import find_spec

import pytest
import torch
from helpers import tiny_sit
from safetensors.torch import load_file
from script_runs import metrics
from trainer_builders import distillation, teaching

from si_distill.errors import InputError
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.dry_run.report import dry_run
from si_distill.training.optimizers import moment_bytes

needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="pip install 'si_distill[8bit]'")
#: Large enough for matrices of 4,096 values, below which bitsandbytes keeps 32 bits.
MODEL = ["--model", "{patch_size: 4, num_layers: 1, num_attention_heads: 2, attention_head_dim: 32}"]
SETTINGS = [*MODEL, "--data.name", "digits", "--learning_rate", "1e-3", "--weight_decay", "0.01"]


def teacher(folder, *arguments):
    return teaching(folder, *SETTINGS, "--use_8bit_adam", "true", *arguments)


@needs_bitsandbytes
def test_updates_are_nearly_those_of_32_bits(tmp_path):
    teacher(tmp_path / "8", "--max_steps", 20).train()
    teaching(tmp_path / "32", *SETTINGS, "--max_steps", 20).train()
    found, expected = (torch.tensor(metrics(tmp_path / name, "loss")) for name in ("8", "32"))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert not found.equal(expected)


@needs_bitsandbytes
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    teacher(tmp_path / "whole", "--max_steps", 6).train()
    teacher(tmp_path / "parts", "--max_steps", 3).train()
    teacher(tmp_path / "parts", "--max_steps", 6, "--resume_from_checkpoint", "latest").train()
    assert metrics(tmp_path / "parts", "loss", "grad_norm") == metrics(tmp_path / "whole", "loss", "grad_norm")
    one, other = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(one[name].equal(other[name]) for name in one)


@needs_bitsandbytes
def test_critic_and_student_have_it_and_the_estimate_knows_it(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", "--use_8bit_adam", "true")
    trainer.iteration()
    for trained in (trainer.critic, trainer.generator):
        states = trained.optimizer.state.values()
        kept = [value for state in states for name, value in state.items() if name.startswith(("state", "absmax"))]
        assert {value.dtype for value in kept} == {torch.uint8, torch.float32}
        assert moment_bytes(trained.unwrapped, True) == sum(v.numel() * v.element_size() for v in kept)


def test_moments_take_a_quarter_of_their_bytes():
    network = tiny_sit(num_classes=3, attention_head_dim=64).to("meta")
    assert moment_bytes(network, False) == 8 * sum(p.numel() for p in network.parameters())
    large = [p.numel() for p in network.parameters() if p.numel() >= 4096]
    small = sum(p.numel() for p in network.parameters()) - sum(large)
    assert moment_bytes(network, True) == pytest.approx(2 * sum(large) * (1 + 4 / 256) + 8 * small, rel=1e-3)


@pytest.mark.parametrize(
    ("installed", "sharded", "message"),
    [
        (None, False, r"not installed: pip install 'si_distill\[8bit\]'"),
        ("0.49.2", False, "needs bitsandbytes 0.50 or later, and 0.49.2 is installed"),
        ("0.49rc1", False, "needs bitsandbytes 0.50 or later, and 0.49rc1 is installed"),
        ("0.50.2", True, "cannot be used with FSDP2"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, installed, sharded, message):
    version = importlib.metadata.version

    def found(name):
        if name != "bitsandbytes":
            return version(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", found)
    if not sharded:
        with pytest.raises(InputError, match=message):
            distillation(tmp_path / "no-teacher", tmp_path / "run", "--use_8bit_adam", "true")
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    argv = [*SETTINGS, "--data.image_size", "8", "--output_dir", str(tmp_path / "run"), "--use_8bit_adam", "true"]
    with pytest.raises(InputError, match=message):
        dry_run(parse_settings(TeacherConfig, argv))
    assert not (tmp_path / "run").exists()


@needs_bitsandbytes
def test_a_dry_run_says_it(tmp_path):
    argv = [*SETTINGS, "--output_dir", str(tmp_path / "run")]
    moments = []
    for given in ([], ["--use_8bit_adam", "true"]):
        text = dry_run(parse_settings(TeacherConfig, [*argv, *given]))
        assert ("AdamW, weight decay 0.01, moments in 8 bits" in text) == bool(given)
        moments.append(text.split("Adam's moments ")[1].split(",")[0])
    assert moments[0] != moments[1]
