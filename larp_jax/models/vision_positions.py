"""Places of patches in vision transformers: rotations of queries and keys, and tables at any size."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from larp_jax.models.embeddings import sincos_1d

Grid = tuple[int, int, int]
DINOV3_BASE = 100.0  # base of the periods (DINOv3, arXiv 2508.10104)


def halves(width: int) -> np.ndarray:
    """Channels of a head, even ones first: turns rotations of neighboring pairs into those of `rotate`.

    An attention score does not change if the channels of queries and keys are reordered alike.
    """
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Turns channel i together with channel i + d/2 (RoPE, arXiv 2104.09864).

    Args:
      x: [B, N, H, d].
      rotation: cosines and sines by position and channel, [2, N, d] float32.

    Returns:
      The same shape and dtype as x.
    """
    cosine, sine = rotation[:, None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cosine + turned * sine).astype(x.dtype)


def rotary_3d(grid: Grid, width: int) -> np.ndarray:
    """Rotations of V-JEPA 2 (arXiv 2506.09985) for heads of that width, channels ordered by `halves`; [2, t*h*w, d].

    A third of the channels (rounded down to pairs) turns by the place in time, then one by the row, one by the column;
    the rest does not turn. As in the released code, which trained the weights, the two channels of a pair do not turn
    by the same angle: angles are repeated as (1, 2, ..., 1, 2, ...), not as (1, 1, 2, 2, ...).
    """
    part = width // 3 // 2 * 2
    frequencies = 10000.0 ** (-np.arange(part // 2) / (part / 2))
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    angles = np.tile(places[:, :, None] * frequencies, 2).reshape(len(places), -1)
    angles = np.pad(angles, ((0, 0), (0, width - 3 * part)))[:, halves(width)]
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotary_2d(grid: Grid, width: int, prefix: int) -> np.ndarray:
    """Rotations of DINOv3 for heads of that width: the first `prefix` tokens do not turn; [2, prefix + h*w, d].

    Places are the centers of patches in an image of [-1, 1] x [-1, 1].
    """
    frequencies = DINOV3_BASE ** -np.arange(0.0, 1.0, 4.0 / width)
    centers = [2.0 * (np.arange(n) + 0.5) / n - 1.0 for n in grid[1:]]
    places = np.stack(np.meshgrid(*centers, indexing="ij"), -1).reshape(-1, 2)
    angles = np.tile((2.0 * np.pi * places[:, :, None] * frequencies).reshape(len(places), -1), 2)
    angles = np.pad(angles, ((prefix, 0), (0, 0)))
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def sincos_flat(table: Grid, grid: Grid, width: int) -> jax.Array:
    """The fixed table of VideoMAE (arXiv 2203.12602) for a grid, [t*h*w, width] float32.

    It encodes the number of the patch in the grid `table` of training, sines and cosines in turn. VideoMAE itself takes
    no other grid; for one, its rows are interpolated linearly.
    """
    rows = rearrange(sincos_1d(np.arange(np.prod(table)), width), "n (two half) -> n (half two)", two=2)
    rows = jnp.asarray(rows.reshape(*table, width), jnp.float32)
    return jax.image.resize(rows, (*grid, width), "linear", antialias=False).reshape(-1, width)


def interpolated(rows: jax.Array, table: Grid, grid: Grid, *, antialias: bool) -> jax.Array:
    """A trained table of patches at another size, as DINOv2 (arXiv 2304.07193) does it.

    Args:
      rows: [h*w, D] in the grid `table`.
      table: (1, h, w).
      grid: (t, new h, new w).
      antialias: smooths if the new grid is coarser, as the networks with registers do.

    Returns:
      [new h * new w, D].
    """
    old, new = table[1:], grid[1:]
    rows = rows.reshape(*old, -1)
    if antialias:
        rows = jax.image.resize(rows, (*new, rows.shape[-1]), "cubic", antialias=True)
    else:
        down, across = (jnp.asarray(_bicubic(*sizes)) for sizes in zip(old, new, strict=True))
        rows = jnp.einsum("yh,xw,hwd->yxd", down, across, rows, precision="highest")
    return rows.reshape(-1, rows.shape[-1])


def _bicubic(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of cubic interpolation as in PyTorch: slope -3/4, and the borders repeated."""
    slope = -0.75
    center = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(center).astype(int)
    weights = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        x = np.abs(center - first - tap)
        near = ((slope + 2.0) * x - (slope + 3.0)) * x**2 + 1.0
        far = slope * (((x - 5.0) * x + 8.0) * x - 4.0)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1.0, near, far))
    return weights.astype(np.float32)
