"""A start for the tokenizer computed from clips in closed form: an option for small runs, off in the published one.

From a random start what differs between clips is about a hundredth of what the decoder's head sees, so a small
tokenizer spends its first hundreds of steps at the mean clip while its codes collapse to one. Started like this,
latents are the directions in which clips differ, codes are drawn from them, and the head is fitted by least squares:
from the first step it gives the colours of a clip, and most codes are in use. Finer detail is left to training:
scores that see positions favour tokens at the rim of the grid, so a query does not yet gather its own place.
"""

import jax
import jax.numpy as jnp

from larp_jax.models.embeddings import PatchEmbed, grid_of_points, patchify
from larp_jax.models.layers import Linear, Transformer
from larp_jax.models.quantizer import Quantizer, normalize
from larp_jax.models.tokenizer import Tokenizer

SHARPNESS = 20.0  # score of a token with a token at its own position; neighbours get some units less
REPULSION = 1.5  # keeps the tokens that gather from attending to each other
RIDGE = 1e-3  # relative to the mean variance
HEAD_RIDGE = 0.3  # a head with large weights would turn every later step of the optimiser into noise


def data_init(tokenizer: Tokenizer, video: jax.Array, key: jax.Array) -> None:
    """Sets the weights of a fresh tokenizer in place.

    Learned queries and, where they are learned, the decoder's latent positions are laid on a grid over the clip.

    Args:
      tokenizer: freshly initialised, with a discrete bottleneck.
      video: [B, T, H, W, C] float in [0, 1]; some hundreds of clips, so that least squares does not overfit.
      key: of random rotations and of the choice of codes.
    """
    c = tokenizer.config
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    keys = jax.random.split(key, 4)

    gather = _route_by_position(encoder.transformer, encoder.patch_positions(), keys[0])
    if encoder.queries.table is not None:
        points = grid_of_points(c.num_tokens, c.encoder_grid, c.encoder.width, c.patch_position_base)
        encoder.queries.table[...] = jnp.asarray(points, jnp.float32) + gather
    _embed_principal_components(encoder.patch_embed, video, keys[1])

    if decoder.latent_positions.table is not None:
        points = grid_of_points(c.num_tokens, c.decoder_grid, c.decoder.width, c.patch_position_base)
        decoder.latent_positions.table[...] = jnp.asarray(points, jnp.float32)
    gather = _route_by_position(decoder.transformer, decoder.patch_queries(), keys[2])
    if decoder.patch_queries.token_type is not None:
        decoder.patch_queries.token_type[...] = gather

    latents = normalize(_project_differences(quantizer, encoder(video).astype(jnp.float32)))
    _sample_codebook(quantizer, latents, keys[3])
    # unit latents become tokens of unit variance, as the position tables beside them have
    kernel = quantizer.out_linear.kernel
    kernel[...] = kernel[...] * (kernel.shape[0] ** 0.5 / jnp.linalg.norm(kernel[...], axis=0))

    features = decoder.features(quantizer.expand(quantizer(latents).z_q)).astype(jnp.float32)
    _fit(decoder.head, features, patchify(video, decoder.patch))


def _span(rows: jax.Array) -> jax.Array:
    """Projection onto what the rows [n, D] span, [D, D]."""
    _, sizes, directions = jnp.linalg.svd(rows, full_matrices=False)
    directions = jnp.where((sizes > 0.01 * sizes[0])[:, None], directions, 0.0)
    return directions.T @ directions


