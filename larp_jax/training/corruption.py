"""Corruption in training, see `CorruptionConfig`: the future or patches are hidden, latents are noisy."""

import math

import jax
import jax.numpy as jnp

from larp_jax.config import TokenizerRecipe
from larp_jax.models.grids import patch_grid
from larp_jax.models.packing import mean_of_clips

SMALLEST_SHARE = -0.1  # l-DeTok's code: some clips keep all patches, as in evaluation


def view(
    recipe: TokenizerRecipe, shape: tuple[int, ...], lengths: jax.Array | None, key: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """What the encoder is given of each clip: numbers of codes by block, and which patches.

    A tokenizer with a ladder is causal over blocks. So leaving the last blocks out of the encoder is the same as giving
    them no codes: the other codes do not depend on them, and the decoder, which sees codes of earlier blocks only, has
    to predict their frames.

    Args:
      recipe: with its `corruption`.
      shape: of the clips, [B, T, H, W, C].
      lengths: [B, T] int32, numbers of codes of whole clips; None without a ladder.
      key: random key.

    Returns:
      The lengths, and [B, patches] bool: the patches that are given; None for all.
    """
    corruption, rows, seen = recipe.corruption, shape[0], None
    patches = math.prod(patch_grid(shape[1:], recipe.model.encoder_patch))
    future_key, patch_key = jax.random.split(key)
    if corruption.future:
        parts = recipe.future_parts
        given = jnp.arange(parts) < _parts_given(future_key, rows, parts, corruption.future)[:, None]
        if lengths is None:
            seen = jnp.repeat(given, patches // parts, axis=1)
        else:
            lengths = jnp.where(given, lengths, 0)
    if corruption.patches:
        share_key, place_key = jax.random.split(patch_key)
        share = jax.random.uniform(share_key, (rows, 1), minval=SMALLEST_SHARE, maxval=corruption.patches)
        kept = jax.random.uniform(place_key, (rows, patches)) >= share  # all of them if the share is below 0
        seen = kept if seen is None else seen & kept
    return lengths, seen


def _parts_given(key: jax.Array, rows: int, parts: int, probability: float) -> jax.Array:
    """How many parts each clip has for the encoder, [B] int32: all, or with this probability 1 to parts - 1."""
    cut_key, count_key = jax.random.split(key)
    cut = jax.random.bernoulli(cut_key, probability, (rows,))
    return jnp.where(cut, jax.random.randint(count_key, (rows,), 1, parts), parts)


def noisy(latents: jax.Array, scale: float, key: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """(1 - t) x + scale t e, for latents x [B, N, d] and a t of each clip that is uniform in [0, 1].

    e is normal noise with the root mean square of the clip's latents. (l-DeTok, arXiv 2507.15856, section 3, whose
    latents have variance 1; unit vectors of d numbers have variance 1/d.)

    Args:
      latents: input of the decoder.
      scale: 3 in l-DeTok.
      key: random key.
      valid: [B, N] bool, which of them are codes; None for all.
    """
    time_key, noise_key = jax.random.split(key)
    t = jax.random.uniform(time_key, (len(latents), 1, 1))
    power = mean_of_clips(jnp.square(jax.lax.stop_gradient(latents)), valid)
    noise = jnp.sqrt(power)[:, None, None] * jax.random.normal(noise_key, latents.shape)
    return (1.0 - t) * latents + scale * t * noise
