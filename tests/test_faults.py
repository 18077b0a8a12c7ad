"""Faults outside the program: each gives a one-line message and the right exit code, and loses no finished work."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import chaos
import numpy as np
import pytest
from data_helpers import moving_frames
from test_train import as_if_killed, assert_same_weights, steps, train

from larp_jax.data import ClipSpec, limits, pipeline, random_access, train_batches, video
from larp_jax.errors import InputError
from larp_jax.state import TrainState
from larp_jax.weights import checkpoint


def fails(code, capsys, workdir, *overrides):
    """The line of the error that training ends with."""
    assert train(workdir, *overrides) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("larp-jax: error: ")
    return last


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------- the workdir


def test_two_runs_in_one_workdir(trained, tmp_path, capsys):
    workdir = as_if_killed(trained, tmp_path / "run", newest=4)
    before = (workdir / "metrics.jsonl").read_bytes()
    with checkpoint.claim(workdir):
        assert "another process is writing --workdir" in fails(2, capsys, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before and steps(workdir) == [2, 4]


def test_the_lock_does_not_outlive_a_killed_process(tmp_path):
    code = "import sys, time; from larp_jax.weights import checkpoint\n"
    code += "with checkpoint.claim(sys.argv[1]): print('mine', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match="another process is writing"), checkpoint.claim(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with checkpoint.claim(tmp_path):
        pass


def test_a_workdir_that_cannot_be_written(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot be created (Not a directory)" in fails(2, capsys, tmp_path / "file" / "run")

    def read_only(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *arguments, **options)

    opened = os.open
    monkeypatch.setattr(os, "open", read_only)
    assert f"--workdir {trained} cannot be written (Read-only file system)" in fails(2, capsys, trained)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
def test_training_resumes_before_damaged_checkpoints(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    checkpoints = workdir / "checkpoints"
    flip_a_bit(largest_file(checkpoints / "6" / "params"))
    # one of an earlier version, cut short
    (checkpoints / "4" / checkpoint.CHECKSUMS).unlink()
    metadata = checkpoints / "4" / "metadata" / "metadata"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "items": []}))
    os.truncate(largest_file(checkpoints / "4" / "optimizer"), 100)
    assert train(workdir) == 0
    said = capsys.readouterr().err
    assert "warning: checkpoint 6 is damaged (params/" in said
    assert "differs from its checksum) and renamed to 6.damaged; continuing from 2" in said
    assert "warning: checkpoint 4 is damaged (" in said and " and renamed to 4.damaged; continuing from 2" in said
    assert steps(workdir) == [2, 4, 6] and {path.name for path in checkpoints.glob("*.damaged")} == {
        "4.damaged", "6.damaged"
    }  # fmt: skip
    assert chaos.rows(workdir) == chaos.rows(trained)
    assert_same_weights(workdir, trained)


def test_without_a_valid_checkpoint_nothing_is_changed(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for step in steps(workdir):
        flip_a_bit(largest_file(workdir / "checkpoints" / str(step) / "optimizer"))
    message = fails(2, capsys, workdir)
    assert "can be read (the newest, 6: optimizer/" in message and "differs from its checksum" in message
    assert steps(workdir) == [2, 4, 6] and chaos.rows(workdir) == chaos.rows(trained)


def test_damage_shows_when_a_checkpoint_is_used(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    flip_a_bit(largest_file(workdir / "checkpoints" / "6" / "ema"))
    with pytest.raises(InputError, match="checkpoint .*/6 is damaged .* use another step"):
        checkpoint.load(workdir)
    assert checkpoint.load(workdir / "checkpoints" / "4").step == 4
    (workdir / checkpoint.MEAN_CLIP).write_bytes(b"PK")
    with pytest.raises(InputError, match="mean_clip.npz is damaged"):
        checkpoint.load(workdir / "checkpoints" / "4")


@pytest.mark.slow
def test_the_best_checkpoint_survives_restarts(tmp_path):
    def save(**scores):
        manager = checkpoint.CheckpointManager(tmp_path, keep=1, best_metric="psnr")
        for step, value in scores.items():
            state = TrainState(np.int32(int(step[1:])), {"a": {"x": np.ones(3, np.float32)}}, {}, {})
            manager.save(state, {"config": {}}, {} if value is None else {"psnr": value})
        manager.close()
        return sorted(checkpoint.steps(tmp_path))

    assert save(_1=1.0, _2=5.0, _3=2.0) == [2, 3]
    assert save(_4=None) == [2, 4]
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text('{"ps')
    assert save(_5=3.0) == [5]
    assert save(_6=4.0, _7=1.0) == [6, 7]


def test_a_full_disk(trained, tmp_path, capsys):
    workdir = as_if_killed(trained, tmp_path / "run", newest=2)
    limit = max(path.stat().st_size for path in (workdir / "metrics.jsonl", workdir / "config.json")) + 4096
    assert largest_file(workdir / "checkpoints" / "2").stat().st_size > limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # files cannot grow, as on a full disk
    try:
        code = train(workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = capsys.readouterr().err.splitlines()
    assert code == 1
    assert sum(line.startswith("warning: checkpoint 4 cannot be written in ") for line in lines) == 1
    assert lines[-1].startswith("larp-jax: error: checkpoint 6 cannot be written in ") and "File too large" in lines[-1]
    assert lines[-1].endswith("the newest is 2. Free some space, and the same command continues")
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert not checkpoint.find_damage(workdir / "checkpoints" / "2")
    assert train(workdir) == 0
    assert chaos.rows(workdir) == chaos.rows(trained)
    assert_same_weights(workdir, trained)


# --------------------------------------------------------------------------------------------------------------- videos


@pytest.fixture
def videos(tmp_path):
    for i in range(3):
        video.write_video(tmp_path / f"{i}.mp4", moving_frames(10, seed=i), 10)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_that_hangs_is_abandoned(videos, caplog, monkeypatch, workers):
    monkeypatch.setenv(limits.VARIABLE, "0.5")
    batches = train_batches(f"folder:{videos}", ClipSpec(8, 32), batch_size=3, seed=0, workers=workers)
    (videos / "1.mp4").unlink()
    os.mkfifo(videos / "1.mp4")  # opening it waits forever for a writer
    with batches:
        for _ in range(6):  # two epochs
            assert next(batches)["video"].shape == (3, 8, 32, 32, 3)
    first, last = (record.getMessage() for record in caplog.records if record.name == pipeline.__name__)
    assert first.startswith("another video replaces 1.mp4: ")
    assert "took longer than 0.5 seconds; replace the file or leave it out, or raise LARP_VIDEO_TIME_LIMIT" in first
    assert last.endswith("clips were replaced because their videos could not be read: 1.mp4")


def test_the_time_limit_of_each_way_to_read(videos, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "0.2")
    file = video.VideoFile(videos / "0.mp4")
    (videos / "0.mp4").unlink()
    os.mkfifo(videos / "0.mp4")
    for read in (
        lambda: file.read(0, 8, 32),
        lambda: video.probe(videos / "0.mp4"),
        lambda: next(video.read_windows(videos / "0.mp4", ClipSpec(8, 32))),
    ):
        with pytest.raises(InputError, match=r"0\.mp4: reading took longer than 0\.2 seconds"):
            read()
    monkeypatch.setattr(random_access, "within_limit", None)  # the video is not read again
    with pytest.raises(InputError, match="took longer"):
        file.read(0, 8, 32)
    monkeypatch.setenv(limits.VARIABLE, "soon")
    with pytest.raises(InputError, match="LARP_VIDEO_TIME_LIMIT=soon must be a number of seconds"):
        limits.time_limit()


def test_frames_of_absurd_size_are_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    video.write_video(path, moving_frames(3, 64, 64), 10)
    assert video.probe(path).width == 64
    monkeypatch.setattr(video, "LIMITS", {"max_pixels": str(63 * 64)})
    with pytest.raises(InputError, match=r"a\.mp4: "):
        video.probe(path)
