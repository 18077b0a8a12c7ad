"""Conversion of recipes (`ml_collections.ConfigDict` or JSON) to frozen dataclasses and back."""

import dataclasses
import difflib
import logging
import math
import typing

from larp_jax.config.checks import one_of, require
from larp_jax.config.flow import FLOW_SIZES, FlowRecipe
from larp_jax.config.models import GENERATOR_SIZES, NUMBERS, PRIOR_SIZES, TOKENIZER_SIZES
from larp_jax.config.router import ROUTER_SIZES, RouterRecipe
from larp_jax.config.training import GeneratorRecipe, TokenizerRecipe
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

# By stage and section with a `size`: the table of sizes, and the sections whose width, depth and heads it sets.
SIZED: dict[str, dict[str, tuple[dict, tuple[str, ...]]]] = {
    "tokenizer": {"model": (TOKENIZER_SIZES, ("model.encoder", "model.decoder")), "prior": (PRIOR_SIZES, ("prior",))},
    "generator": {"model": (GENERATOR_SIZES, ("model",))},
    "flow": {"model": (FLOW_SIZES, ("model",))},
    "router": {"model": (ROUTER_SIZES, ("model",))},
}

STAGES = {"tokenizer": TokenizerRecipe, "generator": GeneratorRecipe, "flow": FlowRecipe, "router": RouterRecipe}


def default_recipe(stage: str = "tokenizer"):
    """The published recipe of a stage, as a locked, typed `ConfigDict` to be changed in a configuration file.

    Widths, depths and heads of 0 are set from `size` when the recipe is parsed.
    """
    from ml_collections import ConfigDict

    one_of("stage", stage, STAGES)
    return ConfigDict(_defaults(STAGES[stage]))


def take_sizes(recipe, given: typing.Collection[str]) -> None:
    """Applies a size that overrides a recipe, such as `--config.model.size=larp_l` on the command line.

    Its width, depth and heads replace those of the recipe, except for the numbers that were also overridden. Warns
    about a size without effect, because width, depth and heads are all given.

    Args:
      recipe: a `ConfigDict`, changed in place.
      given: dotted names of the settings that were overridden.
    """
    stage = str(recipe.get("stage", "tokenizer"))
    for section, (table, names) in SIZED.get(stage, {}).items():
        setting, size = f"{section}.size", _at(recipe, section).get("size")
        parts = {name: _at(recipe, name) for name in names}
        if setting in given:
            for name, part in parts.items():
                part.update({number: 0 for number in NUMBERS if f"{name}.{number}" not in given})
        chosen = setting in given or size != _defaults(STAGES[stage])[section]["size"]
        numbers = {tuple(part.get(number, 0) for number in NUMBERS) for part in parts.values()}
        if chosen and size in table and all(map(all, numbers)) and numbers != {table[size]}:
            logger.warning(
                f"config.{setting}={size!r} has no effect, because width, depth and heads of"
                f" {' and '.join(names)} are given"
            )


def _at(recipe, name: str):
    """The section of a recipe with that dotted name; empty if it does not exist."""
    for key in name.split("."):
        recipe = recipe.get(key, {}) if hasattr(recipe, "get") else {}
    return recipe if hasattr(recipe, "get") else {}


def _defaults(cls) -> dict:
    """Field defaults as declared, before `__post_init__` sets sizes."""
    return {
        field.name: _defaults(field.type)
        if dataclasses.is_dataclass(field.type)
        else field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(cls)
    }


def parse_recipe(values: typing.Mapping):
    """Converts a recipe (ConfigDict, or contents of `config.json`) to its dataclass; `InputError` if it is invalid."""
    is_mapping = isinstance(values, typing.Mapping) or hasattr(values, "to_dict")
    require(is_mapping, f"config must be a mapping of settings, got {values!r}")
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    stage = values.get("stage", "tokenizer")
    one_of("config.stage", stage, STAGES)
    if stage == "tokenizer":
        values.pop("data_init_clips", None)  # a setting of earlier versions that only affected the initialization
    recipe = from_dict(STAGES[stage], values, "config")
    require(
        stage != "tokenizer" or recipe.model.quantizer.has_codes or "norm" in values["model"]["quantizer"],
        "config.model.quantizer.kind='kl' without norm is from an earlier version, which stored means and log-variances"
        " in other columns; train that tokenizer again",
    )
    return recipe


def completed(values: dict) -> dict:
    """A recipe that was written as JSON, with settings that were added since at their defaults."""
    try:
        return to_dict(parse_recipe(values))
    except InputError:  # it has settings that no longer exist; they show as differences
        return values


def from_dict(cls, values: typing.Mapping, name: str):
    """Creates a configuration dataclass from a mapping; checks every key and type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(unknown_key(f"{name}.{key}", key, fields))
        arguments[key] = _checked(fields[key].type, value, f"{name}.{key}")
    return cls(**arguments)


def unknown_key(path: str, key: str, known: typing.Iterable[str]) -> str:
    """The message for a key that does not exist, with the most similar known key."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"{path} is not a setting; did you mean {path.rpartition('.')[0]}.{near[0]}?"


def _checked(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, typing.Mapping), f"{name} must be a mapping of settings, got {value!r}")
        return from_dict(kind, value, name)
    if kind is dict:
        require(isinstance(value, typing.Mapping), f"{name} must be a mapping of names to numbers, got {value!r}")
        return {key: _checked(float, number, f"{name}.{key}") for key, number in value.items()}
    if typing.get_origin(kind) is tuple:
        whole = isinstance(value, (tuple, list)) and all(type(number) is int for number in value)
        require(whole, f"{name} must be integers such as 8,16,32, got {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def named_numbers(stage: str) -> list[str]:
    """Dotted names of the settings of a stage that map user-chosen names to numbers, such as `optim.multipliers`."""

    def find(cls, prefix):
        for field in dataclasses.fields(cls):
            if field.type is dict:
                yield prefix + field.name
            elif dataclasses.is_dataclass(field.type):
                yield from find(field.type, f"{prefix}{field.name}.")

    return list(find(STAGES[stage], "")) if stage in STAGES else []


def differences(a: typing.Mapping, b: typing.Mapping, prefix: str = "") -> dict[str, tuple]:
    """Settings in which two configurations differ: {dotted name: (value in a, value in b)}; None for a missing one."""
    found: dict[str, tuple] = {}
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = one, other
    return found


def flat(values: typing.Mapping, prefix: str = "") -> list[tuple[str, typing.Any]]:
    """Nested mappings as a list of (dotted name, value), without None values."""
    pairs = [(f"{prefix}{key}", value) for key, value in values.items()]
    return [
        pair
        for name, value in pairs
        for pair in (flat(value, f"{name}.") if isinstance(value, typing.Mapping) else [(name, value)])
        if pair[1] is not None
    ]


def to_dict(config) -> dict:
    """A configuration dataclass as plain nested dictionaries, ready for JSON."""
    return dataclasses.asdict(config)
