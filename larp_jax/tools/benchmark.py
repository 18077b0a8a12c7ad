"""Measures throughput: medians after a warm-up, as dictionaries that `format_table` prints."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.config import MeshConfig, RouterConfig, TokenizerRecipe
from larp_jax.data import ClipSpec, Source, timing, train_batches
from larp_jax.data.pipeline import ReadClip
from larp_jax.models.pixels import as_float_video
from larp_jax.models.router import Router
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng, sharding
from larp_jax.tools import flops
from larp_jax.tools.plan import batch_shapes
from larp_jax.training.common import DTYPES
from larp_jax.training.tokenizer import TokenizerStage

WINDOWS = 5
# Losses without which the step is compiled too: name, setting, its value that turns the loss off. For the discriminator
# (`gan`) that program is timed as well.
TERMS = (
    ("prior", "prior_weight", 0.0),
    ("perceptual", "perceptual", "none"),
    ("alignment", "alignment_weight", 0.0),
)
CLIPS_TIMED_ALONE = 64
# What the ceilings are measured with: the width of the matrices, and the numbers to read over all devices of a CPU or
# on each other device.
CPU_WORK, DEVICE_WORK = (2048, 2**26), (8192, 2**28)


def benchmark_data(
    spec: str,
    clip: ClipSpec,
    *,
    batch_size: int,
    workers: int = 0,
    seconds: float = 10.0,
    model_rate: float | None = None,
) -> dict[str, Any]:
    """Measures how fast training batches are read if nothing else runs.

    Args:
      spec: the data set, in the format of `larp_jax.data.parse_spec`.
      clip: frames and size of a clip.
      batch_size: clips per batch.
      workers: processes that read; 0 reads in threads.
      seconds: length of the measurement, without opening the data set and the warm-up of 3 batches.
      model_rate: clips per second that a model trains on, for comparison.

    Returns:
      The settings and `videos`, their number. For whole batches: `clips_per_second` (median over 5 windows),
      `slowest_window` and `fastest_window` (also clips per second), `cpu_ms` (CPU time per clip in this process, which
      depends least on other programs; None with workers) and `first_batch_seconds` (opening the data set, starting
      workers and reading the first batch). For clips read one by one in one thread: `read_clip_ms` (median), the mean
      time of each stage, `read_ms` (file and container, or record), `decode_ms`, `resize_ms` (including the conversion
      to RGB) and `copy_ms` (everything else until the clip is in its batch), and `bottleneck`, the longest of the
      four. With a `model_rate` also `model_rate`, `feeds_model` (whether batches are read as fast) and
      `share_of_model_rate`.

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
    """Milliseconds per clip in one thread, in total and by stage, and the stage that takes longest."""
    read = ReadClip(source, clip)
    rows, times = [], []
    with timing.measure() as seconds:
        for number in range(CLIPS_TIMED_ALONE):
            began = time.perf_counter()
            rows.append(read(number % len(source), np.random.default_rng(number))["video"])
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
    """Reads batches for this many seconds, at least one: (clips, seconds, seconds of CPU time)."""
    began, spent, clips = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - began) < seconds or not clips:
        next(batches)
        clips += batch_size
    return clips, elapsed, time.process_time() - spent


