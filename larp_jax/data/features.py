"""Clips with features of a frozen network on disk, as `larp-jax features` writes them: tokenizers align with these.

A folder of features contains `features-00000-of-00012.npy` and so on, and `manifest.json`, which is written last: a
folder without it is incomplete. A shard is an array of records, each a clip and what the network sees in it, so that
training reads both at once:

  video: [T, H, W, 3] uint8.
  features: [t, h, w, C] float16, on the grid of the decoder's patches (`larp_jax.models.alignment.resampled`).
  window: int64, number of the clip's window among those that were to be read.
  flip: bool, whether the clip is mirrored left to right, and its features are those of the mirrored clip.

The manifest contains:

  format, version: "larp_jax.features", 1.
  teacher: `name`, or the family if it was given by its path; `config`, its sizes; `sha256` of its file.
  precision: dtype of its computation.
  clip, features: [T, H, W, 3] and [t, h, w, C].
  data, sampling: the data set, and the `fps` or `stride` at which its videos were sampled.
  windows, flips: at most so many windows of each video (0: consecutive ones), and whether mirrored ones were added.
  shards: `file` and `rows` (their number) of each shard.
  rows: `video` (index in the data set), `source` (its name), `start` (first frame) and `flip`.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from larp_jax import files, npz
from larp_jax.config.teachers import TeacherConfig, teacher_from_dict
from larp_jax.data import manifests
from larp_jax.data.clips import ClipSpec
from larp_jax.data.pipeline import Batches, sampled_batches
from larp_jax.errors import InputError, reason

VERSION = 1
COMMAND = "larp-jax features"
AGAIN = f"run {COMMAND} again"


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` of `count`."""
    return f"features-{number:05d}-of-{count:05d}.npy"


def record(contents: Mapping[str, Any]) -> np.dtype:
    """The dtype of the shards, by `clip` and `features` of a manifest."""
    fields = [("video", "u1", tuple(contents["clip"])), ("features", "<f2", tuple(contents["features"]))]
    return np.dtype([*fields, ("window", "<i8"), ("flip", "?")])


def write_shard(path: str | os.PathLike, rows: np.ndarray) -> None:
    """Writes a shard, records [M], atomically."""
    with files.writing(path) as file:
        np.save(file, rows)


