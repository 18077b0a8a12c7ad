"""A tokenizer with a ladder from training to codes on disk, on the command line and in Python."""

import json
import pathlib

import jax
import numpy as np
import pytest

import larp_jax
from larp_jax import cli
from larp_jax.config import parse_recipe
from larp_jax.data import codes as codes_on_disk, moving_shapes
from larp_jax.errors import InputError
from larp_jax.training.tokenizer import TokenizerStage

CONFIG = pathlib.Path(__file__).parent / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_programs):
    """Workdir of a run of tests/configs/tiny.py:adaptive."""
    folder = tmp_path_factory.mktemp("adaptive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
        assert cli.main(["train", "--config", f"{CONFIG}:adaptive", "--workdir", str(folder / "run")]) == 0
        yield folder / "run"


@pytest.fixture(scope="module")
def adaptive(run):
    return larp_jax.load_tokenizer(run)


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), np.uint8)


def test_training_draws_assignments(run, adaptive):
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for line in logs for name, value in line.items()}
    assert found["eval/codes"] == 8.0  # evaluation has the most codes in equal blocks
    assert {"train/loss_prior", "train/perplexity", "train/usage_clip", "eval/prior_top1"} <= found.keys()
    assert np.isfinite(list(found.values())).all()
    recipe = parse_recipe(json.loads((run / "config.json").read_text()))
    assert recipe.model == adaptive.config
    stage = TokenizerStage(recipe)
    clips = np.zeros((4096, 1))
    drawn, again, other = (np.asarray(stage.lengths(clips, jax.random.key(i), {})) for i in (0, 0, 1))
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, other)
    rows, counts = np.unique(drawn, axis=0, return_counts=True)
    assert rows.tolist() == [list(x) for x in recipe.model.adaptive.assignments]
    assert counts.min() > 0.8 * 4096 / len(rows)


