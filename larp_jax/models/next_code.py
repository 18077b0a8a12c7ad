"""How the outputs of a prior or a generator score the codes that came."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from larp_jax.models.categorical import draw
from larp_jax.models.chunks import map_token_chunks
from larp_jax.models.quantizer import similarities


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextCode:
    """How the outputs of a prior or a generator stand to the codes that came, one value a token.

    Attributes:
      cross_entropy: [B, n] float32, in nats.
      rank: [B, n] int32, how many codes were thought likelier than the one that came (0: top-1 correct).
      sampled: [B, n] int32, a draw from the predicted distribution; None without a key.
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
    """Scores unit vectors [B, n, d] against the codes [B, n] that came; logits are never held whole.

    Args:
      predicted: the prior's outputs.
      targets: int32 codes.
      codebook: [K, d] unit vectors; no gradient reaches it.
      temperature: divides the cosine logits.
      key: draws one code a token as well.
    """
    codebook = jax.lax.stop_gradient(codebook)
    return score_tokens(lambda x: similarities(x, codebook) / temperature, predicted, targets, key=key)


def score_tokens(
    logits: Callable[[jax.Array], jax.Array], features: jax.Array, targets: jax.Array, *, key: jax.Array | None = None
) -> NextCode:
    """Scores what a network predicts of each token against the codes [B, n] that came, piece by piece.

    Args:
      logits: of features [B, chunk, D], [B, chunk, K] float32.
      features: [B, n, D], the network's output.
      targets: int32 codes.
      key: draws one code a token as well.
    """

    def score(i, features, targets):
        scores = logits(features)
        target = jnp.take_along_axis(scores, targets[..., None], axis=-1)
        cross_entropy = jax.nn.logsumexp(scores, axis=-1) - target[..., 0]
        # of codes thought equally likely the first counts as the likelier, as argmax has it
        earlier = jnp.arange(scores.shape[-1]) < targets[..., None]
        rank = jnp.sum((scores > target) | ((scores == target) & earlier), axis=-1, dtype=jnp.int32)
        sampled = None
        if key is not None:
            sampled = draw(jax.random.fold_in(key, i), jax.lax.stop_gradient(scores))
        return NextCode(cross_entropy, rank, sampled)

    return map_token_chunks(score, features, targets)
