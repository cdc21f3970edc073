"""Pictures of an evaluation: quality against network evaluations, samples side by side, nearest real neighbours."""

from pathlib import Path
from typing import Any

import torch

from ..files import whole_file
from ..visualization import image_grid, tensor_to_pil
from .neighbours import Neighbours
from .samples import Source

#: Real neighbours below each generated image.
SHOWN_NEIGHBOURS = 3
COLUMNS_OF_PICTURES = 10
#: Wider images are made smaller in a picture.
LARGEST_CELL = 512


def draw_quality(result: dict[str, Any], path: Path) -> None:
    """The Fréchet distance of each row against its network evaluations, the student marked, the floor as a line."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in result["rows"] if row["network evaluations"]]
    teachers = [row for row in rows if row["made"]["kind"] == "teacher"]
    for solver in dict.fromkeys(row["made"]["solver"] for row in teachers):
        chosen = [row for row in teachers if row["made"]["solver"] == solver]
        chosen.sort(key=lambda row: row["network evaluations"])
        _points(axes, chosen, fmt="o-", label=f"teacher, {solver}")
    students = [row for row in rows if row["made"]["kind"] == "student"]
    _points(axes, students, fmt="*", markersize=14, label="student", zorder=3)
    for row in result["rows"]:
        if row["made"]["kind"] == "real":
            axes.axhline(row["Fréchet distance"], color="grey", linestyle="--", label=row["generator"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel(f"{result['distance']} ({result['features']['features']})")
    axes.set_title(f"{result['reference']['name']}, {result['num_samples']:,} images per row", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _points(axes: Any, rows: list[dict[str, Any]], **style: Any) -> None:
    if not rows:
        return
    values = [row["Fréchet distance"] for row in rows]
    intervals = [
        row["intervals"].get("Fréchet distance") or [value] * 2 for row, value in zip(rows, values, strict=True)
    ]
    errors = [[max(abs(i[side] - v), 0) for i, v in zip(intervals, values, strict=True)] for side in (0, 1)]
    axes.errorbar([row["network evaluations"] for row in rows], values, yerr=errors, capsize=3, **style)


def draw_samples(rows: list[tuple[str, torch.Tensor]], column_titles: list[str] | None, path: Path) -> None:
    """A PNG file with one row of images (N, C, H, W), uint8, for each generator."""
    pictures = [tensor_to_pil(images.float() / 127.5 - 1) for _, images in rows]
    for image in (image for row in pictures for image in row):
        image.thumbnail((LARGEST_CELL, LARGEST_CELL))
    with whole_file(path) as file:
        image_grid(pictures, [name for name, _ in rows], column_titles).save(file, "PNG")


def draw_neighbours(
    generated: Source, real: Source, real_indices: list[int], found: Neighbours, chosen: list[int], path: Path
) -> None:
    """Generated images with their nearest real ones below: the chosen images, then the closest pairs of all.

    Args:
        generated: the images whose neighbours were looked for.
        real: the real images.
        real_indices: which of them the features in `found` belong to.
        found: neighbours of all generated images.
        chosen: indices of the generated images to show first.
        path: of the picture.
    """
    closest = found.distances[:, 0].argsort()[: len(chosen)].tolist()
    ordinals = ["nearest real", "second", "third"][:SHOWN_NEIGHBOURS]
    rows: list[tuple[str, torch.Tensor]] = []
    for title, indices in (("generated", chosen), ("closest of all", closest)):
        rows.append((title, generated.read(indices).images))
        for rank, ordinal in enumerate(ordinals[: found.indices.shape[1]]):
            places = [real_indices[i] for i in found.indices[indices, rank].tolist()]
            rows.append((ordinal, real.read(places).images))
    draw_samples(rows, None, path)
