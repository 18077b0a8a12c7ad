"""Choosing one of many codes from logits [..., K], where K is thousands and most of the work would be elsewhere."""

import jax
import jax.numpy as jnp

BLOCK = 64


def largest(logits: jax.Array) -> jax.Array:
    """The code of the largest logit, the first of equals: [..., K] -> [...] int32.

    `jnp.argmax` reduces pairs of value and index, which XLA's CPU backend does one by one.
    """
    codes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, codes, logits.shape[-1] - 1), axis=-1)


def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
    """A draw from softmax(logits), float32 [..., K] -> [...] int32: of a block of codes, then of a code in it.

    Takes two random numbers, where a draw by Gumbel noise takes K of them and two logarithms of each: as much time on
    CPUs as several blocks of a transformer.
    """
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % BLOCK)])
    weights = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    block_key, code_key = jax.random.split(key)
    block = _invert(block_key, weights.sum(axis=-1))
    within = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + _invert(code_key, within)


def _invert(key: jax.Array, weights: jax.Array) -> jax.Array:
    """A draw from weights [..., n] that need not sum to 1: the first whose cumulative sum is above a random number."""
    ends = jnp.cumsum(weights, axis=-1)
    at = jax.random.uniform(key, (*weights.shape[:-1], 1)) * ends[..., -1:]
    return jnp.sum(ends <= at, axis=-1, dtype=jnp.int32)
