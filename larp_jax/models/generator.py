"""The stage-2 generator: a Llama-like decoder over codes after a condition (LARP, section 4.1).

With a ladder it also writes how many codes each block of frames has, see `larp_jax.models.sequence`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from larp_jax.config import GeneratorConfig
from larp_jax.models.attention import attention
from larp_jax.models.condition import Condition
from larp_jax.models.dropout import dropout
from larp_jax.models.embeddings import sincos_1d
from larp_jax.models.layers import Dtype, Linear, RMSNorm, SwiGLU, rematerialized, run_stack, stack, unstack
from larp_jax.models.packing import Layout
from larp_jax.models.sequence import count_fitting, locate, mask_logits

# Of one block: keys [B, kv heads, d, positions] and values [B, kv heads, positions, d] of the positions so far. The
# products of one query with them read along the last axis and add up rows: a third faster on CPUs than sums along it.
# Those of a single sample have no axis B, see `without_batch`.
Cache = tuple[jax.Array, jax.Array]


def lengthen(cache: Cache, positions: int) -> Cache:
    """A cache with room for so many positions."""
    keys, values = cache
    more, axes = (0, positions - values.shape[-2]), [(0, 0)] * (keys.ndim - 2)
    return jnp.pad(keys, (*axes, (0, 0), more)), jnp.pad(values, (*axes, more, (0, 0)))


def without_batch(x: jax.Array) -> jax.Array:
    """x [B, ...], without the axis B if that is 1: with it, XLA's CPU backend would copy a cache at every position."""
    return x[0] if len(x) == 1 else x


