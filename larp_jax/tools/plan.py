"""Memory and time of a training step on other hardware: compiled for TPUs and CPUs, estimated for GPUs."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from larp_jax.errors import InputError, reason
from larp_jax.runtime import rng, sharding
from larp_jax.tools import flops, hlo
from larp_jax.training.stages import TASKS
from larp_jax.weights.networks import teacher_config


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published limits of a chip: bfloat16 FLOP/s, bytes of memory, bytes/s of memory and of links to other chips.

    `network` is its share of the data center network between slices, in bytes/s; 0 if that is not published.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float = 0.0


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "system architecture" (a v4 or v5p chip has two cores that
# work as one device; the network of a chip is that of a pod, divided by its chips). H200: NVIDIA's data sheet of the
# H200 SXM, without sparsity; NVLink in one direction.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9, 12.5e9),
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9),
}
GPUS = ("H200",)
# Share of the published FLOP/s that training of transformers of this size reaches on GPUs, for which nothing is
# compiled; from reports of others, not measured here.
ASSUMED_GPU_SHARE = 0.45


def plan(
    recipe, *, topology: str | None = None, devices: int | None = None, gpus: str | None = None
) -> dict[str, Any]:
    """Estimates memory and time of a training step on one kind of hardware.

    Args:
      recipe: recipe of any stage; its mesh must use all of the hardware.
      topology: TPU slice by its name in libtpu, such as v5e:16x16, or several, such as 2xv5e:16x16; the step is
        compiled for them. The recipe's mesh is that of one slice.
      devices: number of emulated CPU devices; the step is compiled for them.
      gpus: KIND:N, such as H200:8; estimated without compiling.

    Returns:
      Results by name, ready for JSON. `clip_bits` or `clip_floats` is how much a tokenizer encodes a clip to. Memory
      and memory traffic are those of one chip. `flops_step` are the model FLOPs of a step that also updates the
      discriminator, over all chips, counted by `larp_jax.tools.flops`; `flops_compiler` are the FLOPs of one chip as
      counted by XLA, with the body of each loop counted once. `traffic_gb`, `collectives` and, for several slices,
      `network` (transfers between slices) are read from the compiled program, with all branches counted. `step_ms` is
      predicted from the published limits of the chip: the longer of compute and memory traffic, plus collectives and
      transfers, without overlap.

    Raises:
      InputError: the hardware is unknown, the step cannot be compiled for it here, or the recipe does not fit it.
    """
    if recipe.stage not in TASKS:
        raise InputError(f"this version cannot plan stage {recipe.stage!r}; choose from {', '.join(TASKS)}")
    stage = TASKS[recipe.stage].stage_class(recipe)
    kind, chip, mesh = _hardware(recipe, topology, devices, gpus)
    sharding.check_batch(recipe.data.batch_size, mesh, recipe.accumulate)

    shapes = jax.eval_shape(stage.init, rng.key(0))
    placement = sharding.state_shardings(shapes, mesh)
    share = sharding.check_sharded(shapes, placement, mesh)
    batch = batch_shapes(recipe, mesh)
    frozen = stage.frozen_shapes()
    memory = {
        "params": _bytes(shapes.params, placement.params),
        "optimizer": _bytes(shapes.opt_state, placement.opt_state),
        "ema": _bytes(shapes.ema, placement.ema),
        "frozen": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)),
        "batch": sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in batch.values()),
    }
    counts = model_flops(recipe)
    result = {
        "hardware": f"{mesh.size} x {kind}",
        "mesh": dict(mesh.shape),
        "batch_size": recipe.data.batch_size,
        "accumulate": recipe.accumulate,
        "remat": recipe.remat,
        "precision": recipe.precision,
        **({f"clip_{unit}": n for unit, n in recipe.model.size_of_clip.items()} if recipe.stage == "tokenizer" else {}),
        **({"sharded": share} if mesh.shape["fsdp"] > 1 else {}),
        "flops_step": sum(counts.values()) * recipe.data.batch_size,
        "how": "estimated, not compiled" if gpus else "compiled ahead of time",
    }
    if gpus:
        memory["gradients and temporaries"] = memory["params"] + activation_bytes(recipe, mesh)
        compiled, needed = {}, 0.0
    else:
        compiled, temporaries, needed = _compile(stage, shapes, placement, batch, frozen, mesh)
        memory["gradients and temporaries"] = temporaries
    result |= compiled
    total = sum(memory.values())
    result["memory_mb"] = {name: size / 1e6 for name, size in memory.items()} | {"total": total / 1e6}
    if chip is not None:
        result |= _on_chip(recipe, result, mesh, chip, needed, gpus is not None)
    return result


def _on_chip(recipe, result: dict[str, Any], mesh, chip: Chip, needed: float, estimated: bool) -> dict[str, Any]:
    """Whether a planned step fits a chip, and its time there; by name, ready for JSON.

    Args:
      recipe: the recipe of a stage.
      result: what is known of the step so far.
      mesh: the devices.
      chip: their published numbers.
      needed: bytes that the compiler asked for in vain; 0 if it got them.
      estimated: whether the step was not compiled.
    """
    found: dict[str, Any] = {}
    seconds = result["flops_step"] * (4 / 3 if recipe.remat == "block" else 1) / mesh.size / chip.flops
    timed = estimated or "collectives" in result
    if estimated:
        seconds /= ASSUMED_GPU_SHARE
    elif timed:
        wire = sum(c["wire_mb"] for c in result["collectives"]) * 1e6
        found["ms_products"], found["ms_memory"] = 1e3 * seconds, 1e3 * result["traffic_gb"] * 1e9 / chip.bandwidth
        found["ms_collectives"] = 1e3 * wire / chip.links
        seconds = (max(found["ms_products"], found["ms_memory"]) + found["ms_collectives"]) / 1e3
        if result.get("network") and chip.network:
            found["ms_network"] = sum(c["wire_mb"] for c in result["network"]) * 1e9 / chip.network
            seconds += found["ms_network"] / 1e3
    memory = result["memory_mb"]
    found["memory_chip_mb"] = chip.memory / 1e6
    found["fits"] = memory["total"] <= found["memory_chip_mb"] and not needed
    if needed:
        found["memory_needed_mb"] = needed / 1e6
    if timed:
        found["step_ms"] = 1e3 * seconds
        found["clips_per_second"] = recipe.data.batch_size / seconds
        found["mfu"] = result["flops_step"] / mesh.size / chip.flops / seconds
    if not found["fits"]:
        state = 1e6 * sum(memory[name] for name in ("params", "optimizer", "ema"))
        found["change"] = change(recipe, mesh, state, chip)
    return found


def change(recipe, mesh: Mesh | AbstractMesh, state: float, chip: Chip) -> str:
    """The setting to change if a step does not fit into memory: the one that costs least time first."""
    devices = mesh.size // mesh.shape["dcn"]
    if state > chip.memory / 4 and mesh.shape["fsdp"] < devices:
        return f"--config.mesh.data=1 --config.mesh.fsdp={devices // mesh.shape['model']}"
    if recipe.remat != "block":
        return "--config.remat=block"
    parts = recipe.accumulate * 2
    if recipe.data.batch_size % (parts * sharding.batch_parts(mesh)) == 0:
        return f"--config.accumulate={parts}"
    if mesh.shape["fsdp"] < devices:
        return f"--config.mesh.data=1 --config.mesh.fsdp={devices // mesh.shape['model']}"
    return "more chips, or a smaller --config.data.batch_size"


def model_flops(recipe) -> dict[str, float]:
    """FLOPs per clip or sequence of a step of any stage, by part, from `larp_jax.tools.flops`."""
    if recipe.holds == "generator":
        count = flops.generator_train_step if recipe.model.has_codes else flops.flow_train_step
        return count(recipe.model)
    if recipe.stage == "router":
        return flops.router_train_step(recipe.model)
    return flops.train_step(recipe)


def batch_shapes(recipe, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batch of a step.

    Videos, with the features of a teacher if these are read; codes, or latents as they are stored, for a generator; or
    videos and rewards.
    """
    rows = recipe.data.batch_size
    if recipe.holds == "generator":
        tokens, dtype = ("codes", jnp.int32) if recipe.model.has_codes else ("latents", jnp.float16)
        shapes = {tokens: ((rows, *recipe.model.token_shape), dtype), "label": ((rows,), jnp.int32)}
        if recipe.model.has_frames:
            shapes["condition"] = shapes[tokens]
        if recipe.model.ladder:
            shapes["lengths"] = (rows, recipe.model.blocks), jnp.int32
    elif recipe.stage == "router":
        shapes = {"video": ((rows, *recipe.model.clip_shape), jnp.uint8)}
        shapes["rewards"] = ((rows, recipe.model.adaptive.count), jnp.float32)
    else:
        shapes = {"video": ((rows, *recipe.model.clip_shape), jnp.uint8)}
        if recipe.data.has_features:
            places = (*recipe.model.decoder_grid, teacher_config(recipe.loss.alignment).width)
            shapes["features"] = (rows, *places), jnp.float16
    placement = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=placement) for name, shape in shapes.items()}


