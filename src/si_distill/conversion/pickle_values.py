"""What a pickle may be made of: the calls that checkpoints consist of, as functions of ours that check every argument.

They build tensors, arrays, plain containers, or a record of an object's attributes (see `pickles`).
"""

import math
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError
from .shown import printable, shown

#: How many times larger than the file its tensors, arrays and containers may be together: weights are sometimes shared.
MAX_GROWTH = 8
#: Instructions, arguments and keys that may be handled; EDM2's largest files have 100,000 instructions.
MAX_WORK = 5_000_000
#: Items of a tuple that is a key.
MAX_KEY = 16
#: Letters of the names of the modules around a tensor, which are written anew for each tensor.
MAX_PREFIX = 300


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
        return f"PickledObject({self.class_name!r}, {shown(list(self.state))})"

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
                        f"{printable(f'{prefix}{name}')} in the pickle should be a tensor, but is a {type(value).__name__}."
                    )
                found[prefix + str(name)] = value
        for name, module in self._children("_modules", prefix):
            if not isinstance(module, PickledObject):
                raise InputError(
                    f"{printable(f'{prefix}{name}')} in the pickle should be a module, but is a {type(module).__name__}."
                )
            found |= module.tensors(f"{prefix}{name}.")
        return found

    def _children(self, kind: str, prefix: str) -> list[tuple[Any, Any]]:
        if len(prefix) > MAX_PREFIX:
            raise InputError(
                f"The name {printable(prefix, 40)!r} of a module in the pickle has {len(prefix):,} letters; up to "
                f"{MAX_PREFIX} are read. No network of EDM's has such names: use the original file."
            )
        children = self.state.get(kind)
        if not isinstance(children, dict):
            raise InputError(
                f"The object {prefix.rstrip('.') or self.class_name!r} in the pickle is no module: no {kind}."
            )
        return [(name, value) for name, value in children.items() if value is not None]


class Name(NamedTuple):
    """A name that the pickle mentions, such as `torch._utils._rebuild_tensor_v2`. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Unfilled:
    """An array between the instruction that makes it and the one that fills it; `places` are its numbers in the memo."""

    def __init__(self):
        self.places: list[int] = []


class ArrayType:
    """A type of NumPy's, which is given its byte order by a later instruction."""

    def __init__(self, name: str):
        self.dtype = np.dtype(name)


class PickleError(pickle.UnpicklingError):
    """What is wrong with a pickle."""


def need(condition: bool, problem: str) -> None:
    if not condition:
        raise PickleError(problem)


class Budget:
    """
    What the reading of a file may take in all, with the checkpoints that are in its bytes.

    Args:
        size: bytes of the file.
    """

    def __init__(self, size: int):
        self.limit, self.size, self.work = MAX_GROWTH * size + 2**20, 0, 0

    def take(self, size: int = 0, work: int = 0) -> None:
        """Before anything is made or done: bytes of memory, and how many things are handled."""
        self.size += size
        self.work += work
        if self.size > self.limit:
            raise PickleError(f"it stands for more than {self.limit:,} bytes, {MAX_GROWTH} times its own size")
        if self.work > MAX_WORK:
            raise PickleError(f"it takes more than {MAX_WORK:,} steps to read")

    def take_call(self, arguments: tuple) -> None:
        """Of a call, which makes at most copies of its arguments; tensors it does not copy."""
        self.take(0, len(arguments))
        for value in arguments:
            if isinstance(value, (str, bytes)):
                self.take(len(value))
            elif isinstance(value, (list, tuple)):
                self.take(64 * len(value), len(value))

    def keys(self, keys: Sequence[Any], held: int = 0) -> Sequence[Any]:
        """
        Keys of a dict or members of a set, checked before they are hashed: to hash a tuple that is nested 200,000 deep
        ends the process.

        Args:
            keys: they are returned.
            held: how many the dict or set has already.
        """
        letters = numbers = 0
        for key in keys:
            parts = key if type(key) is tuple else (key,)
            if len(parts) > MAX_KEY:
                raise PickleError(f"a tuple of {len(parts):,} items as a key")
            for part in parts:
                if isinstance(part, (str, bytes)):
                    letters += len(part)
                elif type(part) is int and not -(2**63) <= part < 2**63:
                    raise PickleError("a number of more than 64 bits as a key")  # multiples of 2⁶¹ − 1 have one hash
                elif not isinstance(part, (int, float, type(None))):
                    raise PickleError(f"a {type(part).__name__} as a key")
            numbers += not isinstance(key, (str, bytes))
        # Text is compared letter by letter. Hashes of text are random, but numbers and tuples of them can be chosen so that
        # each meets all others.
        self.take(0, len(keys) + letters // 1000 + numbers * (held + len(keys)) // 1000)
        return keys


# Storages and tensors of PyTorch. A storage is a one-dimensional tensor.

STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in dict(
        Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
        Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
        ComplexDouble=torch.complex128, ComplexFloat=torch.complex64, Untyped=torch.uint8,
    ).items()
}  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    need(torch.is_tensor(storage) and storage.ndim == 1, f"a tensor on a {type(storage).__name__}, not a storage")
    need(isinstance(size, tuple) and isinstance(stride, tuple), "a tensor without shape")
    need(len(size) == len(stride) <= 64, f"a tensor of {len(size)} axes with {len(stride)} strides")
    numbers = (offset, *size, *stride)
    need(
        all(type(number) is int and 0 <= number < 2**62 for number in numbers),
        f"a tensor with the places {shown(numbers)}",
    )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
    # More values than the storage has would be the same ones over again: a few bytes that grow without bound when copied.
    if last >= len(storage) or math.prod(size) > len(storage):
        raise PickleError(f"a tensor of shape {shown(size)} that reaches past its {len(storage)} values")
    return storage.as_strided(size, stride, offset)


