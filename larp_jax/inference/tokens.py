"""Codes on disk: videos to shards of codes with a manifest, and back.

A folder of codes holds `codes-00000-of-00001.npz` and so on, each with `codes` [M, N] int32, and `manifest.json`, which
says for each row in turn what it is of.
"""

import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from larp_jax import files, npz
from larp_jax.api import LoadedTokenizer
from larp_jax.data import ClipSpec
from larp_jax.data.inputs import Inputs, output_names, playable_fps
from larp_jax.data.video import write_video
from larp_jax.errors import InputError, reason
from larp_jax.files import read_json
from larp_jax.models.pixels import hold_last_frame, to_uint8
from larp_jax.runtime.progress import Progress

MANIFEST = "manifest.json"
SETTINGS = "settings.json"  # of a folder that `larp_jax.inference.generate` is writing, or has written
FORMAT = "larp_jax.codes"
VERSION = 1
SHARD_ROWS = 16_384
SHARD_NAME = re.compile(r"codes-\d+-of-\d+\.npz")


def tokenize(
    tokenizer: LoadedTokenizer,
    source: str,
    output: str | os.PathLike,
    *,
    max_clips: int = 0,
    windows: int = 0,
    flips: bool = False,
    cond_frames: int = 0,
    batch_size: int = 8,
    shard_rows: int = SHARD_ROWS,
) -> dict[str, Any]:
    """Writes the codes of videos. The manifest comes last: a folder without it is incomplete.

    For a generator to train on, `windows`, `flips` and `cond_frames` give what it would draw of the videos.

    Args:
      tokenizer: to use.
      source: what `larp_jax.data.inputs.Inputs` takes.
      output: folder to write to, made if missing.
      max_clips: of a data set, at most so many clips, spread over it; 0 takes all.
      windows: of every video, at most so many full windows, spread over it; 0 takes consecutive ones.
      flips: adds, after all others, the codes of all windows mirrored left to right.
      cond_frames: adds the codes of each window with its frames after so many frozen (`condition` in the shards):
        what frame prediction starts from; 0 for none.
      batch_size: windows encoded at a time.
      shard_rows: rows a shard.

    Returns:
      The manifest: `format`, `version`, `fingerprint` of the tokenizer, `K`, `N`, `clip` [T, H, W, C], `input`,
      `label_names`, `skipped`, `cond_frames`, `shards` (`file` and `rows` each), and `rows`: `source` (path within the
      input, with forward slashes), `start` (first frame), `frames` (how many of T are the video's), `fps` (0: unknown),
      `label`, and `flip` where it is mirrored.

    Raises:
      InputError: nothing can be read, the folder holds codes already or is being written, or the tokenizer has none.
    """
    config = tokenizer.config
    if not 0 <= cond_frames < config.frames:
        raise InputError(f"--cond-frames {cond_frames} must be below the clip's {config.frames} frames")
    output = files.check_folder(output)
    _check_free(output)
    clip = ClipSpec(frames=config.frames, resolution=config.resolution)
    inputs = Inputs(source, clip, max_clips=max_clips, windows=windows)
    with files.claim(output), files.temporary_folder(output, "shards") as folder:
        _check_free(output)  # another call may just have ended
        rows, counts = _write_shards(tokenizer, inputs, folder, flips, cond_frames, batch_size, shard_rows)
        if not rows:
            raise InputError(f"{source}: nothing in it could be read")
        shards = [
            {"file": f"codes-{i:05d}-of-{len(counts):05d}.npz", "rows": count} for i, count in enumerate(counts)
        ]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": tokenizer.fingerprint,
            "step": tokenizer.step,
            "K": config.quantizer.codebook_size,
            "N": config.num_tokens,
            "clip": list(config.clip_shape),
            "input": str(source),
            "label_names": list(inputs.label_names),
            "skipped": dict(inputs.skipped),
            "cond_frames": cond_frames,
            "shards": shards,
            "rows": rows,
        }
        for path in output.iterdir():  # of a call that was killed before it wrote the manifest
            if SHARD_NAME.fullmatch(path.name):
                path.unlink()
        for number, shard in enumerate(shards):
            os.replace(folder / str(number), output / shard["file"])
        files.write_json(output / MANIFEST, manifest)
    return manifest


def _check_free(output: pathlib.Path) -> None:
    for name in (MANIFEST, SETTINGS):
        if (output / name).exists():
            raise InputError(f"{output} holds codes already ({name}); name another --output")


