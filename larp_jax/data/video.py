"""Reading and writing video files and images with PyAV, which is imported when first needed.

Frames are uint8 RGB and upright (the container's rotation is applied), and their pixels are square: frames whose pixels
are wider or narrower are resized to the shape in which players show them. If there are several video streams, the one
that FFmpeg ranks best is used.
"""

import array
import bisect
import contextlib
import fractions
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from larp_jax import files
from larp_jax.data.clips import LATE, ClipSpec, center_crop, repeat_last, scaled_size
from larp_jax.data.random_access import Video, VideoInfo, each_in_time, in_time, no_frames
from larp_jax.data.timing import stage
from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    ".3g2 .3gp .asf .avi .divx .flv .gif .m2ts .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm "
    ".wmv".split()
)

IMAGES = frozenset(".png .jpg .jpeg .webp .bmp".split())

# In these codecs one packet is one frame, and after a seek the decoder outputs exact frames or none, never approximate
# ones. VP8 is not among them because its hidden reference frames have their own packets and times.
SEEKABLE_CODECS = frozenset("av1 ffv1 h264 hevc libdav1d mjpeg mpeg4 vp9".split())
# AVI stores no presentation times; with B-frames, those that FFmpeg generates are out of order.
TIMELESS_FORMATS = frozenset(["avi"])
# Pixel formats in which two adjacent pixels of a row share their chroma.
HALF_CHROMA = frozenset(["yuv420p", "yuvj420p"])
# At most 8192x8192 pixels per frame: a damaged header may claim any size, and FFmpeg would allocate it.
LIMITS = {"max_pixels": str(2**26)}


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads the header and decodes the first frame. Counts packets if the header has no valid number of frames.

    Raises:
      InputError: the file does not exist, or no frame of it can be decoded within the time limit.
    """
    return in_time(path, _probe, path)


def _probe(path) -> VideoInfo:
    with _open(path) as (container, stream):
        first = next(_decode(container, stream), None)
        if first is None:
            raise no_frames(path)
        width, height = square_size(first, pixel_aspect(stream))
        width, height = (height, width) if first.rotation % 180 else (width, height)
        rate = stream.average_rate or stream.base_rate
        frames, codec = stream.frames, stream.codec_context.name
    if not 0 < frames <= os.path.getsize(path):  # a frame needs at least one byte, but headers may claim any number
        # Reopened, because without times a seek to the beginning may end anywhere.
        with _open(path) as (container, stream):
            frames = sum(not packet.is_discard for packet in _packets(container, stream))
    return VideoInfo(max(1, frames), float(rate or 25), width, height, codec)


class VideoFile(Video):
    """Random access to the frames of a video file, which decodes only from the nearest keyframe.

    The first read builds an index of the times of all frames from the packets. Each read opens the file, seeks to the
    last keyframe before its window and decodes from there. The result equals decoding from the beginning and slicing:
    if the times of the decoded frames are not exactly those of the index (because of damage or wrong times), the file
    is decoded from the beginning. Frames after damage that ends decoding from the beginning are still found if a
    keyframe is between.

    Args:
      path: the file.
      clip: as for `Video`.

    Raises:
      InputError: no frame of the file can be decoded.
    """

    def __init__(self, path: str | os.PathLike, clip: ClipSpec | None = None):
        super().__init__(path, probe(path), clip)
        self._tick = 0.0  # seconds per unit of the times
        self._times: Sequence[int] | None = None  # of the frames, in order of presentation; empty: do not seek
        self._key_times: Sequence[int] = ()

    def _read(self, start: int, count: int, size: tuple[int, int], exact: bool) -> np.ndarray:
        if self._times is None:
            self._make_index()
        # If the index ends before the window, the file has fewer frames than its header claims, and is decoded below.
        total = self._sampled_count()
        if total and start + count <= max(count, total):
            numbers = [self._number(k) for k in range(start, min(start + count, total))]
            with _open(self.path) as (container, stream):
                frames = self._seek_and_decode(container, stream, self._times[numbers[0] : numbers[-1] + 1])
                if frames is not None:
                    return to_rgb([frames[n - numbers[0]] for n in numbers], size, pixel_aspect(stream))
        with _open(self.path) as (container, stream):
            frames = self._last(_sampled(container, stream, self._clip), start, count, exact)
            return to_rgb(frames, size, pixel_aspect(stream))

    def _sampled_count(self) -> int:
        """Number of sampled frames according to the index; 0 without one."""
        if not self._times or not self._clip.fps:
            return -(-len(self._times) // self._clip.stride)
        return 1 + int(((self._times[-1] - self._times[0]) * self._tick + LATE) * self._clip.fps)

    def _number(self, k: int) -> int:
        """The number in the file of sampled frame k."""
        if not self._clip.fps:
            return k * self._clip.stride
        return bisect.bisect_right(self._times, self._times[0] + (k / self._clip.fps + LATE) / self._tick) - 1

    def _make_index(self) -> None:
        with _open(self.path) as (container, stream):
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in _packets(container, stream)
                if not packet.is_discard  # decoded as a reference for other frames, but not shown
            ]
            self._tick = float(stream.time_base or 0)
            seekable = stream.codec_context.name in SEEKABLE_CODECS and container.format.name not in TIMELESS_FORMATS
        times = [time for time, _ in packets]
        if not seekable or None in times or len(set(times)) < len(times):
            self._times = ()
            return
        self._key_times = array.array("q", sorted(time for time, is_keyframe in packets if is_keyframe))
        times = array.array("q", sorted(times))
        # The times of a constant rate, the usual case, need no memory: data sets have hundreds of thousands of files.
        step = times[1] - times[0] if len(times) > 1 else 1
        constant = range(times[0], times[0] + step * len(times), step) if times else ()
        self._times = constant if all(map(int.__eq__, constant, times)) else times

    def _seek_and_decode(self, container, stream, times: Sequence[int]) -> list | None:
        """The frames with these times; None if the decoder outputs others."""
        keyframe = bisect.bisect_right(self._key_times, times[0]) - 1
        if keyframe > 0:
            container.seek(self._key_times[keyframe], stream=stream)
        decoder = stream.codec_context
        decoded, missing = [], len(times)
        with contextlib.suppress(_av().FFmpegError):
            for packet in _packets(container, stream):
                wanted = packet.pts is not None and times[0] <= packet.pts <= times[-1]
                # Of the other frames, only reference frames are decoded.
                decoder.skip_frame = "DEFAULT" if wanted else "NONREF"
                with stage("decode"):
                    decoded += decoder.decode(packet)
                missing -= wanted
                if not missing:
                    with stage("decode"):
                        decoded += decoder.decode(None)
                    break
                while decoded and (decoded[0].pts is None or decoded[0].pts < times[0]):
                    del decoded[0]
        decoded = [frame for frame in decoded if frame.pts is not None and times[0] <= frame.pts <= times[-1]]
        return decoded if [frame.pts for frame in decoded] == list(times) else None


def read_windows(
    path: str | os.PathLike, clip: ClipSpec, *, whole: bool = False
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Reads a video of any length window by window, with one window in memory at a time.

    Args:
      path: the file.
      clip: length, size and rate of a window.
      whole: whether frames keep their own size, [H, W] of square pixels, instead of that of the clip.

    Yields:
      (number of the first frame, uint8 [T, H, W, 3], number of valid frames). Only the last window may have fewer than
      T valid frames; the last of them is then repeated.

    Raises:
      InputError: no frame of the file can be decoded, or a window takes longer than the time limit. Damage after the
        first frame ends the video there and is logged.
    """
    yield from each_in_time(path, _read_windows(path, clip, None if whole else clip.size))


