"""FLOPs of a training step, computed from the sizes: two for each multiply-add of matrix products and convolutions,
without other operations and without recomputation in the backward pass.

For a product y = x w, each required gradient, of x or of w, costs as many FLOPs as the product itself.
"""

import dataclasses
import math

from larp_jax.config import (
    FlowConfig,
    GeneratorConfig,
    RouterConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
)
from larp_jax.config.teachers import TeacherConfig
from larp_jax.models.chunks import TOKENS_PER_CHUNK
from larp_jax.models.discriminator import KERNEL
from larp_jax.models.flow import TIME_WIDTH
from larp_jax.models.lpips import STAGES
from larp_jax.weights.networks import teacher_config


def train_step(recipe: TokenizerRecipe) -> dict[str, float]:
    """FLOPs per clip of each part of a stage-1 step (LARP, arXiv 2410.21264, sections 3.2 and 3.3).

    Returns:
      `tokenizer`, `prior`, `perceptual`, `alignment` and `adversarial` (the tokenizer's part), which are in every step,
      and `discriminator`, the discriminator update. Parts that the recipe does not use are 0.

    Raises:
      InputError: a teacher is unknown.
    """
    return _train_step(recipe, compiled=False)


def _train_step(recipe: TokenizerRecipe, *, compiled: bool) -> dict[str, float]:
    """`train_step`; if compiled, loops over the blocks of teachers count once."""
    c, q, n = recipe.model, recipe.model.quantizer, recipe.model.num_tokens
    pixels, own = math.prod(c.clip_shape), c.tokens_beside_patches
    in_patches, out_patches = math.prod(c.encoder_grid), math.prod(c.decoder_grid)
    counts = dict.fromkeys(("tokenizer", "prior", "perceptual", "alignment", "adversarial", "discriminator"), 0.0)

    passes = 1 if recipe.trained == "decoder" else 3  # through what codes depend on
    tokenizer = min(passes, 2) * _linear(pixels, c.encoder.width)  # no gradient with respect to pixels
    encoded = _stack(c.encoder, in_patches + own) + _linear(n * c.encoder.width, q.code_dim * (2 - q.has_codes))
    tokenizer += passes * encoded
    tokenizer += q.has_codes * (1 + passes * bool(q.entropy_weight)) * _linear(n * q.code_dim, q.codebook_size)
    tokenizer += 3 * (_linear(n * q.code_dim, c.decoder.width) + _stack(c.decoder, out_patches + own))
    counts["tokenizer"] = tokenizer + 3 * _linear(pixels, c.decoder.width)

    if recipe.loss.prior_weight:
        p = TransformerConfig(width=recipe.prior.width, depth=recipe.prior.depth, heads=recipe.prior.heads)
        network = _stack(p, n - 1) + 2 * _linear((n - 1) * q.code_dim, p.width)
        logits = _linear((n - 1) * q.code_dim, q.codebook_size)  # no gradient with respect to the codebook
        counts["prior"] = recipe.prior.rounds * (3 * network + 2 * logits)

    if recipe.loss.perceptual != "none":
        frames = recipe.loss.perceptual_frames or c.frames
        counts["perceptual"] = frames * _vgg(c.clip_shape[1:3])

    if recipe.loss.alignment_weight:
        teacher = teacher_config(recipe.loss.alignment)
        hidden = 4 * c.decoder.width
        projector = _linear(out_patches * c.decoder.width, hidden) + _linear(out_patches * hidden, teacher.width)
        counts["alignment"] = 3 * projector
        if not recipe.data.has_features:
            counts["alignment"] += sum(_features(teacher, c.clip_shape, (teacher.depth,), compiled))

    if recipe.loss.adversarial_weight:
        parts = _frozen_discriminator if recipe.discriminator.kind == "frozen" else _discriminator
        counts["adversarial"], counts["discriminator"] = parts(recipe, compiled)
        if recipe.loss.r1_weight:  # the gradient with respect to the clip, and its backward pass
            counts["discriminator"] += 3 * counts["adversarial"]
    return counts


def _discriminator(recipe: TokenizerRecipe, _: bool) -> tuple[float, float]:
    """A discriminator of pixels: FLOPs of the tokenizer's loss, and of its own update."""
    d, pixels = recipe.discriminator, math.prod(recipe.model.clip_shape)
    tokens = 1 + pixels // (math.prod(d.patch) * recipe.model.channels)
    embed, stack, products = _linear(pixels, d.width), _stack(d, tokens), _stack(d, tokens, attention=False)
    # no gradient with respect to the weights
    loss = 2 * (embed + _linear(d.width, 1) + products) + 3 * (stack - products)
    return loss, 2 * (2 * embed + 3 * (stack + _linear(d.width, 1)))


def _frozen_discriminator(recipe: TokenizerRecipe, compiled: bool) -> tuple[float, float]:
    """A discriminator of the features of a frozen network: as `_discriminator`."""
    d, trunk, clip = recipe.discriminator, teacher_config(recipe.discriminator.trunk), recipe.model.clip_shape
    heads = 0.0
    for layer in d.layers:
        tokens, channels = places(trunk, clip, layer)
        heads += _linear(tokens * channels, d.width) + _linear(tokens * d.width, KERNEL * d.width + 1)
    products, scores = _features(trunk, clip, d.layers, compiled)
    return 2 * (products + heads) + 3 * scores, 2 * (products + scores + 3 * heads)


