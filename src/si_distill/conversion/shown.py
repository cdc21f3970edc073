"""Foreign names and values in errors: few, short, and without the characters that steer a terminal."""

import reprlib
from collections.abc import Iterable
from itertools import islice
from typing import Any


class _Short(reprlib.Repr):
    """`reprlib` alone sorts a whole set or dict, and writes all of some bytes, before it shortens the text."""

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxother]) + "..." * (len(value) > self.maxother)

    def repr_set(self, value: Any, level: int) -> str:
        return super().repr_set(set(islice(value, self.maxset + 1)), level)

    repr_frozenset = repr_set

    def repr_dict(self, value: dict, level: int) -> str:
        return super().repr_dict(dict(islice(value.items(), self.maxdict + 1)), level)


_SHORT = _Short()


def shown(value: Any) -> str:
    """A value as Python writes it, shortened."""
    return printable(_SHORT.repr(value))


def printable(name: Any, length: int = 300) -> str:
    """The start of a text, with escapes for what is not to be seen; another value as `shown`."""
    if not isinstance(name, str):
        return shown(name)
    text = name[:length] + "…" * (len(name) > length)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def some(names: Iterable[Any], count: int = 4) -> str:
    """The first of many names."""
    first = list(islice(names, count + 1))
    return ", ".join(map(printable, first[:count])) + ", …" * (len(first) > count)
