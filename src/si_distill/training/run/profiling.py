"""`--profile`: where the time of an iteration goes, as a trace and a table."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity

from ..config import PROFILED

#: Folder of the traces in a run.
PROFILE = "profile"


class IterationProfiler:
    """Records a few iterations of this process after a warm-up, once; a start with fewer iterations to go records nothing.

    Writes `profile/step_N.json.gz`, a trace that chrome://tracing and https://ui.perfetto.dev open, and the operators that
    took longest as `profile/step_N.txt`, N being the last recorded step.

    Args:
        accelerator: its main process records; the others go on as they do without.
        run: the run's folder.
        enabled: whether anything is recorded at all.
    """

    def __init__(self, accelerator: Accelerator, run: Path, enabled: bool):
        self.folder = run / PROFILE
        self.on_cuda = accelerator.device.type == "cuda"
        self._profiler: torch.profiler.profile | None = None
        self._left = PROFILED[-1] if enabled and accelerator.is_main_process else 0

    @contextlib.contextmanager
    def iteration(self, step: int) -> Iterator[str | None]:
        """Around one iteration, the `step`-th counted from 1."""
        if self._left == len(PROFILED):
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profiler.start()
        yield
        if self._left:
            self._left -= 1
            if not self._left:
                self._finish(step)

    def _finish(self, step: int) -> None:
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"step_{step:08d}.json.gz"
        profiler.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if self.on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50)
        trace.with_name(f"step_{step:08d}.txt").write_text(table, encoding="utf-8")
        print(f"{table}\nProfile of {len(PROFILED)} iterations, the last of them step {step}: {trace}", flush=True)
