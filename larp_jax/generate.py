"""Videos from a generator, in numbers: sampled by class, or predicted from first frames.

The folder written is one of codes as `larp_jax.tokens` has them, with the videos beside them. It grows batch by batch
and can be left and continued: `settings.json` says what it holds, a batch's codes come after its videos, and the
manifest comes last.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from larp_jax.api import LoadedGenerator, LoadedTokenizer
from larp_jax.data import ClipSpec
from larp_jax.data.video import frame_grid, write_png, write_video
from larp_jax.errors import InputError
from larp_jax.evaluators import to_uint8
from larp_jax.inputs import Inputs, Window, output_names, playable_fps
from larp_jax.sampling import SamplingOptions
from larp_jax.steps import hold_last_frame
from larp_jax.tokens import FORMAT, MANIFEST, VERSION, read_shard
from larp_jax.writers import Progress, make_folder, write_json

SETTINGS = "settings.json"
SHEET = "samples.png"
SHEET_ROWS = 16
PREDICTED_CLIPS = 8


def sample(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    output: str | os.PathLike,
    *,
    counts: Mapping[int, int],
    seed: int = 0,
    options: SamplingOptions,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Samples videos by class; batches that an earlier call wrote are kept and not sampled again.

    Writes NUMBER_CLASS.mp4 for each, a picture of the first 16 (a row each), and their codes. Each host samples its
    share of the batches. Codes become videos in a second compiled call: they are needed on their own anyway, and so
    neither part is compiled again when the other one changes.

    Args:
      generator: conditional on classes.
      tokenizer: the one that it was trained with.
      output: folder to write to, made if missing.
      counts: how many of each class; see `spread`. The classes take turns.
      seed: of the draws; sample i of a seed is the same whatever the batch size and the devices.
      options: of the draws.
      batch_size: sampled at a time.

    Returns:
      The manifest, as `larp_jax.tokens.tokenize` has it.

    Raises:
      InputError: generator and tokenizer do not fit, or the folder holds something else.
    """
    classes = np.array(_taking_turns(counts), np.int32)
    run = _Run("sample", generator, tokenizer, output, len(classes), batch_size, seed=seed, options=options,
               counts={str(label): count for label, count in sorted(counts.items())})  # fmt: skip
    key = jax.random.key(seed)
    with Progress(len(classes), description="sample", unit="video", initial=run.done) as progress:
        for number in run.share():
            rows = run.rows(number)
            indices = np.resize(np.arange(rows.start, rows.stop), run.padded)  # as many as the devices take
            codes = generator.sample(classes[indices], indices=indices, key=key, **vars(options))
            for i, video in zip(rows, np.asarray(tokenizer.decode(codes)), strict=False):
                write_video(run.path / f"{_name(i, classes)}.mp4", to_uint8(video), playable_fps(0.0))
            run.keep(number, np.asarray(codes)[: len(rows)])
            progress.update(len(rows))
    described = [
        {"source": _name(i, classes), "start": 0, "frames": tokenizer.config.frames, "fps": 0.0, "label": int(label)}
        for i, label in enumerate(classes)
    ]
    return run.finish(described, sheet=True)


def _name(i: int, classes: np.ndarray) -> str:
    return f"{i:06d}_{classes[i]}"


