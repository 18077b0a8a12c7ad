"""Sampling from a generator: one compiled program from the condition to the codes (LARP, section 4.1).

The options and guidance are also those of `larp_jax.models.flow_sampling`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import Conditional, GeneratorConfig
from larp_jax.config.checks import one_of
from larp_jax.errors import InputError
from larp_jax.models.categorical import argmax, sample
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Cache, Generator, GeneratorBlock, lengthen, without_batch
from larp_jax.models.layers import Dtype, block_kernels
from larp_jax.models.paths import path_name
from larp_jax.models.sequence import count_fitting, locate, split

# The caches grow in so many parts, because every step reads them whole: four make 5/8 of the reads that one would,
# eight 9/16 for twice the time to compile. Parts shorter than this many positions save nothing.
CACHE_PARTS = 4
SHORTEST_PART = 64

SOLVERS = ("euler", "heun")
OF_CODES = ("cfg_interval", "temperature", "top_k", "top_p", "window")  # options without a meaning for flows
OF_FLOWS = ("solver", "solver_steps")  # options without a meaning for codes

# (tokens [B, W], number of the first token to draw, caches; with a ladder lengths) -> (tokens drawn after them, caches)
Predict = Callable[..., tuple[jax.Array, list[Cache]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are drawn (LARP, section 4.1), or latents found by a flow.

    Guidance is that of logits, or of the velocities of a flow.

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
      solver: `euler` or `heun`, how a flow is followed, see `larp_jax.models.flow_sampling`.
      solver_steps: number of its steps; 100 as in PV-VAE, arXiv 2605.02134, section 4.1. Heun's method evaluates the
        network twice in each but the last.

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
    solver: str = "euler"
    solver_steps: int = 100

    def __post_init__(self):
        one_of("solver", self.solver, SOLVERS)
        for name, holds, expected in (
            ("cfg_scale", 1.0 <= self.cfg_scale < float("inf"), "at least 1, which is no guidance"),
            ("frames_scale", 1.0 <= self.frames_scale < float("inf"), "at least 1, which is no guidance"),
            ("cfg_interval", self.cfg_interval >= -1, "-1 for guidance throughout, or at least 0"),
            ("temperature", 0.0 < self.temperature < float("inf"), "above 0; for greedy sampling use top_k 1"),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all codes"),
            ("window", self.window >= 1, "at least 1, which draws one code after the other"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1, which keeps all codes"),
            ("solver_steps", self.solver_steps >= 1, "at least 1"),
        ):
            if not holds:
                raise InputError(f"{name} must be {expected}; got {getattr(self, name)}")

    def fitting(self, config: Conditional) -> dict[str, Any]:
        """The options that such a generator has, by name.

        Raises:
          InputError: an option was given that it does not have.
        """
        left_out, what = (OF_FLOWS, "latents") if config.has_codes else (OF_CODES, "codes")
        for field in dataclasses.fields(self):
            if field.name in left_out and getattr(self, field.name) != field.default:
                raise InputError(
                    f"{field.name} {getattr(self, field.name)} is for generators of {what}, and this one is not; leave"
                    " it out"
                )
        return {name: value for name, value in vars(self).items() if name not in left_out}

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
            solver=self.solver,
        )

    def scalars(self) -> dict[str, float]:
        """What may change without compiling again."""
        names = ("cfg_scale", "frames_scale", "temperature", "top_k", "top_p", "solver_steps")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts that a sampling program has: guidance, for how many codes, how they are drawn, how many in a pass.

    For a flow: guidance and the solver.
    """

    scales: tuple[str, ...]
    guided: int
    greedy: bool
    top_k: bool
    top_p: bool
    window: int
    solver: str


