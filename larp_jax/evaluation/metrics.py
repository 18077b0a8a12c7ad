"""Metrics of reconstructions. Each is one class and one entry of `METRICS`, at the end."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from larp_jax import metrics
from larp_jax.config import TokenizerConfig, TokenizerRecipe
from larp_jax.data.latents import LatentStatistics
from larp_jax.errors import InputError
from larp_jax.evaluation import fvd
from larp_jax.evaluation.description import Description, Panel
from larp_jax.evaluation.frechet import FeatureStatistics
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.models.next_code import next_code
from larp_jax.models.packing import by_place, layout, mean_of_clips
from larp_jax.models.prior import Prior
from larp_jax.models.quantizer import Quantized
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import sharding

ACTIVE_STD = 0.1  # variance 0.01: Burda et al. 2016, arXiv 1509.00519


class Reconstructed(NamedTuple):
    """A batch as metrics see it, inside the jitted pass.

    Attributes:
      video: [B, T, H, W, C] float32 in [0, 1].
      reconstruction: the same shape, clamped to [0, 1].
      quantized: output of the quantizer, with deterministic codes.
      tokenizer: the module.
      params: parameters of all modules by name, including the tokenizer.
    """

    video: jax.Array
    reconstruction: jax.Array
    quantized: Quantized
    tokenizer: Tokenizer
    params: dict


@dataclasses.dataclass(frozen=True)
class Need:
    """A condition that a metric places on a checkpoint.

    Attributes:
      text: what it needs, for messages.
      met: `met(recipe, modules)`: whether a recipe with parameters of these modules meets it.
    """

    text: str
    met: Callable[[TokenizerRecipe, Container[str]], bool]


CODES = Need("codes", lambda recipe, modules: recipe.model.quantizer.has_codes)
LATENTS = Need("latents", lambda recipe, modules: not recipe.model.quantizer.has_codes)
TRAINED_PRIOR = Need("a trained prior", lambda recipe, modules: "prior" in modules and recipe.model.num_tokens > 1)
LADDER = Need("a ladder", lambda recipe, modules: recipe.model.adaptive is not None)
SSIM_FRAMES = Need(
    f"frames of at least {metrics.SSIM_WINDOW}x{metrics.SSIM_WINDOW}",
    lambda recipe, modules: recipe.model.resolution >= metrics.SSIM_WINDOW,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The arguments of `Metric.create`. Metrics without a network need only the recipe.

    Attributes:
      recipe: recipe of the tokenizer.
      mean_clip: mean training clip [T, H, W, C] in [0, 1]; None if unknown.
      network: the trained network of the metric, from `larp_jax.weights.networks`.
      identity: identifies the files of the network, as `larp_jax.weights.networks.identify` does.
      clips: the clips to evaluate.
      mesh: where to compute.
      batch_size: clips at a time, over all processes.
      progress: whether to show a bar.
    """

    recipe: TokenizerRecipe
    mean_clip: np.ndarray | None = None
    network: Any = None
    identity: Mapping[str, Any] | None = None
    clips: ClipSet | None = None
    mesh: Mesh | None = None
    batch_size: int = 1
    progress: bool = False


class Metric(Description):
    """A metric: computes values for each batch on the mesh and adds them up on the host, without padding.

    Attributes:
      needs: conditions on the checkpoint.
      weights: a pytree of arrays that `values` needs, passed to the jitted pass as an argument.
    """

    needs: ClassVar[tuple[Need, ...]] = ()
    weights: Any = None

    @classmethod
    def create(cls, setting: Setting) -> Self:
        """The metric for an evaluation."""
        return cls()

    @classmethod
    def fits(cls, recipe: TokenizerRecipe, modules: Container[str]) -> bool:
        """Whether a tokenizer with parameters of these modules meets all needs."""
        return all(need.met(recipe, modules) for need in cls.needs)

    def describe(self) -> dict[str, Any]:
        """What to record with the scores, ready for JSON."""
        return {}

    def values(self, weights: Any, batch: Reconstructed) -> Any:
        """A pytree of arrays with one row per clip; traced."""
        raise NotImplementedError

    def add(self, total: Any, values: Any, mask: np.ndarray) -> Any:
        """The total (None at first) plus the values of a batch; mask [B] is 1 for real clips and 0 for padding."""
        raise NotImplementedError

    def scalars(self, total: Any) -> dict[str, float]:
        """Results by name."""
        raise NotImplementedError


class Average(Metric):
    """A metric whose `values` are named; each scalar is a mean over clips."""

    def add(self, total, values, mask):
        total = total or dict.fromkeys(values, metrics.Mean.empty())
        return {name: total[name].merge(metrics.Mean.of(np.asarray(value), mask)) for name, value in values.items()}

    def scalars(self, total):
        return {name: mean.compute() for name, mean in total.items()}


