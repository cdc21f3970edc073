"""The best pipeline of a run by a metric, measured while it trains and kept in `best/`."""

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from ... import fingerprints
from ...errors import InputError
from ...evaluation.config import EVALUATION, MEASURED
from ...evaluation.features import load_extractor
from ...evaluation.metrics import METRICS, Comparison
from ...evaluation.prompts import no_real_images
from ...evaluation.reference import Reference, check_reference, data_reference, read_reference
from ...files import delete
from ...reading import read_json
from ..config import BEST, EVALUATIONS, TrainingConfig
from .folder import keep_lines
from .measured import Measured


class BestModel:
    """Measures the run's pipeline every `eval_metric_steps` and keeps the best one in `best/`, with its figure.

    Images are those of `training/evaluate.py` with the same seed: image i depends on (seed, i) alone. Each measurement is
    a line of `evaluations.jsonl`. The random state of the training is left as it was.

    Args:
        settings: of the run.
        accelerator: of the run; measuring is collective.
        measured: gives the images of the run's pipeline.

    Raises:
        InputError: when the features, a scorer or the reference cannot be had, or do not fit the pipeline.
    """

    def __init__(self, settings: TrainingConfig, accelerator: Accelerator, measured: Callable[[], Measured]):
        self.settings, self.accelerator = settings, accelerator
        self.metric = settings.metric_for_best_model
        self.folder = Path(settings.output_dir) / BEST
        self.log = Path(settings.output_dir) / EVALUATIONS
        how, metric, device = settings.evaluation, METRICS[MEASURED[self.metric]], accelerator.device
        compares = metric.of_real or bool(how.reference)
        #: The metrics by their names in lines and settings.
        self.metrics = {
            **({"frechet_distance": METRICS[MEASURED["frechet_distance"]]} if compares else {}),
            self.metric: metric,
        }
        with preserved_random_state(device):  # networks of features are initialised before their weights are loaded
            with accelerator.main_process_first():
                self.extractor = load_extractor(how.features, how.feature_weights, device) if compares else None
                self.scorers = {metric.name: metric.scorer(how, device)} if metric.scorer else {}
                self.measured = measured()
                if metric.of_real and self.measured.count < 2:
                    raise InputError(
                        f"`metric_for_best_model` is {self.metric}, which compares distributions, and 1 image is generated: "
                        "give more prompts, or a larger `evaluation.images_per_prompt`."
                    )
            self.reference = self._load_reference() if self.extractor else None
            with torch.no_grad(), accelerator.autocast(), self.measured.drawing() as source:
                try:
                    source.read([0])  # what a pipeline refuses is said now, not after many iterations
                except ValueError as error:
                    raise InputError(f"The run's pipeline cannot make the images that are measured: {error}") from error
        self.best: float | None = None

    def _load_reference(self) -> Reference:
        how, measured = self.settings.evaluation, self.measured
        if not how.reference:
            if measured.real is None:
                raise no_real_images(f"`metric_for_best_model` is {self.metric}", "evaluation.")
            cache = Path(how.cache_dir).expanduser()
            return data_reference(measured.real, self.extractor, cache, PartialState(), how.batch_size)
        reference = read_reference(Path(how.reference), self.extractor.name)
        channels, height, width = measured.shape
        check_reference(reference, how.reference, self.extractor, channels, width, measured.real, height)
        if self.metric == "kid" and reference.features is None:
            raise InputError(
                f"`metric_for_best_model` is kid, which needs features of real images, but `evaluation.reference` "
                f"{how.reference} has mean and covariance only: take frechet_distance, or leave the reference out."
            )
        return reference

    def resume(self, step: int) -> None:
        """Takes up the measurements of a run that goes on after `step`."""
        if self.accelerator.is_main_process:
            old = self.folder.with_name(f".{BEST}.old")
            if old.exists() and not self.folder.exists():  # killed between the two renames of `_replace`
                os.rename(old, self.folder)
            # Not the figure in best/: it may be of a later step, which is about to be measured again. A figure of other
            # features, samples or metric does not compare, and a pipeline that was chosen by it is the next to be replaced.
            how = fingerprints.of_values(self.how)
            lines = keep_lines(self.log, step, self.settings.run_id)
            if self._kept_by(lines) == how:
                for line in lines:
                    if line.get("how") == how and self.improves(line):
                        self.best = line[self.metric]

    def _kept_by(self, lines: list[dict[str, Any]]) -> str | None:
        """The hash of `how` of the figure that best/ was chosen by, or None without one; `lines` are the measurements."""
        if not (self.folder / EVALUATION).exists():
            return None
        try:
            return fingerprints.of_values(read_json(self.folder / EVALUATION, {"step": int, "how": dict})["how"])
        except InputError:  # evaluate.py has put its own results there
            return next((line.get("how") for line in reversed(lines) if line.get("best")), None)

    @property
    def how(self) -> dict[str, Any]:
        """What two figures must share to be compared."""
        reference = self.reference
        return {
            "metric_for_best_model": self.metric,
            **(self.extractor.identity if self.extractor else {}),
            **({"reference": reference.name, "reference_images": reference.count} if reference else {}),
            **({"scorers": {name: scorer.identity for name, scorer in self.scorers.items()}} if self.scorers else {}),
            **self.measured.identity,
            "num_samples": self.measured.count,
            "seed": self.settings.seed,
        }

    def measure(self) -> dict[str, float | None]:
        """Figures of the pipeline as it is now, on the main process, None where one is not finite; elsewhere nothing.
        Collective.
        """
        with preserved_random_state(self.accelerator.device), torch.no_grad():
            found, reference = self._look(), self.reference
            if not self.accelerator.is_main_process:
                return {}
            features = found.pop("features", torch.empty(self.measured.count, 0))
            comparison = Comparison(
                features,
                reference and reference.features,
                reference and reference.moments,
                self.settings.evaluation.kid_subsets,
                compared={name: values.numpy() for name, values in found.items()},
            )
            return {name: metric.figure(comparison)[0] for name, metric in self.metrics.items()}

    def improves(self, figures: dict[str, Any]) -> bool:
        """Whether figures from `measure`, or of a line of them, are the best so far; False where there are none."""
        value = figures.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        return self.best is None or (
            value < self.best if self.metrics[self.metric].lower_is_better else value > self.best
        )

    def keep(
        self, step: int, figures: dict[str, float | None], pipeline: DiffusionPipeline, picture: Image.Image
    ) -> None:
        """Puts the pipeline in `best/` with its figures and a sample grid; main process only."""
        self.best = figures[self.metric]
        self._replace({"step": step, **figures, "how": self.how}, pipeline, picture)

    def note(self, step: int, figures: dict[str, float | None], better: bool) -> None:
        """Adds a line to `evaluations.jsonl`; main process only."""
        with open(self.log, "a", encoding="utf-8") as file:
            identity = {"run": self.settings.run_id, "how": fingerprints.of_values(self.how)}
            file.write(json.dumps({"step": step, **figures, "best": better, **identity}) + "\n")

    def _look(self) -> dict[str, torch.Tensor]:
        """`features` (N, D) and figures (N,) of scorers, on the CPU, of all ranks' images in their order; each rank runs the
        same number of forwards.
        """
        measured, accelerator = self.measured, self.accelerator
        ranks, rank = accelerator.num_processes, accelerator.process_index
        size = min(self.settings.evaluation.batch_size, -(-measured.count // ranks))
        found: dict[str, list[torch.Tensor]] = {}
        with measured.drawing() as source:
            for start in range(0, measured.count, size * ranks):
                first = start + rank * size
                indices = [min(i, measured.count - 1) for i in range(first, first + size)]  # the rest is cut off below
                with accelerator.autocast():
                    images = source.read(indices).images
                parts = {"features": self.extractor(images)[0]} if self.extractor else {}
                for name, scorer in self.scorers.items():
                    parts[name] = torch.from_numpy(scorer(images, measured.prompts.of(indices)))
                for name, values in parts.items():
                    found.setdefault(name, []).append(accelerator.gather(values.to(accelerator.device)).cpu())
        return {name: torch.cat(values)[: measured.count] for name, values in found.items()}

    def _replace(self, result: dict[str, Any], pipeline: DiffusionPipeline, picture: Image.Image) -> None:
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
