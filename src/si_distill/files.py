"""Writes and deletes in folders that others may have touched: no link is followed, and no folder is shared."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import InputError

#: Held by the process that writes to a folder. The system gives it back when that process ends, however it ends.
LOCK = ".lock"


class FolderLock:
    """The right to write to a folder, for one process at a time; kept until `release` or the end of the process.

    Args:
        folder: is made by `acquire` if it is not there.
    """

    def __init__(self, folder: Path):
        self.file = folder / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            InputError: names the process that has it.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            self._lock(descriptor, fcntl.LOCK_EX)
        except InputError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor

    def check(self) -> None:
        """Raises the error of `acquire` when another process has the lock; takes and makes nothing."""
        if self.file.is_file() and self._descriptor is None:
            with open(self.file, "rb") as file:
                self._lock(file.fileno(), fcntl.LOCK_SH)

    def _lock(self, descriptor: int, kind: int) -> None:
        try:
            # Not flock: it would be passed on to the processes that read data, which may outlive a killed parent.
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "unknown"
            raise InputError(
                f"Another process is writing to {self.file.parent} ({owner}): wait until it has ended, or give another "
                "folder."
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"note: {self.file.parent} cannot be locked ({error.strerror}): do not start a second run in it.")

    def release(self) -> None:
        """Gives the lock back; its file stays, because another process may be about to take it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def whole_file(path: Path, mode: str = "b", sync: bool = True) -> Iterator[IO]:
    """Opens a file of bytes (`b`) or text (`t`) under another name, renamed to `path` when all is on the disk.

    A kill at any moment leaves the earlier file; a link is replaced, not followed. Without `sync` a power cut may leave
    neither: for many small files, which can be made again.
    """
    partial = path.with_name(f"{path.name}.tmp")
    partial.unlink(missing_ok=True)
    with open(partial, f"x{mode}", encoding=None if mode == "b" else "utf-8") as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file."""
    with whole_file(path, "t") as file:
        file.write(text)


def delete(path: Path) -> None:
    """Deletes a file, a folder with all that it holds, or a link (and not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_links(folder: Path, names: tuple[str, ...]) -> None:
    """Refuses links among these entries of a folder, and in them: who writes or deletes there would do it elsewhere.

    Raises:
        InputError: names the link.
    """
    for name in names:
        top = folder / name
        inside = [Path(parent) / entry for parent, *found in os.walk(top) for entry in (*found[0], *found[1])]
        for path in [top, *(inside if not top.is_symlink() else [])]:
            if path.is_symlink():
                raise InputError(
                    f"{path} is a link to {os.readlink(path)}, and nothing is written or deleted outside {folder}: remove "
                    "the link, or give another folder."
                )