def shard_header(path: pathlib.Path, dtype: np.dtype) -> tuple[int, int]:
    """Number of rows of a shard, and the position in its file of the first one.

    Raises:
      InputError: the shard is missing, damaged, or of other records.
    """
    try:
        with path.open("rb") as file:
            found = npz.header(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except Exception as error:  # any error from NumPy on a broken header
        said = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({reason(error)})"
        raise InputError(f"{path} is {said}; {AGAIN}") from None
    if found.dtype != dtype or len(found.shape) != 1 or size != start + found.shape[0] * dtype.itemsize:
        raise InputError(f"{path} is damaged or has clips or features of another size; {AGAIN}")
    return int(found.shape[0]), start


def windows_of(path: pathlib.Path, dtype: np.dtype, count: int) -> list[tuple[int, bool]]:
    """`window` and `flip` of each row of a shard of `count` windows in all; `InputError` as for `shard_header`."""
    if not shard_header(path, dtype)[0]:
        return []
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    windows = rows["window"].tolist()
    if min(windows) < 0 or max(windows) >= count:
        raise InputError(f"{path} is damaged (it names other windows); delete it, and {AGAIN}")
    return list(zip(windows, rows["flip"].tolist(), strict=True))


def new_manifest(**contents) -> dict[str, Any]:
    """A manifest in the current version; `contents` are the other keys at the top of this module."""
    return {"format": "larp_jax.features", "version": VERSION, **contents}


def write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, which marks the folder as complete; its shards must exist."""
    files.write_json(directory / manifests.MANIFEST, manifest)


def _check(manifest: dict) -> None:
    """Any of several errors if something in a manifest is wrong."""
    for name, length in (("clip", 4), ("features", 4)):
        sides = manifest[name]
        if len(sides) != length or not all(type(side) is int and 0 < side < 2**31 for side in sides):
            raise ValueError(f"{name} is {sides}")
    record(manifest)  # ValueError if a row is larger than NumPy allows
    ClipSpec.of(manifest["clip"], **manifest["sampling"])
    teacher_from_dict(manifest["teacher"]["config"])
    if not all(isinstance(manifest["teacher"][name], str) for name in ("name", "sha256")):
        raise ValueError("name and sha256 of the teacher must be texts")
    if type(manifest["flips"]) is not bool:
        raise ValueError("flips is neither true nor false")
    manifests.check_rows(manifest, shard_name)
    if any(type(row["flip"]) is not bool for row in manifest["rows"]):
        raise ValueError("a row without its flip")


class FeatureSet:
    """A folder of features. Its shards are checked at once, but rows are read when they are needed.

    The rows of a video (windows, mirrored or not) count as one video. Training samples one row per video and epoch,
    with the same frequencies as windows of the video itself.

    Args:
      directory: the folder, on this machine.

    Attributes:
      manifest: as described at the top of this module.
      clip: size and sampling of the clips.
      teacher: sizes of the frozen network.

    Raises:
      InputError: the folder is incomplete or damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = files.local_path(directory, "folder of features")
        self.manifest = manifests.read(
            self.path, content="features", version=VERSION, command=COMMAND, check=_check
        )
        self.clip = ClipSpec.of(self.manifest["clip"], flip=False, **self.manifest["sampling"])
        self.teacher: TeacherConfig = teacher_from_dict(self.manifest["teacher"]["config"])
        dtype, shards = record(self.manifest), []
        for shard in self.manifest["shards"]:
            path = self.path / shard["file"]
            rows, start = shard_header(path, dtype)
            if rows != shard["rows"]:
                raise InputError(f"{path} has {rows} rows, but {shard['rows']} by the manifest; {AGAIN}")
            shards.append((path, start, rows))
        self._read = _ReadRow(shards, dtype, [row["video"] for row in self.manifest["rows"]])

    def __len__(self) -> int:
        """Number of videos."""
        return self._read.videos

    def names(self) -> list[str]:
        """A name of each row, which with their order determines the order of training."""
        return [f"{row['source']} {row['start']}{' flip' * row['flip']}" for row in self.manifest["rows"]]

    def row(self, number: int) -> dict[str, np.ndarray]:
        """`video` and `features` of a row; `InputError` if it cannot be read."""
        return self._read.row(number)

    def batches(self, **options) -> Batches:
        """Endless batches {"video": uint8 [B, T, H, W, 3], "features": float16 [B, t, h, w, C]}; see `sampled_batches`.

        The row of each video is random.
        """
        return sampled_batches(self, self._read, **options)


class _ReadRow:
    """Reads rows; small, because every worker process has a copy. `videos` is the number of videos."""

    def __init__(self, shards: Sequence[tuple[pathlib.Path, int, int]], dtype: np.dtype, videos: Sequence[int]):
        """`shards` are (path, position of the first row, rows); `videos` gives the video of each row."""
        self._shards, self._dtype = [shard[:2] for shard in shards], dtype
        self._ends = np.cumsum([rows for *_, rows in shards])
        _, video = np.unique(videos, return_inverse=True)
        self._order = np.argsort(video, kind="stable")  # rows grouped by video
        self._counts = np.bincount(video)
        self._first = np.cumsum(self._counts) - self._counts
        self.videos = len(self._counts)

    def row(self, number: int) -> dict[str, np.ndarray]:
        """See `FeatureSet.row`."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        path, start = self._shards[shard]
        offset = start + (number - int(self._ends[shard - 1] if shard else 0)) * self._dtype.itemsize
        try:
            (found,) = np.fromfile(path, self._dtype, count=1, offset=offset)
        except (OSError, ValueError) as error:  # ValueError: the file became shorter
            raise InputError(f"{path} cannot be read ({reason(error)}); {AGAIN}") from error
        return {"video": found["video"], "features": found["features"]}

    def __call__(self, video: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A random row of a video."""
        return self.row(int(self._order[self._first[video] + rng.integers(self._counts[video])]))