def _read_windows(path, clip: ClipSpec, size: tuple[int, int] | None) -> Iterator[tuple[int, np.ndarray, int]]:
    with _open(path) as (container, stream):
        claimed = 0 if clip.sampling else stream.frames
        frames = _sampled(container, stream, clip)
        yield from in_windows(path, frames, clip.frames, size, pixel_aspect(stream), claimed)


def in_windows(
    path, frames: Iterator, length: int, size: tuple[int, int] | None, aspect: float = 1.0, claimed: int = 0
) -> Iterator[tuple[int, np.ndarray, int]]:
    """`read_windows` from the decoded frames; `claimed` is how many there should be, 0 for unknown."""
    start, first = 0, None
    while window := list(itertools.islice(frames, length)):
        first = first or window[0]
        yield start, repeat_last(to_rgb(window, size, aspect, first), length), len(window)
        start += len(window)
    if start == 0:
        raise no_frames(path)
    if start < claimed:
        logger.warning("%s: %d of %d frames can be decoded", path, start, claimed)


def resize_frames(frames: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Resizes and crops uint8 [h, w, 3] frames to uint8 [n, H, W, 3], where `size` is (H, W)."""
    av = _av()
    return to_rgb([av.VideoFrame.from_ndarray(np.ascontiguousarray(frame)) for frame in frames], size)


def decode_images(images: Iterable[bytes], size: tuple[int, int] | None) -> np.ndarray:
    """Decodes images in memory, resized and cropped, to uint8 [n, H, W, 3].

    Args:
      images: as for `image_frames`.
      size: (H, W); None for that of the first image.

    Raises:
      InputError: an image is of another kind, or damaged.
    """
    return to_rgb(image_frames(images), size)


def image_frames(images: Iterable[bytes]) -> list:
    """Images in memory as decoded frames for `to_rgb`.

    Args:
      images: PNG, JPEG, WebP or BMP files, or H.264 keyframes as returned by `encode_h264`, all of the same kind.

    Raises:
      InputError: an image is of another kind, or damaged.
    """
    av = _av()
    images = list(images)
    try:
        with stage("decode"):
            decoder = av.CodecContext.create(_codec(images[0]), "r")
            decoder.thread_count = 1
            decoder.options = LIMITS
            packets = [av.Packet(data) for data in images]
            frames = []
            for packet in packets:
                packet.is_keyframe = True  # otherwise a PNG is decoded as the difference to the previous one
                frames += decoder.decode(packet)
            frames += decoder.decode(None)
        if len(frames) != len(images):
            raise ValueError(f"{len(images)} images decode to {len(frames)} frames")
    except (av.FFmpegError, ValueError) as error:
        said = reason(error)
        raise InputError(f"an encoded frame is not a readable PNG, JPEG or H.264 keyframe ({said})") from error
    return frames


def _codec(data: bytes) -> str:
    beginnings = {b"\x89PNG": "png", b"\0\0": "h264", b"RIFF": "webp", b"BM": "bmp"}
    return next((codec for beginning, codec in beginnings.items() if data.startswith(beginning)), "mjpeg")


def encode_jpeg(frames: np.ndarray, quality: int) -> list[bytes]:
    """uint8 [T, H, W, 3] as T JPEG files (4:2:0); `quality` is on FFmpeg's scale, 1 (best) to 31."""
    return _encode_each("mjpeg", "yuvj420p", frames, {"qmin": str(quality), "qmax": str(quality)})


def encode_h264(frames: np.ndarray, quality: int) -> list[bytes]:
    """uint8 [T, H, W, 3] with even H and W as T H.264 keyframes (4:2:0), with headers each; `quality` is x264's CRF."""
    # One thread, because the output of x264 depends on the number of threads.
    x264 = "keyint=1:repeat-headers=1:annexb=1:threads=1:info=0"
    options = {"crf": str(quality), "preset": "medium", "tune": "fastdecode,zerolatency", "x264-params": x264}
    return _encode_each("libx264", "yuv420p", frames, options)


def _encode_each(codec: str, pixel_format: str, frames: np.ndarray, options: dict[str, str]) -> list[bytes]:
    av = _av()
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width = frames.shape[1:3]
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = pixel_format, fractions.Fraction(1, 25), 1
    encoder.options = {"flags": "+bitexact", **options}  # without the version of the encoder
    packets = []
    for image in frames:
        packets += encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image)))
    packets = [bytes(packet) for packet in packets + encoder.encode(None)]
    if len(packets) != len(frames):
        raise ValueError(f"{codec} encoded {len(frames)} frames to {len(packets)} packets")
    return packets


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes an H.264 MP4 that browsers can play.

    The file gets its final name when it is complete. Odd sides get one more row or column, a copy of the last, because
    the chroma of 4:2:0 has half the size of the image.

    Args:
      path: file to write, in an existing folder.
      frames: uint8 [T, H, W, 3], or an iterable of at least one uint8 [H, W, 3] frame, all of the same size.
      fps: frames per second.

    Raises:
      ValueError: there are no frames, or their shape or dtype is wrong.
      OSError: the file cannot be written.
    """
    av = _av()
    frames = iter(frames)
    first = _checked_image(next(frames, None), "write_video")
    height, width = (side + side % 2 for side in first.shape[:2])
    with files.writing(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(60_000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for image in itertools.chain([first], frames):
            if _checked_image(image, "write_video").shape != first.shape:
                raise ValueError(f"write_video needs frames of one size, got {first.shape} and {image.shape}")
            image = np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as PNG; the file gets its final name when it is complete.

    Raises:
      ValueError: the shape or the dtype is wrong.
      OSError: the file cannot be written.
    """
    files.write_bytes(path, encode_png(image))


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG file."""
    av = _av()
    image = _checked_image(image, "write_png")
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", fractions.Fraction(1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image))) + encoder.encode(None)
    return b"".join(map(bytes, packets))


def frame_grid(videos: Sequence[np.ndarray], *, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Shows videos below each other on white, one per row, as evenly spaced frames from the first to the last.

    Args:
      videos: uint8 [T, H, W, 3] each, of any lengths, all frames of the same size.
      columns: maximum number of frames per row.
      gap: pixels between frames.

    Returns:
      uint8 [height, width, 3].
    """
    columns = min(columns, max(len(video) for video in videos))
    height, width = videos[0].shape[1:3]
    grid = np.full((len(videos) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for row, video in enumerate(videos):
        for column, number in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            top, left = row * (height + gap), column * (width + gap)
            grid[top : top + height, left : left + width] = video[number]
    return grid


def _av():
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV, which is not installed; run: pip install av") from error
    return av


@contextlib.contextmanager
def _open(path):
    """Opens (container, best video stream); errors in reading the file become a one-line `InputError`."""
    av = _av()
    # Before version 19, PyAV rejected files with tags that are not UTF-8.
    lenient = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
    try:
        with stage("read"):
            # With `file:`, a colon in a name does not look like a protocol.
            container = av.open(f"file:{os.fspath(path)}", options=LIMITS, **lenient)
        with container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise InputError(f"{path}: has no video stream; replace the file or leave it out")
            # Clips are already read in parallel.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = LIMITS
            yield container, stream
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path}: cannot be read as video ({reason(error)}); replace the file or leave it out"
        ) from error


