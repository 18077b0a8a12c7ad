"""The flow generator: a diffusion transformer that turns noise into the latents of a clip.

Rectified flow (Liu et al. 2022, arXiv 2209.03003): on the straight line x_t = (1 - t) x + t e from latents x to noise
e, the velocity is v = e - x, and the network learns its mean given x_t, t and the condition. The network is DiT
(Peebles & Xie 2022, arXiv 2212.09748) over the sequence of latents, with normalized queries and keys (arXiv
2302.05442).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from larp_jax.config import FlowConfig
from larp_jax.models.attention import attention
from larp_jax.models.condition import Condition
from larp_jax.models.embeddings import sincos_1d
from larp_jax.models.layers import Dtype, Linear, Mlp, RMSNorm, project, rematerialized, run_stack, stack

EPSILON = 1e-6  # of all norms, as in DiT
TIME_WIDTH = 256  # of the sine-cosine embedding of the time, as in DiT
TIME_SCALE = 1000.0  # DiT has 1000 steps of diffusion


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, dtype: Dtype) -> jax.Array:
    """Layer norm without parameters, in float32, then (1 + scale) and shift: x [B, N, D] -> the same in `dtype`.

    Args:
      x: the residual stream.
      shift: [B, 1, D] float32.
      scale: [B, 1, D] float32.
      dtype: of the result.
    """
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
    return (x * (1.0 + scale) + shift).astype(dtype)


class FlowBlock(nnx.Module):
    """x += gate1 attention(norm(x)); x += gate2 mlp(norm(x)), norms and gates modulated by time and class (adaLN-zero).

    The modulation starts at zero, and so each block as the identity.
    """

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        width = config.width
        self.qkv = Linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.q_norm = RMSNorm(width // config.heads, epsilon=EPSILON, dtype=dtype)
        self.k_norm = RMSNorm(width // config.heads, epsilon=EPSILON, dtype=dtype)
        self.out = Linear(width, width, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(width, rngs=rngs, dtype=dtype)
        self.modulation = Linear(width, 6 * width, rngs=rngs, kernel_init=nnx.initializers.zeros, dtype=dtype)
        self.heads, self.dtype = config.heads, dtype

    def __call__(self, x: jax.Array, key: None, about: jax.Array) -> jax.Array:
        """x [B, N, D] float32 -> the same.

        Args:
          x: the residual stream.
          key: unused, there is no dropout.
          about: [B, D] float32, the embedding of time and class.
        """
        modulation = self.modulation(jax.nn.silu(about)).astype(jnp.float32)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x = x + gate1 * self.attend(x, shift1, scale1)
        return x + gate2 * self.mlp(x, norm=lambda x: modulated(x, shift2, scale2, self.dtype))

    def attend(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        """Self-attention of `modulated`, [B, N, D] -> [B, N, D]."""
        norm = functools.partial(modulated, shift=shift, scale=scale, dtype=self.dtype)
        q, k, v = rematerialized(lambda x: project(self.qkv, norm(x), self.heads))(x)
        q, k = rematerialized(lambda q, k: (self.q_norm(q), self.k_norm(k)))(q, k)
        return self.out(rearrange(attention(q, k, v), "b n h d -> b n (h d)"))


class Flow(nnx.Module):
    """Predicts the velocity of noised latents.

    Args:
      config: sizes and options.
      rngs: `params` stream for the initial weights.
      remat: what the backward pass recomputes, see `larp_jax.models.layers.run_stack`.
      dtype: of the computation; parameters and velocities are float32.
    """

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32):
        c = config
        c.check_complete()
        small, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        self.in_proj = Linear(c.code_dim, c.width, rngs=rngs, dtype=dtype)
        # learned: latents of a holistic tokenizer lie along a line, those of patches on a grid
        self.positions = nnx.Param(jnp.asarray(sincos_1d(np.arange(c.num_tokens), c.width), jnp.float32))
        self.time_up = Linear(TIME_WIDTH, c.width, rngs=rngs, kernel_init=small, dtype=dtype)
        self.time_down = Linear(c.width, c.width, rngs=rngs, kernel_init=small, dtype=dtype)

        def table(*shape):
            return nnx.Param(small(rngs.params(), shape, jnp.float32))

        self.class_embedding = table(c.class_rows, c.width) if c.class_rows else None
        self.frames_proj = Linear(c.code_dim, c.width, rngs=rngs, dtype=dtype) if c.has_frames else None
        self.no_frames = table(c.width) if c.has_frames else None
        self.blocks = stack(c.depth, lambda r: FlowBlock(c, rngs=r, dtype=dtype), rngs)
        self.modulation = Linear(c.width, 2 * c.width, rngs=rngs, kernel_init=zeros, dtype=dtype)
        self.head = Linear(c.width, c.code_dim, rngs=rngs, kernel_init=zeros, dtype=dtype)
        self.config, self.remat, self.dtype = c, remat, dtype

    def __call__(
        self, x: jax.Array, times: jax.Array, condition: Condition, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Velocities, [B, N, d] float32.

        Args:
          x: [B, N, d], latents (standardized) on their way to noise.
          times: [B] float32 in [0, 1], 0 for latents and 1 for noise.
          condition: the parts that the configuration asks for.
          key: turns on dropout of classes and given frames.
        """
        x = self.in_proj(x).astype(jnp.float32) + self.positions[...]
        if condition.frames is not None:
            x = x + self.embed_frames(condition, key=key)
        about = self.embed_time(times)
        if condition.classes is not None:
            about = about + self.embed_classes(condition, key=key)
        x = run_stack(self.blocks, x, shared=(about,), remat=self.remat)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(about)).astype(jnp.float32)[:, None], 2, axis=-1)
        return self.head(modulated(x, shift, scale, self.dtype)).astype(jnp.float32)

    def embed_time(self, times: jax.Array) -> jax.Array:
        """Times [B] -> [B, D] float32."""
        frequencies = 10_000.0 ** (-jnp.arange(TIME_WIDTH // 2) / (TIME_WIDTH // 2))
        angles = TIME_SCALE * times[:, None] * frequencies
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.time_down(jax.nn.silu(self.time_up(waves))).astype(jnp.float32)

    def embed_classes(self, condition: Condition, *, key: jax.Array | None = None) -> jax.Array:
        """Classes -> [B, D] float32; with a key, the null class randomly replaces them."""
        null = condition.classes < 0
        if key is not None and self.config.has_null_class:
            null |= jax.random.bernoulli(key, self.config.class_dropout, null.shape)
        rows = jnp.where(null, self.config.class_rows - 1, condition.classes)
        return self.class_embedding[...][rows].astype(jnp.float32)

    def embed_frames(self, condition: Condition, *, key: jax.Array | None = None) -> jax.Array:
        """Latents of given frames -> [B, N, D] float32; with a key, they are randomly left out."""
        known = condition.frames_given
        if key is not None and self.config.has_null_frames:
            known &= ~jax.random.bernoulli(jax.random.fold_in(key, 1), self.config.frames_dropout, known.shape)
        known = known[:, None, None]
        given = self.frames_proj(jnp.where(known, condition.frames, 0.0)).astype(jnp.float32)
        return jnp.where(known, given, self.no_frames[...])


def noise_of(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, [B, *shape] float32; row i depends only on keys[i]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def times_of(keys: jax.Array) -> jax.Array:
    """Logit-normal times in (0, 1), [B] float32 (Esser et al. 2024, arXiv 2403.03206); row i depends on keys[i]."""
    return jax.nn.sigmoid(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1)))(keys))


