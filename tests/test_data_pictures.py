"""A folder of pictures is a video, for everything that reads videos."""

import fractions
import json
import logging
import os
import pathlib
import pickle
import shutil
import sys

import av
import numpy as np
import pytest
from data_helpers import moving_frames

from larp_jax import cli
from larp_jax.data import ClipSpec, limits, open_source, pictures, video
from larp_jax.data.folders import find_videos
from larp_jax.data.inputs import Inputs
from larp_jax.data.listing import list_videos
from larp_jax.data.prepare import Settings, prepare
from larp_jax.data.sources import same_videos
from larp_jax.errors import InputError
from larp_jax.evaluation.protocols import ClipSet

CONFIG = pathlib.Path(__file__).parent / "configs" / "tiny.py"
ENCODERS = {
    ".png": ("png", "rgb24", {}),
    ".BMP": ("bmp", "bgr24", {}),
    ".webp": ("libwebp", "bgra", {"lossless": "1"}),
    ".jpg": ("mjpeg", "yuvj444p", {"qmin": "1", "qmax": "1"}),
}


def encode(image, suffix=".png"):
    codec, pixel_format, options = ENCODERS[suffix]
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base, encoder.options = pixel_format, fractions.Fraction(1), options
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image)).reformat(format=pixel_format)
    return b"".join(map(bytes, encoder.encode(frame) + encoder.encode(None)))


def write(folder, frames, name="{:03}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(frames):
        file = folder / name.format(number)
        file.write_bytes(encode(image, file.suffix))
    return folder


def streamed(path, clip, **options):
    return np.concatenate([frames[:valid] for _, frames, valid in pictures.read_windows(path, clip, **options)])


@pytest.mark.parametrize(
    "name", ["{:03}.png", "frame_{}.BMP", "clip7-{:04}.webp", "{}.{:06}.jpg".format("{0:05}", 0)], ids=str
)
def test_frames_are_the_pictures_in_the_order_of_their_numbers(tmp_path, name):
    frames = moving_frames(12, 32, 32)  # frame_10 comes after frame_9
    folder = write(tmp_path / "clip:0", frames, name)
    for other in ("notes.txt", ".hidden5.png", "cover.png", "thumb_1.png"):
        (folder / other).write_bytes(b"no frame")
    file = pictures.open_video(folder)
    assert (file.info.frames, file.info.fps, file.info.width, file.info.height) == (12, 25.0, 32, 32)
    tolerance = 8 if name.endswith(".jpg") else 0
    for start, count in ((0, 12), (9, 3), (2, 1)):
        read = pickle.loads(pickle.dumps(file)).read(start, count, (32, 32), exact=True)
        np.testing.assert_allclose(read.astype(int), frames[start : start + count].astype(int), atol=tolerance)
    np.testing.assert_array_equal(streamed(folder, ClipSpec(5, 32)), file.read(0, 12, (32, 32)))
    np.testing.assert_array_equal(file.read(0, 12, (16, 16)), streamed(folder, ClipSpec(4, 16)))


def test_missing_numbers_and_ends(tmp_path):
    frames = moving_frames(6, 32, 32)
    folder = write(tmp_path, frames)
    (folder / "002.png").unlink()
    (folder / "004.png").unlink()
    file = pictures.open_video(folder)
    np.testing.assert_array_equal(file.read(1, 3, (32, 32), exact=True), frames[[1, 3, 5]])
    np.testing.assert_array_equal(file.read(3, 2, (32, 32)), frames[[3, 5]])  # the last two
    assert len(file.read(0, 9, (32, 32), exact=True)) == 4
    with pytest.raises(InputError, match="ends after 4 frames, before frame 5"):
        file.read(3, 2, (32, 32), exact=True)


@pytest.mark.parametrize("sampling", [{"fps": 10.0}, {"fps": 50.0}, {"stride": 3}], ids=str)
def test_pictures_are_sampled_like_videos_of_25_frames_per_second(tmp_path, sampling):
    frames = moving_frames(13, 16, 16)
    clip = ClipSpec(4, 16, **sampling)
    file = pictures.open_video(write(tmp_path, frames), clip)
    if fps := sampling.get("fps"):
        numbers = [int(k / fps * 25 + 1e-6) for k in range(int(12 / 25 * fps) + 1)]
    else:
        numbers = list(range(0, 13, 3))
    assert (file.info.frames, file.info.fps) == (len(numbers), fps or 25 / 3)
    np.testing.assert_array_equal(file.read(1, 4, (16, 16), exact=True), frames[numbers[1:5]])
    np.testing.assert_array_equal(streamed(tmp_path, clip), frames[numbers])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_picture_ends_the_video(tmp_path, suffix, caplog, monkeypatch):
    folder = write(tmp_path / "v", moving_frames(20, 32, 32), f"{{:02}}{suffix}")
    frames = pictures.open_video(folder).read(0, 20, (32, 32))
    damaged = folder / f"09{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-20])  # as an interrupted copy leaves it
    file = pictures.open_video(folder)
    np.testing.assert_array_equal(file.read(10, 4, (32, 32), exact=True), frames[10:14])  # needs no damaged picture
    np.testing.assert_array_equal(file.read(8, 4, (32, 32)), frames[5:9])
    with pytest.raises(InputError, match=r"v: ends after 9 frames, before frame 12"):
        file.read(8, 4, (32, 32), exact=True)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(streamed(folder, ClipSpec(4, 32)), frames[:9])
    assert "9 of 20 frames can be decoded" in caplog.text
    (folder / f"00{suffix}").unlink()
    (folder / f"01{suffix}").write_bytes(b"")
    with pytest.raises(InputError, match=rf"/v: 01\{suffix}: cannot be read as a picture \("):
        pictures.open_video(folder)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "av", None)
        with pytest.raises(InputError, match="pip install av"):
            pictures.open_video(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="v: no frame of it can be decoded"):
        file.read(8, 4, (32, 32))


