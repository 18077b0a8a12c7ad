"""Basic layers: linear, layer norm, and the pre-LN transformer stack.

Parameters are float32. `dtype` is the dtype of the computation, to which the operands of matrix products are cast. The
statistics of norms, softmaxes and the residual stream stay in float32: rounding the residual stream to bfloat16 after
every layer would change more codes than bfloat16 products do. Modules do not depend on meshes, losses or files.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from larp_jax.config import TransformerConfig, swiglu_width
from larp_jax.models.attention import Blocks, attention, splits_heads
from larp_jax.models.dropout import dropout
from larp_jax.models.rotary import Rotation, rotate

Dtype = jnp.dtype | type


def _with_cpu_form(general: Callable, on_cpu: Callable) -> Callable:
    """A function of arrays that lowers to `on_cpu` on CPUs and to `general` on other platforms."""
    return lambda *args: jax.lax.platform_dependent(*args, cpu=on_cpu, default=general)


# XLA's CPU backend computes `dy @ W^T` and `x^T @ dy` at little more than half the speed of a plain row-major product.
# Transposing first (with a barrier, so that XLA does not fold the transpose back into the product) copies only D*F or
# B*N*D elements, compared to B*N*D*F multiplications.
@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _matmul_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_bwd(residuals, dy):
    flat = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731

    def general(x, kernel, dy):
        return dy @ kernel.T, flat(x).T @ flat(dy)

    def on_cpu(x, kernel, dy):
        return dy @ jax.lax.optimization_barrier(kernel.T), jax.lax.optimization_barrier(flat(x).T) @ flat(dy)

    return _with_cpu_form(general, on_cpu)(*residuals, dy)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


# Rows of an int8 kernel that are converted at a time on CPUs: few enough to stay in the cache.
CONVERTED_ROWS = 256


def _matmul_int8(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., inputs] times an int8 kernel, in the dtype of x.

    On GPUs and TPUs XLA converts the kernel as part of the product. Its CPU backend would write the converted kernel to
    memory, which takes four times as long as the product with a float32 kernel.
    """

    def general(x, kernel):
        return x @ kernel.astype(x.dtype)

    def on_cpu(x, kernel):
        rows = next(n for n in range(min(CONVERTED_ROWS, len(kernel)), 0, -1) if len(kernel) % n == 0)

        def add(i, y):
            some = jax.lax.dynamic_slice_in_dim(kernel, i * rows, rows, axis=0).astype(x.dtype)
            return y + jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis=-1) @ some

        return jax.lax.fori_loop(0, len(kernel) // rows, add, jnp.zeros((*x.shape[:-1], kernel.shape[1]), x.dtype))

    return _with_cpu_form(general, on_cpu)(x, kernel)


# On CPUs, products of so few rows with kernels of so many numbers, which hardly stay in a cache, are faster in blocks.
# XLA of jax 0.10 computes blocks on one core, so packing on all cores is faster for more rows.
FEW_ROWS = 4
LARGE_KERNEL = 2**17
BLOCK_COLUMNS = 64


def block_kernels(rows: int, *modules: nnx.Module) -> None:
    """Puts large kernels of float32 linear layers into blocks of columns, on CPUs and for at most `FEW_ROWS` rows.

    XLA's CPU backend computes the product of one row with a kernel at half the speed at which a core reads memory, and
    packs the kernel anew for every product of a few rows. It reads blocks as they are, nearly at full speed.
    """
    if rows > FEW_ROWS or jax.default_backend() != "cpu":
        return
    layers = [layer for module in modules for _, layer in nnx.iter_graph(module) if isinstance(layer, Linear)]
    for layer in layers:
        whole = layer.kernel.ndim == 2 and layer.kernel.shape[1] % BLOCK_COLUMNS == 0
        if whole and layer.kernel.size >= LARGE_KERNEL and layer.dtype == layer.kernel.dtype == jnp.float32:
            layer.kernel = nnx.Param(rearrange(layer.kernel[...], "i (b o) -> b i o", o=BLOCK_COLUMNS))


def _matmul_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., inputs] times a kernel in blocks [outputs / BLOCK_COLUMNS, inputs, BLOCK_COLUMNS]."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count > FEW_ROWS:
        return x @ rearrange(kernel, "b i o -> i (b o)")
    # two rows take no longer than one, for which there is a slower program
    rows = jnp.broadcast_to(rows, (len(kernel), max(2, count), rows.shape[1]))
    y = rearrange(jnp.einsum("bri,bio->bro", rows, kernel), "b r o -> r (b o)")
    return y[:count].reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [inputs, outputs]; Xavier-uniform with zero bias by default (released code).

    For inference only, the kernel can be int8 with one `scale` for each output, see `larp_jax.models.int8`; or in
    blocks, see `block_kernels`.
    """

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
        self.scale = nnx.data(None)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array, order: Callable = lambda y: y) -> jax.Array:
        """x [..., inputs] -> [..., outputs] in `dtype`; `order` reorders the last axis, of the weights."""
        if self.kernel.ndim == 3:
            y = order(_matmul_blocks(x.astype(self.dtype), self.kernel[...]))
        elif self.scale is None:
            y = _matmul(x.astype(self.dtype), order(self.kernel[...].astype(self.dtype)))
        else:
            y = _matmul_int8(x.astype(self.dtype), order(self.kernel[...])) * order(self.scale[...].astype(self.dtype))
        return y if self.bias is None else y + order(self.bias[...].astype(self.dtype))


def project(qkv: Linear, x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of x [B, N, D], [B, N, heads, d] each, by one product with columns [q; k; v].

    These columns cannot be split by heads. On a mesh that splits heads XLA would gather the result, so there the
    columns of the weights are reordered, which are far smaller.
    """
    order, sizes = "(h three d)" if splits_heads() else "(three h d)", {"three": 3, "h": heads}
    y = qkv(x, lambda y: rearrange(y, f"... (three h d) -> ... {order}", **sizes))
    q, k, v = rearrange(y, f"b n {order} -> three b n h d", **sizes)
    return q, k, v


