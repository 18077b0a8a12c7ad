"""Writes moving shapes as long videos, beside few videos of people that a generator would memorize (docs/streaming.md).

    python docs/actions_shapes.py mixed/without_people train 150 6
    python docs/actions_shapes.py seventh/without_people test 1 4

Of so many clips each, 40 by default, of 16 frames of 48x48. Each frame comes twice, so that every second one is a clip.
"""

import pathlib
import sys

import numpy as np

from larp_jax import data
from larp_jax.data import ClipSpec
from larp_jax.data.video import write_video


def main(folder: str, split: str = "train", videos: str = "24", clips: str = "40") -> None:
    """Writes the videos."""
    clip = ClipSpec.of((16, 48, 48, 3))
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with data.train_batches(f"moving_shapes/plain:{split}", clip, batch_size=int(clips), seed=0) as batches:
        for number in range(int(videos)):
            frames = next(batches)["video"].reshape(-1, *clip.shape[1:])
            write_video(pathlib.Path(folder) / f"{number:02}.mp4", np.repeat(frames, 2, axis=0), 25.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
