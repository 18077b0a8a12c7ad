"""Throughput, measured: medians over windows after a warm-up, as dictionaries that print as tables."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from larp_jax.data import ClipSpec, train_batches

WINDOWS = 5
CLIPS_TIMED_ALONE = 16


def benchmark_data(
    spec: str, clip: ClipSpec, *, batch_size: int, workers: int = 0, seconds: float = 10.0
) -> dict[str, Any]:
    """Measures how fast training batches come when nothing else runs.

    Args:
      spec: the data set, as `larp_jax.data.parse_spec` reads it.
      clip: what a clip is.
      batch_size: clips a batch.
      workers: processes that read; 0 reads in threads.
      seconds: how long to measure; opening the data set and the warm-up of 3 batches come on top.

    Returns:
      The settings, and `clips_per_second` (median over 5 windows), `slowest_window` and `fastest_window` (likewise
      clips a second), `first_batch_seconds` (data set opened, workers started, first batch there),
      `read_clip_ms` (one clip in one thread, median) and `videos`.

    Raises:
      InputError: the data set cannot be opened.
    """
    began = time.perf_counter()
    with train_batches(spec, clip, batch_size=batch_size, seed=0, workers=workers) as batches:
        next(batches)
        first_batch = time.perf_counter() - began
        for _ in range(2):
            next(batches)
        rates = [_rate(batches, batch_size, seconds / WINDOWS) for _ in range(WINDOWS)]
        source = batches.source
    rng = np.random.default_rng(0)
    times = []
    for _ in range(CLIPS_TIMED_ALONE):
        began = time.perf_counter()
        source.read_clip(int(rng.integers(len(source))), rng, clip)
        times.append(time.perf_counter() - began)
    return {
        "data": spec,
        "clip": list(clip.shape),
        "batch_size": batch_size,
        "workers": workers,
        "videos": len(source),
        "clips_per_second": statistics.median(rates),
        "slowest_window": min(rates),
        "fastest_window": max(rates),
        "first_batch_seconds": first_batch,
        "read_clip_ms": 1e3 * statistics.median(times),
    }


def _rate(batches, batch_size: int, seconds: float) -> float:
    began, clips = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds or not clips:
        next(batches)
        clips += batch_size
    return clips / elapsed


def format_table(result: Mapping[str, Any]) -> str:
    """A benchmark's result as aligned lines of name and value."""
    width = max(map(len, result))
    return "\n".join(
        f"{name.replace('_', ' '):{width}}  {f'{value:,.2f}' if isinstance(value, float) else value}"
        for name, value in result.items()
    )
