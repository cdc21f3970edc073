"""`si-distill COMMAND` from a folder that holds nothing: what somebody has who installed the package."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import si_distill
from si_distill.commands.__main__ import commands

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = sys.modules['numpy'] = None; "
WITHOUT_TORCH += "runpy.run_module('si_distill.commands', run_name='__main__', alter_sys=True)"


def start(folder: Path, python: list[str], *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *python, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_help_lists_every_command_without_torch(tmp_path):
    listed = start(tmp_path, ["-c", WITHOUT_TORCH]).stdout
    assert listed == start(tmp_path, ["-c", WITHOUT_TORCH], "--help").stdout
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    assert names == list(commands())
    assert {"train-teacher", "train-distill", "evaluate", "generate", "publish", "convert-teacher"} <= set(names)


@pytest.mark.parametrize("command", commands())
def test_the_settings_of_a_command_without_torch(tmp_path, command):
    done = start(tmp_path, ["-c", WITHOUT_TORCH], command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--config FILE_OR_NAME" in done.stdout


@pytest.mark.parametrize("script", ["training/train_distill.py", "pipelines/generate.py"])
def test_a_script_of_the_repository_is_the_command(tmp_path, script):
    command = Path(script).stem.replace("_", "-")
    assert start(tmp_path, [str(ROOT / script)], "--help").stdout == start(
        tmp_path, ["-m", "si_distill.commands"], command, "--help"
    ).stdout  # fmt: skip


def test_a_mistyped_command_is_refused_with_a_near_one(tmp_path):
    done = start(tmp_path, ["-m", "si_distill.commands"], "train_distil")
    assert done.returncode == 2
    assert done.stderr == "\nerror: `si-distill` has no command 'train_distil'. Did you mean train-distill?\n"
    done = start(tmp_path, ["-m", "si_distill.commands"], "zzz")
    assert (done.returncode, "Choose one of: compare, " in done.stderr) == (2, True)


def test_the_version(tmp_path):
    assert start(tmp_path, ["-m", "si_distill.commands"], "--version").stdout == f"{si_distill.__version__}\n"


def test_a_teacher_and_its_student_from_an_empty_folder(tmp_path):
    small = "--max_steps 1 --per_device_train_batch_size 2 --data.max_train_samples 20".split()
    teacher = ["train-teacher", "--config", "digits/teacher", "--model.num_layers", "1", *small]
    done = start(tmp_path, ["-m", "si_distill.commands"], *teacher)
    assert done.returncode == 0, done.stderr
    student = ["--config", "digits/distill", "--teacher", "runs/digits-teacher", *small]
    done = start(tmp_path, ["-m", "si_distill.commands.train_distill"], *student)  # as `accelerate launch -m` does
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/digits-student/model_index.json").is_file()
    launched = [
        json.loads((tmp_path / "runs" / name / "facts.json").read_text())["sessions"][0]["command"][:2]
        for name in ("digits-teacher", "digits-student")
    ]
    assert launched == [["si-distill", "train-teacher"], ["-m", "si_distill.commands.train_distill"]]


def test_what_is_said_names_no_script_of_the_repository():
    scripts = {script.name for folder in ("training", "pipelines") for script in (ROOT / folder).glob("*.py")}
    for path in (ROOT / "src/si_distill").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]  # docstrings
        said = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in lines]
        for text in (node.value for node in said if isinstance(node.value, str)):
            assert scripts.isdisjoint(re.findall(r"\w+\.py", text)), f"{path.name}: {text}"


def test_the_configs_are_listed_and_found(tmp_path):
    listed = start(tmp_path, ["-m", "si_distill.commands"], "configs").stdout.split()
    assert {"digits/teacher", "recipes/sida", "accelerate/ddp"} <= set(listed)
    found = start(tmp_path, ["-m", "si_distill.commands"], "configs", "--path", "accelerate/ddp").stdout.strip()
    assert Path(found).samefile(ROOT / "configs/accelerate/ddp.yaml")
