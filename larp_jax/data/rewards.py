"""Rewards on disk: how well a tokenizer reconstructs clips with each assignment, as `larp-jax allocate` writes it.

A folder of rewards contains `rewards-00000-of-00012.npz` and so on, and `manifest.json`, which is written last: a
folder without it is incomplete. Each shard has, for its clips, one array [M, A] float32 for each metric, `psnr` in dB
or `lpips`, of the A assignments in the order of `Ladder.assignments`, and `windows` [M] int64, the numbers of its clips
among those that were to be read. The clips themselves are not stored, but named:

  format, version: "larp_jax.rewards", 1.
  fingerprint, step: of the tokenizer.
  N, blocks, ladder: the most codes of a clip, its number of blocks, and the numbers of codes that a block may have.
  clip: [T, H, W, C].
  data, sampling: the data set, and the `fps` or `stride` at which its videos were sampled.
  metrics: names of the arrays.
  reward: the `metric`, `quality_weight` and `length_weight` of the rewards, see `rewards_of`. The metrics
    `mse`, the squared error, and `rmse`, its root, have no arrays: they are computed from `psnr`.
  statistics: means over these clips, see `statistics`.
  shards: `file` and `rows` (their number) of each shard.
  rows: `video` (index in the data set), `source` (its name), `start` (first frame), `label` (-1: none), and the best
    assignment: `lengths`, its number of codes by block, and its `reward`.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from larp_jax import files, npz
from larp_jax.config import Ladder
from larp_jax.data import manifests
from larp_jax.data.clips import ClipSpec
from larp_jax.data.manifests import MANIFEST
from larp_jax.data.pipeline import Batches, eval_batches, window_batches
from larp_jax.data.sources import Source, open_source
from larp_jax.errors import InputError

FORMAT = "larp_jax.rewards"
VERSION = 1
# Whether more of a metric is better (1) or worse (-1).
SIGNS = {"psnr": 1.0, "mse": -1.0, "rmse": -1.0, "lpips": -1.0}
POWERS = {"mse": 1.0, "rmse": 0.5}  # of the squared error, for the metrics that are computed from `psnr`
AGAIN = "run larp-jax allocate again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """How the reward of an assignment is computed; the default weights are the published ones.

    Attributes:
      metric: the quality: `psnr`, `mse`, `rmse` or `lpips`.
      quality_weight: w_q, how much quality counts.
      length_weight: w_l, how much each code costs.
    """

    metric: str = "psnr"
    quality_weight: float = 1.2
    length_weight: float = 0.8


def measured(metric: str) -> str:
    """The array of a shard that a metric is computed from."""
    return "psnr" if metric in POWERS else metric


def rewards_of(values: Mapping[str, np.ndarray], ladder: Ladder, reward: Reward) -> np.ndarray:
    """Rewards w_q Q - w_l L of assignments (EVATok, arXiv 2603.12267, section 3), [M, A] float32.

    Q is the quality and L the number of codes, each without its mean and divided by its standard deviation over all
    clips and assignments. Q of a metric of which less is better has the other sign: the paper prints LPIPS without.

    Args:
      values: [M, A] by array of a shard.
      ladder: names the assignments.
      reward: metric and weights.
    """
    codes = np.array([sum(lengths) for lengths in ladder.assignments], np.float64)
    quality = values[measured(reward.metric)].astype(np.float64)
    if power := POWERS.get(reward.metric):
        quality = 10.0 ** (-quality / 10.0 * power)
    q = SIGNS[reward.metric] * _standardized(quality)
    return (reward.quality_weight * q - reward.length_weight * _standardized(codes)).astype(np.float32)


def _standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / max(float(x.std()), 1e-12)  # all are equal: all rewards are equal


def statistics(values: Mapping[str, np.ndarray], rewards: np.ndarray, ladder: Ladder) -> dict[str, Any]:
    """Means over clips under their best assignments and under the best uniform one, ready for JSON.

    Args:
      values: [M, A] by metric.
      rewards: [M, A].
      ladder: names the assignments.

    Returns:
      `clips`; `best` and `uniform`, each with the means `reward`, `codes` and those of the metrics. `uniform` also has
      its `lengths`: it is the uniform assignment with the highest mean reward.
    """
    uniform = ladder.assignments.index(best_uniform(rewards, ladder))

    def means(chosen):
        rows = np.arange(len(rewards)), chosen
        codes = [sum(ladder.assignments[i]) for i in np.broadcast_to(chosen, len(rewards))]
        found = {"reward": rewards[rows], "codes": codes} | {name: x[rows] for name, x in values.items()}
        return {name: float(np.mean(x, dtype=np.float64)) for name, x in found.items()}

    lengths = {"lengths": list(ladder.assignments[uniform])}
    return {"clips": len(rewards), "best": means(rewards.argmax(axis=1)), "uniform": means(uniform) | lengths}


def best_uniform(rewards: np.ndarray, ladder: Ladder) -> tuple[int, ...]:
    """The uniform assignment with the highest mean of rewards [M, A]."""
    means = rewards.mean(axis=0, dtype=np.float64)
    return max(ladder.uniform, key=lambda lengths: means[ladder.assignments.index(lengths)])


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` of `count`."""
    return f"rewards-{number:05d}-of-{count:05d}.npz"


