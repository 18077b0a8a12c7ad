"""Import of released PyTorch weights: a Hugging Face style directory or repository, or a checkpoint of their trainer.

Only the checkpoint needs PyTorch. No file is ever unpickled into arbitrary objects.
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from larp_jax import files, hub
from larp_jax.config import (
    GENERATOR_SIZES,
    FlowConfig,
    FlowRecipe,
    GeneratorConfig,
    GeneratorRecipe,
    SecondStageRecipe,
    TokenizerRecipe,
    differences,
    parse_recipe,
    to_dict,
)
from larp_jax.errors import InputError
from larp_jax.files import read_json
from larp_jax.hub import CONFIG, OURS, PRIOR_SIZES, WEIGHTS
from larp_jax.weights import released, released_config
from larp_jax.weights.tensors import (
    check_finite,
    compare_shapes,
    float_arrays,
    one_line,
    read_pickled,
    read_safetensors,
)

LAYOUT = f"the directory of a released model contains {CONFIG} and {WEIGHTS}"
UNREAD = r"bottleneck\.norm_layer\.num_batches_tracked"  # the step counter of the batch norm, an integer
INVERSE_TEMPERATURE = "bottleneck.regularizer.stochastic_temperature_inv"
BATCH_NORM_EPSILON = 1e-5  # PyTorch's default


# Settings of trained models that `config.json` has no field for; `larp_jax.json` next to it contains them.
BESIDE = ("model.frames_dropout", "cond_frames", "data.fps", "data.stride")


def settings_beside(recipe: TokenizerRecipe | SecondStageRecipe) -> dict[str, Any]:
    """The settings of `BESIDE` that are not at their defaults, by dotted name."""
    changed = differences(to_dict(type(recipe)()), to_dict(recipe))
    return {name: changed[name][1] for name in BESIDE if name in changed}


def read_model(
    source: str | os.PathLike, *, ema: bool = False
) -> tuple[TokenizerRecipe | SecondStageRecipe, dict, dict[str, Any]]:
    """Reads a released model, or one that `larp-jax export --format huggingface` wrote.

    Args:
      source: as for `import_huggingface`.
      ema: as for `import_huggingface`.

    Returns:
      Its recipe; its parameters as in `TrainState.params`; and what else is known: `step`, `code_counts`,
      `tokenizer_fingerprint`, `class_counts`, `class_names` and `latent_statistics` (`mean` and `std`), as in
      `larp_jax.weights.checkpoint.Checkpoint`.

    Raises:
      InputError: as for `import_huggingface`, or `larp_jax.json` is not one of that model.
    """
    path = located(source)
    _, config, params = import_huggingface(path, ema=ema)
    recipe = config
    if not isinstance(config, TokenizerRecipe):
        recipe = (FlowRecipe if isinstance(config, FlowConfig) else GeneratorRecipe)(model=config)
    if not (path / OURS).exists() and not isinstance(config, FlowConfig):
        return recipe, params, {}
    known = read_settings(path / OURS)
    values, settings = to_dict(recipe), known.pop("settings", {})
    sizes = {"code_counts": recipe.model.quantizer.codebook_size} if isinstance(recipe, TokenizerRecipe) else {}
    sizes |= {"class_counts": recipe.model.num_classes} if isinstance(recipe, SecondStageRecipe) else {}
    sizes |= {"latent_statistics": recipe.model.code_dim} if isinstance(recipe, FlowRecipe) else {}
    try:
        for name, value in settings.items():
            section, _, key = name.rpartition(".")
            if name not in BESIDE or key not in (held := values[section] if section else values):
                raise ValueError(f"{name} is not a setting of it")
            held[key] = value
        recipe = parse_recipe(values)
        _check_known(known, sizes)
        if isinstance(recipe, FlowRecipe) and "latent_statistics" not in known:
            raise ValueError("latent_statistics are missing")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / OURS} does not describe the model next to it ({one_line(error)})") from None
    return recipe, params, known


def _check_known(known: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises an error of any kind if an entry of `larp_jax.json` is not known, or of the wrong type or size."""
    for name, value in known.items():
        if name == "class_names":
            fine = isinstance(value, list) and all(isinstance(x, str) for x in value)
        elif name == "tokenizer_fingerprint":
            fine = isinstance(value, str)
        elif name == "latent_statistics":
            columns = [value[part] for part in ("mean", "std")]
            numbers = [x for column in columns for x in column if type(x) in (int, float) and math.isfinite(x)]
            fine = all(len(column) == sizes[name] for column in columns) and len(numbers) == 2 * sizes[name]
        else:
            numbers = [value] if name == "step" else value
            size = 1 if name == "step" else sizes[name]
            fine = len(numbers) == size and all(type(x) is int and 0 <= x < 2**63 for x in numbers)
        if not fine:
            raise ValueError(f"{name} is not what it should be")


