"""Dropout with cheap random bits: a hash of the position in the array and a key, in a few operations.

On CPUs and TPUs, the random bits of `jax.random` take longer than the layers whose outputs are dropped. Here position
and key are hashed by an integer finalizer (Wellons' `lowbias32`), rows before columns. The bits are a function of key
and position, so they do not depend on how an array is split over devices, and can be recomputed anywhere.
"""

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity if `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(*x.shape[:-1], 1)
    keep = kept(seed(key), rate, rows, jnp.arange(x.shape[-1], dtype=jnp.uint32))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def seed(key: jax.Array) -> jax.Array:
    """The seed of `kept` from a random key: [2] uint32."""
    return jax.random.bits(key, (2,), jnp.uint32)


def kept(seed: jax.Array, rate: float, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """True with probability 1 - rate, independently for each row and column: uint32 arrays that broadcast."""
    bits = _finalize(_finalize(rows + seed[0]) ^ (columns * jnp.uint32(0x9E3779B9) + seed[1]))
    return bits >= jnp.uint32(round(rate * 2**32))


def _finalize(x: jax.Array) -> jax.Array:
    """`lowbias32` (nullprogram.com/blog/2018/07/31): each bit of x flips each bit of the result with even odds."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
