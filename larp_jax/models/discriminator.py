"""Discriminators, which map a whole clip to one logit, higher for real clips.

`Discriminator` is that of LARP (arXiv 2410.21264, section 3.3); `FeatureDiscriminator` reads the features of a frozen
network (EVATok, arXiv 2603.12267).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import DiscriminatorConfig
from larp_jax.errors import InputError
from larp_jax.models.embeddings import PatchEmbed, Positions3d
from larp_jax.models.grids import patch_grid
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Transformer
from larp_jax.models.teachers import Teacher

KERNEL = 9  # tokens that a convolution sees


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


class FeatureDiscriminator(nnx.Module):
    """Heads of 1-D convolutions over the tokens of several layers of a frozen network, one head per layer.

    The logit of a clip is the mean over heads and tokens. The paper states the frozen network and trainable heads of
    1-D convolutions on several layers; everything else about them is our choice.

    Args:
      config: `layers`, and the `width` of the heads.
      trunk: the frozen network, without weights.
      clip_shape: [T, H, W, C] of the clips.
      rngs: `params` stream for the initial weights.
      dtype: dtype of the computation; parameters and logits are float32.

    Raises:
      InputError: the network has no such layer, or the clips do not fit it.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        trunk: Teacher,
        clip_shape: tuple[int, int, int, int],
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
    ):
        clip = jax.ShapeDtypeStruct((1, *clip_shape), jnp.float32)
        try:
            hidden = nnx.eval_shape(lambda trunk, clip: trunk.hidden(clip, config.layers), trunk, clip)
        except InputError as error:
            raise InputError(f"discriminator.layers: {error}") from error
        self.layers = config.layers
        for layer, features in zip(config.layers, hidden, strict=True):
            setattr(self, f"layer{layer}", TokenHead(features.shape[-1], config.width, rngs=rngs, dtype=dtype))

    def __call__(self, hidden: Sequence[jax.Array]) -> jax.Array:
        """Features [B, t, h, w, C] of each of `layers` -> logits [B] float32."""
        logits = [
            getattr(self, f"layer{layer}")(features.reshape(len(features), -1, features.shape[-1])).mean(axis=1)
            for layer, features in zip(self.layers, hidden, strict=True)
        ]
        return sum(logits) / len(logits)


class TokenHead(nnx.Module):
    """Layer norm; linear; leaky ReLU; a convolution over 9 tokens with leaky ReLU and a residual; a logit per token."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.norm = LayerNorm(channels, epsilon=1e-6, dtype=dtype)
        self.up = Linear(channels, width, rngs=rngs, dtype=dtype)
        self.proj = nnx.Conv(width, width, (KERNEL,), padding="SAME", dtype=dtype, rngs=rngs)
        self.head = Linear(width, 1, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens [B, N, C] in the order time, height, width -> logits [B, N] float32."""
        x = jax.nn.leaky_relu(self.up(self.norm(x)), 0.2)
        x = x + jax.nn.leaky_relu(self.proj(x), 0.2)
        return self.head(x)[..., 0].astype(jnp.float32)
