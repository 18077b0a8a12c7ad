"""What encoder and decoder are not given in training, and the decoder that is trained alone."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax import cli, load_tokenizer
from larp_jax.config import (
    CorruptionConfig,
    DataConfig,
    LossConfig,
    PriorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
)
from larp_jax.errors import InputError
from larp_jax.inference.batches import BatchFolder
from larp_jax.models.packing import layout
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.training import corruption, losses
from larp_jax.training.tokenizer import TokenizerStage
from larp_jax.weights import checkpoint

TINY = str(pathlib.Path(__file__).parent / "configs" / "tiny.py")
SMALL = TransformerConfig(width=16, depth=1, heads=2)
PLAIN = TokenizerRecipe(
    model=TokenizerConfig(
        frames=8,
        resolution=16,
        patch_frames=2,
        num_tokens=12,
        encoder=SMALL,
        decoder=SMALL,
        quantizer=QuantizerConfig(codebook_size=32, code_dim=4),
    ),
    prior=PriorConfig(width=16, depth=1, heads=2),
    loss=LossConfig(perceptual="none", adversarial_weight=0.0, frame_difference_weight=2.0),
    corruption=CorruptionConfig(future=0.5, patches=0.5, noise=3.0),
    data=DataConfig(batch_size=4),
)
SHAPE = (4000, *PLAIN.model.clip_shape)
LADDER = dataclasses.replace(PLAIN, model=dataclasses.replace(PLAIN.model, blocks=4, ladder=(2, 4)))


def test_the_future_is_left_out_with_its_probability_and_never_the_start():
    lengths = jnp.tile(jnp.array([2, 4, 2, 4]), (4000, 1))
    only = lambda recipe, **options: dataclasses.replace(recipe, corruption=CorruptionConfig(**options))  # noqa: E731
    found, seen = corruption.view(only(LADDER, future=0.6), SHAPE, lengths, jax.random.key(0))
    assert seen is None
    kept = np.asarray(found > 0)
    assert kept[:, 0].all() and (kept[:, 1:] <= kept[:, :-1]).all()
    np.testing.assert_array_equal(found, np.where(kept, lengths, 0))
    counts = np.bincount(kept.sum(axis=1), minlength=5) / 4000
    np.testing.assert_allclose(counts, [0, 0.2, 0.2, 0.2, 0.4], atol=0.03)

    none, seen = corruption.view(only(PLAIN, future=0.6), SHAPE, None, jax.random.key(0))
    assert none is None and seen.shape == (4000, 16)  # 4 parts in time, of 2 x 2 patches each
    np.testing.assert_array_equal(seen, np.repeat(kept, 4, axis=1))

    _, seen = corruption.view(only(PLAIN, patches=0.5), SHAPE, None, jax.random.key(0))
    shares = 1.0 - np.asarray(seen).mean(axis=1)
    # clips that keep all 16 patches: shares below 0, and a part (1 - share)^16 of the others
    np.testing.assert_allclose(np.mean(shares == 0), (0.1 + 1 / 17) / 0.6, atol=0.02)
    np.testing.assert_allclose(shares.mean(), 0.5 / 0.6 * 0.25, atol=0.02)
    assert shares.std() > 0.15 and shares.max() > 0.6  # of each clip, another share


def test_noise_is_as_large_as_the_latents_of_the_clip():
    latents = jnp.zeros((4000, 6, 4)).at[:, :, 0].set(0.5)
    lengths = jnp.tile(jnp.array([[3, 1]]), (4000, 1))
    valid = layout(lengths, 6).valid
    latents = jnp.where(valid[..., None], latents, 100.0)
    found = np.asarray(corruption.noisy(latents, 3.0, jax.random.key(1), valid))[:, :4]
    along, across = found[..., 0], found[..., 1:]
    # E (1 - t)^2 = E t^2 = 1/3, and e has the mean square of 0.5^2 / 4 in each of 4 numbers
    np.testing.assert_allclose(np.square(across).mean(), 9 / 3 / 16, rtol=0.05)
    np.testing.assert_allclose(along.mean(), 0.25, atol=0.02)
    spread = np.abs(across).mean(axis=(1, 2))
    assert spread.min() < 0.1 * spread.max()  # of each clip, another t
    gradient = jax.grad(lambda x: corruption.noisy(x, 3.0, jax.random.key(1)).sum())(latents)
    assert 0.0 < gradient.min() and gradient.max() < 1.0


def noisy_weights(config):
    graphdef, params = nnx.split(Tokenizer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), params)
    return nnx.merge(graphdef, params)


@pytest.mark.parametrize("recipe", [PLAIN, LADDER], ids=["plain", "ladder"])
def test_codes_depend_on_what_the_encoder_is_given_only(recipe):
    tokenizer = noisy_weights(recipe.model)
    video = jax.random.uniform(jax.random.key(0), (2, *recipe.model.clip_shape))
    later = video.at[:, 4:].set(jax.random.uniform(jax.random.key(1), video[:, 4:].shape))
    lengths, seen = None, jnp.tile(jnp.arange(16) < 8, (2, 1))
    if recipe.model.ladder:
        lengths, seen = jnp.array([[2, 4, 0, 0], [4, 4, 0, 0]]), jnp.ones((2, 16), bool)

    @jax.jit
    def run(video, seen):
        quantized = tokenizer.quantize(video, lengths, seen=seen)
        return quantized.z, quantized.valid, tokenizer.decode_latents(quantized.z_q, quantized.lengths)

    z, valid, found = run(video, seen)
    valid = np.ones(z.shape[:2], bool) if valid is None else valid
    again, _, same = run(later, seen)
    np.testing.assert_array_equal(z[valid], again[valid])
    np.testing.assert_array_equal(found, same)  # all frames, of which the encoder was given half
    assert np.abs(found[:, 4:]).max() > 0
    assert not np.array_equal(z[valid], run(1.0 - video, seen)[0][valid])
    hidden = run(video, seen.at[:, :3].set(False))[0]
    assert not np.array_equal(z[valid], hidden[valid])
    np.testing.assert_array_equal(hidden[valid], run(video.at[:, :2, :8].set(0.5), seen.at[:, :3].set(False))[0][valid])


@pytest.mark.parametrize("recipe", [PLAIN, LADDER], ids=["plain", "ladder"])
def test_a_step_with_everything_left_out_has_consistent_shapes(recipe):
    stage = TokenizerStage(recipe)
    state = jax.eval_shape(stage.init, jax.random.key(0))
    batch = {"video": jax.ShapeDtypeStruct((4, *recipe.model.clip_shape), jnp.uint8)}
    after, logs = jax.eval_shape(stage.train_step, state, batch, jax.random.key(0), {})
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert "loss_frame_difference" in logs


def test_the_loss_of_frame_differences_is_of_changes():
    video, other = (np.random.default_rng(seed).random((2, 3, 4, 4, 3), dtype=np.float32) for seed in (0, 1))
    stage = TokenizerStage(PLAIN)
    total, terms = stage._reconstruction_losses(other, video, {}, {}, 0, None)
    changes = np.abs(np.diff(video, axis=1) - np.diff(other, axis=1)).mean()
    np.testing.assert_allclose(terms["loss_frame_difference"], changes, rtol=1e-5)
    np.testing.assert_allclose(total, losses.reconstruction_loss(video, other, "l1") + 2.0 * changes, rtol=1e-5)
    _, terms = stage._reconstruction_losses(video + 0.5, video, {}, {}, 0, None)
    assert terms["loss_frame_difference"] < 1e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"corruption": {"future": 2.0}}, r"corruption.future must be in \[0, 1\], got 2.0"),
        ({"corruption": {"patches": 1.0}}, r"corruption.patches must be in \[0, 1\), got 1.0"),
        ({"corruption": {"noise": -1.0}}, "corruption.noise must not be negative"),
        ({"corruption": {"future": 0.5}, "model": {"patch_frames": 8}}, "there is no future to leave out"),
        ({"corruption": {"patches": 0.5}, "model": {"layout": "patchwise", "num_tokens": 16}}, "a code for each patch"),
        ({"corruption": {}, "model": dict.fromkeys(("frames", "patch_frames", "decoder_patch_frames"), 1)},
         "frame_difference_weight needs clips of several frames"),
        ({"trained": "encoder"}, "trained='encoder' is not known; choose one of all, decoder"),
        ({"trained": "decoder"}, "trained=decoder needs init_from"),
        ({"trained": "decoder", "init_from": "x"}, "learns from the codes of whole clips"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, says):
    sections = {"corruption": CorruptionConfig, "model": functools.partial(dataclasses.replace, PLAIN.model)}
    with pytest.raises(InputError, match=says) as error:
        dataclasses.replace(PLAIN, **{name: sections[name](**x) if name in sections else x
                                      for name, x in changes.items()})  # fmt: skip
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_a_decoder_that_is_trained_alone_decodes_the_same_codes(trained, tmp_path, capsys):
    options = ["--config.trained=decoder", f"--config.init_from={trained}", "--config.steps=2"]
    options += ["--config.corruption.noise=3", "--config.loss.frame_difference_weight=1", "--config.data.eval="]
    train = ["train", "--config", TINY + ":plain", "--workdir", str(tmp_path / "run"), *options]
    assert cli.main([*train, "--config.model.resolution=64"]) == 2
    said = capsys.readouterr().err
    assert "keeps the codes of init_from" in said and "model.resolution=32, not 64" in said
    assert cli.main(train) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(row["train/loss_frame_difference"] > 0 for row in rows)

    before = checkpoint.load(trained).params["tokenizer"]  # the moving average, which a run starts from
    for weights in ("raw", "ema"):
        after = checkpoint.load(tmp_path / "run", weights=weights).params["tokenizer"]
        jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])
        for name, leaf in after["quantizer"].items():
            same = jax.tree.map(np.array_equal, leaf, before["quantizer"][name])
            assert all(jax.tree.leaves(same)) == (name != "out_linear"), name
        assert np.abs(after["decoder"]["head"]["kernel"] - before["decoder"]["head"]["kernel"]).max() > 0
    one, other = load_tokenizer(trained), load_tokenizer(tmp_path / "run")
    assert one.fingerprint == other.fingerprint and one.decoder_fingerprint != other.decoder_fingerprint
    clips = np.random.default_rng(0).integers(0, 256, (8, *one.config.clip_shape), np.uint8)
    codes = one.encode(clips)
    np.testing.assert_array_equal(other.encode(clips), codes)
    assert np.abs(other.decode(codes) - one.decode(codes)).max() > 0


def test_a_folder_of_videos_is_not_continued_with_another_decoder(tmp_path):
    def start(**settings):
        with BatchFolder(tmp_path / "videos", {"tokenizer": "a", **settings}, 1, content="samples"):
            pass

    start()  # as in an earlier version
    start(decoder="b")
    with pytest.raises(InputError, match="was started with tokenizer a"):
        start(tokenizer="c", decoder="b")
    (tmp_path / "videos" / "settings.json").write_text('{"tokenizer": "a", "decoder": "b"}')
    start(decoder="b")
    with pytest.raises(InputError, match="was started with decoder b, not c"):
        start(decoder="c")
