"""Reads pickles and PyTorch checkpoints without running anything that is in them.

A pickle is a program: it names functions and calls them, and EDM's also carry the source code of their classes. Python's
own interpreter of that program trusts it with memory (a jump in the memo allocates gigabytes) and with its stack (a tuple
nested 200,000 deep is hashed until the process dies), so the program is interpreted here, from `pickletools`' list of its
instructions. A name in it stays a name: nothing callable is ever on the stack. The few calls that checkpoints consist of
are a table of functions of ours, which check every argument and build tensors, arrays, plain containers, or a record of an
object's attributes. Every other name and every other instruction is an error.
"""

import mmap
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..places import similar_paths
from .pickle_values import (
    ARGUMENTS,
    CALLS,
    STORAGES,
    TENSOR_CALLS,
    ArrayType,
    Budget,
    Name,
    PickledObject,
    PickleError,
    Unfilled,
    make_dict,
    make_set,
    need,
    with_state,
)
from .shown import printable, shown

#: Containers inside each other; EDM2's largest have 30.
MAX_DEPTH = 200
#: Values that a file may stand for when everything shared is counted each time that it occurs.
MAX_VALUES = 5_000_000
#: What objects and places in a list and in a table by keys count: a quarter of the bytes that they take, for honest pickles
#: of the smallest tensors and modules have ten times the file's size of them.
TENSOR, OBJECT, LIST_ITEM, TABLE_ITEM = 128, 32, 2, 16

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = set(
    "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)


def read_pickle(
    file: "_Bytes",
    calls: dict[tuple[str, str], Callable[..., Any]],
    budget: Budget,
    storage: Callable[[Any], torch.Tensor] | None = None,
) -> Any:
    """
    The value of one pickle, from where a file stands to the pickle's end.

    Args:
        file: of which it is a part.
        calls: what may be called.
        budget: of the whole file, which the pickles in it share.
        storage: gives the tensor's storage for a "persistent id" of PyTorch's.

    Raises:
        Exception: of nearly any type, for what is no pickle, or not of plain content.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def name(module: Any, name: Any) -> Any:
        need(type(module) is str and type(name) is str, "a name that is no text")  # before it is hashed or shown
        if (module, name) in calls:
            return Name(module, name)
        if (module, name) in ARGUMENTS:
            return ARGUMENTS[module, name]
        raise PickleError(
            f"it holds more than tensors, arrays and plain containers: loading it would use "
            f"{printable(module, 99)}.{printable(name, 99)}. That is refused, because it can run any code"
        )

    def put(value: Any) -> None:
        """A container that the instruction made."""
        budget.take(sys.getsizeof(value) // 4)
        stack.append(value)

    for instruction, argument, _ in pickletools.genops(file):
        budget.take(work=1)
        op = instruction.name
        if op == "MEMOIZE":
            op, argument = "BINPUT", len(memo)
        if op in _VALUES:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("BINPUT", "LONG_BINPUT"):
            budget.take(TABLE_ITEM * (argument not in memo))
            memo[argument] = stack[-1]
            if isinstance(stack[-1], Unfilled):
                stack[-1].places.append(argument)
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            put({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}[op]())
        elif op == "TUPLE":
            put(tuple(since_mark()))
        elif op == "FROZENSET":
            put(frozenset(budget.keys(since_mark())))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(op[-1])
            need(len(stack) >= length, "a tuple of nothing")
            items = tuple(stack[-length:])
            del stack[-length:]
            put(items)
        elif op in ("APPEND", "APPENDS"):
            items = since_mark() if op == "APPENDS" else [stack.pop()]
            need(type(stack[-1]) is list, f"it appends to a {type(stack[-1]).__name__}")
            budget.take(LIST_ITEM * len(items))
            stack[-1] += items
        elif op in ("SETITEM", "SETITEMS"):
            items = since_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            need(type(stack[-1]) is dict and len(items) % 2 == 0, f"it sets items of a {type(stack[-1]).__name__}")
            budget.take(TABLE_ITEM * len(items) // 2)
            stack[-1].update(zip(budget.keys(items[::2], len(stack[-1])), items[1::2], strict=True))
        elif op == "ADDITEMS":
            items = since_mark()
            need(type(stack[-1]) is set, f"it adds to a {type(stack[-1]).__name__}")
            budget.take(TABLE_ITEM * len(items))
            stack[-1].update(budget.keys(items, len(stack[-1])))
        elif op == "GLOBAL":
            stack.append(name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            stack[-2:] = [name(*stack[-2:])]
        elif op in ("REDUCE", "NEWOBJ"):
            function, arguments = stack[-2:]
            need(isinstance(function, Name) and function in calls, f"it calls a {type(function).__name__}")
            need(type(arguments) is tuple, f"{function} with a {type(arguments).__name__} of arguments")
            budget.take_call(arguments)
            call = calls[function]
            stack[-2:] = [call(budget, *arguments) if call in _WITH_BUDGET else call(*arguments)]
            if call is not _storage_in_bytes:  # which gives what it read of its argument
                budget.take(_bytes_of(stack[-1]))
        elif op == "BUILD":
            state, old = stack.pop(), stack[-1]
            if isinstance(old, Unfilled) and isinstance(state, tuple):
                budget.take_call(state)
            new = stack[-1] = with_state(old, state)
            if isinstance(old, Unfilled):
                memo.update(dict.fromkeys(old.places, new))
                old.places.clear()
        elif op == "BINPERSID":
            need(storage is not None, "it refers to something outside itself")
            budget.take(TENSOR)
            stack.append(storage(stack.pop()))
        elif op == "STOP":
            (value,) = stack
            _check_extent(value, budget.limit)
            return value
        elif op == "PROTO":
            need(argument <= 5, f"its protocol is {argument}")
        elif op != "FRAME":
            raise PickleError(f"it uses the instruction {op}, which no checkpoint needs")
    raise PickleError("it has no end")


def _bytes_of(value: Any) -> int:
    """About how much memory the result of a call takes besides that of its arguments."""
    if isinstance(value, torch.Tensor):
        return TENSOR + value.nbytes  # a view, but readers copy it
    known = (
        np.ndarray,
        dict,
        set,
        tuple,
        PickledObject,
        Unfilled,
        ArrayType,
        str,
        bytes,
        int,
        float,
        complex,
        type(None),
    )
    need(isinstance(value, known), f"a call made a {type(value).__name__}")
    return OBJECT


def _check_extent(value: Any, max_text: int) -> None:
    """Refuses containers that are nested too deep, or in themselves, or that stand for too many values or too much text:
    lists that share one another forty deep are a hundred bytes, and 2⁴⁰ values to whoever goes through them.
    """
    known: dict[int, tuple[int, int, int]] = {}

    def extent(value: Any, depth: int) -> tuple[int, int, int]:
        """How deep it is, and how many values and letters, each time that they occur."""
        value = value.state if isinstance(value, PickledObject) else value
        need(not isinstance(value, (Name, ArrayType, Unfilled)), "it holds a part of a call by itself")
        if not isinstance(value, (dict, list, tuple, set, frozenset)):
            return 0, 1, len(value) if isinstance(value, (str, bytes)) else 0
        inside, values, letters = known.get(id(value), (0, 1, 0))
        if depth + inside >= MAX_DEPTH:
            raise PickleError(f"its containers are nested in each other more than {MAX_DEPTH} deep, or in themselves")
        if id(value) not in known:
            for item in chain(value, value.values()) if isinstance(value, dict) else value:
                found = extent(item, depth + 1)
                inside, values, letters = max(inside, found[0]), values + found[1], letters + found[2]
            known[id(value)] = inside, values, letters
            if values >= MAX_VALUES:
                raise PickleError(f"it stands for more than {MAX_VALUES:,} values")
            if letters > max_text:
                raise PickleError(f"it stands for more than {max_text:,} bytes of text")
        return inside + 1, values, letters

    extent(value, 0)


class _Bytes:
    """A file of bytes in memory, or mapped into it, of which tensors can be parts."""

    def __init__(self, data: memoryview):
        self.data, self.place = data, 0

    def read(self, count: int) -> bytes:
        found = bytes(self.data[self.place : self.place + max(0, count)])
        self.place += len(found)
        return found

    def readline(self) -> bytes:
        line = bytes(self.data[self.place : self.place + 4096]).split(b"\n", 1)  # a name; longer ones have no end
        found = line[0] + b"\n" * (len(line) > 1)
        self.place += len(found)
        return found

    def tell(self) -> int:
        return self.place

    def storage(self, dtype: torch.dtype, place: int, size: int) -> torch.Tensor:
        if place < 0 or size < 0 or size % dtype.itemsize or place + size > len(self.data):
            raise PickleError(f"a storage of {size:,} bytes, of which the file does not have enough")
        return torch.frombuffer(self.data, dtype=dtype, count=size // dtype.itemsize, offset=place) if size else (
            torch.empty(0, dtype=dtype)
        )  # fmt: skip


def _read_torch(data: memoryview, calls: dict[tuple[str, str], Callable[..., Any]], budget: Budget) -> Any:
    """What a file of `torch.save` holds, in the format of today (zip) or the one before it."""
    return (_read_zip if data[:2] == b"PK" else _read_legacy)(_Bytes(data), calls, budget)


def _storage_in_bytes(budget: Budget, data: Any) -> Any:
    """The bytes of a tensor are a checkpoint of their own: a pickle in the pickle, which may not hold a third."""
    need(isinstance(data, bytes), "a storage without bytes")
    return _read_torch(memoryview(bytearray(data)), TENSOR_CALLS, budget)


#: What a pickle may call.
_ALL_CALLS = {**CALLS, ("torch.storage", "_load_from_bytes"): _storage_in_bytes}
_WITH_BUDGET = (make_dict, make_set, _storage_in_bytes)


def _storage_id(value: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and number of values of a storage."""
    if not (type(value) is tuple and len(value) >= 5 and type(value[0]) is str and value[0] == "storage"):
        raise PickleError(f"the reference {shown(value)}")
    kind, key, count = value[1], value[2], value[4]
    need(isinstance(kind, Name) and isinstance(key, str) and type(count) is int and count >= 0, "a crooked storage")
    return STORAGES[kind.name], key, count


class _View:
    """A memoryview as the file that `zipfile` reads."""

    def __init__(self, data: memoryview):
        self._file, self._size = _Bytes(data), len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._file.place, self._size)[whence]
        if place < 0:
            raise OSError("before the start")
        self._file.place = place
        return place

    def read(self, count: int = -1) -> bytes:
        return self._file.read(self._size if count is None or count < 0 else count)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _read_zip(file: _Bytes, calls: dict[tuple[str, str], Callable[..., Any]], budget: Budget) -> Any:
    """PyTorch stores its records uncompressed, so that a record is a part of the file; nothing is ever unpacked."""
    with zipfile.ZipFile(_View(file.data)) as archive:
        records = {record.filename: record for record in archive.infolist()}
    budget.take(work=len(records))
    names = [name for name in records if name.split("/")[1:] == ["data.pkl"]]
    need(len(names) == 1, "it is an archive, but not one of PyTorch's")
    root = names[0].split("/")[0]

    def part(name: str) -> tuple[int, int]:
        record = records.get(name)
        need(record is not None, f"its record {shown(name)} is missing")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > len(file.data):
            raise PickleError(
                f"its record {shown(name)} of {record.compress_size:,} bytes would unpack to {record.file_size:,}"
            )
        header = file.data[record.header_offset : record.header_offset + 30]
        return record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])), record.file_size

    if f"{root}/byteorder" in records:
        start, size = part(f"{root}/byteorder")
        need(bytes(file.data[start : start + size]) == b"little", "its numbers are in another byte order")

    storages: dict[tuple[torch.dtype, str, int], torch.Tensor] = {}

    def storage(value: Any) -> torch.Tensor:
        dtype, key, count = found = _storage_id(value)
        if found not in storages:
            start, size = part(f"{root}/data/{key}")
            need(size == count * dtype.itemsize, f"a storage of {count} values with {size} bytes")
            storages[found] = file.storage(dtype, start, size)
        return storages[found]

    start, size = part(names[0])
    return read_pickle(_Bytes(file.data[start : start + size]), calls, budget, storage)


