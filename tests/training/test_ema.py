"""Averages against closed forms, snapshots of real runs, and averages that are made after training."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError, TrainingStopped
from si_distill.settings import parse_settings
from si_distill.training.averaging.ema import EMA, Averages, half_life, power_function
from si_distill.training.averaging.posthoc import (
    LARGEST_SIGMA_REL,
    Snapshots,
    fit_profile,
    power_exponent,
    reconstruct,
)
from si_distill.training.config import TeacherConfig
from si_distill.training.teacher import TeacherTrainer

ROOT = Path(__file__).parent.parent.parent
MODEL = "{patch_size: 4, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8}"
SMALL = "--per_device_train_batch_size 4 --logging_steps 1 --eval_steps 1000".split()
AVERAGES = """
--ema_halflife_images 20 --ema_rampup_ratio 0.9 --ema_extra 0.5 64 --ema_power_sigmas 0.05 0.2 --learning_rate 1e-2
""".split()


def settings(folder, *arguments) -> TeacherConfig:
    return parse_settings(TeacherConfig, list(map(str, ["--output_dir", folder, "--model", MODEL, *SMALL, *arguments])))


def teach(folder, *arguments) -> TeacherTrainer:
    trainer = TeacherTrainer(settings(folder, *AVERAGES, *arguments))
    trainer.train()
    return trainer


class Point(nn.Module):
    """A network that is one vector, in float64."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def at(self, value: torch.Tensor, count: int) -> "Point":
        with torch.no_grad():
            self.weight.copy_(value)
            self.count.fill_(count)
        return self


