"""The folder of a run: its settings, metrics, samples and, at the top, the pipeline itself."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...errors import InputError
from ...evaluation.config import EVALUATION
from ...files import LOCK, FolderLock, delete, refuse_links, write_text
from ...hub.facts import CONFIG, FACTS, METRICS
from ...reading import dump_yaml, read_json, read_json_lines, read_yaml, resolve
from ...settings import settings_from_dict, settings_to_dict
from ...text_to_image.lora import LORA_WEIGHTS
from ...text_to_image.student import STUDENT
from ..averaging.ema import EMA_WEIGHTS
from ..averaging.posthoc import EMA_SNAPSHOTS
from ..config import BEST, EVALUATIONS, TrainingConfig
from .checkpoints import OVERWRITING
from .profiling import PROFILE

SAMPLES, CHECKPOINTS = "samples", "checkpoints"
#: The pipeline on its way to the top of the folder.
STAGING = ".pipeline.tmp"
#: The files that say what a folder holds.
INDICES = ("model_index.json", STUDENT)
#: What one run leaves and another in the same folder must not find.
TRACES = (
    *INDICES, LORA_WEIGHTS, METRICS, FACTS, EVALUATION, EVALUATIONS, SAMPLES, CHECKPOINTS, BEST, f".{BEST}.tmp",
    f".{BEST}.old", EMA_WEIGHTS, EMA_SNAPSHOTS, PROFILE, STAGING,
)  # fmt: skip
#: Folders of what has weights in a pipeline, and of tokenizers.
_COMPONENTS = (
    "transformer", "unet", "vae",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)  # fmt: skip
#: What else a run writes to: the settings, and the pipeline and its card.
_WRITTEN = (
    LOCK, OVERWRITING, CONFIG, f"{CONFIG}.tmp", "README.md", "scheduler", *_COMPONENTS,
)  # fmt: skip
#: Weights in any form that diffusers loads.
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
#: Shapes of the lines and files that a resumed run reads and goes on with.
STEP = {"step": int}
_FACTS = {"sessions": [{"first_step": int}]}


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
        self.lock = FolderLock(self.path)

    def check(self) -> None:
        """Refuses a folder that holds something else or cannot be written; changes nothing but `settings.run_id`.

        Raises:
            InputError: when the folder holds another run and is neither resumed nor overwritten, when a resumed run has
                other settings or unreadable files, when the folder holds files that are no run's or links, or when another
                process writes to it.
        """
        self.settings.run_id = None
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"`output_dir` {self.path} is a file, not a folder.")
        place = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise InputError(
                f"`output_dir` {self.path} cannot be made or written: {place} is read-only, or not a folder."
            )
        refuse_links(self.path, (*TRACES, *_WRITTEN))
        self.lock.check()
        config = self.path / CONFIG
        if not config.exists():
            # What a run leaves that was cut off while it started, before it deletes anything.
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            if names - {LOCK, OVERWRITING, f"{OVERWRITING}.tmp", f"{CONFIG}.tmp", "wandb"}:
                raise InputError(f"`output_dir` {self.path} holds files but no run: give an empty or a new folder.")
            return
        if self.settings.resume_from_checkpoint is None:
            if self.settings.overwrite_output_dir:
                return
            raise InputError(
                f"`output_dir` {self.path} already holds a run. Resume it with --resume_from_checkpoint latest, "
                "give another --output_dir, or delete it with --overwrite_output_dir."
            )
        values = read_yaml(config, plain=True)
        version = resolve(values.get("algorithm", 1))
        if type(version) is not int:
            raise InputError(f"{config} is damaged: `algorithm` must be a whole number, got {version!r}. Restore it.")
        if version != self.settings.ALGORITHM:
            reason = self.settings.other_algorithm(version)
            raise InputError(f"The run in {self.path} cannot be resumed: {reason}")
        # Through the class, so that a setting that did not exist when the run was started has its default.
        saved = _with_data_apart(settings_from_dict(type(self.settings), values))
        self.settings.run_id = saved["run_id"]
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
        measured = {**STEP, f"{self.settings.metric_for_best_model}?": (float, None)}
        for name, shape in ((METRICS, STEP), (EVALUATIONS, measured)):
            for _ in read_json_lines(self.path / name, shape) if (self.path / name).exists() else ():
                pass
        self._sessions()

    def claim(self) -> None:
        """Takes the folder for this process until `release`, and checks it again: another run may have been faster."""
        self.lock.acquire()
        self.check()

    def start(self) -> None:
        """Makes a run folder of a new identity, deleting what an earlier run left."""
        if not self.writes:
            return
        # The new identity comes first: what a kill leaves of the earlier run is then nobody's.
        self.settings.run_id = secrets.token_hex(8)
        write_text(self.path / OVERWRITING, self.settings.run_id)
        self.write_config()
        # Only what a run writes: the folder may hold files of its owner. The pipeline's files are replaced later.
        for name in (*TRACES, OVERWRITING):
            delete(self.path / name)

    def write_config(self) -> None:
        """config.yaml: every setting as it was resolved."""
        if self.writes:
            write_text(self.path / CONFIG, dump_yaml(settings_to_dict(self.settings)))

    def write_facts(self, facts: dict[str, Any], session: dict[str, Any], step: int) -> None:
        """facts.json: what the settings do not say, and a session for each start. One whose steps are all repeated by this
        start is dropped.
        """
        if not self.writes:
            return
        kept = [known for known in self._sessions() if known["first_step"] < step]
        facts = {"run": self.settings.run_id, **facts, "sessions": [*kept, {"first_step": step, **session}]}
        write_text(self.path / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def _sessions(self) -> list[dict[str, Any]]:
        path = self.path / FACTS
        return read_json(path, _FACTS)["sessions"] if path.exists() else []

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        if self.writes:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "run": self.settings.run_id}) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drops lines past a resumed step: the run is about to write them again."""
        if self.writes:
            keep_lines(self.path / METRICS, step, self.settings.run_id)

    def sample_path(self, step: int) -> Path:
        """samples/step_N.png; makes the folder."""
        (self.path / SAMPLES).mkdir(parents=True, exist_ok=True)
        return self.path / SAMPLES / f"step_{step:08d}.png"

    def write_pipeline(self, pipeline: DiffusionPipeline) -> None:
        """Puts the pipeline's files at the top of the run folder, each replaced in one step."""
        if not self.writes:
            return
        staging = self.path / STAGING
        delete(staging)
        pipeline.save_pretrained(staging)
        # The index goes last: until it is there, nobody takes the folder for a pipeline.
        files = sorted((p for p in staging.rglob("*") if p.is_file()), key=lambda p: p.name in INDICES)
        for name in _COMPONENTS:
            # An earlier run may have left weights in more files, or in fewer, which diffusers would load instead, or a whole
            # pipeline where this one is an adapter.
            for pattern in _WEIGHTS:
                for stale in (self.path / name).glob(pattern):
                    if not (staging / name / stale.name).exists():
                        delete(stale)
        for file in files:
            target = self.path / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        delete(staging)


def keep_lines(path: Path, step: int, run_id: str | None) -> list[dict[str, Any]]:
    """Leaves only the lines of a log that this run wrote up to a step, and returns them."""
    if not path.exists():
        return []
    kept = [line for line in read_json_lines(path, STEP) if line["step"] <= step and line.get("run") == run_id]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _with_data_apart(settings: TrainingConfig) -> dict[str, Any]:
    """Settings by name, those of the data as `data.…`: not all of them decide the trajectory."""
    values = settings_to_dict(settings)
    data = values.pop("data")
    return values | {f"data.{name}": value for name, value in data.items()}