def test_a_picture_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "0.2")
    file = pictures.open_video(write(tmp_path, moving_frames(4, 16, 16)))
    (tmp_path / "002.png").unlink()
    os.mkfifo(tmp_path / "002.png")
    with pytest.raises(InputError, match=r"reading took longer than 0\.2 seconds"):
        file.read(1, 3, (16, 16))
    (tmp_path / "002.png").unlink()
    with pytest.raises(InputError, match="took longer"):  # it is not read again
        file.read(1, 3, (16, 16))


def test_pictures_of_several_sizes_get_the_size_of_the_first(tmp_path):
    write(tmp_path, [np.full(shape, 99, np.uint8) for shape in ((20, 30, 3), (40, 60, 3), (31, 31, 3))])
    turned = pytest.importorskip("PIL.Image")
    exif = turned.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], 20, axis=0).repeat(3, axis=2)
    turned.fromarray(wide).save(tmp_path / "003.PNG", exif=exif)
    for length in (4, 1):  # also if each is in a window of its own
        frames = streamed(tmp_path, ClipSpec(length, 16), whole=True)
        assert frames.shape == (4, 20, 30, 3) and (np.abs(frames[:3].astype(int) - 99) <= 1).all()
        assert frames[3, -1].mean() - frames[3, 0].mean() > 200  # what was left is up
    assert pictures.open_video(tmp_path).read(0, 4, (16, 16)).shape == (4, 16, 16, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Classes of video files and of folders of pictures, and pictures that are no video."""
    folder = tmp_path_factory.mktemp("videos")
    frames = moving_frames(12, 32, 32)
    write(folder / "walk" / "clip10", frames)
    write(folder / "walk" / "clip2.v1" / "rgb", frames[::-1])
    write(folder / "run" / "clip", frames[:9])
    video.write_video(folder / "run" / "a.mp4", frames, 10)
    write(folder / "run", frames[:3], "preview{}.png")  # beside a video
    write(folder / "walk", frames[:2], "{}.png")  # above videos
    write(folder / "walk" / "one", frames[:1])
    write(folder / "walk" / ".thumbs", frames[:2])
    write(write(folder / "walk" / "stereo", frames[:2], "left{}.png"), frames[:2], "right{}.png")
    return folder


VIDEOS = ["run/a.mp4", "run/clip", "walk/clip10", "walk/clip2.v1/rgb"]


def test_folders_of_pictures_are_videos_of_their_class(folder, caplog):
    found = find_videos(folder)
    assert [found.name(path) for path in found.paths] == VIDEOS
    (record,) = caplog.records
    assert record.getMessage().endswith("their pictures have names of several kinds: walk/stereo")
    source, inputs = open_source(f"folder:{folder}"), Inputs(str(folder), ClipSpec(8, 32))
    assert source.label_names == ("run", "walk") and [source.label(i) for i in range(4)] == [0, 0, 1, 1]
    assert [source.name(i) for i in range(4)] == [one.name for one in inputs.videos] == VIDEOS
    frames = moving_frames(12, 32, 32)
    clip, label = source.read_clip(3, 1, ClipSpec(8, 32))
    np.testing.assert_array_equal(clip, frames[::-1][1:9])
    found = [(VIDEOS[w.video], w.start, w.valid, w.label) for rows, _ in inputs.batches(4) for w in rows]
    assert found[2:] == [(name, start, valid, label) for name, label, windows in (
        ("run/clip", 0, ((0, 8), (8, 1))), (VIDEOS[2], 1, ((0, 8), (8, 4))), (VIDEOS[3], 1, ((0, 8), (8, 4)))
    ) for start, valid in windows]  # fmt: skip


def test_a_warning_says_that_classes_of_pictures_are_read_as_videos(tmp_path, caplog):
    for split in ("train", "test"):
        write(tmp_path / split / "cat", moving_frames(2, 16, 16))
        write(tmp_path / split / "dog", moving_frames(3, 16, 16))
    for folder, names in ((tmp_path, "test/cat, test/dog, train/cat, train/dog"), (tmp_path / "train", "cat, dog")):
        caplog.clear()
        assert find_videos(folder).label_names == ()
        (record,) = caplog.records
        said = record.getMessage()
        assert said.startswith(f"{folder}: folders of pictures that are read as one video each, without a class")
        assert "CLASS/VIDEO/001.jpg" in said and said.endswith(f": {names}") and len(said.splitlines()) == 1
    caplog.clear()
    for other in ("a/cat/1", "a/dog/1", "b/cat", "c/cat"):  # classes of videos; one video; beside a file
        write(tmp_path / other, moving_frames(2, 16, 16))
    video.write_video(tmp_path / "c" / "dog.mp4", moving_frames(2, 16, 16), 10)
    assert [len(find_videos(tmp_path / name).paths) for name in "abc"] == [2, 1, 2] and not caplog.records


def test_the_folder_itself_may_be_the_video(folder, tmp_path, monkeypatch):
    clip = folder / "walk" / "clip10"
    monkeypatch.chdir(clip)
    for given in (str(clip), f"folder:{clip}", ".", "folder:."):
        inputs = Inputs(given, ClipSpec(8, 32))
        assert [(one.name, one.path.resolve()) for one in inputs.videos] == [("clip10", clip.resolve())]
    source = open_source(f"folder:{clip}")
    assert (len(source), source.name(0), source.label_names, source.frames(0)) == (1, "clip10", (), 12)
    with pytest.raises(InputError, match=r"stereo: is not a video, .* here are pictures such as left0.png and right0"):
        pictures.open_video(folder / "walk" / "stereo")


def test_changed_and_equal_pictures_are_noticed(folder, tmp_path):
    """By the cache of statistics, and by protocols that leave out the videos of the training data."""
    for name in ("a", "b"):
        shutil.copytree(folder / "walk" / "clip10", tmp_path / name / "x")
    one, other = (ClipSet(f"folder:{tmp_path / name}", ClipSpec(8, 32)) for name in ("a", "b"))
    assert one.digest() == other.digest() and same_videos(one.source, other.source) == {0}
    assert one.source.size(0) == sum(path.stat().st_size for path in (tmp_path / "a" / "x").iterdir())
    (tmp_path / "a" / "x" / "003.png").write_bytes((tmp_path / "a" / "x" / "004.png").read_bytes())
    assert one.digest() != other.digest() and not same_videos(one.source, other.source)


def test_prepare(folder, tmp_path):
    said = []
    settings = Settings(32, "raw")
    report = prepare([str(folder)], tmp_path / "all", settings, workers=1, progress=said.append)
    assert report["videos"] == 4 and not report["skipped"] and report["other_files"] == {".png": 3 + 2 + 1 + 4}
    source, files = open_source(f"tfds:{tmp_path / 'all'}"), open_source(f"folder:{folder}")
    assert [source.name(i) for i in range(4)] == VIDEOS
    for i in range(1, 4):
        assert (source.frames(i), source.fps(i), source.label(i)) == (files.frames(i), 25.0, files.label(i))
        clip = ClipSpec(source.frames(i), 32)
        np.testing.assert_array_equal(source.read_clip(i, 0, clip)[0], files.read_clip(i, 0, clip)[0])
    assert len(same_videos(source, files)) == 4
    prepare([str(folder)], tmp_path / "all", settings, workers=1, progress=said.append)
    assert said[-1].endswith("nothing to do")

    (folder / "walk" / "stereo" / "list.csv").write_text("walk/clip10,w\nwalk/stereo,w\nrun/a.mp4,r\nrun/none,r\n")
    listed = [str(folder / "walk" / "stereo" / "list.csv")]
    found = [item.source for item in list_videos(listed, str(folder)).items]
    assert found == ["walk/clip10", "walk/stereo", "run/a.mp4"]
    report = prepare(listed, tmp_path / "list", settings, root=str(folder), workers=1, progress=said.append)
    reasons = {name: reason for _, name, reason in report["skipped"]}
    assert reasons.keys() == {"walk/stereo", "run/none"} and reasons["walk/stereo"].startswith("is not a video")
    assert report["splits"]["train"]["classes"] == {"r": 1, "w": 1}
    kinetics = tmp_path / "kinetics.csv"
    kinetics.write_text("label,youtube_id,time_start,time_end\nw,clip10,1,2\nr,a,1,2\n")
    assert [item.source for item in list_videos([str(kinetics)], str(folder)).items] == ["walk/clip10", "run/a.mp4"]


@pytest.mark.slow
def test_a_folder_of_pictures_trains_and_is_reconstructed(tmp_path, capsys):
    """On the command line: two classes of pictures, without any video file."""
    for number, name in enumerate(["run/clip2", "run/clip10", "walk/x"]):
        write(tmp_path / "data" / name, moving_frames(10 + number, 40, 48, seed=number), "f{}.png")
    data = f"folder:{tmp_path / 'data'}"
    settings = [f"--config.data.train={data}", f"--config.data.eval={data}"]
    settings += ["--config.steps=2", "--config.eval_every=2"]
    run = ["--config", f"{CONFIG}:plain", "--workdir", str(tmp_path / "run")]
    assert cli.main(["train", *run, *settings]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and np.isfinite([row["train/loss"] for row in rows]).all()
    assert rows[1]["eval/psnr"] > 0

    checkpoint = ["--checkpoint", str(tmp_path / "run"), "--output"]
    assert cli.main(["reconstruct", *checkpoint, str(tmp_path / "out"), "--input", str(tmp_path / "data")]) == 0
    written = video.probe(tmp_path / "out" / "run" / "clip10.mp4")
    assert (written.frames, written.fps, written.width, written.height) == (11, 25.0, 2 * 48, 40)
    assert (tmp_path / "out" / "walk" / "x.png").exists()
    assert cli.main(["tokenize", *checkpoint, str(tmp_path / "codes"), "--input", data]) == 0
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert [row["source"] for row in manifest["rows"]] == ["run/clip10"] * 2 + ["run/clip2"] * 2 + ["walk/x"] * 2
    assert manifest["label_names"] == ["run", "walk"]
    one = ["--input", str(tmp_path / "data" / "walk" / "x")]
    assert cli.main(["reconstruct", *checkpoint, str(tmp_path / "one"), *one]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["psnr.json", "x.mp4", "x.png"]
