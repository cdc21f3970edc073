"""The folder of a run: its settings, metrics, samples and, at the top, the pipeline itself."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline

from ...errors import InputError
from ...evaluation.config import EVALUATION
from ...hub.facts import CONFIG, FACTS, METRICS
from ...settings import read_yaml, settings_from_dict, settings_to_dict
from ..averaging.ema import EMA_WEIGHTS
from ..averaging.posthoc import EMA_SNAPSHOTS
from ..config import TrainingConfig
from .profiling import PROFILE

SAMPLES, CHECKPOINTS = "samples", "checkpoints"
#: The best pipeline of the run by a metric, and the measurements.
BEST, EVALUATIONS = "best", "evaluations.jsonl"


class RunFolder:
    """Reads and writes a run's files; only rank 0 writes.

    Args:
        settings: the run's settings; `output_dir` is the folder.
        writes: whether this process writes.
    """

    def __init__(self, settings: TrainingConfig, writes: bool):
        self.settings = settings
        self.path = Path(settings.output_dir)
        self.writes = writes

    def check(self) -> None:
        """Refuses a folder that holds something else; changes nothing.

        Raises:
            InputError: when the folder holds another run and is neither resumed nor overwritten, when a resumed run has
                other settings, or when the folder holds files that are no run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"`output_dir` {self.path} is a file, not a folder.")
        config = self.path / CONFIG
        if not config.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise InputError(f"`output_dir` {self.path} holds files but no run: give an empty or a new folder.")
            return
        if self.settings.resume_from_checkpoint is None:
            if self.settings.overwrite_output_dir:
                return
            raise InputError(
                f"`output_dir` {self.path} already holds a run. Resume it with --resume_from_checkpoint latest, "
                "give another --output_dir, or delete it with --overwrite_output_dir."
            )
        values = read_yaml(config)
        version = values.get("algorithm", 1)
        if version != self.settings.ALGORITHM:
            reason = self.settings.other_algorithm(version)
            raise InputError(f"The run in {self.path} cannot be resumed: {reason}")
        # Through the class, so that a setting that did not exist when the run was started has its default.
        saved = _with_data_apart(settings_from_dict(type(self.settings), values))
        now = _with_data_apart(self.settings)
        changed = [key for key in now if key not in self.settings.RESUMABLE and saved[key] != now[key]]
        if changed:
            listing = "; ".join(f"{key}: {saved[key]!r} then, {now[key]!r} now" for key in changed)
            raise InputError(
                f"The run in {self.path} was started with other settings ({listing}). A resumed run repeats the "
                "uninterrupted one exactly: use the same settings, or another --output_dir."
            )
        if self.settings.lr_scheduler_type != "constant" and saved["max_steps"] != now["max_steps"]:
            raise InputError(
                f"The run in {self.path} was started with max_steps={saved['max_steps']}, where its "
                f"{self.settings.lr_scheduler_type} learning rate falls to 0; with max_steps={now['max_steps']} the rate "
                "would jump to another curve. Use the same max_steps, or start another --output_dir; a longer run needs "
                "lr_scheduler_type=constant from the start."
            )

    def start(self) -> None:
        """Makes an empty run folder with config.yaml, deleting an overwritten run."""
        if not self.writes:
            return
        if self.settings.overwrite_output_dir:
            # Only what a run writes: the folder may hold files of its owner. The pipeline's files are replaced later.
            for name in (CONFIG, METRICS, FACTS, EVALUATION, EVALUATIONS, "model_index.json"):
                (self.path / name).unlink(missing_ok=True)
            for name in (SAMPLES, CHECKPOINTS, BEST, EMA_WEIGHTS, EMA_SNAPSHOTS, PROFILE):
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config()

    def write_config(self) -> None:
        """config.yaml: every setting as it was resolved."""
        if self.writes:
            text = yaml.safe_dump(settings_to_dict(self.settings), sort_keys=False, allow_unicode=True)
            replace_text(self.path / CONFIG, text)

    def write_facts(self, facts: dict[str, Any], session: dict[str, Any], step: int) -> None:
        """facts.json: what the settings do not say, and a session for each start. One whose steps are all repeated by this
        start is dropped.
        """
        if not self.writes:
            return
        path = self.path / FACTS
        earlier = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
        kept = [known for known in earlier if known["first_step"] < step]
        facts = {**facts, "sessions": [*kept, {"first_step": step, **session}]}
        replace_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        if self.writes:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drops lines past a resumed step: the run is about to write them again."""
        path = self.path / METRICS
        if self.writes and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step_of(line) <= step]
            replace_text(path, "".join(f"{line}\n" for line in kept))

    def sample_path(self, step: int) -> Path:
        """samples/step_N.png; makes the folder."""
        (self.path / SAMPLES).mkdir(parents=True, exist_ok=True)
        return self.path / SAMPLES / f"step_{step:08d}.png"

    def write_pipeline(self, pipeline: DiffusionPipeline) -> None:
        """Puts the pipeline's files at the top of the run folder, each replaced in one step."""
        if not self.writes:
            return
        staging = self.path / ".pipeline.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        pipeline.save_pretrained(staging)
        # model_index.json goes last: until it is there, nobody takes the folder for a pipeline.
        files = sorted((p for p in staging.rglob("*") if p.is_file()), key=lambda p: p.name == "model_index.json")
        for file in files:
            target = self.path / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(staging)


def step_of(line: str) -> float:
    """The step of a line of a log; infinite for a line cut off by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def replace_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _with_data_apart(settings: TrainingConfig) -> dict[str, Any]:
    """Settings by name, those of the data as `data.…`: not all of them decide the trajectory."""
    values = settings_to_dict(settings)
    data = values.pop("data")
    return values | {f"data.{name}": value for name, value in data.items()}