def activation_bytes(recipe, mesh: Mesh | AbstractMesh) -> float:
    """Bytes kept for the backward pass on each device, estimated for fused attention.

    Per block and per element of a token vector: 30 bytes if computed in 16 bits (Korthikanti et al. 2022, arXiv
    2205.05198, without attention scores), and 8 bytes for the float32 residual stream, which both norms read. If blocks
    are recomputed, 4 bytes of the stream are kept per block, and one block in full. LPIPS keeps every feature map of
    VGG16. A teacher of alignment keeps nothing, the trunk of a discriminator what its blocks keep.
    """
    parts = sharding.batch_parts(mesh) * recipe.accumulate
    width = 2 if recipe.precision == "bfloat16" else 4
    c = recipe.model
    if recipe.holds == "generator":
        stacks, maps = [(c.symbols, c)], 0
        if c.has_codes:
            stacks, maps = [(c.condition_tokens + c.symbols - 1, c)], c.symbols * c.vocabulary * 4
    elif recipe.stage == "router":
        stacks, maps = [(1 + math.prod(c.grid), c)], 0
    else:
        patches = math.prod(c.encoder_grid), math.prod(c.decoder_grid)
        stacks: list = [(patches[1] + c.tokens_beside_patches, c.decoder)]
        if recipe.trained == "all":
            stacks += [(patches[0] + c.tokens_beside_patches, c.encoder)]
        if recipe.loss.prior_weight:
            stacks += [(c.num_tokens, recipe.prior)] * recipe.prior.rounds
        maps = 0
        if recipe.loss.adversarial_weight and recipe.discriminator.kind == "frozen":
            trunk, last = teacher_config(recipe.discriminator.trunk), recipe.discriminator.layers[-1]
            if trunk.family == "vgg16":
                maps += c.frames * flops.vgg_features(flops.seen_size(trunk, c.clip_shape)) * width
            else:
                places, _ = flops.places(trunk, c.clip_shape, last)
                stacks += [(places, dataclasses.replace(trunk, depth=last))]
        elif recipe.loss.adversarial_weight:
            stacks += [(1 + patches[0], recipe.discriminator)] * 2
        if recipe.loss.perceptual != "none":
            frames = recipe.loss.perceptual_frames or c.frames
            maps += frames * flops.vgg_features(c.clip_shape[1:3]) * width
    tokens = 0.0
    for length, config in stacks:
        block = 8 + 30 * width / 2
        kept = config.depth * 4 + block if recipe.remat == "block" else config.depth * block
        tokens += length * config.width * kept
    return recipe.data.batch_size / parts * (tokens + maps)


