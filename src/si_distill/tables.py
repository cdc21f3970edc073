"""Markdown tables of repeated measurements, and the machine behind them."""

import math
import os
import platform
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def hardware(workers: int, threads: int = 1) -> dict[str, Any]:
    """Machine and versions behind a result that `workers` processes computed at once, each with `threads` threads."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": workers,
        "threads per process": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def hardware_line(facts: dict[str, Any]) -> str:
    """The same as words under a table."""
    processes, threads = facts["processes"], facts["threads per process"]
    work = f"{processes} process{'es' * (processes > 1)} of {'one thread' if threads == 1 else f'{threads} threads'}"
    return f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores, {work}, torch {facts['torch']}, {facts['date']}."


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; not a number for a single value, which has no spread."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def cell(values: list[float], digits: int = 3) -> str:
    """`mean ± standard deviation`, or the value alone when there is one."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
