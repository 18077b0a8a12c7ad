"""Codes or latents on disk: the format that `tokenize`, `sample` and `predict` write and that generators train on.

A folder of codes contains `codes-00000-of-00001.npz` and so on, and `manifest.json`, which is written last: a folder
without it is incomplete. In the layout "fixed", each shard has `codes` [M, N] int32 and, for frame prediction,
`condition` [M, N] int32. In the layout "packed", for clips with different numbers of codes, it has `codes` [L] int32,
the codes of all its clips one after the other; `offsets` [M + 1] int64: clip i has codes[offsets[i] : offsets[i + 1]];
and `lengths` [M, T] int32, the number of codes of each block of frames. Of tokenizers with continuous latents, shards
have `latents` float16 with a last axis of d in place of `codes`, and so has `condition`; in all else, they are stored
like codes. The manifest describes the source of each row, in order:

  format, version, layout: "larp_jax.codes", 2 (3 with latents), "fixed" or "packed".
  fingerprint, step: of the tokenizer.
  generator_step: step of the generator; only for sampled codes.
  K, N: size of the codebook and codes per clip; in the layout "packed", the most codes of a clip.
  d, mean, std: in place of K, the dimension of latents, and mean and standard deviation [d] of each of their channels
    over all latents of the folder (`condition` is left out).
  blocks, ladder: number of blocks of a clip, and the numbers of codes that a block may have; only if "packed".
  clip: [T, H, W, C].
  label_names: names of the classes.
  input, skipped, cond_frames: only in codes written by `tokenize`.
  class_codes, class_codes_in_training: mean number of codes of each class (null: none), of the samples and of the
    clips that the generator was trained on; only in sampled codes, if "packed".
  fewer_frames: true if windows of fewer than T frames were encoded as they are, up to the end of a patch.
  other_size: true if the height and width of the clips are not those of the tokenizer.
  budget, mean_codes: as given to `tokenize`, and the mean number of codes of a clip; only if "packed".
  shards: `file` and `rows` (their number) of each shard.
  rows: `source` (path within the input, with forward slashes), `start` (first frame), `frames` (how many of the T
    frames are from the video), `fps` (0: unknown), `label` (-1: none), `flip` if the window is mirrored,
    and `picture` if its first frame is held still for a block, so that the last frames of the window are left out.

Version 1 has no `layout` and is otherwise the same as "fixed".
"""

import functools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from larp_jax import files, npz
from larp_jax.config import MOST_POSITIONS, Ladder
from larp_jax.data.latents import LatentStatistics
from larp_jax.data.pipeline import Batches
from larp_jax.data.spec import advice, contents
from larp_jax.errors import InputError, reason
from larp_jax.files import read_json

