"""A start for the tokenizer computed from clips in closed form: an option for small runs, off in the published one.

From a random start what differs between clips is about a hundredth of what the decoder's head sees, so a small
tokenizer spends its first hundreds of steps at the mean clip while its codes collapse to one. Started like this it is
a patchwise vector quantizer from its first step, and training makes a holistic tokenizer of it: each query gathers
the patches of a place of its own, latents are the principal components of what was gathered, codes are their k-means,
each patch of the decoder gathers the latents of its place, and the head is fitted by least squares.

Tokens find each other by coordinates: the first dimensions of the residual stream hold, for every axis of the clip, a
one-hot vector of the place along it, and a sign that tells tokens that give from tokens that gather. The first block
of each transformer attends by them; all other layers start as always, but quiet. After "Mimetic Initialization of
Self-Attention Layers" (arXiv 2305.09828).
"""

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.errors import InputError
from larp_jax.models.embeddings import PatchEmbed, Positions3d, patchify
from larp_jax.models.layers import Linear, Transformer
from larp_jax.models.quantizer import Quantizer, nearest_codes, normalize
from larp_jax.models.tokenizer import Tokenizer

CONTENT = 0.2  # share of a token's variance; the rest are its coordinates
SHARPNESS = 6.0  # score of the right place along an axis above that of a wrong one
REPULSION = 12.0  # score of tokens that give above that of tokens that gather
QUIET = 0.1  # scale of all residual branches but the one that gathers
SPREAD = 2.0  # length of the components, in units of their root mean square, that the constant weighs as much as
FLAT = 1e-6  # variance that everything has at least: clips may all be one color, and nothing may be divided by zero
KMEANS_ROUNDS = 10
RIDGE = 1e-2  # of the head, relative to the mean variance: large weights would turn each step of Adam into noise


def data_init(tokenizer: Tokenizer, video: jax.Array, key: jax.Array) -> None:
    """Sets the weights of a fresh tokenizer in place.

    Args:
      tokenizer: freshly initialized, with a discrete bottleneck and learned position tables.
      video: [B, T, H, W, C] float in [0, 1]; some hundreds of clips, so that nothing overfits.
      key: of the choice of the first codes.

    Raises:
      InputError: the configuration leaves no room for this start.
    """
    c = tokenizer.config
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    if not (
        c.learned_encoder_patch_pe
        and c.learned_encoder_latent_query_embed
        and c.learned_decoder_latent_pe
        and c.learned_decoder_patch_query_embed
    ):
        raise InputError(
            "data_init_clips above 0 writes into position tables, which have to be learned ones; set to True "
            "model.learned_encoder_patch_pe, learned_encoder_latent_query_embed, learned_decoder_latent_pe and "
            "learned_decoder_patch_query_embed"
        )
    if not c.quantizer.has_codes or c.quantizer.norm != "none" or not c.quantizer.l2_normalized:
        raise InputError(
            "data_init_clips above 0 makes codes of unit length; set model.quantizer.kind to svq or vq, norm to none "
            "and l2_normalized to True"
        )
    cells = _cells(c.num_tokens, c.encoder_grid)

    for_encoder = Coordinates(cells, c.encoder.width, c.encoder.heads, "model.encoder")
    for_encoder.of_patches(encoder.patch_positions, sign=1.0)
    encoder.queries.table[...] = for_encoder.of_cells(sign=-1.0)
    for_encoder.gather_first(encoder.transformer)
    _embed_principal_components(encoder.patch_embed, video, for_encoder)

    for_decoder = Coordinates(cells, c.decoder.width, c.decoder.heads, "model.decoder")
    decoder.latent_positions.table[...] = for_decoder.of_cells(sign=1.0)
    for_decoder.of_patches(decoder.patch_queries, sign=-1.0)
    for_decoder.gather_first(decoder.transformer)

    latents = _project_principal_components(quantizer, encoder(video).astype(jnp.float32), for_encoder)
    quantizer.embedding[...] = _kmeans(latents, c.quantizer.codebook_size, key)
    into = for_decoder.content_basis()
    room = min(len(into), c.quantizer.code_dim)
    kernel = jnp.zeros_like(quantizer.out_linear.kernel[...]).at[:room].set(into[:room])
    quantizer.out_linear.kernel[...] = kernel * for_decoder.scale
    quantizer.out_linear.bias[...] = jnp.zeros_like(quantizer.out_linear.bias[...])

    features = decoder.features(quantizer.expand(quantizer(latents).z_q)).astype(jnp.float32)
    _fit(decoder.head, features, patchify(video, decoder.patch))


