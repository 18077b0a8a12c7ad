"""Codes of a batch for a generator, and how it scores them: the same in training and in evaluation."""

import jax
import jax.numpy as jnp

from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator
from larp_jax.models.next_code import NextCode, score_tokens
from larp_jax.models.pixels import as_float_video, hold_last_frame
from larp_jax.models.tokenizer import Tokenizer


def encode_batch(tokenizer: Tokenizer, batch: dict, *, cond_frames: int = 0) -> dict:
    """The batch with `codes` [B, N] int32, and for frame prediction `condition` [B, N], in place of its `video`.

    The codes are deterministic and computed in float32 for any precision of the run, like those written to disk.

    Args:
      tokenizer: the frozen tokenizer.
      batch: with `video`, uint8 or float [B, T, H, W, C].
      cond_frames: number of given frames, for frame prediction; 0 adds no condition.
    """
    batch = dict(batch)
    video = as_float_video(batch.pop("video"))
    with jax.default_matmul_precision("float32"):
        batch["codes"] = tokenizer.quantize(video).indices
        if cond_frames:
            batch["condition"] = tokenizer.quantize(hold_last_frame(video, cond_frames)).indices
    return batch


def score_batch(generator: Generator, batch: dict, *, key: jax.Array | None = None) -> NextCode:
    """How the generator predicts the codes of a batch, [B, N] each.

    Args:
      generator: the network.
      batch: with `codes` and `label` [B] int32 (-1: none), and with `condition` if frames are given.
      key: turns on dropout.
    """
    codes = batch["codes"]
    features = generator.features(Condition.of_batch(generator.config, batch), codes[:, :-1], key=key)
    return score_tokens(lambda x: generator.head(x).astype(jnp.float32), features, codes)
