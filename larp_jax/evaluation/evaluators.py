"""Evaluation, constructed once and run as often as wanted. Of tokenizers, metrics are small classes that join one pass
over the clips.
"""

import contextlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from larp_jax import metrics
from larp_jax.config import TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.evaluation import fvd
from larp_jax.evaluation.frechet import FeatureStatistics
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.models.next_code import NextCode, next_code
from larp_jax.models.pixels import as_float_video, to_uint8
from larp_jax.models.prior import Prior
from larp_jax.models.quantizer import Quantized
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import sharding
from larp_jax.runtime.progress import Progress

METRICS = ("psnr", "ssim", "lpips", "rfvd", "usage", "prior")
GENERATOR_METRICS = ("fvd", "cross_entropy")
EXAMPLES = 8


class Reconstructed(NamedTuple):
    """A batch as metrics see it, inside the jitted pass.

    Attributes:
      video: [B, T, H, W, C] float32 in [0, 1].
      reconstruction: the same, clamped to [0, 1].
      quantized: what the quantiser gave, with deterministic codes.
      tokenizer: the module.
      params: of all modules by name, the tokenizer's among them.
    """

    video: jax.Array
    reconstruction: jax.Array
    quantized: Quantized
    tokenizer: Tokenizer
    params: dict


class Metric(Protocol):
    """What is computed of each batch on the mesh, and summed on the host; padding is left out only there.

    Attributes:
      weights: a pytree of arrays that `values` needs, handed to the jitted pass as an argument.
    """

    weights: Any

    def values(self, weights: Any, batch: Reconstructed) -> Any:
        """A pytree of arrays with one row a clip; traced."""

    def add(self, total: Any, values: Any, mask: np.ndarray) -> Any:
        """The total (None at first) with a batch added to it; mask [B] is 1 for real clips."""

    def scalars(self, total: Any) -> dict[str, float]:
        """Results by name."""


class Average:
    """A metric that is the mean over clips of each of its values, which have names."""

    weights: Any = None

    def add(self, total, values, mask):
        """See `Metric`."""
        total = total or dict.fromkeys(values, metrics.Mean.empty())
        return {name: total[name].merge(metrics.Mean.of(np.asarray(value), mask)) for name, value in values.items()}

    def scalars(self, total):
        """See `Metric`."""
        return {name: mean.compute() for name, mean in total.items()}


class Psnr(Average):
    """`psnr`, and `psnr_mean_clip` of always giving the mean clip [T, H, W, C] in [0, 1] if there is one."""

    def __init__(self, mean_clip: np.ndarray | None = None):
        self.weights = mean_clip

    def values(self, weights, batch):
        """See `Metric`."""
        values = {"psnr": metrics.psnr(batch.video, batch.reconstruction)}
        if weights is not None:
            values["psnr_mean_clip"] = metrics.psnr(batch.video, jnp.broadcast_to(weights, batch.video.shape))
        return values


class Ssim(Average):
    """`ssim`."""

    def values(self, weights, batch):
        """See `Metric`."""
        return {"ssim": metrics.ssim(batch.video, batch.reconstruction)}


class LpipsDistance(Average):
    """`lpips`: mean over the frames of a clip; one clip at a time on each device.

    Args:
      lpips: `larp_jax.models.lpips.Lpips` with its trained weights.
      mesh: of the pass.
    """

    def __init__(self, lpips, mesh: Mesh):
        self.weights = sharding.replicate(lpips, mesh)
        self._distance = sharding.clip_by_clip(lambda lpips, x, y: lpips.distance(x, y).mean(), mesh)

    def values(self, weights, batch):
        """See `Metric`."""
        with jax.default_matmul_precision("float32"):
            return {"lpips": self._distance(weights, batch.video, batch.reconstruction)}


