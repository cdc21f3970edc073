"""Configs by name: the package brings its `configs/`, and `digits/distill` means one of them."""

import difflib
import re
from pathlib import Path

from .errors import InputError

#: In a clone a link to the folder at its top.
CONFIGS = Path(__file__).parent / "configs"
#: No dot, and so neither a suffix nor `..`.
_NAME = re.compile(r"[\w-]+(/[\w-]+)*")


def config_names() -> list[str]:
    """The package's configs, by their paths in `configs/` without `.yaml`."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def find_config(given: str, folder: Path = Path()) -> Path:
    """The file that a `--config` or an `include` means.

    Args:
        given: a path, `~/` being the home folder; or the name of one of the package's configs, where there is no such file.
        folder: what a relative path starts from.

    Raises:
        InputError: when there is neither; it says which names are similar.
    """
    path = folder / Path(given).expanduser()
    is_name = _NAME.fullmatch(given) is not None
    if path.exists() and not (is_name and path.is_dir()):
        return path
    if is_name and (packaged := CONFIGS / f"{given}.yaml").is_file():
        return packaged
    name = given.removeprefix("configs/").removesuffix(".yaml")
    similar = difflib.get_close_matches(name, config_names(), n=3)
    hint = f" Similar names of the package's configs: {', '.join(similar)}." if similar else ""
    also = ", and the package has no config of that name" if is_name else ""
    raise InputError(f"Cannot read the config file {path}: there is no such file{also}.{hint}")
