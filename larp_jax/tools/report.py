"""Shows a run on one self-contained HTML page: no network and no other files needed."""

import datetime
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from larp_jax import files
from larp_jax.config import STAGES, default_recipe, flat, parse_recipe, to_dict
from larp_jax.errors import InputError, reason
from larp_jax.evaluation.registry import every_metric
from larp_jax.files import read_json
from larp_jax.metrics import codebook_usage, kl_from_uniform, perplexity
from larp_jax.tools import analysis, charts, code_lengths, drift, experiment_results
from larp_jax.tools.charts import Chart, Series, is_number
from larp_jax.training.writers import read_metrics
from larp_jax.version import __version__
from larp_jax.weights import checkpoint

logger = logging.getLogger(__name__)

# Errors from reading values that larp_jax did not write.
_ODD = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
MOST_VIDEOS = 12  # maximum number of steps whose videos are on the page
CELLS = {"reconstruction": "original left, reconstruction right", "samples": "samples"}

# (title, unit, {training scalar: label}), in the order of the page. Metrics add their scalars to these panels, or add
# panels at the end. Each scalar without a panel gets its own.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "", {"train/loss": ""}),
    (
        "Reconstruction loss",
        "",
        {
            "train/loss_reconstruction": "pixels",
            "train/loss_frame_difference": "changes between frames",
            "train/loss_perceptual": "perceptual",
        },
    ),
    ("PSNR", "dB", {"train/psnr": "training"}),
    ("SSIM", "", {"train/ssim": "training"}),
    ("Codes in use", "share", {"train/usage_clip": "clip", "train/usage_batch": "batch"}),
    ("Perplexity of the codes", "codes", {"train/perplexity": "batch"}),
    ("KL of the codes from uniform", "nats", {"train/kl_from_uniform": "batch"}),
    (
        "Quantizer losses",
        "",
        {
            "train/loss_quantizer": "weighted sum",
            "train/quantizer_commitment": "commitment",
            "train/quantizer_codebook": "codebook",
            "train/quantizer_entropy": "entropy",
            "train/quantizer_kl": "KL",
        },
    ),
    ("Entropy of the codes at a position", "nats", {}),
    ("Sampling temperature of the quantizer", "", {"train/temperature": ""}),
    ("Prior: cross-entropy", "nats", {"train/loss_prior": "training"}),
    ("Prior: accuracy", "share", {"train/prior_top1": "top 1", "train/prior_top5": "top 5"}),
    ("Accuracy of the next code", "share", {"train/top1": "top 1", "train/top5": "top 5"}),
    ("Rewards of a batch", "", {"train/reward": "chosen", "train/reward_best": "best"}),
    ("Best assignment chosen", "share", {"train/assignment_top1": "training"}),
    ("Alignment with the teacher: minus the cosine", "", {"train/loss_alignment": "training"}),
    ("Adversarial losses", "", {"train/loss_adversarial": "tokenizer", "train/loss_discriminator": "discriminator"}),
    ("Logits of the discriminator", "", {"train/logits_real": "real", "train/logits_fake": "reconstruction"}),
    ("Learning rate", "", {"train/learning_rate": ""}),
    ("Norm of the gradient", "", {"train/grad_norm": ""}),
    ("Time per step", "s", {"time/step": "step", "time/input": "waiting for clips"}),
    ("Goodput", "share of the time in steps", {"time/goodput": ""}),
    (
        "Time outside of steps",
        "s",
        {"time/start": "start", "time/evaluation": "evaluation", "time/checkpoint": "checkpoint"},
    ),
)
_SPECS = {"psnr": ".2f", "ssim": ".3f", "usage": ".1%", "top1": ".1%", "reward_share": ".1%"}
FORMATS = {name: f"{{:{spec}}}" for name, spec in (_SPECS | {"reward_share_uniform": ".1%"}).items()}


