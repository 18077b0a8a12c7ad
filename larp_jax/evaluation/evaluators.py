"""Passes over clips: metrics of reconstructions, encoding, and scores of a generator.

Evaluators are constructed once and run any number of times.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from larp_jax import metrics
from larp_jax.errors import InputError
from larp_jax.evaluation.description import Description, Panel
from larp_jax.evaluation.metrics import LatentUse, Metric, Reconstructed, Usage
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.models.pixels import as_float_video, to_uint8
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import sharding
from larp_jax.runtime.progress import Progress

EXAMPLES = 8


class ReconstructionEvaluator:
    """How well a tokenizer reconstructs clips, with deterministic codes. All metrics share one pass.

    Metrics are sums over clips, without padding, so the results do not depend on the batch size or the number of hosts.

    Args:
      module: `module(params)` returns the tokenizer.
      clips: to reconstruct.
      mesh: where to compute.
      metrics: to compute.
      batch_size: clips at a time, over all processes.
      lengths: `lengths(params, video)` returns how many codes each block of the clips has, [B, blocks] int32, of
        tokenizers with a ladder; the most codes in equal blocks by default.
      progress: whether to show a bar.
    """

    def __init__(
        self,
        module: Callable[[dict], Tokenizer],
        clips: ClipSet,
        mesh: Mesh,
        metrics: Sequence[Metric],
        *,
        batch_size: int,
        lengths: Callable[[dict, jax.Array], jax.Array | None] = lambda params, video: None,
        progress: bool = False,
    ):
        self._clips, self._mesh, self._metrics = clips, mesh, tuple(metrics)
        self._batch_size, self._progress = batch_size, progress
        replicated = sharding.replicated(mesh)

        def evaluate(params, weights, video):
            video = as_float_video(video)
            tokenizer = module(params)
            reconstruction, quantized = tokenizer(video, lengths(params, video))
            reconstruction = jnp.clip(reconstruction, 0.0, 1.0)
            batch = Reconstructed(video, reconstruction, quantized, tokenizer, params)
            values = [metric.values(w, batch) for metric, w in zip(self._metrics, weights, strict=True)]
            return values, reconstruction

        # every process gets the values of all clips, and therefore the same sums
        self._evaluate = jax.jit(evaluate, out_shardings=(replicated, sharding.batch_sharding(mesh)))
        self._gather = jax.jit(lambda mask: mask, out_shardings=replicated)

    def run(self, params: dict) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates.

        Args:
          params: parameters by module name (`tokenizer`, `prior`, ...), on the mesh.

        Returns:
          Scalars by name, and a dict: `clips` (count), `codes` (`CodeStatistics`, None without `Usage`), `latents`
          (`LatentStatistics` of the means [N, d] and of their divergences [N], None without `LatentUse`),
          `examples` (uint8 pairs [clips, 2, T, H, W, C] of the first clips of this process: original, reconstruction).

        Raises:
          InputError: a metric does not accept such clips, or features are NaN or infinite.
        """
        weights = [metric.weights for metric in self._metrics]
        totals = [None] * len(self._metrics)
        clips = 0
        examples = []
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        with self._clips.batches(self._batch_size, **processes) as batches:
            count = -(-len(self._clips) // self._batch_size)
            bar = Progress(count, description="evaluate", unit="batch") if self._progress else None
            for batch in batches:
                on_mesh = sharding.to_mesh({"video": batch["video"], "mask": batch["mask"]}, self._mesh)
                values, reconstruction = self._evaluate(params, weights, on_mesh["video"])
                mask = np.asarray(self._gather(on_mesh["mask"]))
                clips += int(mask.sum())
                totals = [
                    metric.add(total, value, mask)
                    for metric, total, value in zip(self._metrics, totals, values, strict=True)
                ]
                if len(examples) < EXAMPLES:
                    local = np.concatenate([np.asarray(s.data) for s in _local_shards(reconstruction)])
                    real = batch["mask"] > 0
                    examples += list(zip(batch["video"][real], to_uint8(local[real]), strict=True))
                if bar:
                    bar.update()
            if bar:
                bar.close()
        scalars, codes, latents = {}, None, None
        if clips:
            for metric, total in zip(self._metrics, totals, strict=True):
                scalars |= metric.scalars(total)
                codes = total if isinstance(metric, Usage) else codes
                latents = total if isinstance(metric, LatentUse) else latents
        shown = np.asarray(examples[:EXAMPLES])
        return scalars, {"clips": clips, "codes": codes, "latents": latents, "examples": shown}


def encoded_clips(
    codes: Callable[[dict, dict], dict],
    frozen: dict,
    clips: ClipSet,
    mesh: Mesh,
    *,
    batch_size: int,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Rows for a `ScoreEvaluator`: codes or latents of the clips that can be read, the same on every process.

    Args:
      codes: `codes(batch, frozen)` returns a batch with codes or latents in place of its `video`.
      frozen: parameters for `codes`, on the mesh.
      clips: to encode.
      mesh: where to compute.
      batch_size: clips at a time, over all processes.
      progress: whether to show a bar.

    Raises:
      InputError: no clip could be read.
    """
    encode = jax.jit(lambda batch, frozen: codes(batch, frozen), out_shardings=sharding.replicated(mesh))
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    bar = Progress(-(-len(clips) // batch_size), description="encode", unit="batch") if progress else None
    found = []
    with clips.batches(batch_size, **processes) as batches, bar or contextlib.nullcontext():
        for batch in batches:
            batch = {name: batch[name] for name in ("video", "label", "mask")}
            batch = jax.device_get(encode(sharding.to_mesh(batch, mesh), frozen))
            real = batch.pop("mask") > 0
            found.append({name: x[real] for name, x in batch.items()})
            if bar:
                bar.update()
    rows = {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}
    if not len(rows["label"]):
        raise InputError("no clip could be read; see the log for the reasons")
    return rows


class ScoreEvaluator(Description):
    """How well a generator predicts clips: means of sums over rows, without dropout.

    Args:
      sums: `sums(params, batch)` returns sums and weights ([B], [B]) by name of the rows of a batch.
      rows: arrays [M, ...] by name, the same on every process.
      mesh: where to compute.
      batch_size: rows at a time, over all processes.
    """

    def __init__(
        self,
        sums: Callable[[dict, dict], dict[str, tuple[jax.Array, jax.Array]]],
        rows: Mapping[str, np.ndarray],
        mesh: Mesh,
        *,
        batch_size: int,
    ):
        self._rows, self._mesh, self._batch_size = rows, mesh, batch_size
        self._evaluate = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    def run(self, params: dict) -> dict[str, float]:
        """The scalars of `definitions`, as means over all rows.

        Args:
          params: parameters for `sums`, on the mesh.
        """
        means: dict[str, metrics.Mean] = {}
        count = len(self._rows["label"])
        local = self._batch_size // jax.process_count()
        for start in range(0, count, self._batch_size):
            numbers = np.arange(start, start + self._batch_size)
            mine = np.minimum(numbers, count - 1)[jax.process_index() * local :][:local]
            batch = sharding.to_mesh({name: x[mine] for name, x in self._rows.items()}, self._mesh)
            for name, values in self._evaluate(params, batch).items():
                total, weight = (float(np.asarray(x, np.float64)[numbers < count].sum()) for x in values)
                means[name] = means.get(name, metrics.Mean.empty()).merge(metrics.Mean(total, weight))
        return {name: mean.compute() for name, mean in means.items()}


class NextCodeEvaluator(ScoreEvaluator):
    """How well a generator predicts the codes of clips, each from the codes before it.

    The sums are those of `larp_jax.models.generator_codes.score_sums`.
    """

    name = "cross_entropy"
    definitions: ClassVar = {
        "cross_entropy": "nats per code, of the clips' codes (the nearest of each latent) under the generator, given"
        " the condition and the codes before; float32, no dropout",
        "length_cross_entropy": "nats per block, of its number of codes, given what comes before it",
        "top1": "share of these codes that the generator ranks first",
        "top5": "share of these codes that the generator ranks among the first five",
    }
    panels = (
        Panel("Loss", "", {"cross_entropy": "evaluation"}),
        Panel("Accuracy of the next code", "share", {"top1": "top 1, evaluation", "top5": "top 5, evaluation"}),
    )


class FlowEvaluator(ScoreEvaluator):
    """How well a flow generator predicts velocities, under noise and times that are fixed for each clip.

    The sums are those of `larp_jax.models.flow.flow_sums`; the rows are numbered for it.
    """

    name = "flow_loss"
    definitions: ClassVar = {
        "flow_loss": "mean squared error of the velocity from standardized latents to noise, one draw of noise and of a"
        " logit-normal time for each clip, the same in every evaluation; float32, nothing left out",
        "explained": "1 - flow_loss / the mean square of these velocities",
    }
    panels = (
        Panel("Loss", "", {"flow_loss": "evaluation"}),
        Panel("Explained part of the velocity", "share", {"explained": "evaluation"}),
    )

    def __init__(self, sums: Callable, rows: Mapping[str, np.ndarray], mesh: Mesh, *, batch_size: int):
        numbers = np.arange(len(rows["label"]), dtype=np.int32)
        super().__init__(sums, dict(rows) | {"number": numbers}, mesh, batch_size=batch_size)


def _local_shards(array: jax.Array) -> list:
    """The shards of this process along the batch, each once, because some axes of the mesh have copies."""
    pieces = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return [pieces[start] for start in sorted(pieces)]
