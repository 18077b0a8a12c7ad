"""How a clip is cut from a video: arithmetic on sizes, frame numbers and times."""

import dataclasses
import math

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
      resolution: H = W. The shorter side is resized to it (bilinear, antialiased) and the center is cut out.
      flip: whether a random half of the training clips is mirrored left to right. Evaluation never flips.
      fps: frames per second at which videos are sampled; 0 for their own rates.
      stride: every how many frames one is taken; 1 for all.

    Raises:
      InputError: a number is out of its range.
    """

    frames: int = 16
    resolution: int = 128
    flip: bool = True
    fps: float = 0.0
    stride: int = 1

    def __post_init__(self):
        for name in ("frames", "resolution", "stride"):
            if getattr(self, name) < 1:
                raise InputError(f"a clip's {name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.fps < math.inf:
            raise InputError(f"a clip's fps must be positive, or 0 for the rates of the videos, got {self.fps}")
        if self.fps and self.stride > 1:
            raise InputError(f"a clip has an fps, {self.fps:g}, or a stride, {self.stride}, not both; leave one out")

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
        return self.frames, self.resolution, self.resolution, 3


def scaled_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) of a frame after resizing its shorter side to `resolution`; the other side is rounded down."""
    if width < height:
        return resolution, resolution * height // width
    return resolution * width // height, resolution


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """A view of the central size x size pixels of [H, W] or [H, W, C]."""
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


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
