"""Folders of runs that others touched: shared, linked, damaged, overwritten, killed at the wrong moment, not writable."""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from script_runs import DISTILL, ROOT, environment, run
from trainer_builders import distillation, teaching

from si_distill import OneStepInterpolantPipeline, files
from si_distill.conversion.output import check_output
from si_distill.errors import InputError, TrainingStopped
from si_distill.files import FolderLock
from si_distill.reading import read_yaml
from si_distill.schedulers.interpolant_paths import INTERPOLANTS, LinearInterpolant
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig

SCRIPT = [sys.executable, str(ROOT / "training/train_distill.py"), *DISTILL]
RESUME = ("--resume_from_checkpoint", "latest")


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def identity(folder):
    return read_yaml(folder / "config.yaml")["run_id"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def runs(teacher_folder, tmp_path_factory):
    """Finished runs: of one step, of two, and of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps, seed in (("one", 1, 0), ("two", 2, 0), ("other", 3, 5)):
        distillation(teacher_folder, folder / name, "--max_steps", steps, "--seed", seed).train()
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    """A copy of the run of one step."""
    return shutil.copytree(runs / "one", tmp_path / "run")


# One run in one folder.

ONE = "checkpoints/step_00000001"

HOLD = """
import sys
from pathlib import Path
from si_distill.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder_and_a_killed_one_holds_nothing(teacher_folder, folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert holder.stdout.readline() == "held\n"
    for arguments in (["--overwrite_output_dir"], RESUME):
        with pytest.raises(InputError, match=rf"Another process is writing to .*run \(process {holder.pid} on "):
            distillation(teacher_folder, folder, "--max_steps", 2, *arguments)
    with pytest.raises(InputError, match="Another process is writing"):
        check_output(folder, overwrite=True)  # a converted checkpoint does not replace it either
    holder.kill()
    holder.wait()
    check_output(folder, overwrite=True)
    distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()
    assert [line["step"] for line in lines(folder)] == [1, 2]


def test_a_run_that_starts_while_another_loads_is_refused_before_it_writes(teacher_folder, tmp_path):
    first, second = (distillation(teacher_folder, tmp_path / "run", "--max_steps", 1) for _ in range(2))
    first.train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        second.train()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_every_file_of_a_run_says_its_identity_and_each_run_has_its_own(teacher_folder, tmp_path):
    folder, more = tmp_path / "run", ("--eval_metric_steps", 1, "--evaluation.num_samples", 8)
    distillation(teacher_folder, folder, "--max_steps", 1, *more).train()
    distillation(teacher_folder, folder, "--max_steps", 2, *more, *RESUME).train()
    first = identity(folder)
    assert len(first) == 16
    manifests = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/manifest.json")]
    assert [manifest["run"] for manifest in manifests] == [first, first]
    assert {line["run"] for name in ("metrics.jsonl", "evaluations.jsonl") for line in lines(folder, name)} == {first}
    assert json.loads((folder / "facts.json").read_text())["run"] == first
    # Settings that are taken from a run do not bring its identity along.
    argv = ["--config", folder / "config.yaml", "--output_dir", tmp_path / "other", "--eval_metric_steps", "null"]
    distillation(teacher_folder, tmp_path / "other", *argv).train()
    assert identity(tmp_path / "other") != first


def test_what_another_run_left_never_counts(teacher_folder, runs, folder):
    shutil.copytree(runs / "other/checkpoints/step_00000003", folder / "checkpoints/step_00000003")
    with open(folder / "metrics.jsonl", "a") as log:
        log.write((runs / "other/metrics.jsonl").read_text())
    with pytest.raises(InputError, match="step_00000003 is not a whole checkpoint: it is of another run"):
        distillation(teacher_folder, folder, "--max_steps", 4, RESUME[0], folder / "checkpoints/step_00000003").train()
    distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert same(weights(folder), weights(runs / "two"))


def test_checkpoints_are_not_deleted_because_the_settings_next_to_them_are_of_another_run(teacher_folder, runs, folder):
    for checkpoint in (folder / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    shutil.copytree(runs / "other/checkpoints/step_00000003", folder / "checkpoints/step_00000003")
    with pytest.raises(InputError, match=r"step_00000003, are of another run than config.yaml says"):
        distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()
    assert (folder / "checkpoints/step_00000003/manifest.json").exists()


def test_weights_in_several_files_of_an_earlier_run_are_not_loaded(teacher_folder, runs, tmp_path):
    folder = shutil.copytree(runs / "other", tmp_path / "run")
    OneStepInterpolantPipeline.from_pretrained(folder).transformer.save_pretrained(
        folder / "transformer", max_shard_size="10KB"
    )
    assert list((folder / "transformer").glob("*.index.json"))
    (folder / "transformer/notes.txt").write_text("mine")
    distillation(teacher_folder, folder, "--max_steps", 1, "--overwrite_output_dir").train()
    loaded = OneStepInterpolantPipeline.from_pretrained(folder).transformer.state_dict()
    assert same(dict(loaded), weights(folder))
    assert (folder / "transformer/notes.txt").exists()


# Killed at the wrong moment.


@pytest.mark.parametrize("names", [["config.yaml.tmp"], [".lock"], [".lock", "config.yaml.tmp", "wandb"]])
def test_a_start_that_was_cut_off_is_no_other_run(teacher_folder, tmp_path, names):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("max_st")
    distillation(teacher_folder, folder, "--max_steps", 1).train()
    assert [line["step"] for line in lines(folder)] == [1]


def test_a_lock_next_to_files_of_somebody_else_is_no_leave_to_delete_them(teacher_folder, tmp_path):
    own = tmp_path / "own/checkpoints/mine.pt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (tmp_path / "own/.lock").write_text("")
    with pytest.raises(InputError, match="holds files but no run"):
        distillation(teacher_folder, tmp_path / "own", "--max_steps", 1)
    assert own.read_text() == "mine"


@pytest.mark.parametrize("option", ["--teacher", "--student"])
def test_a_network_that_lies_in_the_output_is_not_deleted_with_it(teacher_folder, tmp_path, option):
    inside = shutil.copytree(teacher_folder, tmp_path / "run/checkpoints/t")
    with pytest.raises(InputError, match="or one is in the other"):
        distillation(teacher_folder, tmp_path / "run", option, inside, "--overwrite_output_dir")
    assert (inside / "model_index.json").is_file()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("moment", [0, 6, 13])
def test_a_kill_while_overwriting_leaves_a_folder_that_starts_again(
    teacher_folder, runs, tmp_path, monkeypatch, moment
):
    folder, calls = shutil.copytree(runs / "other", tmp_path / "run"), iter(range(100))

    def dying_delete(path):
        if next(calls) == moment:
            raise Killed
        files.delete(path)

    with monkeypatch.context() as patch:
        patch.setattr("si_distill.training.run.folder.delete", dying_delete)
        with pytest.raises(Killed):
            distillation(teacher_folder, folder, "--max_steps", 2, "--overwrite_output_dir").train()
    # The old run's checkpoints may be there, and are not those of the new one.
    distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert same(weights(folder), weights(runs / "two"))


# Links.


@pytest.mark.parametrize(
    "name", ["checkpoints", "metrics.jsonl", "config.yaml.tmp", ".best.tmp", "transformer", "samples/a.png"]
)
def test_nothing_is_written_or_deleted_through_a_link(teacher_folder, tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    distillation(teacher_folder, folder, "--max_steps", 1).train()
    outside.mkdir()
    (outside / "step_00000001.tmp").write_text("mine")
    files.delete(folder / name)
    (folder / name).symlink_to(outside)
    for arguments in (["--overwrite_output_dir"], RESUME):
        with pytest.raises(InputError, match=f"{name} is a link to .*outside, and nothing is written or deleted"):
            distillation(teacher_folder, folder, "--max_steps", 2, *arguments)
    assert [path.name for path in outside.iterdir()] == ["step_00000001.tmp"]


def test_deleting_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    files.delete(tmp_path / "link")
    (tmp_path / "text.tmp").symlink_to(tmp_path / "outside/file")
    files.write_text(tmp_path / "text", "new")
    assert (tmp_path / "outside/file").read_text() == "mine"
    assert (tmp_path / "text").read_text() == "new"


# Damage.


def test_a_flipped_bit_in_a_large_file_is_seen(teacher_folder, tmp_path):
    folder = tmp_path / "run"
    trainer = distillation(teacher_folder, folder, "--max_steps", 1)
    trainer.train()
    large = folder / "checkpoints/step_00000002.tmp"
    large.mkdir()
    save_file({"x": torch.zeros(2**23)}, large / "large.safetensors")  # 32 MiB
    trainer.checkpoints._seal(large, large.with_suffix(""), 2)
    assert trainer.checkpoints.find("latest").name == "step_00000002"
    with open(large.with_suffix("") / "large.safetensors", "r+b") as file:
        file.seek(2**24)
        file.write(b"\x01")
    assert trainer.checkpoints.find("latest").name == "step_00000001"


def test_only_damaged_checkpoints_are_not_taken_for_none(teacher_folder, folder):
    (folder / "checkpoints/step_00000001/manifest.json").unlink()
    with pytest.raises(InputError, match=r"No checkpoint in .* is whole, .*--overwrite_output_dir alone"):
        distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()
    assert (folder / "checkpoints/step_00000001").is_dir()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"step": "1"}\n', r"metrics\.jsonl, line 1: step must be a whole number"),
        ("metrics.jsonl", "[1]\n7\n", r"metrics\.jsonl, line 1: it must be a mapping"),
        ("metrics.jsonl", b"\xff\n{}\n", r"metrics\.jsonl, line 1: .*utf-8"),
        ("evaluations.jsonl", "null\n", r"evaluations\.jsonl, line 1"),
        ("evaluations.jsonl", '{"step": 1, "frechet_distance": "x"}\n', r"line 1: frechet_distance must be a number"),
        (
            "evaluations.jsonl",
            '{"step": 1, "frechet_distance": "none"}\n',
            r"line 1: frechet_distance must be a number",
        ),
        ("facts.json", "[]", r"facts\.json: it must be a mapping, got \[\]\. Restore it, or remove it"),
        ("facts.json", '{"sessions": [{"first_step": null}]}', r"sessions\[0\]\.first_step must be a whole number"),
        ("facts.json", "[" * 100_000, "nested too deeply"),
        ("config.yaml", "algorithm: two\n", "`algorithm` must be a whole number"),
        ("config.yaml", "7", "must hold `key: value` lines"),
        ("checkpoints/step_00000001/manifest.json", "[]", "its manifest is missing or unreadable"),
        ("checkpoints/step_00000001/manifest.json", '{"files": 3}', "its manifest is missing or unreadable"),
        (
            "checkpoints/step_00000001/manifest.json",
            '{"step": 1, "run": RUN, "world_size": 1, "files": {}}',
            "names no files",
        ),
    ],
)
def test_garbage_in_a_file_of_a_run_is_a_sentence(teacher_folder, folder, name, content, words):
    if isinstance(content, str):
        content = content.replace("RUN", json.dumps(identity(folder))).encode()
    (folder / name).write_bytes(content)
    which = folder / "checkpoints/step_00000001" if "manifest" in name else "latest"
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, folder, "--max_steps", 2, RESUME[0], which).train()


