"""Students and their teachers for the Space: found, checked, kept in memory, and sampled by several visitors at once."""

import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from PIL import Image

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.sampling import class_names, sample_rows
from si_distill.visualization import image_grid

MAX_IMAGES, MAX_CLASSES, MAX_PER_CLASS, MAX_STEPS, MAX_SEED = 48, 12, 8, 100, 2**31 - 1
#: Of a repository that a visitor names, without Python files and pickles, which are not even downloaded.
MAX_BYTES = 4 * 1024**3
FILES = ["*.json", "*.safetensors", "config.yaml", "README.md"]
#: Pipelines kept in memory; the one used least recently goes first.
KEPT = 6


class VisitorError(ValueError):
    """What a visitor asked for cannot be done; the text says why."""


@dataclass(frozen=True)
class Choice:
    """
    A student to choose.

    Args:
        student: a folder of this machine, or a repository of the Hub.
        revision: a commit of that repository; None takes the newest.
        teacher: a folder or repository to compare with; None asks the student's card.
        visitor: whether a visitor typed the name, which must then be a repository.
    """

    student: str
    revision: str | None = None
    teacher: str | None = None
    visitor: bool = False

    @property
    def title(self) -> str:
        return self.student.rstrip("/").split("/")[-1] if Path(self.student).is_dir() else self.student


@dataclass
class Result:
    """
    Args:
        picture: the grid with the names of the classes.
        images: number of images.
        seconds: of sampling, decoding included.
        evaluations: of the network for each image; a guided one counts twice.
    """

    picture: Image.Image
    images: int
    seconds: float
    evaluations: float


class Students:
    """Loads pipelines once and samples them for any number of threads."""

    def __init__(self):
        self._pipelines: OrderedDict[tuple, DiffusionPipeline] = OrderedDict()
        self._folders: dict[Choice, Path] = {}
        self._warm: weakref.WeakSet[DiffusionPipeline] = weakref.WeakSet()
        self._lock = threading.Lock()

    def classes(self, choice: Choice) -> list[str]:
        """Names of the classes; empty for an unconditional student."""
        pipeline = self._pipeline(OneStepInterpolantPipeline, self.folder(choice))
        return class_names(pipeline, list(range(pipeline.network.num_classes)))

    def folder(self, choice: Choice) -> Path:
        """The student's folder; a repository is fetched, without its code."""
        if choice not in self._folders:
            if not choice.visitor and Path(choice.student).is_dir():
                self._folders[choice] = Path(choice.student)
            else:
                self._folders[choice] = _fetch(choice.student, choice.revision)
        return self._folders[choice]

    def teacher_folder(self, choice: Choice) -> Path | None:
        """The teacher's folder, or None when nobody says who the teacher is."""
        if choice.teacher and Path(choice.teacher).is_dir():
            return Path(choice.teacher)
        name, card = choice.teacher, self.folder(choice) / "README.md"
        if name is None and card.is_file():
            name = ModelCard.load(card).data.base_model
        return _fetch(name, None) if isinstance(name, str) else None

    def prepare(self, choice: Choice, compare: bool) -> tuple[Path, Path | None]:
        """Loads what `sample` will use, where there may be no connection later (ZeroGPU's processes)."""
        folder, teacher = self.folder(choice), self.teacher_folder(choice) if compare else None
        self._pipeline(OneStepInterpolantPipeline, folder)
        if teacher is not None:
            self._pipeline(InterpolantPipeline, teacher)
        return folder, teacher

    def sample(
        self, folder: Path, teacher: Path | None, labels: list[int], count: int, seed: int, steps: int
    ) -> Iterator[Result]:
        """
        The student's images, then the teacher's from the same noise.

        Args:
            folder, teacher: of `prepare`.
            labels: classes, one column each; empty for an unconditional student.
            count: images of each class, or rows of four of an unconditional student.
            seed: of the first row of images.
            steps: of the teacher's solver.
        """
        yield self._run(self._pipeline(OneStepInterpolantPipeline, folder), labels, count, seed)
        if teacher is not None:
            pipeline = self._pipeline(InterpolantPipeline, teacher)
            yield self._run(pipeline, labels, count, seed, num_inference_steps=steps, guidance_scale=_guidance(folder))

    def _pipeline(self, cls: type[DiffusionPipeline], folder: Path) -> DiffusionPipeline:
        key = (cls.__name__, str(folder))
        with self._lock:  # one load at a time, and nobody sees half of it
            if key not in self._pipelines:
                try:
                    pipeline = cls.from_pretrained(folder)
                except (OSError, ValueError) as error:
                    raise VisitorError(f"{folder.name} cannot be loaded: {error}") from error
                if pipeline.image_channels:
                    raise VisitorError(
                        f"{folder.name} turns images into others, and this page has no place for images to start from: run "
                        "pipelines/generate.py --image, or the lines of its card."
                    )
                pipeline.set_progress_bar_config(disable=True)
                self._pipelines[key] = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
            self._pipelines.move_to_end(key)
            while len(self._pipelines) > KEPT:
                self._pipelines.popitem(last=False)
            return self._pipelines[key]

    def _run(self, shared: DiffusionPipeline, labels: list[int], count: int, seed: int, **kwargs) -> Result:
        # Visitors share the network; the scheduler counts its steps, so each call has one of its own.
        scheduler = type(shared.scheduler).from_config(shared.scheduler.config)
        pipeline = type(shared)(**{**shared.components, "scheduler": scheduler}, id2label=shared.config.id2label)
        pipeline.set_progress_bar_config(disable=True)
        if shared not in self._warm:  # what a first call sets up is not the first visitor's time
            few_steps = {"num_inference_steps": 1} if "num_inference_steps" in kwargs else {}
            sample_rows(pipeline, [0] if labels else None, 1, 0, **few_steps)
            self._warm.add(shared)
        rows, thread = 0, threading.get_ident()

        def watch(module: torch.nn.Module, arguments: tuple, result: object) -> None:
            nonlocal rows
            if threading.get_ident() == thread:  # other visitors use the same network
                rows += len(result[0])

        hook = pipeline.transformer.register_forward_hook(watch)
        started = time.perf_counter()
        try:
            images = sample_rows(pipeline, labels or None, count, seed, columns=4, **kwargs)
        finally:
            hook.remove()
        seconds = time.perf_counter() - started
        number = sum(map(len, images))
        picture = image_grid(images, column_titles=class_names(pipeline, labels) if labels else None, min_cell=72)
        return Result(picture, number, seconds, rows / number)