class GroupedAttention(nnx.Module):
    """Causal attention in which query head h reads key/value head h // (heads / kv heads); columns [q; k; v]."""

    def __init__(self, config: GeneratorConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        c = config
        head_width = c.width // c.heads
        init = nnx.initializers.normal(c.init_std)
        columns = (c.heads + 2 * c.kv_heads) * head_width
        self.qkv = Linear(c.width, columns, rngs=rngs, bias=False, kernel_init=init, dtype=dtype)
        self.out = Linear(c.width, c.width, rngs=rngs, bias=False, kernel_init=init, dtype=dtype)
        self.heads, self.kv_heads, self.dropout_rate = c.heads, c.kv_heads, c.attention_dropout

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, N, D] -> queries [B, N, heads, d], keys and values [B, N, kv heads, d]."""
        qkv = rearrange(self.qkv(x), "b n (h d) -> b n h d", h=self.heads + 2 * self.kv_heads)
        return tuple(jnp.split(qkv, (self.heads, self.heads + self.kv_heads), axis=2))

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None, *, norm: Callable
    ) -> tuple[jax.Array, Cache]:
        """norm(x), [B, N, D] -> [B, N, D] and the cache. `key` turns on dropout of the attention probabilities."""
        q, k, v = rematerialized(lambda x: self.project(norm(x)))(x)
        cache = tuple(without_batch(rearrange(t, f"b n h d -> b h {to}")) for t, to in ((k, "d n"), (v, "n d")))
        k, v = (jnp.repeat(t, self.heads // self.kv_heads, axis=2) for t in (k, v))
        y = attention(q, k, v, causal=True, dropout_rate=self.dropout_rate, key=key)
        return self.out(rearrange(y, "b n h d -> b n (h d)")), cache

    def decode_step(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """W positions from `position` on: x [B, W, D] -> [B, W, D], and the cache with them written."""
        q, k, v = self.project(x)
        k, v = without_batch(rearrange(k, "b w h d -> b h d w")), without_batch(rearrange(v, "b w h d -> b h w d"))
        keys, values = cache
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, position, axis=keys.ndim - 1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, position, axis=values.ndim - 2)
        window = x.shape[1]
        q = rearrange(q, "b w (h group) d -> b h (group w) d", h=self.kv_heads) * q.shape[-1] ** -0.5
        scores = jnp.einsum("...hqd,...hdn->...hqn", without_batch(q), keys).astype(jnp.float32)
        last = position + jnp.arange(q.shape[2]) % window  # the last position that each query reads
        scores = jnp.where(jnp.arange(keys.shape[-1]) <= last[:, None], scores, -jnp.inf)
        y = jnp.einsum("...hqn,...hnd->...hqd", jax.nn.softmax(scores, axis=-1).astype(values.dtype), values)
        y = rearrange(y.reshape(q.shape), "b h (group w) d -> b w (h group d)", w=window)
        return self.out(y), (keys, values)


class GeneratorBlock(nnx.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)); x in float32."""

    def __init__(self, config: GeneratorConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        self.norm1 = RMSNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype)
        self.attention = GroupedAttention(config, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype)
        init = nnx.initializers.normal(config.init_std)
        self.mlp = SwiGLU(config.width, config.mlp_width, rngs=rngs, kernel_init=init, dtype=dtype)
        self.config = config

    def __call__(self, x: jax.Array, key: jax.Array | None, path_dropout: jax.Array) -> jax.Array:
        """x [B, N, D] float32 -> the same; `key` turns on dropout, and stochastic depth at the rate `path_dropout`."""
        return self.with_cache(x, key, path_dropout)[0]

    def with_cache(
        self, x: jax.Array, key: jax.Array | None = None, path_dropout: jax.Array | float = 0.0
    ) -> tuple[jax.Array, Cache]:
        """What `__call__` returns, and what `decode_step` needs to go on from there."""
        c = self.config
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        path_keys = keys[3:] if c.path_dropout else (None, None)
        y, cache = self.attention(x, keys[0], norm=self.norm1)
        x = x + drop_path(dropout(y, c.residual_dropout, keys[1]), path_dropout, path_keys[0])
        y = dropout(self.mlp(x, norm=self.norm2), c.mlp_dropout, keys[2])
        return x + drop_path(y, path_dropout, path_keys[1]), cache

    def decode_step(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """`__call__` for a window of positions, see `GroupedAttention.decode_step`."""
        y, cache = self.attention.decode_step(self.norm1(x), cache, position)
        x = x + y
        return x + self.mlp(x, norm=self.norm2), cache


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
    """Stochastic depth: zeroes whole clips of x [B, ...] and scales the others up; the identity without a key."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class Generator(nnx.Module):
    """Predicts each code from those before it and a condition.

    With a ladder it predicts each symbol of a sequence, a code or the length of a block. A position then also tells the
    block and the place in it of the symbol after it. They say what that symbol is about: a tokenizer's code belongs to
    a place in a block, which, other than in sequences of one length, is not told by the position in the sequence.

    Args:
      config: sizes and options.
      rngs: `params` stream for the initial weights.
      remat: what the backward pass recomputes, see `larp_jax.models.layers.run_stack`.
      dtype: of the computation; parameters and logits are float32.
    """

    def __init__(
        self, config: GeneratorConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32
    ):
        c = config
        c.check_complete()
        init = nnx.initializers.normal(c.init_std)

        def table(rows, init=init):
            return nnx.Param(init(rngs.params(), (rows, c.width), jnp.float32))

        # the separator between condition and tokens has the last row
        self.token_embedding = table(c.vocabulary + c.has_frames)
        self.class_embedding = table(c.class_rows) if c.class_rows else None
        rows, small = c.condition_tokens + c.symbols - 1, nnx.initializers.normal(0.02)
        self.positions = None if c.fixed_positions else table(rows, small)
        self.blocks = stack(c.depth, lambda r: GeneratorBlock(c, rngs=r, dtype=dtype), rngs)
        self.norm = RMSNorm(c.width, epsilon=c.norm_epsilon, dtype=dtype)
        self.head = Linear(
            c.width, c.vocabulary, rngs=rngs, bias=False, kernel_init=nnx.initializers.zeros, dtype=dtype
        )
        self.block_positions = table(c.blocks, small) if c.ladder else None
        self.place_positions = table(c.ladder[-1] + 1, small) if c.ladder else None
        self.config, self.remat = c, remat

    def __call__(
        self,
        condition: Condition,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of each next code, or with a ladder of each next symbol.

        Args:
          condition: the parts that the configuration asks for.
          tokens: the first n < N codes or symbols, [B, n] int; training gives N - 1.
          lengths: [B, T] int32 numbers of codes by block, with a ladder.
          key: turns on dropout of classes and activations.

        Returns:
          [B, n + 1, V] float32: row i is about token i. -inf is for symbols that cannot stand there.
        """
        logits = self.head(self.features(condition, tokens, lengths, key=key)).astype(jnp.float32)
        if lengths is None:
            return logits
        places = locate(lengths, logits.shape[1])
        return mask_logits(self.config, logits, count_fitting(self.config, lengths, places))

    def features(
        self,
        condition: Condition,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What the head turns into logits, [B, n + 1, D]; arguments as in `__call__`."""
        c = self.config
        class_key, embed_key, block_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = jnp.concatenate([self.embed_condition(condition, key=class_key), self.embed_tokens(tokens)], axis=1)
        x = dropout(x, c.token_dropout, embed_key) + self.position_table()[: x.shape[1]]
        if lengths is not None:
            places = self.embed_places(locate(lengths, tokens.shape[1] + 1))
            x = x.at[:, c.condition_tokens - 1 :].add(places)
        # the rate of stochastic depth rises from 0 in the first block to its full value in the last
        rates = jnp.linspace(0.0, c.path_dropout, c.depth)
        x = run_stack(self.blocks, x, rates, remat=self.remat, key=block_key)
        return self.norm(x[:, c.condition_tokens - 1 :])

    def unstacked(self) -> list[GeneratorBlock]:
        """The blocks one by one, for `prefill` and `decode_step`.

        To be called outside of the loop over positions: there the weights are copied apart once, while a scan over
        stacked blocks would copy each layer's weights and cache at every position.
        """
        return unstack(self.blocks)

    def prefill(
        self,
        blocks: list[GeneratorBlock],
        condition: Condition,
        symbols: jax.Array | None = None,
        lengths: jax.Array | None = None,
        number: jax.Array | int = 0,
    ) -> tuple[jax.Array, list[Cache]]:
        """Logits of a token, [B, V] float32, and the cache of all positions before it, by block.

        Args:
          blocks: what `unstacked` returned.
          condition: as in `__call__`.
          symbols: with a ladder, [B, n] int of which the first `number` are known; the cache has room for all of them.
          lengths: [B, T], of the blocks in which the known symbols lie, 0 where they are not known yet.
          number: int scalar, the number of the token.
        """
        c, x = self.config, self.embed_condition(condition)
        if symbols is not None:
            x = jnp.concatenate([x, self.embed_tokens(symbols)], axis=1)
        x = x + self.position_table()[: x.shape[1]]
        if c.ladder:
            lengths = jnp.zeros((1, c.blocks), jnp.int32) if lengths is None else lengths
            first = c.condition_tokens - 1
            x = x.at[:, first:].add(self.embed_places(locate(lengths, x.shape[1] - first)))
        caches = []
        for block in blocks:
            x, cache = block.with_cache(x)
            caches.append(cache)
        last = jax.lax.dynamic_index_in_dim(x, c.condition_tokens - 1 + number, axis=1, keepdims=False)
        return self.head(self.norm(last)).astype(jnp.float32), caches

    def decode_step(
        self,
        blocks: list[GeneratorBlock],
        tokens: jax.Array,
        caches: list[Cache],
        position: jax.Array,
        places: Layout | None = None,
    ) -> tuple[jax.Array, list[Cache]]:
        """Logits of the token after each of W tokens, [B, W, V] float32, and the caches with their keys and values.

        Args:
          blocks: what `unstacked` returned.
          tokens: [B, W] int, consecutive codes or symbols of each sample.
          caches: by block, with room for W positions from `position` on; those are written, later ones not read.
          position: int scalar, the position of the first token, counted from the condition's first.
          places: of the tokens after them, with a ladder.
        """
        x = self.embed_tokens(tokens) + self.position_table()[position + jnp.arange(tokens.shape[1])]
        if places is not None:
            x = x + self.embed_places(places)
        written = []
        for block, cache in zip(blocks, caches, strict=True):
            x, cache = block.decode_step(x, cache, position)
            written.append(cache)
        return self.head(self.norm(x)).astype(jnp.float32), written

    def embed_condition(self, condition: Condition, *, key: jax.Array | None = None) -> jax.Array:
        """The condition as [B, condition positions, D] float32.

        The class comes first. The codes of given frames are followed by the separator, the last row of the token
        table, which also replaces the codes if there are none. With a key, classes are randomly replaced by the null
        class, and frames left out.
        """
        c, parts = self.config, []
        if condition.classes is not None:
            null = condition.classes < 0
            if key is not None and c.has_null_class:
                null |= jax.random.bernoulli(key, c.class_dropout, null.shape)
            classes = jnp.where(null, self.class_embedding.shape[0] - 1, condition.classes)
            parts.append(self.class_embedding[...][classes][:, None].astype(jnp.float32))
        if condition.frames is not None:
            null = ~condition.frames_given[:, None]
            if key is not None and c.has_null_frames:
                null |= jax.random.bernoulli(jax.random.fold_in(key, 1), c.frames_dropout, null.shape)
            frames = jnp.where(null, c.codebook_size, condition.frames)
            frames = jnp.pad(frames, ((0, 0), (0, 1)), constant_values=c.codebook_size)
            parts.append(self.embed_tokens(frames))
        return jnp.concatenate(parts, axis=1)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Codes [...] int -> [..., D] float32."""
        return self.token_embedding[...][tokens].astype(jnp.float32)

    def embed_places(self, places: Layout) -> jax.Array:
        """Block and place of the symbols after some positions -> [B, n, D] float32."""
        block = jnp.minimum(places.block, self.config.blocks - 1)  # behind the end anything will do
        return self.block_positions[...][block] + self.place_positions[...][places.place]

    def position_table(self) -> jax.Array:
        """[condition positions + N - 1, D] float32, learned or sine-cosine."""
        c = self.config
        if self.positions is not None:
            return self.positions[...]
        return jnp.asarray(sincos_1d(np.arange(c.condition_tokens + c.symbols - 1), c.width), jnp.float32)