def _bytes(shapes, shardings) -> int:
    """Bytes on one device."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(x.dtype.itemsize * math.prod(s.shard_shape(x.shape)) for x, s in pairs)


def _compile(stage, shapes, placement, batch, frozen, mesh) -> tuple[dict[str, Any], float, float]:
    """Compiles the step: (results for the plan, bytes of temporaries, bytes needed if memory is too small, else 0)."""
    whole = sharding.replicated(mesh)

    def placed(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def everywhere(tree):
        return placed(tree, jax.tree.map(lambda _: whole, tree))

    key = jax.eval_shape(lambda: rng.key(0))
    with jax.set_mesh(mesh):
        step = jax.jit(stage.train_step, donate_argnums=0, out_shardings=(placement, whole))
        lowered = step.lower(placed(shapes, placement), batch, everywhere(key), everywhere(frozen))
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {}, 0.0, _needed(str(error))
    memory = program.memory_analysis()
    text = hlo.Program(program.as_text())
    found = {
        "flops_compiler": program.cost_analysis()["flops"],
        "traffic_gb": text.traffic() / 1e9,
        "collectives": [_listed(c) for c in text.collectives()],
    }
    if mesh.shape["dcn"] > 1:
        found["network"] = [_listed(c) for c in text.transfers()]
    return found, memory.temp_size_in_bytes, 0.0


def _listed(c: hlo.Collective) -> dict[str, Any]:
    sizes = {"mb_each": c.bytes / 1e6, "wire_mb": c.wire_bytes / 1e6}
    return {"kind": c.kind, "count": c.count, "chips": c.group, **sizes}


def _needed(message: str) -> float:
    """Bytes needed according to an out-of-memory error of the compiler; infinite if the message gives no number."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|[Uu]sed ([\d.]+)([KMGT])", message)
    if not found:
        return math.inf
    number, unit = (group for group in found.groups() if group)
    return float(number) * units[unit]


