"""The metrics of an evaluation, one registration each: name, format, direction, computation, interval.

A metric that is registered, here or outside the package, appears in evaluation.json, in its table and in the model card;
nothing else lists it. The formulas, and torch with them, are imported on use: settings name metrics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .config import EvaluationConfig, MeasurementConfig
    from .formulas import Interval
    from .neighbours import Neighbours
    from .scores import Scorer


@dataclass
class Comparison:
    """What metrics are computed from: some images and the real ones.

    Args:
        features: (N, D) of the images.
        real: (M, D) of real images on the same device; None where only their mean and covariance are known.
        reference: (D,) mean and (D, D) covariance of the features of real images, float64; None without real images.
        kid_subsets: subsets that KID is a mean over.
        resamples: of a Fréchet distance, behind its interval; 0 for no intervals at all.
        seed: of the resamples.
        is_floor: whether the images are real ones, too.
        logits: (N, K) of the images, or None.
        labels: (N,) their classes, or None.
        predicted: (N,) the classes that they show, or None.
        compared: figures of each image, (N,): next to its input's truth (see `PipelineSource`), or of a `Metric.scorer`.
        neighbours: the nearest real images of each, or None.
        prompts: the prompt of each image, N texts; None of images without prompts.
        per_prompt: images of one prompt, which follow each other.
    """

    features: "torch.Tensor"
    real: "torch.Tensor | None"
    reference: "tuple[np.ndarray, np.ndarray] | None"
    kid_subsets: int
    resamples: int = 0
    seed: int = 0
    is_floor: bool = False
    logits: "torch.Tensor | None" = None
    labels: "np.ndarray | None" = None
    predicted: "np.ndarray | None" = None
    compared: "dict[str, np.ndarray]" = field(default_factory=dict)
    neighbours: "Neighbours | None" = None
    prompts: Sequence[str] | None = None
    per_prompt: int = 1

    @cached_property
    def in_single(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Both features in single precision, which networks' features have; for pixels it is 1e-7 of the distances."""
        return self.features.float(), self.real.float()

    @cached_property
    def precision_recall(self) -> tuple[float | None, float | None]:
        from .formulas import NEIGHBOUR, precision_recall

        enough = self.real is not None and min(len(self.features), len(self.real)) > NEIGHBOUR
        return precision_recall(*self.in_single) if enough else (None, None)

    def share_interval(self, share: float, count: int | None = None) -> "Interval":
        """The interval of a share of `count` samples; by default of the images."""
        from .formulas import share_interval

        return share_interval(share, len(self.features) if count is None else count, self.seed)

    @cached_property
    def distances(self) -> "np.ndarray | None":
        """Of each prompt, the mean distance of two of its images (see `prompt_distances`); None with one image each."""
        from .formulas import prompt_distances

        return prompt_distances(self.features, self.per_prompt) if self.per_prompt > 1 else None


