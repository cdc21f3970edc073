"""Runs the package's commands under Accelerate's launcher and ends them in an orderly way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import InputError, TrainingStopped
from ...files import FolderLock

#: Seconds between two looks at a running command, and how long one may take to save after SIGTERM.
INTERVAL, SAVING = 0.5, 1800.0


def launch(
    command: str,
    arguments: list[str],
    processes: int,
    config: str | None,
    watch: Callable[[], bool] = lambda: False,
    writes: Path | None = None,
) -> int | None:
    """Runs a command to its end.

    Args:
        command: its module in `si_distill.commands`.
        arguments: its words.
        processes: of the launcher.
        config: Accelerate's config file, or None.
        watch: asked again and again while it runs; True ends it.
        writes: the folder that it holds the lock of while it runs: waited for at the end, for the launcher ends first.

    Returns:
        The exit code; None when `watch` ended it.
    """
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
    if config is not None:
        words += ["--config_file", config]
    else:
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        words += ["--multi_gpu"] if processes > 1 else []
    # A session of its own: a signal to its group reaches launcher and processes, and not this one.
    process = subprocess.Popen([*words, "-m", f"si_distill.commands.{command}", *arguments], start_new_session=True)
    ended = False
    try:
        while process.poll() is None and not ended:
            time.sleep(INTERVAL)
            ended = watch()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # the training saves and ends with 143
            process.wait()
        if writes is not None:
            _wait_for(writes)
    return None if ended else process.returncode


def _wait_for(folder: Path) -> None:
    until = time.monotonic() + SAVING
    while True:
        try:
            return FolderLock(folder).check()
        except InputError as error:
            if time.monotonic() > until:
                raise TrainingStopped(f"{error} It was asked to end {SAVING / 60:.0f} minutes ago.") from None
            time.sleep(INTERVAL)
