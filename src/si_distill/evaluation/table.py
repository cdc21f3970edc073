"""The result of an evaluation as Markdown."""

from typing import Any

from .metrics import METRICS


def format_table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, how they were measured, and the figures of the last generator by class."""
    rows = result["rows"]
    columns = [(metric.name, metric.form, metric.deviates) for metric in METRICS.values() if metric.form]
    columns = [("network evaluations", "g", False), *columns, ("images per second", ",.0f", False)]
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    names = {"Fréchet distance": result["distance"]}  # FID on Inception's features
    titles = ["generator", *(names.get(name, name) for name, *_ in columns)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    lines += [_line([row["generator"], *(_cell(row, *column) for column in columns)]) for row in rows]
    features, reference = result["features"], result["reference"]
    weights = f", weights {features['weights']}" if features["weights"] else ""
    about = "" if result["distance"] == "FID" else "; not Inception features, so no FID and not comparable with any"
    of_what = _prompts(result) if result.get("prompts") else f"classes {result['class_balance']}"
    lines += [
        "",
        f"{result['evaluator']}; features {features['features']} ({features['version']}{weights}){about}; "
        f"{result['num_samples']:,} images per row, seed {result['seed']}, {of_what}; {_reference(reference)}"
        f"[ ] {result['intervals']}; ± over subsets; {result['device']}, {result['date']}.",
    ]
    for metric in METRICS.values():
        if metric.note and any(row.get(metric.name) is not None for row in rows):
            lines += ["", metric.note]
    by_class = next((row for row in reversed(rows) if row.get("per class")), None)
    if by_class:
        lines += ["", f"By class, {by_class['generator']}:", "", *_class_table(by_class["per class"])]
    return "\n".join(lines)


def _reference(reference: dict[str, Any] | None) -> str:
    if reference is None:
        return ""
    count = "an unknown number of" if reference["images"] is None else f"{reference['images']:,}"
    return f"reference {reference['name']} ({count} images); "


def _prompts(result: dict[str, Any]) -> str:
    """The prompts, and the models that scored them, in words."""
    prompts, each = result["prompts"], result["prompts"]["images_per_prompt"]
    text = f"{prompts['prompts']:,} prompts of {prompts['name']} (hash {prompts['hash']})"
    text += f" with {each} images each" if each > 1 else ""
    for name, scorer in result["scorers"].items():
        if "model" in scorer:
            text += f"; {name}: {scorer['model']} ({scorer['version']}, weights {scorer['weights']})"
    return text


def _class_table(per_class: dict[str, dict[str, Any]]) -> list[str]:
    formats = {"images": "d"} | {metric.name: metric.form for metric in METRICS.values() if metric.by_class}
    names = [name for name in formats if any(row.get(name) is not None for row in per_class.values())]
    lines = [_line(["class", *names]), _line(["---"] * (len(names) + 1))]
    for title, row in per_class.items():
        cells = ["" if row.get(name) is None else f"{row[name]:{formats[name]}}" for name in names]
        lines.append(_line([title.replace("|", "/"), *cells]))
    return lines


def _cell(row: dict[str, Any], name: str, form: str, deviates: bool) -> str:
    if row.get(name) is None:  # evaluations of older versions lack the newer figures
        return ""
    text = f"{row[name]:{form}}"
    if deviates:
        return f"{text} ± {row[f'{name} deviation']:{form}}"
    interval = row["intervals"].get(name)
    return f"{text} [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
