"""Distillation of stock text-to-image pipelines: prompts instead of classes, and adapters instead of copies."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ...data import TrainingData
from ...data.batches import Batch
from ...errors import InputError
from ...pipelines import Condition
from ...text_to_image.prompts import load_texts
from ...text_to_image.student import TextToImageStudent
from ...text_to_image.teacher import TextToImageTeacher, load_stock_pipeline, warn_of_distilled
from ...text_to_image.text_cache import is_text_cache
from ...visualization import tensor_to_pil
from ..captioned import base_dtype, describe_captioned, idle_encoders, load_captioned_images
from ..parallel.sharding import plain_class
from ..run.facts import describe_network, describe_teacher
from ..texts_state import TextsState
from .draws import MicroBatch
from .text_health import image_means
from .trainer import DistillationTrainer

if TYPE_CHECKING:
    from ...evaluation.text import Draw
    from ..run.measured import PromptImages


class TextDistillationTrainer(TextsState, DistillationTrainer):
    """
    The game with a stock text-to-image pipeline as the teacher.

    A label is the number of a prompt, and the number after the last one is the empty prompt's. With `lora_rank` student,
    critic and averages are adapters on the teacher's own network, which is in memory once.
    """

    teacher_pipeline: TextToImageTeacher
    grid_columns = 6

    def setup(self) -> None:
        self._watched: dict[str, torch.Tensor] = {}
        super().setup()
        self.pipeline()  # refuses steps that no stock call takes

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        metrics, finite = super().iteration()
        return metrics | self._watched, finite

    def _load_teacher(self) -> TextToImageTeacher:
        settings, text = self.settings, self.settings.text
        refused = {
            "student": settings.student is not None,
            "critic_start": settings.critic_start == "random",
            "student_guidance_scale": settings.student_guidance_scale != 1,  # no stock call would guide it
        }
        for name in (name for name, given in refused.items() if given):
            raise InputError(
                f"`{name}` is {getattr(settings, name)!r}, which is for teachers of classes alone: leave it out."
            )
        dtype, left_out = base_dtype(settings), idle_encoders(settings)
        pipeline = load_stock_pipeline(settings.teacher, dtype, **left_out)
        scales = (settings.guidance_scale, settings.critic_guidance_scale, settings.critic_training_guidance_scale)
        warn_of_distilled(settings.teacher, pipeline, scales)
        teacher = TextToImageTeacher(pipeline, text.size, settings.lora_rank, tuple(settings.lora_targets))
        self.guidance_rescale = teacher.convention.rescale
        self.texts = load_texts(settings.data, text, pipeline, self.accelerator.device)
        teacher.transformer.null = self.texts.null
        return teacher

    def _load_images(self) -> TrainingData:
        """Images whose labels are the numbers of their captions."""
        settings = self.settings
        if settings.data.caption_column is None or is_text_cache(settings.data.name):
            raise InputError(
                f"The objective {settings.objective!r} uses real images, which need captions: give a data set of both with "
                "`data.caption_column`, or choose an objective of prompts alone, e.g. sid."
            )
        data = load_captioned_images(settings.data, self.teacher_pipeline.size, self.readers)
        self.texts = self.texts.renumbered(data.class_names)
        return data

    def next_batch(self, data: TrainingData, micro_batch: int, *draw: int) -> Batch:
        batch = super().next_batch(data, micro_batch, *draw)
        return batch | {"images": self.teacher_pipeline.encode(batch["images"])}

    @property
    def num_classes(self) -> int:
        return len(self.texts)

    @property
    def null_label(self) -> int:
        return len(self.texts)

    def _condition(self, labels: torch.Tensor | None, image: torch.Tensor | None = None) -> Condition:
        return Condition() if labels is None else self.texts.condition(labels)

    def pipeline(self, network: nn.Module | None = None) -> TextToImageStudent:
        settings, network = self.settings, self.averages.network if network is None else network
        scheduler = type(self.start.scheduler).from_config(self.start.scheduler.config)
        return TextToImageStudent(self.teacher_pipeline, network, scheduler, settings.teacher, settings.text)

    def measured(self) -> "PromptImages":
        from ..run.measured import PromptImages

        return PromptImages(self.settings, self.accelerator.device, self.teacher_pipeline.size, self._drawn)

    @contextmanager
    def _drawn(self) -> "Iterator[tuple[DiffusionPipeline, Draw]]":
        """The student as a stock pipeline, and its call with the largest number of steps."""
        with self.pipeline().loaded() as student:
            yield student.pipeline, student.images

    def facts(self) -> dict[str, Any]:
        network = self.averages.network
        return {
            "network": {**describe_network(network), "class": plain_class(network.base).__name__},
            "teacher": describe_teacher(self.settings.teacher, self.teacher_pipeline),
            "data": describe_captioned(self.settings.data, self.data, self.teacher_pipeline.size),
            "objective_space": self.objective.space,
        }

    def sample_grid(self) -> Image.Image:
        picture, count = super().sample_grid(), self.grid_columns
        # Two images of each prompt of the grid, from further noise.
        labels = torch.arange(count, device=self.accelerator.device).repeat_interleave(2) % len(self.texts)
        indices, level = range(2 * count), self.levels.all[-1]
        noise = self.noise.normal(self.sample_shape, "samples", 2, indices=indices)
        batch = MicroBatch(noise, labels, {}, indices, level, (-1, -1, 1))
        means = image_means(self.teacher_pipeline.decode(self._generate(self.averages.network, batch)), 2)
        self._watched = {name: torch.tensor(value) for name, value in means.items()}
        return picture

    def _names(self, labels: list[int]) -> list[str]:
        return [self.texts.prompts[label] for label in labels]

    def _pictures(self, rows: list[torch.Tensor]) -> list[list[Image.Image]]:
        return [tensor_to_pil(self.teacher_pipeline.decode(row).clamp(-1, 1)) for row in rows]
