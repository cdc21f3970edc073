"""Reads JSON and YAML that somebody else may have written: sizes are limited, types are checked, errors are a sentence.

YAML is read by the core schema of YAML 1.2 (`no` and `12:30` are text, `010` is 10, `1e-4` is a number), without tags. Keys
are text and appear once.
"""

import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError

#: Largest files that are read as a whole, in bytes.
YAML_BYTES, JSON_BYTES = 2**20, 2**26
#: Longest line of a file of JSON lines.
LINE_BYTES = 2**20
#: How many values a document may have once its aliases are expanded, and how deep they may be nested.
VALUES, DEPTH = 100_000, 40

_INTEGER = re.compile(r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"true": True, "false": False, "null": None, "~": None}
_WORDS |= {form(word): value for word, value in _WORDS.items() for form in (str.title, str.upper)}
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


class Plain(str):
    """Text without quotation marks: what it means depends on the type that is wanted."""


def resolve(value: Any) -> Any:
    """The value with all of its `Plain` text read as the core schema says."""
    if isinstance(value, dict):
        return {str(key): resolve(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if value in _WORDS:
        return _WORDS[value]
    if _INTEGER.fullmatch(value):
        return int(value, {"0o": 8, "0x": 16}.get(value[:2], 10))
    if _FLOAT.fullmatch(value):
        return float(re.sub(r"\.(?=[a-z])", "", value.lower()))  # Python's infinity has no dot
    return str(value)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, whose scalars without quotation marks are `Plain`, except for null.

    Raises:
        ValueError: for what is not YAML, a key that appears twice, tags, or more than `VALUES` values.
    """
    try:
        node = yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    left = VALUES

    def build(node: yaml.Node | None, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEPTH:
            raise ValueError(f"it holds more than {VALUES:,} values, or nests them deeper than {DEPTH} levels")
        if node is None:
            return None
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag[18:] not in ("str", "seq", "map"):
            raise ValueError(f"it has the tag {node.tag!r}, and tags are not read{_at(node)}")
        if isinstance(node, yaml.SequenceNode):
            return [build(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            if node.style is not None:
                return node.value
            return None if node.value in ("", "~", "null", "Null", "NULL") else Plain(node.value)
        values: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a key must be text{_at(key)}")
            if key.value in values:
                raise ValueError(f"the key `{key.value}` appears twice{_at(key)}: which one is meant?")
            values[key.value] = build(item, depth + 1)
        return values

    return build(node, 0)


def _at(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1}, column {node.start_mark.column + 1})"


def read_yaml(path: str | Path, plain: bool = False) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Args:
        path: of the file.
        plain: whether text without quotation marks stays `Plain` and is resolved by the caller, who knows its types.

    Raises:
        InputError: says what is wrong with the file.
    """
    try:
        text = _read_text(Path(path), YAML_BYTES)
    except ValueError as error:
        raise InputError(f"Cannot read the config file {path}: {error}.") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"The config file {path} is not valid YAML: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"The config file {path} must hold `key: value` lines, but it holds {_held(values)}.")
    return values if plain else resolve(values)


def _held(value: Any) -> str:
    return "nothing" if value is None else _NAMES[str if isinstance(value, Plain) else type(value)]


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or the core schema would read as something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML folds these rare line breaks into spaces unless they are escaped.
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
    )


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: dict[str, Any]) -> str:
    """The text of a YAML file that `read_yaml`, and any other reader, reads as these values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_json(path: str | Path, shape: Any = dict, remedy: str = "Restore it, or remove it.") -> Any:
    """A JSON file whose content has a shape.

    Args:
        path: of the file.
        shape: what it must hold: a type; `Any`; None; a tuple of alternatives; `[shape]`, a list; `{str: shape}`, a mapping
            of any keys; or `{"key": shape, "other?": shape}`, a mapping with these keys, of which those with a ? may be
            missing, and any further ones. A float may be a whole number.
        remedy: what to do when it is damaged; ends the error.

    Raises:
        InputError: says what is wrong with the file.
    """
    try:
        return parse_json(_read_text(Path(path), JSON_BYTES), shape)
    except ValueError as error:
        raise InputError(f"Cannot read {path}: {error}. {remedy}") from None


def read_json_lines(path: str | Path, shape: Any = dict, remedy: str = "Restore it, or remove it.") -> Iterator[Any]:
    """The values of a file with one JSON value per line, of the same shape; a last line cut off by a kill is left out.

    Raises:
        InputError: names the line that is wrong.
    """
    if not Path(path).is_file():
        raise InputError(f"Cannot read {path}: it is no file. {remedy}")
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
            try:
                if len(line) > LINE_BYTES:
                    raise ValueError(f"it is longer than {LINE_BYTES:,} bytes")
                yield parse_json(line.decode("utf-8"), shape)
            except ValueError as error:
                if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) and not file.read(1):
                    return
                raise InputError(f"Cannot read {path}, line {number}: {error}. {remedy}") from None


def parse_json(text: str, shape: Any = dict) -> Any:
    """JSON whose content has a shape (see `read_json`).

    Raises:
        ValueError: says what is wrong with it; a `JSONDecodeError` when it is not JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_shape(value, shape)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it holds a key twice")
    return values