# ----------------------------------------------------------------------------------------------------------- hardware


def _hardware(recipe, topology: str | None, devices: int | None, gpus: str | None) -> tuple:
    """Name, published numbers (None for CPUs) and mesh of the hardware to plan for."""
    if gpus is not None:
        kind, count = _parse_gpus(gpus)
        return kind, CHIPS[kind], AbstractMesh((1, *recipe.mesh.shape(count)), sharding.AXES)
    if topology is not None:
        chip = _chip(topology)
        return topology, chip, sharding.make_mesh(recipe.mesh, _topology_devices(topology))
    return "CPU, emulated", None, sharding.make_mesh(recipe.mesh, _emulated(devices))


def _parse_gpus(text: str) -> tuple[str, int]:
    kind, _, count = text.partition(":")
    if kind not in GPUS or not (count or "1").isdigit() or not int(count or 1):
        raise InputError(f"--gpus {text} is not known; give KIND:NUMBER, such as {GPUS[0]}:8 ({', '.join(GPUS)})")
    return kind, int(count or 1)


def _chip(topology: str) -> Chip:
    kind = _slices(topology)[1].partition(":")[0]
    if kind not in CHIPS or kind in GPUS:
        tpus = ", ".join(name for name in CHIPS if name not in GPUS)
        raise InputError(f"--topology {topology} is not known; give KIND:SHAPE, such as v5e:4x4 ({tpus})")
    return CHIPS[kind]


def _slices(topology: str) -> tuple[int, str]:
    """Number and name of the slices: (2, "v5e:16x16") for 2xv5e:16x16."""
    found = re.fullmatch(r"(\d{1,4})x(v.*)", topology)
    return (max(int(found[1]), 1), found[2]) if found else (1, topology)


def _topology_devices(topology: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology needs libtpu, which compiles for TPUs on any machine; pip install -e '.[tpu]'")
    # no TPU is used: libtpu must not look for one, report that none exists, or lock it against other programs
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    with contextlib.suppress(RuntimeError):  # JAX is already initialized
        jax.config.update("jax_platforms", "cpu")
    try:
        count, name = _slices(topology)
        more = {"num_slices": count} if count > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"--topology {topology}: libtpu does not support this slice ({reason(error)})") from error


def _emulated(count: int) -> list:
    with contextlib.suppress(RuntimeError):  # JAX is already initialized
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(f"--devices {count}: there are only {len(found)} emulated CPUs in this process")
    return found[:count]


def format_table(result: dict[str, Any]) -> str:
    """A plan as aligned lines of name and value, with one line for the collectives of each kind and size."""
    rows = []
    for name, value in result.items():
        if name == "memory_mb":
            rows += [(f"MB of {kind}", f"{size:,.1f}") for kind, size in value.items()]
        elif name in ("collectives", "network"):
            over, prefix = ("slices", "between slices: ") if name == "network" else ("chips", "")
            for c in value:
                text = f"{c['count']} x {c['mb_each']:,.3f} MB over {c['chips']} {over}, {c['wire_mb']:,.1f} MB sent"
                rows.append((prefix + c["kind"], text))
            if not value:
                rows.append((name, "none"))
        elif isinstance(value, float):
            rows.append((name.replace("_", " "), f"{value:.4g}" if abs(value) >= 1e6 else f"{value:,.3f}"))
        else:
            rows.append((name.replace("_", " "), value))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
