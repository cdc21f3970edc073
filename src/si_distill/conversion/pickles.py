"""Reads pickles and PyTorch checkpoints without running anything that is in them.

A pickle is a program: it names functions and calls them, and EDM's also carry the source code of their classes. Python's
own interpreter of that program trusts it with memory (a jump in the memo allocates gigabytes) and with its stack (a tuple
nested 200,000 deep is hashed until the process dies), so the program is interpreted here, from `pickletools`' list of its
instructions. A name in it stays a name: nothing callable is ever on the stack. The few calls that checkpoints consist of
are a table of functions of ours, which check every argument and build tensors, arrays, plain containers, or a record of an
object's attributes. Every other name and every other instruction is an error.
"""

import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr as shown  # bounded, whatever a file holds
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError

#: Limits of what a file may ask for: instructions, and containers inside each other. EDM2's largest have 100,000 and 30.
MAX_INSTRUCTIONS, MAX_DEPTH = 5_000_000, 200
#: Values that a file may stand for when everything shared is counted each time that it occurs.
MAX_VALUES = 5_000_000
#: How many times larger than the file its tensors, arrays and containers may be together: weights are sometimes shared.
MAX_GROWTH = 8


class PickledObject:
    """
    What a pickle says about an object whose class is not ours to run.

    Args:
        class_name: the name of the class.
        state: the object's attributes; for a `torch.nn.Module` among others `_parameters`, `_buffers` and `_modules`.
    """

    def __init__(self, class_name: str, state: dict[str, Any] | None = None):
        self.class_name = class_name
        self.state = {} if state is None else state

    def __repr__(self) -> str:
        return f"PickledObject({self.class_name!r}, {list(self.state)})"

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The parameters and buffers of a pickled module by the names of its `state_dict`.

        Raises:
            InputError: when it is no module.
        """
        found = {}
        for kind in ("_parameters", "_buffers"):
            for name, value in self._children(kind, prefix):
                if not torch.is_tensor(value):
                    raise InputError(
                        f"{prefix}{name} in the pickle should be a tensor, but is a {type(value).__name__}."
                    )
                found[prefix + str(name)] = value
        for name, module in self._children("_modules", prefix):
            if not isinstance(module, PickledObject):
                raise InputError(f"{prefix}{name} in the pickle should be a module, but is a {type(module).__name__}.")
            found |= module.tensors(f"{prefix}{name}.")
        return found

    def _children(self, kind: str, prefix: str) -> list[tuple[Any, Any]]:
        children = self.state.get(kind)
        if not isinstance(children, dict):
            raise InputError(
                f"The object {prefix.rstrip('.') or self.class_name!r} in the pickle is no module: no {kind}."
            )
        return [(name, value) for name, value in children.items() if value is not None]


class _Name(NamedTuple):
    """A name that the pickle mentions, such as `torch._utils._rebuild_tensor_v2`. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Unfilled:
    """An array between the instruction that makes it and the one that fills it; `places` are its numbers in the memo."""

    def __init__(self):
        self.places: list[int] = []


class _ArrayType:
    """A type of NumPy's, which is given its byte order by a later instruction."""

    def __init__(self, name: str):
        self.dtype = np.dtype(name)


class _Error(pickle.UnpicklingError):
    """What is wrong with a pickle."""


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise _Error(problem)


# Storages and tensors of PyTorch. A storage is a one-dimensional tensor.

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in dict(
        Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
        Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
        ComplexDouble=torch.complex128, ComplexFloat=torch.complex64, Untyped=torch.uint8,
    ).items()
}  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    _need(torch.is_tensor(storage) and storage.ndim == 1, f"a tensor on a {type(storage).__name__}, not a storage")
    _need(isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride), "a tensor without shape")
    numbers = (offset, *size, *stride)
    _need(
        all(type(number) is int and 0 <= number < 2**62 for number in numbers),
        f"a tensor with the places {shown(numbers)}",
    )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
    # More values than the storage has would be the same ones over again: a few bytes that grow without bound when copied.
    if last >= len(storage) or math.prod(size) > len(storage):
        raise _Error(f"a tensor of shape {shown(size)} that reaches past its {len(storage)} values")
    return storage.as_strided(size, stride, offset)


