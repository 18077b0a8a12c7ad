"""Runs and commands whose files are in a bucket: the same results as on a disk, through failures of the network."""

import json
import time

import chaos
import jax
import numpy as np
import pytest
from test_generate import write_generator
from test_train import as_if_killed, assert_same_weights, train

from larp_jax import cli, files, load_tokenizer, storage
from larp_jax.training import writers
from larp_jax.weights import checkpoint


@pytest.fixture
def copied(trained, tmp_path, bucket):
    """The run `trained` in a bucket, as kill -9 after its checkpoint of step 4 would have left it."""
    local = as_if_killed(trained, tmp_path / "run", newest=4)
    for name in files.listing(local):
        storage.upload(local / name, bucket / "run" / name)
    return bucket / "run"


def rows(workdir):
    return [chaos.without_times(row) for row in writers.read_metrics(workdir)]


@pytest.mark.slow
def test_a_run_continues_in_a_bucket(copied, trained, bucket_server):
    unfinished = copied / "checkpoints" / "5" / "params" / "half"
    files.write_bytes(unfinished, b"x")  # of a killed save
    (copied / "checkpoints" / "4" / checkpoint.COMMITTED).unlink()  # as earlier versions of Orbax left it on a disk
    assert checkpoint.steps(copied) == [2]
    assert train(copied) == 0
    assert rows(copied) == rows(trained)
    assert sorted(checkpoint.steps(copied)) == [2, 4, 6]
    assert_same_weights(copied, trained)
    kept = {name.split("/")[0] for name in files.listing(copied)} - {"tensorboard"}
    assert kept == {"checkpoints", "config.json", "mean_clip.npz", "media", "metrics.jsonl"}
    assert not any(name.startswith("checkpoints/5") for name in files.listing(copied))

    found = checkpoint.checksums(copied / "checkpoints" / "6")
    assert found and all(digest.startswith("md5:") for digest in found.values())
    local = bucket_server.root / copied.parent.name / "run" / "checkpoints"  # as after a copy to a disk
    assert not checkpoint.find_damage(local / "6") and not checkpoint.find_damage(local / "4")
    params = next(name for name in found if name.startswith("params/d/"))
    files.write_bytes(copied / "checkpoints" / "6" / params, b"damaged")
    assert checkpoint.find_damage(copied / "checkpoints" / "6") == f"{params} differs from its checksum"


def test_two_runs_in_one_workdir(copied, capsys, monkeypatch):
    monkeypatch.setattr(storage, "HEARTBEAT", 0.2)
    before = files.listing(copied).keys()
    with files.claim(copied):
        assert train(copied) == 2
        assert f"another process is writing --workdir {copied} (process " in capsys.readouterr().err
    assert files.listing(copied).keys() == before


@pytest.mark.slow
def test_commands_there_and_back(trained, tokenizer, bucket, tmp_path):
    def run(command):
        assert cli.main(command.split()) == 0

    for name in files.listing(trained):
        storage.upload(trained / name, bucket / "run" / name)
    run_in_bucket = bucket / "run"
    assert load_tokenizer(run_in_bucket).fingerprint == tokenizer.fingerprint
    few = "moving_shapes:test --max-clips=4 --batch-size=4"
    for place, p in ((bucket, run_in_bucket), (tmp_path, trained)):
        run(f"evaluate --checkpoint={p} --data={few} --metrics=psnr --output={place}/evaluation.json")
        run(f"tokenize --checkpoint={p} --input={few} --output={place}/codes")
        run(f"detokenize --checkpoint={p} --input={place}/codes --output={place}/again --batch-size=4")
        run(f"reconstruct --checkpoint={p} --input=moving_shapes:test --max-clips=1 --batch-size=4"
            f" --output={place}/shown")  # fmt: skip
        run(f"export --checkpoint={p} --format=codebook-npz --output={place}/codebook.npz")
        run(f"export --checkpoint={p} --format=huggingface --output={place}/exported")
        run(f"report --workdir={p} --output={place}/report.html")
    ours, theirs = (files.listing(place).keys() for place in (bucket, tmp_path))
    assert {name for name in ours if not name.startswith("run/")} == theirs
    assert (bucket / "codes" / "manifest.json").read_bytes() == (tmp_path / "codes" / "manifest.json").read_bytes()
    scores = [files.read_json(place / "evaluation.json")["metrics"] for place in (bucket, tmp_path)]
    assert scores[0] == scores[1]
    assert load_tokenizer(bucket / "exported").fingerprint == tokenizer.fingerprint
    run(f"export --checkpoint={trained} --format=codebook-npz --output={bucket}/codebook.npz")  # replaces its own


