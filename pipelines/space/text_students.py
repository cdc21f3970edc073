"""A text-to-image student for the Space: loaded once, sampled by one visitor at a time, with requests checked."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from si_distill.errors import InputError
from si_distill.reading import read_json
from si_distill.text_to_image.student import load_student

MAX_IMAGES, MAX_PROMPT, MAX_SEED = 4, 1000, 2**31 - 1
#: What space.json holds (see `read_json`).
SPACE = {"students": [{"student": str, "revision?": (str, None), "teacher?": (str, None)}]}


class VisitorError(ValueError):
    """What a visitor asked for cannot be done; the text says why."""


@dataclass
class Result:
    """
    Args:
        images: of the prompt.
        seconds: of sampling, texts and decoding included.
        steps: evaluations of the network for each image.
    """

    images: list[Image.Image]
    seconds: float
    steps: int


class TextStudent:
    """
    A student in memory.

    Args:
        name: a folder of this machine, or a repository of the Hub.
        revision: a commit of that repository; None takes the newest.
        base: where its stock pipeline is, if not where it was trained.

    Raises:
        InputError: when it cannot be loaded.
    """

    def __init__(self, name: str, revision: str | None = None, base: str | None = None):
        gpu = torch.cuda.is_available()
        self.name = Path(name).name if Path(name).is_dir() else name
        self.loaded = load_student(name, torch.bfloat16 if gpu else torch.float32, base, revision)
        self.loaded.pipeline.set_progress_bar_config(disable=True)
        self.loaded.pipeline.to("cuda" if gpu else "cpu")
        self._lock = threading.Lock()  # the pipeline's scheduler counts the steps of one call

    @property
    def steps(self) -> list[int]:
        return self.loaded.trained_steps

    def draw(self, prompt: str, count: float, seed: float, steps: float) -> Result:
        """Images of a prompt, image n from seed + n.

        Raises:
            VisitorError: for a request that is not allowed.
        """
        prompt, count, seed, steps = self._checked(prompt, count, seed, steps)
        generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
        with self._lock:
            started = time.perf_counter()
            images = self.loaded.images([prompt] * count, steps, generators)
        return Result(images, time.perf_counter() - started, steps)

    def _checked(self, prompt: str, count: float, seed: float, steps: float) -> tuple[str, int, int, int]:
        """The request as numbers within the limits, whoever sends it."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise VisitorError("Write what the image shows.")
        if len(prompt) > MAX_PROMPT:
            raise VisitorError(f"The prompt has {len(prompt):,} characters; at most {MAX_PROMPT:,} are read here.")
        whole = []
        for what, value, low, high in (("number of images", count, 1, MAX_IMAGES), ("seed", seed, 0, MAX_SEED)):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not low <= value <= high
                or value != int(value)
            ):
                raise VisitorError(f"The {what} must be a whole number from {low} to {high:,}.")
            whole.append(int(value))
        if isinstance(steps, bool) or steps not in self.steps:
            raise VisitorError(f"This student draws in {' or '.join(map(str, self.steps))} steps.")
        return prompt.strip(), *whole, int(steps)


def configured(path: Path) -> TextStudent:
    """The student of space.json."""
    students = read_json(path, SPACE)["students"]
    if not students:
        raise InputError(f"{path} names no students: add one to its list `students`.")
    return TextStudent(students[0]["student"], students[0].get("revision"))
