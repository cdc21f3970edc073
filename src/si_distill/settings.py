"""`--config file.yaml --key value` into a dataclass, with every mistake named before anything heavy starts."""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import InputError, PublishError, TrainingInterrupted, TrainingStopped

T = TypeVar("T")


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    kept: tuple[str, ...] = (),
    names_code: bool = False,
) -> Any:
    """A documented field of a settings dataclass; a dict or list default is copied for each instance.

    Args:
        default: its value when it is not set.
        help: for `--help`.
        choices: the values that it can have; None is any of its type.
        kept: keys of a companion `…_kwargs` that also fit another choice (see `parse_settings`).
        names_code: whether a value with a colon is imported and called, which only the command line may ask for.
    """
    metadata = {"help": help, "choices": choices, "kept": kept, "names_code": names_code}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_settings(cls: type[T], argv: list[str], description: str = "") -> T:
    """Reads `--config FILE` (several are laid one over the other) and then `--key value` or `--section.key value`.

    A file may begin with `include: [FILE, …]`, paths relative to its own: it is laid over these.

    A layer changes what it names and nothing else. Where it chooses another `objective` or `interpolant`, values in the
    companion `…_kwargs` that belong to the earlier choice are dropped with a note on standard error; those that fit any
    choice, such as `critic_weight`, stay.

    Raises:
        InputError: for an unknown key, a value of the wrong type, a file that is missing, not YAML, or names code.
        SystemExit: after `--help`.
    """
    if "-h" in argv or "--help" in argv:
        print(f"{description}\n\nSettings, in a YAML file (--config FILE) or as --key value:\n{_help(cls)}")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    overrides = _split_arguments(argv)
    for path in [value for key, value in overrides if key == "config"]:
        for source, layer in _layers(Path(path), ()):
            _drop_companions(cls, values, layer, str(source))
            values = _merge(values, layer)
    overrides = [(key, value) for key, value in overrides if key != "config"]
    _refuse_code(cls, values, dict(overrides))
    _drop_companions(cls, values, dict(overrides), "the command line")
    for key, value in overrides:
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"--{key}: `{section}` is a single value, not a section.")
        merges = key.endswith("_kwargs") or dataclasses.is_dataclass(typing.get_type_hints(cls).get(key))
        place[last] = _merge(place.get(last, {}), value) if merges and isinstance(value, dict) else value
    return settings_from_dict(cls, values)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: `no` is text here (a choice of `mixed_precision`), not False."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false|True|False"), list("tTfF"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"Cannot read the config file {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"The config file {path} must hold `key: value` lines, but it holds {type(values).__name__}.")
    return values


def _layers(path: Path, open_files: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A file and all that it includes, each with its mapping, in the order in which they are laid over each other."""
    values = read_yaml(path)
    included = values.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise InputError(f"`include` in {path} must be a list of files, got {included!r}.")
    chain = (*open_files, path.resolve())
    for name in included:
        if (path.parent / name).resolve() in chain:
            raise InputError(f"The config file {path} includes {name}, which includes it: break the circle.")
        yield from _layers(path.parent / name, chain)
    yield path, values


def settings_from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Builds a dataclass from nested plain values, refusing unknown keys and values of the wrong type."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean `{prefix}{near[0]}`?" if near else f" Known settings: {', '.join(fields)}."
            raise InputError(f"Unknown setting `{prefix}{key}`.{hint}")
    built = {}
    for key, value in values.items():
        name, hint = f"{prefix}{key}", hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"`{name}` is a section of settings, got {value!r}.")
            built[key] = settings_from_dict(hint, value, f"{name}.")
            continue
        built[key] = _coerce(name, value, hint)
        choices = fields[key].metadata.get("choices")
        if choices and built[key] is not None and built[key] not in choices:
            raise InputError(f"`{name}` is {value!r}; choose one of: {', '.join(choices)}.")
    return cls(**built)


def at_least(name: str, value: int, minimum: int) -> None:
    """Refuses a setting below its minimum."""
    if value < minimum:
        raise InputError(f"`{name}` must be at least {minimum}, got {value}.")


def positive(name: str, value: float) -> None:
    """Refuses a setting that is not a positive finite number."""
    if not 0 < value < float("inf"):
        raise InputError(f"`{name}` must be a positive number, got {value}.")


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The plain nested values of a settings object, as written to a run's config.yaml."""
    return dataclasses.asdict(settings)


def script_main(main: typing.Callable[[list[str]], None]) -> None:
    """Runs a script's main function; user-facing errors are printed without a traceback, once per run.

    Exit codes: 0 done, 2 wrong input, 3 training had to stop, 4 not published, 128 + n after signal n.
    """
    # Tensors on CPUs in huge pages (Linux): a twentieth of an iteration is page faults otherwise. torch looks once, at its
    # first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        main(sys.argv[1:])
        return
    except (InputError, TrainingStopped, TrainingInterrupted, PublishError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            kind = "stopped" if isinstance(error, TrainingInterrupted) else "error"
            print(f"\n{kind}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, TrainingInterrupted):
            raise SystemExit(128 + error.signal_number) from None
        codes = {TrainingStopped: 3, PublishError: 4}
        raise SystemExit(codes.get(type(error), 2)) from None


def _split_arguments(argv: list[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        if not argument.startswith("--") or len(argument) == 2:
            raise InputError(f"Expected --key value, got {argument!r}. Quote values that hold spaces.")
        key, equals, value = argument[2:].partition("=")
        key = key.replace("-", "_")  # --repo-id is --repo_id
        position += 1
        words = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            words.append(argv[position])
            position += 1
        if key == "config":
            pairs += [(key, word) for word in words]
        else:
            parsed = [_parse_word(word) for word in words] or [True]  # a key alone is a flag
            pairs.append((key, parsed[0] if len(parsed) == 1 else parsed))
    return pairs


def _parse_word(word: str) -> Any:
    try:
        return yaml.load(word, _Loader)
    except yaml.YAMLError:
        return word


def _drop_companions(cls: type, values: dict[str, Any], layer: dict[str, Any], source: str) -> None:
    """Takes out of `values` what belongs to a choice that a layer replaces by another, and says what."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, chosen in layer.items():
        companion = fields.get(f"{key}_kwargs")
        given = values.get(f"{key}_kwargs")
        if companion is None or not isinstance(given, dict):
            continue
        before = values.get(key, fields[key].default)
        if chosen == before:
            continue
        kept = {name: value for name, value in given.items() if name in companion.metadata["kept"]}
        values[companion.name] = kept
        again = layer.get(companion.name)
        dropped = given.keys() - kept.keys() - (again.keys() if isinstance(again, dict) else set())
        if dropped and int(os.environ.get("RANK", "0")) == 0:
            gone = ", ".join(f"{name}={given[name]}" for name in sorted(dropped))
            stays = ", ".join(f"{name}={value}" for name, value in kept.items())
            print(
                f"note: {source} chooses {key}={chosen} instead of {before}: {gone} no longer applies"
                + (f", {stays} stays." if stays else "."),
                file=sys.stderr,
            )


def _refuse_code(cls: type, values: dict[str, Any], overrides: dict[str, Any], prefix: str = "") -> None:
    """Refuses code that a file names (`package.module:Class`): it may be someone else's, such as a run's config.yaml."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, value = f"{prefix}{field.name}", values.get(field.name)
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, dict):
            _refuse_code(hints[field.name], value, overrides, f"{name}.")
        elif field.metadata.get("names_code") and isinstance(value, str) and ":" in value and name not in overrides:
            raise InputError(
                f"`{name}` in the config file is {value!r}, code that would be imported and run. A file cannot ask for "
                f"that: if you trust this code, add --{name} {value} to the command, otherwise another value."
            )


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _coerce(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return [_coerce(name, element, item) for element in (value if isinstance(value, list) else [value])]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    # YAML reads 1e-4 as text and a bare 1 as an integer: convert what is meant, refuse what would lose something.
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is dict and isinstance(value, dict):
        number = re.compile(r"[-+]?\d+[eE][-+]?\d+")
        return {k: float(v) if isinstance(v, str) and number.fullmatch(v) else v for k, v in value.items()}
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is not None and kind is float:
            return number
        if number is not None and number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    raise InputError(f"`{name}` must be {names[kind]}, got {value!r}.")


def _help(cls: type, prefix: str = "") -> str:
    lines = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            lines.append(_help(hints[f.name], f"{prefix}{f.name}."))
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        choices = f.metadata.get("choices")
        text = f.metadata["help"] + (f" One of: {', '.join(choices)}." if choices else "")
        lines.append(f"  --{prefix + f.name:<32} {text} [{default!r}]")
    return "\n".join(lines)
