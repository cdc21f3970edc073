"""Runs of one base config side by side, over seeds: trained, evaluated on the way, and put into one table and one figure."""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from ...data.latents.format import images_of
from ...errors import InputError
from ...imports import import_module
from ...loading import load_pipeline
from ...pipelines import InterpolantPipeline
from ...reading import read_yaml
from ...sample_noise import sample_seed
from ...settings import merge_settings, parse_settings, refuse_code, settings_to_dict
from ...workers import Workers, advance
from ..distillation.config import DistillConfig
from ..distillation.trainer import DistillationTrainer
from .config import CompareConfig
from .judge import Judge
from .results import Results


def compare(config: CompareConfig, imports: list[str]) -> str:
    """Makes the runs that are missing, each finished one written at once; returns the table.

    Args:
        config: which runs.
        imports: modules that every process imports first.

    Raises:
        InputError: for an entry that is no run, a run that cannot work, or results of another comparison in `output`.
    """
    entries = read_entries(config)
    names = config.only or list(entries)
    if unknown := [name for name in names if name not in entries]:
        raise InputError(f"There is no run {unknown[0]!r}. {config.runs} has: {'; '.join(entries)}.")
    results = Results(config)
    tasks = []
    for seed in config.seeds:  # seeds first: a comparison that is stopped has every run once before any twice
        for name in names:
            arguments = run_arguments(config, entries[name], seed, imports)
            # Parsed here too: a mistake in the last entry shows before the first run.
            if not results.find(name, seed, run_settings(arguments, config.steps)):
                tasks.append((name, seed, arguments, config))
    print(f"{len(tasks)} runs to make, {len(names) * len(config.seeds) - len(tasks)} are there.", file=sys.stderr)
    with Workers(config.workers) as workers:
        if not results.values["teacher"]:
            # Alone, before the runs: this also computes the real images' features, which they find in the cache.
            task = (config, run_arguments(config, {}, 0, imports), imports)
            (results.values["teacher"],) = workers.run(judge_teacher, [task], len(config.teacher_steps), "teacher")
        for run in workers.run(distil, tasks, len(tasks) * config.steps, "students"):
            results.add(run)
            results.report(finished(results, entries, imports))
    return results.report(finished(results, entries, imports))


def read_entries(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """The runs by name: what differs from the base, in the words of `si-distill train-distill`.

    Raises:
        InputError: for an entry that is no mapping, or that names code: a file cannot.
    """
    entries = {name: changes or {} for name, changes in read_yaml(config.runs).items()}
    for name, changes in entries.items():
        where = f"The run {name!r} in {config.runs}"
        if not isinstance(changes, dict):
            raise InputError(f"{where} must hold `key: value` lines, got {changes!r}.")
        nested: dict[str, Any] = {}
        for key, value in changes.items():
            if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key) or key == "import":
                raise InputError(f"{where} has the key {key!r}, which is no setting of `si-distill train-distill`.")
            for part in reversed(key.split(".")):
                value = {part: value}
            nested = merge_settings(nested, value)
        try:
            refuse_code(DistillConfig, nested, {})
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return entries


def run_arguments(
    config: CompareConfig, changes: dict[str, Any], seed: int, imports: list[str] | tuple[str, ...] = ()
) -> list[str]:
    """The command line of a run, as `training/train_distill.py` would get it, but for its length and folder."""
    arguments = ["--import", *imports] if imports else []
    arguments += ["--config", config.base, "--teacher", config.teacher, "--seed", str(seed)]
    arguments += ["--trust_remote_code"] if config.trust_remote_code else []
    # With the sign: a value that begins with -- is a value.
    return arguments + [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()
    ]


