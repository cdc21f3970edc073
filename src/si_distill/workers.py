"""Processes side by side with one thread each and one progress bar: for comparisons of whole trainings."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
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
