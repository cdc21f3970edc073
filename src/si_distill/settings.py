"""`--config file.yaml --key value` into a dataclass, with every mistake named before anything heavy starts."""

import dataclasses
import difflib
import errno
import itertools
import os
import reprlib
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError, PublishError, TrainingInterrupted, TrainingStopped
from .imports import import_module
from .named_configs import find_config
from .reading import Plain, parse_yaml, read_yaml, resolve

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
LARGEST_FLOAT32 = float.fromhex("0x1.fffffep+127")


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
        names_code: whether a value with a colon is imported and called, or `true` lets a folder's code run, which only
            the command line may ask for.
    """
    metadata = {"help": help, "choices": choices, "kept": kept, "names_code": names_code}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


#: What every `trust_remote_code` means.
TRUST = "Whether network classes that the folders of pipelines bring along may run: read them first."


def parse_settings(cls: type[T], argv: list[str], description: str = "") -> T:
    """Reads `--config FILE` (several are laid one over the other) and then `--key value` or `--section.key value`.

    `--import MODULE` imports modules first, which register interpolants, objectives or metrics.

    A file may begin with `include: [FILE, …]`, paths relative to its own: it is laid over these. Both take the names of the
    package's configs too (see `find_config`).

    Settings of type text are taken as they are written, except for `~/` at the beginning, the home folder. All others are
    read by the core schema of YAML 1.2; on the command line `null` unsets what may be unset.

    A layer changes what it names and nothing else. Where it chooses another `objective` or `interpolant`, values in the
    companion `…_kwargs` that belong to the earlier choice are dropped with a note on standard error; those that fit any
    choice, such as `critic_weight`, stay.

    Raises:
        InputError: for an unknown key, a value of the wrong type, a file that is missing, not YAML, or names code.
        SystemExit: after `--help`.
    """
    return settings_from_dict(cls, given_settings(cls, argv, description))


def given_settings(cls: type, argv: list[str], description: str = "") -> dict[str, Any]:
    """The nested values that files and command line give, before they are checked (see `parse_settings`)."""
    if "-h" in argv or "--help" in argv:
        ways = "in a YAML file (--config FILE_OR_NAME) or as --key value; --import MODULE imports what you registered"
        _print_help(f"{description}\n\nSettings, {ways}:\n{_help(cls)}")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    overrides = [(key, _value_of(cls, key, words)) for key, words in _split_arguments(argv)]
    for name in given_imports(argv):
        import_module(name)
    count = itertools.count(1)
    for path in [path for key, paths in overrides if key == "config" for path in paths]:
        for source, layer in _layers(find_config(path), (), count):
            _drop_companions(cls, values, layer, str(source))
            values = merge_settings(values, layer)
    overrides = [(key, value) for key, value in overrides if key not in ("config", "import")]
    refuse_code(cls, values, dict(overrides))
    _drop_companions(cls, values, dict(overrides), "the command line")
    for key, value in overrides:
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"--{key}: `{section}` is a single value, not a section.")
        merges = key.endswith("_kwargs") or dataclasses.is_dataclass(typing.get_type_hints(cls).get(key))
        merges &= isinstance(value, dict) and isinstance(place.get(last), dict)
        place[last] = merge_settings(place[last], value) if merges else value
    return values


def given_imports(argv: list[str]) -> list[str]:
    """The modules that the command line asks to import."""
    return [name for key, names in _split_arguments(argv) if key == "import" for name in names]


#: Most files that configs may include altogether: two that include each other's twice double with each level.
MOST_FILES = 100


def _layers(path: Path, open_files: tuple[Path, ...], count: Iterator[int]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A file and all that it includes, each with its mapping, in the order in which they are laid over each other."""
    if next(count) > MOST_FILES:
        raise InputError(f"The config files include each other {MOST_FILES} times, {path} among them: include fewer.")
    values = read_yaml(path, plain=True)
    included = values.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise InputError(f"`include` in {path} must be a list of files, got {included!r}.")
    chain = (*open_files, path.resolve())
    for name in included:
        file = find_config(name, path.parent)
        if file.resolve() in chain:
            raise InputError(f"The config file {path} includes {name}, which includes it: break the circle.")
        yield from _layers(file, chain, count)
    yield path, values


