"""Optimizers and the schedules that depend on the step.

Schedules are functions of a step that counts from 1, as in the released code: the first update is step 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from larp_jax.config import AdamConfig, GeneratorOptimConfig, OptimConfig
from larp_jax.models.paths import path_name

Schedule = Callable[[jax.Array], jax.Array]


def learning_rate(config: AdamConfig, steps: int, rate: float | None = None) -> Schedule:
    """Linear warmup from `floor` times the rate, then cosine decay to `floor` times the rate at the last step, `steps`.

    `rate` defaults to that of the configuration.
    """
    rate = config.learning_rate if rate is None else rate
    low = rate * config.floor
    return optax.warmup_cosine_decay_schedule(
        init_value=low if config.warmup_steps else rate,
        peak_value=rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=low,
    )


def linear(start: float, end: float, steps: float) -> Schedule:
    """From `start` to `end` over the first `steps` steps, then constant."""

    def value(step):
        return start + (end - start) * jnp.clip(step / max(steps, 1e-9), 0.0, 1.0)

    return value


def scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Learning rate multipliers: scales each update by the factor of the longest prefix of its parameter path."""

    def factor(name):
        matches = [prefix for prefix in factors if name == prefix or name.startswith(prefix + "/")]
        return factors[max(matches, key=len)] if matches else 1.0

    def update(updates, _):
        return jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path_name(path)), updates)

    return optax.stateless(update)


def decay_kernels(weight: float) -> optax.GradientTransformation:
    """Adds `weight` times the parameter to the updates of the kernels of linear layers: weight decay."""

    def update(updates, params):
        def decayed(path, u, p):
            return u + weight * p if path_name(path).endswith("kernel") else u

        return jax.tree_util.tree_map_with_path(decayed, updates, params)

    return optax.stateless(update)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of tokenizer and prior, with one learning rate except for the multipliers."""
    scale = scale_by_path(config.multipliers)
    if config.weight_decay:  # scaled too, so that frozen parameters do not decay
        scale = optax.chain(decay_kernels(config.weight_decay), scale)
    return _chain(config, _of_update(learning_rate(config, steps)), _scale(config), scale)


def make_discriminator_optimizer(
    config: OptimConfig, steps: int, *, start: int, every: int
) -> optax.GradientTransformation:
    """Adam for the discriminator, updated on every step before which the number of updates is a multiple of `every`.

    The first such step comes after at least `start` updates. The learning rate depends on the step.
    """
    rate = _of_update(learning_rate(config, steps, config.discriminator_learning_rate))
    first = -(-start // every) * every
    return _chain(config, lambda updates: rate(first + every * updates), _scale_by_adam(config))


def make_generator_optimizer(config: GeneratorOptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of the generator, with weight decay."""
    decay = decay_kernels(config.weight_decay)
    return _chain(config, _of_update(learning_rate(config, steps)), _scale(config), decay)


def _of_update(schedule: Schedule) -> Schedule:
    """The schedule as a function of the number of earlier updates, which Optax counts."""
    return lambda updates: schedule(updates + 1)


def _chain(
    config: AdamConfig,
    rate: Schedule,
    scale: optax.GradientTransformation,
    then: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """`scale` makes updates of gradients; `then` transforms them before the learning rate scales them."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.identity() if then is None else then,
        optax.scale_by_learning_rate(rate),
    )


def _scale(config: AdamConfig) -> optax.GradientTransformation:
    """The part of the optimizer that is `optim.kind`."""
    adam = _scale_by_adam(config)
    return optax.partition({"muon": _scale_by_muon(), "adam": adam}, _kinds) if config.kind == "muon" else adam


def _scale_by_adam(config: AdamConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8)


def _kinds(params: Any) -> Any:
    """For each parameter, whether Muon or Adam updates it: Muon has the kernels of the blocks of transformers."""

    def kind(path, _):
        names = path_name(path).split("/")
        return "muon" if "blocks" in names and names[-1] == "kernel" else "adam"

    return jax.tree_util.tree_map_with_path(kind, params)


def _scale_by_muon() -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon): momentum, whose kernels [..., in, out] are made orthogonal.

    Updates are scaled to the root mean square usual for Adam's, 0.2, so that learning rates of Adam can be kept
    (Moonlight, arXiv 2502.16982, section 2.2).
    """
    axes = lambda params: jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)  # noqa: E731
    rescale = lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)  # noqa: E731
    return optax.chain(scale_by_muon(weight_dimension_numbers=axes), optax.stateless(rescale))