def places(teacher: TeacherConfig, clip_shape: tuple[int, ...], layer: int) -> tuple[int, int]:
    """Number of places and channels of the features of a teacher after a block; of VGG16, after a stage."""
    frames, (height, width) = clip_shape[0], seen_size(teacher, clip_shape)
    if teacher.family == "vgg16":
        return frames * (height >> (layer - 1)) * (width >> (layer - 1)), STAGES[layer - 1][-1]
    patches = (height // teacher.patch) * (width // teacher.patch)
    return max(1, frames // teacher.traits.tubelet) * patches, teacher.width


def seen_size(teacher: TeacherConfig, clip_shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the frames that a teacher sees of clips [T, H, W, C]."""
    side = teacher.resolution
    return (side, side) if side else (clip_shape[1], clip_shape[2])


def _features(
    teacher: TeacherConfig, clip_shape: tuple[int, ...], layers: tuple[int, ...], compiled: bool
) -> tuple[float, float]:
    """Forward pass of a teacher up to the last of these blocks: FLOPs of products with weights, and of attention.

    Compiled, there is a loop up to each of the blocks.
    """
    frames = clip_shape[0]
    if teacher.family == "vgg16":
        return frames * _vgg_forward(seen_size(teacher, clip_shape), layers[-1]), 0.0
    blocks = len(layers) if compiled else layers[-1]
    patches, width = places(teacher, clip_shape, blocks)
    pixels = patches * teacher.traits.tubelet * teacher.patch**2 * 3
    sequences = frames if teacher.traits.dino else 1
    tokens = patches // sequences + (1 + teacher.registers if teacher.traits.dino else 0)
    products = _linear(tokens * width, 4 * width + 2 * teacher.hidden)
    scores = 2 * _linear(tokens * width, tokens)
    return _linear(pixels, width) + blocks * sequences * products, blocks * sequences * scores


def codec(config: TokenizerConfig) -> dict[str, float]:
    """FLOPs per clip of `encode`, video to codes or latents, and of `decode`, these to video."""
    c, q, n = config, config.quantizer, config.num_tokens
    pixels, own = math.prod(c.clip_shape), c.tokens_beside_patches
    encode = _linear(pixels, c.encoder.width) + _stack(c.encoder, math.prod(c.encoder_grid) + own)
    encode += _linear(n * c.encoder.width, q.code_dim * (2 - q.has_codes))
    encode += q.has_codes * _linear(n * q.code_dim, q.codebook_size)
    decode = _linear(n * q.code_dim, c.decoder.width) + _stack(c.decoder, math.prod(c.decoder_grid) + own)
    return {"encode": encode, "decode": decode + _linear(pixels, c.decoder.width)}


def codec_as_compiled(config: TokenizerConfig) -> dict[str, float]:
    """`codec` as counted by XLA's cost analysis; see `as_compiled`."""
    one = lambda part: dataclasses.replace(part, depth=1)  # noqa: E731
    counts = codec(dataclasses.replace(config, encoder=one(config.encoder), decoder=one(config.decoder)))
    q = config.quantizer
    skipped = _linear(max(0, config.num_tokens - TOKENS_PER_CHUNK) * q.code_dim, q.codebook_size)
    counts["encode"] -= q.has_codes * skipped
    return counts


def as_compiled(recipe: TokenizerRecipe) -> dict[str, float]:
    """`train_step` as counted by XLA's cost analysis, which counts loop bodies once: one layer, chunk or frame."""
    one = lambda part: dataclasses.replace(part, depth=1)  # noqa: E731
    # the aligned features are read between two loops
    loops = 1 + bool(recipe.loss.alignment_weight and recipe.loss.alignment_layer < recipe.model.decoder.depth)
    decoder = dataclasses.replace(recipe.model.decoder, depth=loops)
    single = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, encoder=one(recipe.model.encoder), decoder=decoder),
        prior=one(recipe.prior),
        discriminator=one(recipe.discriminator),
        loss=dataclasses.replace(recipe.loss, perceptual_frames=1, alignment_layer=1),
    )
    counts = _train_step(single, compiled=True)
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


def flow(config: FlowConfig) -> float:
    """FLOPs per clip of a pass through a flow generator."""
    c, size = config, TransformerConfig(width=config.width, depth=config.depth, heads=config.heads)
    embed = (1 + c.has_frames) * _linear(c.num_tokens * c.code_dim, c.width)
    modulation = _linear(c.width, (6 * c.depth + 2) * c.width)
    time = _linear(TIME_WIDTH + c.width, c.width)
    return embed + time + modulation + _stack(size, c.num_tokens) + _linear(c.num_tokens * c.width, c.code_dim)


def flow_train_step(config: FlowConfig) -> dict[str, float]:
    """FLOPs per clip of a step that trains a flow generator on latents: `generator`."""
    # no gradient with respect to latents and times
    inputs = (1 + config.has_frames) * config.num_tokens * config.code_dim + TIME_WIDTH
    return {"generator": 3 * flow(config) - _linear(inputs, config.width)}


def router(config: RouterConfig) -> float:
    """FLOPs per clip of a router's choice."""
    c = config
    size = TransformerConfig(width=c.width, depth=c.depth, heads=c.heads)
    patches = math.prod(c.grid)
    return _linear(patches * c.patch_inputs, c.width) + _stack(size, 1 + patches) + _linear(c.width, c.adaptive.count)


def router_train_step(config: RouterConfig) -> dict[str, float]:
    """FLOPs per clip of a step that trains a router: `router`."""
    inputs = _linear(math.prod(config.grid) * config.patch_inputs, config.width)
    return {"router": 3 * router(config) - inputs}  # no gradient with respect to what it reads


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
    return 3 * _vgg_forward(size, len(STAGES))


def _vgg_forward(size: tuple[int, int], stages: int) -> float:
    """Features of one frame up to a stage."""
    total, inputs = 0.0, 3
    for i, widths in enumerate(STAGES[:stages]):
        pixels = (size[0] >> i) * (size[1] >> i)
        for width in widths:
            total += _linear(pixels * 9 * inputs, width)
            inputs = width
    return total