class Psnr(Average):
    """PSNR, and the PSNR of always returning the mean clip [T, H, W, C] in [0, 1] if it is given."""

    name = "psnr"
    definitions: ClassVar = {
        "psnr": "dB, over all pixels of a clip together, in [0, 1], output clamped; mean over clips",
        "psnr_mean_clip": "the same for the mean of training clips instead of a reconstruction: the output of a"
        " tokenizer whose codes carry no information",
    }
    panels = (Panel("PSNR", "dB", {"psnr": "evaluation", "psnr_mean_clip": "mean clip"}),)

    def __init__(self, mean_clip: np.ndarray | None = None):
        self.weights = mean_clip

    @classmethod
    def create(cls, setting):
        return cls(setting.mean_clip)

    def values(self, weights, batch):
        values = {"psnr": metrics.psnr(batch.video, batch.reconstruction)}
        if weights is not None:
            values["psnr_mean_clip"] = metrics.psnr(batch.video, jnp.broadcast_to(weights, batch.video.shape))
        return values


class Ssim(Average):
    """Structural similarity."""

    name = "ssim"
    definitions: ClassVar = {
        "ssim": "Gaussian window of width 11 with sigma 1.5, inside the frame only; mean over positions, colors, frames"
        " and then clips"
    }
    needs = (SSIM_FRAMES,)
    panels = (Panel("SSIM", "", {"ssim": "evaluation"}),)

    def values(self, weights, batch):
        return {"ssim": metrics.ssim(batch.video, batch.reconstruction)}


class LpipsDistance(Average):
    """LPIPS, mean over the frames of a clip; one clip at a time on each device.

    Args:
      lpips: `larp_jax.models.lpips.Lpips` with its trained weights.
      mesh: where to compute.
      identity: identifies the weights, as `larp_jax.weights.networks.identify` does.
    """

    name = "lpips"
    definitions: ClassVar = {
        "lpips": "LPIPS v0.1 on VGG16, frame by frame, output clamped and not rounded; mean over frames and then clips"
    }
    network = "lpips"

    def __init__(self, lpips, mesh: Mesh, identity: Mapping[str, Any] | None = None):
        self.weights, self._identity = sharding.replicate(lpips, mesh), identity or {}
        self._distance = sharding.clip_by_clip(lambda lpips, x, y: lpips.distance(x, y).mean(), mesh)

    @classmethod
    def create(cls, setting):
        return cls(setting.network, setting.mesh, setting.identity)

    def describe(self):
        return {"lpips": {"backbone": "VGG16, heads v0.1", **self._identity}}

    def values(self, weights, batch):
        with jax.default_matmul_precision("float32"):
            return {"lpips": self._distance(weights, batch.video, batch.reconstruction)}


class ReconstructionFvd(Metric):
    """Frechet video distance between the reconstructions and the real clips.

    Args:
      features: computes the features.
      real: statistics of the same clips, from `larp_jax.evaluation.fvd.real_statistics`.
      covariance: one of `larp_jax.evaluation.frechet.COVARIANCES`.
      mesh: where to compute.
    """

    name = "rfvd"
    definitions: ClassVar = {
        "rfvd": "Frechet distance between I3D's logits of the clips and of their reconstructions, clamped and not"
        " rounded; frames resized to 224 (bilinear, not antialiased)"
    }
    network = "i3d"

    def __init__(self, features: fvd.VideoFeatures, real: FeatureStatistics, covariance: str, mesh: Mesh):
        self.weights = sharding.replicate(features.i3d, mesh)
        self._features, self._real, self._covariance, self._mesh = features, real, covariance, mesh

    @classmethod
    def create(cls, setting):
        features = fvd.VideoFeatures(setting.network, setting.identity)
        real = fvd.real_statistics(
            features, setting.clips, batch_size=setting.batch_size, progress=setting.progress
        )
        return cls(features, real, setting.clips.protocol.covariance, setting.mesh)

    def describe(self):
        return {**self._features.describe(), "covariance": self._covariance}

    def values(self, weights, batch):
        return self._features.of(weights, batch.reconstruction, self._mesh)

    def add(self, total, values, mask):
        statistics = FeatureStatistics.of(np.asarray(values), mask)
        return total.merge(statistics) if total else statistics

    def scalars(self, total):
        if total.count != self._real.count:
            raise InputError(
                f"{total.count} clips could be read for their reconstructions and {self._real.count} for the statistics"
                " of the real ones; run it again without changing the data meanwhile"
            )
        return {"rfvd": fvd.distance(self._real, total, covariance=self._covariance)}


class Usage(Metric):
    """How evenly the codes are used: over the whole codebook and at each token position."""

    name = "usage"
    definitions: ClassVar = {
        "usage": "share of the codebook that occurs in these clips",
        "perplexity": "exponential of the entropy of the code frequencies",
        "kl_from_uniform": "nats, KL divergence of the code frequencies from the uniform distribution",
        "position_entropy": "nats, entropy of the code frequencies at a token position, mean over positions",
    }
    needs = (CODES,)
    panels = (
        Panel("Codes in use", "share", {"usage": "evaluation"}),
        Panel("Perplexity of the codes", "codes", {"perplexity": "evaluation"}),
        Panel("KL of the codes from uniform", "nats", {"kl_from_uniform": "evaluation"}),
        Panel("Entropy of the codes at a position", "nats", {"position_entropy": "evaluation"}),
    )

    def __init__(self, codebook_size: int, most: int = 0):
        self._size, self._most = codebook_size, most

    @classmethod
    def create(cls, setting):
        model = setting.recipe.model
        return cls(model.quantizer.codebook_size, model.query_rows)

    def values(self, weights, batch):
        return batch.quantized.indices, batch.quantized.lengths

    def add(self, total, values, mask):
        codes, lengths = values
        if lengths is not None:  # a position is a place in a block
            codes = by_place(np.asarray(codes), np.asarray(lengths), self._most)
        statistics = metrics.CodeStatistics.of(np.asarray(codes), self._size, mask)
        return total.merge(statistics) if total else statistics

    def scalars(self, total):
        return total.compute()


