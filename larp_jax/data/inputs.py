"""Inputs of commands: a video, a folder of videos, or a data set, read as windows of T frames."""

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
from larp_jax.data.pictures import open_video, read_picture, read_windows
from larp_jax.data.pipeline import choose_windows
from larp_jax.data.random_access import Video
from larp_jax.data.spec import LISTS, advice, spec_of
from larp_jax.data.video import EXTENSIONS, IMAGES, to_rgb
from larp_jax.errors import InputError
from larp_jax.files import local_path

logger = logging.getLogger(__name__)

# Frame rate of written videos if that of the source is unknown or not supported by players.
DEFAULT_FPS = 8.0


class Window(NamedTuple):
    """T consecutive frames of a video.

    Attributes:
      video: index of the video.
      start: number of its first frame.
      frames: uint8 [T, H, W, 3].
      valid: how many of the T frames are from the video; the last of them is repeated after that.
      label: class; -1 for none.
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
      name: path within the folder, with forward slashes; in a data set, the split and the index.
      path: the file, or the folder of pictures; None in a data set.
      fps: frames per second; 0.0 if unknown.
      windows: expected number of windows, according to the video's header.
      read: returns an iterator over its windows as (start, frames, valid, label).
    """

    name: str
    path: pathlib.Path | None
    fps: float
    windows: int
    read: Callable[[], Iterator[tuple[int, np.ndarray, int, int]]]


class Inputs:
    """The videos of an input.

    Files and folders of pictures are read completely: consecutive windows that do not overlap, the last one padded.
    Data sets give the windows of evaluation: only full ones, or one padded window if the video is shorter. `windows`
    replaces both rules.

    Args:
      text: path of a video file; path of a picture, which is one window that stands still; path of a folder, which is
        a video itself if it holds the pictures of one, and otherwise is read with its subfolders; or spec of a data
        set, whose split is `test` by default, also for a `folder:PATH` with splits.
      clip: length and size of a window.
      max_clips: at most this many windows of a data set, spread evenly over it; 0 for all.
      windows: at most this many full windows of each video, spread evenly over it; 0 for the windows above.
      whole: whether frames of files keep their own size, see `read_windows`; those of data sets have that of a clip.

    Attributes:
      videos: the videos whose headers can be read.
      label_names: names of the classes in the order of their labels; empty without classes.
      skipped: (name, reason) of each video that cannot be read. Grows while reading.
      is_data_set: whether the text is the spec of a data set.

    Raises:
      InputError: the input does not exist, or nothing in it can be read.
    """

    def __init__(
        self, text: str, clip: data.ClipSpec, *, max_clips: int = 0, windows: int = 0, whole: bool = False
    ):
        if max_clips and windows:
            raise InputError("--max-clips and --windows cannot be combined; give one of them")
        self._clip, self._windows, self._whole = clip, windows, whole
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
            raise InputError(f"{text} is not a video; {advice(path)}")
        elif path.suffix.lower() in IMAGES:
            self.videos = [self._of_picture(path)]
        else:
            self.videos = [self._of_file(open_video(path, self._clip), path.name)]

    @property
    def windows(self) -> int:
        """Expected number of windows; damaged files give fewer."""
        return sum(video.windows for video in self.videos)

    def batches(self, size: int) -> Iterator[tuple[list[Window], np.ndarray]]:
        """Reads all videos in order. Those that turn out to be unreadable are logged and added to `skipped`.

        Yields:
          `size` windows (the last time maybe fewer), and their frames as uint8 [size, T, H, W, 3], padded by repeating
          the last window.
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

    def _of_file(self, file: Video, name: str, label: int = NO_LABEL) -> InputVideo:
        length, clip = file.info.frames, self._clip
        if self._windows:
            starts = spread_starts(length, clip.frames, self._windows)

            def read():
                for start in starts:
                    frames = file.read(start, clip.frames, clip.size, exact=True)
                    yield start, repeat_last(frames, clip.frames), len(frames), label

            return InputVideo(name, file.path, file.info.fps, len(starts), read)

        def read():
            for start, frames, valid in read_windows(file.path, clip, whole=self._whole):
                yield start, frames, valid, label

        return InputVideo(name, file.path, file.info.fps, -(-length // clip.frames), read)

    def _of_picture(self, path: pathlib.Path) -> InputVideo:
        clip = self._clip
        frames = repeat_last(to_rgb([read_picture(path)], None if self._whole else clip.size), clip.frames)
        return InputVideo(path.name, path, 0.0, 1, lambda: iter([(0, frames, clip.frames, NO_LABEL)]))

    def _of_folder(self, found: FolderVideos) -> list[InputVideo]:
        files, labels, unreadable = found.open(self._clip)
        for name, why in unreadable:
            self._skip(name, why)
        self.label_names = found.label_names
        if len(splits := dict.fromkeys(found.splits)) > 1:
            logger.warning("%s contains the splits %s: all are read", found.folder, ", ".join(splits))
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
    """Names of the outputs for videos: without suffixes, unless some names differ only in their suffixes.

    Components that would become too long for a file system are shortened and end with a digest of the full name.
    """
    stems = [str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else str(path)
             for path in map(pathlib.PurePosixPath, names)]  # fmt: skip
    unique = len({stem.casefold() for stem in stems}) == len(stems)
    return ["/".join(map(_shortened, name.split("/"))) for name in (stems if unique else names)]


def _shortened(name: str, limit: int = 255 - len("-picture-flipped-000000.mp4")) -> str:
    data = os.fsencode(name)
    if len(data) <= limit:
        return name
    mark = "~" + hashlib.sha256(data).hexdigest()[:16]
    return data[: limit - len(mark)].decode(errors="ignore") + mark


def playable_fps(fps: float) -> float:
    """Frame rate for writing a video: `fps`, or 8 if players may not support it (as with 0, which means unknown)."""
    return fps if 0.1 <= fps <= 1000.0 else DEFAULT_FPS
