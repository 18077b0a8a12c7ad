"""The few layers everything is built from: linear, layer norm, dropout, attention, the pre-LN transformer stack.

Parameters are float32; `dtype` is the dtype of the computation (activations are cast to it, statistics of norms and
softmaxes stay in float32). Modules know nothing of meshes, losses or files.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from larp_jax.config import TransformerConfig

Dtype = jnp.dtype | type


def _with_cpu_form(general: Callable, on_cpu: Callable) -> Callable:
    """A function of arrays that lowers to `on_cpu` on CPU and to `general` elsewhere (chosen per lowering platform)."""
    return lambda *args: jax.lax.platform_dependent(*args, cpu=on_cpu, default=general)


# XLA's CPU backend runs `dy @ W^T` at little more than half the speed of a plain row-major product, because the
# contraction is over the last axis of both operands. Transposing W first (behind a barrier, so that the transpose is
# not folded back into the product) costs D*F moves against B*N*D*F multiplications.
@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _matmul_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_bwd(residuals, dy):
    x, kernel = residuals

    def general(dy, kernel):
        return dy @ kernel.T

    def on_cpu(dy, kernel):
        return dy @ jax.lax.optimization_barrier(kernel.T)

    dx = _with_cpu_form(general, on_cpu)(dy, kernel)
    flat = math.prod(x.shape[:-1])
    dkernel = x.reshape(flat, x.shape[-1]).T @ dy.reshape(flat, dy.shape[-1])
    return dx, dkernel


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [inputs, outputs]; Xavier-uniform and zero bias unless told otherwise (METHOD 1)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        kernel_init: Callable = nnx.initializers.xavier_uniform(),
        dtype: Dtype = jnp.float32,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., inputs] -> [..., outputs] in `dtype`."""
        y = _matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis; mean and (two-pass) variance in float32, whatever the compute dtype."""

    def __init__(self, width: int, *, epsilon: float, dtype: Dtype = jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape in `dtype`."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity where `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention, [B, N, H, d] each -> [B, N, H, d]; scale 1/sqrt(d), softmax in float32.

    Chooses per lowering platform: cuDNN's fused kernel on GPUs where dtype and head width allow it, batched matrix
    products with a hand-written backward pass on CPUs, `jax.nn.dot_product_attention` otherwise.
    """
    # every branch is traced everywhere, and tracing the fused kernel already asks for a cuDNN
    has_gpu = jax.default_backend() == "gpu"
    fused = has_gpu and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128

    def on_gpu(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn" if fused else "xla")

    def general(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")

    def on_cpu(q, k, v):
        heads = q.shape[2]
        q, k, v = (rearrange(x, "b n h d -> (b h) n d") for x in (q, k, v))
        return rearrange(_matmul_attention(causal, q, k, v), "(b h) n d -> b n h d", h=heads)

    return jax.lax.platform_dependent(q, k, v, cpu=on_cpu, cuda=on_gpu, default=general)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_attention(causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _matmul_attention_fwd(causal, q, k, v)[0]


def _matmul_attention_fwd(causal, q, k, v):
    scores = jnp.einsum("bqd,bkd->bqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if causal:
        n = scores.shape[-1]
        scores = jnp.where(jnp.tril(jnp.ones((n, n), bool)), scores, -jnp.inf)
    scores = jnp.exp(scores - scores.max(-1, keepdims=True))
    probs = (scores / scores.sum(-1, keepdims=True)).astype(v.dtype)
    out = jnp.einsum("bqk,bkd->bqd", probs, v)
    return out, (q, k, v, probs, out)


def _matmul_attention_bwd(causal, residuals, dout):
    q, k, v, probs, out = residuals
    scale = q.shape[-1] ** -0.5

    def transposed(x):  # made explicit: XLA's CPU backend is several times slower when it contracts over the rows
        return jax.lax.optimization_barrier(x.transpose(0, 2, 1))

    dv = jnp.einsum("bkq,bqd->bkd", transposed(probs), dout)
    dprobs = jnp.einsum("bqd,bkd->bqk", dout, v)
    # sum_k probs * dprobs = dout . out, which is d instead of N terms a row
    row = jnp.einsum("bqd,bqd->bq", dout.astype(jnp.float32), out.astype(jnp.float32))[..., None]
    dscores = (probs.astype(jnp.float32) * (dprobs.astype(jnp.float32) - row) * scale).astype(q.dtype)
    dq = jnp.einsum("bqk,bkd->bqd", dscores, k)
    dk = jnp.einsum("bkq,bqd->bkd", transposed(dscores), q)
    return dq, dk, dv


_matmul_attention.defvjp(_matmul_attention_fwd, _matmul_attention_bwd)


class SelfAttention(nnx.Module):
    """Multi-head self-attention; q, k and v are one product with columns [q; k; v], heads contiguous (METHOD 1)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        causal: bool,
        qkv_bias: bool,
        dropout_rate: float,
        kernel_init: Callable,
        dtype: Dtype,
    ):
        self.qkv = Linear(width, 3 * width, rngs=rngs, bias=qkv_bias, kernel_init=kernel_init, dtype=dtype)
        self.out = Linear(width, width, rngs=rngs, kernel_init=kernel_init, dtype=dtype)
        self.heads = heads
        self.causal = causal
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [B, N, D] -> [B, N, D]. `key` turns on dropout of the attention probabilities."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.heads)
        if key is None or self.dropout_rate == 0.0:
            y = attention(q, k, v, causal=self.causal)
        else:
            y = attention_with_dropout(q, k, v, causal=self.causal, rate=self.dropout_rate, key=key)
        return self.out(rearrange(y, "b n h d -> b n (h d)"))


def attention_with_dropout(q, k, v, *, causal: bool, rate: float, key: jax.Array) -> jax.Array:
    """The plain form of `attention`, with dropout on the probabilities (fused kernels offer none that is portable)."""
    n = q.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((n, n), bool)), scores, -jnp.inf)
    probs = dropout(jax.nn.softmax(scores, axis=-1), rate, key).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probs, v)


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear; hidden width 4 D."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, kernel_init: Callable, dtype: Dtype):
        self.up = Linear(width, 4 * width, rngs=rngs, kernel_init=kernel_init, dtype=dtype)
        self.down = Linear(4 * width, width, rngs=rngs, kernel_init=kernel_init, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
    """Pre-LN transformer block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = False,
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        kernel_init: Callable = nnx.initializers.xavier_uniform(),
        dtype: Dtype = jnp.float32,
    ):
        self.norm1 = LayerNorm(width, epsilon=1e-5, dtype=dtype)
        self.attention = SelfAttention(
            width,
            heads,
            rngs=rngs,
            causal=causal,
            qkv_bias=qkv_bias,
            dropout_rate=attention_dropout,
            kernel_init=kernel_init,
            dtype=dtype,
        )
        self.norm2 = LayerNorm(width, epsilon=1e-5, dtype=dtype)
        self.mlp = Mlp(width, rngs=rngs, kernel_init=kernel_init, dtype=dtype)
        self.residual_dropout = residual_dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [B, N, D] -> [B, N, D]; `key` turns on dropout."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = x + dropout(self.attention(self.norm1(x), keys[0]), self.residual_dropout, keys[1])
        return x + dropout(self.mlp(self.norm2(x)), self.residual_dropout, keys[2])


REMAT = ("none", "block", "dots")


def run_stack(
    blocks: nnx.Module, x: jax.Array, *per_layer: jax.Array, remat: str = "none", key: jax.Array | None = None
) -> jax.Array:
    """Runs stacked blocks (leaves [depth, ...], see `stack`) over x with `lax.scan`: one block is compiled.

    Args:
      blocks: what `stack` returned.
      x: [B, N, D].
      *per_layer: [depth, ...] each; a block is called with x, its key and its slice of each.
      remat: what the backward pass recomputes: `none`, every `block`, or all but the matrix products (`dots`).
      key: dropout key, split over the layers; None for none.
    """
    graphdef, layers = nnx.split(blocks)
    depth = jax.tree.leaves(layers)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def body(x, layer):
        params, key, *rest = layer
        return nnx.merge(graphdef, params)(x, key, *rest), None

    if remat == "block":
        body = jax.checkpoint(body)
    elif remat == "dots":
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.lax.scan(body, x, (layers, keys, *per_layer))[0]


def stack(depth: int, make_block: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`depth` blocks built at once: a module whose every leaf has a leading axis of that size."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make_block(rngs)

    return build(rngs)


def unstack(blocks: nnx.Module) -> list[nnx.Module]:
    """The blocks of `stack` one by one."""
    graphdef, layers = nnx.split(blocks)
    depth = jax.tree.leaves(layers)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(depth)]


class Transformer(nnx.Module):
    """The bidirectional stack of the tokenizer and the discriminator; no norm after the last block (METHOD 1)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32):
        self.blocks = stack(config.depth, lambda r: Block(config.width, config.heads, rngs=r, dtype=dtype), rngs)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, N, D] -> [B, N, D]."""
        return run_stack(self.blocks, x, remat=self.remat)
