"""Released PyTorch weights in: a Hugging Face style directory or repository, or a checkpoint of the authors' trainer.

PyTorch is needed only for the last, and no file is ever unpickled into arbitrary objects.
"""

import collections
import hashlib
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from larp_jax import files, npz
from larp_jax.config import GENERATOR_SIZES, GeneratorConfig, TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.files import parse_json, read_json
from larp_jax.weights import released

CONFIG, WEIGHTS, PRIOR_SIZES = "config.json", "model.safetensors", "prior.json"
LAYOUT = f"the directory of a released model holds {CONFIG} and {WEIGHTS}"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NOTHING = "(?!)"  # as a regular expression: matches no name
UNREAD = r"bottleneck\.norm_layer\.num_batches_tracked"  # batch norm's count of steps, an integer
INVERSE_TEMPERATURE = "bottleneck.regularizer.stochastic_temperature_inv"
BATCH_NORM_EPSILON = 1e-5  # of PyTorch
SHOWN = 5  # names listed of many that are wrong


def import_huggingface(
    source: str | os.PathLike, *, ema: bool = False
) -> tuple[str, TokenizerRecipe | GeneratorConfig, dict]:
    """Reads a released model.

    Args:
      source: a directory with `config.json` and `model.safetensors`; a `.pth` checkpoint of the authors' trainer; or a
        repository id `owner/name`, fetched through huggingface_hub.
      ema: takes the moving average out of a `.pth` checkpoint (the slowest, where there are several).

    Returns:
      `tokenizer` or `generator`; its configuration (a recipe whose `loss.prior_weight` is 0 where there is no prior, or
      a `GeneratorConfig`); and its parameters as in `TrainState.params`, float32 NumPy arrays.

    Raises:
      InputError: anything that is not exactly such a model: what is missing, extra, misshaped or not understood.
    """
    path = files.local_path(source, "--source")
    if path.is_file():
        values, tensors, where = _read_checkpoint(path, ema)
        prior_sizes = None
    else:
        if not path.is_dir():
            path = _download(str(path))
        if ema:
            raise InputError(f"{path} holds one set of weights, no moving average beside it; leave out the choice")
        where = str(path / CONFIG)
        values = _read_json(path / CONFIG)
        if not (path / WEIGHTS).exists():
            raise InputError(f"{path / WEIGHTS} is missing; {LAYOUT}")
        tensors = read_safetensors(path / WEIGHTS, UNREAD)
        prior_sizes = _read_json(path / PRIOR_SIZES).get("prior", {}) if (path / PRIOR_SIZES).exists() else None
        if not isinstance(prior_sizes, Mapping | None):
            raise InputError(f"{path / PRIOR_SIZES} must hold {{\"prior\": {{...}}}}")

    values, tensors = _fold_constants(values, tensors, where)
    shapes = {name: x.shape for name, x in tensors.items()}
    config = released.config_from_released(values, shapes, prior_sizes=prior_sizes, where=where)
    items = released.model_tensors(config)
    _check_shapes(items, shapes, where)
    _check_values(items, tensors, where)
    kind = "generator" if isinstance(config, GeneratorConfig) else "tokenizer"
    return kind, config, released.params_from_released(items, tensors)


def _download(repository: str) -> pathlib.Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{repository} is neither a directory, a file nor a repository id like owner/name")
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{repository} is no directory here, and fetching it as a repository needs huggingface_hub: pip install it,"
            f" or download {CONFIG} and {WEIGHTS} yourself and give their directory"
        ) from None
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of many kinds: no network, no such repository, no access
        raise InputError(
            f"{repository} is no directory here, and fetching it failed ({_one_line(error)}); check the name and the"
            f" network, or download {CONFIG} and {WEIGHTS} yourself and give their directory"
        ) from None
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            _check_download(folder / name)
    return folder


def _check_download(path: pathlib.Path) -> None:
    """Holds a file in the cache of huggingface_hub to the hash that the server gave it, which is its name there.

    It is the SHA-256 of large files, and what Git calls other ones.
    """
    stored = path.resolve()
    if len(stored.name) == 64:
        found = files.digest(stored)
    else:
        found = hashlib.sha1(b"blob %d\0" % stored.stat().st_size + stored.read_bytes()).hexdigest()
    if found != stored.name:
        raise InputError(f"{path} is not what its server has (its hash differs); remove {stored} and fetch it again")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {LAYOUT}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({_one_line(error)}); fetch it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold an object of settings, not a {type(values).__name__}")
    return values


