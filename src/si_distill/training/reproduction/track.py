"""Whether a run is on its way: its milestones next to the published curve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...reading import read_json_lines
from ..config import EVALUATIONS
from .published import Published

#: A milestone that is this many times the best so far has diverged.
DIVERGED = 2.0


@dataclass
class Milestone:
    """One measurement of the run.

    Args:
        step, images: iterations, and images that the student was updated on.
        value: the distance.
        published: what the published curve has there, or None.
    """

    step: int
    images: int
    value: float
    published: float | None


def read_milestones(student: Path, images_per_update: int, published: Published | None) -> list[Milestone]:
    """The measurements that a run has made so far, by its own `eval_metric_steps`."""
    path = student / EVALUATIONS
    lines: list[dict[str, Any]] = list(read_json_lines(path, {"step": int})) if path.is_file() else []
    found = []
    for line in lines:
        images = line["step"] * images_per_update
        # Not finite, or not there: nothing was ever worse.
        value = line.get("frechet_distance")
        value = float("inf") if value is None or value != value else float(value)
        found.append(Milestone(line["step"], images, value, published and published.on_curve(images)))
    return found


def off_track(milestones: list[Milestone], tolerance: float, patience: int) -> str | None:
    """Why a run should be ended, or None.

    Args:
        milestones: in their order.
        tolerance: share by which a value may lie above the published curve.
        patience: milestones in a row, the last ones, that must be off.
    """
    last = milestones[-patience:]
    if len(last) < patience:
        return None
    listing = ", ".join(f"{m.value:.4g} after {m.images:,} images" for m in last)
    if all(m.published is not None and m.value > m.published * (1 + tolerance) for m in last):
        curve = ", ".join(f"{m.published:.4g}" for m in last)
        return (
            f"the last {patience} milestones ({listing}) are over {tolerance:.0%} above the published curve ({curve})"
        )
    best = min(m.value for m in milestones)
    if all(m.value > DIVERGED * best for m in last):
        return (
            f"the last {patience} milestones ({listing}) are more than {DIVERGED:g} times the best so far, {best:.4g}"
        )
    return None
