"""Finished runs of a comparison on disk: what they must share, their table and their figure."""

import hashlib
import json
import math
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from ... import fingerprints
from ...errors import InputError
from ...evaluation.metrics import METRICS
from ...files import write_text
from ...settings import settings_from_dict, settings_to_dict
from ...tables import cell, hardware, hardware_line, markdown_table, mean_and_spread
from ..distillation.config import DistillConfig
from .config import CompareConfig
from .judge import EVALUATION_SEED, SHORT

#: Settings that may differ between the commands that fill one file.
FREE = ("only", "seeds", "workers", "runs", "output", "figures", "name", "batch_size", "cache_dir", "trust_remote_code")


class Results:
    """NAME.json: finished runs, and what they must share to stand in one table.

    Args:
        config: of the comparison.

    Raises:
        InputError: when the file is of another teacher, budget or evaluation.
    """

    def __init__(self, config: CompareConfig):
        self.config, self.path = config, Path(config.output) / f"{config.name}.json"
        shared = {key: value for key, value in asdict(config).items() if key not in FREE}
        shared["teacher weights"] = _fingerprint(config.teacher)
        self.values = {"settings": shared, "hardware": hardware(config.workers), "teacher": [], "runs": []}
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            # A setting that there was not when the file was written had its default, which is what the runs did.
            if {**_defaults(), **found["settings"]} != shared:
                raise InputError(
                    f"{self.path} holds runs with other settings ({found['settings']} there, {shared} now): give another "
                    "--output, or delete it."
                )
            self.values = found

    def add(self, run: dict[str, Any]) -> None:
        """Keeps a finished run, instead of an older one with the same name and seed."""
        others = [r for r in self.values["runs"] if (r["name"], r["seed"]) != (run["name"], run["seed"])]
        self.values["runs"] = [*others, run]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.values, indent=1, ensure_ascii=False) + "\n")

    def find(self, name: str, seed: int, settings: DistillConfig) -> dict[str, Any] | None:
        """The finished run of that name and seed, if it was made with these settings.

        Settings are compared as resolved, so that an edit of any config file counts; one that the package did not have
        when the run was made has its default, which is what the run did.
        """
        wanted = _deciding(settings)
        for run in self.values["runs"]:
            if (run["name"], run["seed"]) == (name, seed) and _settings_of(run) == wanted:
                return run
        return None

    @property
    def seeds(self) -> list[int]:
        """Of the runs that are there."""
        return sorted({run["seed"] for run in self.values["runs"]})

    def report(self, by_name: dict[str, list[dict[str, Any]]]) -> str:
        """Writes the table and the figure of these runs, by name; returns the table."""
        config = self.config
        text = (
            f"{self.table(by_name)}\n\nMean ± standard deviation over seeds after {config.steps:,} student updates; "
            f"{self.distance} on {_features(config)} (comparable within this table only), {config.num_samples:,} samples of "
            f"the moving average, seed {EVALUATION_SEED}. {hardware_line(self.values['hardware'])}"
        )
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{config.name}.md", text + "\n")
        self.figure(by_name, Path(config.figures or config.output) / f"{config.name}.png")
        return text

    @property
    def distance(self) -> str:
        return "FID" if self.config.features == "inception-v3-compat" else "Fréchet distance"

    @property
    def _clock(self) -> str:
        return "seconds of training" if self.values["hardware"]["gpu"] else "CPU seconds of training"

    def table(self, by_name: dict[str, list[dict[str, Any]]]) -> str:
        """A row for each number of the teacher's steps and for each run, at the end of training."""
        shown = [(SHORT.get(metric.name, metric.name), metric) for metric in METRICS.values() if metric.form]
        last = {name: [run["curve"][-1] for run in runs] for name, runs in by_name.items()}
        everything = [*self.values["teacher"], *(point for points in last.values() for point in points)]
        shown = [(key, metric) for key, metric in shown if any(key in figures for figures in everything)]

        def cells(points: list[dict[str, Any]]) -> list[str]:
            return [
                cell([point[key] for point in points], _digits(metric.form)) if key in points[0] else ""
                for key, metric in shown
            ]

        rows = [[_teacher_title(row), "", *cells([row]), ""] for row in self.values["teacher"]]
        for name, points in last.items():
            seconds = cell([point["seconds"] for point in points], 0)
            for count in points[0].get(
                "counts", [None]
            ):  # a student of several steps has a row for each number of them
                found = [point if count is None else point["counts"][count] for point in points]
                title = name if count is None else f"{name}, {count} step{'s' if int(count) > 1 else ''}"
                rows.append([title, str(len(points)), *cells(found), seconds])
        titles = [self.distance if key == "distance" else metric.name for key, metric in shown]
        return markdown_table(["generator", "seeds", *titles, self._clock], rows)

    def figure(self, by_name: dict[str, list[dict[str, Any]]], path: Path) -> None:
        """The distance against student updates and against seconds: mean over seeds, and a band of one deviation."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        picture, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
        for index, (name, runs) in enumerate(by_name.items()):
            along = list(zip(*(run["curve"] for run in runs), strict=True))
            along = [points for points in along if all("distance" in point for point in points)]
            if not along:
                continue
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
            for row in self.values["teacher"]:
                if "distance" in row:
                    _draw_level(axis, row["distance"], _teacher_title(row))
            axis.set_yscale("log")
            for scale in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                scale("{x:g}")
            axis.grid(alpha=0.3, which="both")
        axes[0].set(xlabel="student updates", ylabel=f"{self.distance} on {_features(self.config)}")
        axes[1].set(xlabel=self._clock)
        picture.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=130)
        pyplot.close(picture)


def _draw_level(axis: Any, value: float, title: str) -> None:
    axis.axhline(value, color="0.5", linewidth=0.8, linestyle="-.")
    place = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axis.annotate(title, (1, value), fontsize=7, color="0.4", **place)


def _digits(form: str) -> int:
    """Digits after the point in a metric's format, such as .3f."""
    return int(form.strip(",").partition(".")[2].rstrip("fg") or 3)


def _features(config: CompareConfig) -> str:
    return "raw pixels" if config.features == "pixels" else f"features {config.features}"


def _teacher_title(row: dict[str, Any]) -> str:
    return f"teacher, {row['steps']} step{'s' if row['steps'] > 1 else ''}"


def _defaults() -> dict[str, Any]:
    """Of the settings of an evaluation, which files of earlier versions do not have."""
    return {
        each.name: each.default_factory() if each.default is MISSING else each.default
        for each in fields(CompareConfig)
        if each.name in ("features", "feature_weights", "reference", "metrics")
    }


def _settings_of(run: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that a finished run was made with, or None when the package does not take them any more."""
    try:
        return _deciding(settings_from_dict(DistillConfig, run["settings"]))
    except InputError:
        return None


def _deciding(settings: DistillConfig) -> dict[str, Any]:
    """All but how train_distill.py would measure the run on the way, which a comparison does not do."""
    return {key: value for key, value in settings_to_dict(settings).items() if key != "evaluation"}


def _fingerprint(teacher: str) -> str:
    """What tells two teachers apart: the bytes of the weights in a folder; the name and revision of anything else."""
    folder = Path(teacher)
    files = sorted((folder / "transformer").glob("*.safetensors")) or sorted(folder.glob("**/*.safetensors"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if hashes:
        return hashes[0][:16] if len(hashes) == 1 else fingerprints.of_values(hashes)
    if Path(teacher).is_dir():
        raise InputError(f"`teacher` {teacher} holds no pipeline; train it with `si-distill train-teacher`.")
    return teacher
