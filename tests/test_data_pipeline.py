import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from data_helpers import moving_frames
from hypothesis import given, strategies as st

from larp_jax.data import ClipSpec, eval_batches, pipeline, train_batches, video
from larp_jax.errors import InputError
from larp_jax.tools.benchmark import benchmark_data, format_table

CLIP = ClipSpec(8, 32)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A folder of 7 videos of 5, 12, ..., 47 frames in 2 classes."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(7):
        path = folder / "ab"[i % 2] / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        video.write_video(path, moving_frames(5 + 7 * i, seed=i), 10)
    return f"folder:{folder}"


def take(spec, count, **options):
    with train_batches(spec, CLIP, **{"batch_size": 4, "seed": 3, **options}) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch["video"], other["video"])
        np.testing.assert_array_equal(batch["label"], other["label"])


@pytest.fixture(scope="module")
def reference(spec):
    return take(spec, 6)


def test_batches(reference):
    for batch in reference:
        assert batch["video"].shape == (4, *CLIP.shape) and batch["video"].dtype == np.uint8
        assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    assert {label for batch in reference for label in batch["label"]} == {0, 1}


def test_data_is_a_function_of_seed_and_step(spec, reference):
    assert_same(take(spec, 6), reference)
    assert_same(take(spec, 2, start_step=4), reference[4:])
    assert not np.array_equal(take(spec, 1, seed=4)[0]["video"], reference[0]["video"])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(spec, reference, workers):
    assert_same(take(spec, 3, workers=workers, start_step=1), reference[1:4])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_batch(spec, reference, count):
    parts = [take(spec, 3, process_index=index, process_count=count) for index in range(count)]
    together = [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(together, reference[:3])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000), st.integers(0, 100))
def test_rows_of_processes_tile_the_batch(local, processes, start, step):
    batch = local * processes
    rows = [pipeline._LocalRows(batch, index, processes, start) for index in range(processes)]
    numbers = [row(step * local + i) for row in rows for i in range(local)]
    assert numbers == list(range((start + step) * batch, (start + step + 1) * batch))
    assert all(row.local == local for row in rows)


def test_batches_must_split(spec):
    with pytest.raises(InputError, match=r"data\.batch_size=5 does not split evenly over 2"):
        train_batches(spec, CLIP, batch_size=5, seed=0, process_count=2)