@pytest.mark.parametrize("content", ["7", '{"step": 1}', '{"step": "1", "failures": 0}', "{"])
def test_a_state_of_another_shape_is_a_sentence(teacher_folder, folder, content):
    checkpoint = folder / "checkpoints/step_00000001"
    (checkpoint / "state.json").write_text(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = len(content)  # written again to match
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"Cannot read .*state\.json: .* Resume from another checkpoint"):
        distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.json", None, r"state\.json is of step -5 and manifest\.json of step 1"),
        ("random_states_0.pkl", b"garbage", "does not fit this run"),
        ("optimizer.bin", b"", "does not fit this run: "),
    ],
)
def test_a_forged_part_of_a_checkpoint_is_a_sentence(teacher_folder, folder, name, content, words):
    checkpoint = folder / "checkpoints/step_00000001"
    if content is None:
        content = json.dumps({**json.loads((checkpoint / name).read_text()), "step": -5}).encode()
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = len(content)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()


def test_a_forged_place_in_the_data_is_a_sentence(teacher_folder, tmp_path):
    arguments = [teacher_folder, tmp_path / "run", "--objective", "realuid", "--data.name", "digits", "--max_steps"]
    distillation(*arguments, 1).train()
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    (checkpoint / "rank_0.json").write_text('{"corrupt": 3}')
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["rank_0.json"] = 14
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="place in the data is damaged"):
        distillation(*arguments, 2, *RESUME).train()


