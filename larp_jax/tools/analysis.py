"""Which token positions carry what: the question about LARP's holistic tokens that the paper leaves open.

Tokens belong to no place in the clip by construction. What each came to mean is seen by putting another code in its
place and decoding: where the clip changes (ablation maps over space and time), how much further from the original it
gets, and how good the clip is when only some of the tokens are kept. Beside it stands what codes the positions use and
how well the prior predicts them.
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
from larp_jax.config import MeshConfig
from larp_jax.data import ClipSpec
from larp_jax.data.video import write_png
from larp_jax.errors import InputError
from larp_jax.evaluation.evaluators import ReconstructionEvaluator
from larp_jax.evaluation.metrics import PriorScore
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.evaluation.registry import available, default_metrics
from larp_jax.metrics import SMALLEST_MSE, codebook_usage, perplexity
from larp_jax.models.pixels import as_float_video
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng, sharding
from larp_jax.runtime.progress import Progress
from larp_jax.tools import charts
from larp_jax.weights.checkpoint import Checkpoint

FORMAT = "larp_jax.token_analysis"
VERSION = 1
NUMBERS, ARRAYS, MAPS = "analysis.json", "analysis.npz", "maps.png"
FIGURES = "kept", "change", "reach", "entropy", "prior", "accuracy"
REPLACEMENTS = {
    "other": "the code that another of these clips has at this position",
    "common": "the code that is most frequent at this position",
}
ROWS = 16  # variants of a batch that one call decodes, one after the other
KEPT_COUNTS = 16
TILES = 256  # ablation maps in the picture

DEFINITIONS = {
    "change": "mean squared difference (pixels in [0, 1]) that replacing the position's code makes to the decoded clip",
    "rise": "by how much replacing it raises the mean squared error to the original clip",
    "space": "effective share of the frame that the change covers: exp(entropy over places) / places, 1 for all alike",
    "time": "the same for frames",
    "entropy": "nats, of the codes seen at the position; log(clips) at most",
    "codes": "how many codes were seen at the position",
    "prior_cross_entropy": "nats, of the position's code under the prior, given the latents before it",
    "prior_top1": "share of clips whose code the prior thinks likeliest",
    "prior_top5": "share of clips whose code is among its likeliest five",
    "kept": "PSNR in dB (per clip, then mean) when so many codes are kept and all others replaced, in four orders:"
    " the first, the last, in a random order, those first whose replacement raises the error most",
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
    batch_size: int = 8,
) -> dict[str, Any]:
    """Analyses what token positions carry, and writes numbers and pictures.

    The folder gets `analysis.json` (what is returned), `analysis.npz` (`patches` [N, t, h, w] and `frames` [N, T]:
    where the clip changes, by patch of the decoder and by frame, mean squared; `counts` [N, K] of the codes),
    `maps.png` and `*.svg`.

    Args:
      found: a tokenizer's checkpoint.
      spec: the data set.
      output: folder to write to, made if missing.
      max_clips: for the statistics of codes and the prior, at most so many, spread over the data; 0 for all.
      ablated_clips: for what replacing does (each is decoded N times and more), likewise.
      replace: of `REPLACEMENTS`.
      batch_size: clips decoded at a time.

    Returns:
      `summary` (scalars by name), `by_position` (lists of N by name; null where there is no number), `kept`
      (`tokens`: how many, and `psnr` by order), `protocol`.

    Raises:
      InputError: the tokenizer has no codes, the data cannot be read, or is too little.
    """
    model = found.recipe.model
    if not model.quantizer.has_codes:
        raise InputError(f"{found.path} has continuous latents (quantizer.kind='kl') and no codes to analyze")
    output = files.check_folder(output)
    if replace not in REPLACEMENTS:
        raise InputError(f"--replace {replace} is not known; choose from {', '.join(REPLACEMENTS)}")
    clip = ClipSpec(frames=model.frames, resolution=model.resolution, flip=False)
    clips, ablated = (ClipSet(spec, clip, max_clips=count) for count in (max_clips, ablated_clips))
    names = [NUMBERS, ARRAYS, MAPS, *(f"{name}.svg" for name in FIGURES)]
    with files.outputs(
        output, names, ours=names if is_analysis(output / NUMBERS) else (), but=" and is no analysis"
    ) as folder:
        result, patches, frames, counts = _analyze(found, clips, ablated, replace, batch_size)
        with files.writing(folder / ARRAYS) as file:
            np.savez_compressed(file, patches=patches, frames=frames, counts=counts.astype(np.int32))
        write_png(folder / MAPS, ablation_picture(patches, frames))
        for chart in figures(result):
            files.write_bytes(folder / f"{chart.name}.svg", charts.as_file(chart).encode())
        files.write_json(folder / NUMBERS, result)
    return result


def is_analysis(path: pathlib.Path) -> bool:
    """Whether a file holds the numbers of an analysis."""
    return files.json_object(path).get("format") == FORMAT


def _analyze(
    found: Checkpoint, clips: ClipSet, ablated: ClipSet, replace: str, batch_size: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """What `analyze` returns, and the arrays that it writes: patches, frames, counts."""
    model = found.recipe.model
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    tokenizer = LoadedTokenizer(model, found.params["tokenizer"], step=found.step, mesh=mesh)
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        summary, codes, of_prior, count = _statistics(found, tokenizer, clips, mesh, batch_size)
        videos, mine = _read(tokenizer, ablated, batch_size)
        fill = np.roll(mine, len(mine) // 2, axis=0)  # clips beside each other may be of one video
        if replace == "common":
            fill = np.broadcast_to(codes.counts.argmax(axis=1).astype(np.int32), mine.shape)
        elif len(mine) < 2:
            raise InputError("there is one clip, which has no other to take codes from; use --replace common")
        probe = Probe(tokenizer, mesh, videos, mine, fill, batch_size=batch_size)
        whole, alone, kept = _ablate(probe, model.num_tokens)

    error, patches, frames = alone
    by_position = {
        "change": patches.mean(axis=(1, 2, 3)),
        "rise": error.mean(axis=1) - whole.mean(),
        "space": _effective_share(patches.sum(axis=1).reshape(len(patches), -1)),
        "time": _effective_share(frames),
        "entropy": codes.position_entropy(),
        "codes": (codes.counts > 0).sum(axis=1),
        **of_prior,
    }
    weights = by_position["change"] / max(by_position["change"].sum(), np.finfo(float).tiny)
    summary |= {
        "usage": float(codebook_usage(codes.counts.sum(axis=0))),
        "perplexity": float(perplexity(codes.counts.sum(axis=0))),
        "position_entropy": float(by_position["entropy"].mean()),
        "psnr_all_replaced": kept["psnr"]["first"][0],
        "effective_positions": _effective_share(weights[None])[0] * model.num_tokens,
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
            "definitions": DEFINITIONS,
            "fingerprint": tokenizer.fingerprint,
            "step": found.step,
        },
    }
    return result, patches, frames, codes.counts


class Probe:
    """Decodes clips with some of their codes replaced, and measures.

    Args:
      tokenizer: on the mesh.
      mesh: where to compute.
      videos: uint8 [M, T, H, W, C].
      codes: [M, N] int32, theirs.
      fill: [M, N] int32, what codes are replaced by.
      batch_size: clips decoded at a time; the mesh divides it.
    """

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        mesh: Mesh,
        videos: np.ndarray,
        codes: np.ndarray,
        fill: np.ndarray,
        *,
        batch_size: int,
    ):
        self._tokenizer, self._mesh, self._batch_size = tokenizer, mesh, batch_size
        self._rows = {"video": videos, "codes": codes, "fill": fill}
        measure = lambda params, batch, keep: _measure(tokenizer.module(params), batch, keep)  # noqa: E731
        self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

    def calls(self, variants: int) -> int:
        """How often the progress of `run` is updated."""
        return -(-len(self._rows["codes"]) // self._batch_size) * -(-variants // ROWS)

    def run(self, keep: np.ndarray, progress: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measures every clip with each of R choices of codes to keep.

        Args:
          keep: bool [R, N].
          progress: counts calls.

        Returns:
          The mean squared error to the original, float64 [R, M], and the mean over clips of the squared difference
          from the clip decoded with all its codes, by patch of the decoder, [R, t, h, w], and by frame, [R, T].
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


def _measure(tokenizer: Tokenizer, batch: Mapping[str, jax.Array], keep: jax.Array):
    """Of a batch, for each row of keep [R, N]: squared errors [R, B], and sums over clips of squared changes."""
    decode = lambda codes: jnp.clip(tokenizer.decode(codes), 0.0, 1.0)  # noqa: E731
    video, whole = as_float_video(batch["video"]), decode(batch["codes"])
    pt, ph, pw = tokenizer.config.decoder_patch

    def variant(kept):
        decoded = decode(jnp.where(kept, batch["codes"], batch["fill"]))
        error = jnp.square(decoded - video).mean(axis=(1, 2, 3, 4))
        change = jnp.einsum("b,bthw->thw", batch["mask"], jnp.square(decoded - whole).mean(axis=-1))
        by_patch = reduce(change, "(t pt) (h ph) (w pw) -> t h w", "mean", pt=pt, ph=ph, pw=pw)
        return error, by_patch, change.mean(axis=(1, 2))

    return jax.lax.map(variant, keep)


def _statistics(found: Checkpoint, tokenizer: LoadedTokenizer, clips: ClipSet, mesh: Mesh, batch_size: int):
    """PSNR and the like, code counts, the prior's scores by position, and the number of clips."""
    names = [name for name in available(found.recipe, found.params) if name in ("psnr", "usage", "prior")]
    metrics = default_metrics(names, found.recipe)
    by_position = PriorByPosition(found.recipe) if "prior" in names else None
    evaluator = ReconstructionEvaluator(
        lambda params: tokenizer.module(params["tokenizer"]),
        clips,
        mesh,
        [*metrics, by_position] if by_position else metrics,
        batch_size=batch_size,
        progress=True,
    )
    params = {name: tree for name, tree in found.params.items() if name in ("tokenizer", "prior")}
    scores, extras = evaluator.run(jax.device_put(params, sharding.param_shardings(params, mesh)))
    if not extras["clips"]:
        raise InputError("none of the clips to analyze could be read; the log says why")
    summary = {name: scores[name] for name in ("psnr", "prior_cross_entropy", "prior_top1") if name in scores}
    of_prior = by_position.result if by_position else {}
    of_prior = {name: np.array([np.nan, *values]) for name, values in of_prior.items()}  # token 0 is never predicted
    return summary, extras["codes"], of_prior, extras["clips"]


