"""Measures what each token position encodes, which the LARP paper (arXiv 2410.21264) leaves open.

By construction, holistic tokens are not tied to places in the clip. To find out what a position encodes, its code is
replaced and the clip decoded: where the clip changes (ablation maps over space and time), how much its error to the
original increases, and how good the clip is if only some of the codes are kept. In addition: which codes each position
uses, and how well the prior predicts them. Continuous latents are replaced like codes; how much each position carries
is then the KL divergence of its Gaussian.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax.sharding import Mesh

from larp_jax import files
from larp_jax.api import LoadedTokenizer
from larp_jax.budgets import Assigner
from larp_jax.config import Assignment, MeshConfig
from larp_jax.data import ClipSpec
from larp_jax.data.latents import LatentStatistics
from larp_jax.data.video import write_png
from larp_jax.errors import InputError
from larp_jax.evaluation.evaluators import ReconstructionEvaluator
from larp_jax.evaluation.metrics import PriorScore
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.evaluation.registry import available, default_metrics
from larp_jax.metrics import SMALLEST_MSE, CodeStatistics, codebook_usage, perplexity
from larp_jax.models.packing import repeated
from larp_jax.models.pixels import as_float_video
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng, sharding
from larp_jax.runtime.progress import Progress
from larp_jax.tools import charts
from larp_jax.weights.checkpoint import Checkpoint

FORMAT = "larp_jax.token_analysis"
VERSION = 1
NUMBERS, ARRAYS, MAPS = "analysis.json", "analysis.npz", "maps.png"
FIGURES = "kept", "change", "reach", "entropy", "kl", "prior", "accuracy"
REPLACEMENTS = {
    "other": "the code (or latent) of another of these clips at the same position",
    "common": "the most frequent code (or the mean latent) at the same position",
}
ROWS = 16  # variants of a batch that one call decodes in sequence
KEPT_COUNTS = 16
TILES = 256  # maximum number of ablation maps in the image

DEFINITIONS = {
    "change": "mean squared change (pixels in [0, 1]) of the decoded clip when the position's code is replaced",
    "rise": "increase of the mean squared error to the original clip when the code is replaced",
    "space": "effective share of the frame that changes: exp(entropy over patches) / patches, 1 if all change equally",
    "time": "the same over frames",
    "entropy": "entropy of the codes seen at the position, in nats; at most log(clips)",
    "codes": "number of distinct codes seen at the position",
    "kl": "KL divergence of the position's Gaussian from the standard normal distribution, in nats, mean over clips",
    "spread": "root mean variance of the channels of the position's latent over clips",
    "prior_cross_entropy": "cross-entropy of the position's code under the prior, given the latents before it, in nats",
    "prior_top1": "share of clips whose code the prior ranks first",
    "prior_top5": "share of clips whose code the prior ranks among the first five",
    "kept": "PSNR in dB (per clip, then averaged) if only this number of codes is kept and all others are replaced;"
    " kept are the first codes, the last, random ones, or those whose replacement increases the error most",
}


@rng.pinned()
def analyze(
    found: Checkpoint,
    spec: str,
    output: str | os.PathLike,
    *,
    max_clips: int = 256,
    ablated_clips: int = 16,
    replace: str = "other",
    budget: str | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Analyzes what the token positions encode, and writes numbers and images.

    The folder receives `analysis.json` (the returned dictionary), `analysis.npz` (`patches` [N, t, h, w] and `frames`
    [N, T]: mean squared change of the clip by decoder patch and by frame; `counts` [N, K] of the codes, or `mean` and
    `std` [N, d] of latents), `maps.png` and `*.svg`.

    Args:
      found: checkpoint of a tokenizer.
      spec: the data set.
      output: folder to write to, created if missing.
      max_clips: maximum number of clips for the statistics of codes and prior, spread evenly over the data; 0 for all.
      ablated_clips: the same for the clips whose codes are replaced; each is decoded more than N times.
      replace: a key of `REPLACEMENTS`.
      budget: how many codes the clips have, the same for all, as for `LoadedTokenizer.assign`; for tokenizers with a
        ladder. N is then this number, and a position is the place in the sequence of all blocks.
      batch_size: clips decoded at a time.

    Returns:
      `summary` (scalars by name), `by_position` (lists of length N by name; null for missing numbers), `kept`
      (`tokens`: numbers of kept codes, and `psnr` by order), `protocol`.

    Raises:
      InputError: the data cannot be read or has too few clips, or the output cannot be written.
    """
    model = found.recipe.model
    output = files.check_folder(output)
    if replace not in REPLACEMENTS:
        raise InputError(f"--replace {replace} is not known; choose from {', '.join(REPLACEMENTS)}")
    sampled = found.recipe.data
    clip = ClipSpec.of(model.clip_shape, flip=False, fps=sampled.fps, stride=sampled.stride)
    clips, ablated = (ClipSet(spec, clip, max_clips=count) for count in (max_clips, ablated_clips))
    names = [NUMBERS, ARRAYS, MAPS, *(f"{name}.svg" for name in FIGURES)]
    with files.outputs(
        output, names, ours=names if is_analysis(output / NUMBERS) else (), but=" and is not an analysis"
    ) as folder:
        result, patches, frames, seen = _analyze(found, clips, ablated, replace, budget, batch_size)
        with files.writing(folder / ARRAYS) as file:
            np.savez_compressed(file, patches=patches, frames=frames, **seen.arrays())
        write_png(folder / MAPS, ablation_picture(patches, frames))
        for chart in figures(result):
            files.write_bytes(folder / f"{chart.name}.svg", charts.as_file(chart).encode())
        files.write_json(folder / NUMBERS, result)
    return result


