"""The LARP tokenizer: encoder with holistic queries, quantizer and decoder (LARP, arXiv 2410.21264, section 3.2)."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import TokenizerConfig
from larp_jax.models import packing
from larp_jax.models.attention import Blocks
from larp_jax.models.embeddings import PatchEmbed, Positions1d, Positions3d, unpatchify
from larp_jax.models.grids import Grid, patch_grid
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Memory, Transformer
from larp_jax.models.quantizer import Quantized, Quantizer
from larp_jax.models.rotary import Rotation, angles_3d, rotation


@dataclasses.dataclass(frozen=True)
class _Rotary:
    """The rotations of sequences of patches of a grid and tokens that have no place in it, if they are `used`."""

    used: bool
    grid: Grid
    heads: int
    width: int

    def of(
        self, patches: slice = slice(None), *, grid: Grid | None = None, before: int = 0, after: int = 0
    ) -> Rotation | None:
        """The rotation of these patches, of a grid, with so many tokens before or after them; None if none is used."""
        if not self.used:
            return None
        return rotation(angles_3d(grid or self.grid, self.width, self.grid)[patches], before, after)


class Encoder(nnx.Module):
    """A transformer over [patches; queries]; the outputs at the queries are returned.

    Without queries in the patchwise layout, where the outputs at the patches are returned. With lengths, each block of
    frames has the first of the queries, as many as its codes, and attends only to its own and earlier blocks.
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
            rotary=c.is_rotary,
        )
        queries = None
        if not c.is_patchwise:
            queries = Positions1d(
                c.query_rows,
                c.encoder.width,
                rngs=rngs,
                learned=c.learned_encoder_latent_query_embed,
                token_type=c.use_encoder_latent_query_token_type_embed,
                base=c.latent_position_base,
                init_std=c.query_init_std if c.encoder_query_gaussian_init else None,
                blocks=c.blocks,
            )
        self.queries = queries
        self.transformer = Transformer(c.encoder, rngs=rngs, kind=c.block, remat=remat, dtype=dtype)
        self.num_tokens = c.num_tokens
        self.rotary = _Rotary(c.is_rotary, c.encoder_grid, *self.transformer.head_shape)

    def __call__(
        self, video: jax.Array, lengths: jax.Array | None = None, seen: jax.Array | None = None
    ) -> jax.Array:
        """Video [B, T, H, W, C] in [0, 1] -> [B, N, D] float32; packed if lengths of blocks are given.

        With `seen`, [B, patches] bool, queries and patches do not attend to the other patches.
        """
        grid = patch_grid(video.shape[1:], self.patch_embed.patch)
        patches = self.patch_embed(video) + self.patch_positions(grid)
        if self.queries is None:
            return self.transformer(patches, rotation=self.rotary.of(grid=grid))
        if lengths is None and seen is None:
            queries, blocks = self.queries(), None
            queries = jnp.broadcast_to(queries, (patches.shape[0], *queries.shape))
        else:
            if lengths is None:  # one block of all codes
                lengths = jnp.full((len(patches), 1), self.num_tokens, jnp.int32)
            layout = packing.layout(lengths, self.num_tokens)
            queries = self.queries.at(layout)
            first = packing.block_of_patches(lengths, patches.shape[1])
            if seen is not None:  # a patch that comes after all blocks is seen by none
                first = jnp.where(seen, first, lengths.shape[1])
            blocks = Blocks(jnp.concatenate([first, layout.block], axis=1), lengths.shape[1] + 1)
        rotation = self.rotary.of(grid=grid, after=queries.shape[1])
        x = self.transformer(jnp.concatenate([patches, queries], axis=1), blocks, rotation)
        return x[:, patches.shape[1] :]

    def extend(self, frames: jax.Array, layout: packing.Layout, past: Sequence[Memory]) -> tuple[jax.Array, Memory]:
        """The frames of the block after `past`, [B, T / blocks, H, W, C] -> [B, N, D] for its layout [B, N]."""
        patches = self.patch_embed(frames)
        count = patches.shape[1]
        mine = slice(len(past) * count, (len(past) + 1) * count)
        patches = patches + self.patch_positions()[mine]
        seen = jnp.concatenate([jnp.ones((len(frames), count), bool), layout.valid], axis=1)
        x = jnp.concatenate([patches, self.queries.at(layout)], axis=1)
        rotation = self.rotary.of(mine, after=x.shape[1] - count)
        x, memory = self.transformer.extend(x, seen, past, rotation)
        return x[:, count:], memory


