"""LPIPS, a perceptual distance of images from VGG16 features (Zhang et al. 2018, arXiv 1801.03924, version 0.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.errors import InputError
from larp_jax.models.layers import Dtype

# Widths of VGG16's convolutions (Simonyan & Zisserman 2014); the features of the last one of each stage are compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.float32([-0.030, -0.088, -0.188])
SCALE = np.float32([0.458, 0.448, 0.450])
SMALLEST = 2 ** (len(STAGES) - 1)


class Vgg(nnx.Module):
    """VGG16 up to the last convolution of a stage.

    Parameters are float32: `conv1_1`, `conv1_2`, `conv2_1`, ... with kernels [3, 3, inputs, outputs] and biases. They
    are random until trained weights are loaded.
    """

    def __init__(self, stages: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        """`stages` is how many of `STAGES` it has; `dtype` is the dtype of the convolutions."""
        self.stages = tuple(len(widths) for widths in STAGES[:stages])
        self.width = STAGES[stages - 1][-1]
        inputs = 3
        for stage, widths in enumerate(STAGES[:stages], 1):
            for i, width in enumerate(widths, 1):
                conv = nnx.Conv(inputs, width, (3, 3), padding="SAME", dtype=dtype, rngs=rngs)
                setattr(self, f"conv{stage}_{i}", conv)
                inputs = width

    def activations(self, frames: jax.Array) -> list[jax.Array]:
        """Rectified output of the last convolution of each stage.

        Args:
          frames: [B, H, W, 3] in [0, 1].

        Returns:
          Arrays [B, H / 2^i, W / 2^i, channels] (rounded down), float32.
        """
        x = (2.0 * frames - 1.0 - SHIFT) / SCALE
        found = []
        for stage, convs in enumerate(self.stages, 1):
            if stage > 1:
                x = _max_pool(x)
            for i in range(1, convs + 1):
                x = jax.nn.relu(getattr(self, f"conv{stage}_{i}")(x))
            found.append(x.astype(jnp.float32))
        return found


class Lpips(Vgg):
    """VGG16 up to its last convolution, and a weight per compared channel.

    The additional parameters `head1` .. `head5` have one weight per channel.
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        """`dtype` is the dtype of the convolutions; features are compared in float32."""
        super().__init__(len(STAGES), rngs=rngs, dtype=dtype)
        for stage, widths in enumerate(STAGES, 1):
            setattr(self, f"head{stage}", nnx.Param(jnp.full((widths[-1],), 1.0 / widths[-1])))

    def features(self, frames: jax.Array) -> list[jax.Array]:
        """Unit-length features after each stage; see `activations`."""
        return [_normalize(x) for x in self.activations(frames)]

    def distance(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Distance between each frame of x and the same frame of y.

        Args:
          x, y: [B, H, W, 3] float32 in [0, 1], H and W at least 16.

        Returns:
          [B] float32, 0 for equal frames: the weighted sum over channels of the squared differences of features,
          averaged over positions and summed over stages.

        Raises:
          InputError: the shapes differ, are not [B, H, W, 3], or H or W is too small.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < SMALLEST:
            raise InputError(
                f"LPIPS needs two arrays [B, H, W, 3] of the same shape, H and W at least {SMALLEST}; got"
                f" {list(x.shape)} and {list(y.shape)}"
            )
        total = jnp.zeros(len(x))
        # separately and not as one batch, so that no gradient is computed for an input that needs none
        for stage, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True), 1):
            total += jnp.square(a - b).mean((1, 2)) @ getattr(self, f"head{stage}")[...]
        return total


def _max_pool(x: jax.Array) -> jax.Array:
    """Maximum over windows of 2 x 2; an odd row or column at the end is dropped.

    On ties the gradient goes to the first value, as in PyTorch. Uses comparisons, because the backward pass of
    `reduce_window` is slow on XLA's CPU backend.
    """
    height, width = (n // 2 * 2 for n in x.shape[1:3])
    left, right = x[:, :height, :width:2], x[:, :height, 1:width:2]
    rows = jnp.where(right > left, right, left)
    upper, lower = rows[:, ::2], rows[:, 1::2]
    return jnp.where(lower > upper, lower, upper)


def _normalize(x: jax.Array) -> jax.Array:
    """x [..., C] divided by its length + 1e-10; the gradient at x = 0 is 0 (not NaN)."""
    square = jnp.square(x).sum(-1, keepdims=True)
    length = jnp.where(square > 0.0, jnp.sqrt(jnp.where(square > 0.0, square, 1.0)), 0.0)
    return x / (length + 1e-10)