def run_settings(arguments: list[str], updates: int) -> DistillConfig:
    """The settings of a run of that many updates of its student."""
    settings = parse_settings(DistillConfig, [*arguments, "--output_dir", "unset"])
    if updates % settings.generator_steps:
        raise InputError(
            f"`steps` {updates} is no multiple of the generator_steps {settings.generator_steps} of a run."
        )
    # `teacher_model` speaks of the teacher to dry runs alone.
    return replace(settings, max_steps=updates // settings.generator_steps, teacher_model={})


def finished(results: Results, entries: dict[str, dict], imports: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Runs by name, in the order of the entries; without those whose settings have changed since."""
    config, seeds, found = results.config, results.seeds, {}
    for name, changes in entries.items():
        wanted = {seed: run_settings(run_arguments(config, changes, seed, imports), config.steps) for seed in seeds}
        runs = [run for seed in seeds if (run := results.find(name, seed, wanted[seed]))]
        if runs:
            found[name] = runs
    return found


def judge_of(config: CompareConfig, settings: DistillConfig, device: torch.device | str) -> Judge:
    """The evaluation of a comparison, against the images of its base's `data`."""
    names = ("num_samples", "features", "feature_weights", "reference", "metrics", "batch_size", "cache_dir")
    return Judge(images_of(settings.data), **{name: getattr(config, name) for name in names}, device=device)


def judge_teacher(config: CompareConfig, arguments: list[str], imports: list[str]) -> list[dict[str, float]]:
    """The teacher's rows."""
    for name in imports:
        import_module(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = run_settings(arguments, config.steps)
    judge = judge_of(config, base, device)
    pipeline = load_pipeline(InterpolantPipeline, "teacher", config.teacher, config.trust_remote_code).to(device)
    guidance = {} if base.guidance_scale == 1 else {"guidance_scale": base.guidance_scale}
    rows = []
    for steps in config.teacher_steps:
        rows.append({"steps": steps, **judge(pipeline, num_inference_steps=steps, **guidance)})
        advance()
    return rows


def distil(name: str, seed: int, arguments: list[str], config: CompareConfig) -> dict[str, Any]:
    """One run: trains as train_distill.py does, and evaluates its moving average on the way."""
    run = Run(arguments, config)
    curve = list(run.curve())
    return {
        "name": name,
        "seed": seed,
        "arguments": arguments,
        "settings": settings_to_dict(run.settings),
        "thrown away": run.thrown_away,
        "curve": curve,
    }


class Run:
    """A training of a comparison, which gives its figures as it goes.

    Args:
        arguments: of `run_arguments`.
        config: of the comparison.
    """

    def __init__(self, arguments: list[str], config: CompareConfig):
        AcceleratorState._reset_state(True)  # the run before it in this process may have had another precision
        GradientState._reset_state()
        self.config, self.settings, self.thrown_away = config, run_settings(arguments, config.steps), 0
        with tempfile.TemporaryDirectory() as folder:  # named in the settings, but nothing is written outside `train()`
            self.trainer = DistillationTrainer(replace(self.settings, output_dir=f"{folder}/run"))
        base = run_settings(_base_of(arguments, config), config.steps)
        self.judge = judge_of(config, base, self.trainer.accelerator.device)

    def curve(self) -> Iterator[dict[str, Any]]:
        """The figures before training and `points` times along it, each with its updates and seconds of training."""
        trainer, clock = self.trainer, _clock(self.trainer.accelerator.device)
        iterations, per_iteration = self.settings.max_steps, self.settings.generator_steps
        marks = {round(iterations * i / self.config.points) for i in range(self.config.points + 1)}
        seconds = 0.0
        while True:
            if trainer.step in marks:
                pipeline = trainer.pipeline()
                counts = {str(n): self.judge(pipeline, num_inference_steps=n) for n in pipeline.trained_steps}
                found = {**counts[str(pipeline.trained_steps[-1])], **({"counts": counts} if len(counts) > 1 else {})}
                yield {"updates": trainer.step * per_iteration, "seconds": seconds, **found}
            if trainer.step == iterations:
                break
            torch.manual_seed(sample_seed(self.settings.seed, "dropout", trainer.step, 0))  # as `Trainer.train` does
            started = clock()
            _, finite = trainer.iteration()
            seconds += clock() - started
            self.thrown_away += not finite
            trainer.step += 1
            advance(per_iteration)


def _base_of(arguments: list[str], config: CompareConfig) -> list[str]:
    """The arguments without what differs in a run: its images may be a part, and all of them are compared with."""
    length = len(run_arguments(config, {}, 0))
    start = arguments.index("--config")
    return arguments[: start + length]


def _clock(device: torch.device) -> Callable[[], float]:
    """On a CPU time of this process's one thread: what else the machine does meanwhile does not count."""
    if device.type != "cuda":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall
