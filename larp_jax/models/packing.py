"""Clips with different numbers of codes in arrays of one size: the codes of all blocks one after the other, then zeros.

Arrays of this kind are called packed. They have the shape [B, N], where N is the bucket, and come with the lengths of
the blocks, [B, T] int32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layout(NamedTuple):
    """Where each code of packed sequences belongs.

    Attributes:
      block: [B, N] int32, the block in [0, T); T for padding, which comes after all blocks.
      place: [B, N] int32, the place within the block, from 0; 0 for padding.
      valid: [B, N] bool, false for padding.
    """

    block: jax.Array
    place: jax.Array
    valid: jax.Array

    def __getitem__(self, index) -> "Layout":  # type: ignore[override]
        """The layout of a part of the sequences, such as `layout[:, :-1]`."""
        return Layout(*(x[index] for x in tuple(self)))


def offsets(lengths: jax.Array) -> jax.Array:
    """Lengths [B, T] -> [B, T + 1] int32: where each block starts, and the end of the last."""
    ends = jnp.cumsum(lengths.astype(jnp.int32), axis=1, dtype=jnp.int32)
    return jnp.pad(ends, ((0, 0), (1, 0)))


def layout(lengths: jax.Array, size: int, start: jax.Array | int = 0) -> Layout:
    """The layout of `size` codes of sequences with these lengths of blocks, [B, T] int32, from number `start` on.

    The lengths may sum up to less or to more.
    """
    bounds = offsets(lengths)
    number = start + jnp.arange(size, dtype=jnp.int32)
    block = jnp.sum(number[None, :, None] >= bounds[:, None, 1:], axis=-1, dtype=jnp.int32)
    valid = block < lengths.shape[1]
    place = jnp.where(valid, number - jnp.take_along_axis(bounds, block, axis=1), 0)
    return Layout(block, place, valid)


def block_layout(block: int, lengths: jax.Array, size: int) -> Layout:
    """The layout of the codes of one block alone: lengths [B] -> arrays [B, size], with padding at the end."""
    place = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(lengths), size))
    return Layout(jnp.full_like(place, block), place, place < lengths[:, None])


def repeated(assignment: Sequence[int] | jax.Array, rows: int) -> jax.Array:
    """The lengths [rows, T] int32 of clips that all have the same assignment."""
    return jnp.tile(jnp.asarray(assignment, jnp.int32), (rows, 1))


def block_of_patches(lengths: jax.Array, patches: int) -> jax.Array:
    """The block of each patch in (time, height, width) order, [B, patches] int32, for lengths [B, T]."""
    rows, blocks = lengths.shape
    return jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32) // (patches // blocks), (rows, patches))


def mean_of_codes(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean of x [B, N, ...] over the codes of each clip, then over clips: a scalar.

    A batch has the mean of its clips taken one by one, whatever their numbers of codes.

    Args:
      x: values.
      valid: [B, N] bool, which of them are codes; None for all.
    """
    return jnp.mean(x) if valid is None else jnp.mean(mean_of_clips(x, valid))


def mean_of_clips(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean over the codes of each clip, [B]; arguments as for `mean_of_codes`."""
    x = x.reshape(*x.shape[:2], -1).mean(axis=-1)
    if valid is None:
        return x.mean(axis=1)
    return jnp.sum(jnp.where(valid, x, 0.0), axis=1) / jnp.maximum(valid.sum(axis=1), 1)


def by_place(packed: np.ndarray, lengths: np.ndarray, most: int) -> np.ndarray:
    """Packed integers [M, N] by block and place: [M, T * most] int32, -1 where a block has no such place.

    Args:
      packed: codes.
      lengths: [M, T].
      most: the largest length of a block.
    """
    lengths = np.asarray(lengths)
    places = np.arange(most) < lengths[:, :, None]
    found = np.full(places.shape, -1, np.int32)
    found[places] = np.asarray(packed)[np.arange(packed.shape[1]) < lengths.sum(axis=1)[:, None]]
    return found.reshape(len(lengths), -1)
