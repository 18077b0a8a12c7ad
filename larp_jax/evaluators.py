"""Evaluation: a small class a task, constructed once, `run(params)` as often as wanted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from larp_jax import data, metrics, sharding
from larp_jax.config import TokenizerConfig
from larp_jax.errors import InputError
from larp_jax.steps import as_float_video
from larp_jax.writers import Progress

METRICS = ("psnr", "ssim", "usage")


class ReconstructionEvaluator:
    """How well a tokenizer reconstructs a data set, with deterministic codes.

    Sums over clips, with padding masked, so a padded last batch and any number of hosts give the same numbers.

    Args:
      module: `module(params)` gives the tokenizer.
      config: the tokenizer's.
      spec: the data set.
      mesh: where to compute.
      batch_size: clips at a time, over all processes.
      max_clips: at most so many, spread over the data set; 0 takes all.
      names: of `METRICS`.
      mean_clip: [T, H, W, C] in [0, 1]; adds `psnr_mean_clip`, the score of giving always that.
      progress: whether to show a bar.
    """

    def __init__(
        self,
        module,
        config: TokenizerConfig,
        spec: str,
        mesh: Mesh,
        *,
        batch_size: int,
        max_clips: int = 0,
        names: Sequence[str] = METRICS,
        mean_clip: np.ndarray | None = None,
        progress: bool = False,
    ):
        unknown = sorted(set(names) - set(METRICS))
        if unknown:
            raise InputError(f"--metrics {','.join(unknown)} is not known; choose from {', '.join(METRICS)}")
        if "usage" in names and config.quantizer.kind == "kl":
            names = [name for name in names if name != "usage"]
        self._config, self._spec, self._mesh, self._names = config, spec, mesh, tuple(names)
        self._batch_size, self._max_clips, self._progress = batch_size, max_clips, progress
        self._mean_clip = None if mean_clip is None else jnp.asarray(mean_clip)
        replicated = NamedSharding(mesh, P())

        def evaluate(params, video):
            video = as_float_video(video)
            reconstruction, quantized = module(params)(video)
            reconstruction = jnp.clip(reconstruction, 0.0, 1.0)
            values = {}
            if "psnr" in self._names:
                values["psnr"] = metrics.psnr(video, reconstruction)
                if self._mean_clip is not None:
                    values["psnr_mean_clip"] = metrics.psnr(video, jnp.broadcast_to(self._mean_clip, video.shape))
            if "ssim" in self._names:
                values["ssim"] = metrics.ssim(video, reconstruction)
            return values, quantized.indices, reconstruction

        self._evaluate = jax.jit(evaluate, out_shardings=(replicated, replicated, sharding.batch_sharding(mesh)))

    def run(self, params: dict) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates.

        Args:
          params: of the tokenizer, on the mesh.

        Returns:
          Scalars by name, and what goes with them: `clips` (count), `code_counts` ([K] int64, None without codes),
          `examples` (uint8 pairs [clips, 2, T, H, W, C] of the first clips of this process: original, reconstruction).
        """
        means = {}
        codes = None
        examples = []
        clip = data.ClipSpec(frames=self._config.frames, resolution=self._config.resolution, flip=False)
        with data.eval_batches(
            self._spec,
            clip,
            batch_size=self._batch_size,
            max_clips=self._max_clips,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ) as batches:
            bar = Progress(0, description="evaluate", unit="batch") if self._progress else None
            for batch in batches:
                on_mesh = sharding.to_mesh({"video": batch["video"], "mask": batch["mask"]}, self._mesh)
                values, indices, reconstruction = self._evaluate(params, on_mesh["video"])
                mask = _everywhere(on_mesh["mask"])
                for name, value in values.items():
                    means[name] = means.get(name, metrics.Mean.empty()).merge(metrics.Mean.of(np.asarray(value), mask))
                if "usage" in self._names:
                    size = self._config.quantizer.codebook_size
                    codes = codes or metrics.CodeStatistics.empty(self._config.num_tokens, size)
                    codes = codes.merge(metrics.CodeStatistics.of(np.asarray(indices), size, mask))
                if len(examples) < EXAMPLES:
                    local = np.concatenate([np.asarray(s.data) for s in _local_shards(reconstruction)])
                    real = int(batch["mask"].sum())
                    examples += list(zip(batch["video"][:real], to_uint8(local[:real]), strict=True))
                if bar:
                    bar.update()
            if bar:
                bar.close()
        scalars = {name: float(mean.compute()) for name, mean in means.items()}
        clips = next((int(mean.count) for mean in means.values()), 0)
        if codes is not None:
            statistics = codes.compute()
            scalars |= {name: float(statistics[name]) for name in ("usage", "perplexity", "kl_from_uniform")}
            scalars["position_entropy"] = float(np.mean(statistics["position_entropy"]))
        counts = None if codes is None else np.asarray(codes.counts).sum(axis=0)
        return scalars, {"clips": clips, "code_counts": counts, "examples": np.asarray(examples[:EXAMPLES])}


EXAMPLES = 8


def to_uint8(video: np.ndarray) -> np.ndarray:
    """[0, 1] floats (clamped here) -> uint8."""
    return np.asarray(np.clip(np.asarray(video), 0.0, 1.0) * 255.0 + 0.5, np.uint8)


def _local_shards(array: jax.Array) -> list:
    """This process's pieces along the batch, each once (axes of the mesh may repeat them)."""
    pieces = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return [pieces[start] for start in sorted(pieces)]


def _everywhere(mask: jax.Array) -> np.ndarray:
    """A batch-sharded array as NumPy on every process."""
    return np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(mask.sharding.mesh, P()))(mask))