def _cells(tokens: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """As many equal boxes of patches as there are tokens, as near to cubes as the numbers allow: their counts."""

    def elongation(cells):
        sides = np.log([n / c for n, c in zip(grid, cells, strict=True)])
        return np.var(sides), abs(sides[1] - sides[2])

    factors = [n for n in range(1, tokens + 1) if tokens % n == 0]
    return min(((t, h, tokens // t // h) for t in factors for h in factors if tokens % (t * h) == 0), key=elongation)


class Coordinates:
    """Dimensions of the residual stream that say where a token is: one a cell of each axis, a sign, and a constant.

    The rest is for content, which sums to zero over its dimensions. Coordinates sum to the same for all tokens of one
    sign. So all that layer norm does to a token is to scale it and to shift it by what others of its kind are.

    Args:
      cells: of each axis (time, height, width); one token a cell.
      width: of the residual stream.
      heads: of its attention.
      name: of the transformer in errors.
    """

    def __init__(self, cells: tuple[int, int, int], width: int, heads: int, name: str):
        self.cells, self.width, self.heads = cells, width, heads
        self.count = sum(cells) + 2
        if self.count > min(width // heads, width // 2):
            raise InputError(
                f"data_init_clips above 0 needs {name} heads at least {self.count} wide for places of "
                f"{' x '.join(map(str, cells))} tokens, and twice that width; they are {width // heads} of {width}"
            )
        self.scale = (width / 5 * (1.0 - CONTENT)) ** 0.5  # of five ones: three axes, the sign, the constant

    def _axis(self, axis: int, patches: int) -> np.ndarray:
        """[patches, width]: the cells that each patch along an axis lies in, with equal shares."""
        cells, first = self.cells[axis], sum(self.cells[:axis])
        edges = np.arange(patches + 1)[:, None] / patches
        low, high = np.arange(cells) / cells, (np.arange(cells) + 1) / cells
        overlap = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0.0, None)
        table = np.zeros((patches, self.width))
        table[:, first : first + cells] = overlap / overlap.sum(axis=1, keepdims=True)
        return self.scale * table

    def _sign(self, sign: float) -> np.ndarray:
        return self.scale * (sign * np.eye(self.width)[self.count - 2] + np.eye(self.width)[self.count - 1])

    def of_cells(self, sign: float) -> jax.Array:
        """[tokens, width], one row a cell."""
        t, h, w = (self._axis(axis, n) for axis, n in enumerate(self.cells))
        table = t[:, None, None] + h[None, :, None] + w[None, None, :] + self._sign(sign)
        return jnp.asarray(table.reshape(-1, self.width), jnp.float32)

    def of_patches(self, positions: Positions3d, sign: float) -> None:
        """Sets the three tables of a patch grid."""
        t, h, w = (self._axis(axis, n) for axis, n in enumerate(positions.grid))
        for param, table in ((positions.time, t + self._sign(sign)), (positions.height, h), (positions.columns, w)):
            param[...] = jnp.asarray(table, jnp.float32)

    def content_basis(self) -> jax.Array:
        """Orthonormal directions for content, [directions, width]: no coordinates, sums of zero."""
        size = self.width - self.count
        centered = np.eye(size) - 1.0 / size
        basis = np.linalg.svd(centered)[2][: size - 1]
        return jnp.asarray(np.pad(basis, ((0, 0), (self.count, 0))), jnp.float32)

    def gather_first(self, transformer: Transformer) -> None:
        """The first block := tokens take the content of the tokens of the other sign at their place."""
        blocks = transformer.blocks
        head_width = self.width // self.heads
        sign, one = self.count - 2, self.count - 1
        queries = SHARPNESS * np.eye(self.width, head_width)
        queries[self.count :] = 0.0
        # The score of the right token is 0 and all others are below, so that the scale layer norm gives a token,
        # which depends on its content, cannot make another the best.
        queries[sign, sign], queries[one, one] = -REPULSION / 2, 0.0
        queries[sign, one] = 3 * SHARPNESS + REPULSION / 2
        queries *= head_width**0.5 / self.scale**2
        keys = np.zeros((self.width, head_width))
        keys[: self.count, : self.count] = np.eye(self.count)
        content = np.diag((np.arange(self.width) >= self.count).astype(float))
        qkv = np.hstack([np.tile(queries, self.heads), np.tile(keys, self.heads), content])

        attention = blocks.attention
        attention.qkv.kernel[...] = attention.qkv.kernel[...].at[0].set(qkv)
        attention.out.kernel[...] = (QUIET * attention.out.kernel[...]).at[0].set(content)
        blocks.mlp.down.kernel[...] = QUIET * blocks.mlp.down.kernel[...]


def _principal_components(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean [D], variances [D] and directions [D, D] (columns) of rows, the largest first."""
    mean = x.mean(axis=0)
    x = x - mean
    variances, directions = jnp.linalg.eigh(x.T @ x / len(x))
    return mean, jnp.maximum(variances[::-1], 0.0), directions[:, ::-1]


def _embed_principal_components(embed: PatchEmbed, video: jax.Array, coordinates: Coordinates) -> None:
    """Patch embedding := principal components of the patches, in the dimensions of content."""
    x = patchify(video, embed.patch)
    mean, variances, directions = _principal_components(x.reshape(-1, x.shape[-1]))
    into = coordinates.content_basis()
    room = min(len(into), len(variances))
    scale = (CONTENT * coordinates.width / jnp.maximum(variances[:room].sum(), FLAT)) ** 0.5
    kernel = scale * directions[:, :room] @ into[:room]
    embed.proj.kernel[...] = kernel
    embed.proj.bias[...] = -mean @ kernel


def _project_principal_components(quantizer: Quantizer, h: jax.Array, coordinates: Coordinates) -> jax.Array:
    """in_linear := a constant, and principal components of encoder outputs [B, N, D]; gives the latents [B, N, d].

    Beside the constant, the length of the components is not lost on the unit sphere.
    """
    h = h if quantizer.in_norm is None else quantizer.in_norm(h)
    into = coordinates.content_basis()
    content = (h @ into.T).reshape(-1, len(into))
    mean, variances, directions = _principal_components(content)
    room = min(len(into), quantizer.config.code_dim - 1)
    kernel = into.T @ directions[:, :room]
    bias = -mean @ directions[:, :room]
    spread = SPREAD * jnp.sqrt(jnp.maximum(variances[:room].sum(), FLAT))
    empty = jnp.zeros_like(quantizer.in_linear.kernel[...])
    quantizer.in_linear.kernel[...] = empty.at[:, 1 : 1 + room].set(kernel / spread)
    quantizer.in_linear.bias[...] = empty[0].at[1 : 1 + room].set(bias / spread).at[0].set(1.0)
    return normalize(quantizer.in_linear(h))


def _kmeans(latents: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """Centers [size, d] of latents [B, N, d], all of unit length: some rounds of Lloyd's, from latents at random."""
    flat = latents.reshape(-1, latents.shape[-1])
    # as many draws as codes even from few latents; what is drawn twice is told apart by a little noise
    start = jax.random.choice(key, flat, (size,), replace=size > len(flat))
    start = normalize(start + 1e-3 * jax.random.normal(key, start.shape))

    def improve(_, codes):
        nearest = nearest_codes(latents, codes).reshape(-1)
        sums = jax.ops.segment_sum(flat, nearest, size)
        used = jax.ops.segment_sum(jnp.ones(len(flat)), nearest, size) > 0
        return jnp.where(used[:, None], normalize(sums), codes)

    return jax.lax.fori_loop(0, KMEANS_ROUNDS, improve, start)


def _fit(head: Linear, features: jax.Array, patches: jax.Array) -> None:
    """head := ridge regression of the patches [B, P, p] on the features [B, P, D]."""
    x = features.reshape(-1, features.shape[-1])
    y = patches.reshape(-1, patches.shape[-1])
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    gram = (x - x_mean).T @ (x - x_mean)
    ridge = RIDGE * jnp.maximum(jnp.trace(gram) / len(gram), FLAT) * jnp.eye(len(gram))
    kernel = jnp.linalg.solve(gram + ridge, (x - x_mean).T @ (y - y_mean))
    head.kernel[...] = kernel
    head.bias[...] = y_mean - x_mean @ kernel