class OneVideo:
    """A source of one video whose frames are numbered in their left half; the right half is black."""

    label_names, skipped = (), []

    def __len__(self):
        return 1

    def read_clip(self, index, start, clip):
        start = 1 + int(start.integers(100))
        frames = np.zeros(clip.shape, np.uint8)
        frames[:, :, : clip.resolution // 2] = (start + np.arange(clip.frames))[:, None, None, None]
        return frames, 5


def test_flips_are_whole_clips_and_half_of_them():
    read = pipeline.ReadClip(OneVideo(), CLIP)
    clips = [read(0, np.random.default_rng(i))["video"] for i in range(400)]
    flipped = [bool(clip[0, 0, -1, 0]) or not clip[0, 0, 0, 0] for clip in clips]
    for clip, is_flipped in zip(clips, flipped, strict=True):
        half = clip[:, :, 16:] if is_flipped else clip[:, :, :16]
        np.testing.assert_array_equal(np.diff(half[:, 0, 0, 0].astype(int)), 1)
    assert 150 < sum(flipped) < 250
    read = pipeline.ReadClip(OneVideo(), ClipSpec(8, 32, flip=False))
    assert not any(read(0, np.random.default_rng(i))["video"][:, :, 16:].any() for i in range(50))


def test_videos_that_fail_later_are_replaced_and_named_once(spec, tmp_path, caplog):
    for i in range(3):
        video.write_video(tmp_path / f"{i}.mp4", moving_frames(10, seed=i), 10)

    def batches():
        iterator = train_batches(f"folder:{tmp_path}", CLIP, batch_size=3, seed=0)
        (tmp_path / "1.mp4").rename(tmp_path / "away")
        with iterator:
            taken = [next(iterator) for _ in range(4)]
        (tmp_path / "away").rename(tmp_path / "1.mp4")
        return taken

    with caplog.at_level(logging.WARNING):
        first = batches()
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("another video replaces 1.mp4: ") and len(said) == 2
    count, _, rest = said[1].partition(" ")
    assert int(count) > 1 and rest == "clips were replaced because their videos could not be read: 1.mp4"
    assert_same(batches(), first)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_video_is_an_error(tmp_path, workers):
    video.write_video(tmp_path / "a.mp4", moving_frames(10), 10)
    with train_batches(f"folder:{tmp_path}", CLIP, batch_size=2, seed=0, workers=workers) as batches:
        (tmp_path / "a.mp4").unlink()
        with pytest.raises(InputError, match="100 sampled videos in a row"):
            next(batches)


def evaluate(spec, **options):
    with eval_batches(spec, CLIP, **{"batch_size": 4, **options}) as batches:
        return list(batches)


def column(batches, name):
    return [value for batch in batches for value in batch[name]]


def test_evaluation_reads_every_window_once(spec):
    batches = evaluate(spec)
    mask = np.array(column(batches, "mask"))
    assert all(batch["video"].shape == (4, *CLIP.shape) for batch in batches)
    assert {k: v.dtype for k, v in batches[0].items() if k != "name"} == {
        "video": np.uint8,
        "label": np.int32,
        "mask": np.float32,
        "index": np.int32,
        "start": np.int32,
        "fps": np.float32,
    }
    real = [
        (name, int(start))
        for name, start, m in zip(column(batches, "name"), column(batches, "start"), mask, strict=True)
        if m
    ]
    frames = {f"{'ab'[i % 2]}/{i}.mp4": 5 + 7 * i for i in range(7)}
    assert real == [(n, 8 * w) for n in sorted(frames) for w in range(max(1, frames[n] // 8))]
    assert mask[: len(real)].all() and not mask[len(real) :].any()
    assert {float(fps) for fps in column(batches, "fps")} == {10.0}
    assert not np.concatenate([batch["video"][batch["mask"] == 0] for batch in batches]).any()


def test_evaluation_does_not_depend_on_flip_or_processes(spec):
    whole = evaluate(spec)
    parts = [evaluate(spec, process_index=index, process_count=2) for index in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, *halves in zip(whole, *parts, strict=True):
        for name in ("video", "label", "mask", "start"):
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), batch[name])


@pytest.mark.parametrize("max_clips", [1, 3, 7, 10, 100])
def test_fewer_clips_are_spread_over_the_videos(spec, max_clips):
    batches = evaluate(spec, max_clips=max_clips)
    mask = np.array(column(batches, "mask"), bool)
    index = np.array(column(batches, "index"))[mask]
    assert mask.sum() == min(max_clips, 21)
    assert len(set(index)) == min(max_clips, 7) or max_clips == 10
    assert len(set(index)) >= min(max_clips, 5)


def test_windows_that_cannot_be_read_are_padding(tmp_path, caplog):
    for i in range(2):
        video.write_video(tmp_path / f"{i}.mp4", moving_frames(16, seed=i), 10)
    batches = eval_batches(f"folder:{tmp_path}", CLIP, batch_size=4)
    (tmp_path / "0.mp4").unlink()
    with batches:
        (batch,) = batches
    assert batch["mask"].tolist() == [0, 0, 1, 1]
    assert "left out of the evaluation: frame 0 of 0.mp4" in caplog.text


def test_closing_ends_the_threads(spec):
    before = threading.active_count()
    take(spec, 1)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_that_does_not_close_still_ends_without_messages(spec, workers, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from larp_jax.data import ClipSpec, train_batches\n"
        "if __name__ == '__main__':\n"
        f"    batches = train_batches({spec!r}, ClipSpec(8, 32), batch_size=4, seed=0, workers={workers})\n"
        "    print(next(batches)['video'].shape)\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "(4, 8, 32, 32, 3)\n"
    assert result.stderr == ""


def test_benchmark(spec):
    result = benchmark_data(spec, CLIP, batch_size=4, seconds=0.2)
    assert result["slowest_window"] <= result["clips_per_second"] <= result["fastest_window"]
    assert result["videos"] == 7 and result["read_clip_ms"] > 0
    assert "clips per second" in format_table(result)
