#!/usr/bin/env python
"""Distils one digits teacher with many objectives on the same budget of generator updates: a table and a figure.

    python benchmarks/digits_sweep.py --teacher runs/digits-teacher --workers 2
    python benchmarks/digits_sweep.py --only "sid(1.0)" gap --seeds 0 --steps 200 --output runs/sweep --figures runs/sweep

The runs are those of digits_sweep.yaml, each with the settings that `training/train_distill.py` would read; the evaluation
is that of `training/evaluate.py` (1,797 samples with the labels of the reference, noise of seed 0). Each finished run is
written at once: the same command goes on after a stop. All settings: `python benchmarks/digits_sweep.py --help`.
"""

import dataclasses
import hashlib
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench_tools import (
    Workers,
    advance,
    cell,
    hardware,
    hardware_line,
    markdown_table,
    mean_and_spread,
    write_json,
    write_text,
)

from si_distill.errors import InputError
from si_distill.settings import (
    at_least,
    parse_settings,
    read_yaml,
    script_main,
    setting,
    settings_from_dict,
    settings_to_dict,
)
from si_distill.training.distillation.config import DistillConfig

#: Noise of the evaluated images: the same for every run, as in `training/evaluate.py`.
EVALUATION_SEED = 0


@dataclass
class SweepConfig:
    """Settings of the sweep."""

    teacher: str = setting("runs/digits-teacher", "The teacher's folder.")
    runs: str = setting("benchmarks/digits_sweep.yaml", "YAML file: name → settings of the run.")
    base: str = setting("configs/digits/distill.yaml", "Settings that all runs share.")
    only: list[str] = setting([], "Runs to make; all when empty. The table shows all that are there.")
    seeds: list[int] = setting([0, 1, 2], "Seeds of each run.")
    steps: int = setting(1500, "Generator updates of each run.")
    points: int = setting(10, "Evaluations along a run, besides the one before it.")
    teacher_steps: list[int] = setting([1, 10, 50], "Euler steps of the teacher's rows.")
    num_samples: int = setting(1797, "Images per evaluation.")
    workers: int = setting(2, "Processes of one thread.")
    output: str = setting("benchmarks/results", "Folder of digits_sweep.json and digits_sweep.md.")
    figures: str = setting("docs/images", "Folder of the figure.")

    def __post_init__(self) -> None:
        for name in ("steps", "points", "workers"):
            at_least(name, getattr(self, name), 1)
        at_least("num_samples", self.num_samples, 2)


@dataclass
class Judge:
    """The reference, its labels and the classifier: what every evaluation of a process shares."""

    num_samples: int

    def __post_init__(self) -> None:
        from si_distill.data import load_images
        from si_distill.data.config import DataConfig
        from si_distill.evaluation.classifier import DigitsClassifier

        self.reference, reference_labels = load_images(DataConfig()).read_all()
        self.labels = [reference_labels[i % len(reference_labels)] for i in range(self.num_samples)]
        self.classifier = DigitsClassifier(self.reference, reference_labels)

    def __call__(self, pipeline, **arguments) -> dict[str, float]:
        """Fréchet distance on pixels and label accuracy of a pipeline's images."""
        import torch

        from si_distill.evaluation.formulas import frechet_distance
        from si_distill.evaluation.samples import PipelineSource

        pipeline.set_progress_bar_config(disable=True)
        call = partial(pipeline, output_type="pt", **arguments)
        source = PipelineSource(pipeline, call, self.labels, EVALUATION_SEED)
        starts = range(0, len(source), 256)
        made = torch.cat([source.read(range(len(source))[start : start + 256]).images for start in starts])
        return {
            "distance": frechet_distance(made, self.reference),
            "accuracy": self.classifier.accuracy(made, self.labels),
        }


def judge_teacher(config: SweepConfig) -> list[dict[str, float]]:
    """The teacher's rows."""
    from si_distill import InterpolantPipeline

    judge, pipeline = Judge(config.num_samples), InterpolantPipeline.from_pretrained(config.teacher)
    rows = []
    for steps in config.teacher_steps:
        rows.append({"steps": steps, **judge(pipeline, num_inference_steps=steps)})
        advance()
    return rows