def _route_by_position(transformer: Transformer, table: jax.Array, key: jax.Array) -> jax.Array:
    """Attention := tokens choose each other by position and hand on content: values see all but positions.

    After "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828), with the position table known.

    Args:
      transformer: its attention is set.
      table: [n, D] positions of the patches.
      key: of the random projections.

    Returns:
      [D], to be added to tokens that shall gather from others and not from each other.
    """
    attention = transformer.blocks.attention
    depth, width, _ = attention.qkv.kernel.shape
    head_width = width // attention.heads
    seen = table - table.mean(axis=1, keepdims=True)  # as layer norm gives it
    seen = seen / seen.std(axis=1, keepdims=True)
    varying = seen - seen.mean(axis=0)
    std = (SHARPNESS / jnp.square(varying).sum(axis=1).mean() / head_width**0.5) ** 0.5
    seek_key, *layer_keys = jax.random.split(key, depth + 1)
    seek = jax.random.normal(seek_key, (width,))
    seek = seek - _span(seen) @ seek
    seek = (seek - seek.mean()) / jnp.linalg.norm(seek - seek.mean())
    repel = REPULSION * jnp.outer(seek, seek)
    for layer, layer_key in enumerate(layer_keys):
        score_key, value_key = jax.random.split(layer_key)
        random = std * jax.random.normal(score_key, (width, width))
        queries, keys = (_span(varying) + repel) @ random, (_span(varying) - repel) @ random
        rotation = jax.random.orthogonal(value_key, width)
        values = (jnp.eye(width) - _span(seen)) @ rotation
        attention.qkv.kernel[...] = attention.qkv.kernel[...].at[layer].set(jnp.hstack([queries, keys, values]))
        attention.out.kernel[...] = attention.out.kernel[...].at[layer].set(rotation.T)
    return seek * width**0.5


def _embed_principal_components(embed: PatchEmbed, video: jax.Array, key: jax.Array) -> None:
    """Patch embedding := principal components of the patches, their variances evened out half way, rotated."""
    x = patchify(video, embed.patch)
    x = x.reshape(-1, x.shape[-1])
    mean = x.mean(axis=0)
    x = x - mean
    width = embed.proj.kernel.shape[1]
    variances, basis = jnp.linalg.eigh(x.T @ x / len(x))
    variances, basis = variances[-width:], basis[:, -width:]
    basis = basis / (jnp.maximum(variances, 0.0) + RIDGE * variances.sum()) ** 0.25
    basis = basis * jnp.sqrt(width / jnp.square(x @ basis).sum(axis=1).mean())
    kernel = basis @ jax.random.orthogonal(key, width)[: basis.shape[1]]
    embed.proj.kernel[...] = kernel
    embed.proj.bias[...] = -mean @ kernel


def _project_differences(quantizer: Quantizer, h: jax.Array) -> jax.Array:
    """in_linear := directions in which a token differs between clips, and tokens on average do not; [B, N, d]."""
    h = h if quantizer.in_norm is None else quantizer.in_norm(h)
    d = quantizer.config.code_dim
    of_token = h.mean(axis=0)
    mean = of_token.mean(axis=0)
    within = (h - of_token).reshape(-1, h.shape[-1])
    within = within.T @ within / len(within)
    between = (of_token - mean).T @ (of_token - mean) / len(of_token)
    nuisance, basis = jnp.linalg.eigh(between)
    basis = basis / jnp.sqrt(jnp.maximum(nuisance, 0.0) + 0.1 * jnp.trace(within) / len(within))
    directions = basis @ jnp.linalg.eigh(basis.T @ within @ basis)[1][:, -d:]
    variances = jnp.einsum("id,ij,jd->d", directions, within + between, directions)
    kernel = directions / variances**0.25  # full whitening would give the least direction as much room as the first
    kernel = kernel / jnp.sqrt(jnp.sqrt(variances).mean())
    quantizer.in_linear.kernel[...] = kernel
    quantizer.in_linear.bias[...] = -mean @ kernel
    return h @ kernel + quantizer.in_linear.bias[...]


def _sample_codebook(quantizer: Quantizer, latents: jax.Array, key: jax.Array) -> None:
    """Codebook := latents drawn at random; where they are too few, the rest stays as it is."""
    size = quantizer.embedding.shape[0]
    drawn = jax.random.permutation(key, latents.reshape(-1, latents.shape[-1]))[:size]
    quantizer.embedding[...] = quantizer.embedding[...].at[: len(drawn)].set(drawn)


def _fit(head: Linear, features: jax.Array, patches: jax.Array) -> None:
    """head := ridge regression of the patches [B, P, p] on the features [B, P, D]."""
    x = features.reshape(-1, features.shape[-1])
    y = patches.reshape(-1, patches.shape[-1])
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    gram = (x - x_mean).T @ (x - x_mean)
    ridge = HEAD_RIDGE * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
    kernel = jnp.linalg.solve(gram + ridge, (x - x_mean).T @ (y - y_mean))
    head.kernel[...] = kernel
    head.bias[...] = y_mean - x_mean @ kernel
