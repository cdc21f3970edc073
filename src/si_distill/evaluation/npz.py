"""Reads `.npz` files that somebody else may have written: arrays that are wanted, of a type and size known beforehand."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..conversion.pickles import reason_of
from ..errors import InputError

#: Ends the errors.
REMEDY = "Give another file, or make it again."
#: Types of numbers that torch computes with.
REAL = (np.floating, np.integer)
#: Limits of what a compressed array may unpack to: in bytes, and as a multiple of its size in the file; the larger applies.
UNPACKED_BYTES, UNPACKED_TIMES = 2**28, 64


class NpzFile:
    """The arrays of an open archive; what is wrong with one is a ValueError, whose text goes on a sentence."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive, self._size = archive, size

    @property
    def names(self) -> list[str]:
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def shape(self, name: str, dimensions: int, *kinds: type[np.generic]) -> tuple[int, ...]:
        """The shape of an array, which is not read.

        Args:
            name: of the array.
            dimensions: how many it must have.
            kinds: one of which its type must be, e.g. `np.floating`.

        Raises:
            ValueError: when it is something else, or its size is not that of its header.
        """
        record = self._archive.getinfo(f"{name}.npy")
        with self._archive.open(record) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            start = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} is a pickle, which is not opened (allow_pickle=False)")
        known = any(np.issubdtype(dtype, kind) for kind in kinds)
        # Torch has no numbers of more than eight bytes.
        if not known or len(shape) != dimensions or (dtype.kind != "U" and dtype.itemsize > 8):
            wanted = " or ".join(kind.__name__.strip("_") for kind in kinds)
            raise ValueError(f"it holds {name} of {dtype} {shape}, and {wanted} of {dimensions} dimensions is needed")
        if min(shape, default=0) < 0 or record.file_size - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the header of {name}, {dtype} {shape}, does not fit its {record.file_size:,} bytes")
        packed = min(record.compress_size, self._size)
        stored = record.compress_type == zipfile.ZIP_STORED
        if record.file_size > (packed if stored else max(UNPACKED_BYTES, UNPACKED_TIMES * packed)):
            raise ValueError(f"the {packed:,} bytes of {name} would unpack to {record.file_size:,}")
        return shape

    def read(self, name: str, dimensions: int, *kinds: type[np.generic]) -> np.ndarray:
        """An array, in the byte order of this machine; otherwise as `shape`."""
        self.shape(name, dimensions, *kinds)
        with self._archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # at the end, the checksum is compared
        return array.astype(array.dtype.newbyteorder("="), copy=False)


@contextmanager
def open_npz(path: Path, what: str) -> Iterator[NpzFile]:
    """Opens a file for the time of a `with`.

    Args:
        path: of a file.
        what: it should hold, for the error.

    Raises:
        InputError: when it cannot be read, also for errors in the `with`.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            yield NpzFile(archive, path.stat().st_size)
    except InputError:
        raise
    except Exception as error:  # a damaged file, or a hostile one, fails in any of the ways that a parser can
        raise InputError(f"Cannot read {what} from {path}: {reason_of(error)}. {REMEDY}") from error
