"""The data of a finished run, for what is measured on it later."""

import os
from pathlib import Path
from typing import TypeVar

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
        folders: settings that may name the run; the first that is given counts.

    Raises:
        InputError: as `parse_settings`, or when the run's config.yaml is damaged.
    """
    given = given_settings(cls, argv, description)
    settings = settings_from_dict(cls, given)
    run = next((name for name in (getattr(settings, folder) for folder in folders) if name), "")
    config = Path(run, CONFIG)
    asked = given.get("data", {})
    if "name" in asked or not run or not config.is_file():
        return settings
    own = read_yaml(config, plain=True).get("data")
    if not isinstance(own, dict) or settings_from_dict(DataConfig, own, "data.") == DataConfig():
        return settings
    settings = settings_from_dict(cls, {**given, "data": merge_settings(own, asked)})
    if int(os.environ.get("RANK", "0")) == 0:
        changed = f", with {', '.join(f'data.{key}={value}' for key, value in asked.items())}" if asked else ""
        whose = f"the run's own {CONFIG}, {settings.data.name!r}{changed}"
        print(f"note: the real images are those of {whose}: --data.name chooses others.")
    return settings