class ReconstructionFvd:
    """`rfvd`: Frechet video distance of the reconstructions from the real clips.

    Args:
      features: to compare.
      real: statistics of the same clips, from `larp_jax.evaluation.fvd.real_statistics`.
      covariance: of `larp_jax.evaluation.frechet.COVARIANCES`.
      mesh: of the pass.
    """

    def __init__(self, features: fvd.VideoFeatures, real: FeatureStatistics, covariance: str, mesh: Mesh):
        self.weights = sharding.replicate(features.i3d, mesh)
        self._features, self._real, self._covariance, self._mesh = features, real, covariance, mesh

    def values(self, weights, batch):
        """See `Metric`."""
        return self._features.of(weights, batch.reconstruction, self._mesh)

    def add(self, total, values, mask):
        """See `Metric`."""
        statistics = FeatureStatistics.of(np.asarray(values), mask)
        return total.merge(statistics) if total else statistics

    def scalars(self, total):
        """See `Metric`."""
        if total.count != self._real.count:
            raise InputError(
                f"{total.count} clips could be read for their reconstructions and {self._real.count} for the statistics"
                " of the real ones; run it again when the data does not change"
            )
        return {"rfvd": fvd.distance(self._real, total, covariance=self._covariance)}


class Usage:
    """`usage`, `perplexity`, `kl_from_uniform` and `position_entropy` of the codes."""

    weights: Any = None

    def __init__(self, codebook_size: int):
        self._size = codebook_size

    def values(self, weights, batch):
        """See `Metric`."""
        return batch.quantized.indices

    def add(self, total, values, mask):
        """See `Metric`."""
        statistics = metrics.CodeStatistics.of(np.asarray(values), self._size, mask)
        return total.merge(statistics) if total else statistics

    def scalars(self, total):
        """See `Metric`."""
        return total.compute()


class PriorScore(Average):
    """`prior_cross_entropy`, `prior_top1` and `prior_top5`: how well the prior predicts the codes 1 .. N-1.

    One round on the latents themselves, without dropout (METHOD 2), in float32. Reads `params["prior"]`.
    """

    def __init__(self, recipe: TokenizerRecipe):
        model = recipe.model
        make = lambda: Prior(recipe.prior, model.num_tokens, model.quantizer.code_dim, rngs=nnx.Rngs(0))  # noqa: E731
        self._graphdef, self._temperature = nnx.graphdef(nnx.eval_shape(make)), recipe.prior.temperature

    def values(self, weights, batch):
        """See `Metric`."""
        return {name: value.mean(axis=1) for name, value in self.by_position(batch).items()}

    def by_position(self, batch: Reconstructed) -> dict[str, jax.Array]:
        """The same of each code 1 .. N-1: [B, N-1] by name."""
        prior = nnx.merge(self._graphdef, batch.params["prior"])
        scored = next_code(
            prior(batch.quantized.z_q[:, :-1]),
            batch.quantized.indices[:, 1:],
            batch.tokenizer.quantizer.codebook,
            temperature=self._temperature,
        )
        values = {"prior_cross_entropy": scored.cross_entropy}
        return values | {f"prior_top{n}": (scored.rank < n).astype(jnp.float32) for n in (1, 5)}


def available(recipe: TokenizerRecipe, modules: Container[str]) -> tuple[str, ...]:
    """Names, of `METRICS`, of those that fit a tokenizer.

    Args:
      recipe: of its run.
      modules: names of those that there are parameters of.
    """
    unfit = set()
    if recipe.model.resolution < metrics.SSIM_WINDOW:
        unfit.add("ssim")
    if not recipe.model.quantizer.has_codes:
        unfit |= {"usage", "prior"}
    if "prior" not in modules or recipe.model.num_tokens < 2:
        unfit.add("prior")
    return tuple(name for name in METRICS if name not in unfit)


def own_metrics(names: Sequence[str], recipe: TokenizerRecipe, *, mean_clip: np.ndarray | None = None) -> list[Metric]:
    """The metrics of these names that need no other network."""
    make = {
        "psnr": lambda: Psnr(mean_clip),
        "ssim": Ssim,
        "usage": lambda: Usage(recipe.model.quantizer.codebook_size),
        "prior": lambda: PriorScore(recipe),
    }
    return [make[name]() for name in names if name in make]


