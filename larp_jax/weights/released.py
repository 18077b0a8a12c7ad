"""The tensors of released models: their names, their shapes and the parameters of this package that they become.

Import and export use the same tables, so they cannot disagree. This module does not read or write files.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange

from larp_jax.config import (
    DiscriminatorConfig,
    FlowConfig,
    GeneratorConfig,
    PriorConfig,
    RouterConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
    swiglu_width,
)
from larp_jax.models.embeddings import sincos_1d, sincos_3d
from larp_jax.models.flow import TIME_WIDTH
from larp_jax.models.paths import path_name


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of this package and the released tensors that contain it.

    Attributes:
      path: path of the parameter, `module/.../name`.
      names: names of the released tensors; several if the parameter concatenates them. `{}` is the layer number.
      shape: shape of each released tensor.
      pattern: einops pattern from the released axes to those of the parameter; the axis of several `names` comes first.
      layers: number of released layers, which the parameter stacks on a leading axis; 0 if it has no such axis.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    pattern: str = "d -> d"
    layers: int = 0

    @property
    def size(self) -> int:
        """Number of values of the parameter."""
        return math.prod(self.shape) * len(self.names) * max(1, self.layers)

    def released_names(self) -> list[tuple[str, ...]]:
        """The names of the released tensors for each layer."""
        return [tuple(name.format(i) for name in self.names) for i in range(max(1, self.layers))]

    def from_released(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The parameter, float32, from released tensors whose names and shapes were checked."""

        def convert(names):
            parts = [np.asarray(tensors[name], np.float32) for name in names]
            return rearrange(parts if len(parts) > 1 else parts[0], self.pattern)

        first, *rest = self.released_names()
        if not self.layers:
            return np.array(convert(first), order="C")  # a copy, because tensors may be in a memory-mapped file
        x = convert(first)
        stacked = np.empty((self.layers, *x.shape), np.float32)
        stacked[0] = x
        for i, names in enumerate(rest, 1):
            stacked[i] = convert(names)
        return stacked

    def to_released(self, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The inverse: pairs of released name and float32 array."""
        left, right = self.pattern.split(" -> ")
        sizes = (len(self.names),) * (len(self.names) > 1) + self.shape
        sizes = {axis: size for axis, size in zip(left.split(), sizes, strict=True) if axis != "1"}
        for names, layer in zip(self.released_names(), x if self.layers else x[None], strict=True):
            y = rearrange(np.asarray(layer, np.float32), f"{right} -> {left}", **sizes)
            for name, part in zip(names, y if len(names) > 1 else y[None], strict=True):
                yield name, np.ascontiguousarray(part)


@dataclasses.dataclass(frozen=True)
class Table:
    """A fixed position table: a tensor in a released file, which models of this package compute instead."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    def compute(self) -> np.ndarray:
        """The table in the released shape, float32."""
        return self.values().astype(np.float32).reshape(self.shape)


BOTTLENECK_NORM = "bottleneck.norm_layer"


def _linear(path, name, inputs, outputs, *, bias=True, layers=0):
    yield Parameter(f"{path}/kernel", (f"{name}.weight",), (outputs, inputs), "o i -> i o", layers)
    if bias:
        yield Parameter(f"{path}/bias", (f"{name}.bias",), (outputs,), layers=layers)


def _norm(path, name, width, *, bias=True, layers=0):
    yield Parameter(f"{path}/scale", (f"{name}.weight",), (width,), layers=layers)
    if bias:
        yield Parameter(f"{path}/bias", (f"{name}.bias",), (width,), layers=layers)


def _transformer(path, name, config: TransformerConfig, kind: str = "larp"):
    """Blocks of a kind; no released model has those of `vitok`, so their names are chosen here."""
    larp, hidden = kind == "larp", 4 * config.width if kind == "larp" else swiglu_width(config.width)
    path, name, d, n = f"{path}/blocks", f"{name}.blocks.{{}}", config.width, config.depth
    yield from _norm(f"{path}/norm1", f"{name}.norm1", d, bias=larp, layers=n)
    yield from _linear(f"{path}/attention/qkv", f"{name}.attn.qkv", d, 3 * d, bias=False, layers=n)
    yield from _linear(f"{path}/attention/out", f"{name}.attn.proj", d, d, layers=n)
    yield from _norm(f"{path}/norm2", f"{name}.norm2", d, bias=larp, layers=n)
    if not larp:
        yield from _linear(f"{path}/mlp/gate", f"{name}.mlp.gate", d, hidden, bias=False, layers=n)
    yield from _linear(f"{path}/mlp/up", f"{name}.mlp.fc1", d, hidden, bias=larp, layers=n)
    yield from _linear(f"{path}/mlp/down", f"{name}.mlp.fc2", hidden, d, bias=larp, layers=n)


def _positions_3d(path, fixed, learned: dict, learns: bool, token_type: str | None, grid, width):
    """`learned` gives the released names of the tables along time, height and columns."""
    t, h, w = grid
    if learns:
        yield Parameter(f"{path}/time", (learned["time"],), (1, t, 1, 1, width), "1 t 1 1 d -> t d")
        yield Parameter(f"{path}/height", (learned["height"],), (1, 1, h, 1, width), "1 1 h 1 d -> h d")
        yield Parameter(f"{path}/columns", (learned["columns"],), (1, 1, 1, w, width), "1 1 1 w d -> w d")
    else:
        yield Table(fixed, (1, t * h * w, width), lambda: sincos_3d(grid, width))
    yield from _token_type(path, token_type, width)


def _positions_1d(path, name, shape, learns: bool, token_type: str | None, base):
    *_, length, width = shape
    if learns:
        yield Parameter(f"{path}/table", (name,), shape, "1 n d -> n d" if len(shape) == 3 else "n d -> n d")
    else:
        yield Table(name, shape, lambda: sincos_1d(np.arange(length), width, base))
    yield from _token_type(path, token_type, width)


def _token_type(path, name: str | None, width):
    if name:
        yield Parameter(f"{path}/token_type", (name,), (1, 1, width), "1 1 d -> d")


def tokenizer_tensors(config: TokenizerConfig) -> Iterator[Parameter | Table]:
    """The tensors of a released tokenizer without its prior (LARP, arXiv 2410.21264, section 3.2)."""
    c, q = config, config.quantizer
    pt, p, _ = c.encoder_patch
    # the released code uses a 2-D convolution for patches of one frame
    kernel, axes = ((pt, p, p), "t h w") if pt > 1 else ((p, p), "h w")
    yield Parameter(
        "encoder/patch_embed/proj/kernel",
        ("x_embedder.proj.weight",),
        (c.encoder.width, c.channels, *kernel),
        f"d c {axes} -> ({axes} c) d",
    )
    yield Parameter("encoder/patch_embed/proj/bias", ("x_embedder.proj.bias",), (c.encoder.width,))
    yield from _positions_3d(
        "encoder/patch_positions",
        "encoder_patch_pe",
        # sic: "encode_w_embed"
        {"time": "encoder_t_embed", "height": "encoder_h_embed", "columns": "encode_w_embed"},
        c.learned_encoder_patch_pe,
        "encoder_patch_token_type_embed" if c.use_encoder_patch_token_type_embed else None,
        c.encoder_grid,
        c.encoder.width,
    )
    yield from _positions_1d(
        "encoder/queries",
        "encoder_latent_query_embed",
        (c.query_rows, c.encoder.width),
        c.learned_encoder_latent_query_embed,
        "encoder_latent_query_token_type_embed" if c.use_encoder_latent_query_token_type_embed else None,
        c.latent_position_base,
    )
    yield from _transformer("encoder/transformer", "encoder", c.encoder, c.block)
    projected = q.code_dim * (1 if q.has_codes else 2)
    yield from _linear("quantizer/in_linear", "bottleneck.in_linear", c.encoder.width, projected)
    if q.norm == "ln_d":
        yield from _norm("quantizer/norm", BOTTLENECK_NORM, projected)
    elif q.norm == "ln_nd":  # over tokens and dimensions, which are one axis here
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            shape = (c.num_tokens, projected)
            yield Parameter(f"quantizer/norm/{leaf}", (f"{BOTTLENECK_NORM}.{name}",), shape, "n d -> (n d)")
    if q.has_codes:
        embedding = ("bottleneck.regularizer.embedding.weight",)
        yield Parameter("quantizer/embedding", embedding, (q.codebook_size, q.code_dim), "k d -> k d")
    yield from _linear("quantizer/out_linear", "bottleneck.out_linear", q.code_dim, c.decoder.width)
    yield from _positions_1d(
        "decoder/latent_positions",
        "decoder_latent_pe",
        (1, c.query_rows, c.decoder.width),
        c.learned_decoder_latent_pe,
        "decoder_latent_token_type_embed" if c.use_decoder_latent_token_type_embed else None,
        c.latent_position_base,
    )
    yield from _positions_3d(
        "decoder/patch_queries",
        "decoder_patch_query_embed",
        {"time": "decoder_t_embed", "height": "decoder_h_embed", "columns": "decoder_w_embed"},
        c.learned_decoder_patch_query_embed,
        "decoder_patch_query_token_type_embed" if c.use_decoder_patch_query_token_type_embed else None,
        c.decoder_grid,
        c.decoder.width,
    )
    yield from _transformer("decoder/transformer", "decoder", c.decoder, c.block)
    yield from _norm("decoder/norm", "final_layer.norm_final", c.decoder.width)
    # rows are (time in patch, row, column, channel) in both
    outputs = math.prod(c.decoder_patch) * c.channels
    yield from _linear("decoder/head", "final_layer.linear", c.decoder.width, outputs)


def prior_tensors(config: PriorConfig, num_tokens: int, code_dim: int) -> Iterator[Parameter]:
    """The prior in a released tokenizer (LARP, section 3.3)."""
    d, n = config.width, config.depth
    path, name = "blocks", "prior_model.blocks.{}"
    yield from _linear("in_linear", "prior_model.input_proj", code_dim, d)
    rows = config.positions or num_tokens
    yield Parameter("positions", ("prior_model.pos_emb",), (1, rows, d), "1 n d -> n d")
    yield from _norm(f"{path}/norm1", f"{name}.ln1", d, layers=n)
    parts = tuple(f"{name}.attn.{part}" for part in ("query", "key", "value"))
    weights, biases = (tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias"))
    yield Parameter(f"{path}/attention/qkv/kernel", weights, (d, d), "part o i -> i (part o)", n)
    yield Parameter(f"{path}/attention/qkv/bias", biases, (d,), "part o -> (part o)", n)
    yield from _linear(f"{path}/attention/out", f"{name}.attn.proj", d, d, layers=n)
    yield from _norm(f"{path}/norm2", f"{name}.ln2", d, layers=n)
    yield from _linear(f"{path}/mlp/up", f"{name}.mlp.0", d, 4 * d, layers=n)
    yield from _linear(f"{path}/mlp/down", f"{name}.mlp.2", 4 * d, d, layers=n)
    yield from _norm("norm", "prior_model.ln_f", d)
    yield from _linear("head", "prior_model.head", d, code_dim)


def discriminator_tensors(config: DiscriminatorConfig, clip: tuple[int, int, int, int]) -> Iterator[Parameter | Table]:
    """The discriminator of clips [T, H, W, C] in a checkpoint of the released trainer (LARP, section 3.2)."""
    c, d = config, config.width
    pt, p, _ = c.patch
    grid = tuple(size // patch for size, patch in zip(clip, c.patch, strict=False))
    kernel = (d, clip[3], pt, p, p)
    yield Parameter("patch_embed/proj/kernel", ("x_embedder.proj.weight",), kernel, "d c t h w -> (t h w c) d")
    yield Parameter("patch_embed/proj/bias", ("x_embedder.proj.bias",), (d,))
    yield Table("encoder_pos_embed", (1, math.prod(grid), d), lambda: sincos_3d(grid, d))
    yield Parameter("class_token", ("cls_token",), (1, 1, d), "1 1 d -> d")
    yield from _transformer("transformer", "transformer_encoder", c)
    yield from _norm("norm", "norm_final", d)
    yield from _linear("head", "fc", d, 1)


def generator_tensors(config: GeneratorConfig) -> Iterator[Parameter | Table]:
    """The tensors of a released generator (LARP, section 4.1)."""
    c, d, n = config, config.width, config.depth
    path, name = "blocks", "layers.{}"

    def linear(ours_name, released, inputs, outputs):
        return _linear(f"{path}/{ours_name}", f"{name}.{released}", inputs, outputs, bias=False, layers=n)

    rows = c.vocabulary + c.has_frames
    yield Parameter("token_embedding", ("tok_embeddings.weight",), (rows, d), "k d -> k d")
    if c.class_rows:
        table = ("cls_embedding.embedding_table.weight",)
        yield Parameter("class_embedding", table, (c.class_rows, d), "k d -> k d")
    rows = c.condition_tokens + c.symbols - 1
    if c.fixed_positions:
        yield Table("abs_pe", (1, rows, d), lambda: sincos_1d(np.arange(rows), d))
    else:
        yield Parameter("positions", ("abs_pe",), (1, rows, d), "1 n d -> n d")
    yield from _norm(f"{path}/norm1", f"{name}.attention_norm", d, bias=False, layers=n)
    yield from linear("attention/qkv", "attention.wqkv", d, d // c.heads * (c.heads + 2 * c.kv_heads))
    yield from linear("attention/out", "attention.wo", d, d)
    yield from _norm(f"{path}/norm2", f"{name}.ffn_norm", d, bias=False, layers=n)
    yield from linear("mlp/gate", "feed_forward.w1", d, c.mlp_width)
    yield from linear("mlp/up", "feed_forward.w3", d, c.mlp_width)
    yield from linear("mlp/down", "feed_forward.w2", c.mlp_width, d)
    yield from _norm("norm", "norm", d, bias=False)
    yield from _linear("head", "output", d, c.vocabulary, bias=False)


def router_tensors(config: RouterConfig) -> Iterator[Parameter | Table]:
    """A router; there is no released one, so the names are chosen here."""
    d = config.width
    yield from _linear("patch_embed/proj", "patch_embed", config.patch_inputs, d)
    learned = {"time": "time", "height": "height", "columns": "columns"}
    yield from _positions_3d("patch_positions", "", learned, True, None, config.grid, d)
    yield Parameter("class_token", ("class_token",), (d,))
    size = TransformerConfig(width=d, depth=config.depth, heads=config.heads)
    yield from _transformer("transformer", "transformer", size)
    yield from _norm("norm", "norm", d)
    yield from _linear("head", "head", d, config.adaptive.count)


def flow_tensors(config: FlowConfig) -> Iterator[Parameter | Table]:
    """A flow generator; there is no released one, the names are those of DiT (arXiv 2212.09748) where it has them."""
    c, d, n = config, config.width, config.depth
    path, name = "blocks", "blocks.{}"
    yield from _linear("in_proj", "x_embedder", c.code_dim, d)
    yield Parameter("positions", ("pos_embed",), (1, c.num_tokens, d), "1 n d -> n d")
    yield from _linear("time_up", "t_embedder.mlp.0", TIME_WIDTH, d)
    yield from _linear("time_down", "t_embedder.mlp.2", d, d)
    if c.class_rows:
        yield Parameter("class_embedding", ("y_embedder.embedding_table.weight",), (c.class_rows, d), "k d -> k d")
    if c.has_frames:
        yield from _linear("frames_proj", "frames_embedder", c.code_dim, d)
        yield Parameter("no_frames", ("no_frames",), (d,))
    yield from _linear(f"{path}/qkv", f"{name}.attn.qkv", d, 3 * d, layers=n)
    yield from _norm(f"{path}/q_norm", f"{name}.attn.q_norm", d // c.heads, bias=False, layers=n)
    yield from _norm(f"{path}/k_norm", f"{name}.attn.k_norm", d // c.heads, bias=False, layers=n)
    yield from _linear(f"{path}/out", f"{name}.attn.proj", d, d, layers=n)
    yield from _linear(f"{path}/mlp/up", f"{name}.mlp.fc1", d, 4 * d, layers=n)
    yield from _linear(f"{path}/mlp/down", f"{name}.mlp.fc2", 4 * d, d, layers=n)
    yield from _linear(f"{path}/modulation", f"{name}.adaLN_modulation.1", d, 6 * d, layers=n)
    yield from _linear("modulation", "final_layer.adaLN_modulation.1", d, 2 * d)
    yield from _linear("head", "final_layer.linear", d, c.code_dim)


def model_tensors(config: TokenizerRecipe | GeneratorConfig | FlowConfig | RouterConfig) -> list[Parameter | Table]:
    """The tensors of a released file; parameter paths start with the key in `TrainState.params`."""
    if isinstance(config, GeneratorConfig):
        parts = {"generator": generator_tensors(config)}
    elif isinstance(config, FlowConfig):
        parts = {"generator": flow_tensors(config)}
    elif isinstance(config, RouterConfig):
        parts = {"router": router_tensors(config)}
    else:
        parts = {"tokenizer": tokenizer_tensors(config.model)}
        if config.loss.prior_weight:
            parts["prior"] = prior_tensors(config.prior, config.model.query_rows, config.model.quantizer.code_dim)
    return [
        dataclasses.replace(item, path=f"{part}/{item.path}") if isinstance(item, Parameter) else item
        for part, items in parts.items()
        for item in items
    ]


def check_sizes(recipe: Any, arrays: Any) -> None:
    """Raises ValueError if the sizes of stored arrays differ from those of the recipe's networks.

    Called before reading any array or creating a network: damaged sizes may exceed the memory.
    """
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    stored = {path_name(path): math.prod(x.shape) for path, x in leaves}
    model = recipe.model
    items = model_tensors(recipe if isinstance(recipe, TokenizerRecipe) else model)
    sizes = {item.path: item.size for item in items if isinstance(item, Parameter)}
    if isinstance(recipe, TokenizerRecipe):  # the released layout has no blocks
        sizes["tokenizer/encoder/queries/block_table"] = model.blocks * model.encoder.width
        sizes["tokenizer/decoder/latent_positions/block_table"] = model.blocks * model.decoder.width
        sizes["prior/block_table"] = model.blocks * recipe.prior.width
    elif model.ladder:
        sizes["generator/block_positions"] = model.blocks * model.width
        sizes["generator/place_positions"] = (model.ladder[-1] + 1) * model.width
    for path, size in sizes.items():
        if stored.get(path, size) != size:
            raise ValueError(f"{path} has {stored[path]} values, its settings require {size}")


def expected_shapes(items: Iterable[Parameter | Table]) -> dict[str, tuple[int, ...]]:
    """Shape of every released tensor by name."""
    shapes = {}
    for item in items:
        names = [(item.name,)] if isinstance(item, Table) else item.released_names()
        shapes |= {name: item.shape for group in names for name in group}
    return shapes


def params_from_released(items: Iterable[Parameter | Table], tensors: Mapping[str, np.ndarray]) -> dict:
    """Nested parameters, float32 NumPy, from released tensors whose names and shapes were checked."""
    params = {}
    for item in items:
        if isinstance(item, Parameter):
            *parents, leaf = item.path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = item.from_released(tensors)
    return params


def params_to_released(items: Iterable[Parameter | Table], params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `params_from_released`, without the fixed tables. Also converts gradients."""
    released = {}
    for item in items:
        if isinstance(item, Parameter):
            node = params
            for part in item.path.split("/"):
                node = node[part]
            released.update(item.to_released(np.asarray(node)))
    return released
