"""The discriminator: a transformer that maps a whole clip to one logit, higher for real clips.

See LARP, arXiv 2410.21264, section 3.3.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import DiscriminatorConfig
from larp_jax.errors import InputError
from larp_jax.models.embeddings import PatchEmbed, Positions3d, patch_grid
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Transformer


class Discriminator(nnx.Module):
    """A transformer over [class token; patches]; the output at the class token is mapped to a logit.

    Args:
      config: size and patch.
      clip_shape: [T, H, W, C] of the clips.
      rngs: `params` stream for the initial weights.
      remat: see `larp_jax.models.layers.run_stack`.
      dtype: dtype of the computation; parameters and logits are float32.

    Raises:
      InputError: the clips are not divisible into patches.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        clip_shape: tuple[int, int, int, int],
        *,
        rngs: nnx.Rngs,
        remat: str = "none",
        dtype: Dtype = jnp.float32,
    ):
        *size, channels = clip_shape
        if any(n % patch for n, patch in zip(size, config.patch, strict=True)):
            raise InputError(
                f"clips of {'x'.join(map(str, size))} are not divisible into discriminator patches of"
                f" {'x'.join(map(str, config.patch))}; change discriminator.patch_frames or discriminator.patch_size"
            )
        grid = patch_grid(size, config.patch)
        self.patch_embed = PatchEmbed(config.patch, channels, config.width, rngs=rngs, dtype=dtype)
        self.positions = Positions3d(grid, config.width, rngs=rngs, learned=False, token_type=False)
        # Xavier-uniform with shape [1, 1, D], as in the released code
        token = nnx.initializers.xavier_uniform(in_axis=1, out_axis=0)(rngs.params(), (1, 1, config.width), jnp.float32)
        self.class_token = nnx.Param(token[0, 0])
        self.transformer = Transformer(config, rngs=rngs, remat=remat, dtype=dtype)
        self.norm = LayerNorm(config.width, epsilon=1e-6, dtype=dtype)
        self.head = Linear(config.width, 1, rngs=rngs, dtype=dtype)

    def __call__(self, video: jax.Array) -> jax.Array:
        """Clips [B, T, H, W, C] in [0, 1] -> logits [B] float32."""
        grid = patch_grid(video.shape[1:], self.patch_embed.patch)
        patches = self.patch_embed(video) + self.positions(grid)
        token = jnp.broadcast_to(self.class_token[...], (len(patches), 1, patches.shape[-1]))
        x = self.transformer(jnp.concatenate([token, patches], axis=1))
        return self.head(self.norm(x[:, 0]))[:, 0].astype(jnp.float32)