def flow_errors(
    flow: Flow,
    latents: jax.Array,
    condition: Condition,
    noise: jax.Array,
    times: jax.Array,
    *,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean squared errors of the predicted velocities of clips, and mean squares of the velocities, [B] each.

    Args:
      flow: the network.
      latents: [B, N, d] float32, standardized.
      condition: of these clips.
      noise: [B, N, d] float32.
      times: [B] float32.
      key: as for `Flow`.
    """
    t = times[:, None, None]
    velocity = noise - latents
    predicted = flow((1.0 - t) * latents + t * noise, times, condition, key=key)
    errors, squares = jnp.square(predicted - velocity), jnp.square(velocity)
    return errors.mean(axis=(1, 2)), squares.mean(axis=(1, 2))


def flow_sums(flow: Flow, batch: dict, key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Scores of clips under noise and times that depend only on their numbers: sums and weights ([B], [B]) by name.

    `flow_loss` is the mean squared error of the velocity; `explained` is one minus its ratio to the mean square of the
    velocity, 0 for a network that always predicts zero.

    Args:
      flow: the network.
      batch: with `latents` [B, N, d] standardized, `label` [B], `number` [B] int32, the numbers of the clips, and with
        `condition` if frames are given.
      key: of the noise and the times.
    """
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(batch["number"])
    noise = noise_of(keys, batch["latents"].shape[1:])
    condition = Condition.of_batch(flow.config, batch)
    errors, squares = flow_errors(flow, batch["latents"], condition, noise, times_of(keys))
    return {"flow_loss": (errors, jnp.ones_like(errors)), "explained": (squares - errors, squares)}