def _write_shards(
    tokenizer: LoadedTokenizer,
    inputs: Inputs,
    folder: pathlib.Path,
    flips: bool,
    cond_frames: int,
    batch_size: int,
    shard_rows: int,
) -> tuple[list[dict[str, Any]], list[int]]:
    """Writes shards called 0, 1 and so on into a folder; the rows of the manifest, and how many each shard has."""
    rows, pending, counts = [], [], []

    def flush():
        arrays = {name: np.concatenate([batch[name] for batch in pending]) for name in pending[0]}
        pending.clear()
        with open(folder / str(len(counts)), "wb") as file:
            np.savez(file, **arrays)
        counts.append(len(arrays["codes"]))

    mirrored = (False, True) if flips else (False,)
    with Progress(inputs.windows * len(mirrored), description="tokenize", unit="clip") as progress:
        # one reading each: detokenize joins windows that follow each other
        for flip, (found, clips) in ((flip, batch) for flip in mirrored for batch in inputs.batches(batch_size)):
            clips = clips[:, :, :, ::-1] if flip else clips
            batch = {"codes": tokenizer.encode(clips)}
            if cond_frames:
                batch["condition"] = tokenizer.encode(hold_last_frame(clips, cond_frames))
            pending.append({name: np.asarray(codes)[: len(found)] for name, codes in batch.items()})
            for window in found:
                video = inputs.videos[window.video]
                rows.append(
                    {
                        "source": video.name,
                        "start": window.start,
                        "frames": window.valid,
                        "fps": video.fps,
                        "label": int(window.label),
                    }
                    | ({"flip": True} if flip else {})
                )
            if sum(len(batch["codes"]) for batch in pending) >= shard_rows:
                flush()
            progress.update(len(found))
    if pending:
        flush()
    return rows, counts


def detokenize(
    tokenizer: LoadedTokenizer, source: str | os.PathLike, output: str | os.PathLike, *, batch_size: int = 8
) -> list[pathlib.Path]:
    """Writes the videos that a folder of codes describes, named as their sources.

    Consecutive windows of a source make one video. Frames that only filled up a window are left out.

    Args:
      tokenizer: the one that made the codes.
      source: the folder.
      output: folder to write to, made if missing; nothing in it is overwritten, but for what a call that was stopped
        had written.
      batch_size: windows decoded at a time.

    Returns:
      The files written.

    Raises:
      InputError: the codes are incomplete, damaged or another tokenizer's, or a file to write exists.
    """
    manifest = read_manifest(source)
    config = tokenizer.config
    if manifest["fingerprint"] != tokenizer.fingerprint:
        raise InputError(
            f"{source} holds codes of tokenizer {manifest['fingerprint']}, not of {tokenizer.fingerprint}; give the"
            " --checkpoint that made them"
        )
    if (manifest["K"], manifest["N"], manifest["clip"]) != (
        config.quantizer.codebook_size, config.num_tokens, list(config.clip_shape)
    ):  # fmt: skip
        raise InputError(f"{source}/{MANIFEST}: K, N and clip are not the tokenizer's; tokenize again")
    rows = manifest["rows"]
    runs = list(_runs(rows))
    names = [f"{name}.mp4" for name in output_names([name for name, _ in runs])]
    if len(set(names)) < len(names):
        raise InputError(f"{source}/{MANIFEST}: two videos of one name; tokenize again")
    with (
        files.outputs(output, names) as folder,
        Progress(len(rows), description="detokenize", unit="clip") as progress,
    ):
        paths = [folder / name for name in names]
        videos = _decoded(tokenizer, files.local_path(source), manifest, batch_size, progress)
        done = 0
        for path, (_, count) in zip(paths, runs, strict=True):
            files.make_folder(path.parent)
            clips = zip(rows[done : done + count], itertools.islice(videos, count), strict=True)
            frames = (frame for row, clip in clips for frame in to_uint8(clip[: row["frames"]]))
            write_video(path, frames, playable_fps(rows[done]["fps"]))
            done += count
    return paths


def _runs(rows: Sequence[dict]) -> Iterator[tuple[str, int]]:
    """(name, number of rows) of each stretch of rows that follow each other in one source."""
    first = 0
    seen = set()
    names = [row["source"] + ("-flipped" if row.get("flip") else "") for row in rows]
    for i in range(1, len(rows) + 1):
        before = rows[i - 1]
        follows = i < len(rows) and names[i] == names[i - 1]
        if follows and rows[i]["start"] == before["start"] + before["frames"]:
            continue
        name, start = names[first], rows[first]["start"]
        yield (f"{name}-{start:06d}" if name in seen else name), i - first
        seen.add(name)
        first = i