def _packets(container, stream) -> Iterator:
    """The packets of the stream in file order, up to damage in the container."""
    with contextlib.suppress(_av().FFmpegError):
        packets = container.demux(stream)
        while True:
            with stage("read"):
                packet = next(packets, None)
            if packet is None:
                return
            if packet.size:  # empty: the last packet, and packets of frames dropped by a recorder
                yield packet


def _decode(container, stream) -> Iterator:
    """Frames in order of presentation, from the beginning.

    Errors before the first frame are ignored, because recordings may start between keyframes. A later error ends the
    video, because the following frames would not be consecutive.
    """
    started = False
    for packet in itertools.chain(_packets(container, stream), [None]):  # None flushes the decoder
        try:
            with stage("decode"):
                decoded = stream.codec_context.decode(packet)
        except _av().FFmpegError:
            if started:
                return
            continue
        started = started or bool(decoded)
        yield from decoded


def _sampled(container, stream, clip: ClipSpec) -> Iterator:
    """Frames from the beginning, sampled in time: each is the last that is shown at its time of sampling."""
    frames = _decode(container, stream)
    if not clip.fps:
        yield from itertools.islice(frames, 0, None, clip.stride)
        return
    rate = float(stream.average_rate or stream.base_rate or 25)
    timeless = container.format.name in TIMELESS_FORMATS
    shown = first = None
    number, time = 0, 0.0
    for count, frame in enumerate(frames):
        time = count / rate if timeless or frame.pts is None else float(frame.pts * stream.time_base)
        first = time if first is None else first
        while shown is not None and number / clip.fps + LATE < time - first:
            yield shown
            number += 1
        shown = frame
    while shown is not None and number / clip.fps <= time - first + LATE:
        yield shown
        number += 1


