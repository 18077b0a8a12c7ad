import csv
import errno
import fractions
import pickle
import resource

import av
import numpy as np
import pytest
from data_helpers import KINDS, moving_frames, write_as

from larp_jax.data import ClipSpec, video
from larp_jax.errors import InputError

FRAMES = 50


def whole(path, resolution):
    """Every frame, decoded from the beginning."""
    windows = list(video.read_windows(path, ClipSpec(16, resolution)))
    return np.concatenate([frames[:valid] for _, frames, valid in windows])


def assert_reads_are_slices(path, starts, resolution=32):
    decoded = whole(path, resolution)
    file = video.VideoFile(path)
    for start in starts:
        window = file.read(start, 16, (resolution, resolution), exact=True)
        np.testing.assert_array_equal(window, decoded[start : start + 16], err_msg=f"{path} from {start}")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one video of each kind."""
    folder = tmp_path_factory.mktemp("made")
    for name, (encoder, pixel_format, options) in KINDS.items():
        write_as(folder / name, moving_frames(FRAMES), encoder, pixel_format, options)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_seeking_agrees_with_slicing(made, name):
    assert video.probe(made / name).frames == FRAMES
    assert_reads_are_slices(made / name, [30, 0, 11, 12, 13, 23, 24, FRAMES - 16])


def test_seeking_decodes_from_the_keyframe_before(made, monkeypatch):
    file = video.VideoFile(made / "h264_bframes.mp4")
    file.read(0, 4, (16, 16))
    monkeypatch.setattr(video, "_decode", None)  # decoding from the beginning would fail
    seen = []
    monkeypatch.setattr(
        video, "_packets", lambda *args, packets=video._packets: (seen.append(p) or p for p in packets(*args))
    )
    file.read(36, 4, (16, 16))
    assert len(seen) < 10


@pytest.mark.parametrize("width", [16, 18, 24, 40, 72, 136])
def test_frames_of_the_right_size_are_not_resized(tmp_path, width):
    side = width // 8 * 8 - 8
    gray = moving_frames(5, side, width)[..., :1].repeat(3, axis=-1)  # no color, nothing is lost to subsampling
    write_as(tmp_path / "video.mkv", gray, *KINDS["ffv1.mkv"])
    first, second = (video.VideoFile(tmp_path / "video.mkv").read(0, 5, (side, side)) for _ in range(2))
    left = round((width - side) / 2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first.astype(int), gray[:, :, left : left + side], atol=3)


def test_uneven_times(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, FRAMES))
    write_as(tmp_path / "vfr.mp4", moving_frames(FRAMES), *KINDS["h264_bframes.mp4"], times=times)
    file = assert_reads_are_slices(tmp_path / "vfr.mp4", [0, 20, FRAMES - 16])
    assert not isinstance(file._times, range)


def test_real_footage(videos_dir):
    names = ["natural/bikes.mp4", "natural/demo.mp4", "natural/cat.mp4", "odd/torchcodec__av1_video.mkv"]
    names += ["odd/moviepy__transparent.webm", "ucf101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"]
    for name in names:
        frames = video.probe(videos_dir / name).frames
        assert_reads_are_slices(videos_dir / name, [frames // 3, frames - 17, 1])


def test_odd_files_give_frames_or_a_one_line_error(videos_dir):
    with open(videos_dir / "odd" / "ODD.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) > 40
    for row in rows:
        path = videos_dir / "odd" / row["file"]
        if int(row["decoded_frames"]) == 0:
            with pytest.raises(InputError) as error:
                video.VideoFile(path)
            assert len(str(error.value).splitlines()) == 1
            assert str(path) in str(error.value)
            with pytest.raises(InputError):
                list(video.read_windows(path, ClipSpec(16, 16)))
            continue
        decoded = whole(path, 16)
        if "multistream" not in row["file"]:  # the list counts its first stream, which is not the one read
            assert len(decoded) == int(row["decoded_frames"]), row["file"]
        file = video.VideoFile(path)
        window = file.read(max(0, file.info.frames - 16), 16, (16, 16))
        if "hole" in row["file"]:  # its end can be decoded from a keyframe after the damage
            assert window.shape == (16, 16, 16, 3)
        else:
            np.testing.assert_array_equal(window, decoded[-16:], err_msg=row["file"])


def test_rotation_is_applied(videos_dir):
    for degrees, shape in ((0, (568, 320)), (90, (320, 568)), (180, (568, 320)), (270, (320, 568))):
        info = video.probe(videos_dir / "odd" / f"decord__video_{degrees}.mov")
        assert (info.width, info.height) == shape


def test_files_that_claim_too_much(tmp_path, made):
    data = (made / "mjpeg.mov").read_bytes()
    header_first = tmp_path / "cut.mkv"
    header_first.write_bytes((made / "ffv1.mkv").read_bytes()[: len((made / "ffv1.mkv").read_bytes()) // 2])
    decoded = whole(header_first, 16)
    assert 16 < len(decoded) < FRAMES
    file = video.VideoFile(header_first)
    np.testing.assert_array_equal(file.read(FRAMES - 16, 16, (16, 16)), decoded[-16:])
    with pytest.raises(InputError, match="ends after"):
        file.read(FRAMES - 16, 16, (16, 16), exact=True)
    (tmp_path / "headless.mov").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"headless\.mov"):
        video.probe(tmp_path / "headless.mov")


@pytest.mark.parametrize("name", ["a:b.mp4", "-dash.mp4", "sp ace%20d.mp4", "ünï.mp4"])
def test_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write_video(name, moving_frames(3), 10)
    assert video.probe(name).frames == 3


def test_tags_that_are_not_text(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "ABCDWXYZ"
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(moving_frames(1, 32, 32)[0])))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"ABCDWXYZ", b"\xff\xfe\xe9\xfaWXYZ"))
    assert video.probe(path).frames == 1


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(InputError, match="cannot be read as video"):
            video.probe(path)


def test_windows_of_a_short_video_repeat_its_last_frame(tmp_path):
    video.write_video(tmp_path / "v.mp4", moving_frames(5), 10)
    ((start, frames, valid),) = video.read_windows(tmp_path / "v.mp4", ClipSpec(16, 48))
    assert (start, valid, frames.shape, frames.dtype) == (0, 5, (16, 48, 48, 3), np.uint8)
    np.testing.assert_array_equal(frames[5:], np.repeat(frames[4:5], 11, axis=0))
    assert len(video.VideoFile(tmp_path / "v.mp4").read(0, 16, (48, 48), exact=True)) == 5


def test_windows_stream(tmp_path):
    video.write_video(tmp_path / "v.mp4", moving_frames(41), 10)
    windows = list(video.read_windows(tmp_path / "v.mp4", ClipSpec(16, 16)))
    assert [(start, valid) for start, _, valid in windows] == [(0, 16), (16, 16), (32, 9)]


def test_video_files_can_be_sent_to_workers(made):
    file = video.VideoFile(made / "vp9.webm")
    window = file.read(20, 8, (16, 16))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(file)).read(20, 8, (16, 16)), window)


@pytest.mark.parametrize("height,width", [(48, 64), (47, 63), (1, 1)])
def test_written_videos_play_and_keep_the_picture(tmp_path, height, width):
    frames = moving_frames(12, 48, 64)[:, :height, :width] // 2 + 64
    video.write_video(tmp_path / "v.mp4", frames, 29.97)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert abs(float(stream.average_rate) - 29.97) < 0.01
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == (12, height + height % 2, width + width % 2, 3)
    if height > 1:
        assert np.abs(decoded[:, :height, :width].astype(int) - frames).mean() < 12
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_writing_failures_leave_nothing_behind(tmp_path):
    with pytest.raises(OSError):
        video.write_video(tmp_path / "no" / "v.mp4", moving_frames(2), 10)
    with pytest.raises(OSError):
        video.write_png(tmp_path / "no" / "v.png", moving_frames(1)[0])
    for frames in ([], moving_frames(2).astype(float), [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)]):
        with pytest.raises(ValueError, match="write_video needs"):
            video.write_video(tmp_path / "v.mp4", frames, 10)
    with pytest.raises(ValueError, match="write_png needs"):
        video.write_png(tmp_path / "v.png", np.zeros((4, 4), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["video", "png"])
def test_a_full_disk_is_an_os_error(tmp_path, what):
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3)).astype(np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as error:
            if what == "video":
                video.write_video(tmp_path / "v.mp4", frames, 10)
            else:
                video.write_png(tmp_path / "v.png", frames[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_png_is_lossless(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    video.write_png(tmp_path / "image.png", image)
    data = (tmp_path / "image.png").read_bytes()
    np.testing.assert_array_equal(video.decode_images([data, data], (48, 48)), [image, image])
    with pytest.raises(InputError, match="not a readable PNG, JPEG or H.264 keyframe"):
        video.decode_images([data[:60]], (48, 48))


def test_resizing_is_close_to_antialiased_bilinear():
    image_module = pytest.importorskip("PIL.Image")
    # Fine stripes under a slope: without antialiasing they would alias to broad ones.
    y, x = np.mgrid[:480, :640]
    image = np.stack([x % 4 * 40 + y // 8, y % 6 * 20 + x // 8, (x + y) % 256], axis=-1).astype(np.uint8)
    expected = np.asarray(image_module.fromarray(image).resize((85, 64), image_module.Resampling.BILINEAR))
    resized = video.resize_frames([image], (64, 64))[0]
    difference = np.abs(resized.astype(int) - expected[:, 10:74].astype(int))
    assert difference[..., :2].mean() < 1.5  # the third channel wraps around, where filters differ
    assert difference.max() < 40


def test_frame_grid():
    videos = [np.full((length, 4, 6, 3), value, np.uint8) for length, value in ((16, 10), (3, 20))]
    videos[0][-1] = 99
    grid = video.frame_grid(videos, columns=3, gap=1)
    assert grid.shape == (4 * 2 + 1, 6 * 3 + 2, 3)
    assert grid[0, 0, 0] == 10 and grid[0, -1, 0] == 99 and grid[-1, 0, 0] == 20 and (grid[4] == 255).all()


TIMES = np.cumsum(np.random.default_rng(0).integers(5, 90, 24)).tolist()


@pytest.mark.parametrize("sampling", [{"fps": 8.0}, {"fps": 60.0}, {"stride": 3}], ids=str)
@pytest.mark.parametrize("name, encoder, times", [("a.mkv", "libx264", TIMES), ("a.avi", "mpeg4", None)])
def test_videos_are_sampled_by_the_time_of_their_frames(tmp_path, name, encoder, times, sampling):
    """Frame k is the last one shown at k / fps, read at random or from the beginning; AVI has a constant rate."""
    gray = np.zeros((24, 32, 32, 3), np.uint8) + np.arange(0, 240, 10, dtype=np.uint8)[:, None, None, None]
    options = {"crf": "1", "g": "5", "bf": "2"} if encoder == "libx264" else {"qscale": "1"}
    write_as(tmp_path / name, gray, encoder, "yuv420p", options, times=times)
    clip = ClipSpec(4, 32, **sampling)
    file = video.VideoFile(tmp_path / name, clip)
    shown = np.array(times or range(0, 960, 40)) / 1000
    expected = list(range(0, 24, 3))
    if fps := sampling.get("fps"):
        counted = int((shown[-1] - shown[0] + 1e-3) * fps) + 1
        expected = [np.flatnonzero(shown - shown[0] <= k / fps + 1e-3)[-1] for k in range(counted)]
        assert file.info.fps == fps and abs(file.info.frames - counted) <= 0.2 * counted
    numbers = lambda frames: np.round(frames[:, 16, 16].mean(axis=-1) / 10).astype(int).tolist()  # noqa: E731
    streamed = [n for _, frames, valid in video.read_windows(file.path, clip) for n in numbers(frames[:valid])]
    assert streamed == expected
    starts = range(0, len(expected) - 4, 3)
    windows = [numbers(file.read(start, 4, (32, 32), exact=True)) for start in starts]
    assert windows == [expected[s : s + 4] for s in starts]


def test_pixels_become_square(tmp_path):
    """A disc in a file whose pixels are twice as wide as high is round."""
    y, x = np.mgrid[:32, :32] - 16
    disc = np.repeat(np.uint8(255 * (y**2 + (2 * x) ** 2 < 100))[..., None], 3, axis=-1)
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(2, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(disc, format="rgb24")))
        container.mux(stream.encode())
    info = video.probe(tmp_path / "wide.mp4")
    assert (info.width, info.height) == (64, 32)
    ((_, window, _),) = video.read_windows(tmp_path / "wide.mp4", ClipSpec(1, 64))
    for frames in (video.VideoFile(tmp_path / "wide.mp4").read(0, 1, (64, 64)), window):
        rows, columns = np.nonzero(frames[0, ..., 1] > 128)
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 2 < 30 < np.ptp(rows)
