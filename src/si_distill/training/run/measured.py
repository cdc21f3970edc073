"""What of a run is measured while it trains: the images of its pipeline as it is now, of classes or of prompts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from ...data import load_images
from ...data.latents.format import images_of
from ...evaluation.config import MEASURED, MEASURED_IMAGES
from ...evaluation.generators import Pipeline, balanced_labels, check_images, image_shape, inputs_of
from ...evaluation.metrics import METRICS
from ...evaluation.prompts import Prompts, captioned_images, has_images, load_prompts
from ...evaluation.samples import DatasetSource, PipelineSource, Source
from ...evaluation.text import Draw, TextPipeline, TextSource
from ...pipelines import OneStepInterpolantPipeline
from ...settings import settings_to_dict
from ...text_to_image.texts import encoders
from ..config import TrainingConfig


class Measured(Protocol):
    """The images of a run's pipeline.

    Attributes:
        real: the images to compare with, where there are any.
        shape: (C, H, W) of the generated ones.
        count: how many are generated.
        prompts: theirs; None of images without prompts.
        identity: plain values; what figures must share to be compared, besides the number of images.
    """

    real: DatasetSource | None
    shape: tuple[int, int, int]
    count: int
    prompts: Prompts | None
    identity: dict[str, Any]

    def drawing(self) -> AbstractContextManager[Source]:
        """The images of the pipeline as it is now, which are those of `training/evaluate.py`."""
        ...


class ClassImages:
    """A `Measured` of classes, or of none.

    Args:
        settings: of the run.
        pipeline: gives the run's pipeline as it is now.

    Raises:
        InputError: when `data` cannot be read, or its images are not of the kind that the pipeline makes.
    """

    prompts = None

    def __init__(self, settings: TrainingConfig, pipeline: Callable[[], Pipeline]):
        how, now = settings.evaluation, pipeline()
        self.settings, self.pipeline, self.shape = settings, pipeline, image_shape(now)
        # A student takes its own steps, whatever the settings say.
        own = isinstance(now, OneStepInterpolantPipeline)
        self.sampler = {} if own else {"num_inference_steps": how.num_inference_steps}
        self.identity: dict[str, Any] = self.sampler
        images = images_of(settings.data)  # pictures are compared with pictures, not with latents
        # A stream has no index: only a reference can stand for it.
        data = None if images.streaming and how.reference else load_images(images)
        if data is not None:
            check_images(now, data, "run's pipeline")
        self.real = data and DatasetSource(data, settings_to_dict(images))
        self.count = how.num_samples or MEASURED_IMAGES
        classes = now.network.num_classes
        self.labels = balanced_labels(self.count, classes, data and data.labels) if classes else None
        self.inputs = inputs_of(now, data, settings.data, self.count, settings.seed)

    @contextmanager
    def drawing(self) -> Iterator[Source]:
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        call = partial(pipeline, output_type="pt", **self.sampler)
        yield PipelineSource(pipeline, call, self.labels, self.settings.seed, self.count, inputs=self.inputs)


class PromptImages:
    """A `Measured` of prompts: those of `evaluation.prompts_file`, or of `data`, whose images are then the real ones.

    Args:
        settings: of the run.
        device: where images are made; the text encoders are there meanwhile.
        size: height and width of the images.
        drawn: gives a stock pipeline that is the run's as it is now, for as long as the context is open, and its call.
        sampler: plain values that say how it is called.

    Raises:
        InputError: when prompts or images cannot be read, or the images have another size.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        device: torch.device,
        size: tuple[int, int],
        drawn: Callable[[], AbstractContextManager[tuple[DiffusionPipeline, Draw]]],
        **sampler: Any,
    ):
        how, data = settings.evaluation, images_of(settings.data)
        self.settings, self.device, self.size, self.drawn, self.sampler = settings, device, size, drawn, sampler
        self.shape = (3, *size)
        self.prompts = load_prompts(
            how.prompts_file, data, how.images_per_prompt, how.num_samples, most=MEASURED_IMAGES
        )
        self.count = len(self.prompts)
        self.identity = {"prompts": self.prompts.identity, **sampler}
        compared = METRICS[MEASURED[settings.metric_for_best_model]].of_real and not how.reference
        pictured = compared and not how.prompts_file and has_images(data)
        self.real = captioned_images(data, size) if pictured else None

    @contextmanager
    def drawing(self) -> Iterator[Source]:
        with self.drawn() as (pipeline, draw):
            homes = {part: part.device for part in encoders(pipeline).values()}
            height, width = self.size
            of_run = TextPipeline("student", self.settings.output_dir, pipeline, self.size)
            sized = partial(draw, height=height, width=width)
            try:
                yield TextSource(of_run, [], sized, self.prompts, self.settings.seed, self.device, self.sampler)
            finally:
                for part, home in homes.items():
                    part.to(home)