class PriorByPosition(PriorScore):
    """The prior's scores of each code 1 .. N-1, a metric without scalars.

    Attributes:
      result: means over clips, float64 [N-1] by name, once the evaluation is done.
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


def _read(tokenizer: LoadedTokenizer, clips: ClipSet, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The clips that can be read, uint8 [M, T, H, W, C], and their codes [M, N] int32."""
    videos, codes = [], []
    with clips.batches(batch_size) as batches:
        for batch in batches:
            real = batch["mask"] > 0
            videos.append(batch["video"][real])
            codes.append(np.asarray(tokenizer.encode(batch["video"]))[real])
    return np.concatenate(videos), np.concatenate(codes)


def _ablate(probe: Probe, positions: int):
    """Errors with all codes [M]; what replacing each position alone does; PSNR with some of the codes kept."""
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


def _effective_share(weights: np.ndarray) -> np.ndarray:
    """exp(entropy) / n of rows of n weights: 1 where all are alike, 1 / n where one has all, NaN where all are 0."""
    total = weights.sum(axis=1, keepdims=True)
    shares = weights / np.where(total > 0, total, 1.0)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy) / weights.shape[1], np.nan)


def _number(x) -> float | int | None:
    """Ready for strict JSON."""
    return None if np.isnan(x) else x.item()


