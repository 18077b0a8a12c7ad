"""The router: chooses the number of codes of each block of a clip (EVATok, arXiv 2603.12267)."""

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import RouterConfig, TransformerConfig
from larp_jax.models.embeddings import PatchEmbed, Positions3d
from larp_jax.models.grids import patch_grid
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Transformer


class Router(nnx.Module):
    """Linear patch embedding, a transformer over [class token; patches], and one output for each assignment.

    Args:
      config: complete.
      rngs: `params` stream for the initial weights.
      remat: what the backward pass recomputes, see `larp_jax.models.layers.REMAT`.
      dtype: dtype of the computation.
    """

    def __init__(self, config: RouterConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32):
        width = config.width
        self.patch_embed = PatchEmbed(config.patch, 3, width, rngs=rngs, dtype=dtype)
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
        grid = patch_grid(video.shape[1:], self.patch_embed.patch)
        patches = self.patch_embed(video - 0.5) + self.patch_positions(grid)
        first = jnp.broadcast_to(self.class_token[...], (len(patches), 1, patches.shape[-1]))
        x = self.transformer(jnp.concatenate([first, patches], axis=1))
        return self.head(self.norm(x[:, 0])).astype(jnp.float32)

    def lengths(self, video: jax.Array) -> jax.Array:
        """Video [B, T, H, W, C] in [0, 1] -> the numbers of codes with the highest output, [B, blocks] int32."""
        return jnp.asarray(self.config.adaptive.assignments, jnp.int32)[self(video).argmax(axis=-1)]
