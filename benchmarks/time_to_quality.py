#!/usr/bin/env python
"""Time to quality: what each recipe needs until its one-step student first falls below the teacher at ten steps.

    python benchmarks/time_to_quality.py --teacher runs/digits-teacher --workers 2

Every recipe of time_to_quality.yaml is trained at each of `rates` with a seed of its own, and the rate that arrives first
(or, where none does, ends nearest) is taken for `seeds`. A run ends when it arrives, after `budget` seconds of training or
after `steps` updates. The table has seconds, student updates, generated images and network evaluations (forward passes of
teacher, critic and student in training, each image counted) until then; the figure has all runs. A finished run is saved at
once, so the same command goes on after a stop. All settings: `python benchmarks/time_to_quality.py --help`.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_tools import Workers, hardware_line, markdown_table, write_text

from si_distill.settings import given_imports, parse_settings, script_main, setting, settings_to_dict
from si_distill.training.comparison.config import CompareConfig
from si_distill.training.comparison.results import Results
from si_distill.training.comparison.run import Run, judge_teacher, read_entries, run_arguments, run_settings

#: The seed that rates are chosen with; those of the table are others.
TUNING_SEED = 100


@dataclass
class TimeToQualityConfig(CompareConfig):
    """Settings of the measurement."""

    teacher: str = setting("runs/digits-teacher", "The teacher's folder.")
    runs: str = setting("benchmarks/time_to_quality.yaml", "YAML file: name → settings of the recipe.")
    base: str = setting("configs/digits/distill.yaml", "Settings that all recipes share.")
    rates: list[float] = setting([2.5e-4, 5e-4, 1e-3], "Learning rates of student and critic that are tried.")
    budget: float = setting(600.0, "Seconds of training after which a run is given up.")
    steps: int = setting(4200, "Student updates after which a run is given up; the length of its schedule.")
    points: int = setting(50, "Evaluations along a run.")
    teacher_steps: list[int] = setting([10], "Euler steps of the teacher that is to be reached; the first counts.")
    num_samples: int = setting(1797, "Images per evaluation.")
    output: str = setting("benchmarks/results", "Folder of time_to_quality.json and time_to_quality.md.")
    figures: str = setting("docs/images", "Folder of the figure.")
    name: str = setting("time_to_quality", "Beginning of the names of these files.")


def main(argv: list[str]) -> None:
    config = parse_settings(TimeToQualityConfig, argv, __doc__)
    imports = given_imports(argv)
    recipes, results = read_entries(config), Results(config)
    with Workers(config.workers) as workers:
        if not results.values["teacher"]:
            task = (config, run_arguments(config, {}, 0, imports), imports)
            (results.values["teacher"],) = workers.run(judge_teacher, [task], len(config.teacher_steps), "teacher")
        target = results.values["teacher"][0]["distance"]

        def made(wanted: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], dict[str, Any]]:
            """The runs of (recipe, rate, seed), made where they are missing."""
            tasks, found = [], {}
            for recipe, rate, seed in wanted:
                changes = {**recipes[recipe], "learning_rate": rate, "critic_learning_rate": rate}
                arguments, title = run_arguments(config, changes, seed, imports), f"{recipe}, {rate:g}"
                found[recipe, rate, seed] = results.find(title, seed, run_settings(arguments, config.steps))
                if found[recipe, rate, seed] is None:
                    tasks.append(((recipe, rate, seed), title, arguments, config, target))
            for key, run in workers.run(until_below, tasks, len(tasks) * config.steps, "students"):
                found[key] = run
                results.add(run)
            return found

        tuning = made([(recipe, rate, TUNING_SEED) for recipe in recipes for rate in config.rates])
        chosen = {}
        for recipe in recipes:
            tried = {rate: tuning[recipe, rate, TUNING_SEED] for rate in config.rates}
            chosen[recipe] = min(tried, key=lambda rate: _rank(tried[rate], target))
        final = made([(recipe, rate, seed) for recipe, rate in chosen.items() for seed in config.seeds])
    by_recipe = {recipe: [final[recipe, rate, seed] for seed in config.seeds] for recipe, rate in chosen.items()}
    text = (
        table(by_recipe, chosen, target, config)
        + f"\n\n{caption(config, target)} {hardware_line(results.values['hardware'])}\n"
    )
    write_text(Path(config.output) / f"{config.name}.md", text)
    figure(by_recipe, tuning, target, config)
    print("\n" + text)


def until_below(
    key: tuple[str, float, int], title: str, arguments: list[str], config: TimeToQualityConfig, target: float
) -> tuple[tuple[str, float, int], dict[str, Any]]:
    """A run until its distance is below `target`, or its budget is spent; each point with what it has cost."""
    run = Run(arguments, config)
    counts = {"images": 0, "network evaluations": 0}

    def count(*names: str) -> Any:
        def add(module: Any, inputs: tuple, output: Any) -> None:
            for name in names:
                counts[name] += len(inputs[0])

        return add

    trainer = run.trainer
    trainer.generator.unwrapped.register_forward_hook(count("images", "network evaluations"))
    for network in (trainer.critic.unwrapped, trainer.teacher_pipeline.transformer):
        network.register_forward_hook(count("network evaluations"))
    curve = []
    for point in run.curve():
        curve.append({**point, **counts})
        if point["distance"] < target or point["seconds"] > config.budget:
            break
    settings = settings_to_dict(run.settings)
    return key, {"name": title, "seed": key[2], "arguments": arguments, "settings": settings, "curve": curve}


def _rank(run: dict[str, Any], target: float) -> tuple[float, float]:
    """Small for a good run: its seconds when it has arrived, else its distance at the end."""
    last = run["curve"][-1]
    return (last["seconds"], 0.0) if last["distance"] < target else (math.inf, last["distance"])


def table(
    by_recipe: dict[str, list[dict]], chosen: dict[str, float], target: float, config: TimeToQualityConfig
) -> str:
    """A row for each recipe: means over the seeds, at least what is said where a seed has not arrived."""
    names = ("seconds", "updates", "images", "network evaluations")
    ours = statistics.fmean(run["curve"][-1]["seconds"] for run in next(iter(by_recipe.values())))
    rows = []
    for recipe, runs in by_recipe.items():
        last = [run["curve"][-1] for run in runs]
        arrived = sum(point["distance"] < target for point in last)
        sign = "" if arrived == len(last) else "> "
        means = {name: statistics.fmean(point[name] for point in last) for name in names}
        distances = " ".join(f"{point['distance']:.3f}" for point in last)
        row = [
            recipe,
            f"{chosen[recipe]:g}",
            f"{arrived} of {len(last)}",
            *(f"{sign}{means[name]:,.0f}" for name in names),
        ]
        rows.append([*row, f"{sign}{means['seconds'] / ours:.1f}", distances])
    titles = ["recipe", "learning rate", "arrived", *names, f"times {next(iter(by_recipe))}", "distance at the end"]
    return markdown_table(titles, rows)


def caption(config: TimeToQualityConfig, target: float) -> str:
    """What the table is of."""
    return (
        "Until the moving average's one-step images are nearer to the real ones than the teacher's of "
        f"{config.teacher_steps[0]} Euler steps ({target:.3f}): Fréchet distance on {config.features}, "
        f"{config.num_samples:,} samples, measured every {config.steps // config.points} updates; means over seeds "
        f"{', '.join(map(str, config.seeds))}; given up after "
        f"{config.budget:g} seconds or {config.steps:,} updates. Rates: the best of "
        f"{', '.join(f'{rate:g}' for rate in config.rates)} with seed {TUNING_SEED}."
    )


def figure(by_recipe: dict[str, list[dict]], tuning: dict, target: float, config: TimeToQualityConfig) -> None:
    """Distance against seconds and against network evaluations: bold runs of the table, faint ones of the tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("seconds", "network evaluations"), strict=True):
        for index, (recipe, runs) in enumerate(by_recipe.items()):
            tried = [run for (of, *_), run in tuning.items() if of == recipe]
            for faint, run in [*((True, run) for run in tried), *((False, run) for run in runs)]:
                points = run["curve"][1:]
                style = dict(alpha=0.25, linewidth=0.8) if faint else dict(linewidth=1.6)
                label = recipe if run is runs[0] else None
                axis.plot(
                    [p[name] for p in points], [p["distance"] for p in points], color=f"C{index}", label=label, **style
                )
        axis.axhline(target, color="0.4", linestyle="-.", linewidth=0.9)
        axis.set(xscale="log", yscale="log", xlabel=f"{name} of training" if name == "seconds" else name)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"Fréchet distance on {config.features}")
    axes[0].legend()
    path = Path(config.figures) / f"{config.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)
    pyplot.close(picture)


if __name__ == "__main__":
    script_main(main)
