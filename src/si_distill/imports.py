"""Code that the command line names: modules with registrations, and classes given as `package.module:Class`."""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .errors import InputError


def import_module(name: str, what: str = "") -> ModuleType:
    """A module on the Python path or in the present folder.

    Args:
        name: of the module.
        what: how an error calls it; by default its name.

    Raises:
        InputError: when it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:  # the latter two for names such as `` and `.x`
        raise InputError(
            f"Cannot import {what or repr(name)}: {error}. It must be on the Python path or in {os.getcwd()}."
        ) from error


def import_named(setting: str, value: str) -> Callable[..., Any]:
    """The class or function that a setting names as `package.module:Name`.

    Raises:
        InputError: when it is of another form, or cannot be imported.
    """
    module_name, colon, name = value.partition(":")
    if not (module_name and colon and name):
        raise InputError(f"`{setting}` is {value!r}; it is of the form package.module:Class.")
    module = import_module(module_name, f"the module of `{setting}` {value!r}")
    if not callable(found := getattr(module, name, None)):
        raise InputError(f"`{setting}` {value!r}: the module {module_name} has no class {name!r}.")
    return found
