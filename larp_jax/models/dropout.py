"""Dropout whose random bits cost a few operations each: a hash of positions in the array, keyed per call.

`jax.random` hashes so thoroughly that its bits take CPUs and TPUs longer than the layers they are dropped from. Here
position and key go through an integer finaliser (Wellons' `lowbias32`), rows before columns. Bits are a function of
key and position, so they do not depend on how an array is split over devices, and may be computed again anywhere.
"""

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity where `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(*x.shape[:-1], 1)
    keep = kept(seed(key), rate, rows, jnp.arange(x.shape[-1], dtype=jnp.uint32))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def seed(key: jax.Array) -> jax.Array:
    """What keys `kept`: [2] uint32."""
    return jax.random.bits(key, (2,), jnp.uint32)


def kept(seed: jax.Array, rate: float, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """True with probability 1 - rate, independently for each row and column: uint32 arrays that broadcast."""
    bits = _finalise(_finalise(rows + seed[0]) ^ (columns * jnp.uint32(0x9E3779B9) + seed[1]))
    return bits >= jnp.uint32(round(rate * 2**32))


def _finalise(x: jax.Array) -> jax.Array:
    """`lowbias32` of nullprogram.com/blog/2018/07/31: every bit of x changes each of the result with even odds."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
