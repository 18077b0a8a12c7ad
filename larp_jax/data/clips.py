"""How a clip is cut from a video: arithmetic on sizes and frame numbers."""

import dataclasses

import numpy as np

from larp_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """Length, size and augmentation of clips.

    Attributes:
      frames: T, consecutive frames at the video's own rate.
      resolution: H = W. The shorter side is resized to it (bilinear, antialiased) and the center is cut out.
      flip: whether a random half of the training clips is mirrored left to right. Evaluation never flips.
    """

    frames: int = 16
    resolution: int = 128
    flip: bool = True

    def __post_init__(self):
        for name in ("frames", "resolution"):
            if getattr(self, name) < 1:
                raise InputError(f"a clip's {name} must be positive, got {getattr(self, name)}")

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
