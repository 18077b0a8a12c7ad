"""The interface of all data sets of videos: random access to videos by index."""

import abc
from collections.abc import Callable, Iterable

import numpy as np

from larp_jax.data.clips import ClipSpec


class Source(abc.ABC):
    """Random access to the videos of a data set; safe to use from several threads, and can be pickled.

    Subclasses implement all abstract methods. An index is that of a video, independent of its storage.

    Args:
      label_names: names of the classes in the order of their labels; empty without classes.
      skipped: (path, reason) of each file that could not be read when the source was opened.

    Attributes:
      label_names: as given.
      skipped: as given.
    """

    def __init__(self, label_names: Iterable[str] = (), skipped: Iterable[tuple[str, str]] = ()):
        self.label_names = tuple(label_names)
        self.skipped = list(skipped)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of videos, at least 1."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Name of a video: the path of its file within the folder, or its position in the data set."""

    @abc.abstractmethod
    def fps(self, index: int) -> float:
        """Frames per second; 0.0 if unknown."""

    @abc.abstractmethod
    def frames(self, index: int) -> int:
        """Number of frames according to the header; a damaged file may decode to fewer."""

    def aspect(self, index: int) -> float:
        """Width over height of a video of square pixels; 0.0 if it is not known without reading the video."""
        return 0.0

    @abc.abstractmethod
    def label(self, index: int) -> int:
        """Class of a video; -1 for none."""

    @abc.abstractmethod
    def read_clip(self, index: int, start: int | np.random.Generator, clip: ClipSpec) -> tuple[np.ndarray, int]:
        """Reads one clip.

        Args:
          index: index of the video.
          start: number of the first frame; a Generator samples it uniformly from the starts of all full clips.
          clip: length and size.

        Returns:
          uint8 [T, H, W, 3], with the last frame repeated if the video is shorter, and the label (-1: none).

        Raises:
          InputError: the video cannot be read, or has at least T frames but too few after the start.
        """

    @abc.abstractmethod
    def size(self, index: int) -> int:
        """Size of a video in bytes, as stored."""

    @abc.abstractmethod
    def digest(self, index: int) -> str:
        """SHA-256 of a video as stored, in hexadecimal digits."""

    @abc.abstractmethod
    def origin(self, index: int) -> tuple[int, Callable[[], str]]:
        """Bytes of the original file of a video, which may be the video itself, and a function for its SHA-256."""