def test_weights_that_are_missing_in_a_checkpoint_are_a_sentence(teacher_folder, folder):
    checkpoint = folder / "checkpoints/step_00000001"
    (checkpoint / "model.safetensors").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not fit this run"):
        distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()


def test_a_checkpoint_past_the_end_is_not_finished_again(teacher_folder, tmp_path):
    arguments = [teacher_folder, tmp_path / "run", "--lr_scheduler_type", "constant", "--max_steps"]
    distillation(*arguments, 2).train()
    with pytest.raises(InputError, match="is of step 2, past max_steps=1: give a larger max_steps"):
        distillation(*arguments, 1, *RESUME).train()


def test_a_student_that_no_update_reaches_is_said(teacher_folder, tmp_path, capsys):
    distillation(teacher_folder, tmp_path / "run", "--max_steps", 1, "--generator_start_images", 100).train()
    assert (
        "the student is trained from image 100 on (`generator_start_images`), but this run makes 4"
        in capsys.readouterr().out
    )


def test_a_finished_pipeline_is_not_deleted_because_its_checkpoints_are_gone(teacher_folder, folder):
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="holds the pipeline of this run but no checkpoint"):
        distillation(teacher_folder, folder, "--max_steps", 2, *RESUME).train()
    assert (folder / "model_index.json").exists()


