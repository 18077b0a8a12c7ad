"""Optimisers and the schedules that depend on the step (METHOD 3)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from larp_jax.config import OptimConfig

Schedule = Callable[[jax.Array], jax.Array]


def learning_rate(config: OptimConfig, steps: int) -> Schedule:
    """Linear warm-up from `floor` times the rate, then a cosine down to `floor` times it at the last step."""
    low = config.learning_rate * config.floor
    return optax.warmup_cosine_decay_schedule(
        init_value=low if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=low,
    )


def linear(start: float, end: float, steps: float) -> Schedule:
    """From `start` to `end` over the first `steps` steps, then constant."""

    def value(step):
        return start + (end - start) * jnp.clip(step / max(steps, 1e-9), 0.0, 1.0)

    return value


def scale_modules(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the named modules (first key of the parameter tree), as rate multipliers do."""

    def update(updates, _):
        return {name: jax.tree.map(lambda u: u * factors.get(name, 1.0), tree) for name, tree in updates.items()}

    return optax.stateless(update)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Adam for the tokenizer and the prior: one optimiser, the prior's rate a multiple of the tokenizer's."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8),
        scale_modules({"prior": config.prior_multiplier}),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
