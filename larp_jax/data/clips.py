"""How a clip is cut from a video: arithmetic on sizes, frame numbers and times."""

import dataclasses
import math
from typing import Any, Self

import numpy as np

from larp_jax.errors import InputError

# Seconds by which a frame may come after its time of sampling: containers round times to milliseconds.
LATE = 2e-3


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """Length, size, rate and augmentation of clips.

    With `fps` or `stride`, numbers of frames count sampled frames: frame k is the one that is shown k / fps seconds
    after the first, or every `stride`-th.

    Attributes:
      frames: T, consecutive frames.
      resolution: H = W, or (H, W). Frames are resized to cover it (bilinear, antialiased), a square with their shorter
        side, and the center is cut out. For squares it becomes a single number.
      flip: whether a random half of the training clips is mirrored left to right. Evaluation never flips.
      fps: frames per second at which videos are sampled; 0 for their own rates.
      stride: every how many frames one is taken; 1 for all.

    Raises:
      InputError: a number is out of its range.
    """

    frames: int = 16
    resolution: int | tuple[int, int] = 128
    flip: bool = True
    fps: float = 0.0
    stride: int = 1

    def __post_init__(self):
        height, width = self.size
        object.__setattr__(self, "resolution", height if height == width else (height, width))
        for name in ("frames", "resolution", "stride"):
            if min(self.size if name == "resolution" else (getattr(self, name),)) < 1:
                raise InputError(f"a clip's {name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.fps < math.inf:
            raise InputError(f"a clip's fps must be positive, or 0 for the rates of the videos, got {self.fps}")
        if self.fps and self.stride > 1:
            raise InputError(f"a clip has an fps, {self.fps:g}, or a stride, {self.stride}, not both; leave one out")

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], **options: Any) -> Self:
        """The clips of a model, whose shape is [T, H, W, C]; `options` are the other attributes."""
        frames, height, width, _ = shape
        return cls(frames, (height, width), **options)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        side = self.resolution
        return side if isinstance(side, tuple) else (side, side)

    @property
    def sampling(self) -> dict[str, float]:
        """`fps` or `stride` by name, ready for JSON; empty for consecutive frames."""
        return ({"fps": self.fps} if self.fps else {}) | ({"stride": self.stride} if self.stride > 1 else {})

    def rate(self, fps: float) -> float:
        """Frames per second after sampling of a video of `fps` (0: unknown)."""
        return self.fps or fps / self.stride

    def number(self, k: int, fps: float) -> int:
        """The number in a video of constant rate `fps` of sampled frame k."""
        return int((k / self.fps + LATE) * fps) if self.fps else k * self.stride

    def count(self, frames: int, fps: float) -> int:
        """How many frames a video of `frames` frames and constant rate `fps` has after sampling."""
        last = max(0, frames - 1)
        return 1 + (int((last / fps + LATE) * self.fps) if self.fps else last // self.stride)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[T, H, W, 3]."""
        return self.frames, *self.size, 3


def scaled_size(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a frame after resizing it to just cover `size`, (H, W); the longer side is rounded down."""
    rows, columns = size
    if columns * height > rows * width:
        return columns, columns * height // width
    return rows * width // height, rows


def center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A view of the central (height, width) pixels of [H, W] or [H, W, C]."""
    top, left = (round((side - n) / 2) for side, n in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def mirror(frames: np.ndarray) -> np.ndarray:
    """Mirrors [T, H, W, C] left to right, as a copy: later reads are six times faster than from a reversed view."""
    mirrored = np.empty_like(frames)
    for channel in range(frames.shape[-1]):
        mirrored[..., channel] = frames[:, :, ::-1, channel]
    return mirrored


def last_start(video_frames: int, clip_frames: int) -> int:
    """The last frame at which a clip may start; 0 if the video is not longer than the clip."""
    return max(0, video_frames - clip_frames)


def window_starts(video_frames: int, clip_frames: int) -> range:
    """First frames of consecutive windows that do not overlap.

    Leftover frames at the end are dropped, but a video shorter than a clip is one window.
    """
    return range(0, last_start(video_frames, clip_frames) + 1, clip_frames)


def spread_starts(video_frames: int, clip_frames: int, count: int) -> list[int]:
    """First frames of at most `count` windows, spread evenly from the first to the last full one; they may overlap."""
    return sorted(set(np.linspace(0, last_start(video_frames, clip_frames), count).round().astype(int).tolist()))


def repeat_last(frames: np.ndarray, count: int) -> np.ndarray:
    """Extends [n, H, W, 3] with n >= 1 to `count` frames by repeating the last one."""
    missing = count - len(frames)
    return frames if missing <= 0 else np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
