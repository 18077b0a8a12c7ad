"""Folders of pictures as videos: each picture is a frame, in the order of the numbers in their names.

A folder is a video if it holds no video file, and at least two pictures whose names differ only in their numbers, as in
`clip0/000.png`, `clip0/001.png`. Numbers may be missing. Other pictures, hidden files and files that are no pictures
are left out. Pictures have no rate, so they are shown at 25 per second, as FFmpeg does. Those that a camera turned are
turned upright; their pixels are taken as square.

Everything that reads videos opens them here, so that a folder and a file mean the same.
"""

import collections
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from larp_jax import files
from larp_jax.data import video
from larp_jax.data.clips import ClipSpec
from larp_jax.data.random_access import Video, VideoInfo, each_in_time, in_time
from larp_jax.data.timing import stage
from larp_jax.errors import InputError, reason

RATE = 25.0
RULE = "two or more pictures whose names differ only in their numbers"
_NUMBER = re.compile("([0-9]+)")


def numbered(names: Iterable[str]) -> list[list[str]]:
    """The pictures among the names of files, in groups of at least two that differ only in their numbers.

    Each group is in the order of the numbers: 2 comes before 10. There are none if one of the files is a video.
    """
    groups = collections.defaultdict(list)
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if name.startswith("."):
            continue
        if suffix in video.EXTENSIONS:
            return []
        if suffix in video.IMAGES and len(parts := _NUMBER.split(stem)) > 1:
            groups[*parts[::2], suffix].append((*map(int, parts[1::2]), name))
    return [[name for *_, name in sorted(group)] for group in groups.values() if len(group) > 1]


def frame_names(folder: str | os.PathLike) -> list[str]:
    """The names of the pictures in a folder that is a video, in order.

    Raises:
      InputError: the folder cannot be read, or is not a video.
    """
    try:
        with stage("read"):
            groups = numbered(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({reason(error)}); replace the folder or leave it out") from error
    if len(groups) != 1:
        found = f"are pictures such as {groups[0][0]} and {groups[1][0]}" if groups else "is a file, or are no pictures"
        raise InputError(f"{folder}: is not a video, which is {RULE}, and no video file; here {found}")
    return groups[0]


class PictureFolder(Video):
    """Random access to the frames of a folder of pictures.

    A picture that cannot be decoded ends the video, except for reads that do not need it.

    Args:
      path: the folder.
      clip: as for `Video`.

    Raises:
      InputError: the folder is not a video, or its first picture cannot be decoded.
    """

    def __init__(self, path: str | os.PathLike, clip: ClipSpec | None = None):
        names = frame_names(path)
        try:
            first = in_time(path, read_picture, os.path.join(path, names[0]))
        except InputError as error:
            said = str(error).removeprefix(f"{path}: ").removeprefix(os.path.join(path, ""))
            raise InputError(f"{path}: {said}") from error
        height, width = video.to_rgb([first], None).shape[1:3]
        codec = os.path.splitext(names[0])[1].lower()[1:]
        super().__init__(path, VideoInfo(len(names), RATE, width, height, codec), clip)
        self._names = "/".join(names)  # one text: data sets have hundreds of thousands of folders

    def _read(self, start: int, count: int, size: tuple[int, int], exact: bool) -> np.ndarray:
        names = _sampled(self._names.split("/"), self._clip)
        window = names[start : start + count]
        frames: Sequence = list(_frames(self.path, window))
        if not frames or len(frames) < len(window) or start + count > max(count, len(names)):
            frames = self._last(_frames(self.path, names), start, count, exact)
        return video.to_rgb(frames, size)


def _sampled(names: Sequence[str], clip: ClipSpec) -> list[str]:
    return [names[clip.number(k, RATE)] for k in range(clip.count(len(names), RATE))]


def _frames(folder: str | os.PathLike, names: Iterable[str]) -> Iterator:
    """Decoded pictures, up to the first that cannot be decoded."""
    for name in names:
        try:
            yield read_picture(os.path.join(folder, name))
        except InputError:
            return


def read_picture(path: str | os.PathLike):
    """A picture as a decoded frame for `larp_jax.data.video.to_rgb`.

    Raises:
      InputError: it is missing, damaged or of an unknown kind.
    """
    try:
        with stage("read"):
            data = pathlib.Path(path).read_bytes()
        # FFmpeg paints what is missing of a JPEG gray. A marker ends it, after those that begin its parts.
        if data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            raise InputError("the end is missing")
        (frame,) = video.image_frames([data])
    except (InputError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({reason(error)}); give another") from error
    return frame


def open_video(path: str | os.PathLike, clip: ClipSpec | None = None) -> Video:
    """Opens a video file or a folder of pictures; `clip` gives the rate at which it is sampled.

    Raises:
      InputError: no frame of it can be decoded.
    """
    return PictureFolder(path, clip) if os.path.isdir(path) else video.VideoFile(path, clip)


def read_windows(
    path: str | os.PathLike, clip: ClipSpec, *, whole: bool = False
) -> Iterator[tuple[int, np.ndarray, int]]:
    """`larp_jax.data.video.read_windows` for a video file or a folder of pictures."""
    if not os.path.isdir(path):
        return video.read_windows(path, clip, whole=whole)
    names = _sampled(frame_names(path), clip)
    size = None if whole else clip.size
    windows = video.in_windows(path, _frames(path, names), clip.frames, size, claimed=len(names))
    return each_in_time(path, windows)


def video_size(path: str | os.PathLike) -> int:
    """Bytes of a video file, or of the pictures of a folder."""
    return sum(map(os.path.getsize, _files(path)))


def video_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a video file, or of the digests of the pictures of a folder in order; in hexadecimal."""
    digests = list(map(files.digest, _files(path)))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _files(path: str | os.PathLike) -> list[str]:
    return [os.path.join(path, name) for name in frame_names(path)] if os.path.isdir(path) else [os.fspath(path)]
