"""`training/compare.py`: what it measures is what `evaluate.py` measures; files name runs and no code."""

import json
import sys
from pathlib import Path

import pytest

from si_distill import InterpolantPipeline
from si_distill.data.config import DataConfig
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.report import evaluate
from si_distill.settings import parse_settings
from si_distill.training.comparison.config import CompareConfig
from si_distill.training.comparison.judge import Judge
from si_distill.training.comparison.results import Results
from si_distill.training.comparison.run import distil, finished, read_entries, run_arguments, run_settings

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "configs/digits/distill.yaml")


def config(folder, runs="gap: {objective: gap}\n", **further):
    (folder / "runs.yaml").write_text(runs)
    small = dict(steps=2, points=1, num_samples=40, output=str(folder / "out"))
    return CompareConfig(**{**small, "base": BASE, "teacher": "t", "runs": str(folder / "runs.yaml"), **further})


def test_a_judge_says_what_an_evaluation_says(teacher_folder, tmp_path):
    asked = ["fid", "kid", "prc"]
    settings = EvaluationConfig(
        teacher=str(teacher_folder), teacher_steps=[2], num_samples=100, metrics=asked, bootstrap_resamples=0,
        output=str(tmp_path / "evaluation.json"),
    )  # fmt: skip
    row = evaluate(settings)["rows"][0]
    judge = Judge(DataConfig(), 100, metrics=asked, batch_size=64)
    figures = judge(InterpolantPipeline.from_pretrained(teacher_folder), num_inference_steps=2)
    assert set(figures) == {"distance", "accuracy", "KID", "KID deviation", "precision", "recall"}
    for name, value in figures.items():
        theirs = {"distance": "Fréchet distance", "accuracy": "label accuracy"}.get(name, name)
        assert value == pytest.approx(row[theirs], rel=1e-6), name


def test_runs_of_several_steps_fill_a_table_with_the_metrics_asked_for(teacher_folder, tmp_path):
    runs = (
        "few: {student_steps: [1, 2]}\none:\n  objective: gap\n  data.max_train_samples: 30\n  mixed_precision: bf16\n"
    )
    asked = config(tmp_path, runs, teacher=str(teacher_folder), metrics=["fid", "kid"], seeds=[3])
    results, entries = Results(asked), read_entries(asked)
    assert entries["one"] == {"objective": "gap", "data.max_train_samples": 30, "mixed_precision": "bf16"}
    for name in entries:
        results.add(distil(name, 3, run_arguments(asked, entries[name], 3), asked))
    assert [point["updates"] for point in results.values["runs"][0]["curve"]] == [0, 2]
    # The default cache, ~/.cache, is written out when settings are read again: it decides nothing.
    results.values["runs"][0]["settings"]["evaluation"]["cache_dir"] = "/somebody/.cache"
    results.add(results.values["runs"][0])
    again = Results(asked)
    by_name = finished(again, entries, [])
    assert list(by_name) == ["few", "one"]
    lines = again.report(by_name).splitlines()
    assert lines[0] == "| generator | seeds | Fréchet distance | KID | label accuracy | CPU seconds of training |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| few, 1 step", "| few, 2 steps", "| one"]
    assert (tmp_path / "out/comparison.png").stat().st_size > 10_000
    assert (tmp_path / "out/comparison.md").read_text().startswith(lines[0])
    with pytest.raises(InputError, match="holds runs with other settings"):
        Results(config(tmp_path, runs, teacher=str(teacher_folder), metrics=["fid"]))
    # An entry that has changed since is another run.
    assert list(finished(again, {**entries, "one": {"objective": "sid"}}, [])) == ["few"]


def test_results_of_the_earlier_format_are_read(teacher_folder, tmp_path):
    kept = ROOT / "benchmarks/results"
    values = json.loads((kept / "digits_sweep.json").read_text(encoding="utf-8"))
    shared = {name: values["settings"][name] for name in ("base", "steps", "points", "teacher_steps", "num_samples")}
    now = config(tmp_path, **{**shared, "teacher": str(teacher_folder)})
    weights = Results(now).values["settings"]["teacher weights"]
    values["settings"] |= {"teacher": str(teacher_folder), "teacher weights": weights}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison.json").write_text(json.dumps(values), encoding="utf-8")
    results = Results(now)
    by_name: dict = {}
    for run in results.values["runs"]:
        by_name.setdefault(run["name"], []).append(run)
    table = (kept / "digits_sweep.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert sorted(results.table(by_name).splitlines()) == sorted(table.splitlines())


@pytest.mark.parametrize(
    "entry",
    [
        "trust_remote_code: true",
        "trust-remote-code: true",
        "trust_remote_code=true: 1",
        "import: some_module",
        "evaluation.features: some_module:Class",
        "evaluation: {features: 'some_module:Class'}",
        "objective: --import=some_module",
    ],
)
def test_an_entry_cannot_name_code(entry, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_module.py").write_text("class Class: pass\n")
    asked = config(tmp_path, f"bad: {{{entry}}}\n")
    with pytest.raises(InputError, match=r"bad|Unknown objective"):
        run_settings(run_arguments(asked, read_entries(asked)["bad"], 0), 2)
    assert "some_module" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "`teacher` is not set"),
        (["--metrics", "nothing"], "`metrics` holds 'nothing'"),
        (["--name", "../x"], "it is the beginning of file names"),
        (["--steps", "0"], "`steps` must be at least 1"),
    ],
)
def test_settings_that_cannot_work(arguments, words):
    given = ["--teacher", "t", "--runs", "r", "--base", "b"] if arguments else []
    with pytest.raises(InputError, match=words):
        parse_settings(CompareConfig, [*given, *arguments])


def test_an_entry_is_a_mapping_and_updates_come_in_whole_iterations(tmp_path):
    with pytest.raises(InputError, match=r"The run 'bad' in .* must hold `key: value` lines"):
        read_entries(config(tmp_path, "bad: [1]\n"))
    asked = config(tmp_path, "two: {generator_steps: 2}\n", steps=3)
    with pytest.raises(InputError, match="`steps` 3 is no multiple of the generator_steps 2"):
        run_settings(run_arguments(asked, read_entries(asked)["two"], 0), asked.steps)