def pixel_aspect(stream) -> float:
    """Width of a pixel over its height; 1.0 if the file does not say, or says what no camera or disc has."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.25 <= aspect <= 4.0 else 1.0


def square_size(frame, aspect: float) -> tuple[int, int]:
    """(width, height) of a decoded frame with square pixels: the shorter side stays, the other is resized."""
    if aspect > 1.0:
        return round(frame.width * aspect), frame.height
    return frame.width, round(frame.height / aspect)


def to_rgb(frames: Sequence, size: tuple[int, int] | None, aspect: float = 1.0, first=None) -> np.ndarray:
    """Decoded frames as uint8 [n, H, W, 3]: scaled, converted, turned upright and cropped to `size`, (H, W).

    `aspect` is the width of a pixel over its height. Without a size, all frames get that of `first`, a frame, in square
    pixels; by default, that of the first of them.

    libswscale scales and converts in one pass. Its bilinear filter widens when shrinking, so it is antialiased. From
    Pillow's antialiased bilinear filter on full-size RGB, for which the chroma is enlarged first, it differs by 1.3
    levels of 255 on average (root mean square 1.7) over real footage shrunk to 128.
    """
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter = VideoReformatter()
    first = first or frames[0]
    own = square_size(first, aspect)
    shape = size or (own if first.rotation % 180 else own[::-1])
    out = np.empty((len(frames), *shape, 3), np.uint8)

    def upright(image, frame):
        image = np.rot90(image, frame.rotation // 90)
        return center_crop(image, size) if size else image

    with stage("resize"):
        for target, frame in zip(out, frames, strict=True):
            width, height = shape if frame.rotation % 180 else shape[::-1]
            if size:
                width, height = scaled_size(*square_size(frame, aspect), (height, width))
            # Planes of green, blue and red are twice as fast as packed RGB, which would also halve the chroma's width.
            # Without scaling, however, libswscale leaves columns of planes after the last multiple of 16 unwritten, and
            # packed RGB is equal if the chroma is already halved, and avoids joining the planes.
            unscaled = (width, height) == (frame.width, frame.height)
            packed = unscaled and (width % 16 or frame.format.name in HALF_CHROMA)
            layout = "rgb24" if packed else "gbrp"
            scaled = reformatter.reformat(frame, width, height, layout, interpolation=Interpolation.BILINEAR, threads=1)
            if packed:
                target[:] = upright(_pixels(scaled, width, height), frame)
                continue
            for channel, image in enumerate(_channels(scaled, width, height)):
                target[..., channel] = upright(image, frame)
    return out


def _pixels(frame, width: int, height: int) -> np.ndarray:
    """View [height, width, 3] of packed pixels."""
    (plane,) = frame.planes
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : 3 * width]
    return rows.reshape(height, width, 3)


def _channels(frame, width: int, height: int) -> list[np.ndarray]:
    """Views [height, width] of red, green and blue, from planes (green, blue, red)."""
    rows = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height] for plane in frame.planes]
    return [rows[i][:, :width] for i in (2, 0, 1)]


def _checked_image(image: np.ndarray | None, what: str) -> np.ndarray:
    if image is None:
        raise ValueError(f"{what} needs at least one frame")
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{what} needs uint8 [H, W, 3] images, got {image.dtype} {list(image.shape)}")
    return image
