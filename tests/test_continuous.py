"""Continuous latents in place of codes: the KL bottleneck through the commands."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import moving_frames
from flax import nnx

import larp_jax
from larp_jax import cli
from larp_jax.config import Ladder, TokenizerConfig, from_dict, parse_recipe, to_dict
from larp_jax.data import codes as codes_on_disk
from larp_jax.data.latents import LatentStatistics
from larp_jax.data.video import probe, write_video
from larp_jax.errors import InputError
from larp_jax.models.tokenizer import Tokenizer

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of 20 and 12 frames, in two classes."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("run/x.mp4", 20), ("walk/y.mp4", 12)):
        (folder / name).parent.mkdir()
        write_video(folder / name, moving_frames(count, seed=count), 12.0)
    return folder


def test_latents_on_disk(continuous, videos, tmp_path, capsys):
    folder, output = tmp_path / "latents", tmp_path / "out"
    given = ["--checkpoint", str(continuous)]
    options = ["--input", str(videos), "--output", str(folder), "--flips", "--cond-frames", "3"]
    assert cli.main(["tokenize", *given, *options]) == 0
    tokenizer = larp_jax.load_tokenizer(continuous)
    manifest = codes_on_disk.read_manifest(folder)
    assert (manifest["version"], manifest["layout"], manifest["d"], manifest["N"]) == (3, "fixed", 4, 8)
    assert "K" not in manifest and manifest["fingerprint"] == tokenizer.fingerprint

    source = codes_on_disk.CodeSet(folder)
    latents = source.rows["latents"]
    assert (latents.dtype, latents.shape) == (np.float16, (10, 8, 4)) and source.rows["condition"].shape == (10, 8, 4)
    np.testing.assert_allclose(manifest["mean"], latents.mean(axis=(0, 1), dtype=np.float64), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(manifest["std"], latents.std(axis=(0, 1), dtype=np.float64), rtol=1e-3)
    batch = next(source.batches(batch_size=2, seed=0))
    assert batch["latents"].shape == (2, 8, 4) and batch["label"].shape == (2,)

    assert cli.main(["detokenize", *given, "--input", str(folder), "--output", str(output)]) == 0
    assert probe(output / "run" / "x.mp4").frames == 20
    assert len(list(output.rglob("*.mp4"))) == 4

    (folder / "manifest.json").write_text(json.dumps(manifest | {"d": 3, "mean": [0.0] * 3, "std": [1.0] * 3}))
    assert cli.main(["detokenize", *given, "--input", str(folder), "--output", str(tmp_path / "other")]) == 2
    assert "d, N, clip or ladder are not those of the tokenizer" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"contains float16 \[10, 8, 4\] instead of float16 \[10, 8, 3\]"):
        _ = codes_on_disk.CodeSet(folder).rows


def test_encode_and_decode(continuous):
    tokenizer = larp_jax.load_tokenizer(continuous)
    video = np.random.default_rng(0).random((2, 8, 32, 32, 3), np.float32)
    latents = tokenizer.encode(video)
    assert (latents.shape, latents.dtype) == ((2, 8, 4), np.float32)
    assert np.array_equal(latents, tokenizer.encode(video))
    sampled = tokenizer.encode(video, key=jax.random.key(0))
    assert sampled.shape == latents.shape and not np.array_equal(sampled, latents)
    np.testing.assert_allclose(tokenizer.decode(latents), tokenizer.reconstruct(video), atol=1e-5)
    (streamed,) = tokenizer.encode_stream([video[:, :3], video[:, 3:]])
    assert np.array_equal(streamed, latents)
    with pytest.raises(InputError, match="continuous latents"):
        _ = tokenizer.codebook
    broken = ((latents[:, :7], r"\[B, 8, 4\]"), (np.int32(latents), "int32"), (latents * np.nan, "not finite"))
    for wrong, message in broken:
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(wrong)


def test_latents_of_different_lengths_on_disk(tmp_path):
    """The packed layout holds latents as it holds codes."""
    ladder, lengths = Ladder((2, 4), 2, 6), np.array([[2, 2], [4, 2]], np.int32)
    latents = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    latents[0, 4:] = 0.0
    statistics = LatentStatistics(3)
    statistics.add(latents[0, :4])
    statistics.add(latents[1])
    rows = [{"source": name, "start": 0, "frames": 8, "fps": 0.0, "label": -1} for name in "ab"]
    manifest = codes_on_disk.new_manifest(
        fingerprint="f", step=1, N=6, clip=(8, 32, 32, 3), sizes=[2], statistics=statistics, adaptive=ladder, rows=rows
    )
    codes_on_disk.write_shard(tmp_path / manifest["shards"][0]["file"], {"latents": latents, "lengths": lengths})
    codes_on_disk.write_manifest(tmp_path, manifest)
    found = codes_on_disk.CodeSet(tmp_path)
    assert np.array_equal(found.rows["latents"], latents.astype(np.float16))
    assert np.array_equal(found.rows["lengths"], lengths)
    everything = np.concatenate([latents[0, :4], latents[1]]).astype(np.float64)
    np.testing.assert_allclose(found.manifest["mean"], everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.manifest["std"], everything.std(axis=0), rtol=1e-12)

    for values, message in ((latents * 1e5, "float16"), (latents * np.nan, "float16")):
        with pytest.raises(InputError, match=message):
            codes_on_disk.write_shard(tmp_path / "x.npz", {"latents": values})
    for wrong in ({"mean": None}, {"std": [1.0, 1.0]}, {"d": 0}):
        codes_on_disk.write_manifest(tmp_path, manifest | wrong)
        with pytest.raises(InputError, match="damaged"):
            codes_on_disk.read_manifest(tmp_path)


def test_commands(continuous, tmp_path, capsys):
    """Each command that takes a tokenizer, on continuous latents."""
    given, data = ["--checkpoint", str(continuous)], "moving_shapes:test"

    options = ["--data", data, "--batch-size", "8", "--output", str(tmp_path / "e.json")]
    assert cli.main(["evaluate", *given, *options]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["metrics"]["kl"] > 0 and result["metrics"]["active"] > 0 and "usage" not in result["metrics"]
    assert result["protocol"]["latents"] == "deterministic: the means" and result["protocol"]["floats"] == 32

    options = ["--max-clips", "8", "--ablated-clips", "2", "--batch-size", "8", "--output", str(tmp_path / "a")]
    assert cli.main(["analyze", *given, "--data", data, *options]) == 0
    analysis = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert analysis["summary"]["kl"] == pytest.approx(sum(analysis["by_position"]["kl"]), rel=1e-6)
    assert len(analysis["by_position"]["spread"]) == 8 and (tmp_path / "a" / "kl.svg").exists()
    assert np.load(tmp_path / "a" / "analysis.npz")["std"].shape == (8, 4)
    assert max(analysis["by_position"]["change"]) > 0

    options = ["--input", data, "--max-clips", "1", "--output", str(tmp_path / "r")]
    assert cli.main(["reconstruct", *given, *options]) == 0

    tokenizer = larp_jax.load_tokenizer(continuous)
    assert cli.main(["export", *given, "--format", "stablehlo", "--output", str(tmp_path / "s")]) == 0
    video = np.random.default_rng(0).random((2, 8, 32, 32, 3), np.float32)
    latents, decoded = None, video
    for name in ("encode", "decode"):
        function = jax.export.deserialize(bytearray((tmp_path / "s" / f"{name}.bin").read_bytes()))
        decoded = function.call(decoded)
        latents = decoded if latents is None else latents
    np.testing.assert_allclose(latents, tokenizer.encode(video), atol=1e-5)
    np.testing.assert_allclose(decoded, tokenizer.reconstruct(video), atol=1e-5)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["d"] == 4 and "K" not in manifest

    capsys.readouterr()
    assert cli.main(["export", *given, "--format", "codebook-npz", "--output", str(tmp_path / "c.npz")]) == 2
    assert "continuous latents and no codebook to export" in capsys.readouterr().err
    assert cli.main(["export", *given, "--format", "huggingface", "--output", str(tmp_path / "hf")]) == 0
    again = larp_jax.load_tokenizer(tmp_path / "hf")
    assert again.fingerprint == tokenizer.fingerprint


def test_the_released_kl_bottleneck(reference_dir):
    """A model of the authors' regularizer `skl` encodes to its means, and decodes them."""
    expected = np.load(reference_dir / "tokenizer_kl" / "io.npz")
    tokenizer = larp_jax.load_tokenizer(reference_dir / "tokenizer_kl")
    video = np.moveaxis(expected["video"], 1, -1)
    np.testing.assert_allclose(tokenizer.encode(video), expected["mean"], atol=1e-5)
    decoded = np.clip(np.moveaxis(expected["reconstruction_from_mean"], 1, -1), 0.0, 1.0)
    np.testing.assert_allclose(tokenizer.decode(expected["mean"]), decoded, atol=1e-5)