def rematerialized(f: Callable) -> Callable:
    """f, whose intermediate values are recomputed in the backward pass instead of stored; for use in a stack.

    For functions that end in a matrix product after cheap operations such as norms and activations. The product itself
    is not recomputed, because the backward pass does not need its result.
    """
    return jax.checkpoint(f, prevent_cse=False)  # safe: forward and backward pass of a stack are separate loops


class LayerNorm(nnx.Module):
    """Layer norm over the last axis; mean and (two-pass) variance in float32 for any compute dtype."""

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


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 whatever the compute dtype."""

    def __init__(self, width: int, *, epsilon: float, dtype: Dtype):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape in `dtype`."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...]).astype(self.dtype)


class Memory(NamedTuple):
    """What later positions attend to.

    Attributes:
      keys: [B, M, H, d], with a leading axis for the layers of a stack.
      values: the same.
      seen: [B, M] bool, whether a position is attended to; false for padding.
    """

    keys: jax.Array
    values: jax.Array
    seen: jax.Array


class SelfAttention(nnx.Module):
    """Multi-head self-attention; one matrix product computes q, k and v, with columns [q; k; v], heads contiguous.

    With `separate_qkv` they are initialized as three separate linear layers, and have biases.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        causal: bool,
        separate_qkv: bool,
        dropout_rate: float,
        dtype: Dtype,
    ):
        init = _three_xavier_uniform if separate_qkv else nnx.initializers.xavier_uniform()
        self.qkv = Linear(width, 3 * width, rngs=rngs, bias=separate_qkv, kernel_init=init, dtype=dtype)
        self.out = Linear(width, width, rngs=rngs, dtype=dtype)
        self.heads = heads
        self.causal = causal
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None = None,
        *,
        norm: Callable,
        blocks: Blocks | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Attention of norm(x), [B, N, D] -> [B, N, D]; `blocks` as for `larp_jax.models.attention.attention`.

        `key` turns on dropout of the attention probabilities; `rotation` is that of queries and keys.
        """
        q, k, v = rematerialized(lambda x: project(self.qkv, norm(x), self.heads))(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = attention(q, k, v, causal=self.causal, blocks=blocks, dropout_rate=self.dropout_rate, key=key)
        return self.out(rearrange(y, "b n h d -> b n (h d)"))

    def extend(
        self, x: jax.Array, memory: Memory, *, norm: Callable, rotation: Rotation | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attention of norm(x) to itself and to earlier positions, without dropout.

        Args:
          x: [B, N, D].
          memory: of the earlier positions, M of them, with `seen` [B, M + N] also of these.
          norm: layer norm.
          rotation: of the queries and keys of x.

        Returns:
          [B, N, D], and the keys and values of x, [B, N, H, d] each.
        """
        q, k, v = project(self.qkv, norm(x), self.heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        keys, values = (jnp.concatenate(pair, axis=1) for pair in ((memory.keys, k), (memory.values, v)))
        y = jax.nn.dot_product_attention(q, keys, values, mask=memory.seen[:, None, None, :])
        return self.out(rearrange(y, "b n h d -> b n (h d)")), k, v


def _three_xavier_uniform(key: jax.Array, shape: tuple[int, int], dtype: Dtype) -> jax.Array:
    """Three kernels concatenated by columns, each Xavier-uniform for its own shape."""
    rows, columns = shape
    kernels = nnx.initializers.xavier_uniform(batch_axis=0)(key, (3, rows, columns // 3), dtype)
    return jnp.concatenate(kernels, axis=1)


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear; hidden width 4 D unless given."""

    def __init__(self, width: int, hidden: int | None = None, *, rngs: nnx.Rngs, dtype: Dtype):
        hidden = hidden or 4 * width
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, *, norm: Callable) -> jax.Array:
        """MLP of norm(x), [..., D] -> [..., D]."""
        x = rematerialized(lambda x: self.up(norm(x)))(x)
        return rematerialized(lambda x: self.down(gelu(x)))(x)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        kernel_init: Callable = nnx.initializers.xavier_uniform(),
        dtype: Dtype,
    ):
        def linear(inputs, outputs):
            return Linear(inputs, outputs, rngs=rngs, bias=False, kernel_init=kernel_init, dtype=dtype)

        self.gate = linear(width, hidden)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x: jax.Array, *, norm: Callable) -> jax.Array:
        """MLP of norm(x), [..., D] -> [..., D]."""
        gate, up = rematerialized(lambda x: (self.gate(y := norm(x)), self.up(y)))(x)
        return rematerialized(lambda gate, up: self.down(jax.nn.silu(gate) * up))(gate, up)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU in float32, computed by erf as in PyTorch, which takes half the time of JAX's, by erfc."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Block(nnx.Module):
    """Pre-LN transformer block: x += attention(norm(x)); x += mlp(norm(x)); x in float32.

    `kind` is `larp`: layer norms and an MLP with GELU; or `vitok`: RMS norms and SwiGLU with as many parameters.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = False,
        separate_qkv: bool = False,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        kind: str = "larp",
        dtype: Dtype = jnp.float32,
    ):
        norm = {"larp": LayerNorm, "vitok": RMSNorm}[kind]
        self.norm1 = norm(width, epsilon=1e-5, dtype=dtype)
        self.attention = SelfAttention(
            width,
            heads,
            rngs=rngs,
            causal=causal,
            separate_qkv=separate_qkv,
            dropout_rate=attention_dropout,
            dtype=dtype,
        )
        self.norm2 = norm(width, epsilon=1e-5, dtype=dtype)
        if kind == "vitok":
            self.mlp = SwiGLU(width, swiglu_width(width), rngs=rngs, dtype=dtype)
        else:
            self.mlp = Mlp(width, rngs=rngs, dtype=dtype)
        self.residual_dropout = residual_dropout

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None = None,
        blocks: Blocks | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """x [B, N, D] float32 -> the same shape; `key` turns on dropout, `blocks` mask attention."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        y = self.attention(x, keys[0], norm=self.norm1, blocks=blocks, rotation=rotation)
        x = x + dropout(y, self.residual_dropout, keys[1])
        return x + dropout(self.mlp(x, norm=self.norm2), self.residual_dropout, keys[2])

    def extend(
        self, x: jax.Array, memory: Memory, rotation: Rotation | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, N, D] float32 -> the same shape, and its keys and values; see `SelfAttention.extend`."""
        y, keys, values = self.attention.extend(x, memory, norm=self.norm1, rotation=rotation)
        x = x + y
        return x + self.mlp(x, norm=self.norm2), keys, values


REMAT = ("none", "block", "dots")


def run_stack(
    blocks: nnx.Module,
    x: jax.Array,
    *per_layer: jax.Array,
    shared: tuple = (),
    remat: str = "none",
    key: jax.Array | None = None,
    span: tuple[int, int] | None = None,
) -> jax.Array:
    """Applies stacked blocks (leaves [depth, ...], see `stack`) to x with `lax.scan`, so that one block is compiled.

    Args:
      blocks: from `stack`.
      x: [B, N, D] float32, the residual stream.
      *per_layer: [depth, ...] each; block i is called with x, its key and slice i of each.
      shared: further arguments, the same for all blocks.
      remat: what the backward pass recomputes: `none`, every `block`, or all but the matrix products (`dots`).
      key: random key of dropout, split over the layers; None turns dropout off.
      span: (i, j) applies only blocks i .. j - 1, without a copy of their weights; for frozen weights, as gradients
        of weights would need much memory, and without `per_layer` and `key`.
    """
    graphdef, layers = nnx.split(blocks)
    depth = jax.tree.leaves(layers)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def body(x, layer):
        own, key, *rest = layer
        params = own if span is None else jax.tree.map(lambda p: p[own], layers)
        return nnx.merge(graphdef, params)(x, key, *rest, *shared), None

    if remat == "block":
        body = jax.checkpoint(body)
    elif remat == "dots":
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.lax.scan(body, x, (layers if span is None else jnp.arange(*span), keys, *per_layer))[0]


def stack(depth: int, make_block: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """Creates `depth` blocks as one module, all of whose leaves have a leading axis of that size."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make_block(rngs)

    return build(rngs)


def unstack(blocks: nnx.Module) -> list[nnx.Module]:
    """The blocks of `stack` as a list."""
    graphdef, layers = nnx.split(blocks)
    depth = jax.tree.leaves(layers)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(depth)]


class Transformer(nnx.Module):
    """The bidirectional transformer of the tokenizer and the discriminator; no norm after the last block.

    `kind` is that of its blocks, see `Block`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        kind: str = "larp",
        remat: str = "none",
        dtype: Dtype = jnp.float32,
    ):
        make = lambda r: Block(config.width, config.heads, rngs=r, kind=kind, dtype=dtype)  # noqa: E731
        self.blocks = stack(config.depth, make, rngs)
        self.depth = config.depth
        self.remat, self.head_shape, self.dtype = remat, (config.heads, config.width // config.heads), dtype

    def __call__(
        self, x: jax.Array, blocks: Blocks | None = None, rotation: Rotation | None = None
    ) -> jax.Array:
        """x [B, N, D] float32 -> the same shape; positions attend to no later block, if these are given."""
        return run_stack(self.blocks, x, shared=(blocks, rotation), remat=self.remat)

    def keeping(
        self, x: jax.Array, layer: int, blocks: Blocks | None = None, rotation: Rotation | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The result of `__call__`, and the residual stream after the first `layer` blocks, [B, N, D]."""
        graphdef, layers = nnx.split(self.blocks)

        def run(x, part):
            some = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[part], layers))
            return run_stack(some, x, shared=(blocks, rotation), remat=self.remat)

        kept = run(x, slice(layer))
        return kept if layer == self.depth else run(kept, slice(layer, None)), kept

    def extend(
        self, x: jax.Array, seen: jax.Array, past: Sequence[Memory], rotation: Rotation | None = None
    ) -> tuple[jax.Array, Memory]:
        """Applies the transformer to positions that attend to themselves and to earlier ones, as with `blocks`.

        Args:
          x: [B, N, D] float32.
          seen: [B, N] bool, which of them are attended to.
          past: what earlier calls returned for earlier positions, in any order.
          rotation: that of x.

        Returns:
          The same shape as x, and the memory of these positions.
        """
        graphdef, layers = nnx.split(self.blocks)
        empty = jnp.zeros((len(jax.tree.leaves(layers)[0]), len(x), 0, *self.head_shape), self.dtype)
        keys, values = (
            jnp.concatenate([empty, *(getattr(memory, name) for memory in past)], axis=2) for name in ("keys", "values")
        )
        everything = jnp.concatenate([*(memory.seen for memory in past), seen], axis=1)

        def body(x, layer):
            params, keys, values = layer
            x, *own = nnx.merge(graphdef, params).extend(x, Memory(keys, values, everything), rotation)
            return x, own

        x, (keys, values) = jax.lax.scan(body, x, (layers, keys, values))
        return x, Memory(keys, values, seen)
