"""What commands are pointed at: a video file, a folder of them, or a data set, read as windows of T frames."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from larp_jax import data
from larp_jax.data.clips import repeat_last, spread_starts
from larp_jax.data.folders import NO_LABEL, FolderVideos, find_videos
from larp_jax.data.pipeline import choose_windows
from larp_jax.data.spec import LISTS, advice, spec_of
from larp_jax.data.video import EXTENSIONS, VideoFile, read_windows
from larp_jax.errors import InputError
from larp_jax.files import local_path

logger = logging.getLogger(__name__)

# Of videos written where the source does not say, or says what no player takes.
DEFAULT_FPS = 8.0


class Window(NamedTuple):
    """T consecutive frames of a video.

    Attributes:
      video: number of the video.
      start: its first frame.
      frames: uint8 [T, H, W, 3].
      valid: how many of the frames are the video's; the last of them is repeated to make T.
      label: number of the class; -1 for none.
    """

    video: int
    start: int
    frames: np.ndarray
    valid: int
    label: int


@dataclasses.dataclass(frozen=True)
class InputVideo:
    """One video.

    Attributes:
      name: path within the folder, with forward slashes; of a data set, the split and the number in it.
      path: the file; None in a data set.
      fps: frames a second; 0.0 where unknown.
      windows: how many windows to expect, by the video's header.
      read: iterates over its windows as (start, frames, valid, label).
    """

    name: str
    path: pathlib.Path | None
    fps: float
    windows: int
    read: Callable[[], Iterator[tuple[int, np.ndarray, int, int]]]


class Inputs:
    """The videos that a text names.

    Files are read whole: consecutive windows that do not overlap, the last one filled up. Data sets give the windows
    that evaluation takes: full ones only, or one of a video that is shorter. With `windows` both give so many.

    Args:
      text: path of a video file or of a folder, of which all below is read; or the spec of a data set, whose split is
        `test` if it names none, that of a `folder:PATH` of splits too.
      clip: what a window is.
      max_clips: of a data set, at most so many windows, spread over it; 0 takes all.
      windows: of every video, at most so many full windows, spread over it; 0 for those above.

    Attributes:
      videos: those that can be read, by their headers.
      label_names: names of the classes in the order of their labels; empty without.
      skipped: (name, reason) of each video that cannot be read. Grows while reading.
      is_data_set: whether the text was the spec of one.

    Raises:
      InputError: there is nothing of that name, or nothing readable in it.
    """

    def __init__(self, text: str, clip: data.ClipSpec, *, max_clips: int = 0, windows: int = 0):
        if max_clips and windows:
            raise InputError("at most so many windows can be asked for of a data set or of each video, not both")
        self._clip, self._windows = clip, windows
        self.label_names: tuple[str, ...] = ()
        self.skipped: list[tuple[str, str]] = []
        spec = spec_of(text)
        self.is_data_set = spec is not None and spec.kind != "folder"
        if self.is_data_set:
            self.videos = self._of_data_set(spec, max_clips)
            return
        if spec is not None:
            self.videos = self._of_folder(find_videos(spec.name).of_split("test"))
            return
        path = local_path(text, "--input")
        if path.is_dir():
            self.videos = self._of_folder(find_videos(path))
        elif not path.exists():
            raise InputError(f"{text} does not exist; give a video file, a folder of videos, or {data.spec.FORMS}")
        elif path.suffix.lower() in LISTS:
            raise InputError(f"{text} is no video; {advice(path)}")
        else:
            self.videos = [self._of_file(VideoFile(path), path.name)]

    @property
    def windows(self) -> int:
        """How many windows to expect; damaged files give fewer."""
        return sum(video.windows for video in self.videos)

    def batches(self, size: int) -> Iterator[tuple[list[Window], np.ndarray]]:
        """Reads all videos, one after the other.

        A video that turns out to be unreadable is logged, added to `skipped` and passed over.

        Yields:
          Windows, `size` of them but for the last time, and their frames as uint8 [size, T, H, W, 3], filled up by
          repeating the last window.
        """
        windows = self._read()
        while rows := list(itertools.islice(windows, size)):
            yield rows, np.stack([row.frames for row in rows + rows[-1:] * (size - len(rows))])

    def _read(self) -> Iterator[Window]:
        for number, video in enumerate(self.videos):
            try:
                for start, frames, valid, label in video.read():
                    yield Window(number, start, frames, valid, label)
            except InputError as error:
                self._skip(video.name, str(error))

    def _skip(self, name: str, reason: str) -> None:
        logger.warning("skipped %s", reason if name in reason else f"{name}: {reason}")
        self.skipped.append((name, reason))

    def _of_file(self, file: VideoFile, name: str, label: int = NO_LABEL) -> InputVideo:
        length, clip = file.info.frames, self._clip
        if self._windows:
            starts = spread_starts(length, clip.frames, self._windows)

            def read():
                for start in starts:
                    frames = file.read(start, clip.frames, clip.resolution, exact=True)
                    yield start, repeat_last(frames, clip.frames), len(frames), label

            return InputVideo(name, file.path, file.info.fps, len(starts), read)

        def read():
            for start, frames, valid in read_windows(file.path, clip):
                yield start, frames, valid, label

        return InputVideo(name, file.path, file.info.fps, -(-length // clip.frames), read)

    def _of_folder(self, found: FolderVideos) -> list[InputVideo]:
        files, labels, unreadable = found.open()
        for name, reason in unreadable:
            self._skip(name, reason)
        self.label_names = found.label_names
        if len(splits := dict.fromkeys(found.splits)) > 1:
            logger.warning("%s holds the splits %s: all are read", found.folder, ", ".join(splits))
        return [self._of_file(file, found.name(file.path), label) for file, label in zip(files, labels, strict=True)]

    def _of_data_set(self, spec: data.DataSpec, max_clips: int) -> list[InputVideo]:
        split = spec.split or "test"
        source = data.open_source(spec, self._clip, default_split=split)
        self.label_names = source.label_names
        prefix = "".join(c if c.isalnum() else "_" for c in split).strip("_")

        def read(index, starts):
            for start in starts:
                frames, label = source.read_clip(index, start, self._clip)
                yield start, frames, min(self._clip.frames, source.frames(index) - start), label

        if self._windows:
            starts = lambda index: spread_starts(source.frames(index), self._clip.frames, self._windows)  # noqa: E731
            windows = [(index, start) for index in range(len(source)) for start in starts(index)]
        else:
            windows = choose_windows(source, self._clip, max_clips)
        videos = []
        for index, group in itertools.groupby(windows, key=lambda pair: pair[0]):
            starts = [start for _, start in group]
            windows = functools.partial(read, index, starts)
            videos.append(InputVideo(f"{prefix}_{index:06d}", None, source.fps(index), len(starts), windows))
        return videos


def output_names(names: Sequence[str]) -> list[str]:
    """Names for what is made of videos: without their suffixes, unless only those tell two of them apart.

    Parts too long for a file system to take with more at their end become shorter, with a digest of the whole name.
    """
    stems = [str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else str(path)
             for path in map(pathlib.PurePosixPath, names)]  # fmt: skip
    unique = len({stem.casefold() for stem in stems}) == len(stems)
    return ["/".join(map(_shortened, name.split("/"))) for name in (stems if unique else names)]


def _shortened(name: str, limit: int = 255 - len("-flipped-000000.mp4")) -> str:
    data = os.fsencode(name)
    if len(data) <= limit:
        return name
    mark = "~" + hashlib.sha256(data).hexdigest()[:16]
    return data[: limit - len(mark)].decode(errors="ignore") + mark


def playable_fps(fps: float) -> float:
    """The rate to write a video at."""
    return fps if 0.1 <= fps <= 1000.0 else DEFAULT_FPS