@pytest.mark.parametrize("kind", ["larp", "vitok"])
def test_a_ladder_of_latents(kind):
    """Blocks of frames with different numbers of latents: packed, zero behind them, and block by block the same."""
    values = to_dict(parse_recipe(runpy.run_path(CONFIG)["get_config"]("adaptive")).model)
    values["quantizer"] |= {"kind": "kl"}
    values["block"] = kind
    config = from_dict(TokenizerConfig, values, "model")
    init = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Tokenizer(config, rngs=nnx.Rngs(0)), nnx.Param)))
    params = init()
    head = params["decoder"]["head"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    tokenizer = larp_jax.api.LoadedTokenizer(config, params)
    video = np.random.default_rng(0).random((2, 8, 32, 32, 3), np.float32)
    budget = [[2, 4], [8, 2]]
    latents, lengths = tokenizer.encode(video, budget=budget)
    own = np.arange(12) < lengths.sum(axis=1)[:, None]
    assert latents.shape == (2, 12, 4) and not np.any(latents[~own]) and np.all(np.any(latents[own], axis=-1))
    decoded = tokenizer.decode(latents, lengths)
    np.testing.assert_allclose(decoded, tokenizer.reconstruct(video, budget=budget), atol=1e-5)

    seen, drawn, starts = (), (), [0, 0]
    for number, frames in enumerate((slice(4), slice(4, 8))):
        block, seen = tokenizer.encode_block(video[:, frames], lengths[:, number], seen)
        for row, start in enumerate(starts):
            end = start + int(lengths[row, number])
            np.testing.assert_allclose(block[row, : end - start], latents[row, start:end], atol=1e-5)
            starts[row] = end
        shown, drawn = tokenizer.decode_block(block, lengths[:, number], drawn)
        np.testing.assert_allclose(shown, decoded[:, frames], atol=1e-5)

    quantized = jax.jit(tokenizer.module(params).quantizer)(jnp.ones((2, 12, 8)), lengths=jnp.asarray(lengths))
    assert np.array_equal(np.asarray(quantized.kl) > 0, own)
    with pytest.raises(InputError, match="latents are floats, not bits"):
        tokenizer.encode(video, budget="bits=100")
