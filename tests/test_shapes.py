"""Clips of height x width, other sizes than a model's own, and fewer frames than a clip."""

import json
import pathlib

import jax
import numpy as np
import pytest
from data_helpers import moving_frames
from flax import nnx

from larp_jax import cli, data, load_tokenizer
from larp_jax.config import (
    CorruptionConfig,
    DataConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
    from_dict,
    to_dict,
)
from larp_jax.data import ClipSpec, prepare
from larp_jax.data.buckets import BLOCK, Turns, nearest_shapes
from larp_jax.data.codes import CodeSet, read_manifest
from larp_jax.data.video import probe, read_windows, write_video
from larp_jax.errors import InputError
from larp_jax.inference.reconstruct import reconstruct
from larp_jax.inference.tokenize import detokenize, tokenize
from larp_jax.models.embeddings import Positions3d, sincos_1d, sincos_3d
from larp_jax.models.rotary import angles_3d
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.training import corruption
from larp_jax.weights.released_config import config_to_released

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny.py")
CLIPS = np.random.default_rng(0).integers(0, 256, (3, 8, 24, 48, 3), dtype=np.uint8)


def test_a_shape_is_a_height_and_a_width():
    config = TokenizerConfig(shape=(72, 128))
    assert config.clip_shape == (16, 72, 128, 3) and config.resolution == 72
    assert config.encoder_grid == (4, 9, 16)
    assert TokenizerConfig(shape=(64, 64)) == TokenizerConfig(resolution=64)
    assert from_dict(TokenizerConfig, json.loads(json.dumps(to_dict(config))), "model") == config
    for shape, message in (
        ((72,), "a height and a width such as 72,128, got 72"),
        ((72, 0), "a height and a width"),
        ((72, 100), "model.shape=72,100 is not divisible by model.patch_size=8"),
    ):
        with pytest.raises(InputError, match=message):
            TokenizerConfig(shape=shape)
    with pytest.raises(InputError, match=r"does not support model.shape=\(72, 128\); use the stablehlo"):
        config_to_released(TokenizerRecipe(model=config))


def test_a_clip_is_a_height_and_a_width():
    assert ClipSpec.of((16, 64, 64, 3)) == ClipSpec(16, 64)
    wide = ClipSpec.of((16, 72, 128, 3), flip=False)
    assert wide.size == wide.resolution == (72, 128) and wide.shape == (16, 72, 128, 3)


@pytest.mark.parametrize("learned", [False, True])
def test_positions_follow_coordinates(learned):
    table = Positions3d((2, 4, 8), 16, rngs=nnx.Rngs(0), learned=learned, token_type=True)
    if learned:  # no straight lines
        table.height[...] = jax.random.normal(jax.random.key(0), (4, 16))
    own = table()
    np.testing.assert_array_equal(table((2, 4, 8)), own)
    np.testing.assert_array_equal(table((1, 4, 8)), own[:32])  # fewer frames are the first

    twice = (table((2, 8, 8)) - table.token_type[...]).reshape(2, 8, 8, 16)
    own = (own - table.token_type[...]).reshape(2, 4, 8, 16)
    if learned:  # centers of halves are a quarter of a patch beside those of the whole
        np.testing.assert_allclose(twice[:, 2], 0.75 * own[:, 1] + 0.25 * own[:, 0], atol=1e-5)
        np.testing.assert_allclose(twice[:, 0], own[:, 0], atol=1e-5)  # at the edge
    else:
        down = sincos_1d([-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25], 8)
        np.testing.assert_allclose(twice[0, :, 0, 8:] - own[0, :1, 0, 8:], down - sincos_1d([0], 8), atol=1e-6)
        np.testing.assert_array_equal(sincos_3d((2, 4, 8), 16, (2, 4, 8)), sincos_3d((2, 4, 8), 16))
    with pytest.raises(ValueError, match="more than the 2 of a clip"):
        table((3, 4, 8))


def test_rotary_positions_follow_coordinates():
    own = angles_3d((2, 4, 8), 12)
    np.testing.assert_array_equal(angles_3d((2, 4, 8), 12, (2, 4, 8)), own)
    np.testing.assert_array_equal(angles_3d((1, 4, 8), 12, (2, 4, 8)), own[:32])
    own, twice = own.reshape(2, 4, 8, 6), angles_3d((2, 8, 8), 12, (2, 4, 8)).reshape(2, 8, 8, 6)
    np.testing.assert_allclose(twice.reshape(2, 4, 2, 8, 6).mean(axis=2), own, atol=1e-12)  # halves around a whole


