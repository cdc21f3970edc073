"""Checkpoints that are either whole or not there.

All ranks save into `step_N.tmp` and fsync the files; rank 0 writes a manifest with the run's identity and the files' sizes
and checksums, renames the folder and only then deletes old ones. A kill, a full disk or a power cut at any moment leaves the
last good checkpoint in place.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import xxhash
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, broadcast_object_list, load
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from ...errors import InputError, TrainingStopped
from ...files import delete
from ...hub.facts import CONFIG
from ...reading import read_json, read_yaml
from ..parallel.accelerator import agree

#: How a full disk or a lost folder shows itself: torch and safetensors wrap the system's error in types of their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
MANIFEST = "manifest.json"
#: What the trainer keeps of its own. JSON: Accelerate would unpickle it without restrictions.
STATE = "state.json"
_STATE = {"step": int, "failures": int, "means": {str: float}, "counts": {str: int}, "schedules": {str: dict}}
_MANIFEST = {
    "step": int,
    "run?": (str, None),
    "world_size": int,
    "workers?": int,
    "images_per_update?": int,
    "sharded?": bool,
    "files": {str: ({"size": int, "xxh3?": str}, int)},
}
_FOLDER = re.compile(r"step_(\d+)")
_DAMAGED = (
    RuntimeError, KeyError, ValueError, TypeError, EOFError, OSError, UnpicklingError, SafetensorError, CheckpointException,
)  # fmt: skip
_FOREIGN = "it is of another run"
#: Holds the identity of a run that is deleting what an earlier one left in its folder; gone once that is done.
OVERWRITING = ".overwriting"
_BLOCK = 2**24


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        accelerator: its models and optimizers are what a checkpoint holds.
        folder: the `checkpoints/` folder.
        keep: how many to keep.
        images_per_update: the global batch, which a resumed run must keep.
        workers: processes of each rank that read data; with the number of ranks, what a rank's own state belongs to.

    Attributes:
        run_id: identity of the run, which every checkpoint says; to be set before one is saved or looked for.
    """

    run_id: str | None = None

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
            error = agree(self.accelerator, stage, WRITE_ERRORS)
            if error:
                if main:
                    with contextlib.suppress(OSError):
                        delete(partial)
                good = self._sealed()
                kept = (
                    f"The last good checkpoint is {good[-1]}; make room and resume with --resume_from_checkpoint latest."
                    if good
                    else "There is no earlier checkpoint."
                )
                raise TrainingStopped(f"Could not save the checkpoint of step {step}: {error}. {kept}")

    def _write(self, partial: Path, state: dict[str, Any], rank_state: dict[str, Any]) -> None:
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        self._rank_file(partial).write_text(json.dumps(rank_state), encoding="utf-8")

    def _rank_file(self, path: Path) -> Path:
        return path / f"rank_{self.accelerator.process_index}.json"

    def _clear(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = identity_of(self.folder.parent)
        if owner not in (None, self.run_id):
            raise OSError(f"{self.folder.parent} was taken over by another run ({owner})")
        for leftover in self.folder.glob("step_*.tmp"):
            delete(leftover)
        partial.mkdir()

    def _seal(self, partial: Path, final: Path, step: int) -> None:
        manifest = {
            "step": step,
            "run": self.run_id,
            "world_size": self.accelerator.num_processes,
            "workers": self.workers,
            "images_per_update": self.images_per_update,
            "sharded": self.accelerator.is_fsdp2,
            "files": {str(path.relative_to(partial)): _fingerprint(path) for path in _files(partial)},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _fsync(partial / MANIFEST)
        _fsync(partial)
        delete(final)
        os.rename(partial, final)
        _fsync(self.folder)
        for old in self._sealed()[: -self.keep]:
            delete(old)

    def _sealed(self) -> list[Path]:
        """The checkpoints with all of their files, oldest first; what the files hold is not read again."""
        return [path for path in _steps(self.folder) if _problem(path, self.run_id, contents=False) is None]

    def find(self, which: str) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` means; None when `latest` finds none. Collective.

        Says which damaged folders it passed over.

        Raises:
            InputError: for a folder that is not a whole checkpoint, or one that does not fit this run's processes.
        """
        found: list[Path | None] = [None]

        def look() -> None:
            if self.accelerator.is_main_process:  # reads every file
                found[0] = self._find(which)

        error = agree(self.accelerator, look, (InputError,))
        if error:
            raise InputError(error)
        return broadcast_object_list(found)[0]

    def _find(self, which: str) -> Path | None:
        if which == "latest":
            damaged = foreign = None
            for path in sorted(self.folder.glob("step_*"), reverse=True):
                problem = _problem(path, self.run_id)
                if problem is None:
                    break
                self.accelerator.print(f"Passing over {path.name}: {problem}.")
                if problem == _FOREIGN:
                    foreign = foreign or path
                elif _FOLDER.fullmatch(path.name):
                    damaged = damaged or path
            else:
                if damaged:
                    raise InputError(
                        f"No checkpoint in {self.folder} is whole, and starting at step 0 would delete what is left, e.g. "
                        f"{damaged.name}. Restore one, or start again with --overwrite_output_dir alone."
                    )
                if foreign and not self._is_overwriting():
                    raise InputError(
                        f"The checkpoints in {self.folder}, e.g. {foreign.name}, are of another run than {CONFIG} says, and "
                        f"starting at step 0 would delete them. Restore the {CONFIG} of that run, or start again with "
                        "--overwrite_output_dir alone."
                    )
                if (self.folder.parent / "model_index.json").exists() and not self._is_overwriting():
                    raise InputError(
                        f"{self.folder.parent} holds the pipeline of this run but no checkpoint, and starting at step 0 "
                        f"would delete it. Restore {self.folder.name}/, or start again with --overwrite_output_dir alone."
                    )
                return None
        else:
            path = Path(which)
            problem = _problem(path, self.run_id)
            if problem:
                known = ", ".join(str(p) for p in self._sealed()) or "none"
                raise InputError(f"{path} is not a whole checkpoint: {problem}. Whole ones: {known}.")
        if not all(isinstance(found, dict) and "xxh3" in found for found in _manifest(path)["files"].values()):
            self.accelerator.print(f"note: {path.name} is of an early release: its files have no checksums to compare.")
        self._check_fits(path)
        return path

    def _is_overwriting(self) -> bool:
        """Whether this run was killed while it deleted what an earlier one had left."""
        marker = self.folder.parent / OVERWRITING
        return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") == self.run_id

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
        if not (path / STATE).exists():
            raise InputError(
                f"The checkpoint {path} has no {STATE}: it was saved by an earlier release. Finish the run with that "
                "release, or start a new one."
            )
        remedy = "Resume from another checkpoint."
        state, said = read_json(path / STATE, _STATE, remedy), _manifest(path)["step"]
        if state["step"] != said or said < 0:
            raise InputError(f"{path / STATE} is of step {state['step']} and {MANIFEST} of step {said}. {remedy}")
        try:
            random_states = path / f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl"
            if random_states.exists():  # not of a rank that was not there when it was saved
                load(random_states, map_location="cpu")  # Accelerate goes on without what it cannot read
            self.accelerator.load_state(str(path))
        except _DAMAGED as error:
            raise InputError(f"The checkpoint {path} does not fit this run: {error or type(error).__name__}") from error
        return state

    def rank_state(self, path: Path) -> dict[str, Any] | None:
        """What this rank gave to `save`; None when the ranks or their workers were others, so that it belongs to nobody."""
        manifest = _manifest(path)
        if (manifest["world_size"], manifest.get("workers")) != (self.accelerator.num_processes, self.workers):
            return None
        file = self._rank_file(path)
        return read_json(file, dict, "Resume from another checkpoint.") if file.exists() else None


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's `checkpoints/`, oldest first: every file is there as that run has written it."""
    run_id = identity_of(folder.parent)
    return [path for path in _steps(folder) if _problem(path, run_id) is None]


def identity_of(run: Path) -> str | None:
    """The identity that a run folder's config.yaml says; None where it says none."""
    config = run / CONFIG
    found = read_yaml(config).get("run_id") if config.exists() else None
    return None if found is None else str(found)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if _FOLDER.fullmatch(path.name))


def _manifest(path: Path) -> dict:
    return read_json(path / MANIFEST, _MANIFEST)


def _problem(path: Path, run_id: str | None, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, as one of this run, or None.

    Args:
        path: the folder.
        run_id: the run that it must be of.
        contents: whether to read the files and compare their checksums.
    """
    if not path.is_dir():
        return "no such folder"
    if path.suffix == ".tmp":
        return "its saving was cut off"
    try:
        manifest = _manifest(path)
    except InputError:
        return "its manifest is missing or unreadable"
    if manifest.get("run") != run_id:
        return _FOREIGN
    if not manifest["files"]:
        return "its manifest names no files"
    for name, expected in manifest["files"].items():
        expected = {"size": expected} if isinstance(expected, int) else expected  # manifests before checksums
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        try:
            if contents and "xxh3" in expected and _fingerprint(file) != expected:
                return f"{name} is not what was written: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and checksum, which is computed faster than the file is read."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "xxh3": digest.hexdigest()}


def _fsync_all(folder: Path) -> None:
    for path in _files(folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
