"""Attention, in the form that is fastest on the current backend."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from larp_jax.models.dropout import dropout, kept, seed

TPU_LANES = 128  # the fused kernel needs lengths that are multiples of this, and widths if they are larger
TPU_BLOCK = 512  # queries and keys per block, if the sequence is long enough
FAR = 2.0**100  # far below all scores, and far from overflow in bfloat16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of positions, of which queries attend only to their own and earlier ones.

    Attributes:
      of: [B, N] int32, the block of each position, in [0, count).
      count: number of blocks, known when the program is compiled.
    """

    of: jax.Array
    count: int = dataclasses.field(metadata={"static": True})


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    blocks: Blocks | None = None,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention, [B, N, H, d] each -> [B, N, H, d]; scale 1/sqrt(d), softmax in float32.

    Chosen by lowering platform, if there is no dropout of probabilities:

    - TPU: Pallas' fused kernel in 16 bits (in bfloat16 with blocks) on a mesh of TPUs.
    - GPU: cuDNN's fused kernel in 16 bits, if the head width allows it, without blocks: it takes a mask only as a bias,
      whose gradient it computes too.
    - CPU: batched matrix products with a hand-written backward pass, also with dropout.
    - Otherwise `jax.nn.dot_product_attention`, with blocks as a boolean mask.

    On a mesh, Pallas' kernel and every form with blocks run on each device for its clips and heads, so that queries,
    keys, values and scores stay where they are. XLA alone would gather them.

    Args:
      q: queries.
      k: keys.
      v: values.
      causal: whether queries attend only to their own and earlier positions.
      blocks: the block of each position; None for no blocks.
      dropout_rate: dropout rate of the probabilities; above 0, no fused kernel is used.
      key: random key of dropout; None turns it off.
    """
    rate = 0.0 if key is None else dropout_rate
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # Every branch is traced and differentiated on every platform, so fused kernels are branches only where they can be
    # used. Tracing one already needs its platform.
    gpu = half and blocks is None and jax.default_backend() == "gpu"
    cudnn = gpu and not rate and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    pallas = half and not rate and _for_tpu() and (blocks is None or q.dtype == jnp.bfloat16)
    fused = {}

    def general(q, k, v, blocks, implementation="xla"):
        if rate:
            return _with_dropout(q, k, v, causal, blocks, rate, key)
        mask = None if blocks is None else _visible(blocks.of)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)

    if cudnn:
        fused["cuda"] = functools.partial(general, implementation="cudnn")
    if pallas:
        fused["tpu"] = lambda q, k, v, blocks: _pallas_attention(q, k, v, causal, blocks)

    def on_cpu(q, k, v, blocks):
        heads = q.shape[2]
        q, k, v = (rearrange(x, "b n h d -> (b h) n d") for x in (q, k, v))
        rows = None if blocks is None else jnp.repeat(blocks.of, heads, axis=0)
        y = _matmul_attention(causal, rate, q, k, v, rows, seed(key) if rate else None)
        return rearrange(y, "(b h) n d -> b n h d", h=heads)

    def attend(*operands):
        return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=general, **fused)

    # dropped pairs are numbered over the whole batch
    split = pallas or (blocks is not None and not rate)
    return _split(attend, q, k, v, blocks) if split else attend(q, k, v, blocks)


def splits_heads() -> bool:
    """Whether this is traced for a mesh whose last axis splits heads over devices."""
    axes = _axes()
    return bool(axes) and jax.sharding.get_abstract_mesh().shape[axes[-1]] > 1


def _axes() -> list[str]:
    """The axes of the mesh that this is traced for, if any, without those that are already split by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    return [name for name in mesh.axis_names if name not in mesh.manual_axes]


