"""The report of `larp-jax prepare`: totals, histograms, skipped videos and duplicates."""

import base64
import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from larp_jax.data.tfds import StoredVideo

DURATIONS = (1, 2, 5, 10, 20, 30, 60, 300)  # seconds: borders between the bars of the histogram
THUMBNAIL = 8  # side of the grayscale thumbnails, three per video, by which videos are compared
# Largest mean difference, in levels of 255, between thumbnails that look alike. Of 16 clips re-encoded at another size
# and low quality (CRF 30), 13 stay below; for pairs with the same person and background but another action, differences
# start at 3.1.
ALIKE = 2.5
MANY_PAIRS = 1000  # largest number of pairs in the report
MANY_BARS = 12  # largest number of bars that are printed


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """Mean green of the cells of a frame: uint8 [H, W, 3] -> uint8 [THUMBNAIL, THUMBNAIL]."""
    height, width = (side // THUMBNAIL for side in frame.shape[:2])
    green = frame[: height * THUMBNAIL, : width * THUMBNAIL, 1]
    return green.reshape(THUMBNAIL, height, THUMBNAIL, width).mean(axis=(1, 3)).round().astype(np.uint8)


def look(thumbnails: Sequence[np.ndarray]) -> str:
    """Signature for finding duplicates: the thumbnails at 1/4, 1/2 and 3/4 of a video, as text."""
    chosen = [thumbnails[round(place * (len(thumbnails) - 1))] for place in (0.25, 0.5, 0.75)]
    return base64.b64encode(np.stack(chosen).tobytes()).decode()


def make_report(
    shards: Sequence[tuple[str, Mapping[str, Any]]],
    label_names: Sequence[str],
    skipped: Sequence[Sequence[str]],
    other_files: Mapping[str, int],
) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
      shards: (split, note) of each shard. A note has `bytes`, `records`, and `videos`, each with its `row` (a
        `StoredVideo`), the number of frames `claimed` by its header, and its `look`.
      label_names: names of the classes.
      skipped: (split, video, reason) of each video that was left out.
      other_files: number of files that are not videos, by suffix.
    """
    splits: dict[str, Any] = {}
    entries = []  # (split, row, look)
    shortened = []
    for split, note in shards:
        totals = splits.setdefault(
            split,
            dict.fromkeys(("videos", "frames", "seconds", "records", "bytes", "bytes_of_originals"), 0)
            | {"durations": dict.fromkeys(map(_duration_bar, range(len(DURATIONS) + 1)), 0), "classes": {}},
        )
        totals["bytes"] += note["bytes"] if note["records"] else 0
        totals["records"] += note["records"]
        for entry in note["videos"]:
            row = StoredVideo(*entry["row"])
            entries.append((split, row, entry["look"]))
            seconds = row.frames / row.fps if row.fps else 0.0
            totals["videos"] += 1
            totals["frames"] += row.frames
            totals["seconds"] += seconds
            totals["bytes_of_originals"] += row.bytes
            if row.fps:
                totals["durations"][_duration_bar(int(np.searchsorted(DURATIONS, seconds, side="right")))] += 1
            name = label_names[row.label] if row.label >= 0 else "(none)"
            totals["classes"][name] = totals["classes"].get(name, 0) + 1
            if row.frames < entry["claimed"]:
                shortened.append([split, row.source, f"{row.frames} of {entry['claimed']} frames"])
    for totals in splits.values():
        totals["seconds"] = round(totals["seconds"], 3)
        totals["classes"] = dict(sorted(totals["classes"].items()))
    reasons = collections.Counter(reason for _, _, reason in skipped)
    return {
        "videos": sum(totals["videos"] for totals in splits.values()),
        "splits": splits,
        "skipped": sorted(map(list, skipped)),
        "skipped_by_reason": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        "shortened": shortened,
        "other_files": dict(other_files),
        "duplicates": _duplicates(entries),
    }


def _duration_bar(number: int) -> str:
    bounds = (0, *DURATIONS)
    return f"{bounds[number]}-{bounds[number + 1]} s" if number < len(DURATIONS) else f"from {DURATIONS[-1]} s"


def _duplicates(entries: Sequence[tuple[str, StoredVideo, str]]) -> dict[str, Any]:
    """Pairs of videos that are the same file or look alike, between and within splits. None is removed."""
    firsts: dict[str, int] = {}  # number of the first video with each hash
    pairs = {}
    for number, (_, row, _) in enumerate(entries):
        if (first := firsts.setdefault(row.sha256, number)) != number:
            pairs[first, number] = "same file"
    numbers = list(firsts.values())
    for first, second in _alike([entries[number][2] for number in numbers]):
        pairs[numbers[first], numbers[second]] = "looks alike"
    found = {"between_splits": [], "within_splits": []}
    for (first, second), what in sorted(pairs.items()):
        (split, row, _), (other, twin, _) = entries[first], entries[second]
        place = "within_splits" if split == other else "between_splits"
        found[place].append([what, split, row.source, other, twin.source])
    counts = {f"{place}_count": len(rows) for place, rows in found.items()}
    return {**counts, **{place: rows[:MANY_PAIRS] for place, rows in found.items()}}


def _alike(looks: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Pairs (i < j) whose looks differ by at most `ALIKE` levels on average."""
    from scipy.spatial import cKDTree

    vectors = np.stack([np.frombuffer(base64.b64decode(text), np.uint8) for text in looks]).astype(np.float32)
    # Uniform images, such as black ones, look alike for any content.
    numbers = np.flatnonzero(vectors.std(axis=1) > 4 * ALIKE)
    if len(numbers) < 2:
        return []
    half = THUMBNAIL // 2
    quadrants = vectors[numbers].reshape(-1, 3, 2, half, 2, half).mean(axis=(3, 5)).reshape(len(numbers), -1)
    # Prefilter by quadrant means: in videos that look alike, each is assumed to differ by at most 2 * ALIKE levels.
    near = cKDTree(quadrants).query_pairs(2 * ALIKE, p=np.inf, output_type="ndarray")
    first, second = numbers[near[:, 0]], numbers[near[:, 1]]
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    return sorted((min(i, j), max(i, j)) for i, j in pairs if np.abs(vectors[i] - vectors[j]).mean() <= ALIKE)


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table for printing."""
    lines = [f"{'split':12} {'videos':>8} {'frames':>10} {'hours':>8} {'classes':>8} {'stored':>9} {'originals':>9}"]
    for split, totals in report["splits"].items():
        lines.append(
            f"{split:12} {totals['videos']:8,} {totals['frames']:10,} {totals['seconds'] / 3600:8.3f} "
            f"{len(totals['classes']):8} {readable(totals['bytes']):>9} {readable(totals['bytes_of_originals']):>9}"
        )
        for title, bars in (("seconds", totals["durations"]), ("classes", totals["classes"])):
            shown = [f"{name.removesuffix(' s')}: {count}" for name, count in bars.items() if count]
            more = f", and {len(shown) - MANY_BARS} more" if len(shown) > MANY_BARS else ""
            lines.append(f"  {title}  {', '.join(shown[:MANY_BARS])}{more}")
    lines.append(f"skipped {len(report['skipped'])}")
    lines += [f"  {count:5}  {reason}" for reason, count in report["skipped_by_reason"].items()]
    if report["shortened"]:
        lines.append(f"shortened by damage {len(report['shortened'])}")
    if report["other_files"]:
        others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in report["other_files"].items())
        lines.append(f"other files {others}")
    for place in ("between_splits", "within_splits"):
        pairs = report["duplicates"][place]
        lines.append(f"duplicates {place.replace('_', ' ')} {report['duplicates'][f'{place}_count']}")
        lines += [f"  {what}: {split} {name} = {other} {twin}" for what, split, name, other, twin in pairs[:5]]
    return "\n".join(lines)


def readable(size: float) -> str:
    """A number of bytes with a unit."""
    power = next((power for power in range(4) if size < 1000 ** (power + 1) * 0.9995), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'KB', 'MB', 'GB', 'TB')[power]}"
