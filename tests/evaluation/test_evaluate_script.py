"""The real script in real processes: a kill, other numbers of processes and odd batches change nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from script_runs import ROOT, command, environment, run

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.report import evaluate

FIGURES = ("Fréchet distance", "KID", "precision", "recall", "label accuracy", "nearest real distance")


def test_kills_processes_and_odd_batches_change_no_figure(teacher_folder, tmp_path):
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    folder = tmp_path / "student"
    OneStepInterpolantPipeline(**teacher.components, **teacher.parameters).save_pretrained(folder)
    settings = dict(pipeline=str(folder), num_samples=1801, save_npz=True, kid_subsets=2, bootstrap_resamples=20)
    evaluate(EvaluationConfig(**settings, output=str(tmp_path / "whole.json")))

    arguments = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    killed = [*command("evaluate.py", *arguments, "--batch_size", 3, "--output", tmp_path / "killed.json", processes=2)]
    process = subprocess.Popen(killed, env=environment(), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    features = tmp_path / "killed_features"
    while not list(features.glob("*/shard_*.npz")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.json").exists()
    made = len(list(features.glob("*/shard_*.npz")))
    assert 1 <= made < 4

    resumed = run(
        *command("evaluate.py", *arguments, "--batch_size", 77, "--output", tmp_path / "killed.json", processes=2)
    )
    assert "made before" in resumed.stderr

    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed")]
    assert [result["processes"] for result in results] == [1, 2]
    rows = [result["rows"][0] for result in results]
    for figure in FIGURES:
        assert rows[1][figure] == pytest.approx(rows[0][figure], rel=1e-3, abs=1e-6), figure
    assert rows[1]["network evaluations"] == 1
    files = [np.load(tmp_path / f"{name}_student_1_step.npz") for name in ("whole", "killed")]
    assert files[0]["arr_1"].tolist() == files[1]["arr_1"].tolist()
    difference = np.abs(files[0]["arr_0"].astype(int) - files[1]["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_a_student_of_several_steps_has_a_row_for_each(teacher_folder, tmp_path):
    network = InterpolantPipeline.from_pretrained(teacher_folder).transformer
    scheduler = StochasticInterpolantScheduler(solver="renoise", student_steps=[1, 4])
    OneStepInterpolantPipeline(network, scheduler).save_pretrained(tmp_path / "student")
    settings = dict(num_samples=64, kid_subsets=2, bootstrap_resamples=0, cache_dir=str(tmp_path / "cache"))
    rows = {}
    for batch_size in (64, 7):
        result = evaluate(EvaluationConfig(pipeline=str(tmp_path / "student"), batch_size=batch_size, **settings))
        rows[batch_size] = {row["generator"]: row for row in result["rows"]}
    students = {name: row for name, row in rows[64].items() if name.startswith("student")}
    assert list(students) == ["student, 1 step", "student, 4 steps"]
    assert [row["network evaluations"] for row in students.values()] == [1, 4]
    for name, row in students.items():
        assert rows[7][name]["Fréchet distance"] == pytest.approx(row["Fréchet distance"], rel=1e-4)
    assert rows[64]["student, 1 step"]["Fréchet distance"] != rows[64]["student, 4 steps"]["Fréchet distance"]


IDENTITY = """
import json, sys
from si_distill import InterpolantPipeline
from si_distill.evaluation.samples import PipelineSource
pipeline = InterpolantPipeline.from_pretrained(sys.argv[1])
print(json.dumps(PipelineSource(pipeline, pipeline, [0], 0).identity))
"""


def test_processes_agree_on_what_a_row_is(teacher_folder, tmp_path):
    """A scheduler saved by an earlier release lacks settings, which diffusers lists in an order of its own per process."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    file = folder / "scheduler/scheduler_config.json"
    kept = ("_class_name", "_diffusers_version", "interpolant", "prediction_type", "init_time")
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name in kept}))
    found = set()
    for seed in ("1", "2", "3"):
        environ = {**environment(), "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", IDENTITY, folder], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1
