"""Sequences of a generator with a ladder: the length of each block of frames, and its codes (arXiv 2603.12267).

A sequence is `(length codes) x T`: before the codes of a block comes a symbol for their number, K + i for the i-th of
the ladder. Whoever has read a length knows where the next one is due. So each symbol is drawn from those that may stand
in its place, in training too, and every sampled sequence is valid.

Symbols are located by `larp_jax.models.packing.layout` of the lengths plus one: place 0 is that of the length.
"""

import functools

import jax
import jax.numpy as jnp

from larp_jax.config import GeneratorConfig
from larp_jax.models.packing import Layout, layout, offsets


def locate(lengths: jax.Array, size: int, start: jax.Array | int = 0) -> Layout:
    """The block and place of `size` symbols from number `start` on, of sequences with lengths [B, T].

    A length is 0 as long as it is not known; symbols up to and including the first such length are located right.
    """
    return layout(lengths + 1, size, start)


def count_fitting(config: GeneratorConfig, lengths: jax.Array, places: Layout) -> jax.Array:
    """How many entries of the ladder may stand in places, from the least on; 0 where a code is due: [B, n] int32.

    The codes of the blocks before must fit the bucket, with the least number of the ladder for each block after.

    Args:
      config: of the generator.
      lengths: [B, T], of the blocks before each place.
      places: of symbols of these sequences.
    """
    block = jnp.minimum(places.block, config.blocks - 1)
    before = jnp.take_along_axis(offsets(lengths), block, axis=1)
    room = config.num_tokens - before - (config.blocks - 1 - block) * config.ladder[0]
    counts = (jnp.asarray(config.ladder) <= room[..., None]).sum(axis=-1, dtype=jnp.int32)
    return jnp.where(places.valid & (places.place == 0), counts, 0)


def mask_logits(config: GeneratorConfig, logits: jax.Array, fitting: jax.Array) -> jax.Array:
    """Logits [B, n, V] with -inf for symbols that may not stand there; `fitting` [B, n] is of `count_fitting`."""
    symbols, fitting = jnp.arange(config.vocabulary), fitting[..., None]
    is_code = symbols < config.codebook_size
    fits = ~is_code & (symbols < config.codebook_size + fitting)
    return jnp.where(jnp.where(fitting > 0, fits, is_code), logits, -jnp.inf)


def join(config: GeneratorConfig, codes: jax.Array, lengths: jax.Array) -> jax.Array:
    """Packed codes [B, N] and their lengths [B, T] -> sequences [B, N + T] int32, zero behind the end."""
    places = locate(lengths, config.symbols)
    block = jnp.minimum(places.block, config.blocks - 1)
    rung = jnp.searchsorted(jnp.asarray(config.ladder), jnp.take_along_axis(lengths, block, axis=1))
    number = jnp.clip(jnp.arange(config.symbols) - block - 1, 0, config.num_tokens - 1)
    found = jnp.take_along_axis(codes, number, axis=1)
    symbols = jnp.where(places.place == 0, config.codebook_size + rung, found)
    return jnp.where(places.valid, symbols, 0).astype(jnp.int32)


def split(config: GeneratorConfig, symbols: jax.Array, lengths: jax.Array) -> jax.Array:
    """The packed codes [B, N] int32 of sequences [B, N + T] with lengths [B, T]: the inverse of `join`."""
    places = layout(lengths, config.num_tokens)
    number = jnp.arange(config.num_tokens) + jnp.minimum(places.block, config.blocks - 1) + 1
    return jnp.where(places.valid, jnp.take_along_axis(symbols, number, axis=1), 0)


@functools.partial(jax.jit, static_argnums=0)  # op by op it would take as long as many codes
def known_symbols(
    config: GeneratorConfig, lengths: jax.Array, codes: jax.Array | None = None, blocks: jax.Array | int = 0
) -> jax.Array:
    """Sequences [B, N + T] int32 of which a part is known before sampling; -1 where a symbol is to be sampled.

    Args:
      config: of the generator.
      lengths: [B, T], 0 where they are to be sampled; none that is known follows one that is not.
      codes: [B, N], packed codes of the first blocks.
      blocks: [B, 1], the number of blocks with known codes.
    """
    codes = jnp.zeros((len(lengths), config.num_tokens), jnp.int32) if codes is None else codes
    places, first = locate(lengths, config.symbols), jnp.argmax(jnp.pad(lengths, ((0, 0), (0, 1))) == 0, axis=1)
    known = (places.block < first[:, None]) & ((places.block < blocks) | (places.place == 0))
    return jnp.where(known, join(config, codes, lengths), -1)
