"""What the benchmarks share. Processes and tables are the package's, whose `training/compare.py` uses them too."""

import json
from pathlib import Path
from typing import Any

from si_distill import files
from si_distill.tables import cell, hardware, hardware_line, markdown_table, mean_and_spread
from si_distill.workers import Workers, advance

__all__ = [
    "Workers",
    "advance",
    "cell",
    "hardware",
    "hardware_line",
    "markdown_table",
    "mean_and_spread",
    "write_json",
    "write_text",
]


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a stop never leaves half of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
