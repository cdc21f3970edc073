"""Evaluation of text-to-image students, their stock teachers, and finished images, all of the same prompts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..errors import InputError
from ..sample_noise import sample_seed
from ..text_to_image.conventions import CONVENTIONS
from ..text_to_image.prompts import count_tokens
from ..text_to_image.stock_calls import teacher_images
from ..text_to_image.student import LoadedStudent, load_student
from ..text_to_image.teacher import TextToImageTeacher, load_stock_pipeline
from ..text_to_image.texts import without_warnings
from .config import EvaluationConfig
from .features import load_extractor
from .generators import Generator, run_facts
from .metrics import METRICS, choices
from .pictures import COLUMNS_OF_PICTURES
from .prepared import Evaluation
from .prompts import Prompts, captioned_images, has_images, load_prompts, no_real_images
from .samples import Batch, FileSource, counted_rows, identity_of

#: `draw(prompts, generators=…)` gives an image for each prompt.
Draw = Callable[..., list[Image.Image]]


@dataclass(eq=False)
class TextPipeline:
    """
    A stock pipeline on its way to the device: of several only the one that draws is there.

    Args:
        role: `student` or `teacher`.
        name: the folder or Hub id.
        pipeline: loaded.
        size: height and width of its images.
    """

    role: str
    name: str
    pipeline: DiffusionPipeline
    size: tuple[int, int]

    @property
    def network(self) -> torch.nn.Module:
        return getattr(self.pipeline, CONVENTIONS[type(self.pipeline).__name__].network)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.pipeline)

    @property
    def facts(self) -> dict[str, Any]:
        """What rows say of it."""
        return {
            "pipeline": self.name,
            "class": type(self.pipeline).__name__,
            "solver": type(self.pipeline.scheduler).__name__,
            "height": self.size[0],
            "width": self.size[1],
            "weights": self.identity["weights"],
            **run_facts(self.name, self.network),
        }


@dataclass(eq=False)
class TextSource:
    """Images of prompts: image i depends on its prompt and (seed, i mod per_prompt, number of the prompt) alone.

    Args:
        pipeline: that draws.
        others: pipelines that leave the device for it.
        draw: from prompts and a generator of random numbers for each.
        prompts: of all images.
        seed: of the noise.
        device: of the pipeline.
        settings: of the sampler, for the identity.
    """

    pipeline: TextPipeline
    others: list[TextPipeline]
    draw: Draw
    prompts: Prompts
    seed: int
    device: torch.device
    settings: dict[str, Any]
    labels: None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            **self.pipeline.identity,
            "sampler": self.settings,
            "size": list(self.pipeline.size),
            "seed": self.seed,
            "dtype": str(self.pipeline.network.dtype),
        }

    def read(self, indices: Sequence[int]) -> Batch:
        for other in self.others:
            other.pipeline.to("cpu")
        self.pipeline.pipeline.to(self.device)
        each = self.prompts.per_prompt
        seeds = [sample_seed(self.seed, "evaluation", i % each, i // each) for i in indices]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.perf_counter()
        with counted_rows(self.pipeline.network) as rows, without_warnings(self.pipeline.pipeline):
            images = self.draw(self.prompts.of(indices), generators=generators)
        seconds = time.perf_counter() - started
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return Batch(torch.from_numpy(arrays).permute(0, 3, 1, 2), None, sum(rows), seconds)


class TextEvaluation(Evaluation):
    """What is compared with what, of images of prompts.

    Real images, and with them Fréchet distance, KID, precision and recall, are those of captioned `data`, or the statistics
    `reference`; there may be none.
    """

    def _load(self) -> None:
        s, state = self.settings, self.state
        self.class_names, self.classifier, self.inputs, self.channels = [], None, None, 3
        _check_settings(s)
        with state.main_process_first():  # a download is made once
            self.extractor = load_extractor(s.features, s.feature_weights, state.device)
            self.prompts = load_prompts(s.prompts_file, s.data, s.images_per_prompt, s.num_samples)
            self.count = len(self.prompts)
            compared = not s.prompts_file and has_images(s.data)
            self._check_metrics(compared)
            self.scorers = {
                metric.name: metric.scorer(s, state.device)
                for metric in METRICS.values()
                if metric.scorer and metric.asked_by in (None, *s.metrics)
            }
            self.generators = self._generators()
        for generator in self.generators:  # what a pipeline refuses is said now, not after the rows before it
            try:
                generator.source.read([0])
            except ValueError as error:
                raise InputError(f"The row `{generator.name}` cannot be made: {error}") from error
        self.files = FileSource(s.images, 3) if s.images else None
        if self.files:
            if len(self.files) != self.count:
                raise InputError(
                    f"{s.images} holds {len(self.files)} images, and {self.count} are those of {len(self.prompts.texts)} "
                    f"prompts with {s.images_per_prompt} each (`images_per_prompt`, `num_samples`), in their order."
                )
            self.generators.append(Generator("images", "images", self.files, {"images": s.images}))
        sizes = {g.source.pipeline.size for g in self.generators if isinstance(g.source, TextSource)}
        sizes |= {(self.files.height, self.files.width)} if self.files else set()
        if len(sizes) > 1:
            raise InputError(
                "What is to be compared makes images of different sizes, "
                f"{' and '.join(f'{width}×{height}' for height, width in sorted(sizes))}: set `height` and `width`."
            )
        ((height, width),) = sizes
        self.shape = (3, height, width)
        self.real = captioned_images(s.data, (height, width)) if compared and not s.reference else None
        self.data = self.real and self.real.data
        self.reference = self._load_reference() if self.real or s.reference else None

    def _check_metrics(self, compared: bool) -> None:
        """Refuses metrics of real images without any, unless nobody asked for them."""
        s = self.settings
        if compared or s.reference or s.metrics == list(choices()):
            return
        asked = [metric.asked_by for metric in METRICS.values() if metric.of_real and metric.asked_by in s.metrics]
        if asked:
            raise no_real_images(f"`metrics` holds {asked[0]}")

    def _generators(self) -> list[Generator]:
        s, dtype, pipelines = self.settings, getattr(torch, self.settings.dtype), []
        given = None if s.height is None else (s.height, s.width)
        student = load_student(s.pipeline, dtype) if s.pipeline else None
        if student:
            size = given or (student.record["height"], student.record["width"])
            pipelines.append(TextPipeline("student", s.pipeline, student.pipeline, size))
        if s.teacher:
            teacher = load_stock_pipeline(s.teacher, dtype)
            size = given or (pipelines[0].size if pipelines else TextToImageTeacher(teacher).size)
            pipelines.append(TextPipeline("teacher", s.teacher, teacher, size))
        rows = []
        for pipeline in reversed(pipelines):
            TextToImageTeacher(pipeline.pipeline, pipeline.size)  # refuses a size that it does not make
            most = student.record["max_sequence_length"] if pipeline.role == "student" else None
            count_tokens(self.prompts.texts, most, pipeline.pipeline)  # says how many are cut
            draws = _student_draws(student) if pipeline.role == "student" else _teacher_draws(pipeline.pipeline, s)
            height, width = pipeline.size
            for steps, (settings, draw) in draws.items():
                sized = partial(draw, height=height, width=width)
                others = [other for other in pipelines if other is not pipeline]
                source = TextSource(pipeline, others, sized, self.prompts, s.seed, self.state.device, settings)
                name = f"{pipeline.role}, {steps} step{'s' if steps > 1 else ''}"
                rows.append(Generator(name, pipeline.role, source, {**pipeline.facts, **settings}))
        return rows

    def how(self) -> dict[str, Any]:
        return {
            **super().how(),
            "class_balance": None,
            "prompts": self.prompts.identity,
            "scorers": {name: scorer.identity for name, scorer in self.scorers.items()},
        }

    def _shown(self) -> tuple[list[int], list[str]]:
        chosen = [i * self.prompts.per_prompt for i in range(min(len(self.prompts.texts), COLUMNS_OF_PICTURES))]
        return chosen, self.prompts.of(chosen)

    def _shown_real(self, chosen: list[int]) -> list[tuple[str, torch.Tensor]]:
        places = [i // self.prompts.per_prompt for i in chosen]
        return [("real", self.real.read(places).images)] if self.real else []


def _check_settings(settings: EvaluationConfig) -> None:
    for name, wanted in (("solver", []), ("solver_kwargs", {}), ("guidance_interval", [0.0, 1.0])):
        if getattr(settings, name) != wanted:
            raise InputError(
                f"`{name}` is set, but text-to-image pipelines are called as they are, with their own scheduler: leave it "
                "out."
            )


def _student_draws(student: LoadedStudent) -> dict[int, tuple[dict[str, Any], Draw]]:
    """By number of steps: settings of the sampler, and the call."""
    return {n: (student.arguments(n), partial(student.images, steps=n)) for n in student.trained_steps}


def _teacher_draws(pipeline: DiffusionPipeline, settings: EvaluationConfig) -> dict[int, tuple[dict[str, Any], Draw]]:
    """By number of steps: settings of the sampler, and the call; with the pipeline's own scheduler and defaults."""
    scale = settings.guidance_scale
    said = "the pipeline's own" if scale is None else scale
    return {
        steps: (
            {"num_inference_steps": steps, "guidance_scale": said},
            partial(teacher_images, pipeline, steps=steps, guidance_scale=scale),
        )
        for steps in settings.teacher_steps
    }
