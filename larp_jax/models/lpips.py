"""LPIPS, a perceptual distance of images by features of VGG16: version 0.1 of Zhang et al. 2018, arXiv 1801.03924."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.errors import InputError
from larp_jax.models.layers import Dtype

# Widths of VGG16's convolutions (Simonyan & Zisserman 2014); the last of each stage is compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.float32([-0.030, -0.088, -0.188])
SCALE = np.float32([0.458, 0.448, 0.450])
SMALLEST = 2 ** (len(STAGES) - 1)


class Lpips(nnx.Module):
    """VGG16 up to its last convolution, and the weight of each compared channel.

    Parameters are float32: `conv1_1` .. `conv5_3` with kernels [3, 3, inputs, outputs] and biases, `head1` .. `head5`
    with one weight a channel. They start random and mean nothing until trained ones are loaded.
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        """`dtype` is that of the convolutions; features are compared in float32."""
        inputs = 3
        for stage, widths in enumerate(STAGES, 1):
            for i, width in enumerate(widths, 1):
                conv = nnx.Conv(inputs, width, (3, 3), padding="SAME", dtype=dtype, rngs=rngs)
                setattr(self, f"conv{stage}_{i}", conv)
                inputs = width
            setattr(self, f"head{stage}", nnx.Param(jnp.full((inputs,), 1.0 / inputs)))

    def features(self, frames: jax.Array) -> list[jax.Array]:
        """Unit-length features after each stage.

        Args:
          frames: [B, H, W, 3] in [0, 1].

        Returns:
          Five arrays [B, H / 2^i, W / 2^i, channels] (rounded down), float32.
        """
        x = (2.0 * frames - 1.0 - SHIFT) / SCALE
        found = []
        for stage, widths in enumerate(STAGES, 1):
            if stage > 1:
                x = _max_pool(x)
            for i in range(1, len(widths) + 1):
                x = jax.nn.relu(getattr(self, f"conv{stage}_{i}")(x))
            found.append(_normalize(x.astype(jnp.float32)))
        return found

    def distance(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Distance of each frame of x from that of y.

        Args:
          x, y: [B, H, W, 3] float32 in [0, 1], H and W at least 16.

        Returns:
          [B] float32, 0 for equal frames: squared difference of features, weighted over channels, mean over positions,
          summed over stages.

        Raises:
          InputError: the shapes differ, or are not those of such frames.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < SMALLEST:
            raise InputError(
                f"LPIPS compares two [B, H, W, 3] of the same shape, H and W at least {SMALLEST}; got {list(x.shape)}"
                f" and {list(y.shape)}"
            )
        total = jnp.zeros(len(x))
        # apart and not as one batch, so that no gradient is computed for the one that needs none
        for stage, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True), 1):
            total += jnp.square(a - b).mean((1, 2)) @ getattr(self, f"head{stage}")[...]
        return total


def _max_pool(x: jax.Array) -> jax.Array:
    """Maximum of windows of 2 x 2; an odd row or column at the end is left out.

    The gradient goes to the first of equal values, as in PyTorch. By comparisons, because XLA's CPU backend is slow at
    the backward pass of windows.
    """
    height, width = (n // 2 * 2 for n in x.shape[1:3])
    left, right = x[:, :height, :width:2], x[:, :height, 1:width:2]
    rows = jnp.where(right > left, right, left)
    upper, lower = rows[:, ::2], rows[:, 1::2]
    return jnp.where(lower > upper, lower, upper)


def _normalize(x: jax.Array) -> jax.Array:
    """x [..., C] divided by its length + 1e-10; where it is all zero, so is the gradient (and not NaN)."""
    square = jnp.square(x).sum(-1, keepdims=True)
    length = jnp.where(square > 0.0, jnp.sqrt(jnp.where(square > 0.0, square, 1.0)), 0.0)
    return x / (length + 1e-10)