class Sequences(NamedTuple):
    """What has been sampled so far.

    Attributes:
      tokens: [B, n] int32 codes, or with a ladder symbols.
      lengths: [B, T] int32 numbers of codes by block, 0 where they are not drawn yet; None without a ladder.
    """

    tokens: jax.Array
    lengths: jax.Array | None = None

    def with_tokens(self, config: GeneratorConfig, drawn: jax.Array, number: jax.Array | int) -> "Sequences":
        """With tokens [B, 1] as number `number`."""
        tokens = jax.lax.dynamic_update_slice_in_dim(self.tokens, drawn, number, axis=1)
        if self.lengths is None:
            return Sequences(tokens)
        places = locate(self.lengths, 1, number)
        is_length = (places.place == 0) & (places.block == jnp.arange(config.blocks))
        found = jnp.asarray(config.ladder, jnp.int32)[drawn - config.codebook_size]
        return Sequences(tokens, jnp.where(is_length, found, self.lengths))

    def codes(self, config: GeneratorConfig) -> tuple[jax.Array, jax.Array | None]:
        """Codes [B, N] and lengths."""
        if self.lengths is None:
            return self.tokens[:, : config.num_tokens], None
        return split(config, self.tokens, self.lengths), self.lengths


class First(NamedTuple):
    """The first blocks of sequences of which the next is to be sampled.

    Attributes:
      lengths: [B, T] int32, 0 from the next block on.
      blocks: int32 scalar, their number, from 0 to T - 1.
    """

    lengths: jax.Array
    blocks: jax.Array


