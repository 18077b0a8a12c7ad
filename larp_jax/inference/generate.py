"""Generate many videos: by class, from first frames, or one per clip of a data set.

The output is a folder of codes in the format of `larp_jax.data.codes`, which also contains the videos. It is written
batch by batch, and an interrupted call can be continued: `settings.json` describes the contents, the codes of a batch
are written after its videos, and the manifest is written last.
"""

import csv
import difflib
import itertools
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from larp_jax import files
from larp_jax.api import LoadedGenerator, LoadedTokenizer, blocks_of, load_tokenizer
from larp_jax.config import AUTO, MeshConfig
from larp_jax.data import ClipSpec
from larp_jax.data.codes import (
    as_stored,
    mean_by_label,
    new_manifest,
    read_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from larp_jax.data.inputs import Inputs, Window, output_names, playable_fps
from larp_jax.data.latents import LatentStatistics
from larp_jax.data.sources import MANY_LISTED, class_list
from larp_jax.data.video import frame_grid, write_png, write_video
from larp_jax.errors import InputError
from larp_jax.inference.batches import BatchFolder
from larp_jax.models.pixels import hold_last_frame, to_uint8
from larp_jax.models.sampling import SamplingOptions
from larp_jax.runtime import rng, sharding
from larp_jax.runtime.progress import Progress
from larp_jax.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

SHEET = "samples.png"
SHEET_ROWS = 16
PREDICTED_CLIPS = 8


def load_pair(
    found: Checkpoint, tokenizer: str | os.PathLike, *, weights: str = "ema", precision: str = "float32"
) -> tuple[LoadedGenerator, LoadedTokenizer]:
    """Loads generator and tokenizer to the devices of this host, because hosts sample independently.

    Args:
      found: checkpoint of the generator.
      tokenizer: checkpoint of the tokenizer that the generator was trained with.
      weights: weights of the tokenizer, `ema` or `raw`.
      precision: compute precision of the generator.

    Raises:
      InputError: the tokenizer cannot be read.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    generator = LoadedGenerator.of(found, precision=precision, mesh=mesh)
    return generator, load_tokenizer(tokenizer, weights=weights, mesh=mesh)


class Sampler:
    """Samples of a generator, as codes and as videos. Sample i depends only on the seed, i and its condition.

    Codes are decoded in a second compiled call, because they are also needed on their own, and so that neither part is
    recompiled when the other one changes.

    Args:
      generator: the generator.
      tokenizer: the tokenizer that the generator was trained with.
      seed: seed of the random numbers.
      options: sampling options.
      batch_size: samples per batch.
      cond_frames: number of given frames; for frame prediction only, where 0 leaves them out if the generator was
        trained with `frames_dropout`. A generator with a ladder goes on from any first blocks, or a picture.
      budget: how many codes the samples get, for a generator with a ladder, see `LoadedGenerator.sample`.

    Attributes:
      tokenizer: as given.
      batch_size: as given.
      step: training step of the generator.
      class_names: names of the generator's classes.
      class_codes: with a ladder, mean numbers of codes of its training clips by class, if known.
      given_frames: number of frames that the generator is given.
      has_lengths: whether samples have different numbers of codes.

    Raises:
      InputError: generator, tokenizer and options do not fit each other.
    """

    def __init__(
        self,
        generator: LoadedGenerator,
        tokenizer: LoadedTokenizer,
        *,
        seed: int = 0,
        options: SamplingOptions,
        batch_size: int = 8,
        cond_frames: int = 0,
        budget: str = AUTO,
    ):
        generator.check_tokenizer(tokenizer)
        generator.assignment(budget, options)
        options.fitting(generator.config)
        config, frames = generator.config, tokenizer.config.frames
        if config.ladder and cond_frames:
            blocks_of(tokenizer.config, cond_frames)
        left_out = config.has_null_frames and not cond_frames
        if config.has_frames and not left_out and not 0 < cond_frames < frames:
            raise InputError(f"--cond-frames must be at least 1 and below the clip's {frames}, got {cond_frames}")
        for option, scale, null, missing in (
            ("--cfg-scale", options.cfg_scale, config.has_null_class, "a null class"),
            ("--frames-scale", options.frames_scale, config.has_null_frames, "frames_dropout"),
        ):
            if scale > 1.0 and not null:
                raise InputError(
                    f"{option} must be 1, because the generator was trained without {missing}; got {scale:g}"
                )
        self.tokenizer, self.batch_size, self.step = tokenizer, batch_size, generator.step
        self.class_names, self.class_codes = generator.class_names, generator.class_codes
        self._generator, self._options, self.given_frames = generator, options, cond_frames
        self.has_lengths = bool(config.ladder)
        self._seed, self._key, self._passes, self._budget = seed, rng.key(seed), [], budget
        # rounded up to a multiple of the number of devices
        self._padded = -(-batch_size // generator.batch_multiple) * generator.batch_multiple

    def describe(self) -> dict[str, Any]:
        """Everything that the samples depend on, except their conditions; ready for JSON."""
        described = {
            "generator": self._generator.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "decoder": self.tokenizer.decoder_fingerprint,
            "precision": self._generator.precision,
            "seed": self._seed,
            **self._options.fitting(self._generator.config),
        }
        described.pop("window", None)  # which changes only the speed
        if self._options.frames_scale == 1.0:  # folders of earlier versions do not name it
            del described["frames_scale"]
        if self.has_lengths:
            described["budget"] = self._budget
        return described | ({"cond_frames": self.given_frames} if self.given_frames else {})

    def codes(
        self, numbers: Sequence[int], *, classes: np.ndarray | None = None, clips: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Samples codes or latents.

        Args:
          numbers: [M] numbers of the samples, at most `batch_size`.
          classes: [M] int, -1 for any class; all are -1 if left out. Ignored if the generator is given no class.
          clips: [M, T, H, W, C] uint8 clips that start with the given frames, if the generator is given frames.

        Returns:
          Arrays by name as of `larp_jax.data.codes.read_shard`: `codes` [M, N] and, with a ladder, `lengths` [M, T]; or
          `latents` [M, N, d] float16, as they are stored.
        """
        rows = np.resize(np.arange(len(numbers)), self._padded)
        condition = {}
        if self._generator.config.has_classes:
            condition["classes"] = np.full(len(rows), -1) if classes is None else classes[rows]
        if self._generator.config.has_frames and self.given_frames:
            condition["frames"] = self.tokenizer.encode(hold_last_frame(clips[rows], self.given_frames))
        elif self.given_frames:
            given, budget = clips[rows][:, : self.given_frames], None if self._budget == AUTO else self._budget
            condition["frames"] = self.tokenizer.encode_frames(given, budget=budget)
        indices = np.asarray(numbers)[rows]
        sampled = self._generator.sample_counted(
            **condition, indices=indices, key=self._key, budget=self._budget, **vars(self._options)
        )
        self._passes.append(int(sampled.passes))
        return {name: as_stored(name, np.asarray(x)[: len(numbers)]) for name, x in sampled.arrays.items()}

    def report_passes(self) -> None:
        """With a window, logs how many codes a pass through the generator found on average."""
        if self._options.window > 1 and self._passes:
            found = (self._generator.config.num_tokens - 1) / max(np.mean(self._passes), 1)
            logger.info("the generator found %.2f codes per pass", found)

    def decode(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Decodes what `codes` returns to videos [M, T, H, W, C], float32 in [0, 1]; M is at most `batch_size`."""
        given = [rows[name] for name in ("codes", "latents", "lengths") if name in rows]
        padded = [np.resize(x, (self._padded, *x.shape[1:])) for x in given]
        return np.asarray(self.tokenizer.decode(*padded))[: len(given[0])]


def sample(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    output: str | os.PathLike,
    *,
    counts: Mapping[int, int],
    seed: int = 0,
    options: SamplingOptions,
    batch_size: int = 8,
    budget: str = AUTO,
) -> dict[str, Any]:
    """Samples videos by class; batches that an earlier call wrote are kept and not sampled again.

    Writes NUMBER_CLASS.mp4 for each video, an image of the first 16 (one per row), and the codes. Each host samples its
    share of the batches.

    Args:
      generator: a generator that needs no given frames.
      tokenizer: the tokenizer that the generator was trained with.
      output: folder to write to, created if missing.
      counts: number of videos of each class, as from `split_in_proportion`. The classes alternate.
      seed: seed of the random numbers; sample i of a seed is independent of batch size and devices.
      options: sampling options.
      batch_size: samples per batch.
      budget: as for `Sampler`.

    Returns:
      The manifest, as described in `larp_jax.data.codes`.

    Raises:
      InputError: generator and tokenizer do not fit each other, or the folder contains something else.
    """
    classes = np.array(alternate(counts), np.int32)
    trained = generator.class_counts
    if trained is not None and (untrained := [label for label in sorted(counts) if label >= 0 and not trained[label]]):
        names = class_list(untrained, generator.class_names)
        logger.warning("no training video has the class %s: its samples are meaningless", names)
    sampler = Sampler(generator, tokenizer, seed=seed, options=options, batch_size=batch_size, budget=budget)
    videos = [f"{_name(i, classes)}.mp4" for i in range(len(classes))]
    with SampleFolder("sample", sampler, output, len(classes), counts=class_counts(classes)) as run:
        share = [number for number in run.mine if not run.is_whole(number, [videos[i] for i in run.rows(number)])]
        done = len(classes) - sum(len(run.rows(number)) for number in share)
        with Progress(len(classes), description="sample", unit="video", initial=done) as progress:
            for number in share:
                rows = run.rows(number)
                codes = sampler.codes(rows, classes=classes[rows])
                for i, video in zip(rows, sampler.decode(codes), strict=True):
                    write_video(run.path / videos[i], to_uint8(video), playable_fps(0.0))
                run.keep(number, codes)
                progress.update(len(rows))
        return run.finish(manifest_rows(classes, tokenizer.config.frames), generator.class_names, sheet=True)


def _name(i: int, classes: np.ndarray) -> str:
    return f"{i:06d}_{classes[i]}"


def class_counts(classes: np.ndarray) -> dict[str, int]:
    """Number of occurrences of each class, ready for JSON."""
    return {str(label): int(count) for label, count in zip(*np.unique(classes, return_counts=True), strict=True)}


def manifest_rows(classes: np.ndarray, frames: int) -> list[dict]:
    """Rows of the manifest for samples of these classes."""
    return [
        {"source": _name(i, classes), "start": 0, "frames": frames, "fps": 0.0, "label": int(label)}
        for i, label in enumerate(classes)
    ]


def read_classes(text: str, generator: LoadedGenerator) -> dict[int, int]:
    """Parses classes by name or number: `0,walk` to {0: 0, 3: 0}, `0:100,walk:50` to {0: 100, 3: 50}.

    If a class has a number as its name, the number stands for that class. Names with commas or quotes are quoted as in
    CSV.

    Raises:
      InputError: the generator has no such class, or the text is not of this form.
    """
    pairs = class_pairs(text, generator, "video")
    classes = dict(pairs)
    if len(classes) < len(pairs) or len({count > 0 for _, count in pairs}) > 1:
        raise InputError(f"--classes: {text!r} must be like 0,3 or 0:100,3:50, each class once")
    return classes


def class_pairs(text: str, generator: LoadedGenerator, unit: str) -> list[tuple[int, int]]:
    """Labels and counts of what `read_classes` describes, in order; 0 for no count, which is one of `unit`.

    Raises:
      InputError: the generator has no such class or none at all, or the text is no list.
    """
    if not generator.config.has_classes:
        raise InputError("--classes: this generator is given no class; leave it out")
    try:
        (parts,) = csv.reader([text], skipinitialspace=True)
    except csv.Error as error:
        raise InputError(f"--classes: {text!r} is not a valid list ({error})") from None
    pairs: list[tuple[int, int]] = []
    for part in [text] if text in generator.class_names else map(str.strip, parts or [""]):
        name, colon, count = part.rpartition(":")
        if (label := _class_called(part, generator)) is not None:
            pairs.append((label, 0))
        elif colon and count.isdecimal() and (label := _class_called(name, generator)) is not None:
            if not int(count):
                raise InputError(f"--classes: {part!r} asks for no {unit}; the count must be at least 1")
            pairs.append((label, int(count)))
        else:
            raise InputError(f"--classes: {_no_class(name if count.isdecimal() and colon else part, generator)}")
    return pairs


def _class_called(name: str, generator: LoadedGenerator) -> int | None:
    """The label of a class by its name or number; None if there is no such class."""
    names = generator.class_names
    if name in names:
        return names.index(name)
    if not name.isdecimal() or len(name) > 15:
        return None
    number = int(name)
    for label, other in enumerate(names):
        if other.isdecimal() and int(other) == number:
            return label
    # if this class has another number as its name, this number does not stand for it
    taken = number < len(names) and names[number].isdecimal()
    return number if number < generator.config.num_classes and not taken else None


def _no_class(name: str, generator: LoadedGenerator) -> str:
    names, last = generator.class_names, generator.config.num_classes - 1
    if not names:
        if name.isdecimal():
            return f"{name} is not a class of the generator; its classes are 0 to {last}"
        return f"{name!r} is not the number of a class (0 to {last}), and the generator has no class names"
    if len(names) <= MANY_LISTED:
        return f"{name!r} is not a class of the generator; its classes are {', '.join(names)}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"{name!r} is not one of the {len(names)} classes of the generator; did you mean {near[0]!r}?"


def as_in_training(generator: LoadedGenerator, total: int) -> dict[int, int]:
    """Splits a number by the class frequencies in training, or uniformly if they are unknown; {-1: total} without."""
    counts = generator.class_counts
    if not generator.config.has_classes or (counts is not None and not counts.any()):
        return {-1: total}
    return split_in_proportion(total, [1] * generator.config.num_classes if counts is None else counts)


def split_in_proportion(total: int, weights: Sequence[float]) -> dict[int, int]:
    """Splits a number in proportion to weights, by largest remainders: {index: count} without zero counts."""
    quotas = total * np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.floor(quotas).astype(int)
    by_remainder = np.argsort(counts - quotas, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return {i: int(count) for i, count in enumerate(counts) if count}


def alternate(counts: Mapping[int, int]) -> list[int]:
    """Each class as often as its count, in turns: 0, 3, 0, 3, 0 for {0: 3, 3: 2}."""
    turns = [(turn, label) for label, count in counts.items() for turn in range(count)]
    return [label for _, label in sorted(turns)]


def predict(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    source: str,
    output: str | os.PathLike,
    *,
    cond_frames: int = 5,
    label: int | None = None,
    max_clips: int = PREDICTED_CLIPS,
    seed: int = 0,
    options: SamplingOptions,
    batch_size: int = 8,
    budget: str = AUTO,
) -> dict[str, Any]:
    """Predicts how clips continue after their first frames; resumable like `sample`.

    Writes NAME-START.mp4 (original left, prediction right) and NAME-START.png (original above prediction) for each
    window of T frames, and the codes of the predictions.

    Args:
      generator: a generator trained for frame prediction, or one with a ladder.
      tokenizer: the tokenizer that the generator was trained with.
      source: input, as for `larp_jax.data.inputs.Inputs`; each window is predicted from its own first frames.
      output: folder to write to, created if missing.
      cond_frames: number of given frames. A picture is held still, so for it the number does not matter.
      label: the class of what follows, if the generator is given classes; None for any.
      max_clips: at most this many windows; 0 for all.
      seed: as for `sample`.
      options: as for `sample`.
      batch_size: as for `sample`.
      budget: as for `sample`; the given blocks have the most codes in equal blocks if it is `auto`.

    Returns:
      The manifest, as described in `larp_jax.data.codes`.

    Raises:
      InputError: as for `sample`, or nothing can be read.
    """
    if label is None and generator.config.has_classes and not generator.config.has_null_class:
        raise InputError("this generator was trained without a null class: give the class of the clips, --classes C")
    if cond_frames < 1:
        raise InputError(f"--cond-frames must be at least 1, got {cond_frames}")
    config, given = tokenizer.config, {"options": options, "cond_frames": cond_frames, "budget": budget}
    sampler = Sampler(generator, tokenizer, seed=seed, batch_size=batch_size, **given)
    clip = ClipSpec.of(config.clip_shape, fps=tokenizer.fps, stride=tokenizer.stride)
    inputs = Inputs(source, clip, max_clips=max_clips)
    total = min(inputs.windows, max_clips) if max_clips else inputs.windows
    names = output_names([video.name for video in inputs.videos])
    described, settings = [], {} if label is None else {"class": label}
    with (
        SampleFolder("predict", sampler, output, total, input=str(source), **settings) as run,
        Progress(total, description="predict", unit="clip") as progress,
    ):
        mine = set(run.mine)
        for number, windows in enumerate(windows_in(inputs, cond_frames + 1, total, batch_size)):
            sources = [f"{names[window.video]}-{window.start:06d}" for window in windows]
            rates = [inputs.videos[window.video].fps for window in windows]
            described += [
                {"source": name, "start": 0, "frames": config.frames, "fps": fps, "label": int(window.label)}
                for name, fps, window in zip(sources, rates, windows, strict=True)
            ]
            if number not in mine:
                continue
            progress.update(len(windows))
            outputs = [f"{name}{suffix}" for name in sources for suffix in (".mp4", ".png")]
            if run.is_whole(number, outputs, len(windows)):
                continue
            clips = np.stack([window.frames for window in windows])
            classes = None if label is None else np.full(len(clips), label)
            codes = sampler.codes(run.rows(number)[: len(windows)], classes=classes, clips=clips)
            predicted = zip(sources, rates, clips, to_uint8(sampler.decode(codes)), strict=True)
            for name, fps, original, prediction in predicted:
                path = run.path / f"{name}.mp4"
                files.make_folder(path.parent)
                write_video(path, np.concatenate([original, prediction], axis=2), playable_fps(fps))
                write_png(path.with_suffix(".png"), frame_grid([original, prediction]))
            run.keep(number, codes)
        if not described:
            raise InputError(f"{source}: no clip in it has more than the {cond_frames} given frames")
        return run.finish(described, inputs.label_names, sheet=False)


def windows_in(inputs: Inputs, least: int, total: int, batch_size: int) -> Iterator[list[Window]]:
    """Batches of the windows with at least `least` frames, `total` windows in all."""
    windows = (window for rows, _ in inputs.batches(1) for window in rows if window.valid >= least)
    windows = itertools.islice(windows, total)
    while batch := list(itertools.islice(windows, batch_size)):
        yield batch


class SampleFolder(BatchFolder):
    """A folder of samples.

    Attributes:
      path: the folder.
      mine: numbers of the batches of this host.
    """

    def __init__(
        self,
        command: str,
        sampler: Sampler,
        output: str | os.PathLike,
        total: int,
        *,
        option: str = "--output",
        **settings,
    ):
        self._sampler, self._total, self._batch_size = sampler, total, sampler.batch_size
        settings = {"command": command, "batch_size": self._batch_size, **sampler.describe(), **settings}
        super().__init__(output, settings, -(-total // self._batch_size), content="samples", option=option)

    def rows(self, number: int) -> range:
        """Rows of a batch."""
        return range(number * self._batch_size, min((number + 1) * self._batch_size, self._total))

    def is_whole(self, number: int, names: Iterable[str], count: int | None = None) -> bool:
        """Whether the codes of a batch and its files `names` exist; other arguments as for `kept`."""
        found = all((self.path / name).is_file() and files.size(self.path / name) for name in names)
        return self.kept(number, count) is not None and found

    def kept(self, number: int, count: int | None = None) -> dict[str, np.ndarray] | None:
        """The codes of a batch, as of `Sampler.codes`; None if they are missing or damaged.

        Args:
          number: number of the batch.
          count: number of its rows, if fewer than expected.
        """
        if not self._shard(number).exists():
            return None
        manifest = self._manifest(self._total, self._no_statistics())
        manifest["shards"][number]["rows"] = len(self.rows(number)) if count is None else count
        try:
            return read_shard(self.path, manifest, number)
        except InputError as error:
            logger.warning("%s; sampling it again", str(error).partition(";")[0])
            return None

    def keep(self, number: int, rows: Mapping[str, np.ndarray]) -> None:
        """Writes the codes of a batch, as of `Sampler.codes`, which marks it as done."""
        write_shard(self._shard(number), rows)

    def class_codes(self, labels: np.ndarray) -> dict[str, list[float | None]]:
        """What the manifest has of `class_codes`, for samples of these classes; nothing without a ladder.

        The samples that this host can read are counted: all of them if hosts share the folder.
        """
        found, totals = np.zeros(self._total, bool), np.zeros(self._total)
        for number in range(self._count) if self._sampler.has_lengths else ():
            if (kept := self.kept(number)) is not None:
                rows = self.rows(number)
                found[rows], totals[rows] = True, kept["lengths"].sum(axis=1)
        if not found.any() or labels.max() < 0:
            return {}
        means = mean_by_label(totals[found], labels[found], int(labels.max()) + 1)
        return {"class_codes": means, "class_codes_in_training": list(self._sampler.class_codes)}

    def _shard(self, number: int) -> pathlib.Path:
        return self.path / shard_name(number, self._count)

    def finish(self, rows: list[dict], label_names: Sequence[str], *, sheet: bool) -> dict[str, Any]:
        """Writes the manifest and, with `sheet`, the image, after all hosts are done."""
        manifest = self._manifest(len(rows), self._statistics()) | {"label_names": list(label_names), "rows": rows}
        self._sampler.report_passes()
        is_last = self.is_last()
        manifest |= self.class_codes(np.array([row["label"] for row in rows]))
        if is_last:
            if sheet:
                write_png(self.path / SHEET, frame_grid(self._first_videos(manifest)))
            write_manifest(self.path, manifest)
        return manifest

    def _no_statistics(self) -> LatentStatistics | None:
        """Statistics of no latents; None for codes."""
        quantizer = self._sampler.tokenizer.config.quantizer
        return None if quantizer.has_codes else LatentStatistics(quantizer.code_dim)

    def _statistics(self) -> LatentStatistics | None:
        """Those of the sampled latents that this host can read, as for `class_codes`; None for codes."""
        found = self._no_statistics()
        for number in range(self._count) if found else ():
            if (kept := self.kept(number)) is not None:
                found.add(kept["latents"])
        return found

    def _manifest(self, total: int, statistics: LatentStatistics | None) -> dict[str, Any]:
        """The manifest of `total` rows, without the rows."""
        tokenizer = self._sampler.tokenizer
        config = tokenizer.config
        sizes = [min(self._batch_size, total - start) for start in range(0, total, self._batch_size)]
        return new_manifest(
            fingerprint=tokenizer.fingerprint,
            step=tokenizer.step,
            generator_step=self._sampler.step,
            K=config.quantizer.codebook_size,
            N=config.num_tokens,
            clip=config.clip_shape,
            sizes=sizes,
            statistics=statistics,
            adaptive=config.adaptive,
        )

    def _first_videos(self, manifest: dict) -> list[np.ndarray]:
        """The first videos, uint8 [T, H, W, 3] each, decoded from codes, which an earlier call may have written."""
        videos = []
        for number in range(min(len(manifest["shards"]), -(-SHEET_ROWS // self._batch_size))):
            videos += list(to_uint8(self._sampler.decode(read_shard(self.path, manifest, number))))
        return videos[:SHEET_ROWS]
