"""Encode videos to codes or latents on disk, and decode these to videos; `larp_jax.data.codes` defines the format."""

import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from larp_jax import files
from larp_jax.api import LoadedTokenizer
from larp_jax.config import TokenizerConfig
from larp_jax.data import ClipSpec
from larp_jax.data.codes import (
    MANIFEST,
    SETTINGS,
    SHARD_NAME,
    SHARD_ROWS,
    ladder_of,
    new_manifest,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from larp_jax.data.inputs import Inputs, output_names, playable_fps
from larp_jax.data.latents import LatentStatistics
from larp_jax.data.spec import contents
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.models.checks import checked_clip_shape, checked_shape
from larp_jax.models.pixels import hold_last_frame, to_uint8
from larp_jax.runtime.progress import Progress


def tokenize(
    tokenizer: LoadedTokenizer,
    source: str,
    output: str | os.PathLike,
    *,
    max_clips: int = 0,
    windows: int = 0,
    flips: bool = False,
    cond_frames: int = 0,
    size: int | tuple[int, int] | None = None,
    fewer_frames: bool = False,
    budget: str | None = None,
    batch_size: int = 8,
    shard_rows: int = SHARD_ROWS,
) -> dict[str, Any]:
    """Writes the codes of videos, or their latents if the tokenizer has these.

    The manifest is written last: a folder without it is incomplete. To train a generator on the codes, `windows`,
    `flips` and `cond_frames` give the windows, flips and conditions that it would otherwise sample from the videos.

    Args:
      tokenizer: the tokenizer.
      source: input, as for `larp_jax.data.inputs.Inputs`.
      output: folder to write to, created if missing.
      max_clips: at most this many clips of a data set, spread evenly over it; 0 for all.
      windows: at most this many full windows of each video, spread evenly over it; 0 for consecutive windows.
      flips: whether to add, after all others, the codes of all windows mirrored left to right.
      cond_frames: number of given frames for frame prediction. Adds the codes of each window with the last given frame
        repeated after them (`condition` in the shards); 0 for none. With a ladder only 1: adds, as further rows, each
        window after its first frame held still for a block, which is how generators are given a picture.
      size: side of a square, or (H, W), of the clips; by default, that of the tokenizer. Generators train on no other.
      fewer_frames: as for `larp_jax.inference.reconstruct.reconstruct`. Generators do not train on such codes.
      budget: how many codes clips get, as for `LoadedTokenizer.assign`; for tokenizers with a ladder.
      batch_size: windows per batch.
      shard_rows: rows per shard.

    Returns:
      The manifest, as described in `larp_jax.data.codes`.

    Raises:
      InputError: nothing can be read, the folder already contains codes or is being written, or the tokenizer does not
        take such clips.
    """
    config = tokenizer.config
    shape = _checked_shape(config, cond_frames, size, fewer_frames)
    tokenizer.assigner(budget)  # refuses a wrong budget before any work
    output = files.check_folder(output)
    _check_free(output)
    clip = ClipSpec.of(shape, fps=tokenizer.fps, stride=tokenizer.stride)
    inputs = Inputs(source, clip, max_clips=max_clips, windows=windows)
    with files.claim(output), files.temporary_folder(output, "shards") as folder:
        _check_free(output)  # again, because another call may just have ended
        statistics = None if config.quantizer.has_codes else LatentStatistics(config.quantizer.code_dim)
        rows, counts, used = _write_shards(
            tokenizer, inputs, folder, flips, cond_frames, fewer_frames, budget, batch_size, shard_rows, statistics
        )
        if not rows:
            raise InputError(f"{source}: nothing in it can be read")
        details = {"budget": budget, "mean_codes": used / len(rows)} if config.adaptive else {}
        details |= {"fewer_frames": True} if fewer_frames else {}
        details |= {"other_size": True} if shape != config.clip_shape else {}
        manifest = new_manifest(
            fingerprint=tokenizer.fingerprint,
            step=tokenizer.step,
            N=config.num_tokens,
            clip=shape,
            sizes=counts,
            K=config.quantizer.codebook_size,
            statistics=statistics,
            adaptive=config.adaptive,
            input=str(source),
            label_names=list(inputs.label_names),
            skipped=dict(inputs.skipped),
            cond_frames=0 if config.adaptive else cond_frames,
            **details,
            rows=rows,
        )
        _publish(folder, output, manifest)
    return manifest


def _publish(folder: pathlib.Path, output: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Moves the shards 0, 1 and so on to the output, and completes it with the manifest."""
    for path in output.iterdir():  # left by a call that was killed before it wrote the manifest
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()
    for number, shard in enumerate(manifest["shards"]):
        files.move(folder / str(number), output / shard["file"])
    write_manifest(output, manifest)


def _checked_shape(
    config: TokenizerConfig, cond_frames: int, size: int | tuple[int, int] | None, fewer_frames: bool
) -> tuple[int, ...]:
    """The shape of the clips; `InputError` if an argument does not suit the tokenizer."""
    if not 0 <= cond_frames < config.frames:
        raise InputError(f"--cond-frames {cond_frames} must be below the clip's {config.frames} frames")
    if cond_frames > 1 and config.adaptive:
        raise InputError(
            f"--cond-frames {cond_frames} is for tokenizers without a ladder, whose codes start with those of the first"
            " frames anyway; leave it out, or give 1 for a picture"
        )
    if cond_frames and fewer_frames:
        raise InputError("--fewer-frames: generators, for which --cond-frames is, train on whole clips; leave out one")
    return checked_clip_shape(config, size, fewer_frames=fewer_frames)


def _check_free(output: pathlib.Path) -> None:
    for name in (MANIFEST, SETTINGS):
        if (output / name).exists():
            found = contents(output) or f"the {name} of an earlier call"
            raise InputError(f"{output} already contains {found}; name another --output")


def _write_shards(
    tokenizer: LoadedTokenizer,
    inputs: Inputs,
    folder: pathlib.Path,
    flips: bool,
    cond_frames: int,
    fewer_frames: bool,
    budget: str | None,
    batch_size: int,
    shard_rows: int,
    statistics: LatentStatistics | None,
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Writes shards called 0, 1 and so on, and adds latents to the statistics.

    Returns:
      The rows of the manifest, the number of rows of each shard, and the number of codes of all clips.
    """
    config, rows, pending, counts, used = tokenizer.config, [], [], [], 0
    tokens = config.quantizer.tokens
    still = config.frames // config.blocks - 1 if cond_frames and config.adaptive else 0  # further frames of a picture
    kinds = [(picture, flip) for picture in sorted({False, still > 0}) for flip in sorted({False, flips})]

    def flush():
        arrays = {name: np.concatenate([batch[name] for batch in pending]) for name in pending[0]}
        pending.clear()
        write_shard(folder / str(len(counts)), arrays)
        counts.append(len(arrays[tokens]))

    with Progress(inputs.windows * len(kinds), description="tokenize", unit="clip") as progress:
        # reads the input once per kind of row, because detokenize joins consecutive windows
        for picture, flip, (found, clips) in ((*kind, batch) for kind in kinds for batch in inputs.batches(batch_size)):
            clips = clips[:, :, :, ::-1] if flip else clips
            clips = clips[:, np.maximum(np.arange(clips.shape[1]) - still, 0)] if picture else clips
            valid = [window.valid for window in found] + [found[-1].valid] * (len(clips) - len(found))
            frames = _frames_of(tokenizer, valid, fewer_frames)
            batch = _encoded(tokenizer, clips, frames, cond_frames, budget)
            pending.append({name: np.asarray(codes)[: len(found)] for name, codes in batch.items()})
            encoded = pending[-1][tokens]
            totals = np.full(len(found), encoded.shape[1])
            if "lengths" in batch:
                totals = pending[-1]["lengths"].sum(axis=1)
            used += int(totals.sum())
            if statistics is not None:
                statistics.add(encoded[np.arange(encoded.shape[1]) < totals[:, None]])
            for window in found:
                video = inputs.videos[window.video]
                rows.append(
                    {
                        "source": video.name,
                        "start": window.start,
                        "frames": min(window.valid + picture * still, config.frames),
                        "fps": video.fps,
                        "label": int(window.label),
                    }
                    | ({"flip": True} if flip else {})
                    | ({"picture": True} if picture else {})
                )
            if sum(len(batch[tokens]) for batch in pending) >= shard_rows:
                flush()
            progress.update(len(found))
    if pending:
        flush()
    return rows, counts, used


def _frames_of(tokenizer: LoadedTokenizer, valid: Sequence[int], fewer_frames: bool) -> np.ndarray:
    """The number of frames that are encoded of windows with so many valid ones."""
    unit = tokenizer.config.clip_unit[0] if fewer_frames else tokenizer.config.frames
    return -(-np.asarray(valid) // unit) * unit


def _by_frames(counts: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(count, the rows with this count of frames, the same rows repeated to the number of all rows) of each count."""
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        yield int(count), rows, np.resize(rows, len(counts))


def _encoded(
    tokenizer: LoadedTokenizer, clips: np.ndarray, counts: np.ndarray, cond_frames: int, budget: str | None
) -> dict:
    """The arrays of a shard for these clips, of each of which so many frames are encoded."""
    tokens = tokenizer.config.quantizer.tokens
    if tokenizer.config.adaptive:
        encoded, lengths = tokenizer.encode(clips, budget=budget)
        return {tokens: encoded, "lengths": lengths}
    found = {}
    for count, rows, padded in _by_frames(counts):
        found |= dict(zip(rows.tolist(), np.asarray(tokenizer.encode(clips[padded, :count])), strict=False))
    batch = {tokens: np.stack([found[row] for row in range(len(clips))])}
    if cond_frames:
        batch["condition"] = tokenizer.encode(hold_last_frame(clips, cond_frames))
    return batch


def detokenize(
    tokenizer: LoadedTokenizer, source: str | os.PathLike, output: str | os.PathLike, *, batch_size: int = 8
) -> list[pathlib.Path]:
    """Decodes a folder of codes or latents to videos, named like their sources.

    Consecutive windows of a source become one video, without padding frames.

    Args:
      tokenizer: the tokenizer that the codes belong to.
      source: the folder of codes.
      output: folder to write to, created if missing; no files are overwritten except those of an interrupted call.
      batch_size: windows per batch.

    Returns:
      The files written.

    Raises:
      InputError: the codes are incomplete, damaged or from another tokenizer, or an output file exists.
    """
    manifest = read_manifest(source)
    config = tokenizer.config
    if manifest["fingerprint"] != tokenizer.fingerprint:
        raise InputError(
            f"{source} contains codes of tokenizer {manifest['fingerprint']}, not of {tokenizer.fingerprint}; give the"
            f" --checkpoint of {manifest['fingerprint']}"
        )
    size, expected = ("K", config.quantizer.codebook_size)
    if not config.quantizer.has_codes:
        size, expected = ("d", config.quantizer.code_dim)
    if (manifest.get(size), manifest["N"], manifest["clip"][0], ladder_of(manifest)) != (
        expected, config.num_tokens, config.frames, config.adaptive
    ):  # fmt: skip
        raise InputError(
            f"{source}/{MANIFEST}: {size}, N, clip or ladder are not those of the tokenizer; tokenize again"
        )
    for frames in {config.frames, *_frames_of(tokenizer, [1], fewer_frames=bool(manifest.get("fewer_frames")))}:
        checked_shape((int(frames), *manifest["clip"][1:]), config)
    rows = manifest["rows"]
    runs = list(_runs(rows))
    names = [f"{name}.mp4" for name in output_names([name for name, _ in runs])]
    if len(set(names)) < len(names):
        raise InputError(f"{source}/{MANIFEST}: two videos have the same name; tokenize again")
    with (
        files.outputs(output, names) as folder,
        Progress(len(rows), description="detokenize", unit="clip") as progress,
    ):
        paths = [folder / name for name in names]
        videos = _decoded(tokenizer, files.any_path(source), manifest, batch_size, progress)
        done = 0
        for path, (_, count) in zip(paths, runs, strict=True):
            files.make_folder(path.parent)
            clips = zip(rows[done : done + count], itertools.islice(videos, count), strict=True)
            frames = (frame for row, clip in clips for frame in to_uint8(clip[: row["frames"]]))
            write_video(path, frames, playable_fps(rows[done]["fps"]))
            done += count
    return paths


def _runs(rows: Sequence[dict]) -> Iterator[tuple[str, int]]:
    """(name, number of rows) of each run of consecutive windows of a source."""
    first = 0
    seen = set()
    kinds = {"picture": "-picture", "flip": "-flipped"}
    names = [row["source"] + "".join(suffix for kind, suffix in kinds.items() if row.get(kind)) for row in rows]
    for i in range(1, len(rows) + 1):
        before = rows[i - 1]
        follows = i < len(rows) and names[i] == names[i - 1]
        if follows and rows[i]["start"] == before["start"] + before["frames"] and not before.get("picture"):
            continue
        name, start = names[first], rows[first]["start"]
        yield (f"{name}-{start:06d}" if name in seen else name), i - first
        seen.add(name)
        first = i


def _decoded(
    tokenizer: LoadedTokenizer, folder: pathlib.Path, manifest: dict, batch_size: int, progress: Progress
) -> Iterator[np.ndarray]:
    """The clip of each row, float32 [T, H, W, 3] in [0, 1], with those frames that were encoded."""
    size, fewer_frames = tuple(manifest["clip"][1:3]), bool(manifest.get("fewer_frames"))
    counts = _frames_of(tokenizer, [row["frames"] for row in manifest["rows"]], fewer_frames)
    done = 0
    for number in range(len(manifest["shards"])):
        shard = read_shard(folder, manifest, number)
        encoded = shard[tokenizer.config.quantizer.tokens]
        total = len(encoded)
        for begin in range(0, total, batch_size):
            numbers = np.minimum(np.arange(begin, begin + batch_size), total - 1)
            clips = {}
            for count, rows, padded in _by_frames(counts[done + numbers]):
                lengths = shard["lengths"][numbers[padded]] if "lengths" in shard else None
                decoded = tokenizer.decode(encoded[numbers[padded]], lengths, frames=count, size=size)
                clips |= dict(zip(rows.tolist(), np.asarray(decoded), strict=False))
            found = [clips[row] for row in range(min(batch_size, total - begin))]
            progress.update(len(found))
            yield from found
        done += total