def distil(name: str, seed: int, arguments: list[str], config: SweepConfig) -> dict:
    """One run: trains with the product's trainer and evaluates its moving average on the way."""
    from si_distill.training.distillation.trainer import DistillationTrainer

    judge = Judge(config.num_samples)
    with tempfile.TemporaryDirectory() as folder:  # named in the settings, but nothing is written outside `train()`
        settings = run_settings(arguments, config.steps)
        trainer = DistillationTrainer(dataclasses.replace(settings, output_dir=f"{folder}/run"))
    iterations, per_iteration = settings.max_steps, settings.generator_steps
    marks = {round(iterations * i / config.points) for i in range(config.points + 1)}
    # Time of this process's one thread: what else the machine does meanwhile does not count.
    curve, seconds, thrown_away = [], 0.0, 0
    while True:
        if trainer.step in marks:
            pipeline = trainer.pipeline()
            counts = {str(n): judge(pipeline, num_inference_steps=n) for n in pipeline.trained_steps}
            found = {**counts[str(pipeline.trained_steps[-1])], **({"counts": counts} if len(counts) > 1 else {})}
            curve.append({"updates": trainer.step * per_iteration, "seconds": seconds, **found})
        if trainer.step == iterations:
            break
        started = time.process_time()
        _, finite = trainer.iteration()
        seconds += time.process_time() - started
        thrown_away += not finite
        trainer.step += 1
        advance(per_iteration)
    return {
        "name": name,
        "seed": seed,
        "arguments": arguments,
        "settings": settings_to_dict(settings),
        "thrown away": thrown_away,
        "curve": curve,
    }


def run_arguments(config: SweepConfig, changes: dict | None, seed: int) -> list[str]:
    """The command line of a run, as `training/train_distill.py` would get it, but for its length and folder."""
    arguments = ["--config", config.base, "--teacher", config.teacher, "--seed", str(seed)]
    for key, value in (changes or {}).items():
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return arguments


