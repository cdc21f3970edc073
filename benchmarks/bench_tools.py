"""What the benchmarks share: processes with one thread each and one progress bar, how a result was made, tables."""

import json
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

_progress = None


def advance(units: int = 1) -> None:
    """Moves the progress bar of the process that started this worker."""
    if _progress is not None:
        with _progress.get_lock():
            _progress.value += units


class Workers:
    """Processes of one thread each, as a context manager.

    One thread: times of runs side by side compare, and results do not depend on the number of cores.

    Args:
        count: processes at once.
    """

    def __init__(self, count: int):
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TQDM_DISABLE="1")  # inherited; one bar is enough
        context = multiprocessing.get_context("spawn")
        self._progress = context.Value("q", 0)
        self._executor = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(self._progress,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple], units: int, description: str) -> Iterator[Any]:
        """Yields the results of `function(*task)` as they come.

        Args:
            function: at the top level of a module; calls `advance` as it works.
            tasks: arguments that can be pickled.
            units: what the calls of `advance` add up to.
            description: of the progress bar.
        """
        before = self._progress.value
        pending = {self._executor.submit(function, *task) for task in tasks}
        with tqdm(total=units, desc=description, unit="it", mininterval=0.5) as bar:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(self._progress.value - before - bar.n)
                for future in done:
                    yield future.result()


def _start_worker(progress) -> None:
    import torch

    global _progress
    _progress = progress
    torch.set_num_threads(1)


def hardware(workers: int, threads: int = 1) -> dict[str, Any]:
    """Machine and versions behind a result of so many processes at once, each with so many threads."""
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


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a stop never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
