"""Results of experiments: means over seeds and clips with bootstrap intervals, as JSON, table and figure."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from larp_jax import files
from larp_jax.config import Experiment
from larp_jax.tools import charts
from larp_jax.version import __version__

FORMAT, VERSION = "larp_jax.experiment_results", 1
RESULTS, TABLE, FIGURE = "results.json", "results.md", "results.svg"
ROUNDS, LEVEL = 4000, 0.95
# Files of a cell, and their captions.
PICTURES = {
    "reconstructions.png": "held-out clips, each above its reconstruction",
    "samples.png": "samples of the first classes in turn",
}


class Measure(NamedTuple):
    """A number that an experiment compares.

    Attributes:
      title: in tables and figures.
      unit: empty for none.
      better: "higher", "lower", or empty if neither is better by itself.
      definition: what it is, in one sentence.
      parts: names of the values of a cell, and their signs in the sum.
    """

    title: str
    unit: str
    better: str
    definition: str
    parts: tuple[tuple[str, int], ...]

    def of(self, cell: "Cell") -> np.ndarray | None:
        """The values of a cell, one per clip or sample, or a single one; None if the cell lacks a part."""
        if any(name not in cell.values for name, _ in self.parts):
            return None
        return sum(sign * cell.values[name] for name, sign in self.parts)


MEASURES = {
    "psnr": Measure("PSNR", "dB", "higher", "of the held-out clips, per clip", (("psnr", 1),)),
    "lpips": Measure("LPIPS", "", "lower", "of the first and last frames of the held-out clips", (("lpips", 1),)),
    "usage": Measure("Codes in use", "share", "", "of the codebook, by the held-out clips", (("usage", 1),)),
    "reach": Measure(
        "Reach of a code", "share", "", "effective share of the clip that changes with a code or latent (larp-jax"
        " analyze): space times time, weighted by the change", (("reach", 1),),
    ),
    "unigram": Measure(
        "H1", "nats", "", "cross-entropy of the held-out codes under the frequencies of the training codes",
        (("unigram", 1),),
    ),
    "cross_entropy": Measure(
        "CE", "nats", "", "cross-entropy per held-out code under a fresh generator, given class and earlier codes",
        (("cross_entropy", 1),),
    ),
    "gain": Measure(
        "H1 - CE", "nats", "higher", "what the generator knows of a code beyond its frequency",
        (("unigram", 1), ("cross_entropy", -1)),
    ),
    "order_gap": Measure(
        "Order gap", "nats", "higher", "CE of a generator trained on the same codes under one fixed permutation of the"
        " positions, minus CE; about 0 if the order of the codes does not matter",
        (("cross_entropy_permuted", 1), ("cross_entropy", -1)),
    ),
    "recognized": Measure(
        "Reconstructions recognized", "share", "higher", "held-out clips whose reconstruction the classifier of real"
        " clips assigns to the right class", (("recognized", 1),),
    ),
    "sample_accuracy": Measure(
        "Samples recognized", "share", "higher", "samples that the classifier of real clips assigns to the class asked"
        " for", (("sample_accuracy", 1),),
    ),
    "sample_distance": Measure(
        "Feature distance", "", "lower", "Frechet distance between samples and held-out clips in the features of that"
        " classifier (not FVD)", (("sample_distance", 1),),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was measured of one arm with one seed.

    Attributes:
      values: float64 [clips], [samples] or [1] by name.
    """

    values: dict[str, np.ndarray]

    def to_json(self) -> dict[str, list[float]]:
        """As plain lists."""
        return {name: value.tolist() for name, value in self.values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[float]]) -> Self:
        """From what `to_json` returned."""
        return cls({name: np.asarray(value, np.float64) for name, value in values.items()})


