"""Reading of npz files that may be damaged: headers are checked before memory is allocated for the arrays."""

import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from larp_jax.errors import InputError, reason
from larp_jax.files import fetched

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Array(NamedTuple):
    """Dtype and shape of an array.

    Attributes:
      dtype: anything that `np.dtype` accepts.
      shape: lengths of the axes; in an expected shape, None matches any length.
    """

    dtype: Any
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype)} [{', '.join('n' if side is None else str(side) for side in self.shape)}]"


def headers(path: str | os.PathLike, fix: str) -> dict[str, Array]:
    """Dtype and shape of each array of a file, by name, as given in its header.

    Args:
      path: the file.
      fix: end of error messages: how to fix the problem.

    Raises:
      InputError: the file is missing or is not a valid npz file.
    """
    try:
        with fetched(path) as file, zipfile.ZipFile(file) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = header(member)
            return found
    except Exception as error:  # any error from zipfile, zlib or NumPy on a broken archive
        raise _refusal(path, error, fix) from None


def read(path: str | os.PathLike, expected: Mapping[str, Array], fix: str) -> dict[str, np.ndarray]:
    """Reads the expected arrays of a file; other arrays in it are ignored.

    An array with an axis of any length must be stored uncompressed, so that it needs no more memory than the file.

    Args:
      path: the file.
      expected: dtypes and shapes by name.
      fix: end of error messages: how to fix the problem.

    Raises:
      InputError: the file is missing, is not a valid npz file, or has other dtypes or shapes.
    """
    try:
        with fetched(path) as file, zipfile.ZipFile(file) as archive:
            arrays = {}
            for name, wanted in expected.items():
                stored = archive.getinfo(f"{name}.npy")
                with archive.open(stored) as member:
                    found = header(member)
                if not _fits(found, wanted):
                    raise InputError(f"{path} contains {found} instead of {wanted}; {fix}")
                size = math.prod(found.shape) * found.dtype.itemsize
                if None in wanted.shape and size > stored.compress_size:
                    raise ValueError(f"{name} has {stored.compress_size} bytes, but {size} according to its header")
                with archive.open(stored) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):
                        raise ValueError(f"{name} is longer than its header states")
            return arrays
    except InputError:
        raise
    except Exception as error:  # any error from zipfile, zlib or NumPy on a broken archive
        raise _refusal(path, error, fix) from None


def header(member: BinaryIO) -> Array:
    """Dtype and shape of an array, from the header at the beginning of its npy file; any error if it has none."""
    shape, _, dtype = _READ_HEADER[np.lib.format.read_magic(member)](member)
    return Array(dtype, shape)


def _fits(found: Array, wanted: Array) -> bool:
    if found.dtype != np.dtype(wanted.dtype) or len(found.shape) != len(wanted.shape):
        return False
    return all(side is None or side == other for side, other in zip(wanted.shape, found.shape, strict=True))


def _refusal(path: str | os.PathLike, error: Exception, fix: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing; {fix}")
    return InputError(f"{path} is damaged ({reason(error)}); {fix}")