@pytest.mark.parametrize("options", [{"block": "vitok"}, {"decoder_patch_size": 8}, {"learned_encoder_patch_pe": True}])
def test_every_kind_of_block_and_table_takes_other_sizes(options):
    size = TransformerConfig(width=24, depth=1, heads=2)
    options |= {"frames": 8, "shape": (16, 32), "patch_size": 4, "num_tokens": 6}
    config = TokenizerConfig(encoder=size, decoder=size, **options)
    video = jax.ShapeDtypeStruct((2, 4, 24, 40, 3), np.float32)
    features = lambda x: Tokenizer(config, rngs=nnx.Rngs(0)).decode_with_features(x, None, 1, video.shape[1:4])  # noqa: E731
    found, quantized = jax.eval_shape(lambda x: Tokenizer(config, rngs=nnx.Rngs(0))(x), video)
    decoded, kept = jax.eval_shape(features, quantized.z_q)
    patch = config.decoder_patch_size
    assert found.shape == decoded.shape == video.shape and kept.shape == (2, 1, 24 // patch, 40 // patch, 24)
    recipe = TokenizerRecipe(model=config, corruption=CorruptionConfig(future=0.5, patches=0.5))
    assert corruption.view(recipe, video.shape, None, jax.random.key(0))[1].shape == (2, 6 * 10)


def test_a_tokenizer_takes_other_sizes_and_fewer_frames(tokenizer):
    for clips, given in ((CLIPS, {"size": (24, 48)}), (CLIPS[:, :4], {"size": (24, 48), "frames": 4})):
        codes = tokenizer.encode(clips)
        assert codes.shape == (3, 8)
        again = tokenizer.decode(codes, **given)
        assert again.shape == clips.shape
        np.testing.assert_allclose(again, tokenizer.reconstruct(clips), atol=1e-5)
    for clips, message in (
        (CLIPS[:, :3], r"\[8, 32, 32, 3\], or T from \[4, 8\] and H and W multiples of 8, got \[3, 24, 48, 3\]"),
        (CLIPS[:, :, :20], r"got \[8, 20, 48, 3\]"),
        (CLIPS[:, :, :0], "got"),
        (CLIPS[..., :1], "got"),
        (np.concatenate([CLIPS, CLIPS], axis=1), r"got \[16, 24, 48, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(clips)
    with pytest.raises(InputError, match=r"got \[12, 32, 32, 3\]"):
        tokenizer.decode(codes, frames=12)
    with pytest.raises(InputError, match="the patches of a clip .* positions, above the limit"):
        tokenizer.decode(codes, size=(2**14, 2**14))


def test_blocks_take_other_sizes_but_not_fewer_frames(untrained):
    tokenizer = load_tokenizer(untrained)
    codes, lengths = tokenizer.encode(CLIPS, budget=4)
    video = tokenizer.decode(codes, lengths, size=(24, 48))
    np.testing.assert_allclose(video, tokenizer.reconstruct(CLIPS, budget=4), atol=1e-5)
    with pytest.raises(InputError, match=r"T from \[8\]"):
        tokenizer.encode(CLIPS[:, :4])


def test_a_patchwise_tokenizer_takes_its_own_shape_only():
    from larp_jax.models.checks import checked_shape

    config = TokenizerConfig(layout="patchwise", frames=8, shape=(16, 32), num_tokens=16)
    assert checked_shape((8, 16, 32, 3), config) == config.clip_shape
    with pytest.raises(InputError, match=r"clips must be \[8, 16, 32, 3\], got \[8, 32, 32, 3\]"):
        checked_shape((8, 32, 32, 3), config)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder of videos of 36x64, 16:9, and the workdir of a run on it with that shape."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "videos").mkdir()
    for seed, frames in enumerate((8, 9, 21, 40)):
        write_video(folder / "videos" / f"{seed}.mp4", moving_frames(frames, 36, 64, seed), 12.5)
    arguments = [f"--config.data.{split}=folder:{folder / 'videos'}" for split in ("train", "eval")]
    arguments += ["--config.model.shape=36,64", "--config.model.patch_size=4", "--config.discriminator.patch_size=4"]
    arguments += ["--config.loss.prior_weight=0.0", "--config.data.eval_clips=4"]
    arguments += ["--config.steps=4", "--config.eval_every=4", "--config.save_every=4"]
    run = folder / "run"
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(run), *arguments]) == 0
    return folder / "videos", run


@pytest.mark.slow
def test_a_wide_model(wide, tmp_path, capsys):
    """16:9 in, 16:9 out, at the same rate, with PSNR by file."""
    videos, run = wide
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/psnr" in line for line in scores)
    assert cli.main(["reconstruct", "--checkpoint", str(run), "--input", str(videos), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(" dB over ") == 4
    summary = json.loads((tmp_path / "psnr.json").read_text())
    assert summary["clip"] == [8, 36, 64, 3]
    tokenizer = load_tokenizer(run)
    for name, expected in zip(sorted(summary["videos"]), (8, 9, 21, 40), strict=True):
        written = probe(tmp_path / name)
        assert (written.frames, written.fps, written.width, written.height) == (expected, 12.5, 2 * 64, 36)
        errors = []
        for _, frames, valid in read_windows(videos / name, ClipSpec(8, (36, 64))):
            again = np.asarray(tokenizer.reconstruct(frames[None]))[0, :valid]
            errors.append(np.square(again - frames[:valid] / 255.0).reshape(valid, -1).mean(axis=1))
        psnr = -10 * np.log10(np.concatenate(errors).mean())
        assert summary["videos"][name]["psnr"] == pytest.approx(psnr, abs=1e-3)


@pytest.mark.slow
def test_fewer_frames_are_encoded_as_they_are(wide, tmp_path):
    videos, run = wide
    tokenizer = load_tokenizer(run)
    summary = reconstruct(tokenizer, str(videos / "1.mp4"), tmp_path / "r", fewer_frames=True)
    (_, first, _), (_, last, _) = read_windows(videos / "1.mp4", ClipSpec(8, (36, 64)))
    errors = [
        np.square(np.asarray(tokenizer.reconstruct(clip[None]))[0, :valid] - clip[:valid] / 255.0).reshape(valid, -1)
        for clip, valid in ((first, 8), (last[:4], 1))  # up to the end of a patch
    ]
    psnr = -10 * np.log10(np.concatenate(errors).mean())
    assert summary["videos"]["1.mp4"]["psnr"] == pytest.approx(psnr, abs=2e-5)
    held = reconstruct(tokenizer, str(videos / "1.mp4"), tmp_path / "h")
    assert held["videos"]["1.mp4"]["psnr"] != pytest.approx(psnr, abs=2e-5)

    tokenize(tokenizer, str(videos), tmp_path / "codes", fewer_frames=True, size=(24, 48), batch_size=4)
    manifest = read_manifest(tmp_path / "codes")
    assert manifest["clip"] == [8, 24, 48, 3] and manifest["fewer_frames"]
    paths = detokenize(tokenizer, tmp_path / "codes", tmp_path / "videos", batch_size=4)
    found = [(p.frames, p.width, p.height) for p in map(probe, paths)]
    assert found == [(frames, 48, 24) for frames in (8, 9, 21, 40)]
    with pytest.raises(InputError, match="fewer frames; tokenize again without --fewer-frames"):
        CodeSet(tmp_path / "codes")
    # generators sample clips of the tokenizer's own size, so they do not train on codes of others
    tokenize(tokenizer, str(videos), tmp_path / "other", size=(24, 48), batch_size=4)
    with pytest.raises(InputError, match="another size than its tokenizer's; tokenize again without --size"):
        CodeSet(tmp_path / "other")
    assert "other_size" not in tokenize(tokenizer, str(videos), tmp_path / "own", size=(36, 64), batch_size=4)
    assert len(CodeSet(tmp_path / "own")) == 4


def test_sizes_that_do_not_fit(tokenizer, tmp_path):
    video = tmp_path / "v.mp4"
    write_video(video, moving_frames(9), 12.0)
    for call in (reconstruct, tokenize):
        with pytest.raises(InputError, match=r"H and W multiples of 8, got \[8, 30, 48, 3\]"):
            call(tokenizer, str(video), tmp_path / "out", size=(30, 48))
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="leave out one"):
        tokenize(tokenizer, str(video), tmp_path / "out", fewer_frames=True, cond_frames=3)


def test_videos_get_the_nearest_shape():
    shapes = [(64, 64), (48, 80), (80, 48)]
    found = nearest_shapes([1.0, 16 / 9, 9 / 16, 1.2, 1.4, 0.0, 100.0], shapes)
    assert found.tolist() == [0, 1, 2, 0, 1, 0, 1]


@pytest.mark.parametrize("shares", [(3, 1, 0), (0.001, 5.0, 2.0)])
def test_turns_are_a_function_of_the_step(shares):
    turns = Turns(shares, seed=2**60)
    found = [turns(step) for step in range(2100)]
    for shape, share in enumerate(shares):
        steps = [step for step, (one, _) in enumerate(found) if one == shape]
        assert [found[step][1] for step in steps] == list(range(len(steps)))  # none twice, none left out
        assert abs(sum(step < BLOCK for step in steps) - BLOCK * share / sum(shares)) <= 2
        assert bool(steps) == (share > 0)
    fifth = [one for one, _ in found[4::5]]  # no shape takes all turns of the discriminator
    assert abs(np.mean(np.array(fifth) == 1) - shares[1] / sum(shares)) < 0.1
    assert Turns(shares, seed=2**60)(1234) == found[1234] and [Turns(shares, 1)(i) for i in range(2100)] != found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of three wide and two high videos, in classes of these names."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, size, count in (("high", (64, 40), 2), ("wide", (36, 64), 3)):
        (folder / name).mkdir()
        for seed in range(count):
            write_video(folder / name / f"{seed}.mp4", moving_frames(20, *size, seed), 12.5)
    return folder


@pytest.mark.parametrize("spec", ["folder:{0}", "0.3*folder:{0}/high+0.7*folder:{0}"])
def test_every_step_has_one_shape(mixed, spec, caplog):
    def batches(start=0, **process):
        found = data.train_batches(
            spec.format(mixed), ClipSpec(4, 16), batch_size=4, seed=1, shapes=[(16, 32), (32, 16), (8, 80)],
            start_step=start, **process
        )  # fmt: skip
        with found:
            return [next(found) for _ in range(12)]

    with caplog.at_level("WARNING"):
        whole = batches()
    assert "data.shapes: 0 of" in caplog.text and "8x80" in caplog.text
    shapes = [batch["video"].shape for batch in whole]
    assert set(shapes) == {(4, 4, 16, 32, 3), (4, 4, 32, 16, 3)}
    if spec.startswith("folder"):  # of their own videos only, each of which comes equally often
        assert all((batch["label"] == (batch["video"].shape[3] == 32)).all() for batch in whole)
    again, halves = batches(5)[:4], [batches(process_index=i, process_count=2) for i in range(2)]
    for one, other in zip(whole[5:9], again, strict=True):
        np.testing.assert_array_equal(one["video"], other["video"])
    for one, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(one["video"], np.concatenate([part["video"] for part in parts]))


@pytest.mark.slow
def test_training_on_several_shapes(mixed, tmp_path):
    """Both shapes pass through all modules, and evaluation has that of the model."""
    assert {Turns((2, 3), seed=0)(step)[0] for step in range(3)} == {0, 1}
    settings = {"data.train": f"folder:{mixed}", "data.eval": f"folder:{mixed}", "steps": 3}
    settings |= {"data.shapes": "32x16,16x32", "loss.prior_weight": 0.0, "loss.discriminator_every": 1}
    settings |= {"model.resolution": 16, "data.eval_clips": 4}
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(tmp_path), *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss_discriminator" in row] == [1, 2, 3]
    assert any("eval/psnr" in row for row in rows)
    assert load_tokenizer(tmp_path).config.clip_shape == (8, 16, 16, 3)


@pytest.mark.parametrize(
    "model, shapes, message",
    [
        ({}, "64x64,64x64", "has one twice"),
        ({}, "64", "heights x widths such as"),
        ({}, "64x60", "data.shapes has 64x60: model.shape=64,60 is not divisible"),
        ({"patch_size": 4}, "60x60", "by discriminator.patch_size=8"),
        ({"layout": "patchwise"}, "64x64", "takes one shape"),
    ],
)
def test_shapes_that_do_not_fit(model, shapes, message):
    with pytest.raises(InputError, match=message):
        TokenizerRecipe(model=TokenizerConfig(**model), data=DataConfig(shapes=shapes))


def test_prepared_frames_have_the_shape(mixed, tmp_path):
    """Frames are stored in this shape, and read as those of the files; a mixture of sets has both aspect ratios."""
    for name, size in (("wide", (24, 40)), ("high", (40, 24))):
        settings = prepare.Settings(size=size, storage="raw")
        prepare.prepare([str(mixed / name)], tmp_path / name, settings, workers=1, progress=lambda text: None)
        clip = ClipSpec(8, size, flip=False)
        ours, theirs = (
            data.open_source(spec, clip) for spec in (f"tfds:{tmp_path / name}:train", f"folder:{mixed / name}")
        )
        np.testing.assert_array_equal(ours.read_clip(1, 5, clip)[0], theirs.read_clip(1, 5, clip)[0])
    both = data.open_source(f"tfds:{tmp_path / 'wide'}:train+tfds:{tmp_path / 'high'}:train")
    assert [both.aspect(index) for index in range(len(both))] == [40 / 24] * 3 + [24 / 40] * 2
    with pytest.raises(InputError, match="--size must be even numbers of at least 8, got 24,39"):
        prepare.Settings(size=(24, 39))