def _decoded(
    tokenizer: LoadedTokenizer, folder: pathlib.Path, manifest: dict, batch_size: int, progress: Progress
) -> Iterator[np.ndarray]:
    """The clip of each row, float32 [T, H, W, 3] in [0, 1]."""
    for number in range(len(manifest["shards"])):
        codes = read_shard(folder, manifest, number)
        for begin in range(0, len(codes), batch_size):
            batch = codes[begin : begin + batch_size]
            padded = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
            clips = np.asarray(tokenizer.decode(padded))[: len(batch)]
            progress.update(len(batch))
            yield from clips


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads and checks the manifest of a folder of codes; see `tokenize`.

    Raises:
      InputError: there is none, or it is damaged, of a later version, or names files outside of its folder.
    """
    path = files.local_path(directory, "folder of codes") / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {directory} is no folder that tokenize completed") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); tokenize again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no manifest of codes; give the folder that tokenize wrote")
    if manifest.get("version") != VERSION:
        raise InputError(f"{path} is of version {manifest.get('version')}, this reads {VERSION}; tokenize again")
    if complaint := _complaint(manifest):
        raise InputError(f"{path} is damaged ({complaint}); tokenize again")
    return manifest


def _complaint(manifest: dict) -> str | None:
    """What is wrong with a manifest, None if nothing is."""

    def is_count(value, least):
        return type(value) is int and least <= value < 2**31

    if not isinstance(manifest.get("fingerprint"), str):
        return "no fingerprint"
    if not all(is_count(manifest.get(name), 1) for name in ("K", "N")):
        return "K and N are no numbers of codes"
    clip = manifest.get("clip")
    if not (isinstance(clip, list) and len(clip) == 4 and all(is_count(side, 1) for side in clip)):
        return "clip is not [T, H, W, C]"
    if not is_count(manifest.get("cond_frames", 0), 0):
        return "cond_frames is no number"
    names = manifest.get("label_names", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "label_names are no names"
    shards, rows = manifest.get("shards"), manifest.get("rows")
    if not (isinstance(shards, list) and isinstance(rows, list) and rows):
        return "no shards or no rows"
    for shard in shards:
        if not isinstance(shard, dict) or not is_count(shard.get("rows"), 1):
            return "a shard without a number of rows"
        if not isinstance(shard.get("file"), str) or not SHARD_NAME.fullmatch(shard["file"]):
            return f"{shard.get('file')!r} is no shard's name"
    if sum(shard["rows"] for shard in shards) != len(rows):
        return f"{sum(shard['rows'] for shard in shards)} rows in shards, {len(rows)} listed"
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not _is_inside(row.get("source")):
            return f"the source of row {i} is no path within a folder"
        if not is_count(row.get("start"), 0) or not is_count(row.get("frames"), 1) or row["frames"] > clip[0]:
            return f"start or frames of row {i}"
        if not isinstance(row.get("fps"), (int, float)) or not math.isfinite(row["fps"]):
            return f"fps of row {i}"
        if type(row.get("label")) is not int or not -1 <= row["label"] < 2**31:
            return f"label of row {i}"
        if type(row.get("flip", False)) is not bool:
            return f"flip of row {i}"
    return None


def _is_inside(name: Any) -> bool:
    """Whether a text is a relative path with forward slashes that stays where it is put."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = pathlib.PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def read_shard(directory: str | os.PathLike, manifest: dict, number: int, name: str = "codes") -> np.ndarray:
    """The codes of one shard, [M, N] int32 in [0, K).

    Args:
      directory: the folder.
      manifest: what `read_manifest` gave.
      number: of the shard.
      name: `codes`, or `condition` where the manifest has `cond_frames`.

    Raises:
      InputError: it is missing, damaged, or not as the manifest says.
    """
    shard = manifest["shards"][number]
    path = pathlib.Path(directory) / shard["file"]
    expected = {name: npz.Array(np.int32, (shard["rows"], manifest["N"]))}
    codes = npz.read(path, expected, mend="tokenize again")[name]
    if codes.min() < 0 or codes.max() >= manifest["K"]:
        raise InputError(
            f"{path} holds codes from {codes.min()} to {codes.max()}, outside of [0, {manifest['K']}); tokenize again"
        )
    return codes
