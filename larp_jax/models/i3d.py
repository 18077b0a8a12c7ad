"""I3D, the network whose logits are the features of FVD (Carreira & Zisserman 2017, arXiv 1705.07750)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.errors import InputError
from larp_jax.models.layers import Linear

CLASSES = 400  # of Kinetics
RESOLUTION = 224
SHORTEST = 9  # frames; with fewer, the output has fewer than two time steps to average

# Widths of the four branches of each inception block: 1x1x1; 1x1x1, 3x3x3; 1x1x1, 3x3x3; 1x1x1 after pooling.
MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Pooling before a block: window (time, space) and strides (time, space).
POOL_BEFORE = {"mixed_3b": ((1, 3), (1, 2)), "mixed_4b": ((3, 3), (2, 2)), "mixed_5b": ((2, 2), (2, 2))}


class I3d(nnx.Module):
    """Inflated Inception on RGB, with batch norms folded into the preceding convolutions.

    Parameters are float32: convolutions with kernels [T, H, W, inputs, outputs] and biases, and the linear `head`.
    They are random until trained weights are loaded.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv3d_1a = _conv(3, 64, 7, rngs, stride=2)
        self.conv3d_2b = _conv(64, 64, 1, rngs)
        self.conv3d_2c = _conv(64, 192, 3, rngs)
        inputs = 192
        for name, widths in MIXED.items():
            block = Inception(inputs, widths, rngs=rngs)
            setattr(self, name, block)
            inputs = block.outputs
        self.head = Linear(inputs, CLASSES, rngs=rngs)

    def logits(self, video: jax.Array) -> jax.Array:
        """Class logits of each clip.

        Args:
          video: [B, T, H, W, 3] float32 in [0, 1]; T at least 9. Frames are resized to 224 x 224 (bilinear,
            `align_corners=False` in PyTorch's terms, no antialiasing).

        Returns:
          [B, 400] float32, averaged over time.

        Raises:
          InputError: the shape is not [B, T, H, W, 3], or T is too small.
        """
        if video.ndim != 5 or video.shape[-1] != 3 or video.shape[1] < SHORTEST:
            raise InputError(f"I3D needs videos [B, T, H, W, 3], T at least {SHORTEST}; got {list(video.shape)}")
        shape = (*video.shape[:2], RESOLUTION, RESOLUTION, 3)
        x = 2.0 * jax.image.resize(video, shape, "bilinear", antialias=False) - 1.0
        x = _max_pool(jax.nn.relu(self.conv3d_1a(x)), (1, 3), (1, 2))
        x = jax.nn.relu(self.conv3d_2c(jax.nn.relu(self.conv3d_2b(x))))
        for name in MIXED:
            if name in POOL_BEFORE:
                x = _max_pool(x, *POOL_BEFORE[name])
            x = getattr(self, name)(x)
        # average pooling with windows 2 x 7 x 7, where frames are 7 x 7 here; means commute with the linear layer
        x = x.mean((2, 3))
        return self.head(((x[:, :-1] + x[:, 1:]) / 2.0).mean(1))


class Inception(nnx.Module):
    """An inception block: four parallel branches of convolutions, concatenated to `outputs` channels."""

    def __init__(self, inputs: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = _conv(inputs, b0, 1, rngs)
        self.b1a, self.b1b = _conv(inputs, b1a, 1, rngs), _conv(b1a, b1b, 3, rngs)
        self.b2a, self.b2b = _conv(inputs, b2a, 1, rngs), _conv(b2a, b2b, 3, rngs)
        self.b3b = _conv(inputs, b3b, 1, rngs)
        self.outputs = b0 + b1b + b2b + b3b

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, H, W, inputs] -> [B, T, H, W, outputs]."""
        relu = jax.nn.relu
        branches = (
            self.b0(x),
            self.b1b(relu(self.b1a(x))),
            self.b2b(relu(self.b2a(x))),
            self.b3b(_max_pool(x, (3, 3), (1, 1))),
        )
        return relu(jnp.concatenate(branches, axis=-1))


def _conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, *, stride: int = 1) -> nnx.Conv:
    """A convolution with a cubic kernel, padded as in TensorFlow (if odd, the extra row is at the end)."""
    return nnx.Conv(inputs, outputs, (size,) * 3, strides=stride, padding="SAME", rngs=rngs)


def _max_pool(x: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> jax.Array:
    """Maximum over windows (time, space), padded as in TensorFlow. One axis at a time needs fewer comparisons."""
    for axis, (n, stride) in enumerate(zip((*window, window[1]), (*strides, strides[1]), strict=True), 1):
        along = functools.partial(_along, x.ndim, axis)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, along(n), along(stride), "SAME")
    return x


def _along(ndim: int, axis: int, n: int) -> tuple[int, ...]:
    return tuple(n if i == axis else 1 for i in range(ndim))