def _tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    need(torch.is_tensor(storage) and isinstance(dtype, torch.dtype), "a tensor without a storage or type")
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(data: Any, *_: Any) -> torch.Tensor:
    need(torch.is_tensor(data), f"a parameter that is a {type(data).__name__}")
    return data


# Arrays and numbers of NumPy.

_ARRAY_TYPES = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()


def _array_type(name: Any, *_: Any) -> ArrayType:
    # Numbers of fixed width: no objects, whose bytes would be pointers, and no structures that hold them.
    need(name in _ARRAY_TYPES, f"the array type {shown(name)} is not one of numbers")
    return ArrayType(name)


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    need(isinstance(dtype, ArrayType) and isinstance(raw, bytes), "an array without a type or without bytes")
    need(isinstance(shape, tuple) and all(type(n) is int for n in shape), f"an array of shape {shown(shape)}")
    need(order in ("C", "F"), f"an array in the order {shown(order)}")
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="), order)


def _new_array(*_: Any) -> Unfilled:
    return Unfilled()  # not memory of the size that the pickle names, which nobody wrote


def _number(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, ()).item()


# Plain containers and records.


def make_dict(budget: Budget, items: Any = (), *_: Any) -> dict:
    need(isinstance(items, (list, tuple)), f"a dict of a {type(items).__name__}")
    need(all(isinstance(item, (list, tuple)) and len(item) == 2 for item in items), "a dict of what are no pairs")
    return dict(zip(budget.keys([key for key, _ in items]), [value for _, value in items], strict=True))


def make_set(budget: Budget, items: Any = ()) -> set:
    need(isinstance(items, (list, tuple)), f"a set of a {type(items).__name__}")
    return set(budget.keys(items))


def _bytes(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    need(isinstance(text, str) and encoding == "latin1", f"bytes in the encoding {shown(encoding)}")
    return text.encode("latin1")


def _size(size: Any) -> tuple:
    need(type(size) in (list, tuple), f"a size that is a {type(size).__name__}")
    return tuple(size)


def _device(kind: Any, *index: Any) -> str:
    need(type(kind) is str and all(type(number) is int for number in index), "a device without a name")
    name = ":".join(map(str, (kind, *index)))
    # The name of a device is text, which could be that of a device again, twice as long each time.
    need(re.fullmatch("[a-z_0-9]{1,20}(:[0-9]{1,5})?", name) is not None, f"the device {shown(name)}")
    return name


def _persistent_object(meta: Any) -> PickledObject:
    """An object of EDM's `torch_utils.persistence`; the source code in `meta` is not looked at."""
    name, state = (meta.get("class_name"), meta.get("state")) if isinstance(meta, dict) else (None, None)
    named = isinstance(name, str) and len(name) < 100 and name.isidentifier()
    need(named, "a persistent object without the name of its class")
    need(isinstance(state, dict), f"the attributes of a {name} are a {type(state).__name__}, not a dict")
    return PickledObject(name, state)


def _record(class_name: str) -> Callable[[], PickledObject]:
    """Of a class that is made without arguments and then given its attributes."""
    return lambda: PickledObject(class_name)


TENSOR_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): make_dict,
}
CALLS = {
    **TENSOR_CALLS,
    ("torch.nn.modules.container", "ModuleDict"): _record("ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"): _record("ModuleList"),
    ("torch.nn.modules.container", "Sequential"): _record("Sequential"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("dnnlib.util", "EasyDict"): make_dict,  # a dict with attribute access
    ("argparse", "Namespace"): _record("Namespace"),
    ("builtins", "set"): make_set,
    ("builtins", "getattr"): lambda *_: None,  # a hook, pickled as a method of its module; it is left out
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _array_type,
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    CALLS |= {
        (f"{_numpy}.multiarray", "_reconstruct"): _new_array,
        (f"{_numpy}.multiarray", "scalar"): _number,
        (f"{_numpy}.numeric", "_frombuffer"): _array,
    }
#: Names that are arguments of these calls, and what each stands for.
ARGUMENTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{(module, name): Name(module, name) for name in STORAGES for module in ("torch", "torch.storage")},
}


def with_state(value: Any, state: Any) -> Any:
    """The value after the instruction that gives it attributes."""
    if isinstance(value, PickledObject):
        need(
            isinstance(state, dict), f"the attributes of a {value.class_name} are a {type(state).__name__}, not a dict"
        )
        value.state = state
        return value
    if type(value) is dict:  # attributes of an OrderedDict: the metadata of a state dictionary
        return value
    if isinstance(value, ArrayType):
        need(isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="), "no byte order")
        value.dtype = value.dtype.newbyteorder(state[1])
        return value
    if isinstance(value, Unfilled):
        need(isinstance(state, tuple) and len(state) == 5, "an array without contents")
        _, shape, dtype, is_fortran, raw = state
        return _array(raw, dtype, shape, "F" if is_fortran else "C")
    raise PickleError(f"it changes a {type(value).__name__}")
