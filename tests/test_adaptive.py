"""Tokenizers with a ladder: blocks of frames with different numbers of codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.config import PriorConfig, QuantizerConfig, TokenizerConfig, TransformerConfig
from larp_jax.models import attention, packing
from larp_jax.models.anchored_init import anchored_init
from larp_jax.models.attention import Blocks
from larp_jax.models.prior import Prior
from larp_jax.models.quantizer import kmeans_codebook
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.training import losses

CONFIG = TokenizerConfig(
    frames=8,
    resolution=16,
    patch_frames=2,
    decoder_patch_frames=4,
    num_tokens=12,
    blocks=2,
    ladder=(2, 4, 8),
    encoder=TransformerConfig(width=32, depth=2, heads=2),
    decoder=TransformerConfig(width=48, depth=2, heads=4),
    quantizer=QuantizerConfig(codebook_size=32, code_dim=4, entropy_weight=0.1, entropy_temperature=0.1),
)
PRIOR = PriorConfig(width=16, depth=2, heads=2, dropout=0.0)
LENGTHS = np.array([[4, 2], [8, 4], [2, 4], [4, 8]], np.int32)


def noisy(module, seed=2):
    """The module with noise on all its weights, because some start at zero."""
    graphdef, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(x + 0.2 * rng.standard_normal(x.shape, np.float32)) for x in jax.device_get(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def tokenizer():
    return noisy(Tokenizer(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def prior():
    return noisy(Prior(PRIOR, 8, 4, blocks=2, rngs=nnx.Rngs(1)))


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(3).random((4, *CONFIG.clip_shape), np.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_blocks_equals_the_plain_form_with_its_gradients(causal):
    q, k, v, weights = np.random.default_rng(0).standard_normal((4, 2, 12, 2, 8), np.float32)
    blocks = Blocks(packing.layout(jnp.asarray(LENGTHS[:2]), 12).block, 3)

    def ours(q, k, v):
        return jnp.sum(attention.attention(q, k, v, causal=causal, blocks=blocks) * weights)

    def plain(q, k, v):
        mask = blocks.of[:, None, :, None] >= blocks.of[:, None, None, :]
        return jnp.sum(jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal) * weights)

    def dropped(q, k, v):
        key = jax.random.key(1)
        on_cpu = attention.attention(q, k, v, causal=causal, blocks=blocks, dropout_rate=0.3, key=key)
        return jnp.abs(on_cpu - attention._with_dropout(q, k, v, causal, blocks, 0.3, key)).max()

    for a, b in zip(*(jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (ours, plain)), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)
    assert jax.jit(dropped)(q, k, v) < 1e-5


def test_earlier_blocks_do_not_see_later_frames_lengths_or_codes(tokenizer, video):
    whole, decode = jax.jit(lambda video, lengths: tokenizer(video, lengths)), jax.jit(tokenizer.decode)
    run = lambda video, lengths: jax.device_get(whole(video, lengths))  # noqa: E731
    before, quantized = run(video, LENGTHS)
    later, start = video.copy(), video.copy()
    later[:, 4:], start[:, :4] = np.random.default_rng(5).random(video[:, 4:].shape), 0.5
    other = LENGTHS.copy()
    other[:, 1] = [8, 2, 8, 4]
    for changed, lengths in ((later, LENGTHS), (video, other), (later, other)):
        after, again = run(changed, lengths)
        for row, first in enumerate(LENGTHS[:, 0]):
            assert np.array_equal(quantized.z[row, :first], again.z[row, :first])
            assert np.array_equal(quantized.indices[row, :first], again.indices[row, :first])
        assert np.array_equal(before[:, :4], after[:, :4])
        assert not np.array_equal(before[:, 4:], after[:, 4:])
    assert not np.array_equal(run(start, LENGTHS)[0][:, 4:], before[:, 4:])
    # padding is never seen, and the first blocks decode to the first frames
    filled = np.where(quantized.valid, quantized.indices, 7)
    np.testing.assert_array_equal(decode(filled, LENGTHS), decode(quantized.indices, LENGTHS))
    first = decode(quantized.indices, LENGTHS[:, :1])
    assert first.shape == (4, 4, 16, 16, 3)
    np.testing.assert_allclose(first, before[:, :4], atol=1e-5)
    assert not quantized.indices[~np.asarray(quantized.valid)].any()


def objective(params, graphdefs, video, lengths, size):
    """All losses of a batch with deterministic codes, in arrays of this size."""
    tokenizer, prior = (nnx.merge(graphdef, x) for graphdef, x in zip(graphdefs, params, strict=True))
    tokenizer.encoder.num_tokens = size
    reconstruction, quantized = tokenizer(video, lengths)
    predict = functools.partial(prior, layout=packing.layout(lengths, size)[:, :-1])
    codebook = tokenizer.quantizer.codebook
    options = {"key": None, "mix_ratio": 0.0, "valid": quantized.valid}
    predicted, scores = losses.prior_loss(predict, PRIOR, quantized.z_q, quantized.indices, codebook, **options)
    latent = losses.next_latent_loss(predict, quantized.z, key=None, valid=quantized.valid)
    commitment = quantized.terms["commitment"] + quantized.terms["codebook"]
    terms = jnp.stack([losses.reconstruction_loss(video, reconstruction, "l2"), commitment, predicted, latent])
    return terms.sum(), (terms, scores, reconstruction, quantized.indices)


@pytest.mark.slow
def test_a_packed_batch_equals_its_clips_one_by_one(tokenizer, prior, video):
    graphdefs, params = zip(*(nnx.split(module) for module in (tokenizer, prior)), strict=True)
    step = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=(1, 4))
    whole = jax.device_get(step(params, graphdefs, video, LENGTHS, 12))
    (_, (terms, scores, reconstruction, codes)), grads = whole
    alone = []
    for row, lengths in enumerate(LENGTHS):
        found = jax.device_get(step(params, graphdefs, video[row : row + 1], lengths[None], int(lengths.sum())))
        alone.append(found)
        assert np.array_equal(found[0][1][3][0], codes[row, : lengths.sum()])
        np.testing.assert_allclose(found[0][1][2][0], reconstruction[row], atol=1e-5)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *[((found[0][1][0], found[0][1][1]), found[1]) for found in alone])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), mean, ((terms, scores), grads))
    assert float(scores["prior_top5"]) > 0
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


def test_sampling_and_scheduled_sampling_leave_out_padding(tokenizer, prior, video):
    key, valid = jax.random.key(7), packing.layout(jnp.asarray(LENGTHS), 12).valid
    quantize = jax.jit(lambda video, key: tokenizer.quantize(video, LENGTHS, key=key, temperature=1.0))
    quantized = quantize(video, key)
    assert not np.array_equal(quantized.indices, quantize(video, None).indices)
    assert not quantized.indices[~np.asarray(valid)].any()
    predict = functools.partial(prior, layout=packing.layout(jnp.asarray(LENGTHS), 12)[:, :-1])

    def loss(z_q, indices):
        options = {"key": key, "mix_ratio": 0.5, "valid": valid}
        return losses.prior_loss(predict, PRIOR, z_q, indices, tokenizer.quantizer.codebook, **options)[0]

    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    found, gradient = loss_and_gradient(quantized.z_q, quantized.indices)
    noise = jnp.where(valid[..., None], quantized.z_q, 9.0), jnp.where(valid, quantized.indices, 5)
    np.testing.assert_allclose(loss_and_gradient(*noise)[0], found, rtol=1e-6)
    assert not gradient[~np.asarray(valid)].any() and np.isfinite(gradient).all()


def test_one_block_of_all_codes_is_the_tokenizer_without_a_ladder(video):
    plain = dataclasses.replace(CONFIG, blocks=1, ladder=())
    ladder = dataclasses.replace(plain, ladder=(12,))
    modules = [noisy(Tokenizer(config, rngs=nnx.Rngs(0))) for config in (plain, ladder)]
    (a, found), (b, same) = (jax.jit(lambda m, x: m(x))(module, video) for module in modules)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.array_equal(found.indices, same.indices) and found.lengths is None
    np.testing.assert_allclose(found.loss, same.loss, rtol=1e-5)
    with pytest.raises(ValueError, match="leave out lengths"):
        modules[0](video, LENGTHS)


def test_k_means_leaves_out_padding():
    quantizer = dataclasses.replace(CONFIG.quantizer, l2_normalized=False, kind="vq", codebook_size=4)
    valid = packing.layout(jnp.asarray(LENGTHS), 12).valid
    latents = jnp.where(valid[..., None], jax.random.uniform(jax.random.key(0), (4, 12, 4)), 100.0)
    codebook = kmeans_codebook(quantizer, latents, jax.random.key(1), valid)
    assert codebook.max() < 2.0
    few = jnp.zeros_like(valid).at[0, :2].set(True)  # fewer latents than codes
    assert np.isfinite(kmeans_codebook(quantizer, latents, jax.random.key(1), few)).all()


def test_anchored_places_are_spread_evenly_whatever_their_number():
    learned = dict.fromkeys(
        ("learned_encoder_patch_pe", "learned_decoder_latent_pe", "learned_decoder_patch_query_embed"), True
    )
    config = dataclasses.replace(CONFIG, resolution=64, ladder=(4, 16), num_tokens=32, **learned)
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    anchored_init(tokenizer)
    for part, tokens in ((tokenizer.encoder.patch_positions, tokenizer.encoder.queries),
                         (tokenizer.decoder.patch_queries, tokenizer.decoder.latent_positions)):  # fmt: skip
        t, h, w = part.grid
        table = np.asarray(part()).reshape(t, h * w, -1)
        for block in range(2):
            rows = tokens.table[...] + tokens.block_table[block]
            near = np.argmax(np.einsum("nd,tpd->ntp", rows, table).reshape(16, -1), axis=1)
            assert np.all(near // (h * w) // (t // 2) == block)
            for count in (4, 16):  # every quadrant has as many
                row, column = np.divmod(near[:count] % (h * w), w)
                quadrants = np.bincount(2 * (row >= h // 2) + (column >= w // 2), minlength=4)
                assert quadrants.tolist() == [count // 4] * 4
