"""Rotary positions along the three axes of a clip (3-D axial RoPE), as in ViTok, arXiv 2501.09755, section 2.3.

How the dimensions of a head are shared by the axes and the frequencies are not stated there; here they are as in Wan
2.1, arXiv 2503.20314: a third for each of height and columns, rounded down to pairs, and the rest for time; base 10000.
"""

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.models.grids import Grid, grid_coordinates

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines of the angles, [N, d / 2] float32 each

BASE = 10000.0


def angles_3d(grid: Grid, width: int, of: Grid | None = None) -> np.ndarray:
    """Angles [t*h*w, width / 2] of a patch grid in (time, height, width) order, float64.

    Args:
      grid: number of patches (time, height, width).
      width: d, the width of a head: even, and at least 6.
      of: the grid in whose coordinates patches are, see `grid_coordinates`.
    """
    across = 2 * (width // 6)
    tables = []
    for places, part in zip(grid_coordinates(grid, of), (width - 2 * across, across, across), strict=True):
        frequencies = BASE ** (-np.arange(0, part, 2, dtype=np.float64) / part)
        tables.append(places[:, None] * frequencies)
    t, h, w = tables
    axes = t[:, None, None], h[None, :, None], w[None, None]
    return np.concatenate([np.broadcast_to(x, (*grid, x.shape[-1])) for x in axes], axis=-1).reshape(-1, width // 2)


def rotation(angles: np.ndarray, before: int = 0, after: int = 0) -> Rotation:
    """The rotation of a sequence in which so many tokens at the origin precede and follow those with these angles."""
    padded = np.pad(angles, ((before, after), (0, 0)))
    return jnp.asarray(np.cos(padded), jnp.float32), jnp.asarray(np.sin(padded), jnp.float32)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs of dimensions (0, 1), (2, 3) and so on of queries or keys [B, N, H, d], in float32."""
    cos, sin = (table[:, None] for table in rotation)
    first, second = (x[..., i::2].astype(jnp.float32) for i in (0, 1))
    pairs = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)
