"""Videos next to their reconstructions, with PSNR."""

import itertools
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from larp_jax import files
from larp_jax.api import LoadedTokenizer
from larp_jax.config import Ladder
from larp_jax.data import ClipSpec
from larp_jax.data.inputs import Inputs, Window, output_names, playable_fps
from larp_jax.data.video import frame_grid, write_png, write_video
from larp_jax.errors import InputError
from larp_jax.metrics import SMALLEST_MSE
from larp_jax.models.checks import checked_clip_shape
from larp_jax.models.pixels import to_uint8
from larp_jax.runtime.progress import Progress

logger = logging.getLogger(__name__)

SUMMARY = "psnr.json"
PSNR = "10 log10(1 / MSE) in dB over all pixels of the video's frames in [0, 1], {size}, not rounded"
FITS = ("resize", "tile", "crop")
DATA_SET_CLIPS = 8
GRID_COLUMNS = 8
BAR_COLOR = (33, 102, 172)


def reconstruct(
    tokenizer: LoadedTokenizer,
    source: str,
    output: str | os.PathLike,
    *,
    fit: str = "resize",
    size: int | tuple[int, int] | None = None,
    fewer_frames: bool = False,
    budget: str | None = None,
    max_clips: int = DATA_SET_CLIPS,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Reconstructs videos of any length and size, window by window, in memory independent of their length.

    For each video, writes NAME.mp4 (original left, reconstruction right, at the video's frame rate) and NAME.png (up to
    8 frames of the original, those of the reconstruction below), and prints its PSNR. Also writes `psnr.json`. If the
    tokenizer has a ladder, bars in NAME.png show how many of its most codes the block of a frame has.

    Files keep their shape; clips of data sets are resized and cropped, as for evaluation.

    Args:
      tokenizer: the tokenizer.
      source: input, as for `larp_jax.data.inputs.Inputs`.
      output: folder to write to, created if missing, with the same subfolders as the input.
      fit: how frames of files meet the size of the model's clips: `resize` squeezes whole frames to it and stretches
        the reconstruction back; `tile` covers them with clips at their own size, blended where they overlap; `crop`
        resizes frames to cover it and reconstructs the center only.
      size: side of a square, or (H, W), of the clips that the model encodes; by default, that of its configuration.
      fewer_frames: whether to encode windows at the end of a video that have fewer frames than a clip as they are, up
        to the end of a patch, instead of holding their last frame still.
      budget: how many codes clips get, as for `LoadedTokenizer.assign`; for tokenizers with a ladder.
      max_clips: at most this many clips of a data set, spread evenly over it; 0 for all.
      batch_size: windows per batch.

    Returns:
      The contents of `psnr.json`: `videos` by name with `psnr`, `frames`, `output` and, with a ladder, `codes`, their
      number; `mean_psnr`; `skipped`; `files`, all files written to the folder by this call and earlier ones.

    Raises:
      InputError: nothing can be read, the model does not take such clips, or the output would overwrite files that are
        not reconstructions.
    """
    if fit not in FITS:
        raise InputError(f"--fit {fit} is not known; choose from {', '.join(FITS)}")
    config = tokenizer.config
    tokenizer.assigner(budget)  # refuses a wrong budget before any work
    output = files.check_folder(output)
    clip = ClipSpec.of(checked_clip_shape(config, size, fewer_frames=fewer_frames))
    inputs = Inputs(source, clip, max_clips=max_clips, whole=fit != "crop")
    names = output_names([video.name for video in inputs.videos])
    paths = [*(f"{name}{suffix}" for name in names for suffix in (".mp4", ".png")), SUMMARY]
    ours = files.json_object(output / SUMMARY).get("files", ())
    sources = [video.path for video in inputs.videos if video.path]
    with files.outputs(output, paths, ours=ours, inputs=sources, but=" and is not an earlier reconstruction") as folder:
        with Progress(inputs.windows, description="reconstruct", unit="clip") as progress:
            windows = _reconstructions(tokenizer, inputs, clip, fit, budget, fewer_frames, batch_size, progress)
            results = _write_videos(folder, inputs, names, windows, clip.frames, config.adaptive)
        if not results:
            raise InputError(f"{source}: nothing in it can be read")
        summary = {
            "definition": PSNR.format(size="at the size of the clip" if fit == "crop" else "at the video's size"),
            "fit": fit,
            **({"budget": budget} if budget else {}),
            "tokenizer": tokenizer.fingerprint,
            "step": tokenizer.step,
            "clip": list(clip.shape),
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
    tokenizer: LoadedTokenizer,
    inputs: Inputs,
    clip: ClipSpec,
    fit: str,
    budget: str | None,
    fewer_frames: bool,
    batch_size: int,
    progress: Progress,
) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """(window, reconstruction, codes) of each window.

    Reconstructions are float32 [T, H, W, 3] in [0, 1]. The numbers of codes are [tiles, blocks], of each tile that the
    model saw; without a ladder, all of a tile in one block.
    """
    windows = (window for rows, _ in inputs.batches(1) for window in rows)
    if fewer_frames:
        unit = tokenizer.config.clip_unit[0]
        windows = (window._replace(frames=window.frames[: -(-window.valid // unit) * unit]) for window in windows)
    for group in _alike(windows, batch_size):
        parts = [_tiles(window.frames, clip.size, fit) for window in group]
        tiles = np.concatenate(parts)
        found, lengths = [], []
        for start in range(0, len(tiles), batch_size):
            batch = tiles[start : start + batch_size]
            padded = np.resize(batch, (batch_size, *batch.shape[1:]))
            given = tokenizer.assign(padded, budget)
            found.append(np.asarray(tokenizer.reconstruct(padded, budget=given))[: len(batch)])
            fixed = np.full((len(batch), 1), tokenizer.config.num_tokens)
            lengths.append(fixed if given is None else given[: len(batch)])
        ends = np.cumsum([len(part) for part in parts])[:-1]
        split = (np.split(np.concatenate(arrays), ends) for arrays in (found, lengths))
        for window, reconstructed, numbers in zip(group, *split, strict=True):
            yield window, _assembled(reconstructed, window.frames.shape, fit), numbers
        progress.update(len(group))


def _alike(windows: Iterator[Window], count: int) -> Iterator[list[Window]]:
    """Consecutive windows with the same number of frames, at most `count` together."""
    for _, group in itertools.groupby(windows, key=lambda window: len(window.frames)):
        while rows := list(itertools.islice(group, count)):
            yield rows


def _tiles(frames: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """What the model sees of uint8 frames [T, h, w, 3]: [n, T, H, W, 3], float32 in [0, 1], with `size` (H, W)."""
    video = frames.astype(np.float32) / 255.0
    if frames.shape[1:3] == size or fit == "resize":
        return _resized(video, size)[None]
    missing = ((0, max(0, side - n)) for side, n in zip(size, frames.shape[1:3], strict=True))
    video = np.pad(video, ((0, 0), *missing, (0, 0)), mode="edge")
    return np.stack([video[:, place[0], place[1]] for place in _places(video.shape[1:3], size)])


def _assembled(tiles: np.ndarray, shape: tuple[int, ...], fit: str) -> np.ndarray:
    """Frames [T, H, W, 3] of this shape from the reconstruction of `_tiles`."""
    size = tiles.shape[2:4]
    if shape[1:3] == size or fit == "resize":
        return _resized(tiles[0], shape[1:3])
    whole = tuple(map(max, shape[1:3], size))
    ramps = [np.minimum(np.arange(n), np.arange(n)[::-1]).astype(np.float32) + 1.0 for n in size]
    weight = (ramps[0][:, None] * ramps[1])[..., None]
    total, weights = np.zeros((shape[0], *whole, 3), np.float32), np.zeros((*whole, 1), np.float32)
    for tile, place in zip(tiles, _places(whole, size), strict=True):
        total[:, place[0], place[1]] += weight * tile
        weights[place] += weight
    return (total / weights)[:, : shape[1], : shape[2]]


def _places(whole: tuple[int, ...], size: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of each tile of this size in frames that are at least as large."""
    starts = map(_tile_starts, whole, size)
    return ((slice(top, top + size[0]), slice(left, left + size[1])) for top, left in itertools.product(*starts))


def _tile_starts(length: int, side: int) -> list[int]:
    """First pixels of the fewest tiles that cover a length of at least `side`, spread evenly."""
    return np.linspace(0, length - side, -(-length // side)).round().astype(int).tolist()


def _resized(video: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames [T, H, W, 3] in [0, 1] at another size (bilinear, antialiased)."""
    if video.shape[1:3] == size:
        return video
    # in NumPy: a compiled function would be compiled again for every size of video
    rows, columns = (_bilinear(old, new) for old, new in zip(video.shape[1:3], size, strict=True))
    if len(rows) > rows.shape[1]:  # the rows, whose products are large matrices, where frames are larger
        video = columns @ video
    video = (rows @ video.reshape(*video.shape[:2], -1)).reshape(len(video), size[0], *video.shape[2:])
    if video.shape[2] != size[1]:
        video = columns @ video
    return np.clip(video, 0.0, 1.0)  # rounding exceeds the range


def _bilinear(old: int, new: int) -> np.ndarray:
    """[new, old] weights of pixels of one axis: triangles whose radius is a pixel of the coarser of both grids."""
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    distances = np.abs(centers[:, None] - np.arange(old)) / max(old / new, 1.0)
    weights = np.maximum(0.0, 1.0 - distances)
    return np.float32(weights / weights.sum(axis=1, keepdims=True))


def _write_videos(
    folder: pathlib.Path,
    inputs: Inputs,
    names: Sequence[str],
    windows: Iterator[tuple[Window, np.ndarray, np.ndarray]],
    length: int,
    ladder: Ladder | None,
) -> dict[str, dict[str, Any]]:
    """Writes what `_reconstructions` yields, for windows of this length: the `videos` of `psnr.json`."""
    results = {}
    for number, group in itertools.groupby(windows, key=lambda found: found[0].video):
        video, path = inputs.videos[number], folder / f"{names[number]}.mp4"
        files.make_folder(path.parent)
        score, frames, codes = _write_pair(path, group, video.windows * length, playable_fps(video.fps), ladder)
        results[video.name] = {"psnr": score, "frames": frames, "output": path.relative_to(folder).as_posix()}
        results[video.name] |= {"codes": codes} if ladder else {}
        tqdm.write(f"{video.name}: {score:.2f} dB over {frames} frames{f', {codes} codes' if ladder else ''}")
    return results


def _write_pair(
    path: pathlib.Path,
    windows: Iterator[tuple[Window, np.ndarray, np.ndarray]],
    expected: int,
    fps: float,
    ladder: Ladder | None,
) -> tuple[float, int, int]:
    """Writes the video and the image of an input of about `expected` frames.

    Returns:
      PSNR, number of frames and number of codes.
    """
    shown = set(np.linspace(0, expected - 1, GRID_COLUMNS).round().astype(int))
    grid = []
    error, frames, codes = 0.0, 0, 0

    def side_by_side():
        nonlocal error, frames, codes
        for window, reconstruction, lengths in windows:
            codes += int(lengths.sum())
            shares = lengths.mean(axis=0) / (ladder.rungs[-1] if ladder else 1)
            for i, (original, reconstructed) in enumerate(
                zip(window.frames[: window.valid], reconstruction, strict=False)
            ):
                error += float(np.mean(np.square(reconstructed - original / np.float32(255)), dtype=np.float64))
                pair = original, to_uint8(reconstructed)
                if frames in shown:
                    bar = [_bar(original.shape, shares[i * len(shares) // len(reconstruction)])] if ladder else []
                    grid.append((*pair, *bar))
                frames += 1
                yield np.concatenate(pair, axis=1)

    write_video(path, side_by_side(), fps)
    write_png(
        path.with_name(f"{path.name.removesuffix('.mp4')}.png"),
        frame_grid([np.stack(row) for row in zip(*grid, strict=True)]),
    )
    return -10.0 * float(np.log10(max(error / frames, SMALLEST_MSE))), frames, codes


def _bar(shape: tuple[int, ...], share: float) -> np.ndarray:
    """An image of this shape with a bar from below of this share of its height, uint8."""
    bar = np.full(shape, 240, np.uint8)
    bar[shape[0] - round(shape[0] * share) :] = BAR_COLOR
    return bar