def spread(total: int, weights: Sequence[float]) -> dict[int, int]:
    """Shares a number out in proportion to weights, by largest remainders: {index: count}, empty shares left out."""
    quotas = total * np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.floor(quotas).astype(int)
    by_remainder = np.argsort(counts - quotas, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return {i: int(count) for i, count in enumerate(counts) if count}


def _taking_turns(counts: Mapping[int, int]) -> list[int]:
    """Each class as often as counted: 0, 3, 0, 3, 0 for {0: 3, 3: 2}."""
    turns = [(turn, label) for label, count in counts.items() for turn in range(count)]
    return [label for _, label in sorted(turns)]


def predict(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    source: str,
    output: str | os.PathLike,
    *,
    cond_frames: int = 5,
    max_clips: int = PREDICTED_CLIPS,
    seed: int = 0,
    options: SamplingOptions,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Predicts how clips go on after their first frames; resumable like `sample`.

    Writes NAME-START.mp4 (truth left, prediction right) and NAME-START.png (truth above) for each window of T frames,
    and the codes of the predictions.

    Args:
      generator: that predicts frames.
      tokenizer: the one that it was trained with.
      source: what `larp_jax.inputs.Inputs` takes; consecutive windows are predicted, each from its own first frames.
      output: folder to write to, made if missing.
      cond_frames: how many of T frames are given.
      max_clips: at most so many windows; 0 takes all.
      seed: as for `sample`.
      options: as for `sample`.
      batch_size: as for `sample`.

    Returns:
      The manifest, as `larp_jax.tokens.tokenize` has it.

    Raises:
      InputError: as for `sample`, or nothing can be read.
    """
    config = tokenizer.config
    if not 0 < cond_frames < config.frames:
        raise InputError(f"--cond-frames must be at least 1 and below the clip's {config.frames}, got {cond_frames}")
    inputs = Inputs(source, ClipSpec(frames=config.frames, resolution=config.resolution), max_clips=max_clips)
    total = min(inputs.windows, max_clips) if max_clips else inputs.windows
    run = _Run("predict", generator, tokenizer, output, total, batch_size, seed=seed, options=options,
               input=str(source), cond_frames=cond_frames)  # fmt: skip
    names = output_names([video.name for video in inputs.videos])
    key = jax.random.key(seed)
    described = []
    share = set(run.share())
    with Progress(total, description="predict", unit="clip", initial=run.done) as progress:
        for number, windows in enumerate(_windows(inputs, cond_frames, total, batch_size)):
            sources = [f"{names[window.video]}-{window.start:06d}" for window in windows]
            rates = [inputs.videos[window.video].fps for window in windows]
            described += [
                {"source": name, "start": 0, "frames": config.frames, "fps": fps, "label": int(window.label)}
                for name, fps, window in zip(sources, rates, windows, strict=True)
            ]
            if number not in share:
                continue
            rows = np.resize(np.arange(len(windows)), run.padded)
            clips = np.stack([windows[row].frames for row in rows])
            condition = tokenizer.encode(hold_last_frame(clips, cond_frames))
            indices = number * batch_size + rows
            codes = generator.sample(condition=condition, indices=indices, key=key, **vars(options))
            videos = to_uint8(np.asarray(tokenizer.decode(codes)))
            for name, fps, truth, prediction in zip(sources, rates, clips, videos, strict=False):
                path = run.path / f"{name}.mp4"
                make_folder(path.parent)
                write_video(path, np.concatenate([truth, prediction], axis=2), playable_fps(fps))
                write_png(path.with_suffix(".png"), frame_grid([truth, prediction]))
            run.keep(number, np.asarray(codes)[: len(windows)])
            progress.update(len(windows))
    if not described:
        raise InputError(f"{source}: no clip in it has more than the {cond_frames} frames that are given")
    return run.finish(described, sheet=False)


def _windows(inputs: Inputs, cond_frames: int, total: int, batch_size: int) -> Iterator[list[Window]]:
    """Batches of the windows that have something to predict."""
    windows = (window for rows, _ in inputs.batches(1) for window in rows if window.valid > cond_frames)
    windows = itertools.islice(windows, total)
    while batch := list(itertools.islice(windows, batch_size)):
        yield batch


class _Run:
    """A folder that is written batch by batch.

    Attributes:
      path: the folder.
      done: rows of batches that are there already.
      padded: rows to compute at a time: the batch size, or what is next above it that the mesh divides.
    """

    def __init__(
        self,
        command: str,
        generator: LoadedGenerator,
        tokenizer: LoadedTokenizer,
        output: str | os.PathLike,
        total: int,
        batch_size: int,
        *,
        options: SamplingOptions,
        **settings,
    ):
        generator.check_tokenizer(tokenizer)
        self._tokenizer, self._step = tokenizer, generator.step
        self._total, self._batch_size = total, batch_size
        self.padded = -(-batch_size // generator.batch_multiple) * generator.batch_multiple
        self.path = make_folder(output)
        settings = {
            "command": command,
            "generator": generator.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "precision": generator.precision,
            "batch_size": batch_size,
            **vars(options),
            **settings,
        }
        if jax.process_index() == 0:
            _claim(self.path, settings)
        self._batches = range(-(-total // batch_size))
        self.done = sum(len(self.rows(number)) for number in self._batches if self._shard(number).exists())

    def rows(self, number: int) -> range:
        """Rows of a batch."""
        return range(number * self._batch_size, min((number + 1) * self._batch_size, self._total))

    def share(self) -> list[int]:
        """The batches that are missing and fall to this host."""
        mine = self._batches[jax.process_index() :: jax.process_count()]
        return [number for number in mine if not self._shard(number).exists()]

    def keep(self, number: int, codes: np.ndarray) -> None:
        """Writes a batch's codes [M, N]: from here on it counts as done."""
        path = self._shard(number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, codes=codes)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _shard(self, number: int) -> pathlib.Path:
        return self.path / f"codes-{number:05d}-of-{len(self._batches):05d}.npz"

    def finish(self, rows: list[dict], *, sheet: bool) -> dict[str, Any]:
        """Writes the manifest and, if wanted, the picture, when all hosts are done."""
        config = self._tokenizer.config
        sizes = [len(rows[i : i + self._batch_size]) for i in range(0, len(rows), self._batch_size)]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self._tokenizer.fingerprint,
            "step": self._tokenizer.step,
            "generator_step": self._step,
            "K": config.quantizer.codebook_size,
            "N": config.num_tokens,
            "clip": list(config.clip_shape),
            "shards": [{"file": self._shard(i).name, "rows": size} for i, size in enumerate(sizes)],
            "rows": rows,
        }
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("all batches are written")
        if jax.process_index() == 0:
            if sheet:
                write_png(self.path / SHEET, frame_grid(self._first_videos(manifest)))
            write_json(self.path / MANIFEST, manifest)
        return manifest

    def _first_videos(self, manifest: dict) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] of the first rows, from their codes: an earlier call may have written them."""
        videos = []
        for number in range(min(len(manifest["shards"]), -(-SHEET_ROWS // self._batch_size))):
            codes = read_shard(self.path, manifest, number)
            padded = np.resize(codes, (self.padded, codes.shape[1]))
            videos += list(to_uint8(np.asarray(self._tokenizer.decode(padded)))[: len(codes)])
        return videos[:SHEET_ROWS]


def _claim(folder: pathlib.Path, settings: dict) -> None:
    """Writes the settings into a new folder; refuses one that holds something else."""
    path = folder / SETTINGS
    if not path.exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no samples of an earlier call; name another --output")
        write_json(path, settings)
        return
    try:
        known = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); name another --output") from None
    for name in sorted(settings.keys() | known.keys()):
        if settings.get(name) != known.get(name):
            raise InputError(
                f"{folder} was begun with {name} {known.get(name)}, not {settings.get(name)}; name another --output"
            )
