"""Token analysis: each number agrees with its definition, for any batch size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import moving_frames
from test_steps import RECIPE

from larp_jax import cli, load_tokenizer
from larp_jax.config import StartConfig, to_dict
from larp_jax.data import ClipSpec, eval_batches
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.models.next_code import next_code
from larp_jax.tools import analysis
from larp_jax.training.tokenizer import TokenizerStage
from larp_jax.weights.checkpoint import load, write_imported

CLIPS = 5  # in a batch of 8, so there is padding
CLIP = ClipSpec(frames=4, resolution=16, flip=False)
LEARNED = ("encoder_patch_pe", "decoder_latent_pe", "decoder_patch_query_embed")


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """A checkpoint of a tokenizer with anchors and a codebook from clips, so that its codes carry information."""
    learned = {f"learned_{table}": True for table in LEARNED}
    start = StartConfig(anchored=True)
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, **learned), start=start)
    stage, key = TokenizerStage(recipe), jax.random.key(0)
    state = jax.jit(stage.set_codebook)(jax.jit(stage.init)(key), clips(data, 11)[None], key, {})
    head = state.params["tokenizer"]["decoder"]["head"]  # zero in a fresh decoder
    head["kernel"] = 0.03 * jax.random.normal(key, head["kernel"].shape)
    head["bias"] = jnp.full_like(head["bias"], 0.5)
    path = tmp_path_factory.mktemp("analysis") / "checkpoint"
    write_imported(path, to_dict(recipe), {name: state.params[name] for name in ("tokenizer", "prior")})
    return load(path)


@pytest.fixture(scope="module")
def tokenizer(found):
    return load_tokenizer(found.path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eleven windows of five videos."""
    folder = tmp_path_factory.mktemp("videos")
    for i, frames in enumerate((4, 9, 12, 17, 5)):
        write_video(folder / f"{i}.mp4", moving_frames(frames, 16, 24, seed=i), 8.0)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def folder(found, data, tmp_path_factory):
    """The output folder of the command."""
    folder = tmp_path_factory.mktemp("analysis")
    counts = ["--max-clips=11", f"--ablated-clips={CLIPS}", "--batch-size=8"]
    assert cli.main(["analyze", "--checkpoint", str(found.path), "--data", data, "--output", str(folder), *counts]) == 0
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "analysis.json").read_text())


def clips(data, count):
    with eval_batches(data, CLIP, batch_size=count, max_clips=count) as batches:
        return next(batches)["video"]


