"""Arrays out of npz files: what a file claims is held to what belongs there before any memory is taken for it."""

import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from larp_jax.errors import InputError, reason

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Array(NamedTuple):
    """What an array is.

    Attributes:
      dtype: anything that `np.dtype` takes.
      shape: its sides; where one is expected, None stands for any length.
    """

    dtype: Any
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype)} [{', '.join('n' if side is None else str(side) for side in self.shape)}]"


def headers(path: str | os.PathLike, mend: str) -> dict[str, Array]:
    """What each array of a file claims to be, by name.

    Args:
      path: the file.
      mend: ends the message of an error: what to do about it.

    Raises:
      InputError: the file is missing, or no sound npz file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = _header(member)
            return found
    except Exception as error:  # whatever a broken archive provokes in zipfile, zlib and NumPy
        raise _refusal(path, error, mend) from None


def read(path: str | os.PathLike, expected: Mapping[str, Array], mend: str) -> dict[str, np.ndarray]:
    """Arrays of a file by name, exactly as expected; others in it are not looked at.

    An array with a side of any length must lie there uncompressed, so that it takes no more memory than the file.

    Args:
      path: the file.
      expected: dtypes and shapes by name.
      mend: ends the message of an error: what to do about it.

    Raises:
      InputError: the file is missing, no sound npz file, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for name, wanted in expected.items():
                stored = archive.getinfo(f"{name}.npy")
                with archive.open(stored) as member:
                    found = _header(member)
                if not _fits(found, wanted):
                    raise InputError(f"{path} holds {found} where {wanted} belongs; {mend}")
                size = math.prod(found.shape) * found.dtype.itemsize
                if None in wanted.shape and size > stored.compress_size:
                    raise ValueError(f"{name} claims {size} bytes, and has {stored.compress_size}")
                with archive.open(stored) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):
                        raise ValueError(f"{name} is longer than its header says")
            return arrays
    except InputError:
        raise
    except Exception as error:  # whatever a broken archive provokes in zipfile, zlib and NumPy
        raise _refusal(path, error, mend) from None


def _header(member: BinaryIO) -> Array:
    shape, _, dtype = _READ_HEADER[np.lib.format.read_magic(member)](member)
    return Array(dtype, shape)


def _fits(found: Array, wanted: Array) -> bool:
    if found.dtype != np.dtype(wanted.dtype) or len(found.shape) != len(wanted.shape):
        return False
    return all(side is None or side == other for side, other in zip(wanted.shape, found.shape, strict=True))


def _refusal(path: str | os.PathLike, error: Exception, mend: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing; {mend}")
    return InputError(f"{path} is damaged ({reason(error)}); {mend}")
