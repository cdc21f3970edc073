"""Figures of a pipeline while it is compared: those of `training/evaluate.py`, without files, intervals or pictures."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ...data import load_images
from ...data.config import DataConfig
from ...evaluation.classifier import classifier_of
from ...evaluation.config import CACHE
from ...evaluation.features import load_extractor
from ...evaluation.generators import Pipeline, balanced_labels, check_images, image_shape, inputs_of
from ...evaluation.metrics import Comparison, measure
from ...evaluation.reference import check_reference, data_reference, read_reference
from ...evaluation.samples import DatasetSource, PipelineSource
from ...settings import settings_to_dict

#: Noise of the evaluated images: the same for every run, and that of `training/evaluate.py`.
EVALUATION_SEED = 0
#: Subsets that KID is a mean over, as in `training/evaluate.py`.
KID_SUBSETS = 100
#: What results call these two metrics; all others have their own names.
SHORT = {"Fréchet distance": "distance", "label accuracy": "accuracy"}


class Judge:
    """The real images, their features and the classifier: what every evaluation of a process shares.

    Args:
        data: the real images.
        num_samples: images of an evaluation, with the balance of classes of the data.
        features, feature_weights, reference, metrics, batch_size, cache_dir: as in `CompareConfig`.
        device: where features are computed.

    Raises:
        InputError: when the images, the features or the statistics cannot be had.
    """

    def __init__(
        self,
        data: DataConfig,
        num_samples: int,
        features: str = "pixels",
        feature_weights: str | None = None,
        reference: str | None = None,
        metrics: tuple[str, ...] = ("fid",),
        batch_size: int = 256,
        cache_dir: str = CACHE,
        device: torch.device | str = "cpu",
    ):
        self.config, self.count, self.metrics, self.batch_size = data, num_samples, list(metrics), batch_size
        self.device, self.file = torch.device(device), reference
        self.data = load_images(data)
        self.real = DatasetSource(self.data, settings_to_dict(data))
        self.extractor = load_extractor(features, feature_weights, device)
        self.classifier = classifier_of(self.data)
        if reference is None:
            cache = Path(cache_dir).expanduser()
            self.reference = data_reference(self.real, self.extractor, cache, PartialState(), batch_size)
        else:
            self.reference = read_reference(Path(reference), self.extractor.name)

    def __call__(self, pipeline: Pipeline, **arguments: Any) -> dict[str, float]:
        """The figures of a pipeline's images that there are, by name; the first two are `distance` and `accuracy`.

        Args:
            pipeline: a student or a teacher.
            arguments: of its call, such as `num_inference_steps`.
        """
        self._check(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        classes = pipeline.network.num_classes
        inputs = inputs_of(pipeline, self.data, self.config, self.count, EVALUATION_SEED)
        labels = balanced_labels(self.count, classes, self.data.labels) if classes else None
        call = partial(pipeline, output_type="pt", **arguments)
        source = PipelineSource(pipeline, call, labels, EVALUATION_SEED, self.count, inputs=inputs)
        features, logits, predicted, compared = [], [], [], []
        for start in range(0, self.count, self.batch_size):
            batch = source.read(range(start, min(start + self.batch_size, self.count)))
            found, scores = self.extractor(batch.images)
            features.append(found)
            compared.append(batch.compared)
            if scores is not None:
                logits.append(scores)
                if scores.shape[1] == classes:
                    predicted.append(scores.argmax(1).numpy())
            if self.classifier:
                predicted.append(self.classifier.predict(batch.images))
        real = self.reference.features
        comparison = Comparison(
            torch.cat(features).to(self.device),
            None if real is None else real.to(self.device),
            self.reference.moments,
            kid_subsets=KID_SUBSETS,
            logits=torch.cat(logits) if logits else None,
            labels=None if labels is None else np.array(labels),
            predicted=np.concatenate(predicted) if predicted and labels is not None else None,
            compared={name: np.concatenate([each[name] for each in compared]) for name in compared[0]},
        )
        figures, _ = measure(comparison, self.metrics)
        return {SHORT.get(name, name): value for name, value in figures.items() if value is not None}

    def _check(self, pipeline: Pipeline) -> None:
        check_images(pipeline, self.data, "pipeline")
        if self.file is not None:
            channels, size, _ = image_shape(pipeline)
            check_reference(self.reference, self.file, self.extractor, channels, size, self.real)