def test_encoding_and_decoding_in_python(adaptive, video):
    codes, lengths = adaptive.encode(video)
    assert lengths.tolist() == [[4, 4]] * 3 and codes.shape == (3, 12) and not codes[:, 8:].any()
    codes, lengths = adaptive.encode(video, budget=[[2, 4], [8, 4], [4, 2]])
    assert lengths.tolist() == [[2, 4], [8, 4], [4, 2]] and lengths.dtype == np.int32
    whole = adaptive.decode(codes, lengths)
    np.testing.assert_allclose(whole, adaptive.reconstruct(video, budget=lengths), atol=1e-5)
    np.testing.assert_allclose(adaptive.decode(codes, lengths[:, :1]), whole[:, :4], atol=1e-5)
    for budget, row in ((4, [2, 2]), ("bits=30", [2, 2]), ("2,8", [2, 8]), ((8, 2), [8, 2])):
        assert adaptive.assign(video, budget).tolist() == [row] * 3

    def refused(message, f, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            f(*arguments, **options)

    refused("this tokenizer has a ladder: give the lengths", adaptive.decode, codes)
    refused(r"must be \[3, 2\], or those of the first blocks; got shape \[2, 2\]", adaptive.decode, codes, lengths[:2])
    refused("must be of the ladder", adaptive.decode, codes, [[2, 3]] * 3)
    refused("and at most 12 together", adaptive.decode, codes, [[8, 8]] * 3)
    refused(r"codes must be \[B, 12\]", adaptive.decode, codes[:, :8], lengths)
    refused(r"lengths must be \[3, 2\]; got", adaptive.encode, video, budget=[[2], [2], [2]])
    refused("does not split into 2 equal blocks", adaptive.encode, video, budget=6)


def test_a_tokenizer_without_a_ladder_takes_no_budget(tokenizer, video):
    with pytest.raises(InputError, match="budget 8: this tokenizer has no model.ladder and gives every clip 8 codes"):
        tokenizer.encode(video, budget=8)
    codes = tokenizer.encode(video)
    with pytest.raises(ValueError, match="gives every clip the same number of codes"):
        tokenizer.decode(codes, [[4, 4]] * 3)


def test_budgets_on_the_command_line(run, adaptive, tmp_path, capsys):
    checkpoint, data = ["--checkpoint", str(run)], "moving_shapes:test"
    some = ["--data", data, "--max-clips", "8"]
    where = lambda name: str(tmp_path / name)  # noqa: E731

    def call(*arguments, code=0):
        assert cli.main([*map(str, arguments)]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    tokenize = ["tokenize", *checkpoint, "--input", data, "--max-clips", "4", "--output"]
    assert "4 clips of 4 videos, 10 codes each on average" in call(*tokenize, where("codes"), "--budget", "2,8")
    manifest = codes_on_disk.read_manifest(where("codes"))
    assert (manifest["layout"], manifest["N"], manifest["ladder"]) == ("packed", 12, [2, 4, 8])
    shard = codes_on_disk.read_shard(where("codes"), manifest, 0)
    assert shard["lengths"].tolist() == [[2, 8]] * 4
    call("detokenize", *checkpoint, "--input", where("codes"), "--output", where("again"))
    assert len(list((tmp_path / "again").rglob("*.mp4"))) == 4

    call("evaluate", *checkpoint, *some, "--budget", "bits=30", "--output", where("e.json"))
    scores = json.loads((tmp_path / "e.json").read_text())
    assert scores["metrics"]["codes"] == 4.0 and scores["protocol"]["budget"] == "bits=30"
    reconstruct = ["reconstruct", *checkpoint, "--input", data, "--max-clips", "2"]
    call(*reconstruct, "--output", where("pairs"), "--budget", "4")
    pairs = json.loads((tmp_path / "pairs" / "psnr.json").read_text())
    assert pairs["budget"] == "4" and [video["codes"] for video in pairs["videos"].values()] == [4, 4]
    header = next((tmp_path / "pairs").rglob("*.png")).read_bytes()
    assert int.from_bytes(header[20:24], "big") == 3 * 32 + 2 * 2  # the height: two rows of frames, and bars below
    call("analyze", *checkpoint, *some, "--ablated-clips", "2", "--output", where("a"), "--budget", "2,4")
    analysis = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert all(len(values) == 6 for values in analysis["by_position"].values())

    call(*tokenize, run / "codes", "--budget", "4,2")
    call("report", "--workdir", run, "--output", where("page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "Numbers of codes" in page and "6.0 on average, 6 to 6" in page and "0.75" in page
    assert "The videos with the fewest codes" in page
    (run / "codes" / manifest["shards"][0]["file"]).write_bytes(b"PK")
    call("report", "--workdir", run, "--output", where("page.html"))
    assert "is damaged" in (tmp_path / "page.html").read_text()

    assert "budget 5 does not split into 2 equal blocks of the ladder; choose from 4, 8" in call(
        *tokenize, where("x"), "--budget", "5", code=2
    )
    assert "--cond-frames is for tokenizers without a ladder" in call(*tokenize, where("x"), "--cond-frames", 2, code=2)
    assert not (tmp_path / "x").exists()


def test_exports(run, adaptive, tmp_path, video, capsys):
    export = ["export", "--checkpoint", str(run), "--format"]
    assert cli.main([*export, "stablehlo", "--output", str(tmp_path / "hlo")]) == 0
    encode, decode = (
        jax.export.deserialize((tmp_path / "hlo" / f"{name}.bin").read_bytes()).call for name in ("encode", "decode")
    )
    lengths = np.array([[2, 4], [8, 4], [4, 2]], np.int32)
    codes, _ = adaptive.encode(video, budget=lengths)
    assert np.array_equal(encode(video.astype(np.float32) / 255, lengths), codes)
    np.testing.assert_allclose(decode(codes, lengths), adaptive.decode(codes, lengths), atol=1e-5)
    manifest = json.loads((tmp_path / "hlo" / "manifest.json").read_text())
    assert (manifest["blocks"], manifest["ladder"]) == (2, [2, 4, 8])
    assert cli.main([*export, "huggingface", "--output", str(tmp_path / "hf")]) == 2
    assert "the released layout does not support model.blocks=2, model.ladder=" in capsys.readouterr().err
