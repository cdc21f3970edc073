"""Files that are whole or not there: a kill at any moment leaves the earlier one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a file under another name, which is renamed to `path` when all is written and on the disk."""
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file."""
    with whole_file(path, "w") as file:
        file.write(text)