def _tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    _need(torch.is_tensor(storage) and isinstance(dtype, torch.dtype), "a tensor without a storage or type")
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(data: Any, *_: Any) -> torch.Tensor:
    _need(torch.is_tensor(data), f"a parameter that is a {type(data).__name__}")
    return data


# Arrays and numbers of NumPy.

_ARRAY_TYPES = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()


def _array_type(name: Any, *_: Any) -> _ArrayType:
    # Numbers of fixed width: no objects, whose bytes would be pointers, and no structures that hold them.
    _need(name in _ARRAY_TYPES, f"the array type {shown(name)} is not one of numbers")
    return _ArrayType(name)


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    _need(isinstance(dtype, _ArrayType) and isinstance(raw, bytes), "an array without a type or without bytes")
    _need(isinstance(shape, tuple) and all(type(n) is int for n in shape), f"an array of shape {shown(shape)}")
    _need(order in ("C", "F"), f"an array in the order {shown(order)}")
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="), order)


def _new_array(*_: Any) -> _Unfilled:
    return _Unfilled()  # not memory of the size that the pickle names, which nobody wrote


def _number(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, ()).item()


# Plain containers and records.


def _dict(items: Any = (), *_: Any) -> dict:
    _need(isinstance(items, (list, tuple)), f"a dict of a {type(items).__name__}")
    return {_key(key): value for key, value in items}


def _set(items: Any = ()) -> set:
    _need(isinstance(items, (list, tuple)), f"a set of a {type(items).__name__}")
    return set(map(_key, items))


def _key(value: Any) -> Any:
    """A key of a dict or member of a set. Hashing a tuple that is nested 200,000 deep would end the process."""
    plain = (str, bytes, int, float, bool, type(None))
    if isinstance(value, plain) or (type(value) is tuple and all(isinstance(item, plain) for item in value)):
        return value
    raise _Error(f"a {type(value).__name__} as a key")


