"""Tokenize and detokenize: codes on disk."""

import json

import numpy as np
import pytest
from data_helpers import moving_frames

import larp_jax
from larp_jax import cli, files
from larp_jax.config import Ladder
from larp_jax.data import ClipSpec, codes as codes_on_disk
from larp_jax.data.video import probe, read_windows, write_video
from larp_jax.errors import InputError
from larp_jax.inference.tokenize import detokenize, tokenize


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of the same name in two classes: 20 frames at 12 fps, and 5 frames at 30 fps."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count, fps in (("run/x.mp4", 20, 12.0), ("walk/x.mp4", 5, 30.0)):
        (folder / name).parent.mkdir()
        write_video(folder / name, moving_frames(count, seed=count), fps)
    return folder


@pytest.fixture
def codes(tokenizer, videos, tmp_path):
    tokenize(tokenizer, str(videos), tmp_path / "codes", batch_size=2, shard_rows=2)
    return tmp_path / "codes"


def test_what_is_written(tokenizer, videos, codes):
    assert sorted(path.name for path in codes.iterdir()) == [
        "codes-00000-of-00002.npz", "codes-00001-of-00002.npz", "manifest.json"
    ]  # fmt: skip
    manifest = codes_on_disk.read_manifest(codes)
    assert manifest["fingerprint"] == tokenizer.fingerprint
    assert (manifest["K"], manifest["N"], manifest["clip"]) == (32, 8, [8, 32, 32, 3])
    assert manifest["label_names"] == ["run", "walk"]
    assert manifest["rows"] == [
        {"source": "run/x.mp4", "start": 0, "frames": 8, "fps": 12.0, "label": 0},
        {"source": "run/x.mp4", "start": 8, "frames": 8, "fps": 12.0, "label": 0},
        {"source": "run/x.mp4", "start": 16, "frames": 4, "fps": 12.0, "label": 0},
        {"source": "walk/x.mp4", "start": 0, "frames": 5, "fps": 30.0, "label": 1},
    ]
    windows = [
        frames for name in ("run", "walk") for _, frames, _ in read_windows(videos / name / "x.mp4", ClipSpec(8, 32))
    ]
    stored = np.concatenate([np.load(codes / shard["file"])["codes"] for shard in manifest["shards"]])
    assert np.array_equal(stored, tokenizer.encode(np.stack(windows)))


