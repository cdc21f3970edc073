"""The result of an evaluation as Markdown."""

from typing import Any

#: Columns after the generator's name: title, figure, format, and the figure that stands behind a ±.
_COLUMNS = (
    ("network evaluations", "network evaluations", "g", None),
    (None, "Fréchet distance", ".3f", None),
    ("KID", "KID", ".5f", "KID deviation"),
    ("precision", "precision", ".3f", None),
    ("recall", "recall", ".3f", None),
    ("inception score", "inception score", ".2f", "inception score deviation"),
    ("label accuracy", "label accuracy", ".3f", None),
    ("PSNR", "PSNR", ".2f", None),
    ("diversity", "diversity", ".3f", None),
    ("images per second", "images per second", ",.0f", None),
)


def format_table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, how they were measured, and the figures of the last generator by class."""
    rows = result["rows"]
    columns = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    titles = ["generator", *(title or result["distance"] for title, *_ in columns)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    lines += [_line([row["generator"], *(_cell(row, *column[1:]) for column in columns)]) for row in rows]
    features, reference = result["features"], result["reference"]
    weights = f", weights {features['weights']}" if features["weights"] else ""
    about = "" if result["distance"] == "FID" else "; not Inception features, so no FID and not comparable with any"
    count = "an unknown number of" if reference["images"] is None else f"{reference['images']:,}"
    lines += [
        "",
        f"{result['evaluator']}; features {features['features']} ({features['version']}{weights}){about}; "
        f"{result['num_samples']:,} images per row, seed {result['seed']}, classes {result['class_balance']}; reference "
        f"{reference['name']} ({count} images); [ ] {result['intervals']}; ± over subsets; {result['device']}, "
        f"{result['date']}.",
    ]
    if any(row.get("diversity") is not None for row in rows):
        lines += [
            "",
            "PSNR is that of each image beside its input's truth, in decibels; diversity the standard deviation of a pixel "
            "in [0, 1] over images of one input.",
        ]
    by_class = next((row for row in reversed(rows) if row.get("per class")), None)
    if by_class:
        lines += ["", f"By class, {by_class['generator']}:", "", *_class_table(by_class["per class"])]
    return "\n".join(lines)


def _class_table(per_class: dict[str, dict[str, Any]]) -> list[str]:
    names = ["images", "KID", "precision", "recall", "label accuracy"]
    names = [name for name in names if any(row.get(name) is not None for row in per_class.values())]
    formats = {"images": "d", "KID": ".5f"}
    lines = [_line(["class", *names]), _line(["---"] * (len(names) + 1))]
    for title, row in per_class.items():
        cells = ["" if row.get(name) is None else f"{row[name]:{formats.get(name, '.3f')}}" for name in names]
        lines.append(_line([title.replace("|", "/"), *cells]))
    return lines


def _cell(row: dict[str, Any], figure: str, form: str, deviation: str | None) -> str:
    if row.get(figure) is None:  # evaluations of older versions lack the newer figures
        return ""
    text = f"{row[figure]:{form}}"
    if deviation:
        return f"{text} ± {row[deviation]:{form}}"
    interval = row["intervals"].get(figure)
    return f"{text} [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