def benchmark_train(recipe: TokenizerRecipe, *, seconds: float = 10.0, by_term: bool = True) -> dict[str, Any]:
    """Measures the training step on clips of noise: needs no data set and no weights.

    Programs are the step with and without an update of the discriminator, the step without it, the update alone, and
    two for the ceilings, large products and reading memory. Their calls alternate, so other load slows all equally.

    Args:
      recipe: recipe of a tokenizer.
      seconds: length of the measurement, without compilation and the warm-up of 2 rounds; at least 3 rounds are run.
      by_term: whether to compile the step without each of its losses too, for their memory.

    Returns:
      The settings and results by name. Times (`..._ms`) are medians; `step_ms` is the mean over a period of
      `discriminator_every` steps. `gflops_clip...` are model FLOPs of matrix products and convolutions per clip,
      counted by `larp_jax.tools.flops`. `compiler_flops_share` is XLA's count for the whole program divided by ours,
      both with the body of each loop counted once (above 1, because XLA also counts other operations). `mfu` is the
      time of the model FLOPs at the ceiling divided by `step_ms`. `memory_..._mb` are the megabytes of a compiled
      program on one device: arguments, results and temporaries; `memory_without_TERM_mb` is that of the step without
      one of the losses and its networks. With a discriminator, `memory_over_parts` is the memory of the step divided by
      that of both parts together, and `gan_time_ratio` and `gan_flops_ratio` are time and FLOPs of the step divided by
      those of the step without a discriminator.

    Raises:
      InputError: the batch cannot be split over the devices, or sizes do not match.
    """
    mesh = sharding.make_mesh(recipe.mesh)
    sharding.check_batch(recipe.data.batch_size, mesh, recipe.accumulate)
    has_gan = recipe.loss.adversarial_weight > 0
    with jax.set_mesh(mesh):
        whole = _Step(recipe, mesh)
        every = recipe.loss.discriminator_every if has_gan else 1
        first_update = -(-recipe.loss.adversarial_start // every) * every
        ceilings = Ceilings(mesh, recipe.precision)
        programs = ceilings.programs | {"update": lambda: whole(first_update)}
        if every > 1:
            programs["between"] = lambda: whole(first_update + 1)
        if has_gan:
            plain = _Step(_without(recipe, adversarial_weight=0.0), mesh)
            alone = _DiscriminatorStep(recipe, mesh, whole.frozen)
            programs |= {"plain": lambda: plain(first_update), "alone": alone}
        times = _times_in_turns(programs, seconds)

    counts = flops.train_step(recipe)
    clips, parts = recipe.data.batch_size, recipe.accumulate
    per_update = counts.pop("discriminator")
    per_clip = sum(counts.values()) + per_update / every
    step = (times["update"] + (every - 1) * times.get("between", 0.0)) / every
    ceiling = ceilings.rates(times)
    compiled = sum(flops.as_compiled(recipe).values()) * clips / parts / mesh.size
    result = {
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "clip": list(recipe.model.clip_shape),
        "batch_size": clips,
        "accumulate": parts,
        "precision": recipe.precision,
        "step_ms": 1e3 * step,
        "clips_per_second": clips / step,
        "gflops_clip": per_clip / 1e9,
        **{f"gflops_clip_{name}": count / 1e9 for name, count in counts.items()},
        "gflops_clip_discriminator_turn": per_update / 1e9,
        "compiler_flops_share": whole.flops / compiled,
        **ceiling,
        "mfu": per_clip * clips / step / 1e12 / ceiling["ceiling_tflops_second"],
        "memory_step_mb": whole.memory / 1e6,
        **(memory_without_terms(recipe, mesh) if by_term else {}),
    }
    if has_gan:
        result |= {
            "step_discriminator_turn_ms": 1e3 * times["update"],
            "step_between_turns_ms": 1e3 * times.get("between", times["update"]),
            "step_without_gan_ms": 1e3 * times["plain"],
            "discriminator_alone_ms": 1e3 * times["alone"] * parts,
            "gan_time_ratio": step / times["plain"],
            "gan_flops_ratio": per_clip / (per_clip - counts["adversarial"] - per_update / every),
            "memory_without_gan_mb": plain.memory / 1e6,
            "memory_discriminator_alone_mb": alone.memory / 1e6,
            "memory_over_parts": whole.memory / (plain.memory + alone.memory),
        }
    return result


def _without(recipe: TokenizerRecipe, **off) -> TokenizerRecipe:
    """The recipe with these settings of its losses."""
    return dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, **off))


def memory_without_terms(recipe: TokenizerRecipe, mesh) -> dict[str, float]:
    """Megabytes of the compiled step on one device without each of `TERMS` that it has: `memory_without_TERM_mb`."""
    loss = recipe.loss
    with jax.set_mesh(mesh):
        return {
            f"memory_without_{term}_mb": _memory(_without(recipe, **{setting: off}), mesh) / 1e6
            for term, setting, off in TERMS
            if getattr(loss, setting) != off
        }


def _memory(recipe: TokenizerRecipe, mesh) -> float:
    """Bytes of the compiled step on one device; nothing is allocated."""
    stage, key = TokenizerStage(recipe), rng.key(0)
    shapes = jax.eval_shape(stage.init, key)
    placement, replicated = sharding.state_shardings(shapes, mesh), sharding.replicated(mesh)
    inputs = shapes, batch_shapes(recipe, mesh), key, stage.frozen_shapes()
    placements = placement, sharding.batch_sharding(mesh), replicated, replicated
    step = jax.jit(
        stage.train_step, donate_argnums=0, in_shardings=placements, out_shardings=(placement, replicated)
    )
    return _Program(step.lower(*inputs)).memory


