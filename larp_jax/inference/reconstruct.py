"""Videos next to their reconstructions, with PSNR."""

import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from larp_jax import files
from larp_jax.api import LoadedTokenizer
from larp_jax.data import ClipSpec
from larp_jax.data.inputs import Inputs, Window, output_names, playable_fps
from larp_jax.data.video import frame_grid, write_png, write_video
from larp_jax.errors import InputError
from larp_jax.metrics import SMALLEST_MSE
from larp_jax.models.pixels import to_uint8
from larp_jax.runtime.progress import Progress

logger = logging.getLogger(__name__)

SUMMARY = "psnr.json"
PSNR = "10 log10(1 / MSE) in dB over all pixels of the video's frames in [0, 1], at the model's resolution, not rounded"
DATA_SET_CLIPS = 8
GRID_COLUMNS = 8


def reconstruct(
    tokenizer: LoadedTokenizer,
    source: str,
    output: str | os.PathLike,
    *,
    max_clips: int = DATA_SET_CLIPS,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Reconstructs videos of any length and size, window by window, in memory independent of their length.

    For each video, writes NAME.mp4 (original left, reconstruction right, at the model's resolution and the video's
    frame rate) and NAME.png (up to 8 frames of the original, those of the reconstruction below), and prints its PSNR.
    Also writes `psnr.json`.

    Args:
      tokenizer: the tokenizer.
      source: input, as for `larp_jax.data.inputs.Inputs`.
      output: folder to write to, created if missing, with the same subfolders as the input.
      max_clips: at most this many clips of a data set, spread evenly over it; 0 for all.
      batch_size: windows per batch.

    Returns:
      The contents of `psnr.json`: `videos` by name with `psnr`, `frames` and `output`; `mean_psnr`; `skipped`; `files`,
      all files written to the folder by this call and earlier ones.

    Raises:
      InputError: nothing can be read, or the output would overwrite files that are not reconstructions.
    """
    config = tokenizer.config
    output = files.check_folder(output)
    inputs = Inputs(source, ClipSpec(frames=config.frames, resolution=config.resolution), max_clips=max_clips)
    names = output_names([video.name for video in inputs.videos])
    paths = [*(f"{name}{suffix}" for name in names for suffix in (".mp4", ".png")), SUMMARY]
    ours = files.json_object(output / SUMMARY).get("files", ())
    sources = [video.path for video in inputs.videos if video.path]
    with files.outputs(output, paths, ours=ours, inputs=sources, but=" and is not an earlier reconstruction") as folder:
        results = {}
        with Progress(inputs.windows, description="reconstruct", unit="clip") as progress:
            windows = _reconstructions(tokenizer, inputs, batch_size, progress)
            for number, group in itertools.groupby(windows, key=lambda pair: pair[0].video):
                video = inputs.videos[number]
                path = folder / f"{names[number]}.mp4"
                files.make_folder(path.parent)
                score, frames = _write_pair(path, group, video.windows * config.frames, playable_fps(video.fps))
                results[video.name] = {"psnr": score, "frames": frames, "output": path.relative_to(folder).as_posix()}
                tqdm.write(f"{video.name}: {score:.2f} dB over {frames} frames")
        if not results:
            raise InputError(f"{source}: nothing in it can be read")
        summary = {
            "definition": PSNR,
            "tokenizer": tokenizer.fingerprint,
            "step": tokenizer.step,
            "clip": list(config.clip_shape),
            "mean_psnr": float(np.mean([result["psnr"] for result in results.values()])),
            "videos": results,
            "skipped": dict(inputs.skipped),
            "files": sorted({*paths, *ours}),
        }
        files.write_json(folder / SUMMARY, summary)
    tqdm.write(f"mean of {len(results)} videos: {summary['mean_psnr']:.2f} dB, in {output}")
    if inputs.skipped:
        logger.warning("skipped %d of %d videos", len(inputs.skipped), len(inputs.skipped) + len(results))
    return summary


def _reconstructions(
    tokenizer: LoadedTokenizer, inputs: Inputs, batch_size: int, progress: Progress
) -> Iterator[tuple[Window, np.ndarray]]:
    """(window, reconstruction) of each window; reconstructions are float32 [T, H, W, 3] in [0, 1]."""
    for windows, clips in inputs.batches(batch_size):
        reconstructions = np.asarray(tokenizer.reconstruct(clips))
        progress.update(len(windows))
        yield from zip(windows, reconstructions, strict=False)  # the rest is padding


def _write_pair(
    path: pathlib.Path, windows: Iterator[tuple[Window, np.ndarray]], expected: int, fps: float
) -> tuple[float, int]:
    """Writes the video and the image of an input of about `expected` frames; returns (PSNR, number of frames)."""
    shown = set(np.linspace(0, expected - 1, GRID_COLUMNS).round().astype(int))
    grid = []
    error, frames = 0.0, 0

    def side_by_side():
        nonlocal error, frames
        for window, reconstruction in windows:
            for original, reconstructed in zip(window.frames[: window.valid], reconstruction, strict=False):
                error += float(np.mean(np.square(reconstructed - original / np.float32(255)), dtype=np.float64))
                pair = original, to_uint8(reconstructed)
                if frames in shown:
                    grid.append(pair)
                frames += 1
                yield np.concatenate(pair, axis=1)

    write_video(path, side_by_side(), fps)
    write_png(
        path.with_name(f"{path.name.removesuffix('.mp4')}.png"),
        frame_grid([np.stack(row) for row in zip(*grid, strict=True)]),
    )
    return -10.0 * float(np.log10(max(error / frames, SMALLEST_MSE))), frames