def is_analysis(path: pathlib.Path) -> bool:
    """Whether a file contains the numbers of an analysis."""
    return files.json_object(path).get("format") == FORMAT


def _analyze(
    found: Checkpoint, clips: ClipSet, ablated: ClipSet, replace: str, budget: str | None, batch_size: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, "SeenCodes | SeenLatents"]:
    """The result of `analyze`, and what it writes as arrays: patches, frames, and what was seen at the positions."""
    model = found.recipe.model
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    tokenizer = LoadedTokenizer(model, found.params["tokenizer"], step=found.step, mesh=mesh)
    ladder, size = model.adaptive, model.quantizer.codes
    if ladder and budget and not isinstance(ladder.goal(budget, size, "--budget"), tuple):
        raise InputError(f"--budget {budget} gives clips different numbers of codes; give the same to all, such as 128")
    assign = tokenizer.assigner(budget)
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        summary, seen, prior_scores, count = _statistics(found, tokenizer, assign, clips, mesh, batch_size)
        positions = seen.positions
        videos, mine = _read(tokenizer, budget, ablated, batch_size)
        mine = mine[:, :positions]
        fill = np.roll(mine, len(mine) // 2, axis=0)  # neighboring clips may be from the same video
        if replace == "common":
            fill = np.broadcast_to(seen.common(), mine.shape)
        elif len(mine) < 2:
            raise InputError("there is only one clip, and no other clip to take codes from; use --replace common")
        probe = Probe(tokenizer, mesh, videos, mine, fill, assign.fixed, batch_size=batch_size)
        whole, alone, kept = _ablate(probe, positions)

    error, patches, frames = alone
    by_position = {
        "change": patches.mean(axis=(1, 2, 3)),
        "rise": error.mean(axis=1) - whole.mean(),
        "space": effective_share(patches.sum(axis=1).reshape(len(patches), -1)),
        "time": effective_share(frames),
        **seen.by_position(),
        **prior_scores,
    }
    weights = by_position["change"] / max(by_position["change"].sum(), np.finfo(float).tiny)
    summary |= {
        **seen.summary(),
        "psnr_all_replaced": kept["psnr"]["first"][0],
        "effective_positions": effective_share(weights[None])[0] * positions,
        "space": np.nansum(weights * by_position["space"]),
        "time": np.nansum(weights * by_position["time"]),
    }
    result = {
        "format": FORMAT,
        "version": VERSION,
        "summary": {name: _number(np.asarray(x)) for name, x in summary.items()},
        "by_position": {name: [_number(x) for x in values] for name, values in by_position.items()},
        "kept": kept,
        "protocol": {
            **clips.describe(),
            "clips": count,
            "ablated_clips": len(mine),
            "replaced_by": REPLACEMENTS[replace],
            **({"budget": budget or positions} if model.adaptive else {}),
            "definitions": DEFINITIONS,
            "fingerprint": tokenizer.fingerprint,
            "step": found.step,
        },
    }
    return result, patches, frames, seen


class SeenCodes:
    """Which codes the clips have at each position: counts [N, K]."""

    def __init__(self, counts: np.ndarray):
        self.counts, self.positions = counts, len(counts)

    def arrays(self) -> dict[str, np.ndarray]:
        """What to write."""
        return {"counts": self.counts.astype(np.int32)}

    def common(self) -> np.ndarray:
        """The most frequent code of each position, [N] int32."""
        return self.counts.argmax(axis=1).astype(np.int32)

    def by_position(self) -> dict[str, np.ndarray]:
        """Numbers of each position, [N] by name."""
        return {"entropy": CodeStatistics(self.counts).position_entropy(), "codes": (self.counts > 0).sum(axis=1)}

    def summary(self) -> dict[str, float]:
        """Scalars by name."""
        overall = self.counts.sum(axis=0)
        return {
            "usage": float(codebook_usage(overall)),
            "perplexity": float(perplexity(overall)),
            "position_entropy": float(self.by_position()["entropy"].mean()),
        }


class SeenLatents:
    """The latents of the clips at each of the positions: mean and standard deviation [N, d], and divergence [N]."""

    def __init__(self, latents: LatentStatistics, kl: LatentStatistics, positions: int):
        self.mean, self.std, self.kl = (x[:positions] for x in (latents.mean, latents.std, kl.mean))
        self.positions = positions

    def arrays(self) -> dict[str, np.ndarray]:
        """What to write."""
        return {"mean": self.mean.astype(np.float32), "std": self.std.astype(np.float32)}

    def common(self) -> np.ndarray:
        """The mean of each position, [N, d] float32."""
        return self.mean.astype(np.float32)

    def by_position(self) -> dict[str, np.ndarray]:
        """Numbers of each position, [N] by name."""
        return {"kl": self.kl, "spread": np.sqrt(np.square(self.std).mean(axis=1))}

    def summary(self) -> dict[str, float]:
        """Scalars by name."""
        return {"kl": float(self.kl.sum())}


class Probe:
    """Decodes clips with some of their codes replaced, and measures the change.

    Args:
      tokenizer: its parameters are on the mesh.
      mesh: devices to compute on.
      videos: uint8 [M, T, H, W, C].
      codes: [M, N] int32, the codes of the videos, or latents [M, N, d].
      fill: the same, the replacements.
      lengths: the numbers of codes of each block, if the tokenizer has a ladder.
      batch_size: clips decoded at a time; a multiple of the number of devices.
    """

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        mesh: Mesh,
        videos: np.ndarray,
        codes: np.ndarray,
        fill: np.ndarray,
        lengths: Assignment | None = None,
        *,
        batch_size: int,
    ):
        self._tokenizer, self._mesh, self._batch_size = tokenizer, mesh, batch_size
        self._rows = {"video": videos, "codes": codes, "fill": fill}
        measured = lambda params, batch, keep: measure(tokenizer.module(params), batch, keep, lengths)  # noqa: E731
        self._measure = jax.jit(measured, out_shardings=sharding.replicated(mesh))

    def calls(self, variants: int) -> int:
        """Number of progress updates of `run`."""
        return -(-len(self._rows["codes"]) // self._batch_size) * -(-variants // ROWS)

    def run(self, keep: np.ndarray, progress: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measures every clip with each of R choices of codes to keep.

        Args:
          keep: bool [R, N].
          progress: updated after each call of the compiled program.

        Returns:
          The mean squared error to the original, float64 [R, M], and the squared difference from the clip decoded with
          all its codes, averaged over clips: by decoder patch [R, t, h, w] and by frame [R, T].
        """
        count = len(self._rows["codes"])
        padded = np.concatenate([keep, np.repeat(keep[-1:], -len(keep) % ROWS, axis=0)])
        errors, patches, frames = [], 0.0, 0.0
        for start in range(0, count, self._batch_size):
            numbers = np.arange(start, start + self._batch_size)
            batch = {name: x[np.minimum(numbers, count - 1)] for name, x in self._rows.items()}
            batch = sharding.to_mesh(batch | {"mask": (numbers < count).astype(np.float32)}, self._mesh)
            found = []
            for first in range(0, len(padded), ROWS):
                rows = padded[first : first + ROWS]
                found.append(jax.device_get(self._measure(self._tokenizer.params, batch, rows)))
                progress.update()
            together = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            error, by_patch, by_frame = (x[: len(keep)].astype(np.float64) for x in together)
            errors.append(error[:, numbers < count])
            patches, frames = patches + by_patch, frames + by_frame
        return np.concatenate(errors, axis=1), patches / count, frames / count


def measure(
    tokenizer: Tokenizer, batch: Mapping[str, jax.Array], keep: jax.Array, lengths: Assignment | jax.Array | None
):
    """What `Probe` computes of one batch, for use in a compiled function.

    Args:
      tokenizer: the network.
      batch: `video` [B, T, H, W, C], `codes` and `fill` [B, N], and `mask` [B] float32, 0 for clips that do not count.
      keep: bool [R, N], which codes stay; the others are those of `fill`.
      lengths: [blocks], the numbers of codes of each block, if the tokenizer has a ladder.

    Returns:
      For each row of `keep`: squared errors [R, B], and sums over clips of the squared changes, by decoder patch
      [R, t, h, w] and by frame [R, T].
    """

    def decode(codes):
        given = None if lengths is None else repeated(lengths, len(codes))
        return jnp.clip(tokenizer.decode(codes, given), 0.0, 1.0)

    video, whole = as_float_video(batch["video"]), decode(batch["codes"])
    pt, ph, pw = tokenizer.config.decoder_patch

    def variant(kept):
        kept = kept.reshape(-1, *(1,) * (batch["codes"].ndim - 2))  # with an axis for those of latents
        decoded = decode(jnp.where(kept, batch["codes"], batch["fill"]))
        error = jnp.square(decoded - video).mean(axis=(1, 2, 3, 4))
        change = jnp.einsum("b,bthw->thw", batch["mask"], jnp.square(decoded - whole).mean(axis=-1))
        by_patch = reduce(change, "(t pt) (h ph) (w pw) -> t h w", "mean", pt=pt, ph=ph, pw=pw)
        return error, by_patch, change.mean(axis=(1, 2))

    return jax.lax.map(variant, keep)


def _statistics(
    found: Checkpoint, tokenizer: LoadedTokenizer, assign: Assigner, clips: ClipSet, mesh: Mesh, batch_size: int
):
    """Summary scalars, what was seen at the positions, scores of the prior there, and the number of clips."""
    wanted = ("psnr", "usage", "latents", "prior")
    names = [name for name in available(found.recipe, found.params) if name in wanted]
    metrics = default_metrics(names, found.recipe)
    by_position = PriorByPosition(found.recipe) if "prior" in names else None
    evaluator = ReconstructionEvaluator(
        lambda params: tokenizer.module(params["tokenizer"]),
        clips,
        mesh,
        [*metrics, by_position] if by_position else metrics,
        batch_size=batch_size,
        lengths=assign,
        progress=True,
    )
    params = {name: tree for name, tree in found.params.items() if name in ("tokenizer", "prior")}
    scores, extras = evaluator.run(jax.device_put(params, sharding.param_shardings(params, mesh)))
    if not extras["clips"]:
        raise InputError("no clip could be read; see the log for the reasons")
    summary = {name: scores[name] for name in ("psnr", "prior_cross_entropy", "prior_top1") if name in scores}
    prior_scores = by_position.result if by_position else {}
    if extras["latents"] is not None:
        used = sum(assign.fixed) if assign.fixed else found.recipe.model.num_tokens
        return summary, SeenLatents(*extras["latents"], used), prior_scores, extras["clips"]
    counts = extras["codes"].counts
    seen = SeenCodes(counts[counts.any(axis=1)])  # with a ladder, only places of blocks that have them
    # code 0 has no prediction
    prior_scores = {name: np.array([np.nan, *values])[: seen.positions] for name, values in prior_scores.items()}
    return summary, seen, prior_scores, extras["clips"]


class PriorByPosition(PriorScore):
    """Scores of the prior for each of the codes 1 .. N-1: a metric without scalars.

    Attributes:
      result: means over clips, float64 [N-1] by name; set at the end of the evaluation.
    """

    result: dict[str, np.ndarray]

    def values(self, weights, batch):
        return self.by_position(batch)

    def add(self, total, values, mask):
        sums = {name: np.asarray(value, np.float64)[mask > 0].sum(axis=0) for name, value in values.items()}
        clips, before = total or (0, dict.fromkeys(sums, 0.0))
        return clips + int(mask.sum()), {name: before[name] + value for name, value in sums.items()}

    def scalars(self, total):
        clips, sums = total
        self.result = {name: value / clips for name, value in sums.items()}
        return {}


def _read(
    tokenizer: LoadedTokenizer, budget: str | None, clips: ClipSet, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The clips that can be read, uint8 [M, T, H, W, C], and their codes [M, N] int32 or latents [M, N, d]."""
    videos, codes = [], []
    with clips.batches(batch_size) as batches:
        for batch in batches:
            real = batch["mask"] > 0
            videos.append(batch["video"][real])
            found = tokenizer.encode(batch["video"], budget=budget)
            codes.append(np.asarray(found[0] if tokenizer.config.adaptive else found)[real])
    return np.concatenate(videos), np.concatenate(codes)


def _ablate(probe: Probe, positions: int):
    """Errors with all codes [M]; results of replacing each position alone; PSNR if only some codes are kept."""
    alone = ~np.eye(positions, dtype=bool)
    counts = np.unique(np.linspace(0, positions, KEPT_COUNTS + 1).round().astype(int))
    calls = probe.calls(1) + probe.calls(positions) + probe.calls(4 * len(counts))
    with Progress(calls, description="ablate", unit="batch") as progress:
        (whole,), _, _ = probe.run(np.ones((1, positions), bool), progress)
        replaced = probe.run(alone, progress)
        rise = replaced[0].mean(axis=1)
        orders = {
            "first": np.arange(positions),
            "last": np.arange(positions)[::-1],
            "random": np.random.default_rng(0).permutation(positions),
            "important": np.argsort(-rise, kind="stable"),
        }
        keep = np.array([np.argsort(order) < count for order in orders.values() for count in counts])
        errors, _, _ = probe.run(keep, progress)
    psnr = (-10.0 * np.log10(np.maximum(errors, SMALLEST_MSE))).mean(axis=1).reshape(len(orders), -1)
    kept = {"tokens": counts.tolist(), "psnr": {name: row.tolist() for name, row in zip(orders, psnr, strict=True)}}
    return whole, replaced, kept


def effective_share(weights: np.ndarray) -> np.ndarray:
    """exp(entropy) / n of rows of n weights: 1 if all are equal, 1 / n if only one is above 0, NaN if all are 0."""
    total = weights.sum(axis=1, keepdims=True)
    shares = weights / np.where(total > 0, total, 1.0)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy) / weights.shape[1], np.nan)


