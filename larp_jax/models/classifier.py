"""A small classifier of clips, whose features measure samples in experiments."""

import jax
from flax import nnx

WIDTHS = (16, 32, 64)
FEATURES = 64


class Classifier(nnx.Module):
    """Three convolutions with stride 2 of each frame, then linear layers over positions and frames; all in float32.

    Args:
      clip_shape: [T, H, W, C] of the clips.
      classes: number of classes.
      rngs: `params` stream for the initial weights.
    """

    def __init__(self, clip_shape: tuple[int, int, int, int], classes: int, *, rngs: nnx.Rngs):
        frames, height, width, channels = clip_shape
        sizes = zip((channels, *WIDTHS), WIDTHS, strict=False)
        self.convolutions = nnx.List([nnx.Conv(a, b, (5, 5), strides=2, rngs=rngs) for a, b in sizes])
        for _ in WIDTHS:
            height, width = -(-height // 2), -(-width // 2)
        self.of_frame = nnx.Linear(height * width * WIDTHS[-1], FEATURES, rngs=rngs)
        self.of_clip = nnx.Linear(frames * FEATURES, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, classes, rngs=rngs)

    def features(self, video: jax.Array) -> jax.Array:
        """Clips [B, T, H, W, C] in [0, 1] -> features [B, 64] float32, at least 0."""
        x = 2.0 * video.reshape(-1, *video.shape[2:]) - 1.0
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        x = jax.nn.relu(self.of_frame(x.reshape(len(x), -1)))
        return jax.nn.relu(self.of_clip(x.reshape(len(video), -1)))

    def __call__(self, video: jax.Array) -> jax.Array:
        """Clips [B, T, H, W, C] in [0, 1] -> logits [B, classes] float32."""
        return self.head(self.features(video))