def random_walk(length: int, size: int = 8) -> torch.Tensor:
    """Weights θ(1) … θ(length) (length, size)."""
    steps = torch.randn(length, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return steps.cumsum(0)


def profile_weights(exponent: float, length: int) -> torch.Tensor:
    """The integral of (γ+1) τ^γ / t^(γ+1) over (k − 1, k] for k = 1 … t: (length,)."""
    edges = (torch.arange(length + 1, dtype=torch.float64) / length) ** (exponent + 1)
    return edges.diff()


# Decay rules.


def test_a_constant_decay_follows_the_formula_and_copies_buffers():
    network = nn.BatchNorm1d(2)
    ema = EMA.of(network, 0.5)
    expected = network.weight.detach().clone()
    for n, value in enumerate([3.0, -1.0, 2.0, 7.0, 5.0, 1.0, 0.0, 4.0, 2.0, 6.0]):
        with torch.no_grad():
            network.weight.fill_(value)
            network.running_mean.fill_(value)
        ema.update(network, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.network.weight, expected)
        assert torch.equal(ema.network.running_mean, network.running_mean)
    assert ema.decay_at(8) == 0.5  # the warm-up is over
    assert not ema.network.weight.requires_grad


@pytest.mark.parametrize("batch", [1, 10, 25])
def test_after_one_half_life_of_images_the_average_has_moved_half_way(batch):
    network = Point(1)
    ema = EMA.of(network, half_life(100, None, batch))
    network.at(torch.ones(1), 0)  # the weights step from 0 to 1 and stay
    for n in range(200 // batch):
        ema.update(network, n)
        assert ema.network.weight.item() == pytest.approx(1 - 0.5 ** ((n + 1) * batch / 100), rel=1e-12)


def test_ramp_up_bounds_the_half_life_by_a_share_of_the_images_seen():
    rule = half_life(1000, 0.05, 10)
    assert rule(0) == 0.0  # nothing seen: the initial weights are forgotten
    assert rule(100) == pytest.approx(0.5 ** (10 / 50), rel=1e-12)  # 1,000 images seen
    assert rule(1999) < rule(2000) == rule(3000) == pytest.approx(0.5 ** (10 / 1000), rel=1e-12)


# Power functions.


def test_width_and_exponent_are_inverse_and_have_the_values_of_the_paper():
    for sigma_rel in (1e-3, 0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = power_exponent(sigma_rel)
        assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(sigma_rel, rel=1e-9)
    # Karras et al. 2024, section 3.1.
    assert power_exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    assert power_exponent(LARGEST_SIGMA_REL) == pytest.approx(0, abs=1e-9)


def test_width_is_the_standard_deviation_of_the_profile():
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for sigma_rel in (0.05, 0.1, 0.25):
        weights = profile_weights(power_exponent(sigma_rel), 200_000)
        mean = (weights * tau).sum()
        assert (weights * (tau - mean) ** 2).sum().sqrt().item() == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, math.nan])
def test_a_width_without_a_rising_profile_is_refused(sigma_rel):
    with pytest.raises(InputError, match=r"must lie in \(0, 0.2887\]"):
        power_exponent(sigma_rel)


@pytest.mark.parametrize("exponent", [0.0, 2.0, 6.94])
@pytest.mark.parametrize("left_out", [0, 20])
def test_a_power_average_is_the_mean_of_the_trajectory_under_its_profile(exponent, left_out):
    for trajectory in (random_walk(50), torch.arange(1, 51, dtype=torch.float64)[:, None] ** 2):
        trajectory[:left_out] = 1e3  # as long as nothing is learned, the weights are the initial ones
        network = Point(trajectory.shape[1]).at(torch.full((trajectory.shape[1],), 1e3), 0)
        ema = EMA.of(network, power_function(exponent))
        for n, value in list(enumerate(trajectory))[left_out:]:
            ema.update(network.at(value, n), n)
            expected = profile_weights(exponent, n + 1) @ trajectory[: n + 1]
            torch.testing.assert_close(ema.network.weight, expected, rtol=1e-11, atol=1e-11)


# Reconstruction.


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A random walk of 1,280 updates and its 64 snapshots of σ_rel 0.05 and 0.1."""
    trajectory, network = random_walk(1280), Point(8)
    snapshots = Snapshots(tmp_path_factory.mktemp("walk"))
    averages = {s: EMA.of(network, power_function(power_exponent(s))) for s in (0.05, 0.1)}
    for n, value in enumerate(trajectory):
        for sigma_rel, ema in averages.items():
            ema.update(network.at(value, n + 1), n)
            if (n + 1) % 20 == 0:
                snapshots.write(ema.network.state_dict(), ["count"], sigma_rel, n + 1)
    return trajectory, snapshots


def miss(made, sigma_rel, trajectory):
    """The error relative to how far the average is from the last weights."""
    expected = profile_weights(power_exponent(sigma_rel), len(trajectory)) @ trajectory
    return ((made - expected).norm() / (trajectory[-1] - expected).norm()).item()


# Twice and more what four walks of other seeds missed by: 4e-4, 1.3e-5, 1e-5, 1.3e-4.
@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.03, 1e-3), (0.07, 3e-5), (0.15, 3e-5), (0.2, 5e-4)])
def test_an_average_that_was_not_stored_comes_close_to_the_true_one(walk, sigma_rel, tolerance):
    trajectory, snapshots = walk
    made = reconstruct(snapshots, sigma_rel)
    assert miss(made["weight"], sigma_rel, trajectory) < tolerance
    assert miss(made["weight"], 1.05 * sigma_rel, trajectory) > 20 * tolerance  # it is this length and no other
    assert made["count"] == 1280


def test_an_earlier_step_uses_what_was_stored_until_then(walk):
    trajectory, snapshots = walk
    made = reconstruct(snapshots, 0.07, step=640)
    assert miss(made["weight"], 0.07, trajectory[:640]) < 1e-3
    assert made["count"] == 640


def test_a_stored_average_is_given_back_and_the_fit_finds_it_too(walk):
    _, snapshots = walk
    files = snapshots.files()
    for (sigma_rel, step), path in list(files.items())[-4:]:
        assert torch.equal(reconstruct(snapshots, sigma_rel, step)["weight"], load_file(path)["weight"])
    exponents, times = [power_exponent(s) for s, _ in files], [step for _, step in files]
    for n in (40, 101):
        coefficients, error = fit_profile(exponents, times, exponents[n], times[n])
        np.testing.assert_allclose(coefficients, np.eye(len(files))[n], rtol=0, atol=1e-7)
        assert error < 1e-6


def test_coefficients_sum_to_one_and_minimise_the_distance_of_the_profiles():
    exponents, times = [16.97] * 5 + [6.94] * 5, list(range(1, 6)) * 2
    tau = (np.arange(100_000) + 0.5) / 20_000  # midpoints on [0, 5]

    def profile(exponent, time):
        return (exponent + 1) * tau**exponent / time ** (exponent + 1) * (tau <= time)

    stored = np.array([profile(g, t) for g, t in zip(exponents, times, strict=True)])
    wanted = profile(10.0, 5)
    coefficients, error = fit_profile(exponents, times, 10.0, 5)
    distance = np.linalg.norm(coefficients @ stored - wanted)
    assert coefficients.sum() == pytest.approx(1, abs=1e-10)
    assert distance / np.linalg.norm(wanted) == pytest.approx(error, rel=1e-2)
    directions = np.random.default_rng(0).normal(size=(20, 10))
    for direction in directions - directions.mean(1, keepdims=True):  # keep the sum
        assert np.linalg.norm((coefficients + 1e-2 * direction) @ stored - wanted) > distance


def test_what_cannot_be_reconstructed_is_named(walk, tmp_path):
    _, snapshots = walk
    with pytest.raises(InputError, match=r"holds no snapshots.*ema_power_sigmas"):
        reconstruct(Snapshots(tmp_path / "nothing"), 0.07)
    with pytest.raises(InputError, match=r"must lie in \(0, 0.2887\], got 0.3"):
        reconstruct(snapshots, 0.3)
    with pytest.raises(InputError, match=r"no snapshot of step 1300 .*between 20 and 1280.*1280"):
        reconstruct(snapshots, 0.07, step=1300)
    with pytest.raises(InputError, match=r"σ_rel 0.001 cannot be made at step 1280.*128 snapshots.*0.05, 0.1.*misses"):
        reconstruct(snapshots, 0.001)


def test_damaged_and_foreign_snapshots_are_named(tmp_path):
    snapshots, weights = Snapshots(tmp_path), {"weight": torch.ones(4)}
    for step in (1, 2, 3):
        snapshots.write(weights, [], 0.05, step)
    path = snapshots.files()[0.05, 2]
    snapshots.write({"weight": torch.ones(5)}, [], 0.05, 2)
    with pytest.raises(InputError, match=f"{path.name} holds other tensors"):
        reconstruct(snapshots, 0.06)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=f"{path.name} is damaged"):
        reconstruct(snapshots, 0.06)


# In a run.


def test_all_averages_of_a_run_follow_their_own_rules(tmp_path):
    network = Point(2)
    averages = Averages(network, settings(tmp_path / "run", *AVERAGES, "--max_steps", 30), images_per_update=4)
    averages.prepare(Accelerator())
    alone = [EMA.of(network, rule) for rule in (half_life(20, 0.9, 4), 0.5, half_life(64, 0.9, 4))]
    alone += [EMA.of(network, power_function(power_exponent(s))) for s in (0.05, 0.2)]
    for n, value in enumerate(random_walk(30, 2)):
        averages.update(network.at(value, n), n)
        for ema in alone:
            ema.update(network, n)
    together = [averages.main, *averages.further.values(), *averages.power.values()]
    assert list(averages.further) == ["decay_0.5", "halflife_64"]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.network.weight, other.network.weight)
    assert len({tuple(ema.network.weight.tolist()) for ema in together}) == 5
    assert averages.network is averages.main.network


def contents(folder):
    files = [*folder.glob("ema*/*"), folder / "transformer/diffusion_pytorch_model.safetensors"]
    return {str(path.relative_to(folder)): load_file(path) for path in files}


def test_a_resumed_run_has_the_averages_and_snapshots_of_the_uninterrupted_one(tmp_path):
    steps = ["--save_steps", 3, "--ema_snapshot_steps", 2]
    teach(tmp_path / "whole", "--max_steps", 9, *steps)
    interrupted = TeacherTrainer(settings(tmp_path / "run", *AVERAGES, "--max_steps", 9, *steps))
    store = interrupted.averages.store

    def dying_store(step):
        store(step)
        if step == 8:  # after the snapshots and before any checkpoint of this step
            raise KeyboardInterrupt

    interrupted.averages.store = dying_store
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    stale = sorted((tmp_path / "run" / "ema_snapshots").glob("step_00000008*"))
    assert len(stale) == 2
    for path in stale:
        path.write_bytes(b"of another future")
    (tmp_path / "run" / "ema_snapshots" / "step_00000007-sigma_0.05.safetensors.tmp").write_bytes(b"cut off")
    teach(tmp_path / "run", "--max_steps", 9, *steps, "--resume_from_checkpoint", "latest")

    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "run")
    expected = {f"ema_snapshots/step_{n:08d}-sigma_{s}.safetensors" for n in (2, 4, 6, 8, 9) for s in (0.05, 0.2)}
    expected |= {"ema/decay_0.5.safetensors", "ema/halflife_64.safetensors"}
    assert whole.keys() == resumed.keys() == expected | {"transformer/diffusion_pytorch_model.safetensors"}
    for name, tensors in whole.items():
        for key, tensor in tensors.items():
            assert tensor.equal(resumed[name][key]), (name, key)


def test_snapshots_past_the_resumed_step_go_before_new_ones_come(tmp_path):
    folder = tmp_path / "run"
    teach(folder, "--max_steps", 6, "--save_steps", 2, "--ema_snapshot_steps", 1)
    resume = ["--resume_from_checkpoint", folder / "checkpoints" / "step_00000004"]
    teach(folder, "--max_steps", 7, "--save_steps", 100, "--ema_snapshot_steps", 100, *resume)
    assert sorted({step for _, step in Snapshots(folder / "ema_snapshots").files()}) == [1, 2, 3, 4, 7]


def test_a_snapshot_that_cannot_be_written_stops_the_run_with_a_sentence(tmp_path):
    trainer = TeacherTrainer(settings(tmp_path / "run", *AVERAGES, "--max_steps", 1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ema_snapshots").write_text("a file in the way")
    with pytest.raises(
        TrainingStopped, match=r"Could not write the averages of step 1 .*--resume_from_checkpoint latest"
    ):
        trainer.averages.store(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ema_halflife_images", 0], "`ema_halflife_images` must be a positive"),
        (["--ema_halflife_images", 0.5], "`ema_halflife_images` must be at least 1"),
        (["--ema_rampup_ratio", -1], "`ema_rampup_ratio` must be a positive"),
        (["--ema_extra", 0.9, -0.1], r"`ema_extra` must hold decays in \[0, 1\) or half-lives"),
        (["--ema_extra", 0.9, 0.9], "`ema_extra` holds a value twice"),
        (["--ema_power_sigmas", 0.3], "σ_rel must lie in"),
        (["--ema_power_sigmas", 0.1, 0.1], "`ema_power_sigmas` holds a value twice"),
        (["--ema_snapshot_steps", 0], "`ema_snapshot_steps` must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        settings(tmp_path / "run", *arguments)


# The script.


@pytest.fixture(scope="module")
def export():
    """The main function of training/export_ema.py."""
    spec = importlib.util.spec_from_file_location("export_ema", ROOT / "training" / "export_ema.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return lambda *arguments: script.main(list(map(str, arguments)))


def test_the_script_makes_pipelines_of_other_averages(tmp_path, export):
    run, made, taken = tmp_path / "run", tmp_path / "made", tmp_path / "taken"
    teach(run, "--max_steps", 8, "--save_steps", 8, "--ema_snapshot_steps", 1)
    export("--run", run, "--sigma_rel", 0.1, "--output", made)
    export("--run", run, "--average", "decay_0.5", "--output", taken)
    expected = reconstruct(Snapshots(run / "ema_snapshots"), 0.1)
    for folder, weights in ((made, expected), (taken, load_file(run / "ema" / "decay_0.5.safetensors"))):
        pipeline = InterpolantPipeline.from_pretrained(folder)
        own = InterpolantPipeline.from_pretrained(run)
        assert all(torch.equal(value, weights[name]) for name, value in pipeline.transformer.state_dict().items())
        assert any(not torch.equal(value, weights[name]) for name, value in own.transformer.state_dict().items())
        assert pipeline.scheduler.config == own.scheduler.config
        assert pipeline.config.id2label == own.config.id2label

    for arguments, words in (
        ([], "Give either --sigma_rel"),
        (["--sigma_rel", 0.1, "--average", "decay_0.5"], "Give either --sigma_rel"),
        (["--average", "decay_0.5", "--step", 3], "--step 3 needs --sigma_rel"),
        (["--average", "decay_0.7"], "decay_0.7.*Averages of this run: decay_0.5, halflife_64"),
    ):
        with pytest.raises(InputError, match=words):
            export("--run", run, "--output", tmp_path / "new", *arguments)
    with pytest.raises(InputError, match="holds no snapshots"):
        export("--run", tmp_path / "nowhere", "--output", tmp_path / "new", "--sigma_rel", 0.1)
    with pytest.raises(InputError, match="is not empty"):
        export("--run", run, "--output", made, "--sigma_rel", 0.1)
    Snapshots(run / "ema_snapshots").write({"weight": torch.ones(3)}, [], 0.1, 8)
    with pytest.raises(InputError, match="The average has other tensors than the transformer"):
        export("--run", run, "--output", tmp_path / "new", "--sigma_rel", 0.1)
    (run / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(InputError, match="holds a DDPMPipeline"):
        export("--run", run, "--output", tmp_path / "new", "--sigma_rel", 0.1)
    (run / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"Cannot load the pipeline.*model_index.json"):
        export("--run", run, "--output", tmp_path / "new", "--sigma_rel", 0.1)
    assert not (tmp_path / "new").exists()


def test_the_script_keeps_a_student_a_student(tmp_path, export):
    from helpers import tiny_sit

    student, other = tiny_sit(0), tiny_sit(1)
    OneStepInterpolantPipeline(student, StochasticInterpolantScheduler(init_time=0.7)).save_pretrained(tmp_path / "run")
    Snapshots(tmp_path / "run" / "ema_snapshots").write(other.state_dict(), [], 0.05, 4)
    export("--run", tmp_path / "run", "--sigma_rel", 0.05, "--output", tmp_path / "out")
    pipeline = OneStepInterpolantPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.init_time == 0.7
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
