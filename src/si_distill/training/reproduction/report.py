"""The report of a reproduction: one mapping, as JSON and as Markdown to share."""

import json
from pathlib import Path
from typing import Any

from ...files import write_text
from .track import Milestone


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.md in the folder."""
    write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", as_markdown(report))


def figure(name: str, features: str) -> str:
    """What a figure is called: FID, or a distance with its features."""
    return f"{name} ({features})"


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    named = figure(report["distance"], report["features"])
    lines = [f"# {report['recipe']}", "", f"**{report['status']}.** {report['reason']}", ""]
    lines += [f"| | {named} | published | difference |", "|---|---|---|---|"]
    for who in ("teacher", "student"):
        row = report[who]
        lines.append(f"| {row['what']} | {_number(row['value'])} | {_number(row['published'])} | {_difference(row)} |")
    lines += ["", *(f"* {who}, published: {report[who]['source']}" for who in ("teacher", "student"))]
    lines += [f"* curve, published: {report['curve source']}", f"* measured: {report['measured']}"]
    lines += [f"* {name}: {text}" for name, text in report["run"].items()]
    if report["milestones"]:
        lines += ["", f"| iterations | images | {named} | published curve |", "|---|---|---|---|"]
        for row in report["milestones"]:
            cells = f"{row['step']:,}", f"{row['images']:,}", _number(row["value"]), _number(row["published"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def milestone_rows(milestones: list[Milestone]) -> list[dict[str, Any]]:
    """Milestones as JSON has them; what is not finite is None."""
    rows = [vars(milestone) for milestone in milestones]
    return [{**row, "value": None if row["value"] == float("inf") else row["value"]} for row in rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _difference(row: dict[str, Any]) -> str:
    value, published = row["value"], row["published"]
    return "" if value is None or published is None else f"{value / published - 1:+.1%}"
