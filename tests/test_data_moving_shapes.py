import collections
import concurrent.futures
import multiprocessing

import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from larp_jax.data import ClipSpec, moving_shapes, open_source
from larp_jax.errors import InputError


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The data set with few clips, in a separate folder."""
    monkeypatch.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_made_on_first_use_and_read_again(small, capfd, monkeypatch):
    source = open_source("moving_shapes", ClipSpec(16, 32))
    assert capfd.readouterr().out == ""
    monkeypatch.setattr(moving_shapes, "_generate", None)  # a second generation would fail
    source = open_source("moving_shapes", ClipSpec(16, 32))
    assert len(source) == 32 and len(open_source("moving_shapes:test", ClipSpec(16, 20))) == 16
    assert source.label_names == moving_shapes.LABELS and "circle_orbit" in source.label_names
    for index in (0, 7, 31):
        expected, label = moving_shapes.render("train", index, 32)
        clip, read_label = source.read_clip(index, 8, ClipSpec(16, 32))
        np.testing.assert_array_equal(clip, expected[8:])
        assert read_label == label


def test_generation_keeps_no_split_in_memory(small, monkeypatch):
    """TFDS would need TensorFlow for splits larger than its buffer, which is a kilobyte here."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1024)
    monkeypatch.setattr(moving_shapes, "SHARD_CLIPS", 12)
    monkeypatch.setattr(shuffle._Bucket, "add", None)
    source = open_source("moving_shapes", ClipSpec(16, 32))
    assert len(source) == 32 and len(list(small.glob("moving_shapes/32/*/*train*"))) == 3
    for index in (0, 11, 12, 31):
        expected, label = moving_shapes.render("train", index, 32)
        np.testing.assert_array_equal(source.read_clip(index, 0, ClipSpec(24, 32))[0], expected)
        assert source.label(index) == label


def test_labels_are_balanced():
    for count in moving_shapes.SPLITS.values():
        labels = collections.Counter(number % len(moving_shapes.LABELS) for number in range(count))
        assert set(labels.values()) == {count // 16}


def test_clips_are_functions_of_split_and_number():
    clip, label = moving_shapes.render("train", 5, 32)
    again, _ = moving_shapes.render("train", 5, 32)
    np.testing.assert_array_equal(clip, again)
    assert (clip.shape, clip.dtype, label) == ((24, 32, 32, 3), np.uint8, 5)
    others = [moving_shapes.render("test", 5, 32)[0], moving_shapes.render("train", 21, 32)[0]]
    assert all(np.abs(clip.astype(int) - other).mean() > 5 for other in others)


def test_the_scene_is_the_same_at_every_size():
    small, large = (moving_shapes.render("train", 3, size)[0].astype(float) for size in (32, 64))
    shrunk = large.reshape(24, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small).mean() < 2


def centers(clip):
    """Position of the shape, [T, 2] as (x, y): the center of the difference from the median frame."""
    change = np.abs(clip.astype(float) - np.median(clip, axis=0)).sum(-1)
    change *= change > 60
    y, x = np.mgrid[: clip.shape[1], : clip.shape[2]]
    return np.stack([(change * axis).sum((1, 2)) / change.sum((1, 2)) for axis in (x, y)], axis=-1)


@pytest.mark.parametrize("number", range(16))
def test_motion_tells_the_class(number):
    clip, label = moving_shapes.render("test", number, 64)
    spread = np.cov((centers(clip)).T)
    major, minor = np.linalg.eigvalsh(spread)[::-1]
    motion = moving_shapes.LABELS[label].split("_")[1]
    assert (motion == "orbit") == (minor > 0.35 * major)
    if motion in ("horizontal", "vertical"):
        assert (spread[0, 0] > 5 * spread[1, 1]) == (motion == "horizontal")
    if motion == "diagonal":
        assert abs(spread[0, 1]) > 0.7 * np.sqrt(spread[0, 0] * spread[1, 1])


def make_small(root):
    moving_shapes.SPLITS = {"train": 128, "test": 16}
    import os

    os.environ["TFDS_DATA_DIR"] = root
    return moving_shapes.prepare("32", 32)


def test_two_processes_may_generate_it_at_once(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = list(pool.map(make_small, [str(tmp_path)] * 2))
    assert names == ["moving_shapes/32/1.0.0"] * 2
    assert [path.name for path in (tmp_path / "moving_shapes" / "32").iterdir()] == ["1.0.0"]


def test_errors(small, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="choose one of 32, 64, 128"):
        open_source("moving_shapes/65")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "tfds"))
    with pytest.raises(InputError, match="set TFDS_DATA_DIR to a folder with enough space"):
        open_source("moving_shapes")


def test_busy_clips_move_as_much_as_their_label_says(small):
    source = open_source("moving_shapes/busy:test", ClipSpec(24, 32))
    assert source.label_names == moving_shapes.BUSY_LABELS
    motion = collections.defaultdict(list)
    for index in range(14):
        clip, label = source.read_clip(index, 0, ClipSpec(24, 32))
        expected, moving = moving_shapes.render_busy("test", index, 32)
        assert np.array_equal(clip, expected) and label == moving == index % 7
        motion[label].append(np.abs(np.diff(clip.astype(float), axis=0)).mean())
        assert clip[0].std() > 5  # also a still clip has content
    means = [np.mean(motion[label]) for label in range(7)]
    assert means[0] == 0.0 and np.corrcoef(means, range(7))[0, 1] > 0.9