def settings_from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Builds a dataclass from nested plain values, refusing unknown keys and values of the wrong type."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = " or ".join(f"`{prefix}{name}`" for name in _similar(str(key), fields))
            hint = f" Did you mean {near}?" if near else f" Known settings: {', '.join(fields)}."
            raise InputError(f"Unknown setting `{prefix}{key}`.{hint}")
    built = {}
    for key, value in values.items():
        name, hint = f"{prefix}{key}", hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"`{name}` is a section of settings, got {value!r}.")
            built[key] = settings_from_dict(hint, value, f"{name}.")
            continue
        built[key] = _coerce(name, value, hint)
        choices = fields[key].metadata.get("choices")
        if choices and built[key] is not None and built[key] not in choices:
            raise InputError(f"`{name}` is {value!r}; choose one of: {', '.join(choices)}.")
    return cls(**built)


def _similar(key: str, names: Iterable[str]) -> list[str]:
    """The names that a mistyped or shortened one may stand for: `batch_size` is part of `per_device_train_batch_size`."""
    longer = sorted((name for name in names if f"_{key}_" in f"_{name}_"), key=len)[:3]
    return difflib.get_close_matches(key, names, n=1) or longer


#: Most of what a process holds at once (samples of a batch, threads), and the largest seed of NumPy's generator.
MOST_SAMPLES, MOST_PROCESSES, LARGEST_SEED = 2**20, 1024, 2**32 - 1


def at_least(name: str, value: float, minimum: int, maximum: int = 2**31 - 1) -> None:
    """Refuses a setting below its minimum, or above what any machine can do."""
    if value < minimum:
        raise InputError(f"`{name}` must be at least {minimum}, got {value}.")
    if value > maximum:
        raise InputError(f"`{name}` must be at most {maximum:,}, got {value}.")


def positive(name: str, value: float) -> None:
    """Refuses a setting that is not a positive finite number."""
    if not 0 < value < float("inf"):
        raise InputError(f"`{name}` must be a positive number, got {value}.")


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The plain nested values of a settings object, as written to a run's config.yaml."""
    return dataclasses.asdict(settings)


def script_main(main: typing.Callable[[list[str]], None]) -> None:
    """Runs a script's main function; user-facing errors are printed without a traceback, by the first process or by one that
    fails alone.

    Exit codes: 0 done, 2 wrong input, 3 training had to stop, 4 not published, 128 + n after signal n.
    """
    # Tensors on CPUs in huge pages (Linux): a twentieth of an iteration is page faults otherwise. torch looks once, at its
    # first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        main(sys.argv[1:])
        return
    except (InputError, TrainingStopped, TrainingInterrupted, PublishError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(3)  # the launcher ends all processes when the first has failed: what all say, that one says
        kind = "stopped" if isinstance(error, TrainingInterrupted) else "error"
        print(f"\n{kind}{f' (process {rank})' if rank else ''}: {_printable(str(error))}", file=sys.stderr, flush=True)
        if isinstance(error, TrainingInterrupted):
            raise SystemExit(128 + error.signal_number) from None
        codes: dict[type, int] = {TrainingStopped: 3, PublishError: 4}
        raise SystemExit(codes.get(type(error), 2)) from None
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"\nerror: {place}{error.strerror}. Make room, or give a place that can be written.", file=sys.stderr)
        raise SystemExit(2) from None


def _printable(text: str) -> str:
    """Text without the control characters by which a foreign name could write to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


#: What a system says of a place that cannot be written: the user's to solve, wherever it shows.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR)


def _split_arguments(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each `--key` with the words that follow it."""
    pairs: list[tuple[str, list[str]]] = []
    for argument in argv:
        key, equals, value = argument[2:].partition("=")
        if argument.startswith("--") and key:
            pairs.append((key.replace("-", "_"), [value] if equals else []))  # --repo-id is --repo_id
            open_key = not equals
        elif pairs and open_key and not argument.startswith("--"):
            pairs[-1][1].append(argument)
        else:
            raise InputError(f"Expected --key value, got {argument!r}. Quote values that hold spaces.")
    return pairs