def _split(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks | None) -> jax.Array:
    """Attention on each device: the last axis of the mesh splits the heads, the others split the batch.

    Where the mesh does not divide the heads (the batch), every device computes all of them.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), _axes()
    if math.prod(mesh.shape[name] for name in axes) == 1:
        return attend(q, k, v, blocks)
    *rows, last = axes
    batch = tuple(rows) if q.shape[0] % math.prod(mesh.shape[name] for name in rows) == 0 else None
    spec = P(batch, None, last if q.shape[2] % mesh.shape[last] == 0 else None)
    # Pallas' kernel does not declare over which axes its result varies
    split = jax.shard_map(
        attend, in_specs=(spec,) * 3 + (P(batch),), out_specs=spec, axis_names=set(axes), check_vma=False
    )
    return split(q, k, v, blocks)


def _visible(blocks: jax.Array) -> jax.Array:
    """[B, N] blocks -> bool [B, 1, queries, keys]: whether the key's block is not after the query's."""
    return blocks[:, None, :, None] >= blocks[:, None, None, :]


def _with_dropout(q, k, v, causal, blocks, rate, key):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    if blocks is not None:
        scores = jnp.where(_visible(blocks.of), scores, -jnp.inf)
    probs = dropout(jax.nn.softmax(scores, axis=-1), rate, key).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probs, v)


# ---------------------------------------------------------------------------------------------------------------- TPUs


def _for_tpu() -> bool:
    """Whether this is traced for a mesh of TPUs; without a mesh, it is unknown how to split the kernel over devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and "TPU" in device.device_kind


