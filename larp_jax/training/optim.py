"""Optimizers and the schedules that depend on the step.

Schedules are functions of a step that counts from 1, as in the released code: the first update is step 1.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

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
    """Adam or AdamW for the tokenizer and the prior, at one learning rate except for the multipliers."""
    scale = scale_by_path(config.multipliers)
    if config.weight_decay:  # scaled too, so that frozen parameters do not decay
        scale = optax.chain(decay_kernels(config.weight_decay), scale)
    return _adam(config, _of_update(learning_rate(config, steps)), scale)


def make_discriminator_optimizer(
    config: OptimConfig, steps: int, *, start: int, every: int
) -> optax.GradientTransformation:
    """Adam for the discriminator, updated on every step before which the number of updates is a multiple of `every`.

    The first such step comes after at least `start` updates. The learning rate depends on the step.
    """
    rate = _of_update(learning_rate(config, steps, config.discriminator_learning_rate))
    first = -(-start // every) * every
    return _adam(config, lambda updates: rate(first + every * updates))


def make_generator_optimizer(config: GeneratorOptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW for the generator."""
    return _adam(config, _of_update(learning_rate(config, steps)), decay_kernels(config.weight_decay))


def _of_update(schedule: Schedule) -> Schedule:
    """The schedule as a function of the number of earlier updates, which Optax counts."""
    return lambda updates: schedule(updates + 1)


def _adam(
    config: AdamConfig, rate: Schedule, then: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """Adam; `then` transforms its updates before the learning rate scales them."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8),
        optax.identity() if then is None else then,
        optax.scale_by_learning_rate(rate),
    )
