"""Students and their teachers for the Space: found, checked, kept in memory, and sampled by several visitors at once."""

import re
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, models
from si_distill.errors import InputError
from si_distill.reading import read_json, read_yaml
from si_distill.sampling import class_names, sample_rows
from si_distill.visualization import image_grid

MAX_IMAGES, MAX_CLASSES, MAX_PER_CLASS, MAX_STEPS, MAX_SEED = 48, 12, 8, 100, 2**31 - 1
#: Of all that is downloaded from a repository, which leaves out Python files and pickles; and of one that is not weights.
MAX_BYTES, MAX_FILES, MAX_TEXT_BYTES = 4 * 1024**3, 100, 16 * 1024**2
#: Of what configs declare, looked at before anything is built or loaded: values of all networks together, blocks on a level
#: or in a row, any other number (widths, classes), and positions along one side of a map.
MAX_PARAMETERS, MAX_BLOCKS, MAX_NUMBER, MAX_POSITIONS = 1_200_000_000, 200, 70_000, 256
#: And of tokens, each of which a transformer compares with each; and characters in the name of a class.
MAX_TOKENS, MAX_NAME = 4096, 1000
#: Seconds that one request may take.
MAX_SECONDS = 60.0
#: What space.json holds (see `read_json`).
SPACE = {"students": [{"student": str, "revision?": (str, None), "teacher?": (str, None), "visitor?": bool}]}
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
        self._visited: OrderedDict[Choice, Path] = OrderedDict()
        self._until = threading.local()
        self._warm: weakref.WeakSet[DiffusionPipeline] = weakref.WeakSet()
        self._lock = threading.Lock()

    def classes(self, choice: Choice) -> list[str]:
        """Names of the classes; empty for an unconditional student."""
        pipeline = self._pipeline(OneStepInterpolantPipeline, self.folder(choice))
        return class_names(pipeline, list(range(pipeline.network.num_classes)))

    def folder(self, choice: Choice) -> Path:
        """The student's folder; a repository is fetched, without its code."""
        if choice.visitor:
            return self._visited_folder(choice)
        if choice not in self._folders:
            here = Path(choice.student)
            self._folders[choice] = here if here.is_dir() else _fetch(choice.student, choice.revision)
        return self._folders[choice]

    def _visited_folder(self, choice: Choice) -> Path:
        """A folder of a visitor's repository; those of earlier visitors are deleted, or they would fill the disk."""
        if choice not in self._visited:
            self._visited[choice] = _fetch(choice.student, choice.revision, Path(tempfile.mkdtemp(prefix="one-step-")))
        self._visited.move_to_end(choice)
        while len(self._visited) > KEPT:
            shutil.rmtree(self._visited.popitem(last=False)[1], ignore_errors=True)
        return self._visited[choice]

    def teacher_folder(self, choice: Choice) -> Path | None:
        """The teacher's folder, or None when nobody says who the teacher is."""
        if choice.teacher and Path(choice.teacher).is_dir():
            return Path(choice.teacher)
        name, card = choice.teacher, self.folder(choice) / "README.md"
        if name is None and card.is_file():
            with _explained(f"The card of {choice.title} cannot be read"):
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
        with _explained(f"{folder.name} cannot be shown"):
            student = self._run(self._pipeline(OneStepInterpolantPipeline, folder), labels, count, seed)
        yield student
        if teacher is not None:
            arguments = {"num_inference_steps": steps, "guidance_scale": _guidance(folder)}
            with _explained(f"The teacher {teacher.name} cannot be shown"):
                result = self._run(self._pipeline(InterpolantPipeline, teacher), labels, count, seed, **arguments)
            yield result

    def _pipeline(self, cls: type[DiffusionPipeline], folder: Path) -> DiffusionPipeline:
        key = (cls.__name__, str(folder))
        with self._lock:  # one load at a time, and nobody sees half of it
            if key not in self._pipelines:
                with _explained(f"{folder.name} cannot be loaded"):
                    check_declared(folder)
                    pipeline = cls.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
                if pipeline.image_channels:
                    raise VisitorError(
                        f"{folder.name} turns images into others, and this page has no place for images to start from: run "
                        "pipelines/generate.py --image, or the lines of its card."
                    )
                pipeline.set_progress_bar_config(disable=True)
                for component in pipeline.components.values():
                    for module in component.modules() if isinstance(component, torch.nn.Module) else ():
                        module.register_forward_pre_hook(self._check_time)
                self._pipelines[key] = pipeline
            self._pipelines.move_to_end(key)
            while len(self._pipelines) > KEPT:
                self._pipelines.popitem(last=False)
            return self._pipelines[key]

    def _check_time(self, module: torch.nn.Module, arguments: tuple) -> None:
        """Called before every part of a network: a request ends in the middle of a forward."""
        until = getattr(self._until, "seconds", None)  # of this thread, which is one visitor's
        if until is not None and time.monotonic() > until:
            raise VisitorError(f"That took longer than {MAX_SECONDS:g} seconds: ask for fewer images or fewer steps.")

    def _run(self, shared: DiffusionPipeline, labels: list[int], count: int, seed: int, **kwargs) -> Result:
        # Visitors share the network; the scheduler counts its steps, so each call has one of its own.
        scheduler = type(shared.scheduler).from_config(shared.scheduler.config)
        pipeline = type(shared).from_pipe(shared, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        if shared not in self._warm:  # what a first call sets up is not the first visitor's time
            self._until.seconds = time.monotonic() + MAX_SECONDS
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
        self._until.seconds = time.monotonic() + MAX_SECONDS
        try:
            images = sample_rows(pipeline, labels or None, count, seed, columns=4, **kwargs)
        finally:
            self._until.seconds = None
            hook.remove()
        seconds = time.perf_counter() - started
        number = sum(map(len, images))
        picture = image_grid(images, column_titles=class_names(pipeline, labels) if labels else None, min_cell=72)
        return Result(picture, number, seconds, rows / number)


def configured(path: Path) -> list[Choice]:
    """The students of space.json; there is at least one."""
    with _explained("The Space's settings cannot be used"):
        choices = [Choice(**entry) for entry in read_json(path, SPACE)["students"]]
    if not choices:
        raise VisitorError(f"{path} names no students: add one to its list `students`.")
    return choices


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever the files of somebody else make of our classes and diffusers' is a sentence; a full memory is not theirs."""
    try:
        yield
    except (VisitorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise VisitorError(f"{what}: {error}") from error


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
    try:
        scale = read_yaml(path).get("guidance_scale", 1.0) if path.is_file() else 1.0
    except InputError as error:
        raise VisitorError(str(error)) from error
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= 100:
        raise VisitorError(
            f"{folder.name} was distilled with the guidance {scale!r:.40}, which its teacher cannot be given."
        )
    return float(scale)


def check_declared(folder: Path) -> None:
    """
    Refuses networks that are too large by their configs: a file of a few bytes can ask for one that fills the machine.

    Raises:
        VisitorError: says what is too large.
    """
    try:
        index = read_json(folder / "model_index.json", {"id2label?": ({str: str}, None)})
        parts = [name for name in ("transformer", "vae") if isinstance(index.get(name), list) and any(index[name])]
        configs = {name: read_json(folder / name / "config.json", {"_class_name": str}) for name in parts}
    except InputError as error:
        raise VisitorError(str(error)) from error
    longest = max(map(len, (index.get("id2label") or {}).values()), default=0)
    if longest > MAX_NAME:
        raise VisitorError(
            f"{folder.name} has a class whose name has {longest:,} characters; {MAX_NAME:,} can be shown here."
        )
    parameters = 0
    for part, config in configs.items():
        for name, value in config.items():
            values = value if isinstance(value, list) else [value]
            blocks = "layers" in name or "blocks" in name
            largest = max((item for item in values if isinstance(item, (int, float))), default=0)
            if len(values) > 32 or not largest <= (MAX_BLOCKS if blocks else MAX_NUMBER):
                raise VisitorError(
                    f"{folder.name} declares {part}.{name} = {value!r:.60}, which is too large to be shown here."
                )
        size, patch = config.get("sample_size") or 0, config.get("patch_size")
        side = max(size) if isinstance(size, list) and size else size
        if part == "transformer" and (
            not isinstance(side, int)
            or side // (patch or 1) > MAX_POSITIONS
            or (patch and (side // patch) ** 2 > MAX_TOKENS)
        ):
            raise VisitorError(
                f"{folder.name} makes images of {side!r:.20} pixels on a side, which is too large to be shown here."
            )
        cls = getattr(models, config["_class_name"], None) or getattr(diffusers, config["_class_name"], None)
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            raise VisitorError(
                f"{folder.name} has a {part} of the class {config['_class_name']!r:.60}, which is not known here."
            )
        try:
            with torch.device("meta"):
                network = cls.from_config(config)
        except Exception as error:  # whatever a config of somebody else makes of our classes and diffusers'
            raise VisitorError(
                f"{folder.name} cannot be loaded: its {part} cannot be built ({error!s:.200})."
            ) from error
        parameters += sum(parameter.numel() for parameter in network.parameters())
    if parameters > MAX_PARAMETERS:
        raise VisitorError(
            f"{folder.name} declares networks of {parameters:,} values; {MAX_PARAMETERS:,} can be shown here."
        )


def _fetch(name: str, revision: str | None, folder: Path | None = None) -> Path:
    """A repository's weights and configs, in a folder or in the Hub's cache. Its Python files stay where they are: this
    package's classes are used.
    """
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = list(filter_repo_objects(info.siblings or (), allow_patterns=FILES, key=lambda file: file.rfilename))
        size = sum(MAX_BYTES if file.size is None else file.size for file in files)
        texts = [file for file in files if not file.rfilename.endswith(".safetensors")]
        if size > MAX_BYTES or len(files) > MAX_FILES or any((file.size or 0) > MAX_TEXT_BYTES for file in texts):
            raise VisitorError(
                f"{name} has {len(files)} files of {size / 1024**3:.1f} GiB; up to {MAX_FILES} files of "
                f"{MAX_BYTES // 1024**3} GiB can be shown here, and configs of {MAX_TEXT_BYTES // 1024**2} MiB."
            )
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=FILES, local_dir=folder))
    except (HTTPError, OSError, HFValidationError) as error:
        raise VisitorError(f"{name} cannot be read from the Hub: check the name, and that it is public.") from error
