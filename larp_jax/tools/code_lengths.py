"""Where the codes of clips went, for the page of a run: codes by block of frames and over the time of videos."""

import pathlib
from typing import Any

import numpy as np

from larp_jax.data import codes
from larp_jax.data.codes import CodeSet
from larp_jax.files import read_json
from larp_jax.tools.charts import Chart, Series

SHOWN = 3  # videos with the most and with the fewest codes


def folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a workdir that contain codes of different lengths."""
    found = []
    for path in sorted(workdir.glob(f"*/{codes.MANIFEST}")):
        try:
            held = read_json(path)
        except (OSError, ValueError):
            continue  # not a manifest of codes
        if isinstance(held, dict) and held.get("format") == codes.FORMAT and held.get("layout") == codes.PACKED:
            found.append(path.parent)
    return found


def described(folder: pathlib.Path) -> dict[str, Any]:
    """Facts and charts of a folder of packed codes.

    Returns:
      `name`; `facts`, a list of (label, text); `charts`.

    Raises:
      InputError: the folder is incomplete or damaged.
    """
    found = CodeSet(folder)
    rows, lengths = found.manifest["rows"], found.rows["lengths"]
    totals = lengths.sum(axis=1)
    facts = [
        ("clips", f"{len(totals):,}"),
        ("codes of a clip", f"{totals.mean():.1f} on average, {totals.min()} to {totals.max()}"),
    ]
    if "generator_step" in found.manifest:
        facts.insert(1, ("sampled by a generator", f"step {found.manifest['generator_step']:,}"))
    else:
        facts.insert(1, ("budget", str(found.manifest.get("budget") or "the most codes in equal blocks")))
    if found.manifest.get("class_codes"):
        facts.append(("codes by class", codes.describe_class_codes(found.manifest)))
    seconds = np.array([row["frames"] / row["fps"] if row["fps"] > 0 else np.nan for row in rows])
    if np.isfinite(seconds).all():
        facts.append(("codes per second of video", f"{totals.sum() / seconds.sum():.1f}"))
    frames = sum(row["frames"] for row in rows)
    facts.append(("codes per frame", f"{totals.sum() / frames:.2f}"))
    return {"name": folder.name, "facts": facts, "charts": [_by_block(lengths), *_over_time(rows, lengths, found)]}


def _by_block(lengths: np.ndarray) -> Chart:
    """The mean, least and most codes of each block of frames."""
    values = {"mean": lengths.mean(axis=0), "least": lengths.min(axis=0), "most": lengths.max(axis=0)}
    series = [
        Series(name, [(block + 1, float(value)) for block, value in enumerate(row)]) for name, row in values.items()
    ]
    return Chart("blocks", "Codes by block of frames", series, x_label="block", y_label="codes")


def _over_time(rows: list[dict], lengths: np.ndarray, found: CodeSet) -> list[Chart]:
    """Codes per block over the frames of the videos with the fewest and with the most codes per frame."""
    block = found.manifest["clip"][0] // lengths.shape[1]
    videos: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if not row.get("flip") and not row.get("picture"):
            videos.setdefault(row["source"], []).append(number)
    rate = {name: lengths[numbers].mean() for name, numbers in videos.items()}
    ranked = sorted(rate, key=lambda name: rate[name])
    charts = []
    for which, names in (("fewest", ranked[:SHOWN]), ("most", ranked[::-1][:SHOWN])):
        series = []
        for name in names:
            points = []
            for number in videos[name]:
                start = rows[number]["start"]
                for i, length in enumerate(lengths[number].tolist()):  # a step of each block
                    points += [(start + i * block, length), (start + (i + 1) * block, length)]
            series.append(Series(pathlib.PurePosixPath(name).name, points))
        charts.append(Chart(which, f"The videos with the {which} codes", series, x_label="frame", y_label="codes"))
    return charts