def read_safetensors(path: pathlib.Path, unread: str = NOTHING) -> dict[str, np.ndarray]:
    """Tensors of a file, mapped from it rather than read.

    Args:
      path: the file.
      unread: a regular expression; tensors whose whole name matches are left out, whatever their dtype.

    Returns:
      Arrays by name: float32, float16 or bfloat16, as stored.

    Raises:
      InputError: the file is missing or broken, or holds other dtypes.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # checks that header and file fit each other
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size))
        header.pop("__metadata__", None)
        header = {name: entry for name, entry in header.items() if not re.fullmatch(unread, name)}
        wrong = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}
        # mapped by hand, because safetensors gives NumPy no bfloat16
        data = np.memmap(path, np.uint8, mode="r", offset=8 + size) if header else None
        tensors = {
            name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name not in wrong
        }
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a sound safetensors file ({_one_line(error)}); fetch it again") from None
    if wrong:
        wrong = _some(f"{dtype} ({name})" for name, dtype in wrong.items())
        raise InputError(f"{path}: weights must be {', '.join(DTYPES)}, not {wrong}")
    return tensors


def read_npz(
    path: pathlib.Path, check: Callable[[dict[str, tuple]], None], unread: str = NOTHING
) -> dict[str, np.ndarray]:
    """Arrays of an npz file, which are read only if they are of the shapes that they must have.

    Args:
      path: the file.
      check: called with the shapes by name; raises InputError where they are wrong.
      unread: as for `read_safetensors`.

    Returns:
      Arrays by name, float32 or float16 as stored.

    Raises:
      InputError: the file is missing or broken, or holds other dtypes.
    """
    mend = "fetch it again"
    found = {name: x for name, x in npz.headers(path, mend).items() if not re.fullmatch(unread, name)}
    wrong = [f"{x.dtype} ({name})" for name, x in found.items() if x.dtype not in DTYPES.values()]
    if wrong:
        raise InputError(f"{path}: weights must be {', '.join(DTYPES)}, not {_some(wrong)}")
    check({name: x.shape for name, x in found.items()})
    return npz.read(path, found, mend)


def read_pickled(path: pathlib.Path, otherwise: str) -> Any:
    """What `torch.save` wrote: tensors on the CPU in plain containers. Nothing in the file is executed.

    Args:
      path: the file.
      otherwise: ends the message of an error: what to give instead.

    Raises:
      InputError: PyTorch is missing, or the file is no such file or holds anything else.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} can only be a PyTorch file, which needs PyTorch to read: pip install torch, or {otherwise}"
        ) from None
    # what the authors' trainer saves beside tensors: settings, read as plain dictionaries, and NumPy's random state
    known = [(collections.OrderedDict, "easydict.EasyDict"), np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    known += [(np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(known), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a hostile or broken file provokes in the restricted unpickler
        raise InputError(
            f"{path} is not a PyTorch file that can be read safely ({_one_line(error)}); fetch it again, or {otherwise}"
        ) from None


def float_arrays(tensors: Mapping, path: pathlib.Path, unread: str = NOTHING) -> dict[str, np.ndarray]:
    """PyTorch tensors as arrays by name: float16 as it is, other floats as float32.

    Args:
      tensors: from `read_pickled`.
      path: of their file, for messages.
      unread: a regular expression; tensors whose whole name matches are left out, whatever they are.

    Raises:
      InputError: there are other things than tensors of floats.
    """
    import torch

    arrays = {}
    for name, tensor in tensors.items():
        if re.fullmatch(unread, str(name)):
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InputError(f"{path}: {name} must be a tensor of floats")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # one value, repeated
            raise InputError(f"{path}: {name} claims more values than the file holds")
        tensor = tensor.detach()
        arrays[str(name)] = (tensor if tensor.dtype in (torch.float32, torch.float16) else tensor.float()).numpy()
    return arrays


def _read_checkpoint(path: pathlib.Path, ema: bool) -> tuple[dict, dict[str, np.ndarray], str]:
    """Configuration, weights and what to call them, from a checkpoint of the authors' trainer."""
    checkpoint = read_pickled(path, f"give a directory with {CONFIG} and {WEIGHTS}")

    def entry(holder, key, kind):
        if not isinstance(holder, Mapping) or not isinstance(holder.get(key), kind):
            raise InputError(f"{path} is not a checkpoint of the authors' trainer: it has no {key!r} where one belongs")
        return holder[key]

    model = entry(checkpoint, "model", Mapping)
    name, values = entry(model, "name", str), dict(entry(model, "args", Mapping))
    weights = entry(model, "ema_sd" if ema else "sd", Mapping)
    if ema:
        weights = entry(weights, max(weights, default=None), Mapping)
    if name.startswith(released.GENERATOR_PREFIX):
        size = name.removeprefix(released.GENERATOR_PREFIX)
        if size not in GENERATOR_SIZES:
            raise InputError(f"{path}: model.name={name!r} is not one of {', '.join(GENERATOR_SIZES)}")
        values |= dict(zip(("dim", "n_layer", "n_head"), GENERATOR_SIZES[size], strict=True))
    return values, float_arrays(weights, path, UNREAD), str(path)


def _fold_constants(values: dict, tensors: dict, where: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Settings and tensors of the same tokenizer in which batch norm is part of in_linear, and a learned temperature a
    number.

    Both are constants: batch norm computes with the statistics in the file once it is trained, and no gradient ever
    reached the temperature, which only scales the logits of a draw.
    """
    try:
        settings = {"norm": None} | values["bottleneck"]["args"]
        regularizer = settings["regularizer"] = settings["regularizer"] | {}
        arguments = regularizer["args"] = regularizer["args"] | {}
    except (KeyError, TypeError):
        return values, tensors  # whatever it is, its fields will be missing
    tensors = dict(tensors)
    if isinstance(settings["norm"], str) and settings["norm"].lower() == "bn_bn":
        settings["norm"] = "none"
        _fold_batch_norm(tensors, f"{where} (bottleneck.args.norm='bn_bn')")
    temperature = arguments.get("stochastic_temperature")
    draws = regularizer.get("name") == "vq" and arguments.get("stochastic") is True
    if draws and type(temperature) in (int, float) and temperature <= 0:
        inverse = tensors.pop(INVERSE_TEMPERATURE, None)
        if inverse is None or inverse.shape != () or not 0 < float(inverse) < np.inf:
            raise InputError(
                f"{where}: bottleneck.args.regularizer.args.stochastic_temperature={temperature!r} stands for a learned"
                f" one, of which the weights hold no positive number {INVERSE_TEMPERATURE}"
            )
        arguments["stochastic_temperature"] = 1.0 / float(inverse)
    return values | {"bottleneck": values["bottleneck"] | {"args": settings}}, tensors


def _fold_batch_norm(tensors: dict[str, np.ndarray], where: str) -> None:
    """Takes the norm out of the tensors and changes in_linear for it."""
    prefix, kernel, bias = f"{released.BOTTLENECK_NORM}.", "bottleneck.in_linear.weight", "bottleneck.in_linear.bias"
    outputs = tensors[kernel].shape[:1] if kernel in tensors else ()
    expected = {prefix + name: outputs for name in ("weight", "bias", "running_mean", "running_var")}
    expected |= {bias: outputs, kernel: outputs + tensors[kernel].shape[1:2] if kernel in tensors else ()}
    found = {name: x.shape for name, x in tensors.items() if name.startswith(prefix) or name in expected}
    compare_shapes(expected, found, where)
    check_finite({name: tensors[name] for name in expected}, where)
    names = ("weight", "bias", "running_mean", "running_var")
    scale, shift, mean, variance = (tensors.pop(prefix + name).astype(np.float64) for name in names)
    if (variance < 0).any():
        raise InputError(f"{where}: {prefix}running_var is negative; fetch the weights again")
    scale = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        tensors[kernel] = (tensors[kernel] * scale[..., None]).astype(np.float32)
        tensors[bias] = ((tensors[bias] - mean) * scale + shift).astype(np.float32)


def _check_shapes(items: list, shapes: Mapping[str, tuple], where: str) -> None:
    # before the names are written out: a configuration may ask for any number of layers
    count = sum(len(item.names) * max(1, item.layers) for item in items if isinstance(item, released.Parameter))
    if count > 2 * len(shapes) + 1000:
        raise InputError(f"the weights do not fit {where}: it asks for {count} tensors, they are {len(shapes)}")
    compare_shapes(released.expected_shapes(items), shapes, where)


def compare_shapes(expected: Mapping[str, tuple], shapes: Mapping[str, tuple], where: str) -> None:
    """Holds tensors to the names and shapes that they must have, exactly.

    Args:
      expected: shapes by name.
      shapes: the same, found.
      where: what they were found in.

    Raises:
      InputError: says what is missing, not expected and of the wrong shape, all in one line.
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


def _check_values(items: list, tensors: Mapping[str, np.ndarray], where: str) -> None:
    check_finite(tensors, where)
    for item in items:
        if isinstance(item, released.Table):
            stored = tensors[item.name]
            tolerance = max(1e-5, 4.0 * float(ml_dtypes.finfo(stored.dtype).eps))
            if np.abs(stored.astype(np.float32) - item.compute()).max() > tolerance:
                raise InputError(
                    f"{where}: {item.name} is not the sine-cosine table that its configuration implies; such a model"
                    " computes something else than ours"
                )


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises InputError where a value is NaN or infinite; `where` says what the tensors were found in."""
    bad = [name for name, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        raise InputError(f"the weights of {where} are damaged: not finite in {_some(bad)}; fetch them again")


def _some(names: Iterable[str]) -> str:
    """The first few of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _one_line(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[2]  # PyTorch says much before the reason
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
