"""FLOPs of a training step, computed from the sizes: two for each multiply-add of matrix products and convolutions,
without other operations and without recomputation in the backward pass.

For a product y = x w, each required gradient, of x or of w, costs as many FLOPs as the product itself.
"""

import dataclasses
import math

from larp_jax.config import GeneratorConfig, RouterConfig, TokenizerConfig, TokenizerRecipe, TransformerConfig
from larp_jax.models.chunks import TOKENS_PER_CHUNK
from larp_jax.models.lpips import STAGES


def train_step(recipe: TokenizerRecipe) -> dict[str, float]:
    """FLOPs per clip of each part of a stage-1 step (LARP, arXiv 2410.21264, sections 3.2 and 3.3).

    Returns:
      `tokenizer`, `prior`, `perceptual` and `adversarial` (the tokenizer's part), which are in every step, and
      `discriminator`, the discriminator update. Parts that the recipe does not use are 0.
    """
    c, q, n = recipe.model, recipe.model.quantizer, recipe.model.num_tokens
    pixels = math.prod(c.clip_shape)
    in_patches, out_patches = math.prod(c.encoder_grid), math.prod(c.decoder_grid)
    counts = dict.fromkeys(("tokenizer", "prior", "perceptual", "adversarial", "discriminator"), 0.0)

    tokenizer = 2 * _linear(pixels, c.encoder.width)  # no gradient with respect to pixels
    tokenizer += 3 * (_stack(c.encoder, in_patches + n) + _linear(n * c.encoder.width, q.code_dim * (2 - q.has_codes)))
    tokenizer += q.has_codes * (1 + 3 * bool(q.entropy_weight)) * _linear(n * q.code_dim, q.codebook_size)
    tokenizer += 3 * (_linear(n * q.code_dim, c.decoder.width) + _stack(c.decoder, out_patches + n))
    counts["tokenizer"] = tokenizer + 3 * _linear(pixels, c.decoder.width)

    if recipe.loss.prior_weight:
        p = TransformerConfig(width=recipe.prior.width, depth=recipe.prior.depth, heads=recipe.prior.heads)
        network = _stack(p, n - 1) + 2 * _linear((n - 1) * q.code_dim, p.width)
        logits = _linear((n - 1) * q.code_dim, q.codebook_size)  # no gradient with respect to the codebook
        counts["prior"] = recipe.prior.rounds * (3 * network + 2 * logits)

    if recipe.loss.perceptual != "none":
        frames = recipe.loss.perceptual_frames or c.frames
        counts["perceptual"] = frames * _vgg(c.clip_shape[1:3])

    if recipe.loss.adversarial_weight:
        d = recipe.discriminator
        tokens = 1 + pixels // (math.prod(d.patch) * c.channels)
        embed, stack, products = _linear(pixels, d.width), _stack(d, tokens), _stack(d, tokens, attention=False)
        # no gradient with respect to the weights
        counts["adversarial"] = 2 * (embed + _linear(d.width, 1) + products) + 3 * (stack - products)
        update = 2 * (2 * embed + 3 * (stack + _linear(d.width, 1)))
        if recipe.loss.r1_weight:  # the gradient with respect to the clip, and its backward pass
            update += 3 * counts["adversarial"]
        counts["discriminator"] = update
    return counts


def codec(config: TokenizerConfig) -> dict[str, float]:
    """FLOPs per clip of `encode`, video to codes, and of `decode`, codes to video."""
    c, q, n = config, config.quantizer, config.num_tokens
    pixels = math.prod(c.clip_shape)
    encode = _linear(pixels, c.encoder.width) + _stack(c.encoder, math.prod(c.encoder_grid) + n)
    encode += _linear(n * c.encoder.width, q.code_dim) + _linear(n * q.code_dim, q.codebook_size)
    decode = _linear(n * q.code_dim, c.decoder.width) + _stack(c.decoder, math.prod(c.decoder_grid) + n)
    return {"encode": encode, "decode": decode + _linear(pixels, c.decoder.width)}