def _bytes(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    _need(isinstance(text, str) and encoding == "latin1", f"bytes in the encoding {shown(encoding)}")
    return text.encode("latin1")


def _size(size: Any) -> tuple:
    _need(type(size) in (list, tuple), f"a size that is a {type(size).__name__}")
    return tuple(size)


def _device(*name: Any) -> str:
    _need(all(type(part) in (str, int) for part in name), "a device without a name")
    return ":".join(map(str, name))


def _persistent_object(meta: Any) -> PickledObject:
    """An object of EDM's `torch_utils.persistence`; the source code in `meta` is not looked at."""
    name, state = (meta.get("class_name"), meta.get("state")) if isinstance(meta, dict) else (None, None)
    _need(isinstance(name, str), "a persistent object without the name of its class")
    _need(isinstance(state, dict), f"the attributes of a {name} are a {type(state).__name__}, not a dict")
    return PickledObject(name, state)


def _record(class_name: str) -> Callable[[], PickledObject]:
    """Of a class that is made without arguments and then given its attributes."""
    return lambda: PickledObject(class_name)


def _storage_in_bytes(data: Any) -> torch.Tensor:
    """The bytes of a tensor are a checkpoint of their own: a pickle in the pickle, which may not hold a third."""
    _need(isinstance(data, bytes), "a storage without bytes")
    return _read_torch(memoryview(bytearray(data)), _TENSOR_CALLS)


_TENSOR_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _dict,
}
_CALLS = {
    **_TENSOR_CALLS,
    ("torch.storage", "_load_from_bytes"): _storage_in_bytes,
    ("torch.nn.modules.container", "ModuleDict"): _record("ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"): _record("ModuleList"),
    ("torch.nn.modules.container", "Sequential"): _record("Sequential"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("dnnlib.util", "EasyDict"): _dict,  # a dict with attribute access
    ("argparse", "Namespace"): _record("Namespace"),
    ("builtins", "set"): _set,
    ("builtins", "getattr"): lambda *_: None,  # a hook, pickled as a method of its module; it is left out
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _array_type,
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _CALLS |= {
        (f"{_numpy}.multiarray", "_reconstruct"): _new_array,
        (f"{_numpy}.multiarray", "scalar"): _number,
        (f"{_numpy}.numeric", "_frombuffer"): _array,
    }
#: Names that are arguments of these calls, and what each stands for.
_ARGUMENTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{(module, name): _Name(module, name) for name in _STORAGES for module in ("torch", "torch.storage")},
}


def _with_state(value: Any, state: Any) -> Any:
    """The value after the instruction that gives it attributes."""
    if isinstance(value, PickledObject):
        _need(
            isinstance(state, dict), f"the attributes of a {value.class_name} are a {type(state).__name__}, not a dict"
        )
        value.state = state
        return value
    if type(value) is dict:  # attributes of an OrderedDict: the metadata of a state dictionary
        return value
    if isinstance(value, _ArrayType):
        _need(isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="), "no byte order")
        value.dtype = value.dtype.newbyteorder(state[1])
        return value
    if isinstance(value, _Unfilled):
        _need(isinstance(state, tuple) and len(state) == 5, "an array without contents")
        _, shape, dtype, is_fortran, raw = state
        return _array(raw, dtype, shape, "F" if is_fortran else "C")
    raise _Error(f"it changes a {type(value).__name__}")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = set(
    "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)


def read_pickle(
    file: "_Bytes",
    calls: dict[tuple[str, str], Callable[..., Any]],
    size: int,
    storage: Callable[[Any], torch.Tensor] | None = None,
) -> Any:
    """
    The value of one pickle, from where a file stands to the pickle's end.

    Args:
        file: of which it is a part.
        calls: what may be called.
        size: bytes of the whole file, with the storages outside the pickle.
        storage: gives the tensor's storage for a "persistent id" of PyTorch's.

    Raises:
        Exception: of nearly any type, for what is no pickle, or not of plain content.
    """
    limit, made = MAX_GROWTH * size + 2**20, 0
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def name(module: Any, name: Any) -> Any:
        _need(type(module) is str and type(name) is str, "a name that is no text")  # before it is hashed or shown
        if (module, name) in calls:
            return _Name(module, name)
        if (module, name) in _ARGUMENTS:
            return _ARGUMENTS[module, name]
        raise _Error(
            f"it holds more than tensors, arrays and plain containers: loading it would use "
            f"{module[:99]}.{name[:99]}. That is refused, because it can run any code"
        )

    def allow(value: Any) -> None:
        nonlocal made
        made += _bytes_of(value)
        _need(made <= limit, f"it stands for more than {limit:,} bytes, {MAX_GROWTH} times its own size")

    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        _need(count < MAX_INSTRUCTIONS, f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        op = instruction.name
        if op == "MEMOIZE":
            op, argument = "BINPUT", len(memo)
        if op in _VALUES:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            if isinstance(stack[-1], _Unfilled):
                stack[-1].places.append(argument)
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}[op]())
        elif op in ("TUPLE", "FROZENSET"):
            items = since_mark()
            stack.append(tuple(items) if op == "TUPLE" else frozenset(map(_key, items)))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(op[-1])
            _need(len(stack) >= length, "a tuple of nothing")
            stack[-length:] = [tuple(stack[-length:])]
        elif op in ("APPEND", "APPENDS"):
            items = since_mark() if op == "APPENDS" else [stack.pop()]
            _need(type(stack[-1]) is list, f"it appends to a {type(stack[-1]).__name__}")
            stack[-1] += items
        elif op in ("SETITEM", "SETITEMS"):
            items = since_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _need(type(stack[-1]) is dict and len(items) % 2 == 0, f"it sets items of a {type(stack[-1]).__name__}")
            stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif op == "ADDITEMS":
            items = since_mark()
            _need(type(stack[-1]) is set, f"it adds to a {type(stack[-1]).__name__}")
            stack[-1].update(map(_key, items))
        elif op == "GLOBAL":
            stack.append(name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            stack[-2:] = [name(*stack[-2:])]
        elif op in ("REDUCE", "NEWOBJ"):
            function, arguments = stack[-2:]
            _need(isinstance(function, _Name) and function in calls, f"it calls a {type(function).__name__}")
            _need(type(arguments) is tuple, f"{function} with a {type(arguments).__name__} of arguments")
            stack[-2:] = [calls[function](*arguments)]
            allow(stack[-1])
        elif op == "BUILD":
            state, old = stack.pop(), stack[-1]
            new = stack[-1] = _with_state(old, state)
            if isinstance(old, _Unfilled):
                memo.update(dict.fromkeys(old.places, new))
                allow(new)
        elif op == "BINPERSID":
            _need(storage is not None, "it refers to something outside itself")
            stack.append(storage(stack.pop()))
        elif op == "STOP":
            (value,) = stack
            _check_extent(value)
            return value
        elif op == "PROTO":
            _need(argument <= 5, f"its protocol is {argument}")
        elif op != "FRAME":
            raise _Error(f"it uses the instruction {op}, which no checkpoint needs")
    raise _Error("it has no end")


def _bytes_of(value: Any) -> int:
    """About how much memory the result of a call takes."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return 64 + value.nbytes
    return (
        64 * (1 + len(value))
        if isinstance(value, (dict, set, tuple))
        else len(value)
        if isinstance(value, bytes)
        else 0
    )


def _check_extent(value: Any) -> None:
    """Refuses containers that are nested too deep, or in themselves, or that stand for too many values: lists that share
    one another forty deep are a hundred bytes, and 2⁴⁰ values to whoever goes through them.
    """
    known: dict[int, int] = {}

    def extent(value: Any, depth: int) -> int:
        value = value.state if isinstance(value, PickledObject) else value
        _need(not isinstance(value, (_Name, _ArrayType, _Unfilled)), "it holds a part of a call by itself")
        if not isinstance(value, (dict, list, tuple)):
            return 1
        if id(value) not in known:
            _need(
                depth < MAX_DEPTH,
                f"its containers are nested in each other more than {MAX_DEPTH} deep, or in themselves",
            )
            items: Iterable[Any] = value.values() if isinstance(value, dict) else value
            known[id(value)] = 1 + sum([extent(item, depth + 1) for item in items])
            _need(known[id(value)] < MAX_VALUES, f"it stands for more than {MAX_VALUES:,} values")
        return known[id(value)]

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
            raise _Error(f"a storage of {size:,} bytes, of which the file does not have enough")
        return torch.frombuffer(self.data, dtype=dtype, count=size // dtype.itemsize, offset=place) if size else (
            torch.empty(0, dtype=dtype)
        )  # fmt: skip


def _read_torch(data: memoryview, calls: dict[tuple[str, str], Callable[..., Any]]) -> Any:
    """What a file of `torch.save` holds, in the format of today (zip) or the one before it."""
    return (_read_zip if data[:2] == b"PK" else _read_legacy)(_Bytes(data), calls)


def _storage_id(value: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and number of values of a storage."""
    _need(type(value) is tuple and len(value) >= 5 and value[0] == "storage", f"the reference {shown(value)}")
    kind, key, count = value[1], value[2], value[4]
    _need(isinstance(kind, _Name) and isinstance(key, str) and type(count) is int and count >= 0, "a crooked storage")
    return _STORAGES[kind.name], key, count


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


def _read_zip(file: _Bytes, calls: dict[tuple[str, str], Callable[..., Any]]) -> Any:
    """PyTorch stores its records uncompressed, so that a record is a part of the file; nothing is ever unpacked."""
    with zipfile.ZipFile(_View(file.data)) as archive:
        records = {record.filename: record for record in archive.infolist()}
    names = [name for name in records if name.split("/")[1:] == ["data.pkl"]]
    _need(len(names) == 1, "it is an archive, but not one of PyTorch's")
    root = names[0].split("/")[0]

    def part(name: str) -> tuple[int, int]:
        record = records.get(name)
        _need(record is not None, f"its record {name!r} is missing")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > len(file.data):
            raise _Error(f"its record {name!r} of {record.compress_size:,} bytes would unpack to {record.file_size:,}")
        header = file.data[record.header_offset : record.header_offset + 30]
        return record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])), record.file_size

    if f"{root}/byteorder" in records:
        start, size = part(f"{root}/byteorder")
        _need(bytes(file.data[start : start + size]) == b"little", "its numbers are in another byte order")

    def storage(value: Any) -> torch.Tensor:
        dtype, key, count = _storage_id(value)
        start, size = part(f"{root}/data/{key}")
        _need(size == count * dtype.itemsize, f"a storage of {count} values with {size} bytes")
        return file.storage(dtype, start, size)

    start, size = part(names[0])
    return read_pickle(_Bytes(file.data[start : start + size]), calls, len(file.data), storage)


