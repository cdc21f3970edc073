"""Text of foreign files as it goes into a card: shown as it is, never read as HTML or Markdown, without machine paths."""

import re
from typing import Any

#: Characters with which HTML, links, code and cells of tables begin and end.
_ACTIVE = {ord(character): f"&#{ord(character)};" for character in "<>[]`|&"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# A path that starts at the root, at a home folder or at a drive; not the path of an address, and no fraction.
_PATH = re.compile(
    r"(?<![\w/:.~\\-])(?:file://)?(?:~[\w.-]*|(?=/[^/\s])|[A-Za-z]:(?=\\))((?:[/\\][^/\\\s,;:\"'`()\[\]{}<>|]+)+)[/\\]?"
)
_REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def escaped(value: Any) -> Any:
    """The same nested value, whose texts and keys a card can hold anywhere in a line."""
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return _CONTROL.sub(" ", value).translate(_ACTIVE) if isinstance(value, str) else value


def without_paths(value: Any) -> Any:
    """The same nested value, in which a path of one machine is only its last part: publications tell no home folders."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "file://")):  # perhaps with spaces
        return value.rstrip("/").rsplit("/", 1)[-1]
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[1])[-1], value)


def is_repository(name: Any) -> bool:
    """Whether it can be the name of a repository of the Hub, which a card may link to."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None
