"""The best pipeline of a run by a metric, measured while it trains and kept in `best/`."""

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from PIL import Image

from ... import fingerprints
from ...data import load_images
from ...data.latents.format import images_of
from ...errors import InputError
from ...evaluation.config import EVALUATION
from ...evaluation.features import load_extractor
from ...evaluation.formulas import Moments, frechet_from_moments, kernel_distance
from ...evaluation.generators import Pipeline, balanced_labels, check_images, image_shape, inputs_of
from ...evaluation.reference import check_reference, data_reference, read_reference
from ...evaluation.samples import DatasetSource, PipelineSource
from ...files import delete
from ...pipelines import OneStepInterpolantPipeline
from ...settings import settings_to_dict
from ..config import BEST, EVALUATIONS, TrainingConfig
from .folder import keep_lines


class BestModel:
    """Measures the run's pipeline every `eval_metric_steps` and keeps the best one in `best/`, with its figure.

    Images are those of `training/evaluate.py` with the same seed: image i depends on (seed, i) alone. Each measurement is
    a line of `evaluations.jsonl`. The random state of the training is left as it was.

    Args:
        settings: of the run.
        accelerator: of the run; measuring is collective.
        pipeline: gives the run's pipeline as it is now.

    Raises:
        InputError: when the features or the reference cannot be had, or do not fit the pipeline.
    """

    def __init__(self, settings: TrainingConfig, accelerator: Accelerator, pipeline: Callable[[], Pipeline]):
        self.settings, self.accelerator, self.pipeline = settings, accelerator, pipeline
        self.folder = Path(settings.output_dir) / BEST
        self.log = Path(settings.output_dir) / EVALUATIONS
        how = settings.evaluation
        with preserved_random_state(
            accelerator.device
        ):  # networks of features are initialised before their weights are loaded
            with accelerator.main_process_first():
                self.extractor = load_extractor(how.features, how.feature_weights, accelerator.device)
                images = images_of(settings.data)  # pictures are compared with pictures, not with latents
                # A stream has no index: only a reference can stand for it.
                data = None if images.streaming and how.reference else load_images(images)
            now = pipeline()
            real = None
            if data is not None:
                check_images(now, data, "run's pipeline")
                real = DatasetSource(data, settings_to_dict(images))
            if how.reference:
                self.reference = read_reference(Path(how.reference), self.extractor.name)
                channels, size, _ = image_shape(now)
                check_reference(self.reference, how.reference, self.extractor, channels, size, real)
            else:
                cache = Path(how.cache_dir).expanduser()
                self.reference = data_reference(real, self.extractor, cache, PartialState(), how.batch_size)
        if settings.metric_for_best_model == "kid" and self.reference.features is None:
            raise InputError(
                f"`metric_for_best_model` is kid, which needs features of real images, but `evaluation.reference` "
                f"{how.reference} has mean and covariance only: take frechet_distance, or leave the reference out."
            )
        classes = now.network.num_classes
        self.count = how.num_samples
        self.labels = balanced_labels(self.count, classes, data and data.labels) if classes else None
        self.inputs = inputs_of(now, data, settings.data, self.count, settings.seed)
        self.best = math.inf

    def resume(self, step: int) -> None:
        """Takes up the measurements of a run that goes on after `step`."""
        if self.accelerator.is_main_process:
            old = self.folder.with_name(f".{BEST}.old")
            if old.exists() and not self.folder.exists():  # killed between the two renames of `_replace`
                os.rename(old, self.folder)
            # Not the figure in best/: it may be of a later step, which is about to be measured again. A figure of other
            # features, samples or metric does not compare.
            how, metric = fingerprints.of_values(self.how), self.settings.metric_for_best_model
            lines = keep_lines(self.log, step, self.settings.run_id)
            figures = [line.get(metric, math.inf) for line in lines if line.get("how") == how]
            if (self.folder / EVALUATION).exists():
                self.best = min(filter(math.isfinite, figures), default=math.inf)

    @property
    def how(self) -> dict[str, Any]:
        """What two figures must share to be compared."""
        return {
            "metric_for_best_model": self.settings.metric_for_best_model,
            **self.extractor.identity,
            "reference": self.reference.name,
            "reference_images": self.reference.count,
            "num_samples": self.count,
            "seed": self.settings.seed,
        }

    def measure(self) -> dict[str, float]:
        """Figures of the pipeline as it is now, on the main process; elsewhere nothing. Collective."""
        with preserved_random_state(self.accelerator.device), torch.no_grad(), self.accelerator.autocast():
            features = self._features()
            if not self.accelerator.is_main_process:
                return {}
            distance = frechet_from_moments(*Moments.of(features).pair, *self.reference.moments)
            figures = {"frechet_distance": distance}
            if self.settings.metric_for_best_model == "kid":
                real = self.reference.features.float()
                figures["kid"] = kernel_distance(features.cpu().float(), real, self.settings.evaluation.kid_subsets)[0]
        return figures

    def improves(self, figures: dict[str, float]) -> bool:
        """Whether figures from `measure` are the best so far; False where there are none."""
        return bool(figures) and figures[self.settings.metric_for_best_model] < self.best

    def keep(self, step: int, figures: dict[str, float], pipeline: Pipeline, picture: Image.Image) -> None:
        """Puts the pipeline in `best/` with its figures and a sample grid; main process only."""
        self.best = figures[self.settings.metric_for_best_model]
        self._replace({"step": step, **figures, "how": self.how}, pipeline, picture)

    def note(self, step: int, figures: dict[str, float], better: bool) -> None:
        """Adds a line to `evaluations.jsonl`; main process only."""
        with open(self.log, "a", encoding="utf-8") as file:
            identity = {"run": self.settings.run_id, "how": fingerprints.of_values(self.how)}
            file.write(json.dumps({"step": step, **figures, "best": better, **identity}) + "\n")

    def _features(self) -> torch.Tensor:
        """Features (N, D) of all ranks' images in their order; each rank runs the same number of forwards."""
        settings, accelerator = self.settings, self.accelerator
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        steps = settings.evaluation.num_inference_steps
        sampler = {} if isinstance(pipeline, OneStepInterpolantPipeline) else {"num_inference_steps": steps}
        call = partial(pipeline, output_type="pt", **sampler)
        source = PipelineSource(pipeline, call, self.labels, settings.seed, self.count, inputs=self.inputs)
        ranks, rank = accelerator.num_processes, accelerator.process_index
        size = min(settings.evaluation.batch_size, -(-self.count // ranks))
        found = []
        for start in range(0, self.count, size * ranks):
            first = start + rank * size
            indices = [min(i, self.count - 1) for i in range(first, first + size)]  # the rest is cut off below
            features, _ = self.extractor(source.read(indices).images)
            found.append(accelerator.gather(features.to(accelerator.device)))
        return torch.cat(found)[: self.count]

    def _replace(self, result: dict[str, Any], pipeline: Pipeline, picture: Image.Image) -> None:
        """Replaces `best/`; a kill at any moment leaves the earlier or the new one."""
        staging, old = (self.folder.with_name(f".{BEST}.{suffix}") for suffix in ("tmp", "old"))
        for leftover in (staging, old):
            delete(leftover)
        pipeline.save_pretrained(staging)
        picture.save(staging / "samples.png")
        (staging / EVALUATION).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if self.folder.exists():
            os.rename(self.folder, old)
        os.rename(staging, self.folder)
        delete(old)


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Puts back the random states of Python, NumPy and torch (of the CPU and this device) afterwards."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