def benchmark_codec(
    recipe: TokenizerRecipe,
    what: str,
    *,
    batch_size: int = 8,
    precision: str = "float32",
    seconds: float = 10.0,
    router: RouterConfig | None = None,
) -> dict[str, Any]:
    """Measures how fast a tokenizer with random weights encodes clips of noise or decodes random codes.

    The batch is split over all devices. Its calls alternate with the ceilings, as in `benchmark_train`.

    Args:
      recipe: recipe of a tokenizer.
      what: `encode` (uint8 video to the nearest codes) or `decode` (codes to video in [0, 1]).
      batch_size: clips per call, over all devices; rounded up to a multiple of their number.
      precision: compute precision.
      seconds: length of the measurement, without compilation and the warm-up of 2 rounds; at least 3 rounds are run.
      router: for `encode`, a router for these clips, whose choice is timed in turns with the encoding.

    Returns:
      The settings, and by name: `batch_ms` (median), `clips_per_second`; with a router `router_ms` and `router_share`,
      its time divided by that of the encoding; `gflops_clip`, `compiler_flops_share`,
      `ceiling_tflops_second` and `mfu` as in `benchmark_train`; `memory_mb` of the compiled program on one device; and
      the ceiling of memory bandwidth (`ceiling_gigabytes_second`).
    """
    config = recipe.model
    recipe = dataclasses.replace(recipe, precision=precision, mesh=MeshConfig())
    mesh = sharding.make_mesh(recipe.mesh)
    clips = -(-batch_size // mesh.size) * mesh.size
    make = lambda: Tokenizer(config, rngs=nnx.Rngs(0), dtype=DTYPES[precision])  # noqa: E731
    graphdef, rows = nnx.graphdef(nnx.eval_shape(make)), sharding.batch_sharding(mesh)

    def encode(params, video):
        return nnx.merge(graphdef, params).quantize(as_float_video(video)).tokens

    def decode(params, tokens):
        return jnp.clip(nnx.merge(graphdef, params).decode(tokens), 0.0, 1.0)

    def random_tokens():
        if not config.quantizer.has_codes:
            return jax.random.normal(rng.key(1), (clips, *config.token_shape))
        return jax.random.randint(rng.key(1), (clips, config.num_tokens), 0, config.quantizer.codebook_size)

    accuracy = "float32" if precision == "float32" else "default"
    with jax.set_mesh(mesh), jax.default_matmul_precision(accuracy):
        init = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)), out_shardings=sharding.replicated(mesh))
        params = init()
        if what == "encode":
            function, batch = encode, _noise_clips(recipe, clips, mesh)
        else:
            function, batch = decode, jax.jit(random_tokens, out_shardings=rows)()
        program = _Program(jax.jit(function, out_shardings=rows).lower(params, batch))
        ceilings = Ceilings(mesh, precision)
        calls = ceilings.programs | {"batch": lambda: program.compiled(params, batch)}
        if router is not None:
            calls["router"] = _router_choice(router, batch, precision, mesh)
        times = _times_in_turns(calls, seconds)
    count, ceiling = flops.codec(config)[what], ceilings.rates(times)
    share = times.get("router", 0.0) / times["batch"]
    choice = {} if router is None else {"router_ms": 1e3 * times["router"], "router_share": share}
    return {
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "clip": list(config.clip_shape),
        "tokens": config.num_tokens,
        "batch_size": clips,
        "precision": precision,
        "batch_ms": 1e3 * times["batch"],
        "clips_per_second": clips / times["batch"],
        **choice,
        "gflops_clip": count / 1e9,
        "compiler_flops_share": program.flops / (flops.codec_as_compiled(config)[what] * clips / mesh.size),
        **ceiling,
        "mfu": count * clips / times["batch"] / 1e12 / ceiling["ceiling_tflops_second"],
        "memory_mb": program.memory / 1e6,
    }


def _router_choice(config: RouterConfig, video: jax.Array, precision: str, mesh) -> Callable[[], jax.Array]:
    """A call in which a router with random weights chooses for clips on the mesh."""
    make = lambda: Router(config, rngs=nnx.Rngs(0), dtype=DTYPES[precision])  # noqa: E731
    graphdef = nnx.graphdef(nnx.eval_shape(make))
    params = jax.jit(
        lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)), out_shardings=sharding.replicated(mesh)
    )()
    choose = jax.jit(lambda params, video: nnx.merge(graphdef, params).lengths(as_float_video(video)))
    return lambda: choose(params, video)


class _Program:
    """A compiled function of arrays, its memory, and its FLOPs on one device as counted by XLA."""

    def __init__(self, lowered):
        self.compiled = lowered.compile()
        used = self.compiled.memory_analysis()
        self.memory = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
        self.memory += used.temp_size_in_bytes
        self.flops = self.compiled.cost_analysis()["flops"]


