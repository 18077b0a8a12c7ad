"""Sampling from a generator: one compiled program from the condition to the codes (LARP, section 4.1)."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from larp_jax.errors import InputError
from larp_jax.models.categorical import argmax, sample
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator, lengthen
from larp_jax.models.layers import Dtype
from larp_jax.models.paths import path_name

# The caches grow in so many parts, because every step reads them whole: four make 5/8 of the reads that one would,
# eight 9/16 for twice the time to compile. Parts shorter than this many positions save nothing.
CACHE_PARTS = 4
SHORTEST_PART = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are drawn (LARP, section 4.1).

    Attributes:
      cfg_scale: guidance: logits = unconditional + scale * (conditional - unconditional); 1 for none.
      cfg_interval: guidance for the first `cfg_interval + 2` codes only; -1 for all of them.
      temperature: logits are divided by it, before everything below.
      top_k: draws among the k likeliest codes, and whatever ties with the last of them; 0 for all. 1 is greedy.
      top_p: draws among the smallest set of likeliest codes whose probability exceeds p; 1 for all.

    Raises:
      InputError: a number is out of its range.
    """

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, holds, expected in (
            ("cfg_scale", 1.0 <= self.cfg_scale < float("inf"), "at least 1, which is no guidance"),
            ("cfg_interval", self.cfg_interval >= -1, "-1 for guidance throughout, or at least 0"),
            ("temperature", 0.0 < self.temperature < float("inf"), "above 0; for greedy sampling use top_k 1"),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all codes"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1, which keeps all codes"),
        ):
            if not holds:
                raise InputError(f"{name} must be {expected}; got {getattr(self, name)}")

    def plan(self, num_tokens: int) -> "Plan":
        """What of these is compiled in, for sequences of so many codes."""
        guided = num_tokens if self.cfg_interval < 0 else min(self.cfg_interval + 2, num_tokens)
        return Plan(
            guided=guided if self.cfg_scale > 1.0 else 0,
            greedy=self.top_k == 1,
            top_k=self.top_k > 1,
            top_p=self.top_p < 1.0 and self.top_k != 1,
        )

    def scalars(self) -> dict[str, float]:
        """What may change without compiling again."""
        return {name: getattr(self, name) for name in ("cfg_scale", "temperature", "top_k", "top_p")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts that a sampling program has: how many codes are guided, and how they are drawn."""

    guided: int
    greedy: bool
    top_k: bool
    top_p: bool


def sample_codes(
    generator: Generator,
    condition: Condition,
    indices: jax.Array,
    key: jax.Array,
    scalars: Mapping[str, jax.Array],
    plan: Plan,
) -> jax.Array:
    """Samples sequences of codes; to be jitted, with `plan` static.

    Row i depends on `key`, `indices[i]` and its condition, not on the rows beside it.

    Args:
      generator: the network; parameters best in its dtype already, see `cast_params`.
      condition: the parts that the configuration asks for, of B rows.
      indices: [B] int, which sample of the key each row is.
      key: of the draws.
      scalars: of `SamplingOptions.scalars`.
      plan: of `SamplingOptions.plan`.

    Returns:
      [B, N] int32.
    """
    c = generator.config
    blocks = generator.unstacked()
    row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)

    def next_codes(logits, number, guided):
        if guided:
            conditional, unconditional = logits[0::2], logits[1::2]
            logits = unconditional + scalars["cfg_scale"] * (conditional - unconditional)
        keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(row_keys)
        return draw_codes(logits, keys, scalars, plan)

    def decode(start, stop, guided, codes, caches):
        """Codes number `start` up to `stop`, [B, stop - start], with caches as long as the last of them needs."""
        caches = [lengthen(cache, c.condition_tokens + stop - 1) for cache in caches]

        def step(carry, number):
            codes, caches = carry
            tokens = paired(codes, codes) if guided else codes
            logits, caches = generator.decode_step(blocks, tokens, caches, c.condition_tokens + number - 1)
            codes = next_codes(logits, number, guided)
            return (codes, caches), codes

        (codes, caches), drawn = jax.lax.scan(step, (codes, caches), jnp.arange(start, stop))
        return codes, caches, drawn.T

    guided = plan.guided > 0
    if guided:
        condition = jax.tree.map(paired, condition, condition.without_class())
    logits, caches = generator.prefill(blocks, condition)
    codes = next_codes(logits, 0, guided)
    done = [codes[:, None]]
    for start, stop in cache_parts(c.num_tokens, plan.guided):
        if guided and start >= plan.guided:
            guided, caches = False, jax.tree.map(lambda x: x[0::2], caches)
        codes, caches, drawn = decode(start, stop, guided, codes, caches)
        done.append(drawn)
    return jnp.concatenate(done, axis=1)


def paired(conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
    """Rows [B, ...] of both, one after the other: [2 B, ...].

    Pairs and not halves: where the batch is split over devices, both rows of a sample lie on one of them.
    """
    return jnp.stack([conditional, unconditional], axis=1).reshape(-1, *conditional.shape[1:])


def cache_parts(num_tokens: int, guided: int) -> list[tuple[int, int]]:
    """Codes after the first as (start, stop), cut where caches grow and where guidance ends."""
    length = max(SHORTEST_PART, -(-num_tokens // CACHE_PARTS))
    cuts = sorted({1, num_tokens, *range(length, num_tokens, length)} | ({guided} if guided else set()))
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def draw_codes(logits: jax.Array, keys: jax.Array, scalars: Mapping[str, jax.Array], plan: Plan) -> jax.Array:
    """One code a row: logits [B, K] float32 and a key for each row -> [B] int32."""
    if plan.greedy:
        return argmax(logits)
    logits = logits / scalars["temperature"]
    logits = filter_logits(logits, scalars["top_k"] if plan.top_k else None, scalars["top_p"] if plan.top_p else None)
    return jax.vmap(sample)(keys, logits)


def filter_logits(logits: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None) -> jax.Array:
    """Logits with those that must not be drawn set to -inf (LARP, section 4.1).

    Args:
      logits: [B, K] float32.
      top_k: keeps the k largest and those equal to the last of them; None for all.
      top_p: of what is left, renormalized, keeps the smallest set of the likeliest whose probability exceeds p, and
        those equal to the last of them; None for all.
    """
    if top_k is not None:
        logits = _keep_while(logits, lambda kept: kept.sum(-1, keepdims=True) >= top_k)
    if top_p is not None:
        probs = jax.nn.softmax(logits, axis=-1)
        logits = _keep_while(logits, lambda kept: jnp.where(kept, probs, 0.0).sum(-1, keepdims=True) > top_p)
    return logits


def _keep_while(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keeps the fewest of the largest logits in each row that are `enough` (bool [B, K] -> [B, 1]), all if none are.

    The threshold is found exactly, bit by bit from the highest: 32 sums over a row cost less than to sort it.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits & sign, ~bits, bits | sign)  # as integers in the order of the floats

    def set_bit(i, threshold):
        higher = threshold | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= higher), higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((len(logits), 1), jnp.uint32))
    return jnp.where(order >= threshold, logits, -jnp.inf)


def cast_params(params: dict, dtype: Dtype) -> dict:
    """Parameters in the dtype of the computation, so that no step has to convert them; norms keep their float32."""

    def cast(path, x):
        return x if re.search(r"norm\d?/scale$", path_name(path)) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
