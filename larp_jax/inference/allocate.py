"""The quality of clips under every assignment, and the best assignments: what a router learns from.

`larp_jax.data.rewards` defines the format of the output.
"""

import logging
import os
from typing import Any

import jax
import numpy as np

from larp_jax import data, files
from larp_jax.api import LoadedTokenizer
from larp_jax.budgets import QualityTree
from larp_jax.config import MeshConfig
from larp_jax.data import rewards
from larp_jax.data.codes import SETTINGS
from larp_jax.data.pipeline import choose_windows
from larp_jax.data.rewards import Reward
from larp_jax.errors import InputError
from larp_jax.inference.batches import BatchFolder
from larp_jax.models.lpips import SMALLEST
from larp_jax.runtime import sharding
from larp_jax.runtime.progress import Progress
from larp_jax.weights import networks

logger = logging.getLogger(__name__)

SHARD_CLIPS = 64  # what an interrupted call may lose


def allocate(
    tokenizer: LoadedTokenizer,
    spec: str,
    output: str | os.PathLike,
    *,
    metric: str | None = None,
    quality_weight: float = Reward.quality_weight,
    length_weight: float = Reward.length_weight,
    lpips: str | os.PathLike | None = None,
    max_clips: int = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Writes how well a tokenizer reconstructs clips with every assignment, and which are best.

    An interrupted call continues; each host computes its share of the shards. If all shards are there, only the best
    assignments are found again, for example with other weights.

    Args:
      tokenizer: a tokenizer with a ladder, on the devices of this host.
      spec: data set; its consecutive windows of the split `train` by default.
      output: folder to write to, created if missing.
      metric: the quality: `lpips`, `psnr`, `mse` or `rmse`; by default LPIPS if its weights are found.
      quality_weight: how much quality counts.
      length_weight: how much each code costs.
      lpips: weights for LPIPS; by default where `larp-jax doctor` looks.
      max_clips: at most this many clips, spread evenly over the data set; 0 for all.
      batch_size: clips at a time on this host.

    Returns:
      The manifest, as described in `larp_jax.data.rewards`.

    Raises:
      InputError: the tokenizer has no ladder, no clip can be read, or the folder contains something else.
    """
    config = tokenizer.config
    if config.adaptive is None:
        raise InputError("this tokenizer gives every clip the same number of codes; give one trained with model.ladder")
    if quality_weight < 0 or length_weight < 0:
        raise InputError(f"--quality-weight {quality_weight:g} and --length-weight {length_weight:g}: negative weights")
    output = files.check_folder(output)
    reward, metrics = _measured(metric, config.resolution, lpips, output)
    reward = Reward(metric=reward, quality_weight=quality_weight, length_weight=length_weight)
    clip = data.ClipSpec.of(config.clip_shape, flip=False, fps=tokenizer.fps, stride=tokenizer.stride)
    source = data.open_source(spec, clip)
    windows = choose_windows(source, clip, max_clips)
    described = {
        "fingerprint": tokenizer.fingerprint,
        "step": tokenizer.step,
        "N": config.num_tokens,
        "blocks": config.blocks,
        "ladder": list(config.ladder),
        "clip": list(config.clip_shape),
        "data": spec,
        "sampling": clip.sampling,
        "metrics": metrics,
    }
    settings = {"command": "allocate", "decoder": tokenizer.decoder_fingerprint, **described}
    settings |= {"max_clips": max_clips, "windows": len(windows)}
    count = -(-len(windows) // SHARD_CLIPS)
    network = networks.load_lpips(lpips) if "lpips" in metrics else None
    with BatchFolder(output, settings, count, content="rewards") as run:
        measure = _Measure(tokenizer, network, source, clip, batch_size)
        with Progress(len(windows), description="allocate", unit="clip") as progress:
            for number in run.mine:
                numbers = np.arange(len(windows))[number * SHARD_CLIPS :][:SHARD_CLIPS]
                path = run.path / rewards.shard_name(number, count)
                if not _is_whole(path, metrics, config.adaptive):
                    values, read = measure([windows[i] for i in numbers])
                    rewards.write_shard(path, values, numbers[read])
                progress.update(len(numbers))
        manifest = {}
        if run.is_last():
            manifest = rewards.new_manifest(**_contents(run.path, count, described, reward, source, windows))
            rewards.write_manifest(run.path, manifest)
    return manifest


def _measured(metric: str | None, resolution: int, lpips, output) -> tuple[str, list[str]]:
    """The metric of rewards, and the metrics to measure: those of an earlier call if they contain it."""
    if metric not in (None, *rewards.SIGNS):
        raise InputError(f"--metric {metric} is not known; choose from {', '.join(rewards.SIGNS)}")
    if metric == "lpips" and resolution < SMALLEST:
        raise InputError(f"--metric lpips needs frames of at least {SMALLEST}x{SMALLEST}; choose psnr")
    if metric is None:
        found = networks.locate("lpips", lpips)[0].is_file() and resolution >= SMALLEST
        metric = "lpips" if found else "psnr"
        logger.info("the quality is %s%s", metric, "" if found else ", because there are no weights of LPIPS")
    metrics = ["psnr", "lpips"] if metric == "lpips" else ["psnr"]
    known = files.json_object(output / SETTINGS).get("metrics")
    return metric, known if isinstance(known, list) and rewards.measured(metric) in known else metrics


class _Measure:
    """Measures windows of a data set: values by metric, and which windows could be read."""

    def __init__(self, tokenizer: LoadedTokenizer, network, source: data.Source, clip: data.ClipSpec, batch_size: int):
        self._mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._source, self._clip = source, clip
        lpips = None if network is None else jax.device_put(network, sharding.replicated(self._mesh))
        self._params = jax.device_put(tokenizer.params, sharding.replicated(self._mesh))
        self._tree = QualityTree(tokenizer.config, tokenizer.module, lpips)

    def __call__(self, windows: list[tuple[int, int]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        found = []
        with data.eval_batches(self._source, self._clip, batch_size=self._batch_size, windows=windows) as batches:
            for batch in batches:
                video = jax.device_put(batch["video"], sharding.batch_sharding(self._mesh))
                found.append(self._tree.measure(self._params, video) | {"mask": batch["mask"]})
        values = {name: np.concatenate([x[name] for x in found])[: len(windows)] for name in found[0]}
        read = values.pop("mask") > 0
        return {name: x[read] for name, x in values.items()}, read


def _is_whole(path, metrics: list[str], ladder) -> bool:
    """Whether an earlier call wrote this shard."""
    if not path.exists():
        return False
    try:
        rewards.read_shard(path, metrics, ladder)
    except InputError as error:
        logger.warning("%s; computing it again", str(error).partition(";")[0])
        return False
    return True


def _contents(
    folder, count: int, described: dict[str, Any], reward: Reward, source: data.Source, windows: list[tuple[int, int]]
) -> dict[str, Any]:
    """What the manifest of a folder says whose shards are complete."""
    ladder = rewards.ladder_of(described)
    names = [rewards.shard_name(number, count) for number in range(count)]
    shards = [rewards.read_shard(folder / name, described["metrics"], ladder) for name in names]
    values = {name: np.concatenate([shard[name] for shard, _ in shards]) for name in described["metrics"]}
    read = np.concatenate([numbers for _, numbers in shards])
    if not len(read):
        raise InputError(f"{described['data']}: nothing in it can be read")
    found = rewards.rewards_of(values, ladder, reward)
    rows = []
    for i, best in zip(read.tolist(), found.argmax(axis=1).tolist(), strict=True):
        video, start = windows[i]
        row = {"video": video, "source": source.name(video), "start": start, "label": source.label(video)}
        rows.append(row | {"lengths": list(ladder.assignments[best]), "reward": float(found[len(rows), best])})
    return described | {
        "reward": vars(reward),
        "statistics": rewards.statistics(values, found, ladder),
        "shards": [
            {"file": name, "rows": len(numbers)} for name, (_, numbers) in zip(names, shards, strict=True)
        ],
        "rows": rows,
    }
