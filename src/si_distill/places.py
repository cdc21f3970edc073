"""Names of what is to be loaded: a folder or file on this machine, or a repository of the Hub."""

import difflib
import os
import re
from pathlib import Path

from .errors import InputError

#: What can be the name of a repository: `user/name`, or `name` alone.
_REPOSITORY = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")


def check_place(role: str, name: str) -> None:
    """Refuses a path that does not exist at once: the Hub would be asked for it five times and more.

    A name is taken for a path when no repository can have it (`./x`, `/x`, `~/x`, `a/b/c`), when it starts with `runs/`, and
    when it has a folder that exists here.

    Args:
        role: what the user calls it, for the error: "teacher", "autoencoder".
        name: a path or Hub id.

    Raises:
        InputError: says that there is no such folder, and which names are similar.
    """
    if os.path.exists(name):  # pathlib raises for names that are too long
        return
    parent = os.path.dirname(name)
    if not _REPOSITORY.fullmatch(name) or name.startswith("runs/") or os.path.isdir(parent):
        raise InputError(f"Cannot load the {role} {name!r}: there is no such folder.{similar_paths(name)}")


def similar_paths(name: str | Path) -> str:
    """A sentence, after a space, on the entries of a path's folder whose names are similar; empty when there are none."""
    path = Path(name)
    try:
        entries = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, entries, n=3)
    return f" Did you mean {' or '.join(str(path.parent / entry) for entry in near)}?" if near else ""


def failure(name: str, error: BaseException) -> str:
    """Why a folder or repository cannot be loaded; of a repository the root of the error, in one sentence."""
    root = error
    while found := root.__cause__ or root.__context__:
        root = found
    if Path(name).is_file():
        return "it is a file, and a folder is needed."
    if Path(name).is_dir() or root is error:
        return str(error)
    reason = str(root).strip().splitlines()[0].rstrip(".")
    return f"there is no such folder, and it cannot be had from the Hub: {reason}.{similar_paths(name)}"