def write_shard(path: str | os.PathLike, values: Mapping[str, np.ndarray], windows: Sequence[int]) -> None:
    """Writes a shard atomically.

    Args:
      path: file to write.
      values: [M, A] float32 by metric.
      windows: number of the window of each row, among all that were to be read.
    """
    with files.writing(path) as file:
        np.savez(file, **values, windows=np.asarray(windows, np.int64))


def read_shard(
    path: str | os.PathLike, metrics: Sequence[str], ladder: Ladder, rows: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What `write_shard` wrote; `InputError` if it is missing, damaged, or has other sizes. `rows` is M if known."""
    expected = {name: npz.Array(np.float32, (rows, ladder.count)) for name in metrics}
    found = npz.read(path, expected | {"windows": npz.Array(np.int64, (rows,))}, fix=AGAIN)
    windows = found.pop("windows")
    if any(len(x) != len(windows) or not np.isfinite(x).all() for x in found.values()):
        raise InputError(f"{path} contains values that are not finite, or of other clips; {AGAIN}")
    return found, windows


def new_manifest(**contents) -> dict[str, Any]:
    """A manifest in the current version; `contents` are the other keys at the top of this module."""
    return {"format": FORMAT, "version": VERSION, **contents}


def write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, which marks the folder as complete; its shards must exist."""
    files.write_json(directory / MANIFEST, manifest)


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads and checks the manifest of a folder of rewards; `InputError` if it is missing, damaged or another's."""
    return manifests.read(directory, content="rewards", version=VERSION, command="larp-jax allocate", check=_check)


def _check(manifest: dict) -> None:
    """Any of several errors if something in a manifest is wrong."""
    ladder_of(manifest).check()
    clip_of(manifest)
    reward, names = Reward(**manifest["reward"]), manifest["metrics"]
    known = {measured(metric) for metric in SIGNS}
    if not names or not set(names) <= known or reward.metric not in SIGNS or measured(reward.metric) not in names:
        raise ValueError(f"the metrics {names} do not fit the reward of {reward.metric}")
    if not isinstance(manifest["data"], str) or not isinstance(manifest["fingerprint"], str):
        raise ValueError("data and fingerprint must be texts")
    manifests.check_rows(manifest, shard_name)


def ladder_of(manifest: Mapping[str, Any]) -> Ladder:
    """The assignments that a manifest is about."""
    return Ladder(tuple(manifest["ladder"]), manifest["blocks"], manifest["N"])


def clip_of(manifest: Mapping[str, Any]) -> ClipSpec:
    """Size and sampling of the clips of a manifest."""
    return ClipSpec.of(manifest["clip"], flip=False, **manifest["sampling"])


class RewardSet:
    """A folder of rewards and the clips that they are of.

    Args:
      directory: the folder.

    Attributes:
      manifest: as described at the top of this module.
      ladder: the assignments.
      clip: size and sampling of the clips.
      source: the data set of the clips, opened.

    Raises:
      InputError: the folder is incomplete or damaged, or its clips are not there any more.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = files.any_path(directory)
        self.manifest = read_manifest(directory)
        self.ladder, self.clip = ladder_of(self.manifest), clip_of(self.manifest)
        self.source: Source = open_source(self.manifest["data"], self.clip)
        self._windows = [(row["video"], row["start"]) for row in self.manifest["rows"]]
        for row in self.manifest["rows"]:
            index = row["video"]
            if index >= len(self.source) or self.source.name(index) != row["source"]:
                raise InputError(
                    f"data {self.manifest['data']} has no {row['source']} at its place any more, but {directory} has"
                    f" its rewards; {AGAIN}"
                )

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._windows)

    @functools.cached_property
    def values(self) -> dict[str, np.ndarray]:
        """[M, A] float32 by metric; `InputError` if a shard is missing or damaged."""
        manifest = self.manifest
        shards = [
            read_shard(self.path / shard["file"], manifest["metrics"], self.ladder, shard["rows"])[0]
            for shard in manifest["shards"]
        ]
        return {name: np.concatenate([shard[name] for shard in shards]) for name in manifest["metrics"]}

    @functools.cached_property
    def rewards(self) -> np.ndarray:
        """[M, A] float32, see `rewards_of`."""
        return rewards_of(self.values, self.ladder, Reward(**self.manifest["reward"]))

    def names(self) -> list[str]:
        """A name of each clip, which with their order determines the order of training."""
        return [f"{row['source']} {row['start']}" for row in self.manifest["rows"]]

    def train_batches(self, **options) -> Batches:
        """Endless batches {"video", "label", "row"}, see `window_batches`; `row` is the row of `rewards`."""
        return window_batches(self.source, self.clip, self._windows, **options)

    def eval_batches(self, max_clips: int = 0, **options) -> tuple[np.ndarray, Batches]:
        """At most `max_clips` clips (0: all), spread evenly: their rows, and batches of them, see `eval_batches`."""
        rows = np.arange(len(self))
        if 0 < max_clips < len(rows):
            rows = rows[np.arange(max_clips) * len(rows) // max_clips]
        return rows, eval_batches(self.source, self.clip, windows=[self._windows[row] for row in rows], **options)
