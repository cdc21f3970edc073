"""The data of a finished run, for what is measured on it later."""

import os
from pathlib import Path
from typing import Any, TypeVar

from ..reading import read_yaml
from ..settings import given_settings, merge_settings, settings_from_dict
from .config import DataConfig

T = TypeVar("T")
CONFIG = "config.yaml"


def with_data_of_run(cls: type[T], argv: list[str], description: str, *folders: str) -> T:
    """Settings whose `data` are those that a run was trained on, where no other data set is named.

    Args:
        cls: of the settings; has a section `data`.
        argv, description: of `parse_settings`.
        folders: settings that may name the run, the first one that says its data counts. A student that was distilled
            without data says none: then its teacher's count.

    Raises:
        InputError: as `parse_settings`, or when the run's config.yaml is damaged.
    """
    given = given_settings(cls, argv, description)
    settings = settings_from_dict(cls, given)
    asked = given.get("data", {})
    runs = [str(name) for name in (getattr(settings, folder) for folder in folders) if name]
    own = None if "name" in asked else next(filter(None, map(_data_of, runs)), None)
    if own is None:
        return settings
    settings = settings_from_dict(cls, {**given, "data": merge_settings(own, asked)})
    if int(os.environ.get("RANK", "0")) == 0:
        changed = f", with {', '.join(f'data.{key}={value}' for key, value in asked.items())}" if asked else ""
        whose = f"the run's own {CONFIG}, {settings.data.name!r}{changed}"
        print(f"note: the real images are those of {whose}: --data.name chooses others.")
    return settings


def _data_of(run: str, follow: bool = True) -> dict[str, Any] | None:
    """What a run's config.yaml, or that of its teacher, says of data that are not the default."""
    config = Path(run, CONFIG)
    if not config.is_file():
        return None
    values = read_yaml(config, plain=True)
    own, teacher = values.get("data"), values.get("teacher")
    if isinstance(own, dict) and settings_from_dict(DataConfig, own, "data.") != DataConfig():
        return own
    return _data_of(teacher, follow=False) if follow and isinstance(teacher, str) else None
