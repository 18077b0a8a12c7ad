"""Measures how fast a generator samples, and what a lower precision changes."""

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from larp_jax.api import LoadedFlow, LoadedGenerator, LoadedTokenizer
from larp_jax.config import AUTO, FlowConfig, GeneratorConfig, MeshConfig
from larp_jax.inference.stream import Stream
from larp_jax.models.condition import Condition
from larp_jax.models.sampling import Plan, Sampled, SamplingOptions
from larp_jax.runtime import rng, sharding
from larp_jax.tools import flops
from larp_jax.tools.benchmark import Ceilings, all_times_in_turns
from larp_jax.weights.checkpoint import Checkpoint


def untrained_generator(
    config: GeneratorConfig | FlowConfig, *, precision: str = "float32", given_frames: int = 0
) -> LoadedGenerator:
    """A generator with random weights, to measure how fast it samples."""
    network = LoadedGenerator.network if config.has_codes else LoadedFlow.network
    params = nnx.to_pure_dict(nnx.state(network(config, rngs=nnx.Rngs(0)), nnx.Param))
    if config.has_codes:
        return LoadedGenerator(config, params, precision=precision, given_frames=given_frames)
    statistics = np.zeros(config.code_dim), np.ones(config.code_dim)
    return LoadedFlow(config, params, statistics=statistics, precision=precision, given_frames=given_frames)


def benchmark_sample(
    generator: LoadedGenerator,
    options: SamplingOptions,
    *,
    tokenizer: LoadedTokenizer | None = None,
    batch_size: int = 8,
    seconds: float = 10.0,
    budget: str = AUTO,
) -> dict[str, Any]:
    """Measures how fast a generator samples on one device.

    Args:
      generator: the generator. Its speed does not depend on its weights, except with windows.
      options: sampling options. Windows of 2, 4, and so on up to `window` are measured beside sampling without.
      tokenizer: if given, the time to the first clip is measured too, which it decodes.
      batch_size: samples per batch.
      seconds: length of the measurement, without compilation and the warm-up of 2 rounds; at least 3 rounds are run.
      budget: how many codes the samples get, for a generator with a ladder, see `LoadedGenerator.sample`.

    Returns:
      The settings, and medians of sampling one code after the other: `tokens_per_second` and `videos_per_second` of
      whole batches, including the prefill; `single_video_seconds` of a batch of one, and the 95th percentile of its
      calls, `single_video_p95_seconds`; `compile_seconds`; `step_ms`, the time for one token of every sample;
      `megabytes_per_step` and `gigaflops_per_step`, the minimum of any implementation (each weight and the filled part
      of the caches read once; products with weights and caches), averaged over the codes; the same per second; the
      ceilings of the device, whose calls alternate with the samples; and the shares of the ceilings that are reached.
      With a ladder, `tokens` is the mean number of codes of the samples, `bucket` the most codes, `single_video_tokens`
      the codes of the single video, and `steps` the codes and lengths of the longest sample, where a batch ends.

      With a tokenizer `first_clip_seconds` and `first_clip_p95_seconds`: from the call to the pixels of one clip on the
      host, with the largest window. For each window W: `window_W_codes_per_pass` and `window_W_tokens_per_second` of
      batches, `window_W_single_codes_per_pass` and `window_W_single_video_seconds`; and the `fastest_window` for a
      single video and the `fastest_window_of_batches`, 1 if none pays.
    """
    config, precision = generator.config, generator.precision
    windows = [2**i for i in range(options.window.bit_length()) if 2**i < options.window] + [options.window]

    def sample(rows, window):
        given, numbers = Condition.zeros(config, rows), np.arange(rows)
        classes = numbers % config.num_classes if config.has_classes else None
        settings = vars(options) | {"window": window, "budget": budget}
        return generator.sample_counted(classes, frames=given.frames, indices=numbers, key=rng.key(0), **settings)

    def first_clip():
        return np.asarray(tokenizer.decode(*sample(1, options.window)[: 1 + bool(config.ladder)]))

    began = time.perf_counter()
    jax.block_until_ready(sample(batch_size, 1))
    first = time.perf_counter() - began
    with jax.default_matmul_precision("float32" if precision == "float32" else "default"):
        ceilings = Ceilings(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), str(generator.dtype))
    calls = ceilings.programs | {"first clip": first_clip} if tokenizer else dict(ceilings.programs)
    for window in windows:
        calls["batch", window] = lambda window=window: sample(batch_size, window)
        calls["single", window] = lambda window=window: sample(1, window)
    taken = all_times_in_turns(calls, seconds)
    times = {name: statistics.median(values) for name, values in taken.items()}
    late = {name: float(np.percentile(values, 95)) for name, values in taken.items()}
    batch, tokens, steps, lengths = times["batch", 1], config.num_tokens, config.num_tokens, {}
    if config.ladder:
        tokens, steps, lengths = _lengths(sample(batch_size, 1), sample(1, 1), config.num_tokens)
    work = _least_work(generator, options.plan(config.symbols), batch_size, steps)
    result = {
        **_described(generator, tokens, lengths, batch_size),
        **options.fitting(config),
        **_device(),
        "tokens_per_second": batch_size * tokens / batch,
        "videos_per_second": batch_size / batch,
        "single_video_seconds": times["single", 1],
        "single_video_p95_seconds": late["single", 1],
        "compile_seconds": first - batch,
        **_rates_per_step(work, batch / steps, ceilings.rates(times)),
    }
    if tokenizer:
        result |= {"first_clip_seconds": times["first clip"], "first_clip_p95_seconds": late["first clip"]}
    if len(windows) > 1:
        passes = {(rows, window): int(sample(rows, window).passes) for rows in (1, batch_size) for window in windows}
        result |= _windows(times, passes, batch_size, config.num_tokens)
    return result