def located(source: str | os.PathLike) -> pathlib.Path:
    """The folder or file of a source, downloaded if it is a repository."""
    path = files.readable(source, "--source")
    if path.exists():
        return path
    try:
        hub.parse(str(path), "--source")
    except InputError:
        raise InputError(f"{path} is neither a directory, a file nor a repository id like owner/name") from None
    return hub.download(str(path), "--source")


def import_huggingface(
    source: str | os.PathLike, *, ema: bool = False
) -> tuple[str, TokenizerRecipe | GeneratorConfig | FlowConfig, dict]:
    """Reads a released model.

    Args:
      source: a directory with `config.json` and `model.safetensors`; a `.pth` checkpoint of the released trainer; or a
        repository of the Hugging Face hub, `owner/name[@revision]` or `hf://owner/name[@revision]`.
      ema: whether to read the EMA weights of a `.pth` checkpoint (the slowest EMA, if there are several).

    Returns:
      `tokenizer` or `generator`; its configuration (a recipe, whose `loss.prior_weight` is 0 if there is no prior, or
      a `GeneratorConfig` or `FlowConfig`); and its parameters as in `TrainState.params`, float32 NumPy arrays.

    Raises:
      InputError: a setting or tensor is missing, unexpected, of the wrong shape or not supported.
    """
    path = located(source)
    if path.is_file():
        with files.fetched(path) as file:
            values, tensors, where = _read_checkpoint(file, ema)
        prior_sizes = None
    else:
        if ema:
            raise InputError(f"{path} contains only one set of weights, no EMA; leave out --ema")
        where = str(path / CONFIG)
        values = read_settings(path / CONFIG)
        if not (path / WEIGHTS).exists():
            raise InputError(f"{path / WEIGHTS} is missing; {LAYOUT}")
        with files.fetched(path / WEIGHTS) as file:
            tensors = read_safetensors(file, UNREAD)
        prior_sizes = read_settings(path / PRIOR_SIZES).get("prior", {}) if (path / PRIOR_SIZES).exists() else None
        if not isinstance(prior_sizes, Mapping | None):
            raise InputError(f'{path / PRIOR_SIZES} must contain {{"prior": {{...}}}}')

    values, tensors = _fold_constants(values, tensors, where)
    shapes = {name: x.shape for name, x in tensors.items()}
    config = released_config.config_from_released(values, shapes, prior_sizes=prior_sizes, where=where)
    items = released.model_tensors(config)
    _check_shapes(items, shapes, where)
    _check_values(items, tensors, where)
    kind = "tokenizer" if isinstance(config, TokenizerRecipe) else "generator"
    return kind, config, released.params_from_released(items, tensors)


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The object in config.json or a file next to it; `InputError` if it is missing or broken."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {LAYOUT}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({one_line(error)}); download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must contain an object of settings, not a {type(values).__name__}")
    return values


