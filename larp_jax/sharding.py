"""Where arrays live on a mesh: rules as data, beside the models and not in them.

The mesh has three axes. `data` splits the batch, `fsdp` splits the batch and the parameters, `model` splits the
parameters of single layers (tensor parallelism).
"""

import re

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from larp_jax.config import MeshConfig
from larp_jax.errors import InputError
from larp_jax.paths import path_name
from larp_jax.state import TrainState

AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))

# First match wins. A spec speaks of the trailing axes; stacked layers have one more in front, never split.
RULES = (
    (r"(qkv|up|proj|in_linear)/kernel", P("fsdp", "model")),
    (r"(out|down|head|out_linear)/kernel", P("model", "fsdp")),
    (r"embedding", P(("fsdp", "model"), None)),
    (r"(positions|queries)(/table)?$", P(None, ("fsdp", "model"))),
    (r".*", P()),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a configuration over the given (default: all) devices."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The placement of one parameter. An axis that does not divide its dimension is left out."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(spec) > len(shape):
        return P()
    spec = (None,) * (len(shape) - len(spec)) + tuple(spec)

    def fits(axes, size):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = int(np.prod([mesh.shape[n] for n in names]))
        return axes if parts > 1 and size % parts == 0 else None

    return P(*(fits(axes, size) for axes, size in zip(spec, shape, strict=True)))


def param_shardings(shapes: dict, mesh: Mesh) -> dict:
    """A tree of `NamedSharding` for a tree of parameters (arrays or `ShapeDtypeStruct`s)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path_name(path), x.shape, mesh)), shapes
    )


def state_shardings(shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings of a whole `TrainState`: moments and averages lie with their parameters, the rest is replicated."""
    replicated = NamedSharding(mesh, P())
    params = param_shardings(shapes.params, mesh)
    # without this, jit would silently leave every Adam moment replicated
    opt_state = optax.tree.map_params(
        optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: replicated
    )
    return TrainState(replicated, params, opt_state, params if shapes.ema else {})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over `data` and `fsdp` along their first axis."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_parts(mesh: Mesh) -> int:
    """Devices that a batch is split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """`InputError` where the batch does not split evenly over the mesh."""
    parts = batch_parts(mesh)
    if batch_size % parts:
        raise InputError(f"data.batch_size={batch_size} does not split over data x fsdp = {parts} devices")


def to_mesh(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a batch (NumPy) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