def bootstrap(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean, and the bounds of a 95 % bootstrap interval, over seeds and the clips in them.

    Seeds are resampled, and the clips of each resampled seed too. With three seeds, the interval is a rough one.

    Args:
      values: [clips] of each seed.
    """
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(values), size=(ROUNDS, len(values)))
    # means over resampled clips, for each round and seed
    means = np.stack([v[rng.integers(len(v), size=(ROUNDS, len(v)))].mean(axis=1) for v in values], axis=1)
    totals = np.take_along_axis(means, seeds, axis=1).mean(axis=1)
    low, high = np.quantile(totals, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.mean([v.mean() for v in values])), float(low), float(high)


def summarize(experiment: Experiment, cells: Mapping[tuple[str, int], Cell]) -> dict[str, dict[str, Any]]:
    """By arm and measure: `mean`, `low`, `high`, `seeds` (means by seed), and the same of the `difference`.

    The difference is to the first arm, over the seeds that both have, clip by clip.
    """
    found: dict[str, dict[str, Any]] = {}
    first = next(iter(experiment.arms))
    for arm in experiment.arms:
        rows = found[arm] = {}
        for name, measure in MEASURES.items():
            by_seed = {seed: measure.of(cell) for (other, seed), cell in cells.items() if other == arm}
            by_seed = {seed: value for seed, value in by_seed.items() if value is not None}
            if not by_seed:
                continue
            rows[name] = _interval(list(by_seed.values()))
            rows[name]["seeds"] = {str(seed): float(value.mean()) for seed, value in by_seed.items()}
            both = [seed for seed in by_seed if arm != first and (first, seed) in cells]
            pairs = [(by_seed[seed], measure.of(cells[first, seed])) for seed in both]
            differences = [a - b for a, b in pairs if b is not None and a.shape == b.shape]
            if differences:
                rows[name]["difference"] = _interval(differences)
    return found


def _interval(values: list[np.ndarray]) -> dict[str, Any]:
    return dict(zip(("mean", "low", "high"), bootstrap(values), strict=True))


def write_results(
    experiment: Experiment, cells: Mapping[tuple[str, int], Cell], probe: Mapping[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
    """Writes the JSON, the table and the figure of the complete cells, and returns the contents of the JSON.

    Args:
      experiment: what was run.
      cells: complete cells by (arm, seed).
      probe: accuracy of the classifier of real clips.
      workdir: folder to write to.
    """
    results = {
        "format": FORMAT,
        "version": VERSION,
        "question": experiment.question,
        "complete": len(cells),
        "cells": len(experiment.arms) * experiment.seeds,
        "classifier": dict(probe),
        "definitions": {name: measure.definition for name, measure in MEASURES.items()},
        "interval": f"{LEVEL:.0%} bootstrap over seeds and clips, {ROUNDS} rounds; differences are to the first arm",
        "arms": summarize(experiment, cells),
    }
    files.write_json(workdir / RESULTS, results)
    files.write_bytes(workdir / TABLE, table(results).encode())
    files.write_bytes(workdir / FIGURE, figure(results).encode())
    return results


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The results in the folder of an experiment; None if it has none."""
    results = files.json_object(workdir / RESULTS)
    return results if results.get("format") == FORMAT else None


def page(results: Mapping[str, Any], workdir: pathlib.Path) -> str:
    """The results, and pictures of the first seed of each arm, as a self-contained HTML page."""
    measures = []
    for name in present_measures(results):
        texts = [_text(rows.get(name)) for rows in results["arms"].values()]
        measures.append(MEASURES[name]._asdict() | {"cells": texts})
    pictures = []
    for arm in results["arms"]:
        for name, caption in PICTURES.items():
            path = workdir / arm / "seed-0" / name
            if path.is_file():
                uri = charts.data_uri("image/png", path.read_bytes())
                pictures.append({"arm": arm, "seed": 0, "uri": uri, "caption": caption})
    template = charts.environment().get_template("experiment.html")
    return template.render(
        name=workdir.absolute().name,
        version=__version__,
        results=results,
        measures=measures,
        figure=figure(results),
        pictures=pictures,
    )


def present_measures(results: Mapping[str, Any]) -> list[str]:
    """The measures that some arm has, in order."""
    return [name for name in MEASURES if any(name in rows for rows in results["arms"].values())]


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: one row per measure, one column per arm."""
    arms = list(results["arms"])
    lines = [f"{results['question']} {results['complete']} of {results['cells']} runs complete.", ""]
    lines += ["| | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for name in present_measures(results):
        measure = MEASURES[name]
        unit = f" ({measure.unit})" if measure.unit else ""
        cells = [_text(results["arms"][arm].get(name)) for arm in arms]
        lines.append(f"| {measure.title}{unit} | " + " | ".join(cells) + " |")
    accuracy = results["classifier"].get("accuracy_on_held_out_clips")
    if accuracy is not None:
        lines += ["", f"The classifier of real clips is right on {accuracy:.1%} of the held-out clips."]
    return "\n".join(lines) + "\n"


def _text(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "–"
    digits = max(0, 2 - math.floor(math.log10(max(abs(row["mean"]), 1e-3))))
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def figure(results: Mapping[str, Any]) -> str:
    """The results as the text of an SVG file: a panel per measure, with the mean, interval and seeds of each arm."""
    panels = []
    for name in present_measures(results):
        rows = {arm: values[name] for arm, values in results["arms"].items() if name in values}
        numbers = [x for row in rows.values() for x in (row["low"], row["high"], *row["seeds"].values())]
        panels.append({"measure": MEASURES[name], "rows": rows, "low": min(numbers), "high": max(numbers)})
    return charts.environment().get_template("experiment.svg").render(panels=panels, arms=list(results["arms"]))