class Decoder(nnx.Module):
    """A transformer over [latents; patch queries]; the outputs at the patch queries are converted to pixels.

    In the patchwise layout, the latents are added to the patch queries instead. With lengths, each block of frames
    attends only to its own latents and patch queries and those of earlier blocks.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs, remat: str, dtype: Dtype):
        c = config
        width = c.decoder.width
        latent_positions = None
        if not c.is_patchwise:
            latent_positions = Positions1d(
                c.query_rows,
                width,
                rngs=rngs,
                learned=c.learned_decoder_latent_pe,
                token_type=c.use_decoder_latent_token_type_embed,
                base=c.latent_position_base,
                init_std=0.02,
                blocks=c.blocks,
            )
        self.latent_positions = latent_positions
        self.patch_queries = Positions3d(
            c.decoder_grid,
            width,
            rngs=rngs,
            learned=c.learned_decoder_patch_query_embed,
            token_type=c.use_decoder_patch_query_token_type_embed,
            rotary=c.is_rotary,
        )
        self.transformer = Transformer(c.decoder, rngs=rngs, kind=c.block, remat=remat, dtype=dtype)
        self.rotary = _Rotary(c.is_rotary, c.decoder_grid, *self.transformer.head_shape)
        self.norm = LayerNorm(width, epsilon=1e-6, dtype=dtype)
        pt, ph, pw = c.decoder_patch
        self.head = Linear(
            width, pt * ph * pw * c.channels, rngs=rngs, kernel_init=nnx.initializers.zeros, dtype=dtype
        )
        self.grid, self.patch, self.blocks = c.decoder_grid, c.decoder_patch, c.blocks

    def __call__(
        self, latents: jax.Array, lengths: jax.Array | None = None, shape: tuple[int, ...] | None = None
    ) -> jax.Array:
        """Latents [B, N, D] -> video [B, T, H, W, C] float32, not clamped; `shape` is [T, H, W], by default its own.

        If the lengths are only those of the first blocks, the video is only their frames.
        """
        grid = patch_grid(shape, self.patch) if shape else self.grid
        x, first, shared = self._inputs(latents, lengths, grid)
        return self._video(self.transformer(x, *shared)[:, first:], grid)

    def with_features(
        self, latents: jax.Array, lengths: jax.Array | None, layer: int, shape: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The result of `__call__`, and the patches after the first `layer` blocks, [B, t, h, w, D] float32."""
        grid = patch_grid(shape, self.patch) if shape else self.grid
        x, first, shared = self._inputs(latents, lengths, grid)
        x, kept = self.transformer.keeping(x, layer, *shared)
        return self._video(x[:, first:], grid), kept[:, first:].reshape(len(kept), -1, *grid[1:], kept.shape[-1])

    def _video(self, x: jax.Array, grid: Grid) -> jax.Array:
        patches = self.head(self.norm(x)).astype(jnp.float32)
        return unpatchify(patches, (patches.shape[1] // (grid[1] * grid[2]), *grid[1:]), self.patch)

    def _inputs(self, latents, lengths, grid: Grid) -> tuple[jax.Array, int, tuple]:
        """What the transformer reads, [B, N + patches, D], the position of the first patch, blocks and rotation."""
        queries = self.patch_queries(grid)
        if self.latent_positions is None:
            return latents + queries, 0, (None, self.rotary.of(grid=grid))
        if lengths is None:
            latents, blocks = latents + self.latent_positions(), None
        else:
            layout = packing.layout(lengths, latents.shape[1])
            latents = latents + self.latent_positions.at(layout)
            queries = queries[: len(queries) // self.blocks * lengths.shape[1]]
            last = packing.block_of_patches(lengths, len(queries))
            blocks = Blocks(jnp.concatenate([layout.block, last], axis=1), lengths.shape[1] + 1)
        rotation = self.rotary.of(slice(len(queries)), grid=grid, before=latents.shape[1])
        queries = jnp.broadcast_to(queries, (latents.shape[0], *queries.shape))
        return jnp.concatenate([latents, queries], axis=1), latents.shape[1], (blocks, rotation)

    def extend(self, latents: jax.Array, layout: packing.Layout, past: Sequence[Memory]) -> tuple[jax.Array, Memory]:
        """Latents [B, N, D] of the block after `past`, in this layout -> its frames, not clamped."""
        count = math.prod(self.grid) // self.blocks
        mine = slice(len(past) * count, (len(past) + 1) * count)
        queries = self.patch_queries()[mine]
        queries = jnp.broadcast_to(queries, (len(latents), *queries.shape))
        seen = jnp.concatenate([layout.valid, jnp.ones((len(latents), count), bool)], axis=1)
        x = jnp.concatenate([latents + self.latent_positions.at(layout), queries], axis=1)
        rotation = self.rotary.of(mine, before=latents.shape[1])
        x, memory = self.transformer.extend(x, seen, past, rotation)
        return self._video(x[:, latents.shape[1] :], self.grid), memory


class Tokenizer(nnx.Module):
    """Encodes videos to N discrete codes, or for the KL bottleneck continuous latents, and decodes them.

    Videos may have fewer frames than a clip and another height and width, all divisible into patches: positions follow
    the coordinates, see `Positions3d`, and the number of codes stays N. In the patchwise layout each patch has a code.

    If the configuration has a ladder, `lengths` [B, T] int32 are the numbers of codes of each block of each clip, and
    codes and latents are packed (`larp_jax.models.packing`). Without them, every clip gets the largest uniform numbers.

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
        lengths: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        temperature: jax.Array | float | None = None,
        share: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Quantized]:
        """Reconstructs a video.

        Args:
          video: [B, T, H, W, C] float in [0, 1].
          lengths: numbers of codes, see the class.
          key: random key of sampling codes; None for deterministic codes.
          temperature: sampling temperature; that of the configuration by default.
          share: weight of the codes, against the latents, in the input of the decoder; see `Quantizer`.

        Returns:
          The reconstruction [B, T, H, W, C] float32 (not clamped) and the output of the quantizer.
        """
        quantized = self.quantize(video, lengths, key=key, temperature=temperature, share=share)
        return self.decode_latents(quantized.z_q, quantized.lengths, video.shape[1:4]), quantized

    def quantize(
        self, video: jax.Array, lengths: jax.Array | None = None, *, seen: jax.Array | None = None, **options
    ) -> Quantized:
        """The first half of `__call__`, with the same arguments; `seen` as for `Encoder`."""
        lengths = self._lengths(lengths, video.shape[0])
        latents = self.quantizer.project(self.encoder(video, lengths, seen))
        return self.quantizer(latents, lengths=lengths, **options)

    def decode_latents(
        self, z_q: jax.Array, lengths: jax.Array | None = None, shape: tuple[int, ...] | None = None
    ) -> jax.Array:
        """Latents [B, N, d] -> video [B, T, H, W, C] float32, not clamped, of this shape [T, H, W], or of its own.

        If the lengths are only those of the first blocks, the video is only their frames.
        """
        return self.decoder(self.quantizer.expand(z_q), self._lengths(lengths, z_q.shape[0]), shape)

    def decode_with_features(
        self, z_q: jax.Array, lengths: jax.Array | None, layer: int, shape: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The result of `decode_latents`, and the decoder's patches after `layer` blocks, [B, t, h, w, D] float32."""
        lengths = self._lengths(lengths, z_q.shape[0])
        return self.decoder.with_features(self.quantizer.expand(z_q), lengths, layer, shape)

    def decode(
        self, tokens: jax.Array, lengths: jax.Array | None = None, shape: tuple[int, ...] | None = None
    ) -> jax.Array:
        """Codes [B, N] int, or for the KL bottleneck latents [B, N, d] -> video as `decode_latents`."""
        return self.decode_latents(self.quantizer.lookup(tokens), lengths, shape)

    def extend(
        self, frames: jax.Array, lengths: jax.Array, past: Sequence[tuple[Memory, Memory]]
    ) -> tuple[jax.Array, jax.Array, tuple[Memory, Memory]]:
        """Encodes and decodes one block, given what it attends to of the blocks before: their keys and values.

        Equal to what `__call__` computes for this block, whatever the blocks after it are.

        Args:
          frames: of the block, [B, T / blocks, H, W, C] float in [0, 1].
          lengths: [B] int32, numbers of codes of the block.
          past: what this method returned for each block before.

        Returns:
          Codes [B, largest number of the ladder] int32, or latents with an axis of d (0 after the block's own), the
          reconstructed frames (not clamped), and the memory of the block in encoder and decoder.
        """
        codes, of_encoder = self.encode_block(frames, lengths, [memory for memory, _ in past])
        reconstruction, of_decoder = self.decode_block(codes, lengths, [memory for _, memory in past])
        return codes, reconstruction, (of_encoder, of_decoder)

    def encode_block(
        self, frames: jax.Array, lengths: jax.Array, past: Sequence[Memory]
    ) -> tuple[jax.Array, Memory]:
        """The first half of `extend`: codes and the memory in the encoder, which is all that `past` contains."""
        h, memory = self.encoder.extend(frames, self._block_layout(lengths, past), past)
        return self.quantizer(self.quantizer.project(h), lengths=lengths[:, None]).tokens, memory

    def decode_block(
        self, codes: jax.Array, lengths: jax.Array, past: Sequence[Memory]
    ) -> tuple[jax.Array, Memory]:
        """The second half of `extend`: frames and the memory in the decoder, which is all that `past` contains."""
        latents = self.quantizer.expand(self.quantizer.lookup(codes))
        return self.decoder.extend(latents, self._block_layout(lengths, past), past)

    def _block_layout(self, lengths, past):
        return packing.block_layout(len(past), lengths, self.config.query_rows)

    def _lengths(self, lengths, rows):
        ladder = self.config.adaptive
        if ladder is None:
            if lengths is not None:
                raise ValueError("without a ladder, every clip has the same number of codes; leave out lengths")
            return None
        return packing.repeated(ladder.largest, rows) if lengths is None else lengths
