"""Throughput, measured: medians over windows after a warm-up, as dictionaries that print as tables."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.api import LoadedGenerator
from larp_jax.config import GeneratorConfig
from larp_jax.data import ClipSpec, train_batches
from larp_jax.models.generator import Generator
from larp_jax.sampling import SamplingOptions

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


def benchmark_sample(
    config: GeneratorConfig,
    options: SamplingOptions,
    *,
    batch_size: int = 8,
    precision: str = "float32",
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Measures how fast a generator samples on one device, with random weights.

    Args:
      config: the generator's.
      options: of sampling.
      batch_size: samples at a time.
      precision: of the computation.
      seconds: how long to measure; compiling and single videos come on top.

    Returns:
      The settings, and medians: `tokens_per_second` and `videos_per_second` of whole batches, the prefill included;
      `single_video_seconds` of a batch of one; `compile_seconds`; `step_ms` for a token of every sample;
      `megabytes_per_step` and `gigaflops_per_step` that no implementation can do without (every weight read once, the
      filled part of the caches read once; products with weights and caches), averaged over the codes; what these
      come to in a second; what the device does at best (see `bandwidth_ceiling` and `matmul_ceiling`, measured in the
      same run); and the share that is reached.
    """
    params = nnx.to_pure_dict(nnx.state(Generator(config, rngs=nnx.Rngs(0)), nnx.Param))
    generator = LoadedGenerator(config, params, precision=precision)

    def condition(rows):
        zeros = np.zeros((rows, config.num_tokens), np.int32)
        return {"condition": zeros} if config.frame_prediction else {"classes": zeros[:, 0]}

    def once(rows):
        began = time.perf_counter()
        generator.sample(**condition(rows), key=jax.random.key(0), **vars(options)).block_until_ready()
        return time.perf_counter() - began

    def median_time(rows):
        first = once(rows)
        return first, statistics.median(_repeat(lambda: once(rows), seconds / 2))

    first, batch_seconds = median_time(batch_size)
    _, single = median_time(1)
    bandwidth, matmul = bandwidth_ceiling(), matmul_ceiling(precision)
    step = batch_seconds / config.num_tokens
    megabytes, gigaflops = _least_work(config, options, batch_size, jnp.dtype(precision).itemsize)
    return {
        "size": config.size,
        "parameters_millions": sum(x.size for x in jax.tree.leaves(params)) / 1e6,
        "tokens": config.num_tokens,
        "vocabulary": config.codebook_size,
        "batch_size": batch_size,
        "precision": precision,
        **vars(options),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "tokens_per_second": batch_size * config.num_tokens / batch_seconds,
        "videos_per_second": batch_size / batch_seconds,
        "single_video_seconds": single,
        "compile_seconds": first - batch_seconds,
        "step_ms": 1e3 * step,
        "megabytes_per_step": megabytes,
        "gigabytes_per_second": megabytes / step / 1e3,
        "ceiling_gigabytes_per_second": bandwidth,
        "share_of_bandwidth_ceiling": megabytes / step / 1e3 / bandwidth,
        "gigaflops_per_step": gigaflops,
        "gigaflops_per_second": gigaflops / step,
        "ceiling_gigaflops_per_second": matmul,
        "share_of_matmul_ceiling": gigaflops / step / matmul,
    }


def _repeat(run: Callable[[], float], seconds: float) -> list[float]:
    """Results of calls, at least three, for so long."""
    began, results = time.perf_counter(), []
    while len(results) < 3 or time.perf_counter() - began < seconds:
        results.append(run())
    return results


def _least_work(config: GeneratorConfig, options: SamplingOptions, batch_size: int, itemsize: int) -> tuple:
    """(megabytes, gigaflops) of a step, on average."""
    c = config
    head_width = c.width // c.heads
    per_block = c.width * (2 * c.heads + 2 * c.kv_heads) * head_width + 3 * c.width * c.mlp_width
    weights = c.depth * per_block + c.width * c.codebook_size
    rows = batch_size * (1 + options.plan(c.num_tokens).guided / c.num_tokens)
    positions = c.condition_tokens + (c.num_tokens - 1) / 2
    read = weights + rows * positions * c.depth * 2 * c.kv_heads * head_width
    multiplied = rows * (weights + positions * c.depth * 2 * c.width)
    return itemsize * read / 1e6, 2 * multiplied / 1e9


def bandwidth_ceiling() -> float:
    """GB/s at which the default device reads memory: the best of three sums over 1 GiB of float32."""
    rows = jnp.ones((1 << 16, 1 << 12), jnp.float32)
    return rows.nbytes / _best_time(jax.jit(lambda x: x.sum(axis=1)), rows) / 1e9


def matmul_ceiling(precision: str = "float32") -> float:
    """Gigaflops a second of the default device in products of square matrices, 4096 wide: the best of three."""
    matrix = jnp.ones((1 << 12, 1 << 12), jnp.dtype(precision))
    with jax.default_matmul_precision("float32" if precision == "float32" else "default"):
        product = jax.jit(lambda x: x @ x)
        return 2 * len(matrix) ** 3 / _best_time(product, matrix) / 1e9


def _best_time(function: Callable, *arguments) -> float:
    def once():
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(3))


def format_table(result: Mapping[str, Any]) -> str:
    """A benchmark's result as aligned lines of name and value."""
    width = max(map(len, result))
    return "\n".join(
        f"{name.replace('_', ' '):{width}}  {f'{value:,.2f}' if isinstance(value, float) else value}"
        for name, value in result.items()
    )
