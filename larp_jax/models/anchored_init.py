"""An initialization of small tokenizers by position, without data: an option, off in the published recipe.

With the usual initialization, attention is nearly uniform, and for hundreds of steps all codes encode only the mean
color of the clip. Here each encoder query and each latent position of the decoder gets a position in the clip, its
anchor, and the first block of both transformers attends by position: some heads to a few patches around the anchor,
others to large parts of the clip. All other layers keep their usual weights, with smaller residual branches.

No clip is read, and no code is tied to a patch: anchors are rows of ordinary position tables, which training changes.
Related: "Mimetic Initialization of Self-Attention Layers", arXiv 2305.09828.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.config import TransformerConfig
from larp_jax.errors import InputError
from larp_jax.models.layers import Transformer
from larp_jax.models.tokenizer import Tokenizer

POSITION_SCALE = 0.7  # standard deviation of position tables
KIND_SCALE = 1.2  # scale of the two dimensions that distinguish sources from readers
SHARPNESS = (6.0, 6.0, 3.0, 1.0)  # decrease of the logit per patch of distance, for each quarter of the heads
PREFERENCE = 2.0  # difference between the logits of sources and of readers
BRANCH_SCALE = 0.3  # scale of all residual branches except the attention of the first block


def anchored_init(tokenizer: Tokenizer) -> None:
    """Changes the weights of a newly initialized tokenizer in place.

    Tokens are sources (patches in the encoder, latents in the decoder) or readers (queries, patch queries). Both have
    positions in the same coordinates, and readers attend to nearby sources.

    Args:
      tokenizer: freshly initialized, with learned position tables.

    Raises:
      InputError: positions are rotary, there are no queries, the position tables are not learned, or the transformers
        are too narrow.
    """
    c = tokenizer.config
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    learned = (
        "learned_encoder_patch_pe",
        "learned_encoder_latent_query_embed",
        "learned_decoder_latent_pe",
        "learned_decoder_patch_query_embed",
    )
    if c.is_rotary:
        raise InputError("start.anchored needs tables of positions, which model.block='vitok' has not; turn it off")
    if c.is_patchwise:
        raise InputError("start.anchored places queries, which model.layout='patchwise' does not have; turn it off")
    if fixed := [name for name in learned if not getattr(c, name)]:
        raise InputError(f"start.anchored needs learned position tables; set model.{fixed[0]} to True")
    sides = (
        (c.encoder, encoder.transformer, encoder.patch_positions, encoder.queries, encoder.patch_embed.proj, True),
        (c.decoder, decoder.transformer, decoder.patch_queries, decoder.latent_positions, quantizer.out_linear, False),
    )
    for size, transformer, tables, tokens, content, patches_are_sources in sides:
        width = size.width
        if width < 8 or width // size.heads < 2:
            raise InputError(
                f"start.anchored needs a width of at least 8 and heads of width at least 2, got {width} and"
                f" {width // size.heads}"
            )
        axes = [_axis_table(np.arange(n), n, width, axis) for axis, n in enumerate(tables.grid)]
        axes[0] = axes[0] + _kind(width, patches_are_sources)
        if c.adaptive:
            anchors, block_table = _anchors_of_blocks(c.query_rows, c.blocks, tables.grid, width)
        else:
            anchors, block_table = _anchors(c.num_tokens, tables.grid, width), np.zeros((1, width))
        anchors += _kind(width, not patches_are_sources)
        for param, value in zip((tables.time, tables.height, tables.columns), axes, strict=True):
            param[...] = jnp.asarray(value, jnp.float32)
        tokens.table[...] = jnp.asarray(anchors, jnp.float32)
        if tokens.block_table is not None:
            tokens.block_table[...] = jnp.asarray(block_table, jnp.float32)
        anchors = (block_table[:, None] + anchors).reshape(-1, width)
        directions = _attend_by_place(size, transformer, _sum(axes), anchors, tables.grid)
        # content is initially orthogonal to the directions from which attention reads positions
        free = np.eye(width) - directions @ directions.T
        free[-2:] = free[:, -2:] = 0.0
        content.kernel[...] = content.kernel[...] @ jnp.asarray(free, jnp.float32)
        blocks = transformer.blocks
        blocks.mlp.down.kernel[...] = BRANCH_SCALE * blocks.mlp.down.kernel[...]
        scales = jnp.full((size.depth, 1, 1), BRANCH_SCALE).at[0].set(1.0)
        blocks.attention.out.kernel[...] = scales * blocks.attention.out.kernel[...]
    embed = encoder.patch_embed.proj
    embed.bias[...] = -0.5 * embed.kernel[...].sum(axis=0)  # maps mid-gray to zero, else the mean color would dominate
    # the entries of a unit vector with d dimensions have variance 1/d
    quantizer.out_linear.kernel[...] = math.sqrt(c.quantizer.code_dim) * quantizer.out_linear.kernel[...]


def _axis_table(places: np.ndarray, count: int, width: int, axis: int) -> np.ndarray:
    """[len(places), width]: sines and cosines of positions on an axis of `count` patches, in a third of the dimensions.

    Frequencies range from a quarter turn per patch to a quarter turn per axis. Each axis has its own dimensions, so
    that all rows have the same norm. The last two dimensions are reserved for `_kind`.
    """
    third = (width - 2) // 6
    frequencies = math.pi / 2 * (1.0 / count) ** (np.arange(third) / max(third - 1, 1))
    angles = np.asarray(places, np.float64)[:, None] * frequencies
    table = np.zeros((len(places), width))
    start = 2 * third * axis
    table[:, start : start + third], table[:, start + third : start + 2 * third] = np.sin(angles), np.cos(angles)
    return POSITION_SCALE * math.sqrt(3) * table


def _kind(width: int, source: bool) -> np.ndarray:
    """[width]: a constant in the second-to-last dimension, and in the last one + for sources and - for readers."""
    row = np.zeros(width)
    row[-2:] = KIND_SCALE, KIND_SCALE if source else -KIND_SCALE
    return row


def _sum(axes: list[np.ndarray]) -> np.ndarray:
    """Sums the tables of time, height and width over the grid -> [t*h*w, width]."""
    t, h, w = axes
    return (t[:, None, None] + h[:, None] + w).reshape(-1, t.shape[-1])


def _anchors(count: int, grid: tuple[int, int, int], width: int) -> np.ndarray:
    """[count, width]: positions of the centers of `count` equal boxes that fill the grid and are as cubic as possible.

    The number of boxes along each axis is a divisor of `count`, so numbers such as 64 or 96 fit better than primes.
    """

    def elongation(boxes):
        sides = np.log([n / m for n, m in zip(grid, boxes, strict=True)])
        return np.var(sides), abs(sides[1] - sides[2])

    factors = [n for n in range(1, count + 1) if count % n == 0]
    boxes = min(((t, h, count // t // h) for t in factors for h in factors if count % (t * h) == 0), key=elongation)
    sides = enumerate(zip(grid, boxes, strict=True))
    return _sum([_axis_table((np.arange(m) + 0.5) * n / m - 0.5, n, width, axis) for axis, (n, m) in sides])


def _anchors_of_blocks(
    count: int, blocks: int, grid: tuple[int, int, int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the places of a block, [count, width], and what each block adds to them, [blocks, width].

    A block may use only the first of its places, so they are points of the Sobol sequence: any power of two of them is
    spread evenly over the frame. In time, all are in the middle of their block.
    """
    index, points, direction = np.arange(count), np.zeros((2, count), np.int64), 1 << 31
    bits = max(1, int(count - 1).bit_length())
    for j in range(bits):
        bit = index >> j & 1
        points ^= np.stack([bit * (1 << 31 - j), bit * direction])
        direction ^= direction >> 1
    row, column = (points / 2**32 + 0.5**bits / 2) * np.array(grid[1:])[:, None] - 0.5
    places = _axis_table(row, grid[1], width, 1) + _axis_table(column, grid[2], width, 2)
    middles = (np.arange(blocks) + 0.5) * grid[0] / blocks - 0.5
    times = _axis_table(middles, grid[0], width, 0)
    return (places, times) if blocks > 1 else (places + times, np.zeros((1, width)))


