"""The router: chooses the number of codes of each block of a clip (EVATok, arXiv 2603.12267)."""

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx

from larp_jax.config import RouterConfig, TransformerConfig
from larp_jax.models.embeddings import Positions3d, patchify
from larp_jax.models.grids import Grid, patch_grid
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Transformer

SMALLEST_SQUARE = 1e-5  # about that of one level of 8-bit pixels: the logarithm is finite where nothing differs


def log_differences(video: jax.Array, patch: Grid) -> jax.Array:
    """How large the differences of neighboring pixels are in each patch, along time, height and width.

    A linear layer cannot compute it from pixels.

    Args:
      video: [B, T, H, W, C] in [0, 1].
      patch: (time, height, width).

    Returns:
      Logarithms of the mean squared differences, [B, patches, 3] float32, scaled to about -3 to 3.
    """
    video, found = video.astype(jnp.float32), []
    row = patch[2] * video.shape[-1]  # values of a row of a patch
    for axis in (1, 2, 3):
        first = jax.lax.slice_in_dim(video, 0, 1, axis=axis)  # nothing is before it: the difference is 0
        squares = jnp.square(jnp.diff(video, axis=axis, prepend=first))
        # the mean of each row as a product: XLA's means of so many values are slow on CPUs
        rows = jnp.matmul(squares.reshape(*video.shape[:3], -1, row), jnp.full((row, 1), 1 / row), precision="highest")
        means = reduce(rows, "b (t pt) (h ph) w 1 -> b (t h w)", "mean", pt=patch[0], ph=patch[1])
        found.append(jnp.log(means + SMALLEST_SQUARE))
    return jnp.stack(found, axis=-1) / 2 + 3


class RouterEmbed(nnx.Module):
    """What a router reads of each patch, see `RouterConfig.input`, and a linear layer."""

    def __init__(self, config: RouterConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        self.proj = Linear(config.patch_inputs, config.width, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(self, video: jax.Array) -> jax.Array:
        """Video [B, T, H, W, C] in [0, 1] -> [B, patches, D]."""
        if self.config.input == "differences":
            return self.proj(log_differences(video, self.config.patch))
        return self.proj(patchify(video - 0.5, self.config.patch))


class Router(nnx.Module):
    """An embedding of patches, a transformer over [class token; patches], and one output for each assignment.

    Args:
      config: complete.
      rngs: `params` stream for the initial weights.
      remat: what the backward pass recomputes, see `larp_jax.models.layers.REMAT`.
      dtype: dtype of the computation.
    """

    def __init__(self, config: RouterConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32):
        width = config.width
        self.patch_embed = RouterEmbed(config, rngs=rngs, dtype=dtype)
        self.patch_positions = Positions3d(config.grid, width, rngs=rngs, learned=True, token_type=False)
        self.class_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), jnp.float32))
        size = TransformerConfig(width=width, depth=config.depth, heads=config.heads)
        self.transformer = Transformer(size, rngs=rngs, remat=remat, dtype=dtype)
        self.norm = LayerNorm(width, epsilon=1e-5, dtype=dtype)
        zeros = nnx.initializers.zeros  # all assignments are equally likely at the start
        self.head = Linear(width, len(config.adaptive.assignments), rngs=rngs, kernel_init=zeros, dtype=dtype)
        self.config = config

    def __call__(self, video: jax.Array) -> jax.Array:
        """Video [B, T, H, W, C] in [0, 1] -> outputs [B, assignments] float32, in the order of the ladder.

        They are logits, or rewards less their mean, see `RouterRecipe.objective`.
        """
        grid = patch_grid(video.shape[1:], self.config.patch)
        patches = self.patch_embed(video) + self.patch_positions(grid)
        first = jnp.broadcast_to(self.class_token[...], (len(patches), 1, patches.shape[-1]))
        x = self.transformer(jnp.concatenate([first, patches], axis=1))
        return self.head(self.norm(x[:, 0])).astype(jnp.float32)

    def lengths(self, video: jax.Array) -> jax.Array:
        """Video [B, T, H, W, C] in [0, 1] -> the numbers of codes with the highest output, [B, blocks] int32."""
        return jnp.asarray(self.config.adaptive.assignments, jnp.int32)[self(video).argmax(axis=-1)]