def check_shape(value: Any, shape: Any, place: str = "it") -> None:
    """Raises a ValueError when a value does not have a shape (see `read_json`)."""
    if shape is Any:
        return
    if isinstance(shape, (tuple, types.UnionType)):
        alternatives = shape if isinstance(shape, tuple) else shape.__args__
        problems = []
        for alternative in alternatives:
            try:
                return check_shape(value, alternative, place)
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(problems[0])
    if origin := typing.get_origin(shape):  # list[int], tuple[int, ...], dict[str, float]
        *_, item = [each for each in typing.get_args(shape) if each is not ...]
        shape = {str: item} if origin is dict else [item]
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    if kind in (None, types.NoneType):
        fits, wanted = value is None, "null"
    elif kind is float:
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), _NAMES[float]
    else:
        fits, wanted = type(value) is kind, _NAMES[kind]
    if not fits:
        raise ValueError(f"{place} must be {wanted}, got {reprlib.repr(value)}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{place}[{index}]")
    elif isinstance(shape, dict):
        inside = "" if place == "it" else f"{place}."
        for key, expected in shape.items():
            if key is str:
                for name, item in value.items():
                    check_shape(item, expected, f"{inside}{name}")
            elif key.rstrip("?") in value:
                check_shape(value[key.rstrip("?")], expected, f"{inside}{key.rstrip('?')}")
            elif not key.endswith("?"):
                raise ValueError(f"{place} has no `{key}`")


def check_arguments(function: Callable, values: dict[str, Any]) -> None:
    """Raises a ValueError when a value, of a config that somebody else wrote, does not have the type of its argument.

    Whole numbers are limited to what 32 bits hold, and other numbers must be finite.
    """
    check_shape(values, dict)
    for name, hint in typing.get_type_hints(function).items():
        kinds = [
            typing.get_origin(kind) or kind
            for kind in ([hint], typing.get_args(hint))[isinstance(hint, types.UnionType)]
        ]
        if name in values and all(kind in (*_NAMES, tuple, types.NoneType) for kind in kinds):
            check_shape(values[name], hint, f"`{name}`")
            for number in values[name] if isinstance(values[name], list) else [values[name]]:
                if isinstance(number, (int, float)) and not abs(number) < (2**31 if type(number) is int else math.inf):
                    raise ValueError(f"`{name}` is {reprlib.repr(values[name])}, which is too large")


def _read_text(path: Path, limit: int) -> str:
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise ValueError("it is not a file")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(error.strerror) from None
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return content.decode("utf-8")