def _read_legacy(file: _Bytes, calls: dict[tuple[str, str], Callable[..., Any]], budget: Budget) -> Any:
    """Three pickles of its version, the content, the keys of its storages, then their bytes."""
    length = len(file.data)
    magic, version, system = (read_pickle(file, {}, budget) for _ in range(3))
    if magic != torch.serialization.MAGIC_NUMBER or version != torch.serialization.PROTOCOL_VERSION:
        raise PickleError("it is no file of torch.save")
    need(isinstance(system, dict) and system.get("little_endian") is True, "its numbers are in another byte order")
    storages: dict[str, torch.Tensor] = {}
    free = length

    def storage(value: Any) -> torch.Tensor:
        nonlocal free
        dtype, key, count = _storage_id(value)
        if key not in storages:
            free -= count * dtype.itemsize
            need(free >= 0, f"a storage of {count:,} values, more than the file has")
            storages[key] = torch.empty(count, dtype=dtype)  # filled below
        need((storages[key].dtype, len(storages[key])) == (dtype, count), f"two storages of the key {shown(key)}")
        return storages[key]

    content = read_pickle(file, calls, budget, storage)
    keys = read_pickle(file, {}, budget)
    need(isinstance(keys, list) and len(keys) == len(storages), "storages without bytes")
    need(all(isinstance(key, str) and key in storages for key in keys), "storages without bytes")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        need(count == len(storages[key]), f"a storage of {len(storages[key])} values with {count}")
        storages[key].copy_(file.storage(storages[key].dtype, file.place, storages[key].nbytes))
        file.place += storages[key].nbytes
    return content


