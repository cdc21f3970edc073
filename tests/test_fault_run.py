"""The fault run: scripts killed at random moments and started again end as if nothing had happened.

FAULT_KILLS says how many kills each script gets; FAULT_SEED repeats the moments of an earlier run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from latent_caches import CACHE, tiny_autoencoder
from safetensors.torch import load_file
from script_runs import DISTILL, ROOT, environment, metrics

KILLS = int(os.environ.get("FAULT_KILLS", "15"))
SEED = int(os.environ.get("FAULT_SEED", str(random.randrange(10**6))))
#: What two runs may differ in: clocks, identities, places.
UNLIKE = ("seconds", "images per second", "date", "run", "command", "output", "pipeline")


def files(folder, pattern="**/[!.]*"):
    """The bytes of a folder's visible files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def like(values):
    return {
        key: like(value) if isinstance(value, dict) else value for key, value in values.items() if key not in UNLIKE
    }


def tensors(folder):
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    return {name: tensor.tolist() for name, tensor in weights.items()}


def trained(folder):
    losses = ("images", "critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm")
    measured = [like(json.loads(line)) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    snapshots = files(folder, "ema_snapshots/*")
    return metrics(folder, *losses), measured, tensors(folder), tensors(folder / "best"), snapshots


def evaluated(folder):
    return [like(row) for row in json.loads((folder / "evaluation.json").read_text())["rows"]]


def published(folder):
    return files(folder, "run/hub/**/*")


def encoded(folder):
    return files(folder)


@pytest.fixture(scope="module")
def student(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "run"
    finish(train(teacher_folder, folder))
    return folder


def train(teacher, folder):
    return [
        "training/train_distill.py", *DISTILL, "--teacher", teacher, "--output_dir", folder, "--max_steps", 12,
        "--save_steps", 2, "--eval_metric_steps", 3, "--evaluation.num_samples", 32, "--ema_power_sigmas", 0.1,
        "--eval_steps", 4, "--resume_from_checkpoint", "latest",
    ]  # fmt: skip


def start(arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])],
        env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(arguments):
    process = start(arguments)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "evaluate", "publish", "latents"])
def test_a_script_that_is_killed_again_and_again_ends_as_if_it_had_not_been(script, teacher_folder, student, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    vae = tmp_path / "vae"
    tiny_autoencoder().save_pretrained(vae)

    def arguments(folder):
        if script == "train":
            return train(teacher_folder, folder)
        if script == "latents":
            return ["training/precompute_latents.py", "--vae", vae, "--output_dir", folder, *CACHE]
        folder.mkdir(exist_ok=True)
        if script == "evaluate":
            return [
                "training/evaluate.py", "--pipeline", student, "--num_samples", 1200, "--kid_subsets", 2, "--batch_size", 64,
                "--bootstrap_resamples", 10, "--output", folder / "evaluation.json", "--cache_dir", folder / "cache",
            ]  # fmt: skip
        if not (folder / "run").exists():
            shutil.copytree(student, folder / "run")
        return ["pipelines/publish.py", "--pipeline", folder / "run", "--repo-id", "user/name", "--dry-run"]

    fingerprint = {"train": trained, "evaluate": evaluated, "publish": published, "latents": encoded}[script]
    moments, began = random.Random(f"{SEED} {script}"), time.monotonic()
    finish(arguments(whole))
    length = time.monotonic() - began
    for kill in range(KILLS):
        process = start(arguments(broken))
        moment = moments.uniform(0, 1) * length
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate()[0]
        where = f"seed {SEED}, kill {kill} after {moment:.2f} s:\n{printed}"
        assert process.returncode in (0, -signal.SIGKILL), where
        assert "Traceback" not in printed, where
    finish(arguments(broken))
    assert fingerprint(broken) == fingerprint(whole), f"seed {SEED}"
