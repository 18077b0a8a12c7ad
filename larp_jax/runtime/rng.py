"""Random keys, and the JAX settings that results depend on, fixed independent of the environment.

JAX reads its random number generator and the width of its types from environment variables. With other values a
resumed run would continue with other random numbers, and with `rbg` samples would depend on the batch size.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from larp_jax.config import check_seed

IMPLEMENTATION = "threefry2x32"  # bits depend only on key and position, on every device


def key(seed: int) -> jax.Array:
    """The root key of a seed: typed, scalar, always of `IMPLEMENTATION`.

    Args:
      seed: in [0, 2^64). Below 2^32 the key is that of `jax.random.key` by default; all 64 bits are used.

    Raises:
      InputError: the seed is out of range.
    """
    check_seed("seed", seed)
    return _wrap([int(seed) >> 32, int(seed) & 0xFFFFFFFF])


def as_key(key: jax.Array) -> jax.Array:
    """A key given by a user, converted to `IMPLEMENTATION`.

    Args:
      key: scalar, from `jax.random.key` or, in the old style, from `jax.random.PRNGKey`. A key of another
        implementation (JAX_DEFAULT_PRNG_IMPL) is converted using all its bits.

    Raises:
      ValueError: it is not a key, or it is an array of keys.
    """
    expected = "key must be one random key, such as jax.random.key(0)"
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"{expected}, got {key!r}")
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != np.uint32 or key.shape not in ((2,), (4,)):
            raise ValueError(f"{expected}, got {key.dtype} {list(key.shape)}")
        key = jax.random.wrap_key_data(key, impl=IMPLEMENTATION if len(key) == 2 else "rbg")
    if key.shape:
        raise ValueError(f"{expected}, got an array of them, {list(key.shape)}")
    if str(jax.random.key_impl(key)) == IMPLEMENTATION:
        return key
    first, second, *rest = np.asarray(jax.random.key_data(key)).tolist()
    found = _wrap([first, second])
    for word in rest:
        found = jax.random.fold_in(found, np.uint32(word))
    return found


def _wrap(words: list[int]) -> jax.Array:
    return jax.random.wrap_key_data(np.array(words, np.uint32), impl=IMPLEMENTATION)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """A context in which JAX uses its default types and random bits, in this thread.

    JAX_ENABLE_X64, JAX_DEFAULT_PRNG_IMPL and similar variables have no effect in it: float is float32, int is int32.
    """
    with (
        jax.enable_x64(False),
        jax.default_prng_impl(IMPLEMENTATION),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