class LatentUse(Metric):
    """How much continuous latents carry: their divergence from noise, and how many of their channels vary."""

    name = "latents"
    definitions: ClassVar = {
        "kl": "nats, KL divergence of the Gaussians of a clip from the standard normal distribution, sum over tokens"
        " and channels, mean over clips",
        "active": "share of the channels of all tokens whose mean varies over these clips, by a standard deviation"
        " above 0.1 (active units, Burda et al. 2016); not with a ladder",
    }
    needs = (LATENTS,)
    panels = (
        Panel("KL of the latents", "nats", {"kl": "evaluation"}),
        Panel("Active channels of the latents", "share", {"active": "evaluation"}),
    )

    def __init__(self, config: TokenizerConfig):
        self._shape, self._fixed = config.token_shape, config.adaptive is None

    @classmethod
    def create(cls, setting):
        return cls(setting.recipe.model)

    def values(self, weights, batch):
        return batch.quantized.z, batch.quantized.kl

    def add(self, total, values, mask):
        total = total or (LatentStatistics(*self._shape), LatentStatistics(self._shape[0]))
        for statistics, value in zip(total, values, strict=True):
            statistics.add(np.asarray(value)[mask > 0])
        return total

    def scalars(self, total):
        latents, kl = total
        active = {"active": float((latents.std > ACTIVE_STD).mean())}
        return {"kl": float(kl.mean.sum())} | (active if self._fixed else {})  # with a ladder, places mix tokens


class CodesUsed(Average):
    """The number of codes, of tokenizers with a ladder."""

    name = "codes"
    definitions: ClassVar = {"codes": "number of codes of a clip, mean over clips"}
    needs = (LADDER,)

    def values(self, weights, batch):
        return {"codes": batch.quantized.lengths.sum(axis=1).astype(jnp.float32)}


class PriorScore(Average):
    """How well the prior (LARP, arXiv 2410.21264, section 3.3) predicts the codes 1 .. N-1.

    One round on the latents themselves, without dropout, in float32. Reads `params["prior"]`.
    """

    name = "prior"
    definitions: ClassVar = {
        "prior_cross_entropy": "nats per code, of codes 1 .. N-1 under the prior that was trained with the tokenizer,"
        " given the latents before (one round, no dropout)",
        "prior_top1": "share of codes 1 .. N-1 that this prior ranks first",
        "prior_top5": "share of codes 1 .. N-1 that this prior ranks among the first five",
    }
    needs = (CODES, TRAINED_PRIOR)
    panels = (
        Panel("Prior: cross-entropy", "nats", {"prior_cross_entropy": "evaluation"}),
        Panel(
            "Prior: accuracy", "share", {"prior_top1": "top 1, evaluation", "prior_top5": "top 5, evaluation"}
        ),
    )

    def __init__(self, recipe: TokenizerRecipe):
        model = recipe.model
        sizes = model.query_rows, model.quantizer.code_dim
        make = lambda: Prior(recipe.prior, *sizes, blocks=model.blocks, rngs=nnx.Rngs(0))  # noqa: E731
        self._graphdef, self._temperature = nnx.graphdef(nnx.eval_shape(make)), recipe.prior.temperature

    @classmethod
    def create(cls, setting):
        return cls(setting.recipe)

    def values(self, weights, batch):
        valid = None if batch.quantized.valid is None else batch.quantized.valid[:, 1:]
        return {name: mean_of_clips(value, valid) for name, value in self.by_position(batch).items()}

    def by_position(self, batch: Reconstructed) -> dict[str, jax.Array]:
        """The scores of each code 1 .. N-1: [B, N-1] by name."""
        prior, quantized = nnx.merge(self._graphdef, batch.params["prior"]), batch.quantized
        known = None
        if quantized.lengths is not None:
            known = layout(quantized.lengths, quantized.z.shape[1])[:, :-1]
        scored = next_code(
            prior(quantized.z_q[:, :-1], layout=known),
            quantized.indices[:, 1:],
            batch.tokenizer.quantizer.codebook,
            temperature=self._temperature,
        )
        values = {"prior_cross_entropy": scored.cross_entropy}
        return values | {f"prior_top{n}": (scored.rank < n).astype(jnp.float32) for n in (1, 5)}


METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Psnr,
        Ssim,
        LpipsDistance,
        ReconstructionFvd,
        Usage,
        LatentUse,
        CodesUsed,
        PriorScore,
    )
}
