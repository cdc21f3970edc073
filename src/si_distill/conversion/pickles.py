"""Reading of pickles without running anything that is in them.

Checkpoints of EDM, EDM2, SiD and SiDA, and EDM2's reference statistics, are Python pickles. A pickle is a program: it names
functions and calls them, and EDM's also carry the source code of their classes. Here the names that it may use are a short
list, and each stands for something of ours that checks its arguments and builds only tensors, arrays, plain containers, or a
record of an object's attributes. Names that a pickle needs only as arguments cannot be called. Any other name is an error.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError


class PickledObject:
    """
    What a pickle says about an object whose class is not ours to run.

    Args:
        class_name: the name of the class.
        state: the object's attributes; for a `torch.nn.Module` among others `_parameters`, `_buffers` and `_modules`.
    """

    class_name: str
    state: dict[str, Any] = {}

    def __init__(self, class_name: str, state: dict[str, Any]):
        self.class_name = class_name
        self.__setstate__(state)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(
                f"the attributes of a {self.class_name} are a {type(state).__name__}, not a dict"
            )
        self.state = state

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


# PyTorch's own containers are pickled by their class, which is made without arguments and then given its attributes.
class _ModuleDict(PickledObject):
    class_name = "ModuleDict"


class _ModuleList(PickledObject):
    class_name = "ModuleList"


class _Sequential(PickledObject):
    class_name = "Sequential"


class _Function:
    """A function that a pickle may call, and cannot change: with slots and `__setstate__` it takes no attributes."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to change a function")


class _Name:
    """A name that a pickle uses only as an argument: it can be neither called nor changed."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to change a name")


class _DType:
    """A NumPy dtype of numbers, truth values or text; its byte order arrives as state."""

    def __init__(self, name: Any, *_: Any):
        # Numbers of fixed width and texts: no Python objects, no structures.
        if not isinstance(name, str) or name[:1] not in "biufcSU" or not name[1:].isdigit():
            raise pickle.UnpicklingError(f"the array type {name!r} is not one of numbers or text")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"{order!r} is no byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """A NumPy array that is empty until its contents arrive as state. No pickle can name it: only `_reconstruct` makes one,
    since a shape and a type of the pickle's choice would give memory that was never written, or forged objects.
    """

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        array = _array(raw, dtype, shape, "F" if is_fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, bool(is_fortran), array.tobytes("F" if is_fortran else "C")))


def _plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """The same with arrays of NumPy's own class. What is shared stays shared: containers nested in themselves forty deep
    would otherwise fill the memory.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    plain = value
    if isinstance(value, _Array):
        plain = value.view(np.ndarray)
    elif isinstance(value, dict):
        plain = {key: _plain(item, done) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        plain = type(value)(_plain(item, done) for item in value)
    elif isinstance(value, PickledObject):
        value.state = _plain(value.state, done)
    done[id(value)] = plain
    return plain


def _array(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array without a type or without bytes")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order).copy(order)


def _scalar(dtype: _DType, raw: bytes) -> Any:
    return _array(raw, dtype, ()).item()


def _persistent_object(meta: dict[str, Any]) -> PickledObject:
    """An object of EDM's `torch_utils.persistence`; the source code in `meta` is not looked at."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise pickle.UnpicklingError("a persistent object without the name of its class")
    return PickledObject(meta["class_name"], meta.get("state"))


def _storage(data: bytes) -> Any:
    """The bytes of a tensor are a checkpoint of their own: a pickle in the pickle, which torch reads with its own list."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a storage without bytes")
    check_archive(io.BytesIO(data))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_archive(file: Any) -> None:
    """Refuses a zip archive that declares more than it can hold: PyTorch stores its records without compression.

    Args:
        file: opened for reading in binary mode; anything else than a zip archive passes.

    Raises:
        ValueError: for one whose records together are much larger than the file.
    """
    size = file.seek(0, io.SEEK_END)
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        declared = sum(record.file_size for record in archive.infolist())
    if declared > 2 * size + 2**20:
        raise ValueError(f"it is an archive of {size:,} bytes that would unpack to {declared:,}")


def _set(items: Any = ()) -> set:
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError(f"a set of a {type(items).__name__}")
    return set(items)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor on a {type(storage).__name__} instead of a storage")
    data = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
    if offset < 0 or min((*size, *stride), default=0) < 0 or last >= len(data):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} that reaches past its {len(data)} values")
    return data.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "set"): _Function(_set),
    ("builtins", "getattr"): _Function(lambda *_: None),  # a hook, pickled as a method of its module; it is left out
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): dict,  # a dict with attribute access
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_persistent_object),
    ("torch.storage", "_load_from_bytes"): _Function(_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("torch.nn.modules.container", "ModuleList"): _ModuleList,
    ("torch.nn.modules.container", "Sequential"): _Sequential,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Name(),
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ALLOWED |= {
        (f"{_numpy}.multiarray", "_reconstruct"): _Function(lambda *_: np.empty(0).view(_Array)),
        (f"{_numpy}.multiarray", "scalar"): _Function(_scalar),
        (f"{_numpy}.numeric", "_frombuffer"): _Function(_array),
    }


class _PlainUnpickler(pickle.Unpickler):
    """Python's own machine with a list of names (https://docs.python.org/3/library/pickle.html#restricting-globals)."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it holds more than tensors, arrays and plain containers: loading it would use {module}.{name}. That is "
                "refused, because it can run any code"
            ) from None


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
        with path.open("rb") as file:
            return _plain(_PlainUnpickler(file).load())
    except Exception as error:  # a file that is no pickle, or a hostile one, fails in any of the ways that a parser can
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a pickle: {reason[0].rstrip('.')}. "
            "If it was cut short, it is smaller than the original."
        ) from error
