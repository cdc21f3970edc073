"""What the launcher of a script started, against what Accelerate sees."""

import os
from datetime import timedelta

from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from .errors import InputError


def join_processes(timeout: timedelta = timedelta(minutes=10)) -> PartialState:
    """The processes of the launcher; through `Accelerator`, which alone reads what the launcher says of CPUs.

    Args:
        timeout: how long one may wait for another.

    Raises:
        InputError: when they do not know of each other.
    """
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    state = PartialState()
    check_processes(state.num_processes)
    return state


def check_processes(seen: int) -> None:
    """Refuses processes that do not know of each other: each would do the whole work and overwrite the others'.

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
