"""A cache of shards, made by all processes together: what a kill leaves is taken up again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..errors import InputError
from ..files import FolderLock, delete


def make_shards(
    folder: Path,
    manifest: str,
    what: str,
    state: PartialState,
    make_share: Callable[[], list[Any]],
    finish: Callable[[list[Any]], None],
) -> None:
    """Makes the shards that are missing, each process its share, then the manifest. Collective.

    Args:
        folder: of the cache.
        manifest: the file that only a whole cache has.
        what: is stored, for the error.
        state: of the processes.
        make_share: makes this process's shards and gives what describes each, with its `file`; whole ones are kept.
        finish: writes the manifest, on the main process, of all of them in the order of their files.

    Raises:
        InputError: when something cannot be written.
    """
    lock = FolderLock(folder)
    try:
        if state.is_main_process:
            lock.acquire()
            (folder / manifest).unlink(missing_ok=True)
            for partial in folder.glob("*.tmp"):  # what a kill left
                delete(partial)
        state.wait_for_everyone()
        shards = [shard for found in gather_object([make_share()]) for shard in found]
        if state.is_main_process:
            finish(sorted(shards, key=lambda shard: shard.file))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"Cannot write {what} to {folder}: {error}. What is whole is kept: make room, and run the same command again."
        ) from error
    finally:
        lock.release()
    state.wait_for_everyone()
