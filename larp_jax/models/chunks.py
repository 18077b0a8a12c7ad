"""Processing of a long token axis in chunks, so that [B, N, K] logits are never in memory as a whole."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

TOKENS_PER_CHUNK = 64  # 64 x 8192 float32 logits are 2 MiB per clip


def map_token_chunks(f: Callable, *arrays: jax.Array, chunk: int = TOKENS_PER_CHUNK):
    """Applies `f(i, *pieces)` to pieces of `chunk` tokens (axis 1) of the arrays and joins the results.

    The backward pass recomputes each piece. The batch axis is not split, so it may be sharded.

    Args:
      f: receives the number of the piece (int32 scalar, for random keys) and pieces [B, chunk, ...]; returns a
        pytree of arrays [B or 1, chunk, ...]. It must treat tokens independently: the last piece is padded.
      *arrays: [B, N, ...] each.
      chunk: tokens per piece.

    Returns:
      The pytree of joined results, [B or 1, N, ...].
    """
    length = arrays[0].shape[1]
    if length <= chunk:
        return f(jnp.int32(0), *arrays)
    pieces = -(-length // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], pieces * chunk, *y.shape[3:])[:, :length]

    def body(carry, piece):
        return carry, f(*piece)

    _, results = jax.lax.scan(jax.checkpoint(body), None, (jnp.arange(pieces), *map(split, arrays)))
    return jax.tree.map(join, results)
