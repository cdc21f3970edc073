"""How fast a run is and what it waits for: the figures of each line of the log next to the losses."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator


class Throughput:
    """Clocks of the iterations since the last line of the log, without saving, sampling and measuring.

    Args:
        accelerator: whose device is measured; with several processes the slowest one counts.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._iterations = 0
        self._busy = self._waited = 0.0

    @contextlib.contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one iteration."""
        started = time.perf_counter()
        yield
        self._busy += time.perf_counter() - started
        self._iterations += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the part of an iteration that waits for the next batch."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def line(self, images_per_iteration: int) -> dict[str, float]:
        """The figures since the last call; collective.

        * `images_per_second`: of the global batch;
        * `data_wait`: share of the iterations' time in which the next batch was waited for, in [0, 1];
        * `peak_memory_gb`: of the CUDA device's allocator, or of the process without CUDA, since the start, in 10⁹ bytes.
        """
        busy = max(self._busy, 1e-9)
        own = [busy, self._waited / busy, peak_memory(self.accelerator.device) / 1e9]
        every = self.accelerator.gather(torch.tensor([own], dtype=torch.float64, device=self.accelerator.device))
        slowest, wait, memory = every.amax(0).tolist()
        rate = self._iterations * images_per_iteration / slowest
        self._iterations, self._busy, self._waited = 0, 0.0, 0.0
        return {"images_per_second": round(rate, 2), "data_wait": round(wait, 4), "peak_memory_gb": round(memory, 3)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the CUDA allocator has held, or the largest resident size of this process without CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
