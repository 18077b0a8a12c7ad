"""Checks of settings. Each error is one line with the name of the setting and the problem."""

import numbers
import typing

from larp_jax.errors import InputError

# Limit on patches plus tokens, far above that of any real network. Fixed position tables are computed from the clip
# size in a configuration, so a damaged file could otherwise exhaust the memory.
MOST_POSITIONS = 2**20


def require(condition: bool, message: str) -> None:
    """`InputError` with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def at_least_0(name: str, config: typing.Any, *fields: str) -> None:
    """`InputError` if one of these settings of a section is negative, or NaN."""
    for field in fields:
        require(getattr(config, field) >= 0, f"{name}.{field} must not be negative, got {getattr(config, field)}")


def within(name: str, config: typing.Any, *fields: str) -> None:
    """`InputError` unless these settings of a section are in [0, 1]."""
    for field in fields:
        value = getattr(config, field)
        require(0 <= value <= 1, f"{name}.{field} must be in [0, 1], got {value}")


def check_positions(count: int, what: str) -> None:
    """`InputError` if a network would have more positions than `MOST_POSITIONS`."""
    require(
        count <= MOST_POSITIONS,
        f"{what} and model.num_tokens make {count} positions, above the limit of {MOST_POSITIONS}; lower them",
    )


def one_of(name: str, value: str, allowed: typing.Iterable[str]) -> None:
    """`InputError` unless the value of a setting is one of the allowed ones."""
    require(
        isinstance(value, str) and value in allowed,
        f"{name}={value!r} is not known; choose one of {', '.join(allowed)}",
    )


def check_seed(name: str, seed: int) -> None:
    """`InputError`, naming the setting, unless the seed is an integer in [0, 2^64)."""
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    require(whole and 0 <= seed < 2**64, f"{name} must be an integer from 0 to 2^64 - 1, got {seed!r}")
