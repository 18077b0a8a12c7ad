"""Files of tensors: reading safetensors, npz and PyTorch files, and checking names, shapes and values."""

import collections
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from larp_jax import files, npz
from larp_jax.errors import InputError
from larp_jax.files import parse_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NOTHING = "(?!)"  # as a regular expression: matches no name
SHOWN = 5  # names listed in a message


def read_safetensors(path: pathlib.Path, unread: str = NOTHING) -> dict[str, np.ndarray]:
    """Tensors of a file, memory-mapped.

    Args:
      path: the file.
      unread: a regular expression; tensors whose whole name matches are left out, even with other dtypes.

    Returns:
      Arrays by name: float32, float16 or bfloat16, as stored.

    Raises:
      InputError: the file is missing or invalid, or contains other dtypes.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # checks the header against the file
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size))
        header.pop("__metadata__", None)
        header = {name: entry for name, entry in header.items() if not re.fullmatch(unread, name)}
        wrong = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}
        # mapped directly, because safetensors does not return bfloat16 as NumPy arrays
        data = np.memmap(path, np.uint8, mode="r", offset=8 + size) if header else None
        tensors = {
            name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name not in wrong
        }
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a valid safetensors file ({one_line(error)}); download it again") from None
    if wrong:
        wrong = _some(f"{dtype} ({name})" for name, dtype in wrong.items())
        raise InputError(f"{path}: weights must be {', '.join(DTYPES)}, not {wrong}")
    return tensors


def read_npz(
    path: pathlib.Path, check: Callable[[dict[str, tuple]], None], unread: str = NOTHING
) -> dict[str, np.ndarray]:
    """Arrays of an npz file. Their shapes are checked before they are read.

    Args:
      path: the file.
      check: called with the shapes by name; raises InputError if they are wrong.
      unread: as for `read_safetensors`.

    Returns:
      Arrays by name, float32 or float16 as stored.

    Raises:
      InputError: the file is missing or invalid, or contains other dtypes.
    """
    fix = "download it again"
    found = {name: x for name, x in npz.headers(path, fix).items() if not re.fullmatch(unread, name)}
    wrong = [f"{x.dtype} ({name})" for name, x in found.items() if x.dtype not in DTYPES.values()]
    if wrong:
        raise InputError(f"{path}: weights must be {', '.join(DTYPES)}, not {_some(wrong)}")
    check({name: x.shape for name, x in found.items()})
    return npz.read(path, found, fix)


def read_pickled(path: pathlib.Path, otherwise: str) -> Any:
    """Reads a file of `torch.save`: tensors on the CPU in plain containers. Nothing in the file is executed.

    Args:
      path: the file.
      otherwise: what to give instead; the end of error messages.

    Raises:
      InputError: PyTorch is missing, or the file is not a PyTorch file or contains other objects.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"reading {path} as a PyTorch file needs PyTorch: pip install torch, or {otherwise}"
        ) from None
    # the released trainer also saves settings, read here as plain dictionaries, and NumPy's random state
    known = [(collections.OrderedDict, "easydict.EasyDict"), np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    known += [(np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(known), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # any error of the restricted unpickler on a malicious or broken file
        raise InputError(
            f"{path} is not a PyTorch file that can be read safely ({one_line(error)}); download it again, or"
            f" {otherwise}"
        ) from None


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy's reconstruction of arrays, and nothing else that could be called."""

    ADMITTED = {
        (module, name): value
        for core in ("numpy.core", "numpy._core")
        for module, name, value in (
            (f"{core}.multiarray", "_reconstruct", np._core.multiarray._reconstruct),
            ("numpy", "ndarray", np.ndarray),
            ("numpy", "dtype", np.dtype),
        )
    }

    def find_class(self, module, name):
        """The admitted object of that name; `UnpicklingError` for any other."""
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of an array")
        return self.ADMITTED[module, name]


def read_pickled_arrays(file: IO[bytes], path: pathlib.Path) -> dict[str, Any]:
    """Reads a pickle of NumPy arrays of floats in nested dictionaries. Nothing in it is executed.

    Args:
      file: the pickle, open.
      path: its file, for messages.

    Raises:
      InputError: it is not a pickle, or contains anything else.
    """

    def check(value):
        if isinstance(value, dict):
            for name, child in value.items():
                if not isinstance(name, str):
                    raise pickle.UnpicklingError(f"it has the key {name!r}, which is not a name")
                check(child)
        elif not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise pickle.UnpicklingError(f"it contains a {type(value).__name__} that is not an array of floats")

    try:
        found = _ArrayUnpickler(file).load()
        check(found)
        if not isinstance(found, dict):
            raise pickle.UnpicklingError("it contains no names")
    except OSError:
        raise
    except Exception as error:  # any error of the unpickler or of NumPy on a malicious or broken file
        raise InputError(f"{path} is not a file of arrays that can be read safely ({one_line(error)})") from None
    return found


def float_arrays(tensors: Mapping, path: pathlib.Path, unread: str = NOTHING) -> dict[str, np.ndarray]:
    """PyTorch tensors as arrays by name: float16 unchanged, other floats as float32.

    Args:
      tensors: from `read_pickled`.
      path: their file, for messages.
      unread: a regular expression; entries whose whole name matches are left out, even if they are not such tensors.

    Raises:
      InputError: an entry is not a tensor of floats.
    """
    import torch

    arrays = {}
    for name, tensor in tensors.items():
        if re.fullmatch(unread, str(name)):
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InputError(f"{path}: {name} must be a tensor of floats")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # an expanded tensor
            raise InputError(f"{path}: {name} claims more values than the file contains")
        tensor = tensor.detach()
        arrays[str(name)] = (tensor if tensor.dtype in (torch.float32, torch.float16) else tensor.float()).numpy()
    return arrays


def compare_shapes(expected: Mapping[str, tuple], shapes: Mapping[str, tuple], where: str) -> None:
    """Checks that names and shapes of tensors are exactly the expected ones.

    Args:
      expected: shapes by name.
      shapes: the shapes found, by name.
      where: the file, for messages.

    Raises:
      InputError: they differ; one line names the tensors that are missing, not expected or of the wrong shape.
    """
    complaints = []
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing:
        complaints.append(f"missing {_some(missing)}")
    if extra:
        complaints.append(f"not expected {_some(extra)}")
    common = sorted(expected.keys() & shapes.keys())
    wrong = [f"{k} {list(shapes[k])} for {list(expected[k])}" for k in common if shapes[k] != expected[k]]
    if wrong:
        complaints.append(f"of the wrong shape {_some(wrong)}")
    if complaints:
        raise InputError(f"the weights do not fit {where}: {'; '.join(complaints)}")


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises InputError if a value is NaN or infinite; `where` is the file, for the message."""
    bad = [name for name, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        raise InputError(f"the weights of {where} are damaged: not finite in {_some(bad)}; download them again")


def _some(names: Iterable[str]) -> str:
    """The first names in alphabetical order, and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def one_line(error: Exception) -> str:
    """The message of an error on one line, cut to 200 characters."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]  # PyTorch writes a long text before the reason
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def read_expected(
    source: str | os.PathLike,
    expected: Mapping[str, tuple[int, ...]],
    unread: str = NOTHING,
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """Tensors of a public file by name, checked to have exactly the expected names and shapes.

    Args:
      source: the file.
      expected: shapes by name.
      unread: a regular expression; tensors whose whole name matches are left out.
      prefix: prefix of the expected names, which may be missing in the file.
    """
    path = files.local_path(source, "--source or --heads")
    if not path.is_file():
        raise InputError(f"{path} is not a file")

    def named(tensors: Mapping[str, Any]) -> dict[str, Any]:
        missing = "" if any(name.startswith(prefix) for name in tensors) else prefix
        return {missing + name: x for name, x in tensors.items()}

    def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
        compare_shapes(expected, named(shapes), str(path))

    if path.suffix == ".npz":
        return named(read_npz(path, check, unread))
    tensors = read_safetensors(path, unread) if path.suffix == ".safetensors" else _unpickled(path, unread)
    check({name: x.shape for name, x in tensors.items()})
    return named(tensors)


def _unpickled(path: pathlib.Path, unread: str) -> dict[str, np.ndarray]:
    if _is_torchscript(path):
        raise InputError(
            f"{path} is a TorchScript archive; reading it would run its code. If you trust it, save its tensors:"
            f" torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
        )
    tensors = read_pickled(path, "give its tensors as .safetensors or .npz under the same names")
    if not isinstance(tensors, Mapping):
        raise InputError(f"{path} contains a {type(tensors).__name__}, not tensors by name; save a state_dict")
    return float_arrays(tensors, path, unread)


def _is_torchscript(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):  # older PyTorch files are not zip archives
        return False


def finished(params: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Copies of parameters as C-contiguous float32 arrays in memory, checked to be finite."""
    with np.errstate(over="ignore"):  # overflows become infinite and are rejected below
        params = {name: np.array(x, np.float32, order="C") for name, x in params.items()}
    check_finite(params, where)
    return params
