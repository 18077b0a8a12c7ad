"""What video files and folders of pictures have in common: random access to frames, within a time limit."""

import abc
import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from larp_jax.data.clips import ClipSpec
from larp_jax.data.limits import within_limit
from larp_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Header of a video. `frames` is at least 1; a damaged file may have fewer. The size is that of square pixels."""

    frames: int
    fps: float
    width: int
    height: int
    codec: str


class Video(abc.ABC):
    """Random access to the frames of a video.

    Safe to use from several threads, and can be pickled. A video that once took longer than the time limit
    (`larp_jax.data.limits`) is not read again.

    Args:
      path: the file or folder.
      info: its header.
      clip: gives the rate at which it is sampled; numbers of frames, also in `info`, are those of sampled frames.

    Attributes:
      path: the file or folder.
      info: the header, with frames and rate after sampling.
    """

    def __init__(self, path: str | os.PathLike, info: VideoInfo, clip: ClipSpec | None):
        self.path, self.info = pathlib.Path(path), info
        self._clip = clip or ClipSpec()
        if self._clip.sampling:
            count, rate = self._clip.count(info.frames, info.fps), self._clip.rate(info.fps)
            self.info = dataclasses.replace(info, frames=count, fps=rate)
        self._too_slow = ""  # the error message if the video is not read again

    def read(self, start: int, count: int, size: tuple[int, int], *, exact: bool = False) -> np.ndarray:
        """Reads consecutive frames, resized and cropped.

        Args:
          start: number of the first frame.
          count: number of frames, at least 1.
          size: (H, W).
          exact: whether to raise if the video decodes to fewer than start + count frames. Otherwise its last `count`
            frames are returned, or all of them if there are fewer.

        Returns:
          uint8 [n, H, W, 3], 1 <= n <= count.

        Raises:
          InputError: the video cannot be read in time, or `exact` is not met although it has more than `count` frames.
        """
        if self._too_slow:
            raise InputError(self._too_slow)
        try:
            return in_time(self.path, self._read, start, count, size, exact)
        except InputError as error:
            if isinstance(error.__cause__, TimeoutError):
                self._too_slow = str(error)
            raise

    @abc.abstractmethod
    def _read(self, start: int, count: int, size: tuple[int, int], exact: bool) -> np.ndarray:
        """`read` without a time limit."""

    def _last(self, frames: Iterator, start: int, count: int, exact: bool) -> Sequence:
        """What `read` returns, from decoding all frames from the beginning."""
        last = collections.deque(maxlen=count)
        number = 0
        for frame in itertools.islice(frames, start + count):
            last.append(frame)
            number += 1
        if not last:
            raise no_frames(self.path)
        if exact and 0 < start > number - count:
            raise InputError(f"{self.path}: ends after {number} frames, before frame {start + count}")
        return last


def each_in_time(path, windows: Iterator[T]) -> Iterator[T]:
    """The windows of a video; `InputError` if one exceeds the time limit."""
    while (window := in_time(path, next, windows, None)) is not None:
        yield window


def in_time(path, function, *arguments):
    """The result of the function; `InputError` if it exceeds the time limit."""
    try:
        return within_limit(function, *arguments)
    except TimeoutError as error:
        raise InputError(
            f"{path}: reading {error}; replace the file or leave it out, or raise LARP_VIDEO_TIME_LIMIT"
        ) from error


def no_frames(path) -> InputError:
    """The error of a video without frames."""
    return InputError(f"{path}: no frame of it can be decoded; replace the file or leave it out")
