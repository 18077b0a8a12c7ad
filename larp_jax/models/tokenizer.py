"""The LARP tokenizer: encoder with holistic queries, quantizer and decoder (LARP, arXiv 2410.21264, section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import TokenizerConfig
from larp_jax.models.embeddings import PatchEmbed, Positions1d, Positions3d, unpatchify
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Transformer
from larp_jax.models.quantizer import Quantized, Quantizer


class Encoder(nnx.Module):
    """A transformer over [patches; queries]; the outputs at the queries are returned.

    Without queries in the patchwise layout, where the outputs at the patches are returned.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs, remat: str, dtype: Dtype):
        c = config
        self.patch_embed = PatchEmbed(c.encoder_patch, c.channels, c.encoder.width, rngs=rngs, dtype=dtype)
        self.patch_positions = Positions3d(
            c.encoder_grid,
            c.encoder.width,
            rngs=rngs,
            learned=c.learned_encoder_patch_pe,
            token_type=c.use_encoder_patch_token_type_embed,
        )
        queries = None
        if not c.is_patchwise:
            queries = Positions1d(
                c.num_tokens,
                c.encoder.width,
                rngs=rngs,
                learned=c.learned_encoder_latent_query_embed,
                token_type=c.use_encoder_latent_query_token_type_embed,
                base=c.latent_position_base,
                init_std=c.query_init_std if c.encoder_query_gaussian_init else None,
            )
        self.queries = queries
        self.transformer = Transformer(c.encoder, rngs=rngs, remat=remat, dtype=dtype)

    def __call__(self, video: jax.Array) -> jax.Array:
        """Video [B, T, H, W, C] in [0, 1] -> [B, N, D] float32."""
        patches = self.patch_embed(video) + self.patch_positions()
        if self.queries is None:
            return self.transformer(patches)
        queries = self.queries()
        queries = jnp.broadcast_to(queries, (patches.shape[0], *queries.shape))
        x = self.transformer(jnp.concatenate([patches, queries], axis=1))
        return x[:, patches.shape[1] :]


class Decoder(nnx.Module):
    """A transformer over [latents; patch queries]; the outputs at the patch queries are converted to pixels.

    In the patchwise layout, the latents are added to the patch queries instead.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs, remat: str, dtype: Dtype):
        c = config
        width = c.decoder.width
        latent_positions = None
        if not c.is_patchwise:
            latent_positions = Positions1d(
                c.num_tokens,
                width,
                rngs=rngs,
                learned=c.learned_decoder_latent_pe,
                token_type=c.use_decoder_latent_token_type_embed,
                base=c.latent_position_base,
                init_std=0.02,
            )
        self.latent_positions = latent_positions
        self.patch_queries = Positions3d(
            c.decoder_grid,
            width,
            rngs=rngs,
            learned=c.learned_decoder_patch_query_embed,
            token_type=c.use_decoder_patch_query_token_type_embed,
        )
        self.transformer = Transformer(c.decoder, rngs=rngs, remat=remat, dtype=dtype)
        self.norm = LayerNorm(width, epsilon=1e-6, dtype=dtype)
        pt, ph, pw = c.decoder_patch
        self.head = Linear(
            width, pt * ph * pw * c.channels, rngs=rngs, kernel_init=nnx.initializers.zeros, dtype=dtype
        )
        self.grid, self.patch = c.decoder_grid, c.decoder_patch

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Latents [B, N, D] -> video [B, T, H, W, C] float32, not clamped."""
        patches = self.head(self.features(latents)).astype(jnp.float32)
        return unpatchify(patches, self.grid, self.patch)

    def features(self, latents: jax.Array) -> jax.Array:
        """Latents [B, N, D] -> inputs of the head, [B, patches, D]."""
        if self.latent_positions is None:
            return self.norm(self.transformer(latents + self.patch_queries()))
        latents = latents + self.latent_positions()
        queries = self.patch_queries()
        queries = jnp.broadcast_to(queries, (latents.shape[0], *queries.shape))
        x = self.transformer(jnp.concatenate([latents, queries], axis=1))[:, latents.shape[1] :]
        return self.norm(x)


class Tokenizer(nnx.Module):
    """Encodes videos to N discrete codes, and decodes them.

    Args:
      config: sizes and options.
      rngs: `params` stream for the initial weights.
      remat: what the backward pass recomputes, see `larp_jax.models.layers.run_stack`.
      dtype: dtype of the computation; parameters, quantizer and output are float32.
    """

    def __init__(
        self, config: TokenizerConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32
    ):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, remat=remat, dtype=dtype)
        widths = config.encoder.width, config.decoder.width
        self.quantizer = Quantizer(config.quantizer, *widths, config.num_tokens, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs, remat=remat, dtype=dtype)

    def __call__(
        self,
        video: jax.Array,
        *,
        key: jax.Array | None = None,
        temperature: jax.Array | float | None = None,
        share: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Quantized]:
        """Reconstructs a video.

        Args:
          video: [B, T, H, W, C] float in [0, 1].
          key: random key of sampling codes; None for deterministic codes.
          temperature: sampling temperature; that of the configuration by default.
          share: weight of the codes, against the latents, in the input of the decoder; see `Quantizer`.

        Returns:
          The reconstruction [B, T, H, W, C] float32 (not clamped) and the output of the quantizer.
        """
        quantized = self.quantize(video, key=key, temperature=temperature, share=share)
        return self.decode_latents(quantized.z_q), quantized

    def quantize(self, video: jax.Array, **options) -> Quantized:
        """The first half of `__call__`, with the same arguments."""
        return self.quantizer(self.quantizer.project(self.encoder(video)), **options)

    def decode_latents(self, z_q: jax.Array) -> jax.Array:
        """Latents [B, N, d] -> video [B, T, H, W, C] float32, not clamped."""
        return self.decoder(self.quantizer.expand(z_q))

    def decode(self, indices: jax.Array) -> jax.Array:
        """Codes [B, N] int -> video [B, T, H, W, C] float32, not clamped."""
        return self.decode_latents(self.quantizer.lookup(indices))
