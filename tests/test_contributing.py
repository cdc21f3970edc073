"""The walk-throughs of CONTRIBUTING.md, each performed from outside the package: the page's own blocks are run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from si_distill import Condition, StochasticInterpolantScheduler
from si_distill.critic import CriticNetwork
from si_distill.errors import InputError
from si_distill.evaluation.metrics import METRICS
from si_distill.interpolants import INTERPOLANTS
from si_distill.objectives import PRESETS, get_objective, interpolant_gap
from si_distill.pipelines.interpolant_pipeline_network import VIEWS
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig

ROOT = Path(__file__).parent.parent
SECTIONS = dict(
    section.split("\n", 1) for section in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## ")
)


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[title], re.DOTALL)


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is forgotten after it."""
    kept = [(registry, dict(registry)) for registry in (INTERPOLANTS, PRESETS, METRICS, VIEWS)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def run(title: str) -> dict:
    """The names that the section's Python blocks define, one after another."""
    names: dict = {}
    for block in blocks(title, "python"):
        exec(block, names)
    return names


def test_an_interpolant():
    with pytest.raises(InputError, match=r"Unknown interpolant 'power'\. Choose one of: linear, "):
        TeacherConfig(output_dir="runs/power", interpolant="power")
    names = run("Add an interpolant")
    # Its checks are in the page. Settings, and a sampler with its default solver, know it too.
    given = {"interpolant": "power", "interpolant_kwargs": {"power": 3.0}}
    assert TeacherConfig(output_dir="runs/power", **given).build_interpolant() == names["path"]
    with pytest.raises(InputError, match="'power' has no setting `scale`; it has power"):
        TeacherConfig(output_dir="runs/power", interpolant="power", interpolant_kwargs={"scale": 1})
    scheduler = StochasticInterpolantScheduler(**given, init_time=names["t"])
    assert scheduler.solver == "euler"
    x, network = names["x_t"], names["network"]
    scheduler.set_timesteps(1)
    (found, _) = scheduler.step(network(x, x[:, 0]), scheduler.timesteps[0], x, return_dict=False)
    torch.testing.assert_close(found, names["x0"], rtol=1e-6, atol=1e-6)  # times of a scheduler are float32


def test_the_scripts_know_an_interpolant_that_was_imported(tmp_path):
    (tmp_path / "power_path.py").write_text(blocks("Add an interpolant", "python")[0])
    for name in ("configs", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (command,) = blocks("Add an interpolant", "bash")
    command = command.replace("python ", f"{sys.executable} ", 1)
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "Dry run: nothing was" in found.stdout


def test_a_preset():
    with pytest.raises(ValueError, match="Unknown objective 'damped_gap'"):
        get_objective("damped_gap")
    objective = run("Add an objective preset")["objective"]
    critic, teacher, target = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = interpolant_gap(critic, teacher, target, 1, 1, 2.0)
    torch.testing.assert_close(objective.generator_loss(critic, teacher, target), expected)
    settings = DistillConfig(
        output_dir="runs/student", teacher="runs/teacher", objective="damped_gap", objective_kwargs={"c": 0.5}
    )
    assert settings.build_objective().generator == (1, 1, 0.5)
    with pytest.raises(ValueError, match="'damped_gap' has no coefficient `d`; it takes c, space, weight"):
        get_objective("damped_gap", d=1)


def test_a_metric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = (load_digits().images[:40] / 16 * 255).round().astype(np.uint8)
    np.savez("samples.npz", arr_0=shown[..., None])
    names = run("Add a metric")
    row, floor = names["result"]["rows"]
    assert 0 < names["distance"] == row["mean distance"]
    assert floor["mean distance"] < row["mean distance"]  # of half of the digits, not of 40
    assert row["KID"] is None  # not asked for
    table = (tmp_path / "evaluation.md").read_text()
    title, _, cells = (line.strip("| ").split(" | ") for line in table.splitlines()[:3])
    assert dict(zip(title, cells, strict=True))["mean distance"].startswith(f"{names['distance']:.4f}")
    assert "\nmean distance: between the means of the features.\n" in f"{table}\n"


def test_a_network_class():
    names = run("Add a network class from diffusers")
    assert names["images"].shape == names["generated"].shape == (2, 1, 8, 8)
    critic = CriticNetwork(names["network"], "head")
    x, told = torch.randn(2, 1, 8, 8), Condition(torch.tensor([0, 2]))
    prediction, logits, _ = critic(x, torch.ones(2), told)
    assert torch.equal(prediction, names["network"](x, told.labels, torch.ones(2)).sample)
    assert logits.shape == (2, 16)  # a token for each position of the middle map


def test_the_documentation_says_of_each_metric_which_direction_is_better():
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    better = {name.strip(): row[1].strip() for row in rows if len(row) == 4 for name in row[0].split(",")}
    for metric in METRICS.values():
        assert better[metric.name] == ("lower" if metric.lower_is_better else "higher"), metric.name