#: A value, (value, standard deviation) if the metric `deviates`, or None where the comparison lacks what it needs.
Compute = Callable[[Comparison], Any]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        name: its key in evaluation.json and its column's title; no other metric's.
        compute: it.
        asked_by: the name in the setting `metrics` that asks for it, which several may share; None: it is always computed.
        form: format of its value in tables; None: it is in no table.
        lower_is_better: its direction.
        deviates: whether its value has a standard deviation.
        by_class: whether it is also computed of each class.
        interval: 95 % interval of a value; None for metrics, or comparisons, without one.
        hub: the Hub's identifier of the metric; None: it is no result in a card's metadata.
        note: said below a table that has the metric.
        of_prompts: whether it is of images of prompts alone; rows of other images do not have it.
        of_real: whether it compares with real images, without which there is no value.
        scorer: loads what gives each image of a prompt a figure, from the settings and for a device. `compute` finds the
            figures in `comparison.compared` under the metric's name.
    """

    name: str
    compute: Compute
    asked_by: str | None = None
    form: str | None = ".3f"
    lower_is_better: bool = False
    deviates: bool = False
    by_class: bool = False
    interval: "Callable[[Comparison, float], Interval | None] | None" = None
    hub: str | None = None
    note: str | None = None
    of_prompts: bool = False
    of_real: bool = False
    scorer: "Callable[[EvaluationConfig | MeasurementConfig, torch.device], Scorer] | None" = None

    def figure(self, comparison: Comparison) -> tuple[float | None, float | None]:
        """Its value and its standard deviation; None where there is none, or it is not finite, which JSON cannot say."""
        found = self.compute(comparison)
        found = found if isinstance(found, tuple) else (found, None)
        return found if all(each is None or math.isfinite(each) for each in found) else (None, None)


#: All metrics by name, in the order of the columns.
METRICS: dict[str, Metric] = {}


def register_metric(name: str, **settings: Any) -> Callable[[Compute], Compute]:
    """Adds a metric to all evaluations of this process: a decorator of its `compute`, with the settings of `Metric`."""

    def register(compute: Compute) -> Compute:
        METRICS[name] = Metric(name, compute, **settings)
        return compute

    return register


def _frechet_interval(c: Comparison, distance: float) -> "Interval | None":
    from .formulas import frechet_interval

    return None if c.is_floor else frechet_interval(c.features, *c.reference, distance, c.resamples, c.seed)


@register_metric(
    "Fréchet distance",
    asked_by="fid",
    lower_is_better=True,
    interval=_frechet_interval,
    hub="frechet-distance",
    of_real=True,
)
def _frechet(c):
    from .formulas import Moments, frechet_from_moments

    return frechet_from_moments(*Moments.of(c.features).pair, *c.reference) if c.reference else None


@register_metric(
    "KID", asked_by="kid", form=".5f", lower_is_better=True, deviates=True, by_class=True, hub="kid", of_real=True
)
def _kid(c):
    from .formulas import kernel_distance

    return None if c.real is None else kernel_distance(*c.in_single, c.kid_subsets)


@register_metric(
    "precision", asked_by="prc", by_class=True, interval=Comparison.share_interval, hub="precision", of_real=True
)
def _precision(c):
    return c.precision_recall[0]


def _recall_interval(c: Comparison, recall: float) -> "Interval":
    return c.share_interval(recall, len(c.real))  # a share of the real images


@register_metric("recall", asked_by="prc", by_class=True, interval=_recall_interval, hub="recall", of_real=True)
def _recall(c):
    return c.precision_recall[1]


@register_metric("inception score", asked_by="isc", form=".2f", deviates=True, hub="inception-score")
def _inception_score(c):
    from .formulas import inception_score

    return None if c.logits is None else inception_score(c.logits)


@register_metric("label accuracy", by_class=True, interval=Comparison.share_interval, hub="accuracy")
def _accuracy(c):
    return None if c.predicted is None or not len(c.labels) else float((c.predicted == c.labels).mean())


@register_metric("nearest real distance", form=None, lower_is_better=True)
def _nearest(c):
    return c.neighbours and float(c.neighbours.distances[:, 0].median())


@register_metric("PSNR", form=".2f")
def _psnr(c):
    return float(c.compared["psnr"].mean()) if "psnr" in c.compared else None


@register_metric(
    "diversity",
    note="PSNR is that of each image next to its input's truth, in decibels; diversity the standard deviation of a pixel in "
    "[0, 1] over images of one input.",
)
def _diversity(c):
    from .formulas import diversity

    return diversity(c.compared["spread"]) if "spread" in c.compared else None


def _score(name: str) -> Compute:
    return lambda c: float(c.compared[name].mean()) if name in c.compared else None


def _score_interval(name: str) -> "Callable[[Comparison, float], Interval | None]":
    def interval(c: Comparison, mean: float) -> "Interval | None":
        from .formulas import mean_interval

        return mean_interval(c.compared[name].reshape(-1, c.per_prompt).mean(1))

    return interval


def _clip_scorer(settings: "EvaluationConfig | MeasurementConfig", device: "torch.device") -> "Scorer":
    from .scores import clip_score

    return clip_score(settings.clip_model, device)


def _pick_scorer(settings: "EvaluationConfig | MeasurementConfig", device: "torch.device") -> "Scorer":
    from .scores import pick_score

    return pick_score(settings.pick_model, device)


def _saturation_scorer(settings: "EvaluationConfig | MeasurementConfig", device: "torch.device") -> "Scorer":
    from .scores import Saturation

    return Saturation()


for _name, _asked_by, _form, _scorer, _lower, _note in (
    (
        "CLIP score",
        "clip_score",
        ".2f",
        _clip_scorer,
        False,
        "CLIP score: mean of 100 max(cos, 0) of image and prompt.",
    ),
    ("PickScore", "pick_score", ".2f", _pick_scorer, False, None),
    ("saturation", None, ".4f", _saturation_scorer, True, "saturation: share of the values of pixels at 0 or 255."),
):
    register_metric(
        _name,
        asked_by=_asked_by,
        form=_form,
        scorer=_scorer,
        interval=_score_interval(_name),
        lower_is_better=_lower,
        of_prompts=True,
        note=_note,
    )(_score(_name))


def _distances_interval(c: Comparison, mean: float) -> "Interval | None":
    from .formulas import mean_interval

    return mean_interval(c.distances)


@register_metric(
    "diversity per prompt",
    asked_by="diversity",
    form=".4f",
    of_prompts=True,
    interval=_distances_interval,
    note="diversity per prompt: mean cosine distance between the features of two images of one prompt.",
)
def _prompt_diversity(c):
    return None if c.distances is None else float(c.distances.mean())


def choices(of_prompts: bool = False) -> tuple[str, ...]:
    """What the setting `metrics` can ask for; of images of prompts it can be more."""
    metrics = (metric for metric in METRICS.values() if of_prompts or not metric.of_prompts)
    return tuple(dict.fromkeys(metric.asked_by for metric in metrics if metric.asked_by))


def measure(comparison: Comparison, asked: list[str]) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """All figures of a row, None where one was not asked for or cannot be had, and the intervals of those that have one."""
    figures: dict[str, float | None] = {}
    intervals: dict[str, list[float]] = {}
    for metric in METRICS.values():
        if metric.of_prompts and comparison.prompts is None:
            continue
        value, deviation = metric.figure(comparison) if metric.asked_by in (None, *asked) else (None, None)
        figures[metric.name] = value
        if metric.deviates:
            figures[f"{metric.name} deviation"] = deviation
        if metric.interval and comparison.resamples and value is not None:
            ends = metric.interval(comparison, value)
            intervals |= {metric.name: list(ends)} if ends else {}
    return figures, intervals
