"""Throughput, measured: medians over windows after a warm-up, as dictionaries that print as tables."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from larp_jax.data import ClipSpec, Source, stages, train_batches
from larp_jax.data.pipeline import DrawClip

WINDOWS = 5
CLIPS_TIMED_ALONE = 64


def benchmark_data(
    spec: str,
    clip: ClipSpec,
    *,
    batch_size: int,
    workers: int = 0,
    seconds: float = 10.0,
    model_rate: float | None = None,
) -> dict[str, Any]:
    """Measures how fast training batches come when nothing else runs.

    Args:
      spec: the data set, as `larp_jax.data.parse_spec` reads it.
      clip: what a clip is.
      batch_size: clips a batch.
      workers: processes that read; 0 reads in threads.
      seconds: how long to measure; opening the data set and the warm-up of 3 batches come on top.
      model_rate: clips a second that a model takes, to compare with.

    Returns:
      The settings, and `clips_per_second` (median over 5 windows), `slowest_window` and `fastest_window` (likewise
      clips a second), `cpu_ms` (processor time a clip in this process, which other programs disturb least; None with
      workers), `first_batch_seconds` (data set opened, workers started, first batch there),
      `videos`, and of clips read one by one in one thread: `read_clip_ms` (median), the mean time of each stage of a
      clip until it lies in its batch, `read_ms` (file and container, or record), `decode_ms`, `resize_ms` (with the
      conversion to RGB) and `copy_ms` (everything else), and `bottleneck`, the longest of the four. With a
      `model_rate` also that, `feeds_model` (whether batches come as fast) and `share_of_model_rate`.

    Raises:
      InputError: the data set cannot be opened.
    """
    began = time.perf_counter()
    with train_batches(spec, clip, batch_size=batch_size, seed=0, workers=workers) as batches:
        next(batches)
        first_batch = time.perf_counter() - began
        for _ in range(2):
            next(batches)
        windows = [_measure(batches, batch_size, seconds / WINDOWS) for _ in range(WINDOWS)]
        rates = [clips / elapsed for clips, elapsed, _ in windows]
        source = batches.source
    result = {
        "data": spec,
        "clip": list(clip.shape),
        "batch_size": batch_size,
        "workers": workers,
        "videos": len(source),
        "clips_per_second": statistics.median(rates),
        "slowest_window": min(rates),
        "fastest_window": max(rates),
        "cpu_ms": None if workers else 1e3 * sum(spent for *_, spent in windows) / sum(clips for clips, *_ in windows),
        "first_batch_seconds": first_batch,
        **_time_stages(source, clip),
    }
    if model_rate:
        share = result["clips_per_second"] / model_rate
        result |= {"model_rate": float(model_rate), "feeds_model": share >= 1, "share_of_model_rate": share}
    return result


def _time_stages(source: Source, clip: ClipSpec) -> dict[str, Any]:
    """Milliseconds a clip takes in one thread, in all and by stage, and which stage takes the most."""
    draw = DrawClip(source, clip)
    rows, times = [], []
    with stages.measure() as seconds:
        for number in range(CLIPS_TIMED_ALONE):
            began = time.perf_counter()
            rows.append(draw(number % len(source), np.random.default_rng(number))["video"])
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        np.stack(rows)
        stacking = time.perf_counter() - began
    known = {name: seconds[name] for name in ("read", "decode", "resize")}
    split = known | {"copy": sum(times) + stacking - sum(known.values())}
    return {
        "read_clip_ms": 1e3 * statistics.median(times),
        **{f"{name}_ms": 1e3 * spent / CLIPS_TIMED_ALONE for name, spent in split.items()},
        "bottleneck": max(split, key=split.__getitem__),
    }


def _measure(batches, batch_size: int, seconds: float) -> tuple[int, float, float]:
    """(clips, seconds, seconds of processor time) of so many seconds, and one batch at least."""
    began, spent, clips = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - began) < seconds or not clips:
        next(batches)
        clips += batch_size
    return clips, elapsed, time.process_time() - spent


def format_table(result: Mapping[str, Any]) -> str:
    """A benchmark's result as aligned lines of name and value."""
    width = max(map(len, result))
    return "\n".join(
        f"{name.replace('_', ' '):{width}}  {f'{value:,.2f}' if isinstance(value, float) else value}"
        for name, value in result.items()
    )
