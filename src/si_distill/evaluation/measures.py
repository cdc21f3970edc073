"""The figures of one row: every metric that its features allow, with intervals, by class, and the nearest real images."""

from typing import Any

import numpy as np
import torch

from .config import EvaluationConfig
from .features import Extractor
from .generators import Generator
from .metrics import (
    NEIGHBOUR,
    Moments,
    default_resamples,
    diversity,
    frechet_from_moments,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
    share_interval,
)
from .neighbours import Neighbours, nearest
from .pictures import SHOWN_NEIGHBOURS
from .reference import Reference
from .samples import DatasetSource
from .shards import Collected

#: Figures of a row; one that was not asked for, or that the reference or the features do not allow, is None.
FIGURES = (
    "Fréchet distance",
    "KID",
    "KID deviation",
    "precision",
    "recall",
    "inception score",
    "inception score deviation",
    "label accuracy",
    "nearest real distance",
    "PSNR",
    "diversity",
)


class Judge:
    """Measures rows against one reference.

    Args:
        settings: which metrics, how many resamples, the seed of the resamples.
        reference: the real images' statistics.
        extractor: of the features, for its name.
        real: the real images, if they are at hand.
        class_names: of the data set, or none.
        device: where distances are computed.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        reference: Reference,
        extractor: Extractor,
        real: DatasetSource | None,
        class_names: list[str],
        device: torch.device,
    ):
        self.settings, self.reference, self.extractor, self.real = settings, reference, extractor, real
        self.class_names, self.device = class_names, device
        chosen = settings.bootstrap_resamples
        self.resamples = default_resamples(len(reference.mean)) if chosen is None else chosen
        #: Neighbours of the last row that was measured.
        self.neighbours: Neighbours | None = None

    def row(self, generator: Generator, made: Collected) -> dict[str, Any]:
        """The row of a generator."""
        s, count = self.settings, len(made.features)
        features = made.features.to(self.device)
        figures, intervals = self._figures(features, self.reference.features)
        distance = figures["Fréchet distance"]
        if distance is not None and self.resamples:
            reference = (self.reference.mean, self.reference.covariance)
            intervals["Fréchet distance"] = frechet_interval(features, *reference, distance, self.resamples, s.seed)
        if "isc" in s.metrics and made.logits is not None:
            figures["inception score"], figures["inception score deviation"] = inception_score(made.logits)
        predicted = self._predicted(made)
        if predicted is not None:
            accuracy = float((predicted == made.labels).mean())
            figures["label accuracy"] = accuracy
            intervals |= self._share("label accuracy", accuracy, count)
        if "psnr" in made.compared:
            figures["PSNR"] = float(made.compared["psnr"].mean())
        if "spread" in made.compared:
            figures["diversity"] = diversity(made.compared["spread"])
        if self.reference.features is not None:
            real = self.reference.features.to(self.device).float()
            self.neighbours = nearest(features.float(), real, min(SHOWN_NEIGHBOURS, len(real)))
            figures["nearest real distance"] = float(self.neighbours.distances[:, 0].median())
        return {
            "generator": generator.name,
            "network evaluations": made.rows / count if made.rows else None,
            **figures,
            "images per second": count / made.seconds if made.rows else None,
            "intervals": {name: list(ends) for name, ends in intervals.items()},
            "per class": self._per_class(made, predicted),
            "made": {"kind": generator.kind, "images": count, "seconds": made.seconds, **generator.facts},
        }

    def floor(self) -> dict[str, Any]:
        """Real images against real images: what no generator can be expected to beat at half of the sample size."""
        features = self.reference.features.to(self.device)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(self.settings.seed))
        half = len(features) // 2
        first, second = features[order[:half]], features[order[half:]]
        figures, intervals = self._figures(first, second, moments=Moments.of(second))
        # Leave one out: how near real images lie to each other.
        figures["nearest real distance"] = float(
            nearest(features.float(), features.float(), 1, leave_out_self=True).distances.median()
        )
        return {
            "generator": "real half against real half",
            "network evaluations": None,
            **figures,
            "images per second": None,
            "intervals": {name: list(ends) for name, ends in intervals.items()},
            "made": {"kind": "real", "images": half},
        }

    def _figures(
        self, features: torch.Tensor, real: torch.Tensor | None, moments: Moments | None = None
    ) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
        """Figures of two sets of features, and intervals of shares; without `moments` the reference's own are taken."""
        wanted = self.settings.metrics
        figures: dict[str, Any] = dict.fromkeys(FIGURES)
        intervals: dict[str, tuple[float, float]] = {}
        if "fid" in wanted:
            own = Moments.of(features)
            other = (
                (self.reference.mean, self.reference.covariance)
                if moments is None
                else (moments.mean, moments.covariance)
            )
            figures["Fréchet distance"] = frechet_from_moments(own.mean, own.covariance, *other)
        if real is not None:
            # Single precision is what networks' features have; for pixels it is 1e-7 of the distances.
            features, real = features.float(), real.to(features.device).float()
            if "kid" in wanted:
                found = kernel_distance(features, real, self.settings.kid_subsets)
                figures["KID"], figures["KID deviation"] = found
            if "prc" in wanted and min(len(features), len(real)) > NEIGHBOUR:
                figures["precision"], figures["recall"] = precision_recall(features, real)
                intervals |= self._share("precision", figures["precision"], len(features))
                intervals |= self._share("recall", figures["recall"], len(real))
        return figures, intervals

    def _share(self, name: str, share: float, count: int) -> dict[str, tuple[float, float]]:
        return {name: share_interval(share, count, self.settings.seed)} if self.resamples else {}

    def _predicted(self, made: Collected) -> np.ndarray | None:
        """The classes that the images show: by the classifier, or by logits of the data set's own classes."""
        if made.labels is None or made.predicted is not None:
            return made.predicted if made.labels is not None else None
        if made.logits is not None and made.logits.shape[1] == len(self.class_names):
            return made.logits.argmax(1).numpy()
        return None

    def _per_class(self, made: Collected, predicted: np.ndarray | None) -> dict[str, dict[str, Any]] | None:
        """Figures by class; by name. A covariance of so few images says little: KID is unbiased at any number."""
        real_labels = self.reference.feature_labels
        if made.labels is None or real_labels is None or self.reference.features is None or not self.class_names:
            return None
        own, other = torch.tensor(made.labels), torch.tensor(real_labels)
        found: dict[str, dict[str, Any]] = {}
        for number, name in enumerate(self.class_names):
            features, real = made.features[own == number], self.reference.features[other == number]
            row: dict[str, Any] = {"images": len(features), "real images": len(real)}
            if min(len(features), len(real)) > NEIGHBOUR:
                features, real = features.float(), real.float()
                row["KID"] = kernel_distance(features, real, subsets=1)[0]
                row["precision"], row["recall"] = precision_recall(features, real)
            if predicted is not None and len(features):
                row["label accuracy"] = float((predicted[(own == number).numpy()] == number).mean())
            found[f"{number}" if name == str(number) else f"{number}: {name}"] = row
        return found
