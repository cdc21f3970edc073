"""`training/reproduce.py`: from a checkpoint to a table, over kills and runs that are off track; and what it refuses."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conversion.foreign_sit import HEADS, sit_weights
from script_runs import ROOT, environment, run

from si_distill.errors import InputError, TrainingStopped
from si_distill.training.reproduction.published import Published, find_recipe, read_published
from si_distill.training.reproduction.track import Milestone, off_track

CONFIGS = ROOT / "configs"
SCRIPT = ROOT / "training" / "reproduce.py"
PUBLISHED = yaml.safe_load((CONFIGS / "published.yaml").read_text(encoding="utf-8"))
#: Published figures of the toy recipe: a curve that no run can follow.
FIGURES = {
    "teachers": {
        "toy": {"value": 1e4, "source": "table 1 of a toy", "steps": 2, "convert": {"num_attention_heads": HEADS}}
    },
    "recipes": {
        "toy": {
            "features": "pixels",
            "images_per_update": 16,
            "student": {"value": 1e5, "source": "table 2 of a toy"},
            "curve": {"source": "figure 3 of a toy", "points": [[16, 2e-3], [3200, 1e-3]]},
        }
    },
}


def reproduce(*argv) -> None:
    runpy.run_path(str(SCRIPT))["main"](list(map(str, argv)))


def kill_with_children(pid: int) -> None:
    """SIGKILL to a process and all below it; it is stopped first, so that it starts no others."""
    os.kill(pid, signal.SIGSTOP)
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        kill_with_children(int(child))
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def toy(tmp_path):
    """A recipe, its figures and its checkpoint; the options of the script that name them."""
    recipe = {
        "output_dir": "runs/toy-student",
        "teacher": "runs/toy",
        "data": {"name": "digits"},
        "max_steps": 120,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "eval_steps": 1000,
        "save_steps": 1000,
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "figures.yaml").write_text(yaml.safe_dump(FIGURES))
    torch.save(sit_weights(channels=1, rows=11), tmp_path / "toy.pt")
    folder = tmp_path / "reproduction"
    options = [tmp_path / "toy.yaml", "--checkpoint", tmp_path / "toy.pt", "--published", tmp_path / "figures.yaml"]
    options += ["--output_dir", folder, "--num_samples", 64, "--milestone_images", 160]
    return folder, list(map(str, options))


def test_from_checkpoint_to_table_over_a_kill_and_a_run_off_track(toy, capsys):
    folder, options = toy
    command = [sys.executable, str(SCRIPT), *options]

    first = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (folder / "reproduction.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    kill_with_children(first.pid)  # as a machine that goes down
    first.wait()
    converted = folder / "teacher" / "model_index.json"
    before = converted.stat().st_mtime_ns

    ended = run(*command, "--patience", 1, check=False)
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr.split("error:")[-1]
    assert re.search(r"off track: the last 1 milestones .* are over 30% above the published curve", ended.stderr)
    assert converted.stat().st_mtime_ns == before
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "Off track"
    stopped = report["milestones"][-1]["step"]
    assert stopped < 120
    assert report["milestones"][0]["images"] == 160  # 10 updates of 2 × 8 images
    assert list((folder / "student" / "checkpoints").glob("step_*"))

    # What is off track is not trained on; a teacher that misses its figure ends it before the training.
    with pytest.raises(TrainingStopped, match="off track"):
        reproduce(*options, "--patience", 1)
    better = folder.parent / "better.yaml"
    better.write_text(yaml.safe_dump({**FIGURES, "teachers": {"toy": {**FIGURES["teachers"]["toy"], "value": 0.01}}}))
    with pytest.raises(InputError, match=r"The teacher's Fréchet distance \(pixels\) is .*, and 0\.01 is published"):
        reproduce(*options, "--published", better)
    assert "The teacher misses its published figure" in (folder / "report.md").read_text()
    with pytest.raises(
        InputError, match=r"settings \(training\.loss_scale: 1\.0 then, 2\.0 now; num_samples: 64 then, 65 now\)"
    ):
        reproduce(*options, "--num_samples", 65, "--train", "{loss_scale: 2}")

    done = run(*command, "--patience", 1000)
    assert f"Resumed from {folder / 'student' / 'checkpoints'}" in done.stdout
    assert "Reproduced: The student's Fréchet distance (pixels) is" in done.stdout
    report = json.loads((folder / "report.json").read_text())
    assert [m["step"] for m in report["milestones"]] == list(range(10, 121, 10))
    assert report["teacher"]["what"] == "teacher, 2 steps"
    assert report["student"]["what"] == "student, 1 step"
    text = (folder / "report.md").read_text()
    assert "| | Fréchet distance (pixels) | published | difference |" in text
    assert "table 1 of a toy" in text
    assert "figure 3 of a toy" in text
    assert "FID" not in text
    assert str(folder.parent) not in text  # it is to be shared

    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    reproduce(*options, "--patience", 1000)
    assert "Reproduced" in capsys.readouterr().out
    changed = {path.name for path, time in files.items() if path.stat().st_mtime_ns != time}
    assert changed == {"report.json", "report.md"}


class TestRefusals:
    def test_an_unknown_recipe(self):
        with pytest.raises(InputError, match=r"no recipe 'cifar/distil_sid'\. Near it: .*cifar10/distill_sid"):
            reproduce("cifar/distil_sid", "--checkpoint", "x.pkl")
        with pytest.raises(InputError, match="Name the recipe"):
            reproduce()

    def test_a_missing_checkpoint(self, tmp_path):
        out = ("--output_dir", tmp_path / "out")
        with pytest.raises(InputError, match=r"`checkpoint` is not set.*file: .*edm-cifar10-32x32-uncond-vp\.pkl"):
            reproduce("cifar10/distill_sid", *out)
        with pytest.raises(InputError, match=r"There is no checkpoint typo\.pkl: download it first"):
            reproduce(CONFIGS / "cifar10" / "distill_sid.yaml", "--checkpoint", "typo.pkl", *out)
        assert not (tmp_path / "out").exists()

    def test_processes_that_cannot_make_the_published_batch(self, toy):
        with pytest.raises(InputError, match="has 16 images, which 3 processes with 8 images at once cannot make"):
            reproduce(*toy[1], "--num_processes", 3)

    def test_a_student_to_go_on_from_that_is_not_there(self, tmp_path):
        (tmp_path / "teacher.pkl").touch()
        with pytest.raises(InputError, match=r"goes on from a finished student, `student` runs/.*convert it first"):
            reproduce(
                "cifar10/distill_sid2a", "--checkpoint", tmp_path / "teacher.pkl", "--output_dir", tmp_path / "out"
            )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"features": "os:system"}, "a file cannot name code"),
            ({"curve": {"source": "a", "points": [[2, 1], [1, 1]]}}, "must rise"),
            ({"curve": {"source": "a", "points": [[1, 0]]}}, "with a positive value"),
            ({"student": {"value": 2}}, "has no `source`"),
            ({"student": {"value": "low", "source": "a"}}, "must be a number"),
            ({"curv": {}}, "curv"),
        ],
    )
    def test_damaged_figures(self, tmp_path, changes, message):
        (tmp_path / "figures.yaml").write_text(yaml.safe_dump({"recipes": {"toy": changes}}))
        with pytest.raises(InputError, match=message):
            read_published(tmp_path / "figures.yaml", "toy", "toy")


def test_every_published_figure_is_of_a_recipe_and_has_its_batch():
    teachers = set()
    for name, entry in PUBLISHED["recipes"].items():
        key, path = find_recipe(name, CONFIGS)
        assert key == name
        files = [path]
        for file in files:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            files += [file.parent / included for included in content.get("include", [])]
        said = [
            re.search(r"# ([\d,]+) = \d+ × \d+ × \d+ processes", file.read_text(encoding="utf-8")) for file in files
        ]
        batch = next((int(found[1].replace(",", "")) for found in said if found), None)
        assert entry.get("images_per_update") == batch
        named = [yaml.safe_load(file.read_text(encoding="utf-8")).get("teacher") for file in files]
        teachers.add(next(filter(None, named)).split("/")[-1])
    assert teachers == PUBLISHED["teachers"].keys()
    found = read_published(CONFIGS / "published.yaml", "cifar10/distill_sid", "edm-cifar10-uncond-vp")
    assert (found.teacher["value"], found.student["value"], found.images_per_update) == (1.97, 1.923, 256)


def test_a_curve_is_interpolated_and_says_nothing_before_its_first_point():
    curve = Published(curve={"points": [[100, 10.0], [300, 0.1]]})
    assert curve.on_curve(99) is None
    assert curve.on_curve(200) == pytest.approx(1.0)
    assert curve.on_curve(1000) == 0.1
    assert Published().on_curve(100) is None


def test_a_run_is_off_track_above_the_curve_or_when_it_diverges():
    def milestones(values, published=None):
        return [Milestone(n + 1, 10 * (n + 1), value, published) for n, value in enumerate(values)]

    assert off_track(milestones([9, 1.2, 1.3], published=1), 0.3, 3) is None
    assert "are over 30% above" in off_track(milestones([1.31, 1.4, 1.5], published=1), 0.3, 3)
    assert off_track(milestones([1.4, 1.5], published=1), 0.3, 3) is None
    assert off_track(milestones([9, 8, 7]), 0.3, 3) is None
    assert "more than 2 times the best so far, 1" in off_track(milestones([1, 3, float("inf"), 2.1]), 0.3, 3)
