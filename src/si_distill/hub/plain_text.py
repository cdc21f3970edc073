"""Text of foreign files as it goes into a card: shown as it is, never read as HTML or Markdown, without machine paths."""

import re
from collections.abc import Callable
from typing import Any

# What begins or ends HTML, links, code, emphasis, formulas, headings and cells of tables. GFM also makes links of addresses
# without any marks: of `://`, `www.` and `@`. An underscore inside a word is one, in names of files and settings too.
_ACTIVE = re.compile(r"[<>\[\]`|&*~$@#\\]|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
# With marks that turn the direction of the text around them, and halves of characters, which no file can hold.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
# A path that starts at the root, at a home folder or at a drive; not the path of an address, and no fraction.
_PATH = re.compile(
    r"(?<![\w/:.~\\-])(?:file://)?(?:~[\w.-]*|(?=/[^/\s])|[A-Za-z]:(?=\\))((?:[/\\][^/\\\s,;:\"'`()\[\]{}<>|]+)+)[/\\]?"
)
_REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def one_line(value: Any) -> Any:
    """The same nested value, whose texts and keys have a space in place of line breaks and other control characters."""
    return _changed(value, lambda text: _CONTROL.sub(" ", text))


def escaped(value: Any) -> Any:
    """The same nested value, whose texts and keys a card can hold anywhere in a line."""
    return _changed(one_line(value), lambda text: _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", text))


def code(text: Any) -> str:
    """Escaped text as code. Between backticks nothing is unescaped."""
    return f"<code>{text}</code>" if "&#" in str(text) else f"`{text}`"


def without_paths(value: Any) -> Any:
    """The same nested value, in which a path of one machine is only its last part: publications tell no home folders."""
    return _changed(value, _without_paths)


def is_repository(name: Any) -> bool:
    """Whether it can be the name of a repository of the Hub, which a card may link to."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None


def is_word(name: Any) -> bool:
    """Whether it is one word, as the names of interpolants and objectives are."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _without_paths(text: str) -> str:
    if text.startswith(("/", "~", "file://")):  # perhaps with spaces
        return text.rstrip("/").rsplit("/", 1)[-1]
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[1])[-1], text)
