"""Checkpoints that are either whole or not there.

All ranks save into `step_N.tmp` and fsync the files; rank 0 writes a manifest with their sizes and, of small files,
checksums, renames the folder and only then deletes old ones. A kill, a full disk or a power cut at any moment leaves the
last good checkpoint in place.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from ...errors import InputError, TrainingStopped

#: How a full disk or a lost folder shows itself: torch and safetensors wrap the system's error in types of their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
MANIFEST = "manifest.json"
#: What the trainer keeps of its own. JSON: Accelerate would unpickle it without restrictions.
STATE = "state.json"
#: Larger files are known by their size alone: reading back the tensors of an XL network would take longer than writing them.
CHECKSUM_BYTES = 16 * 2**20
_FOLDER = re.compile(r"step_(\d+)")


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        accelerator: its models and optimizers are what a checkpoint holds.
        folder: the `checkpoints/` folder.
        keep: how many to keep.
        images_per_update: the global batch, which a resumed run must keep.
        workers: processes of each rank that read data; with the number of ranks, what a rank's own state belongs to.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int, images_per_update: int = 1, workers: int = 0):
        self.accelerator = accelerator
        self.folder = folder
        self.keep = keep
        self.images_per_update = images_per_update
        self.workers = workers

    def save(self, step: int, state: dict[str, Any], rank_state: dict[str, Any] | None = None) -> None:
        """Saves a checkpoint of this step; collective.

        Args:
            step: iterations done.
            state: what all ranks need to go on besides the accelerator's models and optimizers; plain data (JSON).
            rank_state: what this rank alone needs to go on, such as the place in its stream of images; plain data (JSON).

        Raises:
            TrainingStopped: on every rank, when any rank could not write. Earlier checkpoints are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        partial = final.with_suffix(".tmp")
        main = self.accelerator.is_main_process
        stages = (
            lambda: self._clear(partial) if main else None,
            lambda: self._write(partial, state, rank_state or {}),
            # On each machine: what another one has written may still be in its memory.
            lambda: _fsync_all(partial) if self.accelerator.is_local_main_process else None,
            lambda: self._seal(partial, final, step) if main else None,
        )
        for stage in stages:
            error = ""
            try:
                stage()
            except WRITE_ERRORS as failure:
                error = f"{type(failure).__name__}: {failure}"
            # The ranks agree after each stage: one that failed must not leave the others waiting.
            errors = [text for text in gather_object([error]) if text]
            if errors:
                if main:
                    shutil.rmtree(partial, ignore_errors=True)
                good = self.complete()
                kept = (
                    f"The last good checkpoint is {good[-1]}; make room and resume with --resume_from_checkpoint latest."
                    if good
                    else "There is no earlier checkpoint."
                )
                raise TrainingStopped(f"Could not save the checkpoint of step {step}: {errors[0]}. {kept}")

    def _write(self, partial: Path, state: dict[str, Any], rank_state: dict[str, Any]) -> None:
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        self._rank_file(partial).write_text(json.dumps(rank_state), encoding="utf-8")

    def _rank_file(self, path: Path) -> Path:
        return path / f"rank_{self.accelerator.process_index}.json"

    def _clear(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        partial.mkdir()

    def _seal(self, partial: Path, final: Path, step: int) -> None:
        manifest = {
            "step": step,
            "world_size": self.accelerator.num_processes,
            "workers": self.workers,
            "images_per_update": self.images_per_update,
            "sharded": self.accelerator.is_fsdp2,
            "files": {str(path.relative_to(partial)): _fingerprint(path) for path in _files(partial)},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _fsync(partial / MANIFEST)
        _fsync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _fsync(self.folder)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        return whole_checkpoints(self.folder)

    def find(self, which: str) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` means; None when `latest` finds none.

        Says which damaged folders it passed over.

        Raises:
            InputError: for a folder that is not a whole checkpoint, or one that does not fit this run's processes.
        """
        if which == "latest":
            good = self.complete()
            for damaged in sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []:
                if damaged not in good:
                    self.accelerator.print(f"Passing over {damaged.name}: {_problem(damaged)}.")
            if not good:
                return None
            path = good[-1]
        else:
            path = Path(which)
            problem = _problem(path)
            if problem:
                known = ", ".join(str(p) for p in self.complete()) or "none"
                raise InputError(f"{path} is not a whole checkpoint: {problem}. Whole ones: {known}.")
        self._check_fits(path)
        return path

    def _check_fits(self, path: Path) -> None:
        manifest, now = _manifest(path), self.accelerator.num_processes
        saved, images = manifest["world_size"], manifest.get("images_per_update")
        if manifest.get("sharded", False) != self.accelerator.is_fsdp2:
            kinds = ("with FSDP2", "without sharding")
            then, here = kinds if manifest.get("sharded", False) else kinds[::-1]
            raise InputError(f"{path} was saved {then} and this run is {here}: launch as the run was started.")
        if images is None and saved != now:
            raise InputError(
                f"{path} was saved by {saved} process(es) and this run has {now}. Launch with --num_processes {saved}."
            )
        if images is not None and images != self.images_per_update:
            raise InputError(
                f"{path} was saved by {saved} process(es) with {images} images per update; {now} process(es) with these "
                f"settings have {self.images_per_update}. A step of the run means {images} images: choose "
                f"per_device_train_batch_size × gradient_accumulation_steps × processes = {images}, or launch with "
                f"--num_processes {saved} and the settings of the run."
            )
        if saved != now:
            self.accelerator.print(
                f"{path.name} was saved by {saved} process(es), this run has {now}, with the same {images} images per "
                "update: it goes on as the uninterrupted run up to rounding, not bit for bit."
            )

    def load(self, path: Path) -> dict[str, Any]:
        """Loads what the accelerator saved, on every rank; nothing that a checkpoint holds is run.

        Returns:
            The `state` that `save` was given.

        Raises:
            InputError: when the tensors do not fit this run's networks, or the state is missing or damaged.
        """
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"The checkpoint {path} has no {STATE}: it was saved by an earlier release. Finish the run with that "
                "release, or start a new one."
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"Cannot read {path / STATE}: {error}. Resume from another checkpoint.") from error
        try:
            self.accelerator.load_state(str(path))
        except (RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError, CheckpointException) as error:
            raise InputError(f"The checkpoint {path} does not fit this run: {error}") from error
        return state

    def rank_state(self, path: Path) -> dict[str, Any] | None:
        """What this rank gave to `save`; None when the ranks or their workers were others, so that it belongs to nobody."""
        manifest = _manifest(path)
        if (manifest["world_size"], manifest.get("workers")) != (self.accelerator.num_processes, self.workers):
            return None
        file = self._rank_file(path)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first: every file of the manifest is there as it was written."""
    if not folder.is_dir():
        return []
    named = sorted(p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir())
    return [p for p in named if _problem(p) is None]


def _manifest(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    if not path.is_dir():
        return "no such folder"
    if path.suffix == ".tmp":
        return "its saving was cut off"
    try:
        files = _manifest(path)["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest is missing or unreadable"
    for name, expected in files.items():
        expected = {"size": expected} if isinstance(expected, int) else expected  # manifests before checksums
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if "crc32" in expected and _fingerprint(file) != expected:
            return f"{name} is not what was written: its checksum differs"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int]:
    """A file's size and, where reading it takes no time, its checksum."""
    size = path.stat().st_size
    return {"size": size} | ({"crc32": zlib.crc32(path.read_bytes())} if size <= CHECKSUM_BYTES else {})


def _fsync_all(folder: Path) -> None:
    for path in _files(folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