def codec_as_compiled(config: TokenizerConfig) -> dict[str, float]:
    """`codec` as counted by XLA's cost analysis; see `as_compiled`."""
    one = lambda part: dataclasses.replace(part, depth=1)  # noqa: E731
    counts = codec(dataclasses.replace(config, encoder=one(config.encoder), decoder=one(config.decoder)))
    q = config.quantizer
    counts["encode"] -= _linear(max(0, config.num_tokens - TOKENS_PER_CHUNK) * q.code_dim, q.codebook_size)
    return counts


def as_compiled(recipe: TokenizerRecipe) -> dict[str, float]:
    """`train_step` as counted by XLA's cost analysis, which counts loop bodies once: one layer, chunk or frame."""
    one = lambda part: dataclasses.replace(part, depth=1)  # noqa: E731
    single = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, encoder=one(recipe.model.encoder), decoder=one(recipe.model.decoder)),
        prior=one(recipe.prior),
        discriminator=one(recipe.discriminator),
        loss=dataclasses.replace(recipe.loss, perceptual_frames=1),
    )
    counts = train_step(single)
    n, q = recipe.model.num_tokens, recipe.model.quantizer
    if q.has_codes:
        skipped = _linear(max(0, n - TOKENS_PER_CHUNK) * q.code_dim, q.codebook_size)
        counts["tokenizer"] -= (1 + 3 * bool(q.entropy_weight)) * skipped
        skipped = _linear(max(0, n - 1 - TOKENS_PER_CHUNK) * q.code_dim, q.codebook_size)
        counts["prior"] -= 2 * recipe.prior.rounds * skipped * bool(recipe.loss.prior_weight)
    return counts


def generator_train_step(config: GeneratorConfig) -> dict[str, float]:
    """FLOPs per sequence of a stage-2 step from codes: `generator`. Causal attention is counted in full.

    With a ladder every sequence costs as much as the longest, because all are packed into the same bucket.
    """
    c, tokens = config, config.condition_tokens + config.symbols - 1
    outputs = c.width * (1 + 2 * c.kv_heads / c.heads) + c.width + 3 * c.mlp_width
    blocks = c.depth * (_linear(tokens * c.width, outputs) + 2 * _linear(tokens * c.width, tokens))
    return {"generator": 3 * (blocks + _linear(c.symbols * c.width, c.vocabulary))}


def router(config: RouterConfig) -> float:
    """FLOPs per clip of a router's choice."""
    c = config
    size = TransformerConfig(width=c.width, depth=c.depth, heads=c.heads)
    patches = math.prod(c.grid)
    return _linear(math.prod(c.clip_shape), c.width) + _stack(size, 1 + patches) + _linear(c.width, c.adaptive.count)


def router_train_step(config: RouterConfig) -> dict[str, float]:
    """FLOPs per clip of a step that trains a router: `router`."""
    pixels = _linear(math.prod(config.clip_shape), config.width)
    return {"router": 3 * router(config) - pixels}  # no gradient with respect to pixels


def vgg_features(size: tuple[int, int]) -> int:
    """Number of values in all feature maps of VGG16 for one frame of this height and width."""
    height, width = size
    return sum((height >> i) * (width >> i) * sum(widths) for i, widths in enumerate(STAGES))


def _linear(inputs: float, outputs: float) -> float:
    """A matrix product: two FLOPs for each input value (such as tokens times width) and output that it enters."""
    return 2.0 * inputs * outputs


def _stack(config: TransformerConfig, tokens: int, *, attention: bool = True) -> float:
    """Forward pass of blocks whose MLP has four times the width; causal attention is counted in full."""
    products = 12 * _linear(tokens * config.width, config.width)
    scores = 2 * _linear(tokens * config.width, tokens) if attention else 0.0
    return config.depth * (products + scores)


def _vgg(size: tuple[int, int]) -> float:
    """LPIPS of two frames, with the gradient with respect to one of them and no gradient of weights."""
    total, inputs = 0.0, 3
    for i, widths in enumerate(STAGES):
        pixels = (size[0] >> i) * (size[1] >> i)
        for width in widths:
            total += _linear(pixels * 9 * inputs, width)
            inputs = width
    return 3 * total