class ReconstructionEvaluator:
    """How well a tokenizer reconstructs clips, with deterministic codes: one pass that all metrics join.

    Sums over clips, with padding masked, so a padded last batch and any number of hosts give the same numbers.

    Args:
      module: `module(params)` gives the tokenizer.
      clips: to reconstruct.
      mesh: where to compute.
      metrics: to compute.
      batch_size: clips at a time, over all processes.
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
        progress: bool = False,
    ):
        self._clips, self._mesh, self._metrics = clips, mesh, tuple(metrics)
        self._batch_size, self._progress = batch_size, progress
        replicated = sharding.replicated(mesh)

        def evaluate(params, weights, video):
            video = as_float_video(video)
            tokenizer = module(params)
            reconstruction, quantized = tokenizer(video)
            reconstruction = jnp.clip(reconstruction, 0.0, 1.0)
            batch = Reconstructed(video, reconstruction, quantized, tokenizer, params)
            values = [metric.values(w, batch) for metric, w in zip(self._metrics, weights, strict=True)]
            return values, reconstruction

        # every process gets the values of all clips, and so the same sums
        self._evaluate = jax.jit(evaluate, out_shardings=(replicated, sharding.batch_sharding(mesh)))
        self._gather = jax.jit(lambda mask: mask, out_shardings=replicated)

    def run(self, params: dict) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates.

        Args:
          params: by module name (`tokenizer`, `prior`, ...), on the mesh.

        Returns:
          Scalars by name, and what goes with them: `clips` (count), `codes` (`CodeStatistics`, None without `Usage`),
          `examples` (uint8 pairs [clips, 2, T, H, W, C] of the first clips of this process: original, reconstruction).

        Raises:
          InputError: a metric does not take such clips, or features are NaN or infinite.
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
        scalars, codes = {}, None
        if clips:
            for metric, total in zip(self._metrics, totals, strict=True):
                scalars |= metric.scalars(total)
                codes = total if isinstance(metric, Usage) else codes
        return scalars, {"clips": clips, "codes": codes, "examples": np.asarray(examples[:EXAMPLES])}


def encoded_clips(
    codes: Callable[[dict, dict], dict],
    frozen: dict,
    clips: ClipSet,
    mesh: Mesh,
    *,
    batch_size: int,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """What `NextCodeEvaluator` takes of clips: rows of those that can be read, the same on every process.

    Args:
      codes: `codes(batch, frozen)` gives a batch with codes in place of its `video`.
      frozen: parameters for it, on the mesh.
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
    if not len(rows["codes"]):
        raise InputError("none of the clips to evaluate could be read; the log says why")
    return rows


class NextCodeEvaluator:
    """How well a generator predicts the codes of clips, each from those before it, without dropout.

    Args:
      score: `score(params, batch)` gives `larp_jax.NextCode` of a batch of rows.
      rows: arrays [M, ...] by name, the same on every process.
      mesh: where to compute.
      batch_size: rows at a time, over all processes.
    """

    def __init__(
        self,
        score: Callable[[dict, dict], NextCode],
        rows: Mapping[str, np.ndarray],
        mesh: Mesh,
        *,
        batch_size: int,
    ):
        self._rows, self._mesh, self._batch_size = rows, mesh, batch_size

        def evaluate(params, batch):
            scored = score(params, batch)
            values = {"cross_entropy": scored.cross_entropy}
            values |= {f"top{n}": (scored.rank < n).astype(jnp.float32) for n in (1, 5)}
            return {name: value.mean(axis=1) for name, value in values.items()}

        self._evaluate = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))

    def run(self, params: dict) -> dict[str, float]:
        """`cross_entropy` (nats a code), `top1` and `top5`: means over all codes of all rows.

        Args:
          params: by module name, on the mesh.
        """
        total, average = None, Average()
        count = len(self._rows["codes"])
        local = self._batch_size // jax.process_count()
        for start in range(0, count, self._batch_size):
            numbers = np.arange(start, start + self._batch_size)
            mine = np.minimum(numbers, count - 1)[jax.process_index() * local :][:local]
            batch = sharding.to_mesh({name: x[mine] for name, x in self._rows.items()}, self._mesh)
            total = average.add(total, self._evaluate(params, batch), numbers < count)
        return {name: mean.compute() for name, mean in total.items()}


def _local_shards(array: jax.Array) -> list:
    """This process's pieces along the batch, each once (axes of the mesh may repeat them)."""
    pieces = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return [pieces[start] for start in sorted(pieces)]
