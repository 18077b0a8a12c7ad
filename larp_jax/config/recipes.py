"""From a recipe, an `ml_collections.ConfigDict` or JSON, to frozen dataclasses and back."""

import dataclasses
import difflib
import logging
import math
import typing

from larp_jax.config.checks import one_of, require
from larp_jax.config.models import GENERATOR_SIZES, NUMBERS, PRIOR_SIZES, TOKENIZER_SIZES
from larp_jax.config.training import GeneratorRecipe, TokenizerRecipe
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

# What a size fills: by stage and section its table, and the parts whose width, depth and heads are left at 0.
SIZED: dict[str, dict[str, tuple[dict, tuple[str, ...]]]] = {
    "tokenizer": {"model": (TOKENIZER_SIZES, ("model.encoder", "model.decoder")), "prior": (PRIOR_SIZES, ("prior",))},
    "generator": {"model": (GENERATOR_SIZES, ("model",))},
}

STAGES = {"tokenizer": TokenizerRecipe, "generator": GeneratorRecipe}


def default_recipe(stage: str = "tokenizer"):
    """The published recipe of a stage as a locked, typed `ConfigDict` to change in a configuration file.

    Sizes left at 0 (widths, depths, heads, decoder patch) are filled from `size` when the recipe is parsed.
    """
    from ml_collections import ConfigDict

    one_of("stage", stage, STAGES)
    return ConfigDict(_defaults(STAGES[stage]))


def take_sizes(recipe, given: typing.Collection[str]) -> None:
    """Makes a size count that was given on top of a recipe, as `--config.model.size=larp_l` on the command line.

    What it names (width, depth, heads) is its own then, whatever the recipe sets, but for the numbers that were given
    beside it. A warning tells of a size that changes nothing, since all of its numbers are set.

    Args:
      recipe: a `ConfigDict`, changed in place.
      given: dotted names of the settings that were given on top of it.
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
                f"config.{setting}={size!r} changes nothing: width, depth and heads of {' and '.join(names)} are given,"
                " too"
            )


def _at(recipe, name: str):
    """The section of a recipe of that dotted name; an empty one where there is none."""
    for key in name.split("."):
        recipe = recipe.get(key, {}) if hasattr(recipe, "get") else {}
    return recipe if hasattr(recipe, "get") else {}


def _defaults(cls) -> dict:
    """Field defaults as declared, before `__post_init__` fills sizes."""
    return {
        field.name: _defaults(field.type)
        if dataclasses.is_dataclass(field.type)
        else field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(cls)
    }


def parse_recipe(values: typing.Mapping):
    """A recipe (ConfigDict, or what `config.json` holds) as its stage's frozen dataclass; `InputError` if wrong."""
    require(isinstance(values, typing.Mapping) or hasattr(values, "to_dict"), f"config holds settings, got {values!r}")
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    stage = values.get("stage", "tokenizer")
    one_of("config.stage", stage, STAGES)
    if stage == "tokenizer":
        values.pop("data_init_clips", None)  # of earlier versions; decided only how a run started
    recipe = from_dict(STAGES[stage], values, "config")
    require(
        stage != "tokenizer" or recipe.model.quantizer.has_codes or "norm" in values["model"]["quantizer"],
        "config.model.quantizer.kind='kl' without a norm is of an earlier version, which kept means and log-variances"
        " in other columns; train that tokenizer again",
    )
    return recipe


def from_dict(cls, values: typing.Mapping, name: str):
    """Builds a configuration dataclass from a mapping, checking every key and type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(unknown_key(f"{name}.{key}", key, fields))
        arguments[key] = _checked(fields[key].type, value, f"{name}.{key}")
    return cls(**arguments)


def unknown_key(path: str, key: str, known: typing.Iterable[str]) -> str:
    """The message for a key that does not exist, naming the nearest that does."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"{path} is not a setting; did you mean {path.rpartition('.')[0]}.{near[0]}?"


def _checked(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, typing.Mapping), f"{name} holds settings of its own, got {value!r}")
        return from_dict(kind, value, name)
    if kind is dict:
        require(isinstance(value, typing.Mapping), f"{name} holds numbers by name, got {value!r}")
        return {key: _checked(float, number, f"{name}.{key}") for key, number in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def named_numbers(stage: str) -> list[str]:
    """Settings of a stage, by their dotted names, that hold numbers under names of the user's: `optim.multipliers`."""

    def find(cls, prefix):
        for field in dataclasses.fields(cls):
            if field.type is dict:
                yield prefix + field.name
            elif dataclasses.is_dataclass(field.type):
                yield from find(field.type, f"{prefix}{field.name}.")

    return list(find(STAGES[stage], "")) if stage in STAGES else []


def differences(a: typing.Mapping, b: typing.Mapping, prefix: str = "") -> dict[str, tuple]:
    """The values of the settings in which two configurations differ, by their dotted names; None for none."""
    found: dict[str, tuple] = {}
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = one, other
    return found


def to_dict(config) -> dict:
    """A configuration dataclass as plain nested dictionaries, ready for JSON."""
    return dataclasses.asdict(config)