class _Step(_Program):
    """The training step of a recipe, with its own state and batch; called with the step number."""

    def __init__(self, recipe: TokenizerRecipe, mesh):
        stage, self.key = TokenizerStage(recipe), rng.key(0)
        shapes = jax.eval_shape(stage.init, self.key)
        placement, self.replicated = sharding.state_shardings(shapes, mesh), sharding.replicated(mesh)
        self.state = jax.jit(stage.init, out_shardings=placement)(self.key)
        noise = lambda shape: 0.1 * jax.random.normal(self.key, shape.shape, shape.dtype)  # noqa: E731
        make_frozen = lambda: jax.tree.map(noise, stage.frozen_shapes())  # noqa: E731
        self.frozen = jax.jit(make_frozen, out_shardings=self.replicated)()
        self.batch = {"video": _noise_clips(recipe, recipe.data.batch_size, mesh)}
        for name, x in batch_shapes(recipe, mesh).items():
            if name not in self.batch:  # features
                self.batch[name] = jax.jit(lambda x=x: noise(x), out_shardings=x.sharding)()
        step = jax.jit(stage.train_step, donate_argnums=0, out_shardings=(placement, self.replicated))
        super().__init__(step.lower(self.state, self.batch, self.key, self.frozen))

    def __call__(self, number: int):
        number = jax.device_put(jnp.int32(number), self.replicated)
        state = dataclasses.replace(self.state, step=number)
        self.state, logs = self.compiled(state, self.batch, self.key, self.frozen)
        return logs


class _DiscriminatorStep(_Program):
    """The discriminator update on one part of an accumulated batch and the same number of reconstructions."""

    def __init__(self, recipe: TokenizerRecipe, mesh, frozen: dict):
        stage, key = TokenizerStage(recipe), rng.key(0)

        def init(key):
            state = stage.init(key)
            return state.params["discriminator"], state.opt_state["discriminator"]

        def step(params, opt_state, video, reconstruction, key, frozen):
            found = stage.adversary.gradient(params, opt_state, video, reconstruction, key, frozen)
            return stage.adversary.update(params, opt_state, *found)

        shapes = jax.eval_shape(stage.init, key)
        placement = sharding.state_shardings(shapes, mesh)
        placement = placement.params["discriminator"], placement.opt_state["discriminator"]
        self.state = jax.jit(init, out_shardings=placement)(key)
        clips = _noise_clips(recipe, recipe.data.batch_size // recipe.accumulate, mesh)
        video = jax.jit(lambda x: x / jnp.float32(255.0))(clips)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=placement)
        self.others = video, video, key, {name: x for name, x in frozen.items() if name == "trunk"}
        super().__init__(step.lower(*self.state, *self.others))

    def __call__(self):
        self.state = self.compiled(*self.state, *self.others)
        return self.state


def _noise_clips(recipe: TokenizerRecipe, count: int, mesh) -> jax.Array:
    def sample():
        return jax.random.randint(rng.key(1), (count, *recipe.model.clip_shape), 0, 256).astype(jnp.uint8)

    return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))()


class Ceilings:
    """Speed limits of the devices of a mesh, measured on all at once: products of square matrices, reading memory."""

    def __init__(self, mesh, precision: str):
        on_cpu = jax.default_backend() == "cpu"
        width, numbers = CPU_WORK if on_cpu else DEVICE_WORK
        # emulated CPU devices share the cores and the memory of one machine
        share = mesh.size if on_cpu else 1
        count, numbers = max(1, 8 // share), numbers // share
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))

        def full(shape, value, dtype):
            return jax.jit(lambda: jnp.full((mesh.size, *shape), value, dtype), out_shardings=spread)()

        def products(x):  # every entry is 1/width, so the product equals its factors and does not overflow
            return jax.lax.fori_loop(0, count, lambda _, y: jnp.matmul(y, x), x)

        matrix = full((width, width), 1 / width, DTYPES[precision])
        rows = full((numbers >> 12, 1 << 12), 1, jnp.float32)
        multiply = jax.jit(products, out_shardings=spread).lower(matrix).compile()
        read = jax.jit(lambda x: x.sum(axis=-1), out_shardings=spread)
        self.programs = {"products": lambda: multiply(matrix), "reading": lambda: read(rows)}
        self.flops, self.bytes = mesh.size * count * 2.0 * width**3, rows.nbytes

    def rates(self, times: Mapping[str, float]) -> dict[str, float]:
        """Rates over all devices, from the times of the programs."""
        return {
            "ceiling_tflops_second": self.flops / times["products"] / 1e12,
            "ceiling_gigabytes_second": self.bytes / times["reading"] / 1e9,
        }


def _times_in_turns(programs: Mapping[str, Callable], seconds: float) -> dict[str, float]:
    """Median seconds of each program, see `all_times_in_turns`."""
    return {name: statistics.median(taken) for name, taken in all_times_in_turns(programs, seconds).items()}


def all_times_in_turns(programs: Mapping[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call of each program; calls of all alternate, and a call ends when its result is ready."""
    times = {name: [] for name in programs}
    for _ in range(2):
        for call in programs.values():
            jax.block_until_ready(call())
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(taken) < 3 for taken in times.values()):
        for name, call in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    return times


def format_table(result: Mapping[str, Any]) -> str:
    """The result of a benchmark as aligned lines of name and value."""
    width = max(map(len, result))
    return "\n".join(
        f"{name.replace('_', ' '):{width}}  {f'{value:,.2f}' if isinstance(value, float) else value}"
        for name, value in result.items()
    )
