"""The Python interface."""

import shutil

import jax
import numpy as np
import pytest

import larp_jax
from larp_jax.errors import InputError

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), dtype=np.uint8)


def test_encode_and_decode(tokenizer):
    codes = tokenizer.encode(VIDEO)
    assert codes.shape == (3, 8) and codes.dtype == np.int32
    assert np.array_equal(codes, tokenizer.encode(VIDEO))
    assert np.array_equal(codes, tokenizer.encode(VIDEO / 255.0))
    video = tokenizer.decode(codes)
    assert video.shape == VIDEO.shape and video.dtype == np.float32
    assert 0.0 <= float(video.min()) and float(video.max()) <= 1.0
    np.testing.assert_allclose(video, tokenizer.reconstruct(VIDEO), atol=1e-5)
    assert np.array_equal(video, tokenizer.decode(np.asarray(codes, np.int64)))


def test_with_a_key_codes_are_sampled(tokenizer):
    sampled = [np.asarray(tokenizer.encode(VIDEO, jax.random.key(seed))) for seed in (0, 0, 1)]
    assert np.array_equal(sampled[0], sampled[1])
    assert not np.array_equal(sampled[0], sampled[2])


def test_codebook_and_facts(tokenizer):
    assert tokenizer.codebook.shape == (32, 4) and tokenizer.codebook.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(tokenizer.codebook, axis=1), 1.0, atol=1e-6)
    assert tokenizer.config.num_tokens == 8
    assert tokenizer.step == 6
    assert len(tokenizer.fingerprint) == 16


def test_every_way_to_name_a_checkpoint(trained, tokenizer):
    assert larp_jax.load_tokenizer(trained / "checkpoints" / "6").fingerprint == tokenizer.fingerprint
    assert larp_jax.load_tokenizer(str(trained / "checkpoints" / "2")).step == 2
    raw = larp_jax.load_tokenizer(trained, weights="raw")
    assert raw.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "video, message",
    [
        (VIDEO[0], r"got shape \[8, 32, 32, 3\]"),
        (VIDEO[:, :3], r"\[8, 32, 32, 3\], or T from \[4, 8\] .* got \[3, 32, 32, 3\]"),
        (VIDEO[:0], "got shape"),
        (VIDEO.astype(np.int32), "got int32"),
        (VIDEO.astype(np.float32), r"floats in \[0, 1\], got values from 0 to 255"),
        (np.full(VIDEO.shape, np.nan, np.float32), "got values from nan"),
    ],
)
def test_videos_that_do_not_fit(tokenizer, video, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(video)
    with pytest.raises(ValueError, match=message):
        tokenizer.reconstruct(video)


@pytest.mark.parametrize(
    "codes, message",
    [
        (np.zeros(8, np.int32), r"\[B, 8\] of integers in \[0, 32\), got shape \[8\]"),
        (np.zeros((2, 7), np.int32), r"got shape \[2, 7\]"),
        (np.zeros((2, 8)), "got float64"),
        (np.full((2, 8), 32), "got values from 32 to 32"),
        (np.full((2, 8), -1), "got values from -1"),
    ],
)
def test_codes_that_do_not_fit(tokenizer, codes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(codes)


@pytest.mark.parametrize("part, how", [("metadata/metadata", "broken"), ("ema/_METADATA", "gone")])
def test_a_damaged_checkpoint(trained, tmp_path, part, how):
    damaged = shutil.copytree(trained / "checkpoints" / "6", tmp_path / "6")
    path = damaged / part
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="is damaged .*; use another step"):
        larp_jax.load_tokenizer(damaged)


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in"):
        larp_jax.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="weights='best'"):
        larp_jax.load_tokenizer(tmp_path, weights="best")