def test_replacing_a_code_measured_by_hand(tokenizer, data, folder, result):
    videos = clips(data, CLIPS)
    codes = np.asarray(tokenizer.encode(videos))
    whole = np.asarray(tokenizer.decode(codes), np.float64)
    arrays = np.load(folder / "analysis.npz")
    count, (t, h, w) = tokenizer.config.num_tokens, tokenizer.config.decoder_grid
    assert arrays["patches"].shape == (count, t, h, w) and arrays["frames"].shape == (count, tokenizer.config.frames)
    assert np.ptp(result["by_position"]["change"]) > 0
    for position in (0, 3, count - 1):
        changed = codes.copy()
        changed[:, position] = np.roll(codes[:, position], CLIPS // 2)
        decoded = np.asarray(tokenizer.decode(changed), np.float64)
        difference = np.square(decoded - whole).mean(axis=(0, 4))  # [T, H, W]
        np.testing.assert_allclose(arrays["frames"][position], difference.mean(axis=(1, 2)), rtol=1e-3, atol=1e-12)
        pt, ph, pw = tokenizer.config.decoder_patch
        by_patch = difference.reshape(t, pt, h, ph, w, pw).mean(axis=(1, 3, 5))
        np.testing.assert_allclose(arrays["patches"][position], by_patch, rtol=1e-3, atol=1e-12)
        assert result["by_position"]["change"][position] == pytest.approx(difference.mean(), rel=1e-3)
        error = [np.square(x - videos / 255).mean() for x in (decoded, whole)]
        # a difference of float32 means of about 0.1
        assert result["by_position"]["rise"][position] == pytest.approx(error[0] - error[1], rel=1e-3, abs=5e-7)


def test_codes_kept_measured_by_hand(tokenizer, data, result):
    videos = clips(data, CLIPS)
    codes = np.asarray(tokenizer.encode(videos))
    other = np.roll(codes, CLIPS // 2, axis=0)
    count = tokenizer.config.num_tokens
    kept = result["kept"]
    assert kept["tokens"] == list(range(count + 1))  # all numbers, because there are few tokens
    rise = np.array(result["by_position"]["rise"])
    orders = {"first": np.arange(count), "last": np.arange(count)[::-1], "important": np.argsort(-rise, kind="stable")}
    assert set(kept["psnr"]) == {*orders, "random"}
    for name, order in orders.items():
        for number in (0, 3, count):
            mixed = other.copy()
            mixed[:, order[:number]] = codes[:, order[:number]]
            error = np.square(np.asarray(tokenizer.decode(mixed)) - videos / np.float32(255)).mean(axis=(1, 2, 3, 4))
            expected = (-10 * np.log10(error)).mean()
            assert kept["psnr"][name][number] == pytest.approx(expected, abs=1e-3), (name, number)
    assert len({round(psnr[-1], 4) for psnr in kept["psnr"].values()}) == 1
    assert result["summary"]["psnr_all_replaced"] == kept["psnr"]["first"][0]


def test_statistics_by_position(found, tokenizer, data, folder, result):
    videos = clips(data, 11)
    stage = TokenizerStage(found.recipe)
    quantized = stage.module("tokenizer", found.params).quantize(jnp.asarray(videos / np.float32(255)))
    codes = np.asarray(quantized.indices)
    counts = np.load(folder / "analysis.npz")["counts"]
    for position, row in enumerate(counts):
        np.testing.assert_array_equal(row, np.bincount(codes[:, position], minlength=len(row)))
    shares = [np.bincount(column)[np.bincount(column) > 0] / 11 for column in codes.T]
    np.testing.assert_allclose(result["by_position"]["entropy"], [-(p * np.log(p)).sum() for p in shares], atol=1e-9)
    assert result["by_position"]["codes"] == [len(p) for p in shares]

    prior = stage.module("prior", found.params)
    codebook = tokenizer.codebook
    scored = next_code(prior(quantized.z_q[:, :-1]), quantized.indices[:, 1:], codebook)
    by_position = result["by_position"]["prior_cross_entropy"]
    assert by_position[0] is None
    np.testing.assert_allclose(by_position[1:], scored.cross_entropy.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(result["by_position"]["prior_top5"][1:], (scored.rank < 5).mean(axis=0), atol=1e-6)
    assert result["summary"]["prior_cross_entropy"] == pytest.approx(np.mean(by_position[1:]), rel=1e-5)
    assert result["protocol"]["clips"] == 11 and result["protocol"]["ablated_clips"] == CLIPS


def test_files(folder):
    written = {path.name for path in folder.iterdir()}
    assert written >= {"analysis.json", "analysis.npz", "maps.png", "kept.svg", "change.svg", "prior.svg"}
    assert (folder / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_effective_share():
    rows = np.array([[1.0, 1, 1, 1], [0, 3, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(analysis.effective_share(rows), [1, 0.25, 0.5, np.nan])


def test_the_picture_shows_the_place_of_changes():
    patches, frames = np.zeros((3, 2, 2, 4)), np.zeros((3, 8))
    patches[0, :, 1, 2] = frames[0, 5] = 4.0
    picture = analysis.ablation_picture(patches, frames, side=2, gap=1)
    dark, bright = analysis.SEQUENTIAL[[0, -1]].astype(np.uint8)
    tile = picture[1:3, 1:5]  # one pixel per patch here
    np.testing.assert_array_equal(tile[1, 2], bright)
    assert (tile.reshape(-1, 3) == dark).all(axis=1).sum() == 7
    np.testing.assert_array_equal(picture[5, 1:5], [dark, dark, dark, dark])  # only frames 0, 2, 4 and 6 of 8 fit


def test_what_cannot_be_analyzed(found, data, tmp_path):
    message = "there is only one clip, and no other clip to take codes from; use --replace common"
    with pytest.raises(InputError, match=message):
        analysis.analyze(found, data, tmp_path / "a", max_clips=8, ablated_clips=1)
    with pytest.raises(InputError, match="--replace mean is not known"):
        analysis.analyze(found, data, tmp_path / "a", replace="mean")


def test_the_most_frequent_code_as_the_replacement(found, tokenizer, data, result, tmp_path):
    options = {"max_clips": 11, "ablated_clips": CLIPS, "replace": "common"}
    common = analysis.analyze(found, data, tmp_path, **options)
    counts = np.load(tmp_path / "analysis.npz")["counts"]
    decoded = np.asarray(tokenizer.decode(np.tile(counts.argmax(axis=1), (CLIPS, 1))))
    error = np.square(decoded - clips(data, CLIPS) / np.float32(255)).mean(axis=(1, 2, 3, 4))
    assert common["kept"]["psnr"]["first"][0] == pytest.approx((-10 * np.log10(error)).mean(), abs=1e-3)
    assert common["summary"]["psnr"] == pytest.approx(result["summary"]["psnr"], abs=1e-3)
    assert common["protocol"]["replaced_by"] != result["protocol"]["replaced_by"]
