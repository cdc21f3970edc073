"""The rows of an evaluation: every metric that was asked for, with intervals, by class, and the nearest real images."""

from typing import Any

import numpy as np
import torch

from .config import EvaluationConfig
from .formulas import NEIGHBOUR, Moments, default_resamples
from .generators import Generator
from .metrics import METRICS, Comparison, measure
from .neighbours import Neighbours, nearest
from .pictures import SHOWN_NEIGHBOURS
from .prompts import Prompts
from .reference import Reference
from .shards import Collected


class Judge:
    """Measures rows against one reference.

    Args:
        settings: which metrics, how many resamples, the seed of the resamples.
        reference: the real images' statistics; None without real images, whose figures are then left out.
        class_names: of the data set, or none.
        device: where distances are computed.
        prompts: of the images, or None.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        reference: Reference | None,
        class_names: list[str],
        device: torch.device,
        prompts: Prompts | None = None,
    ):
        self.settings, self.reference, self.class_names, self.device = settings, reference, class_names, device
        self.prompts, chosen = prompts, settings.bootstrap_resamples
        self.resamples = default_resamples(len(reference.mean) if reference else 0) if chosen is None else chosen
        #: Neighbours of the last row that was measured.
        self.neighbours: Neighbours | None = None

    def row(self, generator: Generator, made: Collected) -> dict[str, Any]:
        """The row of a generator."""
        count, reference = len(made.features), self.reference
        features, real = made.features.to(self.device), None
        if reference and reference.features is not None:
            real = reference.features.to(self.device)
            self.neighbours = nearest(features.float(), real.float(), min(SHOWN_NEIGHBOURS, len(real)))
        labels = None if made.labels is None else np.array(made.labels)
        predicted = None if labels is None else self._predicted(made)
        figures = dict(logits=made.logits, labels=labels, predicted=predicted, compared=made.compared)
        if self.prompts is not None:
            figures |= dict(prompts=self.prompts.of(range(count)), per_prompt=self.prompts.per_prompt)
        moments = reference and reference.moments
        comparison = self._comparison(features, real, moments, neighbours=self.neighbours, **figures)
        further = {
            "per class": self._per_class(made.features, labels, predicted),
            "made": {"kind": generator.kind, "images": count, "seconds": made.seconds, **generator.facts},
        }
        rates = (made.rows / count, count / made.seconds) if made.rows else (None, None)
        return self._row(generator.name, comparison, *rates, **further)

    def floor(self) -> dict[str, Any]:
        """Real images against real images: what no generator can be expected to beat at half of the sample size."""
        features = self.reference.features.to(self.device)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(self.settings.seed))
        half = len(features) // 2
        first, second = features[order[:half]], features[order[half:]]
        # Leave one out: how near real images lie to each other.
        neighbours = nearest(features.float(), features.float(), 1, leave_out_self=True)
        comparison = self._comparison(first, second, Moments.of(second).pair, is_floor=True, neighbours=neighbours)
        return self._row("real half against real half", comparison, made={"kind": "real", "images": half})

    def _comparison(self, *of: Any, **further: Any) -> Comparison:
        s = self.settings
        return Comparison(*of, kid_subsets=s.kid_subsets, resamples=self.resamples, seed=s.seed, **further)

    def _row(
        self,
        name: str,
        comparison: Comparison,
        evaluations: float | None = None,
        rate: float | None = None,
        **further: Any,
    ) -> dict[str, Any]:
        figures, intervals = measure(comparison, self.settings.metrics)
        return {
            "generator": name,
            "network evaluations": evaluations,
            **figures,
            "images per second": rate,
            "intervals": intervals,
            **further,
        }

    def _predicted(self, made: Collected) -> np.ndarray | None:
        """The classes that the images show: by the classifier, or by logits of the data set's own classes."""
        if made.predicted is None and made.logits is not None and made.logits.shape[1] == len(self.class_names):
            return made.logits.argmax(1).numpy()
        return made.predicted

    def _per_class(
        self, features: torch.Tensor, labels: np.ndarray | None, predicted: np.ndarray | None
    ) -> dict[str, dict[str, Any]] | None:
        """Figures by class; by name. A covariance of so few images says little: KID is unbiased at any number."""
        reference = self.reference
        if labels is None or reference is None or not self.class_names:
            return None
        if reference.feature_labels is None or reference.features is None:
            return None
        real_labels = np.array(reference.feature_labels)
        found: dict[str, dict[str, Any]] = {}
        for number, name in enumerate(self.class_names):
            mine, real = labels == number, reference.features[real_labels == number]
            enough = min(mine.sum(), len(real)) > NEIGHBOUR
            comparison = Comparison(
                features[mine],
                real if enough else None,
                reference.moments,
                kid_subsets=1,
                labels=labels[mine],
                predicted=None if predicted is None else predicted[mine],
            )
            row: dict[str, Any] = {"images": int(mine.sum()), "real images": len(real)}
            for metric in METRICS.values():
                value, _ = metric.figure(comparison) if metric.by_class else (None, None)
                if value is not None:
                    row[metric.name] = value
            found[f"{number}" if name == str(number) else f"{number}: {name}"] = row
        return found
