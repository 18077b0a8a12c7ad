"""What every data set of videos offers: random access to its videos by number."""

import abc
from collections.abc import Callable, Iterable

import numpy as np

from larp_jax.data.clips import ClipSpec


class Source(abc.ABC):
    """Random access to the videos of a data set; safe to use from several threads, and can be pickled.

    Subclasses implement all methods. Indices count videos, however they are stored.

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
        """Name of a video: the path of its file within the folder, or its number in the data set."""

    @abc.abstractmethod
    def fps(self, index: int) -> float:
        """Frames per second; 0.0 if unknown."""

    @abc.abstractmethod
    def frames(self, index: int) -> int:
        """Number of frames according to the header; a damaged file may decode to fewer."""

    @abc.abstractmethod
    def label(self, index: int) -> int:
        """Class of a video; -1 for none."""

    @abc.abstractmethod
    def read_clip(self, index: int, start: int | np.random.Generator, clip: ClipSpec) -> tuple[np.ndarray, int]:
        """Reads one clip.

        Args:
          index: the video.
          start: number of the first frame; a Generator samples one uniformly from all that leave a full clip.
          clip: length and size.

        Returns:
          uint8 [T, H, W, 3], its last frame repeated if the video is shorter, and the video's label (-1: none).

        Raises:
          InputError: the video cannot be read, or does not reach a full clip from the start that was given.
        """

    @abc.abstractmethod
    def size(self, index: int) -> int:
        """Bytes of a video as it is stored."""

    @abc.abstractmethod
    def digest(self, index: int) -> str:
        """SHA-256 of a video as it is stored, in hexadecimal digits."""

    @abc.abstractmethod
    def origin(self, index: int) -> tuple[int, Callable[[], str]]:
        """Bytes of the file that a video was made from, which may be itself, and a function for its SHA-256."""