def report(workdir: str | os.PathLike, output: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the page of a run: curves, videos, codebook usage, evaluations, analyses, drift and settings.

    Evaluations (`larp-jax evaluate --output`), analyses (`larp-jax analyze`) and the drift of streams (`larp-jax stream
    --drift`) are searched for in the workdir and the folders in it. Sections without data show why they are empty. For
    the folder of an experiment, the page has its table, figure and pictures instead.

    Args:
      workdir: folder of a run of any stage, or of an experiment, finished or not; only the page is written there.
      output: file to write; `report.html` in the workdir by default.

    Returns:
      The path of the page.

    Raises:
      InputError: the workdir contains no run, or the page cannot be written.
    """
    workdir = files.any_path(workdir, "--workdir")
    output = workdir / "report.html" if output is None else output
    if (results := experiment_results.read(workdir)) is not None:
        output = files.check_output(output, ours=_is_report)
        return _write(experiment_results.page(results, workdir), output)
    config, rows = checkpoint.read_config(workdir), read_metrics(workdir)
    if config is None and not rows:
        raise InputError(f"{workdir} contains no run (neither config.json nor metrics.jsonl); give a --workdir of one")
    output = files.check_output(output, ours=_is_report)
    notes: list[str] = []
    template = charts.environment().get_template("report.html")
    page = template.render(
        name=files.absolute(workdir).name,
        version=__version__,
        created=_time(datetime.datetime.now().timestamp()),
        **_run(config, rows),
        panels=_panels(config, rows),
        videos=_videos(workdir, notes),
        codebook=_codebook(workdir, notes),
        **_results(workdir, notes),
        code_folders=_code_folders(workdir, notes),
        drifts=_drifts(workdir, notes),
        settings=_settings(config),
        notes=notes,
    )
    return _write(page, output)


def _write(page: str, output: pathlib.Path) -> pathlib.Path:
    page = page.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may not be valid UTF-8
    files.make_folder(output.parent)
    try:
        files.write_bytes(output, page.encode())
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({reason(error)}); name another") from error
    return output


def _is_report(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="larp_jax' in file.read(2048)


def _run(config: Mapping | None, rows: list[dict]) -> dict[str, Any]:
    """Stage, state and main numbers of the run, for the top of the page."""
    steps = (config or {}).get("steps")
    done = rows[-1]["step"] if rows else 0
    times = [row["wall_time"] for row in rows if is_number(row.get("wall_time"))]
    latest = {name: value for row in rows for name, value in row.items() if is_number(value)}
    facts = [("step", f"{done:,}" + (f" of {steps:,}" if is_number(steps) else ""))]
    for name, label in (
        ("eval/psnr", "PSNR, evaluation (dB)"),
        ("train/psnr", "PSNR, training batch (dB)"),
        ("eval/ssim", "SSIM, evaluation"),
        ("eval/usage", "codes in use, evaluation"),
        ("eval/perplexity", "perplexity, evaluation"),
        ("eval/cross_entropy", "cross-entropy, evaluation (nats)"),
        ("eval/top1", "top-1 accuracy, evaluation"),
        ("eval/reward_share", "share of the best reward, evaluation"),
        ("eval/reward_share_uniform", "that of the best uniform assignment"),
        ("train/loss", "loss"),
    ):
        if name in latest:
            facts.append((label, FORMATS.get(name.partition("/")[2], "{:.4g}").format(latest[name])))
    speed = [y for _, y in _throughput(config, rows) if y is not None]
    if speed:
        facts.append(("clips per second (median)", f"{float(np.median(speed)):.3g}"))
    if (share := _goodput(rows)) is not None:
        facts.append(("goodput, with pauses and restarts", f"{share:.1%}"))
    return {
        "stage": (config or {}).get("stage", "run"),
        "finished": is_number(steps) and done >= steps,
        "when": f"{_time(times[0])} to {_time(times[-1])}" if times else "",
        "facts_of_run": facts,
    }


def _panels(config: Mapping | None, rows: list[dict]) -> list[Chart]:
    named = ((name, value) for row in rows for name, value in row.items() if "/" in name)
    scalars = {name for name, value in named if value is None or is_number(value)}
    panels, shown, limits = [], set(), (0, rows[-1]["step"] if rows else 0)
    for title, (unit, names) in _scalars_of_panels().items():
        present = {name: label for name, label in names.items() if name in scalars}
        shown |= present.keys()
        if present:
            series = [_series(rows, name, label) for name, label in present.items()]
            panels.append(Chart(title, title, series, y_label=unit, x_limits=limits))
    speed = _throughput(config, rows)
    if speed:
        panels.append(Chart("speed", "Throughput", [Series("", speed)], y_label="clips/s", x_limits=limits))
    rest = sorted(scalars - shown)
    return panels + [Chart(name, name, [_series(rows, name, "")], x_limits=limits) for name in rest]


def _scalars_of_panels() -> dict[str, tuple[str, dict[str, str]]]:
    """(unit, {scalar: label}) of each panel, by title."""
    found = {title: (unit, dict(names)) for title, unit, names in PANELS}
    for metric in every_metric():
        for title, unit, labels in metric.panels:
            _, names = found.setdefault(title, (unit, {}))
            names |= {f"eval/{scalar}": label for scalar, label in labels.items()}
    return found


def _series(rows: list[dict], name: str, label: str) -> Series:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return Series(label, points, dots=name.startswith("eval/"))


def _throughput(config: Mapping | None, rows: list[dict]) -> list[tuple[int, float | None]]:
    """Clips per second between logged steps, with evaluations, saves and pauses; None if the clock went backward."""
    size = dict(flat(config or {})).get("data.batch_size")
    timed = [row for row in rows if is_number(row.get("wall_time")) and "train/loss" in row]
    if not is_number(size) or len(timed) < 2:
        return []
    points = []
    for before, row in zip(timed, timed[1:], strict=False):
        seconds = row["wall_time"] - before["wall_time"]
        clips = float(size) * (row["step"] - before["step"])
        points.append((row["step"], clips / seconds if seconds > 0 else None))
    return points


def _goodput(rows: list[dict]) -> float | None:
    """Share of the wall time between the first and the last row that was spent in steps; None if unknown."""
    timed = [row for row in rows if is_number(row.get("time/step")) and is_number(row.get("wall_time"))]
    wall = timed[-1]["wall_time"] - timed[0]["wall_time"] if timed else 0.0
    if wall <= 0:
        return None
    seconds = (row["time/step"] * (row["step"] - before["step"]) for before, row in itertools.pairwise(timed))
    return min(float(sum(seconds)) / wall, 1.0)


def _videos(workdir: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    """Videos in `media/` by kind, at up to `MOST_VIDEOS` steps from first to last, as data URIs."""
    found = []
    for kind, caption in CELLS.items():
        paths = sorted(path for path in (workdir / "media").glob(f"*_{kind}.mp4") if path.is_file())
        if len(paths) > MOST_VIDEOS:
            paths = [paths[i] for i in np.linspace(0, len(paths) - 1, MOST_VIDEOS).round().astype(int)]
        videos = []
        for path in paths:
            try:
                videos.append({"step": _step(path), "uri": charts.data_uri("video/mp4", path.read_bytes())})
            except OSError as error:
                notes.append(f"{path.relative_to(workdir).as_posix()} cannot be read ({reason(error)})")
        if videos:
            found.append({"kind": kind, "caption": caption, "videos": videos})
    return found


def _step(path: pathlib.Path) -> int:
    digits = path.name.partition("_")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _codebook(workdir: pathlib.Path, notes: list[str]) -> dict[str, Any] | None:
    """How often each code was used in the last evaluation before the newest checkpoint; None if unknown."""
    try:
        metadata = checkpoint.read_metadata(workdir) or {}
        counts = np.asarray(metadata.get("code_counts") or [], np.int64)
        if counts.ndim != 1 or (counts < 0).any():
            raise InputError("the code_counts of the newest checkpoint are not counts")
    except _ODD as error:
        notes.append(reason(error))
        return None
    if not counts.sum():
        return None
    ranked = np.sort(counts)[::-1]
    points = [(rank + 1, float(count / counts.sum())) for rank, count in enumerate(ranked) if count]
    level = 1 / len(counts)
    series = [Series("codes by rank", points), Series("uniform", [(1, level), (len(counts), level)])]
    return {
        "step": metadata.get("step"),
        "facts": [
            ("codes", f"{len(counts):,}"),
            ("in use", f"{codebook_usage(counts):.1%}"),
            ("perplexity", f"{perplexity(counts):.1f}"),
            ("KL from uniform (nats)", f"{kl_from_uniform(counts):.3f}"),
            ("most frequent", f"{counts.max() / counts.sum():.2%} of tokens"),
        ],
        "chart": Chart("codebook", "Frequency of the codes", series, x_label="rank", y_label="share of tokens"),
    }


def _results(workdir: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    """Evaluations and analyses in the workdir and its folders."""
    evaluations, analyses = [], []
    for path, held in written_results(workdir, notes):
        name = path.relative_to(workdir).as_posix()
        try:
            if held.get("format") == analysis.FORMAT:
                analyses.append(_analysis(path, name, held))
            elif isinstance(held.get("metrics"), dict):
                evaluations.append(_evaluation(name, held))
        except _ODD as error:
            notes.append(_odd(name, error))
    return {"evaluations": evaluations, "analyses": analyses}


def _odd(name: str, error: Exception) -> str:
    return f"{name} does not have the format that larp-jax writes ({type(error).__name__}: {reason(error)})"


def _drifts(workdir: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    """Facts and charts of how streams changed, of each `drift.json` in the workdir and its folders."""
    found = []
    for path in sorted([*workdir.glob(drift.NUMBERS), *workdir.glob(f"*/{drift.NUMBERS}")]):
        name = path.relative_to(workdir).as_posix()
        if not (held := files.json_object(path)):
            continue  # `written_results` noted why
        try:
            figures = drift.figures(held)
            for chart in figures:
                charts.geometry(chart)
            frames = len(held["stream"]) * held["frames"]
            facts = [("streams", held["videos"]), ("frames of each", frames), ("real clips", held["data"])]
            found.append({"name": name, "window": held["frames"], "facts": facts, "charts": figures})
        except _ODD as error:
            notes.append(_odd(name, error))
    return found


def _code_folders(workdir: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    """Where the codes went, of each folder of codes of different lengths in the workdir."""
    found = []
    for folder in code_lengths.folders(workdir):
        try:
            found.append(code_lengths.described(folder))
        except InputError as error:
            notes.append(reason(error))
    return found


def written_results(workdir: pathlib.Path, notes: list[str]) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
    """Path and contents of the evaluations and analyses in a workdir and its folders; notes what cannot be read."""
    for path in sorted([*workdir.glob("*.json"), *workdir.glob("*/*.json")]):
        try:
            held = read_json(path)
        except (OSError, ValueError) as error:
            notes.append(f"{path.relative_to(workdir).as_posix()} cannot be read ({reason(error)})")
            continue
        if isinstance(held, dict) and isinstance(held.get("protocol"), dict):
            yield path, held


def _evaluation(name: str, held: Mapping) -> dict[str, Any]:
    protocol = dict(held["protocol"])
    definitions = dict(protocol.pop("definitions", {}))
    entropy = held.get("entropy_by_position")
    chart = None
    if entropy:
        series = [Series("", list(enumerate(entropy)), dots=True)]
        chart = Chart("entropy", "Entropy of the codes by position", series, x_label="position", y_label="nats")
        charts.geometry(chart)  # raises here, not in the template, if values are invalid
    return {
        "name": name,
        "metrics": [(metric, value, definitions.get(metric, "")) for metric, value in held["metrics"].items()],
        "protocol": flat({"choice of clips": definitions.get("clips"), **protocol}),
        "chart": chart,
    }


def _analysis(path: pathlib.Path, name: str, held: Mapping) -> dict[str, Any]:
    protocol = dict(held["protocol"])
    definitions = dict(protocol.pop("definitions", {}))
    maps = path.with_name(analysis.MAPS)
    figures = analysis.figures(held)
    for chart in figures:
        charts.geometry(chart)
    positions = len(held["by_position"]["change"])
    return {
        "name": name,
        "summary": list(held["summary"].items()),
        "maps": charts.data_uri("image/png", maps.read_bytes()) if maps.is_file() else None,
        "shown": min(positions, analysis.TILES),
        "positions": positions,
        "charts": figures,
        "definitions": list(definitions.items()),
        "protocol": flat(protocol),
    }


def _settings(config: Mapping | None) -> list[tuple[str, Any, Any]]:
    """(name, value, different value in the published recipe or None) of every setting."""
    if config is None:
        return []
    stage = str(config.get("stage", "tokenizer"))
    published = dict(flat(to_dict(parse_recipe(default_recipe(stage))))) if stage in STAGES else {}
    return [
        (name, value, published.get(name, "–") if published and published.get(name) != value else None)
        for name, value in flat(config)
    ]


def _time(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    except (OverflowError, ValueError, OSError):  # not a valid time
        return str(seconds)
