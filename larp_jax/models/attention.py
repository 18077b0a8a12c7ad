"""Attention, in the form that is fastest where it runs."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from larp_jax.models.dropout import dropout, kept, seed

TPU_LANES = 128  # the fused kernel takes whole multiples of them
TPU_BLOCK = 512  # queries and keys at a time, where the sequence is so long


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention, [B, N, H, d] each -> [B, N, H, d]; scale 1/sqrt(d), softmax in float32.

    Chooses per lowering platform: on GPUs cuDNN's fused kernel and on TPUs Pallas' where dtype and head width allow it,
    on CPUs batched matrix products with a hand-written backward pass, otherwise `jax.nn.dot_product_attention`.

    Args:
      q: queries.
      k: keys.
      v: values.
      causal: queries see no later keys.
      dropout_rate: of the probabilities, which no fused kernel offers.
      key: turns dropout on.
    """
    rate = 0.0 if key is None else dropout_rate
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # every branch is traced everywhere, and tracing a fused kernel already asks for its platform
    cudnn = half and not rate and jax.default_backend() == "gpu" and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    pallas = half and not rate and _for_tpu()

    def general(q, k, v, implementation="xla"):
        if rate:
            return _with_dropout(q, k, v, causal, rate, key)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)

    def on_gpu(q, k, v):
        return general(q, k, v, "cudnn" if cudnn else "xla")

    def on_tpu(q, k, v):
        return _pallas_attention(q, k, v, causal) if pallas else general(q, k, v)

    def on_cpu(q, k, v):
        heads = q.shape[2]
        q, k, v = (rearrange(x, "b n h d -> (b h) n d") for x in (q, k, v))
        y = _matmul_attention(causal, rate, q, k, v, seed(key) if rate else None)
        return rearrange(y, "(b h) n d -> b n h d", h=heads)

    return jax.lax.platform_dependent(q, k, v, cpu=on_cpu, cuda=on_gpu, tpu=on_tpu, default=general)


def _with_dropout(q, k, v, causal, rate, key):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    probs = dropout(jax.nn.softmax(scores, axis=-1), rate, key).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probs, v)


# ---------------------------------------------------------------------------------------------------------------- TPUs


def _for_tpu() -> bool:
    """Whether this is traced for a mesh of TPUs; without one nobody says how the kernel is to be split over devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and "TPU" in device.device_kind


def _pallas_attention(q, k, v, causal):
    """Pallas' fused kernel on each device: of a mesh's axes the last splits the heads, the others the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [name for name in mesh.axis_names if name not in mesh.manual_axes]

    def local(q, k, v):
        from jax.experimental.pallas.ops.tpu import flash_attention as pallas

        n = q.shape[1]
        padding = -n % TPU_LANES
        widths = ((0, 0), (0, 0), (0, padding), (0, 0))
        q, k, v = (jnp.pad(rearrange(x, "b n h d -> b h n d"), widths) for x in (q, k, v))
        segments = None
        if padding and not causal:  # what comes after is not seen in any case
            real = jnp.broadcast_to(jnp.arange(n + padding) < n, (len(q), n + padding)).astype(jnp.int32)
            segments = pallas.SegmentIds(real, real)
        block = next(size for size in (TPU_BLOCK, TPU_BLOCK // 2, TPU_LANES) if (n + padding) % size == 0)
        names = "q k_major k q_major_dkv k_major_dkv k_dkv q_dkv k_major_dq k_dq q_dq".split()
        sizes = pallas.BlockSizes(block_b=1, **{f"block_{name}": block for name in names})
        scale = q.shape[-1] ** -0.5
        y = pallas.flash_attention(q, k, v, segment_ids=segments, causal=causal, sm_scale=scale, block_sizes=sizes)
        return rearrange(y[:, :, :n], "b h n d -> b n h d")

    if not axes:
        return local(q, k, v)
    *rows, heads = axes
    spec = P(tuple(rows), None, heads)
    # the kernel does not say over which axes its result differs
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(axes), check_vma=False)(q, k, v)


# ---------------------------------------------------------------------------------------------------------------- CPUs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_attention(
    causal: bool, rate: float, q: jax.Array, k: jax.Array, v: jax.Array, seed: jax.Array | None
) -> jax.Array:
    """[B, N, d] each -> [B, N, d]; probabilities are dropped at a rate above 0, by `seed`."""
    return _matmul_attention_fwd(causal, rate, q, k, v, seed)[0]


def _matmul_attention_fwd(causal, rate, q, k, v, seed):
    scores = _scores(causal, q, k, "bqk")
    largest = jax.lax.optimization_barrier(scores.max(-1, keepdims=True))
    probs = jnp.exp(scores - largest)
    total = jax.lax.optimization_barrier(probs.sum(-1, keepdims=True))
    probs = _drop(probs, rate, seed, "bqk").astype(v.dtype)
    out = (jnp.einsum("bqk,bkd->bqd", probs, v).astype(jnp.float32) / total).astype(v.dtype)
    return out, (q, k, v, seed, out, largest + jnp.log(total))


def _matmul_attention_bwd(causal, rate, residuals, dout):
    """Computes the probabilities again, and transposed (keys by queries), as the gradients of k and v want them.

    XLA's CPU backend is several times slower when it contracts over the rows of both operands, and writing and reading
    every layer's probabilities takes longer than one more product.
    """
    q, k, v, seed, out, normalizer = residuals
    probs = jax.lax.optimization_barrier(jnp.exp(_scores(causal, q, k, "bkq") - normalizer.mT))
    dv = jnp.einsum("bkq,bqd->bkd", _drop(probs, rate, seed, "bkq").astype(v.dtype), dout)
    dprobs = _drop(jnp.einsum("bkd,bqd->bkq", v, dout).astype(jnp.float32), rate, seed, "bkq")
    # sum_k probs * dprobs = dout . out, which is d instead of N terms a row
    row = jnp.einsum("bqd,bqd->bq", dout.astype(jnp.float32), out.astype(jnp.float32))[:, None]
    dscores = jax.lax.optimization_barrier((probs * (dprobs - row) * q.shape[-1] ** -0.5).astype(q.dtype))
    dk = jnp.einsum("bkq,bqd->bkd", dscores, q)
    dq = jnp.einsum("bqk,bkd->bqd", jax.lax.optimization_barrier(dscores.mT), k)
    return dq, dk, dv, None


def _scores(causal: bool, q: jax.Array, k: jax.Array, order: str) -> jax.Array:
    """q . k / sqrt(d) of all pairs, float32 with axes in that order; -inf where the key comes after the query."""
    operands = {"q": ("bqd", q * q.shape[-1] ** -0.5), "k": ("bkd", k)}
    (one, x), (other, y) = (operands[axis] for axis in order[1:])
    scores = jnp.einsum(f"{one},{other}->{order}", x, y).astype(jnp.float32)
    if causal:
        query, key = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, order.index(axis)) for axis in "qk")
        scores = jnp.where(query >= key, scores, -jnp.inf)
    return scores


def _drop(x: jax.Array, rate: float, seed: jax.Array | None, order: str) -> jax.Array:
    """Dropout of x, axes in that order: the same pairs of query and key in any."""
    if not rate:
        return x
    batch, query, key = (jax.lax.broadcasted_iota(jnp.uint32, x.shape, order.index(axis)) for axis in "bqk")
    keep = kept(seed, rate, batch * x.shape[order.index("q")] + query, key)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


_matmul_attention.defvjp(_matmul_attention_fwd, _matmul_attention_bwd)