def test_a_folder_of_version_1_is_read(tokenizer, codes, tmp_path):
    manifest = json.loads((codes / "manifest.json").read_text())
    assert (manifest["version"], manifest.pop("layout")) == (2, "fixed")
    before = codes_on_disk.CodeSet(codes).rows
    (codes / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    after = codes_on_disk.CodeSet(codes).rows
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert len(detokenize(tokenizer, codes, tmp_path / "out")) == 2


def test_tokenize_and_detokenize_on_the_command_line(trained, videos, tmp_path, capsys):
    codes, output = str(tmp_path / "codes"), tmp_path / "out"
    checkpoint = ["--checkpoint", str(trained)]
    assert cli.main(["tokenize", *checkpoint, "--input", str(videos), "--output", codes]) == 0
    assert "4 clips of 2 videos" in capsys.readouterr().out
    assert cli.main(["detokenize", *checkpoint, "--input", codes, "--output", str(output)]) == 0
    for name, frames, fps in (("run", 20, 12.0), ("walk", 5, 30.0)):
        info = probe(output / name / "x.mp4")
        assert (info.frames, info.fps, info.width, info.height) == (frames, fps, 32, 32)

    assert cli.main(["detokenize", *checkpoint, "--input", codes, "--output", str(output)]) == 2
    assert "x.mp4 exists; name another --output" in capsys.readouterr().err
    assert cli.main(["tokenize", *checkpoint, "--input", str(videos), "--output", codes]) == 2
    assert "already contains codes" in capsys.readouterr().err


def test_a_data_set(tokenizer, tmp_path):
    manifest = tokenize(tokenizer, "moving_shapes:test", tmp_path / "codes", max_clips=4)
    assert [row["source"] for row in manifest["rows"]] == [f"test_{i:06d}" for i in (0, 4, 8, 12)]
    assert [row["start"] for row in manifest["rows"]] == [8] * 4  # from the middle of 24 frames
    assert all(0 <= row["label"] < 16 for row in manifest["rows"])
    assert len(manifest["label_names"]) == 16
    written = detokenize(tokenizer, tmp_path / "codes", tmp_path / "out")
    assert [path.name for path in written] == [f"test_{i:06d}.mp4" for i in (0, 4, 8, 12)]


def test_windows_that_are_not_consecutive_become_separate_videos(tokenizer, codes, tmp_path):
    manifest = json.loads((codes / "manifest.json").read_text())
    manifest["rows"][2]["start"] = 80
    (codes / "manifest.json").write_text(json.dumps(manifest))
    written = detokenize(tokenizer, codes, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in written] == [
        "run/x.mp4", "run/x.mp4-000080.mp4", "walk/x.mp4"
    ]  # fmt: skip
    assert [probe(path).frames for path in written] == [16, 4, 5]


def test_codes_of_another_tokenizer(trained, codes, tmp_path):
    other = larp_jax.load_tokenizer(trained / "checkpoints" / "2")
    encoder = larp_jax.load_tokenizer(trained).fingerprint
    with pytest.raises(InputError, match=f"not of {other.fingerprint}; give the --checkpoint of {encoder}"):
        detokenize(other, codes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def in_rows(name, value):
    def change(manifest):
        manifest["rows"][1][name] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (in_rows("source", "../x.mp4"), "source of row 1"),
        (in_rows("source", "/x.mp4"), "source of row 1"),
        (in_rows("source", "a\\..\\x.mp4"), "source of row 1"),
        (in_rows("source", "a\0.mp4"), "source of row 1"),
        (in_rows("source", 7), "source of row 1"),
        (in_rows("frames", 9), "invalid start or frames of row 1"),
        (in_rows("start", -1), "invalid start or frames of row 1"),
        (in_rows("fps", "fast"), "invalid fps of row 1"),
        (in_rows("label", None), "invalid label of row 1"),
        (lambda m: m["rows"].pop(), "4 rows in shards, 3 listed"),
        (lambda m: m["shards"][0].update(file="../codes-0-of-1.npz"), "is not the name of a shard"),
        (lambda m: m.pop("fingerprint"), "no fingerprint"),
        (lambda m: m.update(version=4), "version 4, but only 1 to 3 are supported"),
        (lambda m: m.update(version=0), "version 0, but only 1 to 3 are supported"),
        (lambda m: m.update(version=True), "version True, but only 1 to 3 are supported"),
        (lambda m: m.update(layout="other"), "layout .other., not .fixed. or .packed."),
        (lambda m: m.update(format="x"), "is not a manifest of codes"),
        (lambda m: m.update(K=64), "K, N, clip or ladder are not those of the tokenizer"),
    ],
)
def test_manifests_that_are_wrong(tokenizer, codes, tmp_path, change, message):
    manifest = json.loads((codes / "manifest.json").read_text())
    change(manifest)
    (codes / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        detokenize(tokenizer, codes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_that_are_wrong(tokenizer, codes, tmp_path):
    shard = codes / "codes-00000-of-00002.npz"
    manifest = codes_on_disk.read_manifest(codes)
    good = shard.read_bytes()
    stored = np.load(shard)["codes"]

    def refused(message):
        with pytest.raises(InputError, match=message):
            codes_on_disk.read_shard(codes, manifest, 0)
        with pytest.raises(InputError, match=message):
            detokenize(tokenizer, codes, tmp_path / "out")

    shard.write_bytes(good[:50])
    refused("is damaged")
    shard.write_bytes(good[:200] + b"\xff" * 20 + good[220:])
    refused("is damaged")
    np.savez(shard, codes=np.array([{}], object))
    refused("contains object")
    np.savez(shard, other=stored)
    refused("is damaged")
    np.savez(shard, codes=stored[:-1])
    refused("contains int32")
    np.savez(shard, codes=stored.astype(np.float32))
    refused("contains float32")
    np.savez(shard, codes=stored + 32)
    refused(r"outside \[0, 32\)")
    shard.unlink()
    refused("is missing")


def test_folders_without_codes(tmp_path):
    with pytest.raises(InputError, match="is missing; give a folder that larp-jax tokenize completed"):
        codes_on_disk.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        codes_on_disk.read_manifest(tmp_path)


def test_a_failure_leaves_nothing(tokenizer, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, video: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(tokenizer, str(videos), tmp_path / "codes")
    assert not list((tmp_path / "codes").iterdir())


def test_only_one_process_writes_and_leftovers_are_replaced(tokenizer, videos, codes, tmp_path):
    output = tmp_path / "more"
    with files.claim(output):
        with pytest.raises(InputError, match="another process is writing --output"):
            tokenize(tokenizer, str(videos), output)
        with pytest.raises(InputError, match="another process is writing --output"):
            detokenize(tokenizer, codes, output)
    left = output / f"{files._prefix(output / 'shards')}{'0' * 16}.tmp"
    left.mkdir()
    (left / "0").write_bytes(b"half")
    (output / "codes-00000-of-00009.npz").write_bytes(b"PK")
    tokenize(tokenizer, str(videos), output, batch_size=2, shard_rows=2)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in codes.iterdir())
    (output / "manifest.json").rename(output / "settings.json")
    with pytest.raises(InputError, match="already contains the settings.json of an earlier call"):
        tokenize(tokenizer, str(videos), output)


@pytest.fixture
def packed(tmp_path):
    """A folder of packed codes, its codes [4, 12] and their lengths [4, 2]."""
    ladder, folder = Ladder((2, 4, 8), 2, 12), tmp_path / "packed"
    folder.mkdir()
    lengths = np.array([[2, 4], [8, 4], [2, 2], [4, 8]], np.int32)
    codes = np.random.default_rng(0).integers(1, 32, (4, 12)).astype(np.int32)
    codes *= np.arange(12) < lengths.sum(axis=1)[:, None]
    rows = [{"source": f"{i}.mp4", "start": 0, "frames": 8, "fps": 8.0, "label": -1} for i in range(4)]
    manifest = codes_on_disk.new_manifest(
        fingerprint="f", step=1, K=32, N=12, clip=(8, 32, 32, 3), sizes=[3, 1], adaptive=ladder, rows=rows
    )
    for shard, part in zip(manifest["shards"], (slice(3), slice(3, 4)), strict=True):
        codes_on_disk.write_shard(folder / shard["file"], {"codes": codes[part], "lengths": lengths[part]})
    codes_on_disk.write_manifest(folder, manifest)
    return folder, codes, lengths


def test_codes_of_different_lengths(packed):
    folder, codes, lengths = packed
    stored = np.load(folder / "codes-00000-of-00002.npz")
    assert stored["offsets"].tolist() == [0, 6, 18, 22] and len(stored["codes"]) == 22
    found = codes_on_disk.CodeSet(folder)
    assert codes_on_disk.ladder_of(found.manifest) == Ladder((2, 4, 8), 2, 12)
    assert np.array_equal(found.rows["codes"], codes) and np.array_equal(found.rows["lengths"], lengths)
    batch = next(found.batches(batch_size=4, seed=0))
    rows = [codes.tolist().index(row.tolist()) for row in batch["codes"]]
    assert sorted(rows) == [0, 1, 2, 3] and np.array_equal(batch["lengths"], lengths[rows])


def test_codes_that_contradict_their_lengths(packed):
    folder = packed[0]
    shard = folder / "codes-00000-of-00002.npz"
    manifest, good = codes_on_disk.read_manifest(folder), dict(np.load(shard))

    def refused(message, **changes):
        np.savez(shard, **good | changes)
        with pytest.raises(InputError, match=message):
            codes_on_disk.read_shard(folder, manifest, 0)

    refused("has 21 codes, but 22 by its lengths", codes=good["codes"][:-1])
    refused("row 1 has 8,3 codes, not an assignment", lengths=np.array([[2, 4], [8, 3], [2, 2]], np.int32))
    refused("row 0 has 8,8 codes, not an assignment", lengths=np.array([[8, 8], [8, 4], [2, 2]], np.int32))
    refused("the offsets contradict the lengths", lengths=np.array([[4, 4], [8, 4], [2, 2]], np.int32))
    refused("the offsets contradict the lengths", offsets=good["offsets"] + 1)
    refused(r"outside \[0, 32\)", codes=good["codes"] + 31)
    refused("contains int64", lengths=good["lengths"].astype(np.int64))
    for change, message in (
        ({"ladder": [2, 4, 99]}, "does not fit model.num_tokens=12"),
        ({"ladder": []}, "no blocks or no ladder"),
        ({"blocks": None}, "no blocks or no ladder"),
        ({"blocks": 2**30}, "does not fit"),
        ({"N": 2**30}, "N is above"),
        ({"cond_frames": 3}, "packed codes have no cond_frames"),
    ):
        codes_on_disk.write_manifest(folder, manifest | change)
        with pytest.raises(InputError, match=message):
            codes_on_disk.read_manifest(folder)
