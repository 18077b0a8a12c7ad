"""Sampling from a generator: one compiled program from the condition to the codes (LARP, section 4.1)."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from larp_jax.errors import InputError
from larp_jax.models.categorical import argmax, sample
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Cache, Generator, lengthen
from larp_jax.models.layers import Dtype
from larp_jax.models.paths import path_name

# The caches grow in so many parts, because every step reads them whole: four make 5/8 of the reads that one would,
# eight 9/16 for twice the time to compile. Parts shorter than this many positions save nothing.
CACHE_PARTS = 4
SHORTEST_PART = 64

# (codes [B, W], number of the first code to draw, caches) -> (codes drawn after them [B, W], caches)
Predict = Callable[[jax.Array, jax.Array, list[Cache]], tuple[jax.Array, list[Cache]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are drawn (LARP, section 4.1).

    Attributes:
      cfg_scale: guidance by the class: logits = unconditional + scale * (conditional - unconditional); 1 for none.
      frames_scale: guidance by the given frames, 1 for none. With both, logits = neither + frames_scale * (frames -
        neither) + cfg_scale * (both - frames), as for two conditions in arXiv 2211.09800.
      cfg_interval: guidance for the first `cfg_interval + 2` codes only; -1 for all of them.
      temperature: logits are divided by it, before everything below.
      top_k: draws among the k likeliest codes, and whatever ties with the last of them; 0 for all. 1 is greedy.
      top_p: draws among the smallest set of likeliest codes whose probability exceeds p; 1 for all.
      window: how many codes a pass through the network may find, see `_decode_in_windows`; 1 draws one after the other.
        The codes are the same, except for rounding.

    Raises:
      InputError: a number is out of its range.
    """

    cfg_scale: float = 1.0
    frames_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    window: int = 1

    def __post_init__(self):
        for name, holds, expected in (
            ("cfg_scale", 1.0 <= self.cfg_scale < float("inf"), "at least 1, which is no guidance"),
            ("frames_scale", 1.0 <= self.frames_scale < float("inf"), "at least 1, which is no guidance"),
            ("cfg_interval", self.cfg_interval >= -1, "-1 for guidance throughout, or at least 0"),
            ("temperature", 0.0 < self.temperature < float("inf"), "above 0; for greedy sampling use top_k 1"),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all codes"),
            ("window", self.window >= 1, "at least 1, which draws one code after the other"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1, which keeps all codes"),
        ):
            if not holds:
                raise InputError(f"{name} must be {expected}; got {getattr(self, name)}")

    def plan(self, num_tokens: int) -> "Plan":
        """What of these is compiled in, for sequences of so many codes."""
        guided = num_tokens if self.cfg_interval < 0 else min(self.cfg_interval + 2, num_tokens)
        scales = tuple(name for name in ("cfg_scale", "frames_scale") if getattr(self, name) > 1.0)
        return Plan(
            scales=scales,
            guided=guided if scales else 0,
            greedy=self.top_k == 1,
            top_k=self.top_k > 1,
            top_p=self.top_p < 1.0 and self.top_k != 1,
            window=max(1, min(self.window, num_tokens - 1)),
        )

    def scalars(self) -> dict[str, float]:
        """What may change without compiling again."""
        return {name: getattr(self, name) for name in ("cfg_scale", "frames_scale", "temperature", "top_k", "top_p")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts that a sampling program has: guidance, for how many codes, how they are drawn, how many in a pass."""

    scales: tuple[str, ...]
    guided: int
    greedy: bool
    top_k: bool
    top_p: bool
    window: int


def sample_codes(
    generator: Generator,
    condition: Condition,
    indices: jax.Array,
    key: jax.Array,
    scalars: Mapping[str, jax.Array],
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """Samples sequences of codes; to be jitted, with `plan` static.

    Row i depends on `key`, `indices[i]` and its condition, not on the rows beside it. The random numbers of a code
    depend on its number in the sequence, so the codes are the same for every `plan.window`, except for rounding.

    Args:
      generator: the network; parameters best in its dtype already, see `cast_params`.
      condition: the parts that the configuration asks for, of B rows.
      indices: [B] int, which sample of the key each row is.
      key: of the draws.
      scalars: of `SamplingOptions.scalars`.
      plan: of `SamplingOptions.plan`.

    Returns:
      Codes [B, N] int32, and the number of passes through the network after that of the condition, int32.
    """
    c = generator.config
    blocks = generator.unstacked()
    row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)

    def draw(logits, number, guided):
        """Codes [B, W] from `number` on, from logits [B, W, K], of G rows for each sample with guidance."""
        if guided:
            rows = [logits[i :: len(conditions)] for i in range(len(conditions))]
            logits = rows[-1]
            for name, more, less in reversed(list(zip(plan.scales, rows[:-1], rows[1:], strict=True))):
                logits = logits + scalars[name] * (more - less)
        numbers = number + jnp.arange(logits.shape[1])
        keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(numbers))(row_keys)
        return draw_codes(logits.reshape(-1, c.codebook_size), keys.ravel(), scalars, plan).reshape(keys.shape)

    def predict(codes, number, caches, guided):
        tokens = interleaved(*[codes] * len(conditions)) if guided else codes
        logits, caches = generator.decode_step(blocks, tokens, caches, c.condition_tokens + number - 1)
        return draw(logits, number, guided), caches

    guided, conditions = plan.guided > 0, [condition]
    for name in plan.scales:
        last = conditions[-1]
        conditions.append(last.without_class() if name == "cfg_scale" else last.without_frames())
    condition = jax.tree.map(interleaved, *conditions)
    logits, caches = generator.prefill(blocks, condition)
    codes = draw(logits[:, None], 0, guided)
    codes, passes = jnp.pad(codes, ((0, 0), (0, c.num_tokens + plan.window - 2))), jnp.int32(0)
    for start, stop in cache_parts(c.num_tokens, plan.guided):
        if guided and start >= plan.guided:
            guided, caches = False, jax.tree.map(lambda x: x[0 :: len(conditions)], caches)
        # the last window begins with the last code of the part
        caches = [lengthen(cache, c.condition_tokens + stop + plan.window - 2) for cache in caches]
        decode = _decode_in_turn if plan.window == 1 else functools.partial(_decode_in_windows, window=plan.window)
        codes, caches, used = decode(functools.partial(predict, guided=guided), codes, caches, start, stop)
        passes += used
    return codes[:, : c.num_tokens], passes


def _decode_in_turn(predict: Predict, codes: jax.Array, caches: list[Cache], start: int, stop: int) -> tuple:
    """Codes from number `start` up to `stop`, one after the other: (codes [B, N], caches, number of passes)."""

    def step(carry, number):
        last, caches = carry
        drawn, caches = predict(last, number, caches)
        return (drawn, caches), drawn[:, 0]

    (_, caches), drawn = jax.lax.scan(step, (codes[:, start - 1 : start], caches), jnp.arange(start, stop))
    return codes.at[:, start:stop].set(drawn.T), caches, stop - start


def _decode_in_windows(
    predict: Predict, codes: jax.Array, caches: list[Cache], start: int, stop: int, *, window: int
) -> tuple:
    """What `_decode_in_turn` returns, in fewer passes: Jacobi decoding with fixed random numbers (arXiv 2510.24211).

    A pass draws a window of codes, each after the drafts before it. A draft that is drawn again is exact if all drafts
    before it are, and so is the code drawn after it. Codes that are not exact yet are the next drafts. All rows move on
    by what the slowest has found: the others keep their exact drafts, and so lose little.
    """

    def step(carry):
        number, codes, caches, passes = carry
        drafts = jax.lax.dynamic_slice_in_dim(codes, number - 1, window, axis=1)
        drawn, caches = predict(drafts, number, caches)
        exact = 1 + jnp.cumprod(drawn[:, :-1] == drafts[:, 1:], axis=1, dtype=jnp.int32).sum(axis=1)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, drawn, number, axis=1)
        return jnp.minimum(number + exact.min(), stop), codes, caches, passes + 1

    begin = jnp.int32(start), codes, caches, jnp.int32(0)
    _, codes, caches, passes = jax.lax.while_loop(lambda carry: carry[0] < stop, step, begin)
    return codes, caches, passes


def interleaved(*parts: jax.Array) -> jax.Array:
    """Rows [B, ...] of G arrays, one after the other: [G B, ...].

    They alternate: where the batch is split over devices, all rows of a sample lie on one of them.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


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