SEQUENTIAL = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)


def ablation_picture(patches: np.ndarray, frames: np.ndarray, *, side: int = 32, gap: int = 4) -> np.ndarray:
    """Where replacing each position's code changes the clip: a tile a position, the frame above a strip of time.

    Root mean squared changes, each tile and strip scaled to its own maximum. Of many positions some are shown.

    Args:
      patches: [N, t, h, w], mean squared.
      frames: [N, T], likewise.
      side: pixels of a tile, about.
      gap: pixels between them.

    Returns:
      uint8 [height, width, 3].
    """
    shown = np.unique(np.linspace(0, len(patches) - 1, min(TILES, len(patches))).round().astype(int))
    scale = max(1, side // patches.shape[2])
    tiles = []
    for place, time in zip(patches[shown].mean(axis=1), frames[shown], strict=True):
        tile = np.kron(_scaled(place), np.ones((scale, scale)))
        strip = _scaled(time)[np.arange(tile.shape[1]) * len(time) // tile.shape[1]]
        blank = np.full((2, tile.shape[1]), np.nan)
        tiles.append(np.concatenate([tile, blank, np.tile(strip, (gap, 1))]))
    columns = int(np.ceil(np.sqrt(len(tiles))))
    tiles += [np.full_like(tiles[0], np.nan)] * (-len(tiles) % columns)
    tiles = [np.pad(tile, gap, constant_values=np.nan) for tile in tiles]
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return _colored(np.concatenate(rows))


def _scaled(mean_squares: np.ndarray) -> np.ndarray:
    root = np.sqrt(mean_squares)
    return root / max(root.max(), np.finfo(float).tiny)


def _colored(values: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] as uint8 [H, W, 3], NaN as white."""
    at = np.linspace(0, 1, len(SEQUENTIAL))
    colors = np.stack([np.interp(np.nan_to_num(values), at, channel) for channel in SEQUENTIAL.T], axis=-1)
    return np.where(np.isnan(values)[..., None], 255, colors.round()).astype(np.uint8)


def figures(result: Mapping[str, Any]) -> list[charts.Chart]:
    """Charts of what `analyze` returned, or of what its file holds."""
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
        by_position("reach", "Share of the clip it reaches", {"space": "of the frame", "time": "of the frames"}),
        by_position("entropy", "Entropy of the codes", {"entropy": ""}, "nats"),
        by_position("prior", "Cross-entropy of the prior", {"prior_cross_entropy": ""}, "nats"),
        by_position("accuracy", "Accuracy of the prior", {"prior_top1": "top 1", "prior_top5": "top 5"}),
    ]
    return [chart for chart in found if chart]
