"""Writes copies of videos of people in other colors, so that a generator meets many people (docs/streaming.md).

    python docs/actions_recolored.py six mixed 20

Writes 12 copies of each video by default. A copy has its own light, and its own colors of dark and of medium clothes,
from its first frame to its last. Class folders are kept.
"""

import pathlib
import sys

import numpy as np

from larp_jax.data.folders import find_videos
from larp_jax.data.pictures import open_video
from larp_jax.data.video import write_video

EDGE = 0.25  # share of the width on either side where there is wall, except for arms at times
DIFFERENT = (0.08, 0.2)  # difference from the wall of the row from which a pixel may be, and is, of the person
TONES = (0.1, 0.35)  # brightness of clothes that get a new color each; others get one between
KEPT = (0.4, 0.6)  # brightness from which they start to keep their colors, and fully do; skin is bright too


def ramp(values: np.ndarray, begin: float, end: float) -> np.ndarray:
    """0 up to `begin`, 1 from `end` on, and linear between."""
    return np.clip((values - begin) / (end - begin), 0, 1)


def person_mask(frames: np.ndarray) -> np.ndarray:
    """How much each pixel of float frames [T, H, W, 3] in [0, 1] is of the person, [T, H, W, 1] in [0, 1].

    The wall of a row is its median over all frames, away from the middle: people hardly leave it, so a median of each
    pixel would show them.
    """
    edge = round(EDGE * frames.shape[2])
    wall = np.median(np.concatenate([frames[:, :, :edge], frames[:, :, -edge:]], axis=2), axis=(0, 2))
    return ramp(np.abs(frames - wall[:, None]).max(axis=-1, keepdims=True), *DIFFERENT)


def recolored(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 frames [T, H, W, 3] of a person before a wall, in random colors."""
    frames = frames / np.float32(255)
    mask = person_mask(frames)
    light = frames * rng.uniform(0.92, 1.08, 3)
    tone = frames.mean(axis=-1)
    colors = rng.uniform(0.05, 0.45, (len(TONES), 1)) * rng.uniform(0.75, 1.25, (len(TONES), 3))
    clothes = np.stack([np.interp(tone, TONES, channel) for channel in colors.T], axis=-1)
    mixed = light + mask * (1 - ramp(tone, *KEPT)[..., None]) * (clothes - light)
    return np.round(255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def main(folder: str, output: str, copies: str = "12", seed: str = "0") -> None:
    """Writes the copies."""
    videos = find_videos(folder)
    for number, path in enumerate(videos.paths):
        video = open_video(path)
        frames = video.read(0, video.info.frames, (video.info.height, video.info.width))
        target = pathlib.Path(output) / path.relative_to(folder).parent
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(int(copies)):
            colors = np.random.default_rng([int(seed), number, copy])
            write_video(target / f"{path.stem}_{copy:02}.mp4", recolored(frames, colors), video.info.fps)


if __name__ == "__main__":
    main(*sys.argv[1:])
