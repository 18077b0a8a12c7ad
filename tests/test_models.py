"""Shapes of every shipped size, the parts of the tokenizer, and where gradients flow."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.config import (
    PRIOR_SIZES,
    TOKENIZER_SIZES,
    DiscriminatorConfig,
    GeneratorConfig,
    PriorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TransformerConfig,
    parse_recipe,
)
from larp_jax.errors import InputError
from larp_jax.models import attention, categorical, chunks, embeddings, layers, quantizer
from larp_jax.models.anchored_init import anchored_init
from larp_jax.models.condition import Condition
from larp_jax.models.discriminator import Discriminator
from larp_jax.models.dropout import dropout
from larp_jax.models.generator import Generator
from larp_jax.models.prior import Prior
from larp_jax.models.sampling import cast_params
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.training import losses

SMALL = TokenizerConfig(
    size="larp_s",
    frames=8,
    resolution=16,
    patch_frames=4,
    patch_size=8,
    num_tokens=6,
    encoder=TransformerConfig(width=32, depth=2, heads=2),
    decoder=TransformerConfig(width=48, depth=1, heads=4),
    quantizer=QuantizerConfig(codebook_size=32, code_dim=4),
)


def count(module) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def clip(config, batch=2, seed=0):
    return jax.random.uniform(jax.random.key(seed), (batch, *config.clip_shape))


@pytest.mark.parametrize("size", TOKENIZER_SIZES)
def test_shapes_of_every_tokenizer_size(size):
    config = TokenizerConfig(size=size)

    def run(video):
        tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
        reconstruction, quantized = tokenizer(video, key=jax.random.key(0))
        return reconstruction, quantized.indices, tokenizer.decode(quantized.indices)

    video = jax.ShapeDtypeStruct((2, *config.clip_shape), jnp.float32)
    reconstruction, indices, decoded = jax.eval_shape(run, video)
    assert reconstruction.shape == decoded.shape == video.shape
    assert indices.shape == (2, 1024) and indices.dtype == jnp.int32


@pytest.mark.parametrize("size", PRIOR_SIZES)
def test_shapes_of_every_prior_size(size):
    def run(latents):
        return Prior(PriorConfig(size=size), 1024, 16, rngs=nnx.Rngs(0))(latents)

    latents = jax.ShapeDtypeStruct((2, 1023, 16), jnp.float32)
    assert jax.eval_shape(run, latents).shape == latents.shape


def test_published_parameter_counts():
    assert count(nnx.eval_shape(lambda: Tokenizer(TokenizerConfig(), rngs=nnx.Rngs(0)))) == 172_179_984
    assert count(nnx.eval_shape(lambda: Prior(PriorConfig(), 1024, 16, rngs=nnx.Rngs(0)))) == 21_700_240


@pytest.mark.parametrize("change", [
    {"frames": 4, "patch_frames": 1},
    {"resolution": 24},
    {"patch_size": 4, "decoder_patch_size": 8, "decoder_patch_frames": 2},
    {"num_tokens": 17},
    {"learned_encoder_patch_pe": True, "learned_decoder_patch_query_embed": True, "learned_decoder_latent_pe": True},
    {"learned_encoder_latent_query_embed": False, "use_encoder_patch_token_type_embed": True},
    {"use_encoder_latent_query_token_type_embed": True, "use_decoder_latent_token_type_embed": True},
])  # fmt: skip
def test_shapes_of_any_size(change):
    config = dataclasses.replace(SMALL, **change)
    video = jax.ShapeDtypeStruct((2, *config.clip_shape), jnp.float32)
    reconstruction, quantized = jax.eval_shape(lambda x: Tokenizer(config, rngs=nnx.Rngs(0))(x), video)
    assert reconstruction.shape == video.shape
    assert quantized.indices.shape == (2, config.num_tokens)


def test_bfloat16_keeps_the_bottleneck_and_the_output_in_float32():
    run = jax.jit(lambda video: Tokenizer(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(video))
    reconstruction, quantized = run(clip(SMALL))
    assert np.all(reconstruction == 0.0)  # the head starts at zero
    assert reconstruction.dtype == quantized.z.dtype == quantized.z_q.dtype == jnp.float32


def half_precision_modules():
    """How each network that computes in bfloat16 is made, and its arguments."""
    dtype, prior = jnp.bfloat16, PriorConfig(width=16, depth=1, heads=2)
    generator = GeneratorConfig(width=16, depth=1, heads=2, codebook_size=8, num_tokens=5, num_classes=2)
    judge = DiscriminatorConfig(width=16, depth=1, heads=2)
    return {
        "tokenizer": (lambda: Tokenizer(SMALL, rngs=nnx.Rngs(0), dtype=dtype), (clip(SMALL),)),
        "prior": (lambda: Prior(prior, 6, 4, rngs=nnx.Rngs(0), dtype=dtype), (jnp.ones((2, 5, 4)),)),
        "discriminator": (
            lambda: Discriminator(judge, SMALL.clip_shape, rngs=nnx.Rngs(0), dtype=dtype),
            (clip(SMALL),),
        ),
        "generator": (
            lambda: Generator(generator, rngs=nnx.Rngs(0), dtype=dtype),
            (Condition(jnp.zeros(2, jnp.int32)), jnp.ones((2, 4), jnp.int32)),
        ),
    }


@pytest.mark.parametrize("name", ["tokenizer", "prior", "discriminator", "generator"])
def test_the_residual_stream_is_always_float32(name, monkeypatch):
    make, arguments = half_precision_modules()[name]
    scan, streams = jax.lax.scan, []

    def spy(f, init, *rest, **options):
        streams.extend(x.dtype for x in jax.tree.leaves(init) if x.ndim == 3)
        return scan(f, init, *rest, **options)

    monkeypatch.setattr(jax.lax, "scan", spy)
    jax.eval_shape(lambda *arguments: make()(*arguments), *arguments)
    assert len(streams) == (2 if name == "tokenizer" else 1)
    assert set(streams) == {jnp.dtype(jnp.float32)}


def test_the_residual_stream_of_sampling_is_float32_with_a_bfloat16_cache():
    make, arguments = half_precision_modules()["generator"]

    def run(condition, tokens):
        graphdef, params = nnx.split(make(), nnx.Param)
        generator = nnx.merge(graphdef, cast_params(nnx.to_pure_dict(params), jnp.bfloat16))
        (block,) = generator.unstacked()
        _, (cache,) = generator.prefill([block], condition)
        x = generator.embed_condition(condition)[:, :1]
        return cache, (x, generator.embed_tokens(tokens), block.decode_step(x, cache, 0)[0])

    cache, streams = jax.eval_shape(run, *arguments)
    assert [x.dtype for x in cache] == [jnp.bfloat16] * 2
    assert [x.dtype for x in streams] == [jnp.float32] * 3


def test_the_base_applies_only_to_fixed_tables():
    def tables(learned):
        config = dataclasses.replace(
            SMALL,
            encoder_query_gaussian_init=False,
            learned_encoder_latent_query_embed=learned,
            learned_decoder_latent_pe=learned,
            latent_position_base=100.0,
        )
        tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
        return tokenizer.encoder.queries(), tokenizer.decoder.latent_positions()

    places = np.arange(SMALL.num_tokens)
    fixed, start = tables(learned=False), tables(learned=True)
    np.testing.assert_allclose(fixed[0], embeddings.sincos_1d(places, 32, 100.0), atol=1e-6)
    np.testing.assert_allclose(fixed[1], embeddings.sincos_1d(places, 48, 100.0), atol=1e-6)
    np.testing.assert_allclose(start[0], embeddings.sincos_1d(places, 32), atol=1e-6)
    assert 0.015 < start[1].std() < 0.025


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    video = clip(SMALL)

    def gradients(remat):
        graphdef, params = nnx.split(Tokenizer(SMALL, rngs=nnx.Rngs(0), remat=remat))
        params["decoder"]["head"]["kernel"][...] = jnp.ones_like(params["decoder"]["head"]["kernel"][...])
        return jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(video)[0]).mean()))(params)

    plain = gradients("none")
    for remat in layers.REMAT[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradients(remat), plain)


def test_order_of_patches_and_pixels():
    video = jnp.arange(4 * 4 * 6 * 3).reshape(1, 4, 4, 6, 3)
    patches = embeddings.patchify(video, (2, 2, 3))
    np.testing.assert_array_equal(patches[0, 1], video[0, :2, :2, 3:].reshape(-1))  # width moves fastest
    np.testing.assert_array_equal(patches[0, 2], video[0, :2, 2:, :3].reshape(-1))
    np.testing.assert_array_equal(patches[0, 4], video[0, 2:, :2, :3].reshape(-1))
    np.testing.assert_array_equal(embeddings.unpatchify(patches, (2, 2, 2), (2, 2, 3)), video)


def test_position_table_fills_width_first():
    table = embeddings.sincos_3d((2, 3, 4), 16).reshape(2, 3, 4, 16)
    for t, h, w in itertools.product(range(2), range(3), range(4)):
        spatial = np.concatenate([embeddings.sincos_1d([w], 8)[0], embeddings.sincos_1d([h], 8)[0]])
        np.testing.assert_allclose(table[t, h, w], spatial + embeddings.sincos_1d([t], 16)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_plain_form_with_its_gradients(causal):
    q, k, v, weights = jax.random.normal(jax.random.key(0), (4, 2, 20, 3, 8))

    def ours(q, k, v):
        return jnp.sum(attention.attention(q, k, v, causal=causal) * weights)

    def plain(q, k, v):
        return jnp.sum(jax.nn.dot_product_attention(q, k, v, is_causal=causal) * weights)

    for a, b in zip(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cpu_drops_what_the_plain_form_drops(causal):
    q, k, v, weights = jax.random.normal(jax.random.key(0), (4, 2, 20, 3, 8))
    key = jax.random.key(1)

    def ours(q, k, v):
        return jnp.sum(attention.attention(q, k, v, causal=causal, dropout_rate=0.3, key=key) * weights)

    def plain(q, k, v):
        return jnp.sum(attention._with_dropout(q, k, v, causal, None, 0.3, key) * weights)

    for a, b in zip(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_dropout_is_independent_between_elements_and_calls():
    x = jnp.ones((4, 500, 256))
    one, other = (np.asarray(dropout(x, 0.1, jax.random.key(i))) > 0 for i in (1, 2))
    pairs = {
        "columns": (one[..., :-1], one[..., 1:]),
        "rows": (one[:, :-1], one[:, 1:]),
        "clips": (one[:-1], one[1:]),
        "calls": (one, other),
    }
    np.testing.assert_allclose(one.mean(), 0.9, atol=5 * 0.3 / one.size**0.5)
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose((a & b).mean(), 0.81, atol=5 * 0.4 / a.size**0.5, err_msg=name)
    # also for entire rows and columns
    np.testing.assert_allclose(one.mean(-1).std(), 0.3 / 256**0.5, rtol=0.1)
    np.testing.assert_allclose(one.mean((0, 1)).std(), 0.3 / 2000**0.5, rtol=0.25)
    np.testing.assert_allclose(dropout(x, 0.1, jax.random.key(1)).max(), 1 / 0.9, rtol=1e-6)
    assert dropout(x, 0.1, None) is x


@pytest.mark.parametrize("length", [3, 10, 20, 21])
def test_chunked_map_equals_the_whole(length):
    x = jax.random.normal(jax.random.key(0), (2, length, 5))

    def f(_, x):
        return jnp.sin(x).sum(-1), x.mean(0, keepdims=True)

    def total(x, chunk):
        a, b = chunks.map_token_chunks(f, x, chunk=chunk)
        assert a.shape == (2, length) and b.shape == (1, length, 5)
        return jnp.sum(jnp.square(a)) + jnp.sum(jnp.square(b))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    for chunk in (4, 10):
        np.testing.assert_allclose(gradient(x, chunk), gradient(x, 1000), atol=1e-5)


def test_sampling_follows_the_softmax_over_several_blocks():
    logits = jax.random.normal(jax.random.key(0), (200,)).at[jnp.array([0, 64, 65, 199])].set(-jnp.inf)
    count = 200_000
    drawn = categorical.sample(jax.random.key(1), jnp.broadcast_to(logits, (count, 200)))
    found = np.bincount(drawn, minlength=200)
    expected = count * np.asarray(jax.nn.softmax(logits), np.float64)
    assert len(found) == 200 and not found[expected == 0].any()
    chi_square = np.sum(np.square(found - expected)[expected > 0] / expected[expected > 0])
    assert abs(chi_square - 195) < 5 * np.sqrt(2 * 195)


def test_argmax_is_the_lowest_index_on_ties():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-jnp.inf, -1.0, -2.0, -1.0]])
    np.testing.assert_array_equal(categorical.argmax(logits), [1, 0, 1])


def test_stochastic_codes_follow_the_softmax():
    config = QuantizerConfig(codebook_size=4, code_dim=2, temperature=0.5)
    module = quantizer.Quantizer(config, 8, 8, rngs=nnx.Rngs(0))
    z = quantizer.normalize(jnp.array([[[0.3, 1.0]]]))
    expected = jax.nn.softmax(module.codebook @ z[0, 0] / 0.5)
    many = jnp.broadcast_to(z, (1, 100_000, 2))
    drawn = quantizer.nearest_codes(many, module.codebook, key=jax.random.key(1), temperature=0.5)
    np.testing.assert_allclose(np.bincount(drawn[0], minlength=4) / 100_000, expected, atol=6e-3)
    assert np.all(quantizer.nearest_codes(many, module.codebook) == jnp.argmax(expected))


def test_entropy_loss_is_low_for_certain_and_varied_codes():
    codebook = jnp.eye(8)
    varied, same = codebook[None], jnp.tile(codebook[:1], (8, 1))[None]
    np.testing.assert_allclose(quantizer.entropy_loss(varied, codebook, 0.01), -np.log(8), atol=1e-4)
    np.testing.assert_allclose(quantizer.entropy_loss(same, codebook, 0.01), 0.0, atol=1e-4)


def test_kl_bottleneck_is_continuous():
    config = dataclasses.replace(SMALL, quantizer=QuantizerConfig(kind="kl", code_dim=4))
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    _, first = tokenizer(clip(config), key=jax.random.key(0))
    _, mean = tokenizer(clip(config))
    assert first.indices is None and float(first.terms["kl"]) > 0
    assert not np.allclose(first.z_q, mean.z_q)
    np.testing.assert_array_equal(mean.z, mean.z_q)


def test_an_earlier_kl_bottleneck_is_refused():
    """Its weights have means and log-variances in other columns."""
    earlier = {"kind": "kl", "code_dim": 4}
    values = {"model": {"quantizer": earlier}, "loss": {"prior_weight": 0.0}}
    with pytest.raises(InputError, match="earlier version"):
        parse_recipe(values)
    earlier["norm"] = "none"
    assert parse_recipe(values).model.quantizer.kind == "kl"


def test_plain_codes_are_the_nearest_for_any_norm():
    config = QuantizerConfig(kind="vq", codebook_size=16, code_dim=3, l2_normalized=False)
    module = quantizer.Quantizer(config, 3, 3, rngs=nnx.Rngs(0))
    z = 2.0 * jax.random.normal(jax.random.key(1), (2, 70, 3))
    found = module(z, key=jax.random.key(2))
    distances = jnp.sum(jnp.square(z[:, :, None] - module.embedding[...]), axis=-1)
    np.testing.assert_array_equal(found.indices, distances.argmin(-1))
    np.testing.assert_array_equal(found.z, z)
    np.testing.assert_allclose(found.z_q, module.embedding[...][found.indices], atol=1e-6)
    np.testing.assert_array_equal(module.lookup(found.indices), module.embedding[...][found.indices])


def test_later_rounds_mix_the_same_positions(monkeypatch):
    keys = []

    def note(latents, sampled, codebook, *, key, ratio):
        keys.append(jax.random.key_data(key))
        return latents

    monkeypatch.setattr(losses, "mix_sampled", note)
    z_q, codebook = jax.random.normal(jax.random.key(0), (2, 8, 4))
    config = PriorConfig(size="XXS", width=16, depth=1, heads=2, rounds=3)
    predict = lambda latents, key: latents  # noqa: E731
    indices = jnp.arange(8)[None]

    @jax.jit  # op by op it would take a compilation for each
    def keys_of_rounds():
        losses.prior_loss(predict, config, z_q[None], indices, codebook, key=jax.random.key(3), mix_ratio=0.5)
        return keys

    np.testing.assert_array_equal(*keys_of_rounds())


def prior_gradients():
    """Gradients of the prior loss alone, with respect to tokenizer and prior."""
    tokenizer = Tokenizer(SMALL, rngs=nnx.Rngs(0))
    config = PriorConfig(size="XXS", width=16, depth=1, heads=2, rounds=2)
    prior = Prior(config, SMALL.num_tokens, 4, rngs=nnx.Rngs(1))
    graphdef, params = nnx.split((tokenizer, prior))
    video = clip(SMALL)

    def loss(params):
        tokenizer, prior = nnx.merge(graphdef, params)
        quantized = tokenizer.quantize(video, key=jax.random.key(2))
        return losses.prior_loss(
            prior,
            config,
            quantized.z_q,
            quantized.indices,
            tokenizer.quantizer.codebook,
            key=jax.random.key(3),
            mix_ratio=0.5,
        )[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return value, grads[0], grads[1]


def norm(tree) -> float:
    return float(sum(np.sum(np.square(x)) for x in jax.tree.leaves(jax.device_get(tree))) ** 0.5)


def test_prior_loss_reaches_the_encoder_but_never_the_codebook():
    value, tokenizer, prior = prior_gradients()
    assert np.isfinite(value)
    assert norm(tokenizer["encoder"]["queries"]) > 0
    assert norm(tokenizer["encoder"]["patch_embed"]) > 0
    assert norm(tokenizer["quantizer"]["in_linear"]) > 0
    assert norm(prior) > 0
    assert norm(tokenizer["quantizer"]["embedding"]) == 0
    assert norm(tokenizer["decoder"]) == 0


def test_reconstruction_loss_reaches_queries_and_encoder_through_the_codes():
    graphdef, params = nnx.split(Tokenizer(SMALL, rngs=nnx.Rngs(0)))
    params["decoder"]["head"]["kernel"][...] = jnp.ones_like(params["decoder"]["head"]["kernel"][...])
    video = clip(SMALL)
    loss = lambda p: losses.reconstruction_loss(video, nnx.merge(graphdef, p)(video)[0], "l1")  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert norm(grads["encoder"]["queries"]) > 0 and norm(grads["encoder"]["transformer"]) > 0
    assert norm(grads["quantizer"]["embedding"]) == 0  # straight-through: the code vectors learn from loss_q alone


def test_a_patchwise_code_reads_and_writes_by_attention_alone():
    """Without attention, each code is a function of its own patch, and changes its own patch."""
    config = dataclasses.replace(SMALL, layout="patchwise", num_tokens=math.prod(SMALL.encoder_grid))
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    assert tokenizer.encoder.queries is None and tokenizer.decoder.latent_positions is None
    kernel = tokenizer.decoder.head.kernel
    kernel[...] = jax.random.normal(jax.random.key(0), kernel.shape)
    for part in (tokenizer.encoder, tokenizer.decoder):
        out = part.transformer.blocks.attention.out.kernel
        out[...] = jnp.zeros_like(out[...])
    encode, decode = jax.jit(lambda video: tokenizer.quantize(video).z), jax.jit(tokenizer.decode_latents)
    video = clip(config)
    codes = encode(video)
    assert codes.shape[1] == config.num_tokens
    pt, ph, pw = config.encoder_patch
    changed = encode(video.at[:, :pt, :ph, :pw].set(0.5))
    assert not np.allclose(codes[:, 0], changed[:, 0], atol=1e-3)
    np.testing.assert_allclose(codes[:, 1:], changed[:, 1:], atol=1e-5)
    difference = jnp.abs(decode(changed) - decode(codes))
    assert difference[:, :pt, :ph, :pw].max() > 1e-3
    assert difference.at[:, :pt, :ph, :pw].set(0.0).max() < 1e-5


def test_patchwise_needs_one_code_per_patch():
    with pytest.raises(InputError, match=f"set model.num_tokens={math.prod(SMALL.encoder_grid)}"):
        dataclasses.replace(SMALL, layout="patchwise", num_tokens=5)
    config = dataclasses.replace(SMALL, layout="patchwise", num_tokens=math.prod(SMALL.encoder_grid))
    with pytest.raises(InputError, match="start.anchored places queries"):
        anchored_init(Tokenizer(config, rngs=nnx.Rngs(0)))


def test_next_latent_loss_is_the_squared_error_of_the_next_position():
    z = jax.random.normal(jax.random.key(0), (2, 4, 3))
    shifted = losses.next_latent_loss(lambda x, key: x + 2.0, z, key=None)
    np.testing.assert_allclose(shifted, np.mean((np.asarray(z)[:, :-1] + 2.0 - np.asarray(z)[:, 1:]) ** 2), rtol=1e-6)
    assert losses.next_latent_loss(lambda x, key: z[:, 1:], z, key=None) == 0.0


def test_prior_is_causal():
    config = PriorConfig(size="XXS", width=16, depth=2, heads=2)
    prior = Prior(config, 6, 4, rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(0), (1, 5, 4))
    changed = latents.at[:, 3].add(1.0)
    before, after = map(jax.jit(prior), (latents, changed))
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert not np.allclose(before[:, 3:], after[:, 3:], atol=1e-4)


def test_scheduled_sampling_never_replaces_the_first_latent():
    latents = jnp.zeros((2, 5, 3))
    sampled = jnp.ones((2, 5), jnp.int32)
    mixed = losses.mix_sampled(latents, sampled, jnp.eye(3), key=jax.random.key(0), ratio=1.0)
    assert np.all(mixed[:, 0] == 0)
    np.testing.assert_array_equal(mixed[:, 1:], jnp.broadcast_to(jnp.eye(3)[1], (2, 4, 3)))


PLACES = TransformerConfig(width=64, depth=2, heads=2)
LEARNED = dataclasses.replace(
    SMALL, resolution=32, num_tokens=32, encoder=PLACES, decoder=PLACES, learned_encoder_patch_pe=True,
    learned_decoder_latent_pe=True, learned_decoder_patch_query_embed=True,
)  # fmt: skip


@pytest.mark.parametrize("change", [{}, {"num_tokens": 16}, {"num_tokens": 8}, {"patch_frames": 8}, {"heads": 4}])
def test_anchored_queries_read_the_patches_around_them(change):
    """One bright patch moves the encoder outputs of nearby anchors more than those of distant ones."""
    heads = change.pop("heads", 2)
    size = dataclasses.replace(PLACES, heads=heads)
    config = dataclasses.replace(LEARNED, encoder=size, decoder=size, **change)
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    anchored_init(tokenizer)
    t, h, w = config.encoder_grid
    encode, gray = jax.jit(tokenizer.encoder), np.full((1, *config.clip_shape), 0.5, np.float32)
    pt, ph, pw = config.encoder_patch
    moved = []
    for corner in ((0, 0), (h - 1, w - 1)):
        top, left = corner[0] * ph, corner[1] * pw
        bright = gray.copy()
        bright[:, :pt, top : top + ph, left : left + pw] = 1.0
        moved.append(np.abs(np.asarray(encode(bright)) - encode(gray)).mean(axis=(0, 2)))
    assert moved[0].argmax() != moved[1].argmax()
    for change in moved:
        assert change.max() > 2 * change.mean()


def test_anchored_init_gives_one_seed_one_start_and_centers_gray():
    def start(seed):
        tokenizer = Tokenizer(LEARNED, rngs=nnx.Rngs(jax.random.key(seed)))
        anchored_init(tokenizer)
        return nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param))

    one, compiled = start(0), jax.jit(start)(0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, compiled)
    embed, other = (params["encoder"]["patch_embed"]["proj"] for params in (one, start(1)))
    assert not np.array_equal(embed["kernel"], other["kernel"])
    np.testing.assert_allclose(0.5 * embed["kernel"].sum(0) + embed["bias"], 0.0, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"learned_decoder_latent_pe": False}, "needs learned position tables; set model.learned_decoder_latent_pe to"),
    ({"encoder": TransformerConfig(width=8, depth=1, heads=8)}, "heads of width at least 2, got 8 and 1"),
])  # fmt: skip
def test_anchored_init_says_what_it_needs(change, message):
    tokenizer = Tokenizer(dataclasses.replace(LEARNED, **change), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=message):
        anchored_init(tokenizer)


@pytest.mark.parametrize("l2_normalized", [True, False])
def test_kmeans_codes_are_near_the_latents(l2_normalized):
    config = QuantizerConfig(kind="vq", codebook_size=16, code_dim=3, l2_normalized=l2_normalized)
    centers = 2.0 * jax.random.normal(jax.random.key(0), (16, 3))
    latents = centers[jax.random.randint(jax.random.key(1), (8, 50), 0, 16)]
    latents = quantizer.code_vectors(config, latents + 0.05 * jax.random.normal(jax.random.key(2), latents.shape))
    codebook = jax.jit(functools.partial(quantizer.kmeans_codebook, config))(latents, jax.random.key(3))
    assert codebook.shape == (16, 3)
    if l2_normalized:
        np.testing.assert_allclose(jnp.linalg.norm(codebook, axis=-1), 1.0, rtol=1e-5)
    nearest = codebook[quantizer.nearest_codes(latents, codebook, l2_normalized=l2_normalized)]
    error = jnp.square(latents - nearest).sum(-1).mean()
    assert error < 0.2 * latents.var(axis=(0, 1)).sum()
    few = quantizer.kmeans_codebook(config, latents[:1, :4], jax.random.key(3))  # fewer latents than codes
    assert jnp.isfinite(few).all() and len(np.unique(few, axis=0)) >= 4


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_codes_replace_latents_by_their_share(share):
    tokenizer = Tokenizer(SMALL, rngs=nnx.Rngs(0))
    projected = jax.random.normal(jax.random.key(0), (2, SMALL.num_tokens, SMALL.quantizer.code_dim))

    def z_q(projected):
        return tokenizer.quantizer(projected, share=share).z_q

    quantized = tokenizer.quantizer(projected, share=share)
    codes = tokenizer.quantizer.lookup(quantized.indices)
    np.testing.assert_allclose(quantized.z_q, (1 - share) * quantized.z + share * codes, atol=1e-6)
    gradient = jax.grad(lambda x: z_q(x)[0, 0, 0])(projected)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: quantizer.normalize(x)[0, 0, 0])(projected), atol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"resolution": 20}, "not divisible"),
    ({"frames": 10}, "not divisible"),
    ({"size": "larp_x", "encoder": TransformerConfig()}, "choose one of"),
    ({"num_tokens": 0}, "positive"),
    ({"encoder": TransformerConfig(width=30, depth=1, heads=4)}, "divisible by model.encoder.heads=4"),
])  # fmt: skip
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **change)