def _mapped(path: Path) -> memoryview:
    """A file's bytes, read from the disk where they are looked at; changes of tensors stay in memory."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return printable((str(error).strip().splitlines()[:1] or [type(error).__name__])[0].rstrip("."), 500)


def read_torch_file(path: Path) -> Any:
    """
    What `torch.save` wrote: tensors in plain containers, with records for objects such as an `argparse.Namespace`.

    Raises:
        Exception: of nearly any type, for another file, or a hostile one.
    """
    data = _mapped(path)
    return _read_torch(data, _ALL_CALLS, Budget(len(data)))


def load_plain_pickle(path: str | Path) -> Any:
    """
    What a pickle file holds, built from tensors, NumPy arrays and plain containers; nothing in the file is executed.

    Objects of EDM's persistent classes and of PyTorch's containers become `PickledObject`s.

    Args:
        path: the file.

    Raises:
        InputError: when it is missing, cut short, no pickle, or uses a name that is not on the list: the text says it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no pickle file {path}.{similar_paths(path)}")
    try:
        file = _Bytes(_mapped(path))
        return read_pickle(file, _ALL_CALLS, Budget(len(file.data)))
    except Exception as error:  # a file that is no pickle, or a hostile one, fails in any of the ways that a parser can
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a pickle: {reason_of(error)}. "
            "If it was cut short, it is smaller than the original."
        ) from error
