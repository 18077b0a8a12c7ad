"""Argmax and sampling of codes from logits [..., K], faster than in JAX for K in the thousands."""

import jax
import jax.numpy as jnp

BLOCK = 64


def argmax(logits: jax.Array) -> jax.Array:
    """Index of the largest logit; the lowest index on ties: [..., K] -> [...] int32.

    `jnp.argmax` reduces pairs of value and index, which XLA's CPU backend does not vectorize.
    """
    codes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, codes, logits.shape[-1] - 1), axis=-1)


def sample(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Samples from softmax(logits), float32 [..., K] -> [...] int32: first a block of codes, then a code within it.

    Needs two random numbers per sample. Sampling by Gumbel noise needs K, and two logarithms of each, which on CPUs
    takes as long as several transformer blocks.
    """
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % BLOCK)])
    weights = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    block_key, code_key = jax.random.split(key)
    block = _invert(block_key, weights.sum(axis=-1))
    within = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + _invert(code_key, within)


def _invert(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Samples an index by weights [..., n] that need not sum to 1.

    It is the first index whose cumulative sum exceeds a random threshold.
    """
    ends = jnp.cumsum(weights, axis=-1)
    at = jax.random.uniform(key, (*weights.shape[:-1], 1)) * ends[..., -1:]
    return jnp.sum(ends <= at, axis=-1, dtype=jnp.int32)