@pytest.mark.slow
def test_prepare_writes_to_a_bucket(bucket, tmp_path):
    chaos.make_videos(tmp_path / "videos")
    for place in (bucket, tmp_path):
        command = f"prepare --input={tmp_path}/videos --output={place}/prepared --size=32 --workers=1"
        assert cli.main(command.split()) == 0
    ours, theirs = (files.listing(place / "prepared") for place in (bucket, tmp_path))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (bucket / "prepared" / name).read_bytes() == (tmp_path / "prepared" / name).read_bytes(), name
    assert cli.main([*command.replace(str(tmp_path / "prepared"), str(bucket / "prepared")).split()]) == 0  # complete


@pytest.mark.slow
def test_samples_in_a_bucket(trained, tokenizer, bucket, tmp_path):
    generator = write_generator(tmp_path / "g", {"tokenizer_fingerprint": tokenizer.fingerprint})
    for name in files.listing(generator):
        storage.upload(generator / name, bucket / "g" / name)
    for place in (bucket, tmp_path):
        command = f"sample --checkpoint={place}/g --tokenizer={trained} --num=4 --batch-size=2 --output={place}/samples"
        assert cli.main(command.split()) == 0
    assert files.listing(bucket / "samples").keys() == files.listing(tmp_path / "samples").keys()
    assert json.loads((bucket / "samples" / "manifest.json").read_bytes()) == files.read_json(
        tmp_path / "samples" / "manifest.json"
    )
    (bucket / "samples" / "codes-00001-of-00002.npz").unlink()
    assert cli.main(command.replace(str(tmp_path / "samples"), str(bucket / "samples")).split()) == 0  # continues
    assert (bucket / "samples" / "codes-00001-of-00002.npz").exists()


@pytest.mark.slow
def test_the_server_is_away_during_a_save(copied, trained, bucket_server, short_pauses):
    """For 2 seconds, with a tenth of the usual pauses: as 20 seconds with those."""

    def seen(method, path):
        if method == "POST" and "checkpoints" in path and "6" in path and not bucket_server.faults.down_until:
            bucket_server.faults.down_until = time.monotonic() + 2

    bucket_server.faults.seen = seen
    assert train(copied) == 0
    assert bucket_server.faults.count
    assert rows(copied) == rows(trained)
    assert_same_weights(copied, trained)


@pytest.mark.slow
def test_requests_fail_at_random(copied, trained, bucket_server, short_pauses):
    damaged = next(name for name in files.listing(copied) if name.startswith("checkpoints/4/params/d/"))
    files.write_bytes(copied / damaged, b"damaged")
    bucket_server.faults.share = 0.05
    assert train(copied) == 0
    assert bucket_server.faults.count > 3
    bucket_server.faults.reset()
    assert rows(copied) == rows(trained)
    assert_same_weights(copied, trained)
    assert (copied / "checkpoints" / "4.damaged").is_dir() and sorted(checkpoint.steps(copied)) == [2, 4, 6]


@pytest.mark.slow
def test_training_goes_on_while_saves_fail(copied, trained, short_pauses, capsys, monkeypatch):
    """A permission that is lost and comes back: the last checkpoint is tried again."""
    failures = []

    def digests(directory):
        if len(failures) < 2:
            failures.append(directory)
            raise PermissionError(13, "Permission denied")
        write(directory)

    write = checkpoint.write_digests
    monkeypatch.setattr(checkpoint, "write_digests", digests)
    assert train(copied, "--config.keep=1") == 0
    said = capsys.readouterr().err
    assert "warning: checkpoint 6 cannot be written in gs://" in said and "training continues and will retry" in said
    assert len(failures) == 2 and checkpoint.steps(copied) == [6]  # older ones are removed
    assert_same_weights(copied, trained)


def test_arrays_of_a_state_survive_the_trip(bucket):
    """A checkpoint of one array, so that failures of larger tests can be told from those of the store."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    checkpoint.write_imported(bucket / "imported", {"stage": "tokenizer"}, {"tokenizer": {"x": jax.numpy.asarray(x)}})
    found = chaos.read(bucket / "imported" / "params")
    np.testing.assert_array_equal(next(iter(found.values())), x)
    assert checkpoint.read_metadata(bucket / "imported")["step"] == 0
