"""Compares the processes that a launcher started with those that Accelerate sees."""

import atexit
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from .errors import InputError


def join_processes(timeout: timedelta = timedelta(minutes=10)) -> PartialState:
    """The processes of the launcher; through `Accelerator`, which alone reads what the launcher says of CPUs.

    On CPUs they leave their group when the script ends.

    Args:
        timeout: how long one may wait for another.

    Raises:
        InputError: when they do not form one process group.
    """
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    state = PartialState()
    check_processes(state.num_processes)
    atexit.register(_leave_gloo)
    return state


def _leave_gloo() -> None:
    """Left to the end of the interpreter, gloo's threads now and then abort a process that has done all its work.

    Gloo alone: to leave NCCL may mean to wait for a process that has failed, and no abort of it was seen.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def check_processes(seen: int) -> None:
    """Refuses processes without a common process group: each would do all the work and overwrite the others'.

    Args:
        seen: Accelerate's number of processes.

    Raises:
        InputError: when the launcher started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if seen != started:
        raise InputError(
            f"The launcher started {started} processes but Accelerate sees {seen}: they would work apart and overwrite one "
            "another. On CPUs launch with ACCELERATE_USE_CPU=true and --multi_gpu."
        )
