"""Several real processes: DDP and FSDP2 against one process, saving, kills, signals, another number of processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from diffusers_models import tiny_dit
from helpers import tiny_edm2
from safetensors.torch import load_file
from script_runs import DISTILL, ROOT, environment, metrics
from trainer_builders import distillation, teaching

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError

LOSSES = ("critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm", "field_distance")
#: Two processes with two micro-batches each make the update of one process.
CUT = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2".split()
#: Saved, sampled and measured on the way, with an adversarial head on the critic and every kind of average.
WHOLE = """
--max_steps 4 --save_steps 2 --eval_steps 2 --eval_metric_steps 4 --evaluation.num_samples 20 --adversarial.kind head
--adversarial.generator_weight 0.1 --ema_extra 0.5 --ema_power_sigmas 0.1
""".split()
SHORT = ["--max_steps", "3"]
#: Adam without momentum follows the sign of a gradient that is nothing but rounding.
SMOOTH = ["--adam_epsilon", "1e-3"]
EDM2 = "--objective sid --augment_prob 0 --critic_log_variance true --data.image_size 8".split()
#: Draws of its own for each update, the student first, no backward pass through the frozen critic, and a head on the
#: teacher's features, so that the critic's wrapper runs twice before one backward pass; a student of several steps, whose
#: wrapper runs up to four times.
FRESH = """
--objective dmd2 --critic_draws fresh --generator_first true --adversarial.kind head --adversarial.features teacher
--adversarial.own_noise true --adversarial.real_apart true --adversarial.generator_weight 0.1 --weight_decay 0.1
--augment_prob 0 --student_steps 1 2 4 --critic_sees_level true
--flow_map.weight 0.5 --flow_map.starts both --flow_map.batch_share 0.6
""".split()
DIT = "--objective cross_term --augment_prob 0 --gradient_checkpointing true".split()
TEACH = [
    "--data.name",
    "digits",
    "--model",
    "{patch_size: 4, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8}",
]
TEACH += "--learning_rate 1e-3 --augment_prob 0.3 --logging_steps 1 --max_steps 3".split()


def training(script, arguments, sharded, die) -> dict:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    return {"script": script, "arguments": list(map(str, arguments)), "sharded": sharded, "port": port, "die": die}


def entry(folder, teacher, *arguments, sharded=False, die=None):
    arguments = [*DISTILL, *SMOOTH, *CUT, "--teacher", teacher, "--output_dir", folder, *arguments]
    return training("train_distill", arguments, sharded, die)


def teaching_entry(folder):
    arguments = [*TEACH, *SMOOTH, *CUT, "--output_dir", folder]
    return training("train_teacher", arguments, True, None)


@pytest.fixture(scope="module")
def edm2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm2")
    scheduler = StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    InterpolantPipeline(tiny_edm2(in_channels=1, num_classes=10), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    network = tiny_dit(in_channels=1, out_channels=1, num_embeds_ada_norm=10)
    InterpolantPipeline(network, StochasticInterpolantScheduler()).save_pretrained(folder)
    return folder


class Played:
    """What groups of ranks left behind (see ranks.py)."""

    def __init__(self, folder):
        self.folder = folder

    def __truediv__(self, name):
        return self.folder / name

    def codes(self, group) -> list[int]:
        return json.loads((self.folder / f"{group}.codes").read_text())

    def printed(self, group) -> str:
        return (self.folder / f"{group}.0.log").read_text()

    def errors(self, group) -> list:
        return json.loads((self.folder / f"{group}.0.errors").read_text())


@pytest.fixture(scope="module")
def played(teacher_folder, edm2_folder, dit_folder, tmp_path_factory):
    """Three groups of ranks.

    0. Runs of two processes; in the last one rank 0 is killed while it writes the checkpoint of step 4.
    1. Two new processes go on where these were killed and, from the checkpoint of step 2, the others stopped; in the
       last run one of them gets SIGTERM.
    2. One process goes on with what two have saved.
    """
    folder = tmp_path_factory.mktemp("ranks")
    latest, longest = ["--resume_from_checkpoint", "latest"], ["--max_steps", 100000, "--save_steps", 100000]
    size, one_micro_batch = "--per_device_train_batch_size", ["--gradient_accumulation_steps", 1]
    trainings = [
        [
            entry(folder / "ddp", teacher_folder, *WHOLE),
            entry(folder / "fsdp", teacher_folder, *WHOLE, sharded=True),
            entry(folder / "fresh-ddp", teacher_folder, *FRESH, *SHORT),
            entry(folder / "fresh-fsdp", teacher_folder, *FRESH, *SHORT, sharded=True),
            entry(folder / "edm2", edm2_folder, *EDM2, *SHORT, sharded=True),
            entry(folder / "dit", dit_folder, *DIT, *SHORT, sharded=True),
            teaching_entry(folder / "teacher"),
            entry(folder / "killed", teacher_folder, *WHOLE, sharded=True, die=[4, "writing"]),
        ],
        [
            entry(folder / "killed", teacher_folder, *WHOLE, *latest, sharded=True),
            entry(folder / "ddp-resumed", teacher_folder, *WHOLE, *latest),
            entry(folder / "stopped", teacher_folder, *longest, sharded=True),
        ],
        [
            entry(folder / "fsdp-alone", teacher_folder, *WHOLE, *latest, *one_micro_batch, size, 4, sharded=True),
            entry(folder / "fsdp-alone", teacher_folder, *WHOLE, *latest, *one_micro_batch, size, 8, sharded=True),
        ],
    ]
    copies = [[], [("ddp", "ddp-resumed")], [("fsdp", "fsdp-alone")]]
    plan = folder / "plan.json"
    groups = [
        {"ranks": ranks, "copies": [[str(folder / name) for name in pair] for pair in pairs], "trainings": each}
        for ranks, pairs, each in zip((2, 2, 1), copies, trainings, strict=True)
    ]
    plan.write_text(json.dumps(groups))
    process = subprocess.Popen([sys.executable, ROOT / "tests/training/ranks.py", plan], env=environment(), cwd=ROOT)
    log = folder / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline, "\n".join(path.read_text() for path in sorted(folder.glob("*.0.log")))
        time.sleep(0.1)
    if process.poll() is None:
        os.kill(json.loads((folder / "1.pids").read_text())[1], signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    return Played(folder)


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same_trajectory(folder, expected, names=LOSSES):
    """Equal up to the order of sums in float32."""
    for found, wanted in zip(metrics(folder, *names), metrics(expected, *names), strict=True):
        assert found == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)


def assert_same_bits(folder, expected):
    assert metrics(folder, *LOSSES) == metrics(expected, *LOSSES)
    found, wanted = weights(folder), weights(expected)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def one_process(folder, teacher, *arguments):
    distillation(teacher, folder, *DISTILL, *SMOOTH, "--per_device_train_batch_size", 8, *arguments).train()
    return folder


@pytest.fixture(scope="module")
def alone(teacher_folder, tmp_path_factory):
    return one_process(tmp_path_factory.mktemp("one") / "run", teacher_folder, *WHOLE)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_save_and_measure_as_one_does(played, alone, kind):
    assert played.errors(0) == [None] * 7, played.printed(0)
    folder = played / kind
    assert_same_trajectory(folder, alone)
    for name in ("ema/decay_0.5.safetensors", "ema_snapshots/step_00000004-sigma_0.1.safetensors"):
        found, wanted = load_file(folder / name), load_file(alone / name)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[key], value, atol=2e-5) for key, value in wanted.items())
    measured = [json.loads((path / "evaluations.jsonl").read_text()) for path in (folder, alone)]
    assert measured[0]["frechet_distance"] == pytest.approx(measured[1]["frechet_distance"], rel=1e-3)
    assert len(list((folder / "samples").glob("*.png"))) == 3
    files = {path.relative_to(folder) for path in (folder / "best").rglob("*") if path.is_file()}
    assert files == {path.relative_to(alone) for path in (alone / "best").rglob("*") if path.is_file()}


def test_fresh_draws_and_a_head_on_the_teacher_are_those_of_one_process(played, teacher_folder, tmp_path):
    halves = (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2".split()
    )  # each balances the flow-map term
    expected = one_process(tmp_path / "run", teacher_folder, *FRESH, *SHORT, *halves)
    for kind in ("ddp", "fsdp"):
        assert_same_trajectory(played / f"fresh-{kind}", expected, (*LOSSES, "flow_map_residual"))


def test_a_sharded_run_leaves_an_ordinary_pipeline(played, alone):
    """Whole weights of the original class, as one process writes them."""
    assert (played / "fsdp/transformer/config.json").read_text() == (alone / "transformer/config.json").read_text()
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made, expected = (
        OneStepInterpolantPipeline.from_pretrained(folder)([3, 7], latents=latents, output_type="pt").images
        for folder in (played / "fsdp", alone)
    )
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    manifest = json.loads((played / "fsdp/checkpoints/step_00000004/manifest.json").read_text())
    written = {name.rsplit("/", 1)[-1] for name in manifest["files"] if name.startswith("optimizer_1/")}
    assert {"__0_0.distcp", "__1_0.distcp"} <= written  # each rank its own shards


def test_edm2_keeps_its_weights_normalised_when_they_are_sharded(played, edm2_folder, tmp_path):
    assert_same_trajectory(played / "edm2", one_process(tmp_path / "run", edm2_folder, *EDM2, *SHORT))


def test_gradients_flow_through_a_sharded_teacher_of_diffusers_own_class(played, dit_folder, tmp_path):
    """With checkpointing on the shards and without it in one process."""
    arguments = [*DIT, "--gradient_checkpointing", "false", *SHORT]
    assert_same_trajectory(played / "dit", one_process(tmp_path / "run", dit_folder, *arguments))


def test_a_teacher_is_trained_in_shards(played, tmp_path):
    teaching(tmp_path / "run", *TEACH, *SMOOTH, "--per_device_train_batch_size", 8).train()
    assert_same_trajectory(played / "teacher", tmp_path / "run", ("loss", "grad_norm"))


def test_a_sharded_run_killed_inside_a_save_resumes_bit_for_bit(played):
    assert played.codes(0)[0] == -signal.SIGKILL, played.printed(0)
    assert played.errors(1) == [None, None], played.printed(1)
    assert "Passing over step_00000004.tmp: its saving was cut off" in played.printed(1)
    assert_same_bits(played / "killed", played / "fsdp")


def test_two_processes_resume_bit_for_bit(played):
    assert_same_bits(played / "ddp-resumed", played / "ddp")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(played):
    printed = played.printed(1)
    assert played.codes(1) == [143, 143], printed
    assert "--resume_from_checkpoint latest" in printed
    assert "Traceback" not in printed
    (saved,) = (played / "stopped" / "checkpoints").iterdir()
    assert metrics(played / "stopped")[-1] == (int(saved.name[5:]),)


def test_one_process_goes_on_with_the_shards_of_two(played, alone):
    assert played.codes(2) == [0], played.printed(2)
    assert "with 8 images per update; 1 process(es)" in played.errors(2)[0]
    assert "saved by 2 process(es), this run has 1, with the same 8 images" in played.printed(2)
    assert_same_trajectory(played / "fsdp-alone", alone)


def test_another_number_of_processes_goes_on_with_the_same_images(played, alone, teacher_folder, tmp_path):
    folder = shutil.copytree(played / "ddp", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    resume = [*WHOLE, "--resume_from_checkpoint", "latest"]
    with pytest.raises(InputError, match="with 8 images per update; 1 process"):
        one_process(folder, teacher_folder, *resume, "--per_device_train_batch_size", 4)
    with pytest.raises(InputError, match="with FSDP2 and this run is without sharding"):
        one_process(played / "fsdp", teacher_folder, *resume)
    one_process(folder, teacher_folder, *resume)
    assert_same_trajectory(folder, alone)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "asks for mixed_precision=fp16, the run for no"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "Accelerate does not shard"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "4 gradient accumulation steps: leave it at 1"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "give the script --compile"),
    ],
)
def test_what_a_launcher_cannot_have_is_refused_before_any_work(
    teacher_folder, tmp_path, monkeypatch, variables, words
):
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
