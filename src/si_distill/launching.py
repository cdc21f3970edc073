"""What the launcher of a script started, against what Accelerate sees."""

import os

from .errors import InputError


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
