"""The real scripts in real processes: the whole road, two processes against one, kills, signals, a full disk."""

import gzip
import json
import resource
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file
from script_runs import DISTILL, ROOT, command, environment, metrics, run

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline

KILLER = ROOT / "tests" / "training" / "kill_in_save.py"


@pytest.fixture(scope="module")
def uninterrupted(teacher_folder, tmp_path_factory):
    """A distillation of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    arguments = ["--teacher", teacher_folder, "--output_dir", folder, "--max_steps", 12, "--save_steps", 4]
    run(sys.executable, ROOT / "training/train_distill.py", *DISTILL, *arguments)
    return folder


def assert_same_run(folder, expected):
    names = ("images", "critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm", "field_distance")
    assert metrics(folder, *names) == metrics(expected, *names)
    weights, expected_weights = (
        load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (folder, expected)
    )
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        assert value.equal(expected_weights[name]), name


def test_the_whole_road_teacher_student_picture_and_table(tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    run(
        *command(
            "train_teacher.py", "--config", ROOT / "configs/digits/teacher.yaml", "--output_dir", teacher,
            "--max_steps", 6, "--model.num_layers", 1, "--logging_steps", 3, "--report_to", "wandb",
        )
    )  # fmt: skip
    assert [step for (step,) in metrics(teacher)] == [3, 6]
    assert list((teacher / "wandb").glob("offline-run-*/*.wandb"))
    assert len(InterpolantPipeline.from_pretrained(teacher)([1, 2], num_inference_steps=2).images) == 2
    distilled = run(
        *command(
            "train_distill.py", "--config", ROOT / "configs/digits/distill.yaml", "--output_dir", student, "--profile",
            "--teacher", teacher, "--max_steps", 6, "--logging_steps", 3, "--per_device_train_batch_size", 16,
        )
    )  # fmt: skip
    assert sorted(p.name for p in (student / "samples").iterdir()) == ["step_00000000.png", "step_00000006.png"]
    line = json.loads((student / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "images", "generator_loss", "critic_loss", "images_per_second"} <= line.keys()
    assert line["images"] == 6 * 16
    assert 0 <= line["data_wait"] <= 1
    assert 0.1 < line["peak_memory_gb"] < 16
    assert "images to go=0]" in distilled.stderr
    with gzip.open(student / "profile" / "step_00000006.json.gz") as file:
        recorded = [event["name"] for event in json.load(file)["traceEvents"]]
    settings = yaml.safe_load((student / "config.yaml").read_text())
    assert recorded.count("Optimizer.step#Adam.step") == 3 * (settings["critic_steps"] + 1)
    assert (student / "profile" / "step_00000006.txt").read_text() in distilled.stdout

    made = run(
        sys.executable, ROOT / "pipelines/generate.py", "--pipeline", student, "--labels", 3, "7", "--out",
        tmp_path / "grid.png", "--images_per_label", 2,
    )  # fmt: skip
    assert "Saved 4 images" in made.stdout
    table = run(
        sys.executable, ROOT / "training/evaluate.py", "--pipeline", student, "--teacher", teacher, "--teacher_steps",
        1, 3, "--num_samples", 40, "--kid_subsets", 2, "--bootstrap_resamples", 20,
    ).stdout  # fmt: skip
    assert "| student, 1 step | 1 |" in table
    result = json.loads((student / "evaluation.json").read_text())
    assert [(row["generator"], row["network evaluations"]) for row in result["rows"]] == [
        ("teacher, 1 step", 1),
        ("teacher, 3 steps", 3),
        ("student, 1 step", 1),
        ("real half against real half", None),
    ]
    assert result["num_samples"] == 40


def test_two_processes_give_the_trajectory_of_one(teacher_folder, tmp_path):
    arguments = [*DISTILL, "--teacher", teacher_folder, "--max_steps", 20, "--eval_metric_steps", 10]
    arguments += ["--evaluation.num_samples", 51, "--evaluation.batch_size", 20]
    batch = "--per_device_train_batch_size"
    run(*command("train_distill.py", *arguments, "--output_dir", tmp_path / "one"))
    run(*command("train_distill.py", *arguments, "--output_dir", tmp_path / "two", batch, 4, processes=2))
    one, two = (metrics(tmp_path / name, "images", "critic_loss", "generator_loss") for name in ("one", "two"))
    assert len(one) == 20
    measured = [(tmp_path / name / "evaluations.jsonl").read_text().splitlines() for name in ("one", "two")]
    distances = [[json.loads(line)["frechet_distance"] for line in lines] for lines in measured]
    assert len(distances[0]) == 2
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_run_killed_inside_a_save_resumes_bit_for_bit(uninterrupted, teacher_folder, tmp_path, moment):
    folder = tmp_path / "run"
    arguments = [*DISTILL, "--teacher", teacher_folder, "--output_dir", folder, "--max_steps", 12, "--save_steps", 4]
    killed = run(sys.executable, KILLER, 8, moment, *arguments, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000008.tmp"]
    # The killed run had logged steps past its last whole checkpoint.
    assert metrics(folder)[-1] == (8,)

    resumed = run(sys.executable, ROOT / "training/train_distill.py", *arguments, "--resume_from_checkpoint", "latest")
    assert "Passing over step_00000008.tmp: its saving was cut off" in resumed.stdout
    assert "Resumed from" in resumed.stdout
    assert_same_run(folder, uninterrupted)


def test_signals_save_say_how_to_resume_and_lose_nothing(uninterrupted, teacher_folder, tmp_path):
    folder = tmp_path / "run"
    # Longer than it can last before the signal; the steps that are compared are those of the shorter run.
    arguments = [*DISTILL, "--teacher", str(teacher_folder), "--output_dir", str(folder), "--save_steps", "4"]
    script = [sys.executable, str(ROOT / "training/train_distill.py"), *arguments]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [*script, "--max_steps", "100000", "--resume_from_checkpoint", "latest"],
            env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        before = len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < before + 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        process.send_signal(number)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == code, printed
        assert "--resume_from_checkpoint latest" in printed
        assert "Traceback" not in printed
        newest = max(int(p.name[5:]) for p in (folder / "checkpoints").iterdir())
        assert metrics(folder)[-1] == (newest,)  # every logged step is in the checkpoint
    assert OneStepInterpolantPipeline.from_pretrained(folder)([1]).images[0].size == (8, 8)
    names = ("critic_loss", "generator_loss")
    common = min(newest, 12)
    assert metrics(folder, *names)[:common] == metrics(uninterrupted, *names)[:common]


def test_a_full_disk_stops_with_a_clear_text_and_the_last_checkpoint_stays(uninterrupted, teacher_folder, tmp_path):
    folder = tmp_path / "run"
    arguments = [*DISTILL, "--teacher", teacher_folder, "--output_dir", folder, "--save_steps", 4]
    script = [sys.executable, ROOT / "training/train_distill.py", *arguments]
    run(*script, "--max_steps", 4)

    def no_room() -> None:  # files of more than 8 KiB cannot be written, as when the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    resume = ["--max_steps", 12, "--resume_from_checkpoint", "latest"]
    failed = run(*script, *resume, check=False, preexec_fn=no_room)
    assert failed.returncode == 3, failed.stderr
    assert "Could not save the checkpoint of step 8" in failed.stderr
    assert "File too large" in failed.stderr
    assert "The last good checkpoint is" in failed.stderr
    assert "step_00000004" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000004"]

    run(*script, *resume)
    assert_same_run(folder, uninterrupted)


def test_wrong_input_ends_with_a_sentence_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    for arguments, words in (
        (["--teacher", tmp_path / "nowhere"], "Cannot load the teacher"),
        (["--teacher", "x", "--critic_stepz", 5], "Did you mean `critic_steps`"),
    ):
        failed = run(
            sys.executable,
            ROOT / "training/train_distill.py",
            *DISTILL,
            *arguments,
            "--output_dir",
            folder,
            check=False,
        )
        assert failed.returncode == 2, failed.stderr
        assert words in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not folder.exists()
