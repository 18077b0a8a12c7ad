"""Alignment of the decoder with the features of a frozen network (EVATok, arXiv 2603.12267).

The decoder predicts, at each of its patches, what the frozen network sees there. The trainable part is on the decoder's
side: on the other side, both could agree on a constant.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.models.layers import Dtype, LayerNorm, Linear, gelu


class Projector(nnx.Module):
    """Layer norm, linear to four times the width, GELU, linear: from decoder features to those of a teacher.

    The paper says only that it is an MLP.
    """

    def __init__(self, width: int, channels: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        """`width` is that of the decoder, `channels` that of the teacher."""
        self.norm = LayerNorm(width, epsilon=1e-6, dtype=dtype)
        self.up = Linear(width, 4 * width, rngs=rngs, dtype=dtype)
        self.out = Linear(4 * width, channels, rngs=rngs, dtype=dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features [..., width] -> [..., channels] float32."""
        return self.out(gelu(self.up(self.norm(features)))).astype(jnp.float32)


def resampled(features: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
    """Features of a clip on another grid: each cell has the mean of the features over the part of the clip it covers.

    The mean of whole cells where the grid becomes coarser by a whole factor, their repetition where it becomes finer by
    one; otherwise cells are weighted by their overlap. No cell sees what lies outside it in space or time.

    Args:
      features: [B, t, h, w, C], of the whole clip.
      grid: (t, h, w) wanted.

    Returns:
      [B, *grid, C] float32.
    """
    features = features.astype(jnp.float32)
    for axis, size in enumerate(grid, 1):
        if features.shape[axis] != size:
            features = jnp.moveaxis(jnp.tensordot(_overlaps(size, features.shape[axis]), features, (1, axis)), 0, axis)
    return features


def _overlaps(cells: int, inputs: int) -> np.ndarray:
    """[cells, inputs] float32: share of each cell that each input covers, if both divide the same length evenly."""
    ends = np.arange(1, cells + 1)[:, None] / cells, np.arange(1, inputs + 1)[None, :] / inputs
    covered = np.minimum(*ends) - np.maximum(ends[0] - 1 / cells, ends[1] - 1 / inputs)
    return np.float32(np.maximum(covered, 0.0) * cells)