def _read_checkpoint(path: pathlib.Path, ema: bool) -> tuple[dict, dict[str, np.ndarray], str]:
    """Configuration, weights, and the name of the file for messages, from a checkpoint of the released trainer."""
    checkpoint = read_pickled(path, f"give a directory with {CONFIG} and {WEIGHTS}")

    def entry(holder, key, kind):
        if not isinstance(holder, Mapping) or not isinstance(holder.get(key), kind):
            raise InputError(f"{path} is not a checkpoint of the released trainer: it has no valid {key!r}")
        return holder[key]

    model = entry(checkpoint, "model", Mapping)
    name, values = entry(model, "name", str), dict(entry(model, "args", Mapping))
    weights = entry(model, "ema_sd" if ema else "sd", Mapping)
    if ema:
        weights = entry(weights, max(weights, default=None), Mapping)
    if name.startswith(released_config.GENERATOR_PREFIX):
        size = name.removeprefix(released_config.GENERATOR_PREFIX)
        if size not in GENERATOR_SIZES:
            raise InputError(f"{path}: model.name={name!r} is not one of {', '.join(GENERATOR_SIZES)}")
        values |= dict(zip(("dim", "n_layer", "n_head"), GENERATOR_SIZES[size], strict=True))
    return values, float_arrays(weights, path, UNREAD), str(path)


def _fold_constants(values: dict, tensors: dict, where: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Folds the batch norm into in_linear, and replaces a learned temperature by its value.

    Both are constants after training: batch norm uses the statistics in the file, and the temperature, which only
    scales the logits for sampling, never received a gradient.

    Returns:
      Settings and tensors of an equal tokenizer.
    """
    try:
        settings = {"norm": None} | values["bottleneck"]["args"]
        regularizer = settings["regularizer"] = settings["regularizer"] | {}
        arguments = regularizer["args"] = regularizer["args"] | {}
    except (KeyError, TypeError):
        return values, tensors  # the missing fields are reported later
    tensors = dict(tensors)
    if isinstance(settings["norm"], str) and settings["norm"].lower() == "bn_bn":
        settings["norm"] = "none"
        _fold_batch_norm(tensors, f"{where} (bottleneck.args.norm='bn_bn')")
    temperature = arguments.get("stochastic_temperature")
    samples = regularizer.get("name") == "vq" and arguments.get("stochastic") is True
    if samples and type(temperature) in (int, float) and temperature <= 0:
        inverse = tensors.pop(INVERSE_TEMPERATURE, None)
        if inverse is None or inverse.shape != () or not 0 < float(inverse) < np.inf:
            raise InputError(
                f"{where}: bottleneck.args.regularizer.args.stochastic_temperature={temperature!r} means a learned"
                f" temperature, but the weights have no positive number {INVERSE_TEMPERATURE}"
            )
        arguments["stochastic_temperature"] = 1.0 / float(inverse)
    return values | {"bottleneck": values["bottleneck"] | {"args": settings}}, tensors


def _fold_batch_norm(tensors: dict[str, np.ndarray], where: str) -> None:
    """Removes the batch norm from the tensors and folds it into in_linear."""
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
        raise InputError(f"{where}: {prefix}running_var is negative; download the weights again")
    scale = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    with np.errstate(over="ignore"):  # overflows become infinite, which is rejected later
        tensors[kernel] = (tensors[kernel] * scale[..., None]).astype(np.float32)
        tensors[bias] = ((tensors[bias] - mean) * scale + shift).astype(np.float32)


def _check_shapes(items: list, shapes: Mapping[str, tuple], where: str) -> None:
    # before creating the names: a configuration may ask for any number of layers
    count = sum(len(item.names) * max(1, item.layers) for item in items if isinstance(item, released.Parameter))
    if count > 2 * len(shapes) + 1000:
        raise InputError(f"the weights do not fit {where}: it needs {count} tensors, they have {len(shapes)}")
    compare_shapes(released.expected_shapes(items), shapes, where)


def _check_values(items: list, tensors: Mapping[str, np.ndarray], where: str) -> None:
    check_finite(tensors, where)
    for item in items:
        if isinstance(item, released.Table):
            stored = tensors[item.name]
            tolerance = max(1e-5, 4.0 * float(ml_dtypes.finfo(stored.dtype).eps))
            if np.abs(stored.astype(np.float32) - item.compute()).max() > tolerance:
                raise InputError(
                    f"{where}: {item.name} is not the sine-cosine table that its configuration implies; this"
                    " package does not implement that model"
                )