def benchmark_flow(
    generator: LoadedFlow,
    options: SamplingOptions,
    *,
    tokenizer: LoadedTokenizer | None = None,
    batch_size: int = 8,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Measures how fast a flow generator samples on one device.

    Args:
      generator: the generator. Its speed does not depend on its weights.
      options: sampling options.
      tokenizer: if given, the time to the first clip is measured too, which it decodes.
      batch_size: samples per batch.
      seconds: length of the measurement, without compilation and the warm-up of 2 rounds; at least 3 rounds are run.

    Returns:
      The settings, and medians: `videos_per_second` of whole batches; `single_video_seconds` of a batch of one, and the
      95th percentile of its calls, `single_video_p95_seconds`; `compile_seconds`; `passes` through the network;
      `pass_ms`; `gigaflops_per_pass`, counted by `larp_jax.tools.flops`, and per second; the ceilings of the device,
      whose calls alternate with the samples; and `share_of_matmul_ceiling`, which is reached. With a tokenizer
      `first_clip_seconds` and `first_clip_p95_seconds`, from the call to the pixels of one clip on the host.
    """
    config, settings = generator.config, options.fitting(generator.config)

    def sample(rows):
        given, numbers = Condition.zeros(config, rows), np.arange(rows)
        classes = numbers % config.num_classes if config.has_classes else None
        return generator.sample_counted(classes, frames=given.frames, indices=numbers, key=rng.key(0), **settings)

    began = time.perf_counter()
    passes = int(jax.block_until_ready(sample(batch_size)).passes)
    first = time.perf_counter() - began
    with jax.default_matmul_precision("float32" if generator.precision == "float32" else "default"):
        ceilings = Ceilings(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), str(generator.dtype))
    calls = ceilings.programs | {"batch": lambda: sample(batch_size), "single": lambda: sample(1)}
    if tokenizer:
        calls["first clip"] = lambda: np.asarray(tokenizer.decode(*sample(1).arrays.values()))
    taken = all_times_in_turns(calls, seconds)
    times = {name: statistics.median(values) for name, values in taken.items()}
    late = {name: float(np.percentile(values, 95)) for name, values in taken.items()}
    groups = 1 + len(options.plan(config.symbols).scales)
    gigaflops, ceiling = batch_size * groups * flops.flow(config) / 1e9, ceilings.rates(times)
    rate = gigaflops * passes / times["batch"]
    result = {
        "size": config.size,
        "parameters_millions": generator.parameters / 1e6,
        "latents": config.num_tokens,
        "channels": config.code_dim,
        "batch_size": batch_size,
        "precision": generator.precision,
        **settings,
        **_device(),
        "videos_per_second": batch_size / times["batch"],
        "single_video_seconds": times["single"],
        "single_video_p95_seconds": late["single"],
        "compile_seconds": first - times["batch"],
        "passes": passes,
        "pass_ms": 1e3 * times["batch"] / passes,
        "gigaflops_per_pass": gigaflops,
        "gigaflops_per_second": rate,
        **ceiling,
        "share_of_matmul_ceiling": rate / 1e3 / ceiling["ceiling_tflops_second"],
    }
    if tokenizer:
        result |= {"first_clip_seconds": times["first clip"], "first_clip_p95_seconds": late["first clip"]}
    return result


def benchmark_stream(
    generator: LoadedGenerator,
    tokenizer: LoadedTokenizer,
    options: SamplingOptions,
    *,
    seconds: float = 10.0,
    budget: str = AUTO,
) -> dict[str, Any]:
    """Measures how soon and how fast a stream of one video comes, in turns with whole clips of the same model.

    Args:
      generator: as for `larp_jax.Stream`.
      tokenizer: the tokenizer that it was trained with.
      options: sampling options.
      seconds: length of the measurement, without compilation and the warm-up of 2 rounds; at least 3 rounds are run.
      budget: as for `larp_jax.Stream`.

    Returns:
      The settings, and medians from the call to the pixels on the host: `first_frames_seconds` of a new stream to its
      first block, and `clip_seconds` of a clip that begins with the same codes, with the 95th percentiles of both;
      `share_of_clip`, the former over the latter. Of a stream that goes on: `frames_per_second`, all frames over all
      seconds, and `block_p95_seconds`.

    Raises:
      InputError: as for `larp_jax.Stream`.
    """
    config, frames = generator.config, tokenizer.config.frames
    chosen = vars(options) | {"budget": budget}
    given = {"classes": [0] if config.has_classes else None, "indices": [0]}

    def stream(seed=0):
        return Stream(generator, tokenizer, key=rng.key(seed), **given, **chosen)

    def clip():
        key = jax.random.fold_in(rng.key(0), 0)
        sampled = generator.sample_counted(key=key, **given, **chosen)
        return np.asarray(tokenizer.decode(*sampled.arrays.values()))

    endless = stream(1)
    block_frames = next(endless).shape[1]
    for _ in range(config.blocks):  # until everything is compiled
        next(endless)
    calls = {"first": lambda: next(stream()), "clip": clip, "block": lambda: next(endless)}
    taken = all_times_in_turns(calls, seconds)
    first, clip = statistics.median(taken["first"]), statistics.median(taken["clip"])
    late = {name: float(np.percentile(values, 95)) for name, values in taken.items()}
    return {
        "parameters_millions": generator.parameters / 1e6,
        "precision": generator.precision,
        "budget": budget,
        **options.fitting(config),
        **_device(),
        "block_frames": block_frames,
        "clip_frames": frames,
        "first_frames_seconds": first,
        "first_frames_p95_seconds": late["first"],
        "clip_seconds": clip,
        "clip_p95_seconds": late["clip"],
        "share_of_clip": first / clip,
        "frames_per_second": block_frames * len(taken["block"]) / sum(taken["block"]),
        "block_p95_seconds": late["block"],
    }


def precision_change(found: Checkpoint, precision: str) -> dict[str, float]:
    """How a generator's precision changes what it predicts, compared with float32, on 8 samples of its own.

    Returns:
      `logits_deviation`, the root mean square of the change over the standard deviation of the logits, and
      `equal_greedy_codes`, the share of the codes of greedy sampling before the first that differs.
    """
    exact, other = (LoadedGenerator.of(found, precision=p) for p in ("float32", precision))
    config, numbers = exact.config, np.arange(8)
    classes = numbers % config.num_classes if config.has_classes else None
    given = {"classes": classes, "frames": Condition.zeros(config, 8).frames}
    sampled = exact.sample_counted(**given, indices=numbers, key=rng.key(0))
    codes, lengths = sampled.codes, sampled.lengths
    logits, changed = (np.asarray(one.logits(codes, lengths=lengths, **given)) for one in (exact, other))
    if config.ladder:  # what may stand in the sequence, without what follows its end
        ends = np.asarray(lengths).sum(axis=1, keepdims=True) + config.blocks
        within = (np.arange(config.symbols) < ends)[..., None] & np.isfinite(logits)
        logits, changed = logits[within], changed[within]
    given |= {"indices": numbers, "key": rng.key(0), "top_k": 1}
    codes, theirs = (np.asarray(one.sample_counted(**given).codes) for one in (exact, other))
    return {
        "logits_deviation": float(np.sqrt(np.mean(np.square(changed - logits))) / np.std(logits)),
        "equal_greedy_codes": float(np.mean(np.cumprod(codes == theirs, axis=1))),
    }


def _device() -> dict[str, Any]:
    """The device and the number of CPU cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": jax.devices()[0].device_kind, "cores": cores}


def _lengths(samples: Sampled, single: Sampled, bucket: int) -> tuple[float, int, dict[str, int]]:
    """The mean number of codes of samples, the steps that they take, and what the result says of them."""
    steps = int(samples.passes) + 1
    found = {"bucket": bucket, "single_video_tokens": int(single.lengths.sum()), "steps": steps}
    return float(samples.lengths.sum(axis=1).mean()), steps, found


def _described(
    generator: LoadedGenerator, tokens: float, lengths: Mapping[str, float], batch_size: int
) -> dict[str, Any]:
    """The generator and its samples, for the result."""
    return {
        "size": generator.config.size,
        "parameters_millions": generator.parameters / 1e6,
        "tokens": tokens,
        **lengths,
        "vocabulary": generator.config.codebook_size,
        "batch_size": batch_size,
        "precision": generator.precision,
    }


def _rates_per_step(work: tuple[float, float], step: float, ceiling: dict[str, float]) -> dict[str, float]:
    """The least work of a sampling step that takes `step` seconds, its rates, and their shares of the ceilings."""
    megabytes, gigaflops = work
    return {
        "step_ms": 1e3 * step,
        "megabytes_per_step": megabytes,
        "gigabytes_per_second": megabytes / step / 1e3,
        "gigaflops_per_step": gigaflops,
        "gigaflops_per_second": gigaflops / step,
        **ceiling,
        "share_of_bandwidth_ceiling": megabytes / step / 1e3 / ceiling["ceiling_gigabytes_second"],
        "share_of_matmul_ceiling": gigaflops / step / 1e3 / ceiling["ceiling_tflops_second"],
    }


def _windows(times: Mapping, passes: Mapping[tuple[int, int], int], batch_size: int, tokens: int) -> dict[str, float]:
    """Results by window, from the seconds of each program and the passes of the model by (rows, window)."""
    result, windows = {}, sorted({window for _, window in passes})
    for window in windows:
        result |= {
            f"window_{window}_single_codes_per_pass": (tokens - 1) / passes[1, window],
            f"window_{window}_single_video_seconds": times["single", window],
            f"window_{window}_codes_per_pass": (tokens - 1) / passes[batch_size, window],
            f"window_{window}_tokens_per_second": batch_size * tokens / times["batch", window],
        }
    result["fastest_window"] = min(windows, key=lambda window: times["single", window])
    result["fastest_window_of_batches"] = min(windows, key=lambda window: times["batch", window])
    return result


def _least_work(generator: LoadedGenerator, plan: Plan, batch_size: int, steps: int) -> tuple[float, float]:
    """Minimum (megabytes, gigaflops) of a sampling step, averaged over this many."""
    c = generator.config
    head_width = c.width // c.heads
    per_block = c.width * (2 * c.heads + 2 * c.kv_heads) * head_width + 3 * c.width * c.mlp_width
    weights = c.depth * per_block + c.width * c.vocabulary
    rows = batch_size * (1 + len(plan.scales) * min(plan.guided, steps) / steps)
    positions = c.condition_tokens + (steps - 1) / 2
    size = generator.dtype.itemsize
    read = (1 if generator.precision == "int8" else size) * weights
    read += size * rows * positions * c.depth * 2 * c.kv_heads * head_width
    multiplied = rows * (weights + positions * c.depth * 2 * c.width)
    return read / 1e6, 2 * multiplied / 1e9