def _pallas_attention(q, k, v, causal, blocks):
    """Pallas' fused kernel, [B, N, H, d] each -> [B, N, H, d]."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    n, width = q.shape[1], q.shape[-1]
    padding = -n % TPU_LANES
    widths = ((0, 0), (0, 0), (0, padding), (0, 0))
    q, k, v = (jnp.pad(rearrange(x, "b n h d -> b h n d"), widths) for x in (q, k, v))
    segments = None
    if blocks is not None:
        of = jnp.pad(blocks.of, ((0, 0), (0, padding)), constant_values=blocks.count)
        q, k, v = _with_coordinates(q, k, v, of, blocks.count)
    elif padding and not causal:  # causal attention never attends to padding at the end
        real = jnp.broadcast_to(jnp.arange(n + padding) < n, (len(q), n + padding)).astype(jnp.int32)
        segments = pallas.SegmentIds(real, real)
    block = next(size for size in (TPU_BLOCK, TPU_BLOCK // 2, TPU_LANES) if (n + padding) % size == 0)
    names = "q k_major k q_major_dkv k_major_dkv k_dkv q_dkv k_major_dq k_dq q_dq".split()
    sizes = pallas.BlockSizes(block_b=1, **{f"block_{name}": block for name in names})
    y = pallas.flash_attention(
        q, k, v, segment_ids=segments, causal=causal, sm_scale=width**-0.5, block_sizes=sizes
    )
    return rearrange(y[:, :, :n, :width], "b h n d -> b n h d")


def _with_coordinates(q, k, v, of, last):
    """The mask of blocks in further coordinates of q and k, with which a kernel without a mask computes the same.

    Coordinate c of a key, from 1 to the last block, is 1 if the key is of block c; that of a query is -`FAR` if it is
    of an earlier block, otherwise 0. So the products with keys of later blocks are so far below the others that their
    probabilities are exactly 0, and other products change by exactly 0. Up to a width of 128 the coordinates cost
    nothing: a TPU fills its lanes up to that width anyway.

    Args:
      q: [B, H, N, d], and k and v, which gets zeros.
      of: [B, N] int32, the blocks.
      last: the last block that occurs.
    """
    of, blocks = of[:, None, :, None], jnp.arange(1, last + 1)
    width = q.shape[-1] + last
    width += -width % TPU_LANES if width > TPU_LANES else 0

    def wider(x, *more):
        x = jnp.concatenate([x, *(jnp.broadcast_to(y.astype(x.dtype), (*x.shape[:-1], last)) for y in more)], axis=-1)
        return jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))

    return wider(q, jnp.where(of < blocks, -FAR, 0.0)), wider(k, of == blocks), wider(v)


# ---------------------------------------------------------------------------------------------------------------- CPUs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_attention(
    causal: bool,
    rate: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array | None,
    seed: jax.Array | None,
) -> jax.Array:
    """[B, N, d] each -> [B, N, d]; `blocks` [B, N]; if the rate is above 0, dropout of the probabilities by `seed`."""
    return _matmul_attention_fwd(causal, rate, q, k, v, blocks, seed)[0]


def _matmul_attention_fwd(causal, rate, q, k, v, blocks, seed):
    scores = _scores(causal, q, k, blocks, "bqk")
    largest = jax.lax.optimization_barrier(scores.max(-1, keepdims=True))
    probs = jnp.exp(scores - largest)
    total = jax.lax.optimization_barrier(probs.sum(-1, keepdims=True))
    probs = _drop(probs, rate, seed, "bqk").astype(v.dtype)
    out = (jnp.einsum("bqk,bkd->bqd", probs, v).astype(jnp.float32) / total).astype(v.dtype)
    return out, (q, k, v, blocks, seed, out, largest + jnp.log(total))


def _matmul_attention_bwd(causal, rate, residuals, dout):
    """Recomputes the probabilities transposed (keys by queries), as the gradients of k and v need them.

    XLA's CPU backend is several times slower when it contracts over the rows of both operands, and storing the
    probabilities of every layer takes longer than another matrix product.
    """
    q, k, v, blocks, seed, out, normalizer = residuals
    probs = jax.lax.optimization_barrier(jnp.exp(_scores(causal, q, k, blocks, "bkq") - normalizer.mT))
    dv = jnp.einsum("bkq,bqd->bkd", _drop(probs, rate, seed, "bkq").astype(v.dtype), dout)
    dprobs = _drop(jnp.einsum("bkd,bqd->bkq", v, dout).astype(jnp.float32), rate, seed, "bkq")
    # sum_k probs * dprobs = dout . out, which has d instead of N terms per row
    row = jnp.einsum("bqd,bqd->bq", dout.astype(jnp.float32), out.astype(jnp.float32))[:, None]
    dscores = jax.lax.optimization_barrier((probs * (dprobs - row) * q.shape[-1] ** -0.5).astype(q.dtype))
    dk = jnp.einsum("bkq,bqd->bkd", dscores, q)
    dq = jnp.einsum("bqk,bkd->bqd", jax.lax.optimization_barrier(dscores.mT), k)
    return dq, dk, dv, None, None


def _scores(causal: bool, q: jax.Array, k: jax.Array, blocks: jax.Array | None, order: str) -> jax.Array:
    """q . k / sqrt(d) of all pairs, float32, axes in the given order; -inf if the key comes after the query."""
    operands = {"q": ("bqd", q * q.shape[-1] ** -0.5), "k": ("bkd", k)}
    (one, x), (other, y) = (operands[axis] for axis in order[1:])
    scores = jnp.einsum(f"{one},{other}->{order}", x, y).astype(jnp.float32)
    if causal:
        query, key = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, order.index(axis)) for axis in "qk")
        scores = jnp.where(query >= key, scores, -jnp.inf)
    if blocks is not None:
        query, key = (jnp.expand_dims(blocks, 3 - order.index(axis)) for axis in "qk")
        scores = jnp.where(query >= key, scores, -jnp.inf)
    return scores


def _drop(x: jax.Array, rate: float, seed: jax.Array | None, order: str) -> jax.Array:
    """Dropout of x with axes in the given order; the dropped pairs of query and key do not depend on the order."""
    if not rate:
        return x
    batch, query, key = (jax.lax.broadcasted_iota(jnp.uint32, x.shape, order.index(axis)) for axis in "bqk")
    keep = kept(seed, rate, batch * x.shape[order.index("q")] + query, key)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


_matmul_attention.defvjp(_matmul_attention_fwd, _matmul_attention_bwd)
