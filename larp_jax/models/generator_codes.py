"""Codes or latents of a batch for a generator, and how one of codes scores them, in training and in evaluation."""

import jax
import jax.numpy as jnp

from larp_jax.config import GeneratorConfig
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator
from larp_jax.models.next_code import NextCode, score_tokens
from larp_jax.models.pixels import as_float_video, hold_last_frame
from larp_jax.models.sequence import count_fitting, join, locate, mask_logits
from larp_jax.models.tokenizer import Tokenizer

CONTEXT_NOISE = 3  # number of the random key of noise in the context; the network has the first three


def encode_batch(tokenizer: Tokenizer, batch: dict, *, cond_frames: int = 0) -> dict:
    """The batch with `codes` [B, N] int32, and for frame prediction `condition` [B, N], in place of its `video`.

    Of a tokenizer with continuous latents these are `latents` and `condition` [B, N, d] float32. They are deterministic
    and computed in float32 for any precision of the run, like those written to disk.

    Args:
      tokenizer: the frozen tokenizer.
      batch: with `video`, uint8 or float [B, T, H, W, C].
      cond_frames: number of given frames, for frame prediction; 0 adds no condition.
    """
    batch = dict(batch)
    video = as_float_video(batch.pop("video"))
    with jax.default_matmul_precision("float32"):
        batch[tokenizer.config.quantizer.tokens] = tokenizer.quantize(video).tokens
        if cond_frames:
            batch["condition"] = tokenizer.quantize(hold_last_frame(video, cond_frames)).tokens
    return batch


def with_random_codes(config: GeneratorConfig, symbols: jax.Array, key: jax.Array, most: jax.Array) -> jax.Array:
    """Sequences [B, n] int32 with random codes in place of some: of each sequence a share, uniform in [0, most].

    Lengths are kept: they tell where the other symbols belong. (reAR, arXiv 2510.04450, section 3: noisy context.)
    """
    share_key, place_key, code_key = jax.random.split(key, 3)
    share = most * jax.random.uniform(share_key, (len(symbols), 1))
    chosen = (jax.random.uniform(place_key, symbols.shape) < share) & (symbols < config.codebook_size)
    return jnp.where(chosen, jax.random.randint(code_key, symbols.shape, 0, config.codebook_size), symbols)


def score_batch(
    generator: Generator, batch: dict, *, key: jax.Array | None = None, context_noise: jax.Array | None = None
) -> NextCode:
    """How the generator predicts the codes of a batch, [B, N] each; with a ladder its symbols, [B, N + T].

    Args:
      generator: the network.
      batch: with `codes` and `label` [B] int32 (-1: none), with `condition` if frames are given, and with `lengths`
        [B, T] int32 if there is a ladder.
      key: turns on dropout.
      context_noise: with a key, the largest share of random codes in the context, see `with_random_codes`.
    """
    c, tokens, lengths, fitting = generator.config, batch["codes"], None, ()
    if c.ladder:
        lengths = batch["lengths"]
        tokens = join(c, tokens, lengths)
        fitting = (count_fitting(c, lengths, locate(lengths, c.symbols)),)
    context = tokens[:, :-1]
    if context_noise is not None:
        context = with_random_codes(c, context, jax.random.fold_in(key, CONTEXT_NOISE), context_noise)
    features = generator.features(Condition.of_batch(c, batch), context, lengths, key=key)

    def logits(x, *fitting):
        x = generator.head(x).astype(jnp.float32)
        return mask_logits(c, x, *fitting) if fitting else x

    return score_tokens(logits, features, tokens, *fitting)


def score_sums(config: GeneratorConfig, scored: NextCode, batch: dict) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums of scores over the tokens of each clip, and numbers of these tokens: ([B], [B]) float32 by name.

    `cross_entropy`, `top1` and `top5` are of codes; with a ladder `length_cross_entropy` is of lengths.

    Args:
      config: of the generator.
      scored: of `score_batch`.
      batch: the same.
    """

    def total(value, kind):
        return jnp.where(kind, value, 0.0).sum(axis=1), kind.sum(axis=1, dtype=jnp.float32)

    is_code, sums = jnp.ones(scored.rank.shape, bool), {}
    if config.ladder:
        places = locate(batch["lengths"], config.symbols)
        is_code = places.valid & (places.place > 0)
        sums["length_cross_entropy"] = total(scored.cross_entropy, places.valid & ~is_code)
    sums["cross_entropy"] = total(scored.cross_entropy, is_code)
    return sums | {f"top{n}": total(scored.rank < n, is_code) for n in (1, 5)}