def configured(path: Path) -> list[Choice]:
    """The students of space.json."""
    return [Choice(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["students"]]


def checked_choice(name: str | None, choices: list[Choice]) -> Choice:
    """The student that a visitor chose from the list, or typed."""
    for choice in choices:
        if name == choice.title:
            return choice
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name or ""):
        raise VisitorError(
            f"{name or 'Nothing'} is no student: choose one of the list, or type a repository, user/name."
        )
    return Choice(name, visitor=True)


def checked_request(names: list[str], classes: list[str], count: float, seed: float, steps: float) -> tuple:
    """Labels, count, seed and steps as numbers within the limits, whoever sends them."""
    whole = []
    for what, value, low, high in (
        ("images per class", count, 1, MAX_PER_CLASS),
        ("seed", seed, 0, MAX_SEED),
        ("teacher steps", steps, 1, MAX_STEPS),
    ):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
            or value != int(value)
        ):
            raise VisitorError(f"The number of {what} must be whole, from {low} to {high:,}." if what != "seed" else
                               f"The seed must be a whole number from {low} to {high:,}.")  # fmt: skip
        whole.append(int(value))
    if not classes:
        return [], *whole
    if not names:
        raise VisitorError("Choose at least one class.")
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise VisitorError(f"This student has no class {unknown[0]!r}. Choose from the list.")
    if len(names) > MAX_CLASSES or len(names) * whole[0] > MAX_IMAGES:
        raise VisitorError(
            f"{len(names)} classes with {whole[0]} images each are too many: at most {MAX_CLASSES} classes and {MAX_IMAGES} "
            "images at once."
        )
    return [classes.index(name) for name in names], *whole


def _guidance(folder: Path) -> float:
    """The teacher's guidance that is inside the student, so that the two are compared fairly."""
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return float((settings or {}).get("guidance_scale", 1.0))


def _fetch(name: str, revision: str | None) -> Path:
    """A repository's weights and configs. Its Python files stay where they are: this package's classes are used."""
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors"))
        if size > MAX_BYTES:
            raise VisitorError(
                f"{name} has {size / 1024**3:.1f} GiB of weights; {MAX_BYTES // 1024**3} GiB can be shown here."
            )
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=FILES))
    except (HTTPError, OSError, HFValidationError) as error:
        raise VisitorError(f"{name} cannot be read from the Hub: check the name, and that it is public.") from error
