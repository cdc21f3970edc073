"""Published figures, each with its source, and the recipes that they are of."""

import difflib
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...reading import check_shape, read_yaml

#: Features of an FID; what an entry's figures are on unless it says otherwise.
FEATURES = "inception-v3-compat"
#: What the file of published figures may hold.
_RECIPE = {
    "features?": str,
    "images_per_update?": int,
    "student?": {"value": float, "source": str},
    "curve?": {"source": str, "points": [[float]]},
}
_TEACHER = {
    "checkpoint?": str,
    "convert?": dict,
    "value?": float,
    "source?": str,
    "steps?": int,
    "solver?": str,
    "guidance_scale?": float,
}
_FILE = {"recipes?": {str: _RECIPE}, "teachers?": {str: _TEACHER}}


@dataclass
class Published:
    """What is published of a recipe; nothing is known of what is empty.

    Args:
        features: that all figures are on.
        images_per_update: the global batch; that of the recipe with one process if it is not given.
        teacher: `checkpoint`, the file that its authors published, `convert`, settings of its conversion, `value` and
            `source`, and how it samples: `steps`, `solver`, `guidance_scale`.
        student: `value` and `source`.
        curve: `source`, and `points` of (images, value) with rising images.
    """

    features: str = FEATURES
    images_per_update: int | None = None
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)

    def on_curve(self, images: int) -> float | None:
        """The curve's value after this number of images, by interpolation of its logarithm; None before its first point."""
        points = self.curve.get("points", [])
        if not points or images < points[0][0]:
            return None
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if images <= x1:
                share = (images - x0) / (x1 - x0)
                return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
        return points[-1][1]


def find_recipe(name: str, configs: Path) -> tuple[str, Path]:
    """The name and file of a recipe: a file, or a name below `configs`.

    Raises:
        InputError: lists the names that are near, when there is none of this name.
    """
    given = Path(name)
    for path in (given, configs / f"{name}.yaml", configs / name):
        if path.is_file():
            inside = path.resolve().is_relative_to(configs.resolve())
            key = path.resolve().relative_to(configs.resolve()).with_suffix("") if inside else Path(path.stem)
            return key.as_posix(), path
    known = sorted(path.relative_to(configs).with_suffix("").as_posix() for path in configs.glob("*/distill*.yaml"))
    near = difflib.get_close_matches(given.with_suffix("").as_posix().removeprefix("configs/"), known, n=4, cutoff=0.4)
    raise InputError(f"There is no recipe {name!r}. {'Near it' if near else 'Known'}: {', '.join(near or known)}.")


def read_published(path: Path, recipe: str, teacher: str) -> Published:
    """What a file of published figures says of a recipe and its teacher; nothing of what it does not name.

    Raises:
        InputError: when the file is damaged.
    """
    content = read_yaml(path)
    try:
        check_shape(content, _FILE)
        entry = content.get("recipes", {}).get(recipe, {})
        published = Published(**entry, teacher=content.get("teachers", {}).get(teacher, {}))
        if ":" in published.features:
            raise ValueError(f"the features of {recipe} are {published.features!r}: a file cannot name code")
        if ("value" in published.teacher) != ("source" in published.teacher):
            raise ValueError(f"the teacher {teacher} needs both, `value` and its `source`, or neither")
        points = published.curve.get("points", [])
        if any(len(point) != 2 or point[1] <= 0 for point in points):
            raise ValueError(f"each point of the curve of {recipe} must be [images, value], with a positive value")
        if any(after[0] <= before[0] for before, after in itertools.pairwise(points)):
            raise ValueError(f"the images of the curve of {recipe} must rise")
    except (TypeError, ValueError) as error:
        raise InputError(f"Cannot use the published figures in {path}: {error}. Correct the entry.") from None
    return published
