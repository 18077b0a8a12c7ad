"""Recipes of the command line: the file of `--config` and the settings that change it."""

import argparse
import functools
import math
import os
import pathlib
import runpy
import traceback
from collections.abc import Sequence

from larp_jax.errors import InputError, reason

EXPERIMENTS = "configs/experiments"


def load_recipe(arguments: argparse.Namespace):
    """The recipe in the file of `--config`, with the settings of `overrides` applied.

    Raises:
      InputError: the file, its recipe or a setting is wrong.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    from larp_jax.config import parse_recipe, take_sizes

    config = _from_file(arguments.config, "--config", "a recipe such as configs/quickstart.py")
    if not isinstance(config, ConfigDict):
        given = f"--config {arguments.config}"
        raise InputError(f"{given}: get_config() must return a ConfigDict, not a {type(config).__name__}")

    overrides = _set_by_name(config, arguments.overrides)
    for text in overrides:
        if text.startswith(("--config.", "--noconfig.")):
            _check_name(config, text.split("=")[0].split(".")[1:])
    values = flags.FlagValues()
    argv = ["larp-jax", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        rest = [f"--{error.flagname}"]
    except Exception as error:  # wrong names, types or order raise errors of many types
        raise InputError(reason(error)) from error
    if rest:
        raise InputError(f"unrecognized arguments: {' '.join(rest)}; see larp-jax {arguments.command} --help")
    take_sizes(values.config, config_flags.get_override_values(values["config"]))
    return parse_recipe(values.config)


def load_experiment(text: str):
    """The experiment NAME[:VARIANT] of configs/experiments, or of a file FILE.py[:VARIANT].

    Raises:
      InputError: there is no such experiment, or its file is wrong.
    """
    from larp_jax.config import Experiment

    name, colon, variant = text.partition(":")
    path = name if name.endswith(".py") else f"{EXPERIMENTS}/{name}.py"
    experiment = _from_file(path + colon + variant, "experiment", f"one of {', '.join(_experiment_names())}")
    if not isinstance(experiment, Experiment):
        raise InputError(f"experiment {text}: get_config() must return an Experiment, not {type(experiment).__name__}")
    return experiment


def _experiment_names() -> list[str]:
    """The experiments in configs/experiments of this folder or of the installed package."""
    folder = os.path.dirname(_shipped(f"{EXPERIMENTS}/prior.py"))
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted(name.removesuffix(".py") for name in names if name.endswith(".py") and not name.startswith("_"))


def _from_file(text: str, option: str, example: str):
    """What `get_config` of the Python file FILE[:VARIANT] returns; `option` and `example` are for messages."""
    path, _, variant = text.partition(":")
    path = os.path.expanduser(path)
    path = path if os.path.isfile(path) else _shipped(path)
    if not os.path.isfile(path):
        raise InputError(f"{option} {path} is not a file; give {example}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise InputError("it does not define get_config(), which returns the recipe")
        return get_config(variant) if variant else get_config()
    except InputError as error:
        raise InputError(f"{option} {text}: {error}") from error
    except Exception as error:  # the file is Python code and may raise anything
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {frames[-1]}: " if frames else ""
        said = " ".join(str(error).split())
        raise InputError(f"{option} {text} fails: {where}{type(error).__name__}: {said}") from error


def _shipped(path: str) -> str:
    """The file configs/... of the installed package or of its source tree; any other path is returned unchanged."""
    folder, _, name = path.replace(os.sep, "/").partition("/")
    if folder != "configs":
        return path
    package = pathlib.Path(__file__).parents[1]
    places = (package / "configs", package.parent / "configs")  # a wheel; a source tree
    return next((os.fspath(file) for place in places if (file := place / name).is_file()), path)


def _set_by_name(config, overrides: Sequence[str]) -> list[str]:
    """Sets numbers under names that users choose, such as those of `optim.multipliers`; `.` in a name becomes `/`.

    Returns:
      The other overrides.
    """
    from larp_jax.config import named_numbers

    starts = {f"--config.{name}.": name.split(".") for name in named_numbers(config.get("stage"))}
    left, rest = [], list(overrides)
    while rest:
        text = rest.pop(0)
        start = next((start for start in starts if text.startswith(start)), None)
        if start is None:
            left.append(text)
            continue
        name, equals, value = text.partition("=")
        if not equals and rest:
            value = rest.pop(0)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not name.removeprefix(start):
            raise InputError(f"{name}={value} must be NAME=NUMBER")
        _check_name(config, starts[start])
        holder = functools.reduce(lambda x, key: x[key], starts[start], config)
        with holder.unlocked(), holder.ignore_type():
            holder[name.removeprefix(start).replace(".", "/")] = number
    return left


def _check_name(config, keys: Sequence[str]) -> None:
    """Raises `InputError` unless these nested keys lead to a setting."""
    from larp_jax.config import unknown_key

    name = "config"
    for key in keys:
        if not hasattr(config, "keys"):
            raise InputError(f"{name} is a single value and has no {name}.{key}")
        name = f"{name}.{key}"
        if key not in config:
            raise InputError(unknown_key(name, key, config))
        config = config[key]