class Sampled(NamedTuple):
    """Sampled sequences.

    Attributes:
      codes: [B, N] int32; with a ladder packed, and zero behind the end.
      lengths: [B, T] int32 numbers of codes by block; None without a ladder.
      passes: number of passes through the network after that of the condition, int32.
    """

    codes: jax.Array
    lengths: jax.Array | None
    passes: jax.Array

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Arrays by name, as of `larp_jax.data.codes.read_shard`."""
        found = {"codes": self.codes, "lengths": self.lengths}
        return {name: x for name, x in found.items() if x is not None}


def sample_codes(
    generator: Generator,
    condition: Condition,
    indices: jax.Array,
    key: jax.Array,
    scalars: Mapping[str, jax.Array],
    plan: Plan,
    known: jax.Array | None = None,
    first: First | None = None,
) -> Sampled:
    """Samples sequences of codes; to be jitted, with `plan` static.

    Row i depends on `key`, `indices[i]` and its condition, not on the rows beside it. The random numbers of a code
    depend on its number in the sequence, so the codes are the same for every `plan.window`, except for rounding.

    With a ladder a batch ends with its longest sequence. Guidance, temperature, top-k and top-p are then for codes
    only: lengths are drawn as they are distributed given the condition, as a clip's are by what it shows.

    Args:
      generator: the network; parameters best in its dtype already, see `cast_params`.
      condition: the parts that the configuration asks for, of B rows.
      indices: [B] int, which sample of the key each row is.
      key: of the draws.
      scalars: of `SamplingOptions.scalars`.
      plan: of `SamplingOptions.plan`.
      known: of `larp_jax.models.sequence.known_symbols`, with a ladder.
      first: with a ladder, samples only the block after these, which are known; they are read in one pass.
    """
    c, generator = generator.config, nnx.clone(generator)  # kernels change below
    blocks = generator.unstacked()
    row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
    conditions = guided_conditions(condition, plan)
    guided, groups = plan.guided > 0, len(conditions)
    block_kernels(len(indices) * groups * plan.window, generator.head, *blocks)

    def draw(logits, number, guided, lengths):
        """Tokens [B, W] from `number` on, from logits [B, W, V], of G rows for each sample with guidance."""
        rows = [logits[i::groups] for i in range(groups)] if guided else [logits]
        logits = guide(rows, scalars, plan)[..., : c.codebook_size]
        numbers = number + jnp.arange(logits.shape[1])
        keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(numbers))(row_keys)
        codes = draw_codes(logits.reshape(-1, c.codebook_size), keys.ravel(), scalars, plan).reshape(keys.shape)
        if lengths is None:
            return codes
        fitting = count_fitting(c, lengths, locate(lengths, 1, number))
        drawn = jnp.where(fitting > 0, _draw_lengths(c, rows[0], fitting, keys), codes)
        if known is None:
            return drawn
        given = jax.lax.dynamic_slice_in_dim(known, number, 1, axis=1)
        return jnp.where(given < 0, drawn, given)

    def predict(tokens, number, caches, lengths=None, *, guided):
        places = None if lengths is None else locate(lengths, 1, number)
        if guided:
            tokens, places = jax.tree.map(lambda x: interleaved(*[x] * groups), (tokens, places))
        logits, caches = generator.decode_step(blocks, tokens, caches, c.condition_tokens + number - 1, places)
        return draw(logits, number, guided, lengths), caches

    whole = jax.tree.map(interleaved, *conditions)
    if first is not None and known is not None:
        read = functools.partial(_read, generator, blocks, whole, groups)
        steps = functools.partial(draw, guided=guided), functools.partial(predict, guided=guided)
        return _sample_block(c, first, known, read, *steps)
    (logits, caches), passes = generator.prefill(blocks, whole), jnp.int32(0)
    lengths = jnp.zeros((len(indices), c.blocks), jnp.int32) if c.ladder else None
    sequences = Sequences(jnp.zeros((len(indices), c.symbols + plan.window - 1), jnp.int32), lengths)
    sequences = sequences.with_tokens(c, draw(logits[:, None], 0, guided, lengths), 0)
    decode: Callable[..., tuple] = _decode_in_turn
    if c.ladder:
        decode = functools.partial(_decode_to_the_end, config=c)
    elif plan.window > 1:
        decode = functools.partial(_decode_in_windows, window=plan.window)
    for start, stop in cache_parts(c.symbols, plan.guided):
        if guided and start >= plan.guided:
            guided, caches = False, jax.tree.map(lambda x: without_batch(x[0::groups]), caches)
        # the last window begins with the last code of the part
        caches = [lengthen(cache, c.condition_tokens + stop + plan.window - 2) for cache in caches]
        sequences, caches, used = decode(functools.partial(predict, guided=guided), sequences, caches, start, stop)
        passes += used
    return Sampled(*sequences.codes(c), passes)


def guided_conditions(condition: Condition, plan: Plan) -> list[Condition]:
    """The condition, and for each scale of guidance what is left of the one before without its part."""
    conditions = [condition]
    for name in plan.scales:
        last = conditions[-1]
        conditions.append(last.without_class() if name == "cfg_scale" else last.without_frames())
    return conditions


def _read(
    generator: Generator,
    blocks: list[GeneratorBlock],
    condition: Condition,
    groups: int,
    sequences: Sequences,
    number: jax.Array,
) -> tuple[jax.Array, list[Cache]]:
    """Logits of symbol `number`, from those before it, and caches for whole sequences.

    The first symbol needs only the condition.
    """
    symbols, lengths = jax.tree.map(lambda x: interleaved(*[x] * groups), tuple(sequences))

    def all_symbols():
        return generator.prefill(blocks, condition, symbols[:, :-1], lengths, number)

    def none():
        logits, caches = generator.prefill(blocks, condition)
        return logits, [lengthen(cache, generator.config.condition_tokens + symbols.shape[1] - 1) for cache in caches]

    return jax.lax.cond(number > 0, all_symbols, none)


def _sample_block(
    config: GeneratorConfig,
    first: First,
    known: jax.Array,
    read: Callable[..., tuple[jax.Array, list[Cache]]],
    draw: Callable[..., jax.Array],
    predict: Predict,
) -> Sampled:
    """Samples the block after the first ones.

    It begins where the shortest sequence goes on; rows with longer ones know the symbols from there on. Rows that end
    earlier than others draw symbols of the next block, which are left out.
    """
    sequences = Sequences(jnp.maximum(known, 0), first.lengths)
    number = first.lengths.sum(axis=1, dtype=jnp.int32).min() + first.blocks
    logits, caches = read(sequences, number)
    sequences = sequences.with_tokens(config, draw(logits[:, None], number, lengths=sequences.lengths), number)
    (tokens, lengths), _, passes = _decode_to_the_end(
        predict, sequences, caches, number + 1, config.symbols, config=config, blocks=first.blocks + 1
    )
    lengths = jnp.where(jnp.arange(config.blocks) <= first.blocks, lengths, 0)
    return Sampled(split(config, tokens, lengths), lengths, passes)


def guide(rows: list[jax.Array], scalars: Mapping[str, jax.Array], plan: Plan) -> jax.Array:
    """Logits, or velocities, with guidance: from those of the conditions, the whole one first."""
    logits = rows[-1]
    for name, more, less in reversed(list(zip(plan.scales, rows[:-1], rows[1:], strict=False))):
        logits = logits + scalars[name] * (more - less)
    return logits


def _draw_lengths(config: GeneratorConfig, logits: jax.Array, fitting: jax.Array, keys: jax.Array) -> jax.Array:
    """Symbols of lengths [B, 1], among the first `fitting` [B, 1] of the ladder; any where that is 0."""
    fits = jnp.arange(len(config.ladder)) < jnp.maximum(fitting, 1)
    logits = jnp.where(fits, logits[:, 0, config.codebook_size :], -jnp.inf)
    return config.codebook_size + jax.vmap(sample)(keys[:, 0], logits)[:, None]


def _decode_in_turn(predict: Predict, sequences: Sequences, caches: list[Cache], start: int, stop: int) -> tuple:
    """Tokens from number `start` up to `stop`, one after the other: (sequences, caches, number of passes)."""

    def step(carry, number):
        last, caches = carry
        drawn, caches = predict(last, number, caches)
        return (drawn, caches), drawn[:, 0]

    tokens = sequences.tokens
    (_, caches), drawn = jax.lax.scan(step, (tokens[:, start - 1 : start], caches), jnp.arange(start, stop))
    return Sequences(tokens.at[:, start:stop].set(drawn.T)), caches, stop - start


def _decode_in_windows(
    predict: Predict, sequences: Sequences, caches: list[Cache], start: int, stop: int, *, window: int
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

    begin = jnp.int32(start), sequences.tokens, caches, jnp.int32(0)
    _, codes, caches, passes = jax.lax.while_loop(lambda carry: carry[0] < stop, step, begin)
    return Sequences(codes), caches, passes


def _decode_to_the_end(
    predict: Predict,
    sequences: Sequences,
    caches: list[Cache],
    start: int | jax.Array,
    stop: int,
    *,
    config: GeneratorConfig,
    blocks: int | jax.Array | None = None,
) -> tuple:
    """What `_decode_in_turn` returns, with a ladder; it stops at the end of the longest sequence of so many blocks."""
    blocks = config.blocks if blocks is None else blocks

    def goes_on(carry):
        number, (_, lengths), _ = carry
        return (number < stop) & (locate(lengths, 1, number).block < blocks).any()

    def step(carry):
        number, sequences, caches = carry
        last = jax.lax.dynamic_slice_in_dim(sequences.tokens, number - 1, 1, axis=1)
        drawn, caches = predict(last, number, caches, sequences.lengths)
        return number + 1, sequences.with_tokens(config, drawn, number), caches

    number, sequences, caches = jax.lax.while_loop(goes_on, step, (jnp.int32(start), sequences, caches))
    return sequences, caches, number - start


def interleaved(*parts: jax.Array) -> jax.Array:
    """Rows [B, ...] of G arrays, one after the other: [G B, ...].

    They alternate: where the batch is split over devices, all rows of a sample lie on one of them.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def cache_parts(num_tokens: int, guided: int) -> list[tuple[int, int]]:
    """Tokens after the first as (start, stop), cut where caches grow and where guidance ends."""
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