MANIFEST = "manifest.json"
SETTINGS = "settings.json"  # only in folders written by `larp_jax.inference.generate`
FORMAT = "larp_jax.codes"
VERSION, LATENTS_VERSION = 2, 3
FIXED, PACKED = "fixed", "packed"
SHARD_ROWS = 16_384
SHARD_NAME = re.compile(r"codes-\d+-of-\d+\.npz")


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` of `count`."""
    return f"codes-{number:05d}-of-{count:05d}.npz"


def write_shard(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard atomically.

    Args:
      path: file to write.
      arrays: `codes` [M, N] int32 (or `latents` [M, N, d], stored as float16) and, for frame prediction, `condition`,
        the same; for clips with different numbers of codes also `lengths` [M, T] int32: the shard then has the layout
        "packed".

    Raises:
      InputError: a latent exceeds the range of float16.
    """
    arrays = {name: as_stored(name, values) for name, values in arrays.items()}
    if "lengths" in arrays:
        (name,) = arrays.keys() & {"codes", "latents"}
        values, lengths = arrays[name], np.asarray(arrays["lengths"], np.int32)
        totals = lengths.sum(axis=1, dtype=np.int64)
        own = np.arange(values.shape[1]) < totals[:, None]
        arrays = {name: values[own], "offsets": np.cumsum([0, *totals], dtype=np.int64), "lengths": lengths}
    with files.writing(path) as file:
        np.savez(file, **arrays)


def as_stored(name: str, values: np.ndarray) -> np.ndarray:
    """Values of a shard in the dtype of the format: floats as float16.

    Raises:
      InputError: a value is NaN, or exceeds the range of float16; `name` is for the message.
    """
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        return values
    if not np.abs(values).max() <= np.finfo(np.float16).max:  # written this way to also reject NaN
        raise InputError(
            f"{name} has values up to {np.abs(values).max():g}, and float16, in which they are stored, ends at 65504;"
            " train the tokenizer with a larger model.quantizer.kl_weight"
        )
    return values.astype(np.float16)


def new_manifest(
    *,
    fingerprint: str,
    step: int,
    N: int,
    clip: Sequence[int],
    sizes: Sequence[int],
    K: int | None = None,
    statistics: LatentStatistics | None = None,
    adaptive: Ladder | None = None,
    **details,
) -> dict[str, Any]:
    """A manifest in the current version.

    Args:
      fingerprint: fingerprint of the tokenizer.
      step: training step of the tokenizer.
      N: codes per clip, or the most codes of a clip.
      clip: [T, H, W, C].
      sizes: number of rows in each shard.
      K: size of the codebook; leave out for latents.
      statistics: those of all latents; leave out for codes.
      adaptive: the numbers of codes that clips may have; None if all have N.
      details: the remaining keys, as listed at the top of this module; `rows` may be added later.
    """
    shards = [{"file": shard_name(i, len(sizes)), "rows": size} for i, size in enumerate(sizes)]
    if adaptive:
        details = {"blocks": adaptive.blocks, "ladder": list(adaptive.rungs), **details}
    kind = {"K": K}
    if statistics is not None:
        mean, std = statistics.mean.tolist(), statistics.std.tolist()
        kind = {"d": len(mean), "mean": mean, "std": std}
    return {
        "format": FORMAT,
        "version": VERSION if statistics is None else LATENTS_VERSION,
        "layout": PACKED if adaptive else FIXED,
        "fingerprint": fingerprint,
        "step": step,
        **kind,
        "N": N,
        "clip": list(clip),
        "shards": shards,
        **details,
    }


def write_manifest(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, which marks the folder as complete; its shards must exist."""
    files.write_json(directory / MANIFEST, manifest)


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads and checks the manifest of a folder of codes or latents, of any version.

    Raises:
      InputError: it is missing or damaged, has a later version or another layout, or names files outside its folder.
    """
    path = files.any_path(directory, "folder of codes") / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a folder that larp-jax tokenize completed") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); tokenize again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = f" but of {kind}" if (kind := contents(path.parent)) else ""
        raise InputError(f"{path} is not a manifest of codes{found}; give a folder written by larp-jax tokenize")
    version = manifest.get("version")
    layout = manifest.get("layout", FIXED if version == 1 else None)
    if type(version) is not int or not 1 <= version <= LATENTS_VERSION:
        raise InputError(f"{path} has version {version}, but only 1 to {LATENTS_VERSION} are supported; tokenize again")
    if layout not in (FIXED, PACKED):
        raise InputError(f"{path} has layout {layout!r}, not {FIXED!r} or {PACKED!r}; tokenize again")
    if complaint := _complaint(manifest):
        raise InputError(f"{path} is damaged ({complaint}); tokenize again")
    return manifest


def _complaint(manifest: dict) -> str | None:
    """What is wrong with a manifest; None if nothing is."""

    def is_count(value, least):
        return type(value) is int and least <= value < 2**31

    if not isinstance(manifest.get("fingerprint"), str):
        return "no fingerprint"
    size = "d" if has_latents(manifest) else "K"
    if not all(is_count(manifest.get(name), 1) for name in (size, "N")):
        return f"{size} and N are not positive integers"
    if has_latents(manifest) and not all(_is_numbers(manifest.get(name), manifest["d"]) for name in ("mean", "std")):
        return "mean and std are not d numbers"
    if manifest.get("layout") == PACKED and (complaint := _ladder_complaint(manifest)):
        return complaint
    clip = manifest.get("clip")
    if not (isinstance(clip, list) and len(clip) == 4 and all(is_count(side, 1) for side in clip)):
        return "clip is not [T, H, W, C]"
    if not is_count(manifest.get("cond_frames", 0), 0):
        return "cond_frames is not an integer of at least 0"
    for name in ("fewer_frames", "other_size"):
        if type(manifest.get(name, False)) is not bool:
            return f"{name} is neither true nor false"
    names = manifest.get("label_names", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "label_names is not a list of names"
    shards, rows = manifest.get("shards"), manifest.get("rows")
    if not (isinstance(shards, list) and isinstance(rows, list) and rows):
        return "no shards or no rows"
    for shard in shards:
        if not isinstance(shard, dict) or not is_count(shard.get("rows"), 1):
            return "a shard without its number of rows"
        if not isinstance(shard.get("file"), str) or not SHARD_NAME.fullmatch(shard["file"]):
            return f"{shard.get('file')!r} is not the name of a shard"
    if sum(shard["rows"] for shard in shards) != len(rows):
        return f"{sum(shard['rows'] for shard in shards)} rows in shards, {len(rows)} listed"
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not _is_inside(row.get("source")):
            return f"the source of row {i} is not a path within a folder"
        if not is_count(row.get("start"), 0) or not is_count(row.get("frames"), 1) or row["frames"] > clip[0]:
            return f"invalid start or frames of row {i}"
        if not isinstance(row.get("fps"), (int, float)) or not math.isfinite(row["fps"]):
            return f"invalid fps of row {i}"
        if type(row.get("label")) is not int or not -1 <= row["label"] < 2**31:
            return f"invalid label of row {i}"
        for kind in ("flip", "picture"):
            if type(row.get(kind, False)) is not bool:
                return f"invalid {kind} of row {i}"
    return None


def has_latents(manifest: dict) -> bool:
    """Whether a folder has continuous latents in place of codes."""
    return manifest.get("version") == LATENTS_VERSION


def _is_numbers(values: Any, count: int) -> bool:
    """Whether a value of JSON is a list of so many finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(x) in (int, float) and math.isfinite(x) for x in values)


def _ladder_complaint(manifest: dict) -> str | None:
    """What is wrong with the numbers of codes in a packed manifest; None if nothing is."""
    blocks, rungs = manifest.get("blocks"), manifest.get("ladder")
    if type(blocks) is not int or not (isinstance(rungs, list) and rungs and all(type(rung) is int for rung in rungs)):
        return "no blocks or no ladder"
    if manifest["N"] > MOST_POSITIONS:
        return f"N is above {MOST_POSITIONS}"
    if manifest.get("cond_frames"):
        return "packed codes have no cond_frames"
    try:
        Ladder(tuple(rungs), blocks, manifest["N"]).check()
    except InputError as error:
        return str(error).partition(";")[0]
    return None


def ladder_of(manifest: dict) -> Ladder | None:
    """The numbers of codes that the clips of a checked manifest may have; None if all have N."""
    if manifest.get("layout") != PACKED:
        return None
    return Ladder(tuple(manifest["ladder"]), manifest["blocks"], manifest["N"])


def _is_inside(name: Any) -> bool:
    """Whether a text is a relative path with forward slashes that stays within its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = pathlib.PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def read_shard(directory: str | os.PathLike, manifest: dict, number: int) -> dict[str, np.ndarray]:
    """The rows of one shard.

    Args:
      directory: the folder.
      manifest: the result of `read_manifest`.
      number: index of the shard.

    Returns:
      `codes` [M, N] int32 in [0, K), or `latents` [M, N, d] float16; `condition`, the same, if the manifest has
      `cond_frames`; if clips have different numbers of codes also `lengths` [M, T] int32, and the codes are packed:
      those of a clip first, then zeros.

    Raises:
      InputError: the shard is missing, damaged, or does not match the manifest.
    """
    shard = manifest["shards"][number]
    path, ladder = files.any_path(directory) / shard["file"], ladder_of(manifest)
    name, dtype, channels = "codes", np.int32, ()
    if has_latents(manifest):
        name, dtype, channels = "latents", np.float16, (manifest["d"],)
    if ladder:
        rows = _read_packed(path, shard["rows"], ladder, name, npz.Array(dtype, (None, *channels)))
    else:
        names = (name, "condition") if manifest.get("cond_frames") else (name,)
        expected = {name: npz.Array(dtype, (shard["rows"], manifest["N"], *channels)) for name in names}
        rows = npz.read(path, expected, fix="tokenize again")
    for codes in (rows[name] for name in (name, "condition") if name in rows):
        if has_latents(manifest):
            if not np.isfinite(codes).all():
                raise InputError(f"{path} contains latents that are not finite; tokenize again")
        elif codes.min() < 0 or codes.max() >= manifest["K"]:
            raise InputError(
                f"{path} contains codes from {codes.min()} to {codes.max()}, outside [0, {manifest['K']}); tokenize"
                " again"
            )
    return rows


def _read_packed(
    path: pathlib.Path, count: int, ladder: Ladder, name: str, array: npz.Array
) -> dict[str, np.ndarray]:
    """Codes or latents, by their name, and `lengths` of a packed shard with `count` rows, see `read_shard`."""
    expected = {
        "lengths": npz.Array(np.int32, (count, ladder.blocks)),
        "offsets": npz.Array(np.int64, (count + 1,)),
        name: array,
    }
    stored = npz.read(path, expected, fix="tokenize again")
    lengths, offsets, codes = (stored[key] for key in ("lengths", "offsets", name))
    totals = lengths.sum(axis=1, dtype=np.int64)
    wrong = ~(np.isin(lengths, ladder.rungs).all(axis=1) & (totals <= ladder.bucket))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{path}: row {row} has {','.join(map(str, lengths[row]))} codes, not an assignment of the ladder; tokenize"
            " again"
        )
    if not np.array_equal(offsets, np.cumsum([0, *totals])):
        raise InputError(f"{path}: the offsets contradict the lengths of the blocks; tokenize again")
    if len(codes) != offsets[-1]:
        raise InputError(f"{path} has {len(codes)} codes, but {offsets[-1]} by its lengths; tokenize again")
    packed = np.zeros((count, ladder.bucket, *codes.shape[1:]), codes.dtype)
    for row, start, end in zip(packed, offsets, offsets[1:], strict=False):
        row[: end - start] = codes[start:end]
    return {name: packed, "lengths": lengths}


def mean_by_label(values: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """The mean of the values [M] with each label; None where there are none. Labels [M] below 0 are left out."""
    known = labels >= 0
    counts = np.bincount(labels[known], minlength=classes)
    totals = np.bincount(labels[known], values[known], minlength=classes)
    return [total / count if count else None for total, count in zip(totals.tolist(), counts.tolist(), strict=True)]


def describe_class_codes(manifest: Mapping) -> str:
    """The means of `class_codes` as text, such as `walk 210 (training 214), run 480 (training 471)`."""
    names, trained = manifest["label_names"], manifest["class_codes_in_training"]
    parts = []
    for label, mean in enumerate(manifest["class_codes"]):
        known = trained[label] if label < len(trained) else None
        if mean is not None:
            name = names[label] if label < len(names) else f"class {label}"
            parts.append(f"{name} {mean:.0f}" + ("" if known is None else f" (training {known:.0f})"))
    return ", ".join(parts)


class CodeSet:
    """A folder of codes or latents, in memory. Its manifest is read at once, the rest at the first use of `rows`.

    The rows of one source (windows of a video, mirrored or not) count as one video. Training samples one row per video
    and epoch, with the same frequencies as windows of the video itself.

    Args:
      directory: the folder.

    Attributes:
      manifest: as described at the top of this module.
      label_names: names of the classes in the order of their labels; empty without classes.

    Raises:
      InputError: the manifest is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = files.any_path(directory)
        if not (self.path / MANIFEST).exists() and (found := advice(self.path)):
            raise InputError(f"{directory} contains no codes written by larp-jax tokenize; {found}")
        self.manifest = read_manifest(directory)
        if self.manifest.get("fewer_frames"):
            raise InputError(f"{directory} has clips of fewer frames; tokenize again without --fewer-frames")
        if self.manifest.get("other_size"):
            raise InputError(
                f"{directory} has clips of another size than its tokenizer's; tokenize again without --size"
            )
        self.label_names = tuple(self.manifest.get("label_names", ()))
        rows = self.manifest["rows"]
        self._labels = np.array([row["label"] for row in rows], np.int32)
        if self.label_names and (last := int(self._labels.max())) >= len(self.label_names):
            raise InputError(
                f"{self.path / MANIFEST} has label {last}, but only {len(self.label_names)} classes; tokenize again"
            )
        _, video = np.unique([row["source"] for row in rows], return_inverse=True)
        self._order = np.argsort(video, kind="stable")  # rows grouped by video
        self._counts = np.bincount(video)
        self._first = np.cumsum(self._counts) - self._counts

    @functools.cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Arrays by name: those of `read_shard` for all shards, and `label` [M] int32 (-1: none).

        Raises:
          InputError: the folder is incomplete or damaged.
        """
        shards = [read_shard(self.path, self.manifest, i) for i in range(len(self.manifest["shards"]))]
        return {name: np.concatenate([rows[name] for rows in shards]) for name in shards[0]} | {"label": self._labels}

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._counts)

    def labels(self) -> np.ndarray:
        """The class of each video, [V] int32."""
        return self._labels[self._order[self._first]]

    def mean_codes(self, classes: int) -> list[float | None]:
        """Mean number of codes of the videos of each class; None where a class has none.

        Only for clips with different numbers of codes. The mean of a video is that of its rows, as in training.
        """
        totals = self.rows["lengths"].sum(axis=1, dtype=np.float64)[self._order]
        videos = np.add.reduceat(totals, self._first) / self._counts
        return mean_by_label(videos, self.labels(), classes)

    def some(self, count: int) -> dict[str, np.ndarray]:
        """At most `count` of the rows that are not mirrored, spread evenly over them; 0 for all of them."""
        plain = np.flatnonzero([not row.get("flip") for row in self.manifest["rows"]])
        if 0 < count < len(plain):
            plain = plain[np.arange(count) * len(plain) // count]
        return {name: x[plain] for name, x in self.rows.items()}

    def batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """Endless batches: videos epoch by epoch, without replacement, with a random row of each.

        The batch of a step is a function of (seed, step); together, the processes get the batch of a single process.

        Returns:
          Iterator over the arrays of `rows`, batch_size / process_count rows each.

        Raises:
          InputError: the batch cannot be split.
        """
        if batch_size % process_count:
            raise InputError(f"data.batch_size={batch_size} does not split evenly over {process_count} process(es)")
        local = batch_size // process_count
        mine = slice(process_index * local, (process_index + 1) * local)
        return Batches(self, self._iterate(batch_size, seed, start_step, mine))

    def _iterate(self, batch_size: int, seed: int, step: int, mine: slice) -> Iterator[dict[str, np.ndarray]]:
        @functools.lru_cache(2)  # a batch may reach into the next epoch
        def order(epoch):
            return np.random.default_rng((seed, 0, epoch)).permutation(len(self))

        while True:
            epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(self))
            videos = np.array([order(epoch)[place] for epoch, place in zip(epochs.tolist(), places, strict=True)])
            sampled = np.random.default_rng((seed, 1, step)).integers(self._counts[videos])
            rows = self._order[self._first[videos] + sampled][mine]
            yield {name: x[rows] for name, x in self.rows.items()}
            step += 1
