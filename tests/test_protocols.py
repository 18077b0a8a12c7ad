"""Protocols choose the documented clips and refuse other data."""

import random
import shutil

import pytest
from data_helpers import moving_frames

from larp_jax import cli
from larp_jax.data import ClipSpec, sources
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.evaluation.protocols import GENERATION, RECONSTRUCTION, ClipSet, Protocol

CLIP = ClipSpec(frames=4, resolution=16, flip=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i, frames in enumerate((13, 3, 21)):
        write_video(folder / f"{i}.mp4", moving_frames(frames, 16, 24, seed=i), 8.0)
    return folder


WINDOWS = [(0, 0), (0, 4), (0, 8), (1, 0), (2, 0), (2, 4), (2, 8), (2, 12), (2, 16)]


def clips(folder, *protocol, **options):
    return ClipSet(f"folder:{folder}", CLIP, *protocol, **options)


def refusal(folder, *protocol, **options):
    with pytest.raises(InputError) as caught:
        clips(folder, *protocol, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_windows(folder):
    assert clips(folder).windows == WINDOWS
    assert len(clips(folder, max_clips=4)) == 4
    assert clips(folder).describe()["seed"] is None


def test_the_data_set_is_opened_once(folder, monkeypatch):
    chosen = clips(folder)
    monkeypatch.setattr(sources, "FolderSource", None)  # opening it would fail
    for _ in range(2):
        with chosen.batches(4) as batches:
            assert sum(batch["mask"].sum() for batch in batches) == len(WINDOWS)


def test_windows_are_sampled_as_by_python(folder):
    sampled = clips(folder, Protocol(count=5, seed=42), name="some")
    full = [window for window in WINDOWS if window[0] != 1]  # video 1 is shorter than a clip
    assert sampled.windows == [full[i] for i in random.Random(42).sample(range(len(full)), 5)]
    with sampled.batches(5) as batches:
        batch = next(batches)
    assert list(zip(batch["index"], batch["start"], strict=True)) == sampled.windows
    assert "samples 10 windows" in refusal(folder, Protocol(count=10), name="some")


def test_one_clip_of_each(folder):
    protocol = Protocol(clips="one_of_each")
    chosen = clips(folder, protocol)
    assert [video for video, _ in chosen.windows] == [0, 1, 2]
    assert all(0 <= start <= last for (_, start), last in zip(chosen.windows, (9, 0, 17), strict=True))
    assert clips(folder, protocol).windows == chosen.windows
    assert clips(folder, Protocol(clips="one_of_each", seed=1)).windows != chosen.windows


@pytest.mark.parametrize("name", [*GENERATION, "larp_ucf101"])
def test_published_protocols_accept_only_their_split_and_size(name, folder, caplog):
    protocol = (GENERATION | RECONSTRUCTION)[name]
    assert "16x128x128, not 4x16x16" in refusal(folder, protocol, name=name)
    full = ClipSpec(frames=16, resolution=128, flip=False)
    for spec, options, message in (
        ("tfds:ucf101:test", {}, "names another"),
        (f"folder:{folder}", {"max_clips": 2}, "--max-clips"),
    ):
        with pytest.raises(InputError, match=message):
            ClipSet(spec, full, protocol, name=name, **options)


def test_another_number_of_videos_is_warned_of(folder, caplog):
    chosen = clips(folder, Protocol(videos=9537), name="some")
    assert "is defined for 9537 videos" in caplog.text and "has 3" in caplog.text
    assert chosen.describe()["videos_of_the_protocol"] == 9537


def test_held_out_leaves_out_training_videos(folder, tmp_path):
    held_out = RECONSTRUCTION["held_out"]
    shutil.copy(folder / "2.mp4", tmp_path / "renamed.mp4")
    write_video(tmp_path / "other.mp4", moving_frames(9, 16, 24, seed=9), 8.0)
    chosen = clips(folder, held_out, name="held_out", training=f"folder:{tmp_path}")
    assert chosen.windows == [window for window in WINDOWS if window[0] != 2]
    described = chosen.describe()
    assert described["videos_left_out_as_trained_on"] == 1
    assert described["training_data"] == f"folder:{tmp_path}"
    assert len(clips(folder, held_out, training=f"folder:{tmp_path}", max_clips=3)) == 3

    assert "--training-data" in refusal(folder, held_out, name="held_out")
    assert "cannot be opened" in refusal(folder, held_out, name="held_out", training=f"folder:{tmp_path / 'no'}")
    assert "every video" in refusal(folder, held_out, name="held_out", training=f"folder:{folder}")


def test_the_digest_is_of_content(folder, tmp_path):
    digest = clips(folder).digest()
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert clips(copy).digest() == digest
    assert clips(folder, max_clips=2).digest() != digest
    assert ClipSet(f"folder:{folder}", ClipSpec(frames=4, resolution=8)).digest() != digest


def test_the_command_offers_the_protocols(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert "{" + ",".join([*RECONSTRUCTION, *GENERATION]) + "}" in capsys.readouterr().out
