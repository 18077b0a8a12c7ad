"""Patches and position tables (LARP, arXiv 2410.21264, section 3.2)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from larp_jax.models.grids import Grid, coordinates, grid_coordinates
from larp_jax.models.layers import Dtype, Linear
from larp_jax.models.packing import Layout


def patchify(video: jax.Array, patch: Grid) -> jax.Array:
    """[B, T, H, W, C] -> [B, (T/pt)(H/ph)(W/pw), pt*ph*pw*C]: patches in (time, height, width) order."""
    pt, ph, pw = patch
    return rearrange(video, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(patches: jax.Array, grid: Grid, patch: Grid) -> jax.Array:
    """The inverse of `patchify`: the last axis is (time-in-patch, row, column, channel). `grid` is in patches."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        patches, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
    )


class PatchEmbed(nnx.Module):
    """Patch embedding: a 3-D convolution with stride equal to kernel size, as one matrix product (section 3.2)."""

    def __init__(self, patch: Grid, channels: int, width: int, *, rngs: nnx.Rngs, dtype: Dtype):
        pt, ph, pw = patch
        self.proj = Linear(pt * ph * pw * channels, width, rngs=rngs, dtype=dtype)
        self.patch = patch

    def __call__(self, video: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, patches, D]."""
        return self.proj(patchify(video, self.patch))


def sincos_1d(positions: np.ndarray, width: int, base: float = 10000.0) -> np.ndarray:
    """Sine-cosine table [len(positions), width], float64: concat(sin(p*w), cos(p*w)), w_i = base^(-i/(width/2))."""
    if width % 2:
        raise ValueError(f"a sine-cosine table needs an even width, got {width}")
    frequencies = base ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_3d(grid: Grid, width: int, of: Grid | None = None) -> np.ndarray:
    """Sine-cosine table [t*h*w, width] of a patch grid, float64: the sum of a 2-D spatial and a 1-D temporal table.

    The first half of the spatial table encodes the *width* coordinate, the second half the height coordinate. `of` is
    the grid whose coordinates are used, see `Positions3d`; by default, `grid` itself.
    """
    t, h, w = grid_coordinates(grid, of)
    shape = (*grid, width // 2)
    across = np.broadcast_to(sincos_1d(w, width // 2)[None, None], shape)
    down = np.broadcast_to(sincos_1d(h, width // 2)[None, :, None], shape)
    spatial = np.concatenate([across, down], axis=-1)
    return (spatial + sincos_1d(t, width)[:, None, None]).reshape(-1, width)


class Positions1d(nnx.Module):
    """A table [N, D] for a sequence: fixed sine-cosine or learned, optionally plus a token-type vector on every row.

    A learned table is initialized from a normal distribution with standard deviation `init_std`, or if that is None as
    the sine-cosine table with base 10000: as in the released code, `base` applies only to fixed tables.

    With several `blocks`, N is the number of rows of a block, and each block has a learned vector, see `at`.
    """

    def __init__(
        self,
        length: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        learned: bool,
        token_type: bool,
        base: float,
        init_std: float | None,
        blocks: int = 1,
    ):
        if init_std is None:
            start = jnp.asarray(sincos_1d(np.arange(length), width), jnp.float32)
        else:
            start = init_std * jax.random.normal(rngs.params(), (length, width), jnp.float32)
        self.table = nnx.Param(start) if learned else None
        self.token_type = _token_type(width, rngs) if token_type else None
        self.block_table = nnx.data(None)
        if blocks > 1:
            # as large as the rows: entries of a sine-cosine table have the mean square 1/2
            std = init_std if learned and init_std is not None else 0.5**0.5
            self.block_table = nnx.Param(std * jax.random.normal(rngs.params(), (blocks, width), jnp.float32))
        self.length, self.width, self.base = length, width, base

    def __call__(self) -> jax.Array:
        """The table, [N, D] float32."""
        if self.table is None:
            table = jnp.asarray(sincos_1d(np.arange(self.length), self.width, self.base), jnp.float32)
        else:
            table = self.table[...]
        return table if self.token_type is None else table + self.token_type[...]

    def at(self, layout: Layout) -> jax.Array:
        """The rows of packed sequences, [B, N, D] float32: that of the place in the block, plus that of the block."""
        rows = self()[layout.place]
        if self.block_table is None:
            return rows
        return rows + jnp.take(self.block_table[...], layout.block, axis=0, mode="clip")  # padding has no block


class Positions3d(nnx.Module):
    """A table [t*h*w, D] for patches: fixed sine-cosine, or three learned tables summed; optional token type.

    Each learned table is initialized as the 1-D sine-cosine table of width D (section 3.2). If positions are `rotary`,
    there is no fixed table: it is zero.

    For frames of another size, rows and columns get the coordinates of their centers: a fixed table is computed there,
    and learned ones are interpolated linearly between their rows. In time, patches of fewer frames are the first.
    """

    def __init__(
        self, grid: Grid, width: int, *, rngs: nnx.Rngs, learned: bool, token_type: bool, rotary: bool = False
    ):
        def axis(n):
            return nnx.Param(jnp.asarray(sincos_1d(np.arange(n), width), jnp.float32)) if learned else None

        self.time, self.height, self.columns = (axis(n) for n in grid)
        self.token_type = _token_type(width, rngs) if token_type else None
        self.grid, self.width, self.rotary = grid, width, rotary

    def __call__(self, grid: Grid | None = None) -> jax.Array:
        """The table for a grid of patches, by default its own: [t*h*w, D] float32, in (time, height, width) order."""
        grid = grid or self.grid
        if grid[0] > self.grid[0]:
            raise ValueError(f"{grid[0]} patches in time are more than the {self.grid[0]} of a clip")
        if self.time is None and self.rotary:
            table = jnp.zeros((math.prod(grid), self.width), jnp.float32)
        elif self.time is None:
            table = jnp.asarray(sincos_3d(grid, self.width, self.grid), jnp.float32)
        else:
            t, h, w = self.time[...][: grid[0]], _rows(self.height[...], grid[1]), _rows(self.columns[...], grid[2])
            table = (t[:, None, None] + h[None, :, None] + w[None, None, :]).reshape(-1, self.width)
        return table if self.token_type is None else table + self.token_type[...]


def _rows(table: jax.Array, count: int) -> jax.Array:
    """`count` rows of a table, at the coordinates of `coordinates`; beyond its ends, those at the ends."""
    if count == len(table):
        return table
    places = np.clip(coordinates(count, len(table)), 0, len(table) - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(len(table))))
    return jnp.matmul(jnp.asarray(weights, jnp.float32), table, precision="float32")


def _token_type(width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), jnp.float32))