def _read_legacy(file: _Bytes, calls: dict[tuple[str, str], Callable[..., Any]]) -> Any:
    """Three pickles of its version, the content, the keys of its storages, then their bytes."""
    length = len(file.data)
    magic, version, system = (read_pickle(file, {}, length) for _ in range(3))
    if magic != torch.serialization.MAGIC_NUMBER or version != torch.serialization.PROTOCOL_VERSION:
        raise _Error("it is no file of torch.save")
    _need(isinstance(system, dict) and system.get("little_endian") is True, "its numbers are in another byte order")
    storages: dict[str, torch.Tensor] = {}
    free = length

    def storage(value: Any) -> torch.Tensor:
        nonlocal free
        dtype, key, count = _storage_id(value)
        if key not in storages:
            free -= count * dtype.itemsize
            _need(free >= 0, f"a storage of {count:,} values, more than the file has")
            storages[key] = torch.empty(count, dtype=dtype)  # filled below
        _need((storages[key].dtype, len(storages[key])) == (dtype, count), f"two storages of the key {shown(key)}")
        return storages[key]

    content = read_pickle(file, calls, length, storage)
    keys = read_pickle(file, {}, length)
    _need(isinstance(keys, list) and sorted(map(str, keys)) == sorted(storages), "storages without bytes")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        _need(count == len(storages[key]), f"a storage of {len(storages[key])} values with {count}")
        storages[key].copy_(file.storage(storages[key].dtype, file.place, storages[key].nbytes))
        file.place += storages[key].nbytes
    return content


def _mapped(path: Path) -> memoryview:
    """A file's bytes, read from the disk where they are looked at; changes of tensors stay in memory."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines()[:1] or [type(error).__name__])[0].rstrip(".")


def read_torch_file(path: Path) -> Any:
    """
    What `torch.save` wrote: tensors in plain containers, with records for objects such as an `argparse.Namespace`.

    Raises:
        Exception: of nearly any type, for another file, or a hostile one.
    """
    return _read_torch(_mapped(path), _CALLS)


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
        raise InputError(f"There is no pickle file {path}.")
    try:
        file = _Bytes(_mapped(path))
        return read_pickle(file, _CALLS, len(file.data))
    except Exception as error:  # a file that is no pickle, or a hostile one, fails in any of the ways that a parser can
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a pickle: {reason_of(error)}. "
            "If it was cut short, it is smaller than the original."
        ) from error