def _attend_by_place(
    size: TransformerConfig,
    transformer: Transformer,
    positions: np.ndarray,
    anchors: np.ndarray,
    grid: tuple[int, int, int],
) -> np.ndarray:
    """Sets the query and key weights of the first block; returns the directions of positions, [width, head width].

    The query and key weights of a head are the same multiple of the principal directions of all positions, so that
    logits decrease with the distance between two positions. The last dimension of a head is the preference for sources.
    """
    heads, width, head = size.heads, size.width, size.width // size.heads
    rows = _layer_norm(np.concatenate([positions, anchors]))
    rows[:, -2:] = 0.0
    directions = np.zeros((width, head))
    main = np.linalg.svd(rows, full_matrices=False)[2][: head - 1].T
    directions[:, : main.shape[1]] = main
    places = (_layer_norm(positions) @ directions).reshape(*grid, head)
    steps = [0.5 * (np.diff(places, axis=axis) ** 2).sum(-1).mean() for axis in range(3) if grid[axis] > 1]
    per_patch = np.mean(steps) if steps else 1.0
    kernel = transformer.blocks.attention.qkv.kernel
    first = kernel[...][0]
    for i in range(heads):
        scale = math.sqrt(SHARPNESS[i * len(SHARPNESS) // heads] * math.sqrt(head) / per_patch)
        queries, keys = scale * directions, scale * directions
        queries[-2, -1] = keys[-1, -1] = math.sqrt(PREFERENCE / 2 * math.sqrt(head))
        for start, value in ((i * head, queries), (width + i * head, keys)):
            first = jax.lax.dynamic_update_slice_in_dim(first, jnp.asarray(value, jnp.float32), start, axis=1)
    kernel[...] = kernel[...].at[0].set(first)
    return directions


def _layer_norm(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True))
