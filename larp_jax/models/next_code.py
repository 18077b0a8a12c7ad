"""Evaluation of next-code predictions of a prior or a generator against the actual codes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from larp_jax.models.categorical import sample
from larp_jax.models.chunks import map_token_chunks
from larp_jax.models.quantizer import similarities


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextCode:
    """Predictions of a prior or a generator compared to the actual codes, one value per token.

    Attributes:
      cross_entropy: [B, n] float32, in nats.
      rank: [B, n] int32, number of codes that are ranked above the actual one (0: top-1 correct).
      sampled: [B, n] int32, codes sampled from the predicted distribution; None without a key.
    """

    cross_entropy: jax.Array
    rank: jax.Array
    sampled: jax.Array | None


def next_code(
    predicted: jax.Array,
    targets: jax.Array,
    codebook: jax.Array,
    *,
    temperature: float = 1.0,
    key: jax.Array | None = None,
) -> NextCode:
    """Scores predicted unit vectors [B, n, d] against the actual codes [B, n], in chunks of tokens.

    Args:
      predicted: outputs of the prior.
      targets: the actual codes, int32.
      codebook: [K, d] unit vectors; receives no gradient.
      temperature: divides the cosines, which are the logits.
      key: if given, also samples one code per token.
    """
    codebook = jax.lax.stop_gradient(codebook)
    return score_tokens(lambda x: similarities(x, codebook) / temperature, predicted, targets, key=key)


def score_tokens(
    logits: Callable[..., jax.Array],
    features: jax.Array,
    targets: jax.Array,
    *context: jax.Array,
    key: jax.Array | None = None,
) -> NextCode:
    """Scores the predictions of a network against the actual codes [B, n], in chunks of tokens.

    Args:
      logits: maps features [B, chunk, D], and chunks of the context, to logits [B, chunk, K] float32.
      features: [B, n, D], outputs of the network.
      targets: the actual codes, int32.
      context: what else the logits depend on, [B, n, ...] each.
      key: if given, also samples one code per token.
    """

    def score(i, features, targets, *context):
        scores = logits(features, *context)
        target = jnp.take_along_axis(scores, targets[..., None], axis=-1)
        cross_entropy = jax.nn.logsumexp(scores, axis=-1) - target[..., 0]
        # ties rank the lower index first, like argmax
        earlier = jnp.arange(scores.shape[-1]) < targets[..., None]
        rank = jnp.sum((scores > target) | ((scores == target) & earlier), axis=-1, dtype=jnp.int32)
        sampled = None
        if key is not None:
            sampled = sample(jax.random.fold_in(key, i), jax.lax.stop_gradient(scores))
        return NextCode(cross_entropy, rank, sampled)

    return map_token_chunks(score, features, targets, *context)