def run_settings(arguments: list[str], updates: int) -> DistillConfig:
    """The settings of a run of that many generator updates."""
    settings = parse_settings(DistillConfig, [*arguments, "--output_dir", "unset"])
    if updates % settings.generator_steps:
        raise InputError(
            f"`steps` {updates} is no multiple of the generator_steps {settings.generator_steps} of a run."
        )
    # `teacher_model` speaks of the teacher to dry runs alone.
    return dataclasses.replace(settings, max_steps=updates // settings.generator_steps, teacher_model={})


class Results:
    """digits_sweep.json: finished runs, and what they must share to stand in one table.

    Raises:
        InputError: when the file is of another teacher or budget.
    """

    #: Settings that may differ between the commands that fill one file.
    FREE = ("only", "seeds", "workers", "runs", "output", "figures")

    def __init__(self, config: SweepConfig):
        self.path = Path(config.output) / "digits_sweep.json"
        shared = {key: value for key, value in asdict(config).items() if key not in self.FREE}
        shared["teacher weights"] = _fingerprint(Path(config.teacher))
        self.values = {"settings": shared, "hardware": hardware(config.workers), "teacher": [], "runs": []}
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["settings"] != shared:
                raise InputError(
                    f"{self.path} holds runs with other settings ({found['settings']} there, {shared} now): give another "
                    "--output, or delete it."
                )
            self.values = found

    def add(self, run: dict) -> None:
        """Keeps a finished run, instead of an older one with the same name and seed."""
        others = [r for r in self.values["runs"] if (r["name"], r["seed"]) != (run["name"], run["seed"])]
        self.values["runs"] = [*others, run]
        write_json(self.path, self.values)

    def find(self, name: str, seed: int, settings: DistillConfig) -> dict | None:
        """The finished run of that name and seed, if it was made with these settings.

        Settings are compared as resolved, so that an edit of any config file counts; one that the package did not have
        when the run was made has its default, which is what the run did.
        """
        for run in self.values["runs"]:
            if (run["name"], run["seed"]) == (name, seed) and _settings_of(run) == settings:
                return run
        return None

    def by_name(self, config: SweepConfig, entries: dict[str, dict]) -> dict[str, list[dict]]:
        """Runs by name, in the order of the entries; without those whose settings have changed since."""
        seeds = sorted({run["seed"] for run in self.values["runs"]})
        found = {}
        for name, changes in entries.items():
            wanted = {seed: run_settings(run_arguments(config, changes, seed), config.steps) for seed in seeds}
            runs = [run for seed in seeds if (run := self.find(name, seed, wanted[seed]))]
            if runs:
                found[name] = runs
        return found


def _settings_of(run: dict) -> DistillConfig | None:
    """The settings of a finished run, or None when the package does not take them any more."""
    try:
        return settings_from_dict(DistillConfig, run["settings"])
    except InputError:
        return None


def _fingerprint(folder: Path) -> str:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        raise InputError(f"`teacher` {folder} holds no pipeline; train it with training/train_teacher.py.")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def _teacher_title(row: dict) -> str:
    return f"teacher, {row['steps']} step{'s' if row['steps'] > 1 else ''}"


def table(results: Results, by_name: dict[str, list[dict]]) -> str:
    """A row for each solver of the teacher and each run, at the end of training."""
    rows = [
        [_teacher_title(row), "", f"{row['distance']:.3f}", f"{row['accuracy']:.3f}", ""]
        for row in results.values["teacher"]
    ]
    for name, runs in by_name.items():
        last = [run["curve"][-1] for run in runs]
        seconds = cell([point["seconds"] for point in last], 0)
        for count in last[0].get("counts", [None]):  # a student of several steps has a row for each number of them
            points = [point if count is None else point["counts"][count] for point in last]
            distance, accuracy = (cell([point[key] for point in points]) for key in ("distance", "accuracy"))
            title = name if count is None else f"{name}, {count} step{'s' if int(count) > 1 else ''}"
            rows.append([title, str(len(runs)), distance, accuracy, seconds])
    return markdown_table(["generator", "seeds", "Fréchet distance", "label accuracy", "CPU seconds of training"], rows)


def figure(results: Results, by_name: dict[str, list[dict]], path: Path) -> None:
    """Fréchet distance against generator updates and against CPU seconds: mean over seeds, and a band of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    for index, (name, runs) in enumerate(by_name.items()):
        along = list(zip(*(run["curve"] for run in runs), strict=True))
        mean, spread = zip(*(mean_and_spread([p["distance"] for p in points]) for points in along), strict=True)
        updates = [points[0]["updates"] for points in along]
        seconds = [mean_and_spread([p["seconds"] for p in points])[0] for points in along]
        style = dict(color=f"C{index % 10}", linestyle=("-", "--", ":")[index // 10 % 3], linewidth=1.3)
        for axis, x in zip(axes, (updates, seconds), strict=True):
            axis.plot(x, mean, label=name, marker="o", markersize=2.5, **style)
            if not math.isnan(spread[0]):
                # On a logarithmic axis a band down to zero would hide the rest.
                low = [max(m - s, 0.5 * m) for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    for axis in axes:
        for row in results.values["teacher"]:
            axis.axhline(row["distance"], color="0.5", linewidth=0.8, linestyle="-.")
            axis.annotate(
                _teacher_title(row),
                (1, row["distance"]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
                color="0.4",
            )
        axis.set_yscale("log")
        for scale in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            scale("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set(xlabel="generator updates", ylabel="Fréchet distance on pixels")
    axes[1].set(xlabel="CPU seconds of training, one thread")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)
    pyplot.close(picture)


def report(config: SweepConfig, results: Results, entries: dict[str, dict]) -> str:
    """Writes the table and the figure of all runs that are there; returns the table."""
    by_name = results.by_name(config, entries)
    text = (
        f"{table(results, by_name)}\n\nMean ± standard deviation over seeds after {config.steps:,} generator updates; "
        f"Fréchet distance on raw pixels (comparable within this table only), {config.num_samples:,} samples of the "
        f"moving average, seed {EVALUATION_SEED}. {hardware_line(results.values['hardware'])}"
    )
    write_text(Path(config.output) / "digits_sweep.md", text + "\n")
    figure(results, by_name, Path(config.figures) / "digits_sweep.png")
    return text


def main(argv: list[str]) -> None:
    config = parse_settings(SweepConfig, argv, __doc__)
    entries = read_yaml(config.runs)
    names = config.only or list(entries)
    if unknown := [name for name in names if name not in entries]:
        raise InputError(f"Unknown run {unknown[0]!r}. {config.runs} has: {'; '.join(entries)}.")
    results = Results(config)
    tasks = []
    for seed in config.seeds:  # seeds first: a sweep that is stopped has every run once before any twice
        for name in names:
            arguments = run_arguments(config, entries[name], seed)
            # Parsed here too: a mistake in the last entry shows before the first run.
            if not results.find(name, seed, run_settings(arguments, config.steps)):
                tasks.append((name, seed, arguments, config))
    print(f"{len(tasks)} runs to make, {len(names) * len(config.seeds) - len(tasks)} are there.", file=sys.stderr)
    with Workers(config.workers) as workers:
        if not results.values["teacher"]:
            (results.values["teacher"],) = workers.run(judge_teacher, [(config,)], len(config.teacher_steps), "teacher")
        for run in workers.run(distil, tasks, len(tasks) * config.steps, "students"):
            results.add(run)
            report(config, results, entries)
    print("\n" + report(config, results, entries))


if __name__ == "__main__":
    script_main(main)