def _value_of(cls: type, key: str, words: list[str]) -> Any:
    """What the words after `--key` mean for the type of that setting; its scalars are still to be resolved."""
    if key in ("config", "import"):
        if not words:
            raise InputError(f"--{key} needs a {'file' if key == 'config' else 'module'} after it.")
        return words
    if not words:
        return True  # a key alone is a flag
    hint: Any = cls
    for name in key.split("."):
        hint = typing.get_type_hints(hint).get(name, Any) if dataclasses.is_dataclass(hint) else Any
    is_list = typing.get_origin(hint) is list
    holds_values = hint in (Any, dict) or dataclasses.is_dataclass(hint)
    if len(words) == 1 and words[0] and (words[0][0] in "[{\"'" if holds_values else is_list and words[0][0] == "["):
        try:
            return parse_yaml(words[0])
        except ValueError as error:
            if holds_values:
                raise InputError(f"--{key} is not valid YAML: {error}.") from None
    return [Plain(word) for word in words] if is_list or len(words) > 1 else Plain(words[0])


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


def refuse_code(cls: type, values: dict[str, Any], overrides: dict[str, Any], prefix: str = "") -> None:
    """Refuses code that a file asks for: it may be someone else's, such as a run's config.yaml.

    Args:
        cls: of the settings.
        values: nested, as the file gives them.
        overrides: by dotted name, what the command line gives.
        prefix: of `cls` in the settings.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, value = f"{prefix}{field.name}", values.get(field.name)
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, dict):
            refuse_code(hints[field.name], value, overrides, f"{name}.")
            continue
        asks = resolve(value) is True or (isinstance(value, str) and ":" in value)
        if field.metadata.get("names_code") and asks and name not in overrides:
            raise InputError(
                f"`{name}` in the config file is {value!r}: code would be imported and run. A file cannot ask for that: if "
                f"you trust this code, add --{name} {value} to the command, otherwise another value."
            )


def merge_settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_settings(merged[key], value) if both else value
    return merged


def _coerce(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return [_coerce(name, element, item) for element in (value if isinstance(value, list) else [value])]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or (isinstance(value, Plain) and value == "null")):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _text(name, str(value))
    value = resolve(value)
    if kind in (bool, dict) and isinstance(value, kind):
        _check_finite(name, value)
        return value
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_finite(name, value)
        if kind is float or value == int(value):
            return kind(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    raise InputError(f"`{name}` must be {names[kind]}, got {value!r}.")


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"`{name}` is {value!r}, which is not UTF-8 text.") from None
    if "\0" in value:
        raise InputError(f"`{name}` holds a null character: {value!r}.")
    return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value


def _check_finite(name: str, value: Any) -> None:
    """Refuses numbers, also those in a mapping, that are not finite, or beyond what float32 and 64-bit integers hold."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_finite(f"{name}.{key}", item)
    largest = 2**63 - 1 if isinstance(value, int) else LARGEST_FLOAT32
    if isinstance(value, (int, float)) and not abs(value) <= largest:
        raise InputError(f"`{name}` must be a finite number of at most {largest:.3g}, got {reprlib.repr(value)}.")


def _print_help(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # `--help | head` has read enough; what is left in the buffer must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help(cls: type, prefix: str = "") -> str:
    lines = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            lines.append(_help(hints[f.name], f"{prefix}{f.name}."))
            continue
        default = f.default_factory() if callable(f.default_factory) else f.default
        choices = f.metadata.get("choices")
        text = f.metadata["help"] + (f" One of: {', '.join(choices)}." if choices else "")
        lines.append(f"  --{prefix + f.name:<32} {text} [{default!r}]")
    return "\n".join(lines)