# Places that cannot be written, and helpers that are missing.


def test_a_place_that_cannot_be_written_is_refused(teacher_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be made or written: .*file is read-only, or not a folder"):
        distillation(teacher_folder, tmp_path / "file" / "run")
    if os.path.isdir("/sys/kernel"):
        with pytest.raises(InputError, match=r"cannot be made or written|Cannot write to `output_dir` /sys/kernel/run"):
            distillation(teacher_folder, "/sys/kernel/run").train()


def test_a_disk_that_is_full_at_the_start_is_a_sentence(teacher_folder, tmp_path):
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    arguments = ["--teacher", teacher_folder, "--output_dir", tmp_path / "run", "--max_steps", 1]
    failed = run(*SCRIPT, *arguments, check=False, preexec_fn=no_room)
    assert failed.returncode == 2, failed.stderr
    assert "Cannot write to `output_dir`" in failed.stderr
    assert "Traceback" not in failed.stderr
    run(*SCRIPT, *arguments)  # what it left is no other run


@pytest.mark.parametrize(
    ("tracker", "words"), [("trackio", "which is not installed: pip install trackio"), ("wandb", "wandb login")]
)
def test_a_tracker_that_cannot_work_is_refused_before_anything_is_written(
    teacher_folder, tmp_path, monkeypatch, tracker, words
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, tmp_path / "run", "--report_to", tracker)
    assert not (tmp_path / "run").exists()


def test_a_killed_process_that_reads_data_stops_the_run_with_a_sentence(teacher_folder, tmp_path):
    def kill_reader() -> None:
        while not (readers := multiprocessing.active_children()):
            time.sleep(0.05)
        readers[0].kill()

    arguments = ("--objective", "realuid", "--dataloader_num_workers", 1, "--max_steps", 100_000)
    trainer = distillation(teacher_folder, tmp_path / "run", *arguments)
    threading.Thread(target=kill_reader, daemon=True).start()
    with pytest.raises(
        TrainingStopped, match=r"A process that reads data has died at step \d+: .* fewer dataloader_num_w"
    ):
        trainer.train()


# Training that goes on without learning.


class Standing(LinearInterpolant):
    """α = cos²(πt/2), β = sin²(πt/2): at both ends it stands still."""

    name = "standing"

    def _path(self, t):
        alpha, beta = torch.cos(torch.pi * t / 2) ** 2, torch.sin(torch.pi * t / 2) ** 2
        slope = torch.pi / 2 * torch.sin(torch.pi * t)
        return alpha, beta, -slope, slope


def test_a_path_that_stands_still_at_an_end_is_refused(monkeypatch):
    monkeypatch.setitem(INTERPOLANTS, "standing", Standing)
    with pytest.raises(InputError, match=r"'standing' has α β' − α' β = 0 at t = 0"):
        parse_settings(TeacherConfig, ["--output_dir", "a", "--interpolant", "standing"])


def test_samples_that_explode_stop_the_run(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", "--max_steps", 5)
    with torch.no_grad():
        trainer.generator.unwrapped.proj_out.bias.fill_(1e6)
    with pytest.raises(TrainingStopped, match=r"sample_mean of the generated images is .*e\+0\d at step 1, .*exploded"):
        trainer.train()


def test_a_gradient_that_is_0_for_long_stops_the_run(tmp_path):
    trainer = teaching(tmp_path / "run", "--max_steps", 150, "--per_device_train_batch_size", 1, "--logging_steps", 20)
    for parameter in trainer.trained.unwrapped.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(TrainingStopped, match=r"grad_norm was exactly 0 in the last 100 iterations .*step 100"):
        trainer.train()


def test_a_lock_is_given_back(tmp_path):
    lock = FolderLock(tmp_path / "new")
    lock.acquire()
    lock.release()
    subprocess.run(
        [sys.executable, "-c", HOLD, tmp_path / "new"], stdin=subprocess.DEVNULL, check=True, env=environment()
    )