def _number(x) -> float | int | None:
    """As a value of strict JSON, which has no NaN."""
    return None if np.isnan(x) else x.item()


SEQUENTIAL = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)


def ablation_picture(patches: np.ndarray, frames: np.ndarray, *, side: int = 32, gap: int = 4) -> np.ndarray:
    """Image of where the clip changes when each code is replaced: one tile per position, the frame above a time strip.

    Colors show root mean squared changes; each tile and strip is scaled to its own maximum. At most `TILES` positions
    are shown, evenly spaced.

    Args:
      patches: mean squared changes [N, t, h, w].
      frames: mean squared changes [N, T].
      side: approximate longer side of a tile in pixels.
      gap: pixels between tiles.

    Returns:
      uint8 [height, width, 3].
    """
    shown = np.unique(np.linspace(0, len(patches) - 1, min(TILES, len(patches))).round().astype(int))
    scale = max(1, side // max(patches.shape[2:]))
    tiles = []
    for place, time in zip(patches[shown].mean(axis=1), frames[shown], strict=True):
        tile = np.kron(scaled(place), np.ones((scale, scale)))
        strip = scaled(time)[np.arange(tile.shape[1]) * len(time) // tile.shape[1]]
        blank = np.full((2, tile.shape[1]), np.nan)
        tiles.append(np.concatenate([tile, blank, np.tile(strip, (gap, 1))]))
    columns = int(np.ceil(np.sqrt(len(tiles))))
    tiles += [np.full_like(tiles[0], np.nan)] * (-len(tiles) % columns)
    tiles = [np.pad(tile, gap, constant_values=np.nan) for tile in tiles]
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return colored(np.concatenate(rows))


def scaled(mean_squares: np.ndarray) -> np.ndarray:
    """Roots of mean squared changes, divided by the largest: what the maps show, in [0, 1]."""
    root = np.sqrt(mean_squares)
    return root / max(root.max(), np.finfo(float).tiny)


def colored(values: np.ndarray) -> np.ndarray:
    """Maps [H, W] in [0, 1] to colors, uint8 [H, W, 3]; NaN becomes white."""
    at = np.linspace(0, 1, len(SEQUENTIAL))
    colors = np.stack([np.interp(np.nan_to_num(values), at, channel) for channel in SEQUENTIAL.T], axis=-1)
    return np.where(np.isnan(values)[..., None], 255, colors.round()).astype(np.uint8)


def figures(result: Mapping[str, Any]) -> list[charts.Chart]:
    """Charts of the result of `analyze`, as returned or read from its file."""
    values, kept = result["by_position"], result["kept"]

    def by_position(name, title, series, unit=""):
        present = {label: list(enumerate(values[key])) for key, label in series.items() if key in values}
        lines = [charts.Series(label, points, dots=True) for label, points in present.items()]
        return charts.Chart(name, title, lines, x_label="position", y_label=unit) if lines else None

    found = [
        charts.Chart(
            "kept",
            "PSNR with some of the codes kept",
            [charts.Series(name, list(zip(kept["tokens"], psnr, strict=True))) for name, psnr in kept["psnr"].items()],
            x_label="codes kept",
            y_label="dB",
        ),
        by_position("change", "Change when the code is replaced", {"change": "clip", "rise": "error"}, "mean square"),
        by_position("reach", "Extent of the change", {"space": "share of the frame", "time": "share of frames"}),
        by_position("entropy", "Entropy of the codes", {"entropy": ""}, "nats"),
        by_position("kl", "KL of the latents", {"kl": ""}, "nats"),
        by_position("prior", "Cross-entropy of the prior", {"prior_cross_entropy": ""}, "nats"),
        by_position("accuracy", "Accuracy of the prior", {"prior_top1": "top 1", "prior_top5": "top 5"}),
    ]
    return [chart for chart in found if chart]
