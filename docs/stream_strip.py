"""Draws frames of a stream that larp-jax stream wrote, 16 in a row (docs/streaming.md).

    python docs/stream_strip.py stream 16 80 2 docs/actions_stream.png

The numbers are the first frame, the one after the last, and the step.
"""

import json
import pathlib
import sys

import numpy as np

from larp_jax.data.video import VideoFile, frame_grid, write_png


def main(folder: str, start: str, stop: str, step: str, picture: str) -> None:
    """Writes the picture."""
    parts = json.loads((pathlib.Path(folder) / "manifest.json").read_text())["parts"]
    frames = []
    for part in parts:
        video = VideoFile(pathlib.Path(folder) / part["file"])
        frames.append(video.read(0, part["frames"], (video.info.height, video.info.width), exact=True))
    chosen = np.concatenate(frames)[slice(int(start), int(stop), int(step))]
    write_png(picture, frame_grid([chosen[i : i + 16] for i in range(0, len(chosen), 16)], columns=16))


if __name__ == "__main__":
    main(*sys.argv[1:])
