"""Curves of one or several runs from their `metrics.jsonl` and `evaluations.jsonl`, on one page.

    python -m si_distill.plot runs/digits-student runs/digits-realuid --out curves.png

Each run is a colour; x is the number of generated or real images that were learned from. Panels without data are left out.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .reading import read_json_lines
from .settings import at_least, given_settings, script_main, setting, settings_from_dict

#: Title, logarithmic or not, file, and the values drawn.
PANELS = (
    ("losses", False, "metrics.jsonl", ("loss", "generator_loss", "critic_loss", "generator_adversarial_loss")),
    ("distance of critic and teacher", True, "metrics.jsonl", ("field_distance",)),
    ("gradient norms", True, "metrics.jsonl", ("grad_norm", "generator_grad_norm", "critic_grad_norm")),
    ("spread of the samples", False, "metrics.jsonl", ("sample_std",)),
    ("measured on the way", True, "evaluations.jsonl", ("frechet_distance", "kid")),
)
STYLES = ("-", "--", ":", "-.")


@dataclass
class PlotConfig:
    runs: list[str] = setting([], "Run folders; they may also be given without the name of the setting.")
    out: str = setting("curves.png", "The picture: .png, .svg or .pdf.")
    smooth: int = setting(1, "Lines of the log that each point is a mean of.")

    def __post_init__(self) -> None:
        at_least("smooth", self.smooth, 1)
        if not self.runs:
            raise InputError("Name at least one run: python -m si_distill.plot runs/a runs/b --out curves.png")


def read_curves(run: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of a run's logs by the name of the file.

    Raises:
        InputError: when there is no log, or it is damaged.
    """
    files = {name: Path(run, name) for name in dict.fromkeys(file for _, _, file, _ in PANELS)}
    if not files["metrics.jsonl"].is_file():
        raise InputError(f"{run} has no metrics.jsonl: name the folder of a run.")
    found = {name: list(read_json_lines(path, {"step": int})) for name, path in files.items() if path.is_file()}
    images = {line["step"]: line.get("images", line["step"]) for line in found["metrics.jsonl"]}
    for lines in found.values():
        for line in lines:
            line.setdefault("images", images.get(line["step"], line["step"]))
    return found


def points(lines: list[dict[str, Any]], name: str, smooth: int) -> tuple[list[float], list[float]]:
    """x and y of one value: means over `smooth` neighbouring lines of the log."""
    pairs = [(line["images"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    groups = [pairs[start : start + smooth] for start in range(0, len(pairs), smooth)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return [x for x, _ in means], [y for _, y in means]


def draw(config: PlotConfig) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state
    from matplotlib.ticker import EngFormatter, MaxNLocator

    runs = {run: read_curves(run) for run in config.runs}
    shown = []
    for panel in PANELS:
        _, _, file, names = panel
        lines = itertools.chain.from_iterable(found.get(file, []) for found in runs.values())
        if {name for line in lines for name in names if line.get(name) is not None}:
            shown.append(panel)
    figure = Figure(figsize=(4.6 * len(shown), 3.8), layout="constrained")
    for place, (title, logarithmic, file, names) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        for number, (run, found) in enumerate(runs.items()):
            for name, style in zip(names, STYLES, strict=False):
                x, y = points(found.get(file, []), name, config.smooth)
                if y:
                    marker = "." if len(y) < 30 else ""  # a single point has no line
                    axes.plot(x, y, style + marker, color=f"C{number}", label=f"{Path(run).name}: {name}", linewidth=1)
        axes.set_yscale("log" if logarithmic else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("images")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    try:
        figure.savefig(config.out, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"`out` {config.out} cannot be written: {error}.") from error


def main(argv: list[str]) -> None:
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    given = given_settings(PlotConfig, argv[len(words) :], __doc__)
    config = settings_from_dict(PlotConfig, {**given, **({"runs": words} if words else {})})
    draw(config)
    print(f"Drawn: {config.out}")


if __name__ == "__main__":
    script_main(main)
