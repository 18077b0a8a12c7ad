"""Where arrays live on a mesh: rules as data, beside the models and not in them.

The mesh has three axes. `data` splits the batch, `fsdp` splits the batch and the parameters, `model` splits the
parameters of single layers (tensor parallelism).
"""

import re
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from larp_jax.config import MeshConfig
from larp_jax.errors import InputError
from larp_jax.models.paths import path_name
from larp_jax.state import TrainState

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "model")
MIN_SHARDED = 0.98
NEGLIGIBLE_BYTES = 64e6  # biases and norms make up more than 2 % of models so small that it does not matter
BATCH = P(("data", "fsdp"))

# First match wins. A spec speaks of the trailing axes; stacked layers have one more in front, never split.
RULES = (
    (r"(qkv|gate|up|proj|in_linear)/kernel", P("fsdp", "model")),
    (r"(out|down|head|out_linear)/kernel", P("model", "fsdp")),
    # by columns: the rows of codes and a separator, or of classes and null, are odd numbers
    (r"(token_embedding|class_embedding|positions|queries)(/table)?$", P(None, ("fsdp", "model"))),
    (r"embedding", P(("fsdp", "model"), None)),
    (r".*", P()),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a configuration over the given (default: all) devices.

    Neighbours in the mesh lie near each other in a slice of TPUs, of which an axis may take parts: 8 chips of 4x4x4.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The placement of one parameter. An axis that does not divide its dimension is left out."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(spec) > len(shape):
        return P()
    spec = (None,) * (len(shape) - len(spec)) + tuple(spec)

    def fits(axes, size):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        for some in (names, names[:1]):  # of two axes at least the first
            parts = int(np.prod([mesh.shape[n] for n in some]))
            if parts > 1 and size % parts == 0:
                return some if len(some) > 1 else some[0]
        return None

    return P(*(fits(axes, size) for axes, size in zip(spec, shape, strict=True)))


def param_shardings(shapes: Tree, mesh: Mesh) -> Tree:
    """A tree of `NamedSharding` for a tree of parameters (arrays or `ShapeDtypeStruct`s)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path_name(path), x.shape, mesh)), shapes
    )


def state_shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a whole `TrainState`, all by the same rules.

    The paths of moments and averages end with those of their parameters, so they lie with them. (Without being told,
    jit would silently leave every Adam moment replicated.)
    """
    return param_shardings(shapes, mesh)


def check_sharded(shapes: TrainState, shardings: TrainState, mesh: Mesh) -> float:
    """Of the bytes of parameters, optimiser and average the share that lies split over `fsdp`; 1 where that is 1.

    Raises:
      InputError: it is below `MIN_SHARDED`, and what every device would hold whole is not negligible.
    """
    if mesh.shape["fsdp"] == 1:
        return 1.0
    sizes = {}
    for (path, x), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        names = [name for axes in sharding.spec if axes for name in ((axes,) if isinstance(axes, str) else axes)]
        sizes[path_name(path)] = (x.size * x.dtype.itemsize, "fsdp" in names)
    total = sum(size for size, _ in sizes.values())
    whole = {name: size for name, (size, is_split) in sizes.items() if not is_split}
    share = 1.0 - sum(whole.values()) / total
    if share < MIN_SHARDED and sum(whole.values()) > NEGLIGIBLE_BYTES:
        largest = max(whole, key=whole.get)
        raise InputError(
            f"mesh.fsdp={mesh.shape['fsdp']} splits only {share:.1%} of the bytes of parameters and optimiser, and"
            f" {sum(whole.values()) / 1e6:,.0f} MB would lie whole on every device, {largest} above all; choose a"
            " number that divides the widths, or mesh.fsdp=1"
        )
    return share


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over `data` and `fsdp` along their first axis."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_parts(mesh: Mesh) -> int:
    """Devices that a batch is split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """`InputError` where the batch, or each of its parts, does not split evenly over the mesh."""
    devices = batch_parts(mesh)
    if batch_size % (devices * accumulate):
        into = f" into accumulate={accumulate} parts" if accumulate > 1 else ""
        raise InputError(f"data.batch_size={batch_size} does not split{into} over data x fsdp = {devices} devices")


def to_mesh(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a batch (NumPy) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def replicate(tree, mesh: Mesh):
    """A pytree of arrays as whole copies on every device; each process gives all of it."""
    # through the host, because devices of one process may not be able to reach those of another
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))


def clip_by_clip(f: Callable, mesh: Mesh) -> Callable:
    """A function of one clip as one of a batch, in the memory that one clip takes on each device.

    Args:
      f: `f(weights, *arrays)` of the arrays of one clip.
      mesh: whose devices go through their rows of the batch, one after the other.

    Returns:
      `g(weights, *batches)` of the same with a batch axis, for use under `jax.jit`.
    """

    def rows(weights, batches):
        return jax.lax.map(lambda arrays: f(weights, *arrays), batches)

    mapped = jax.shard_map(rows, mesh=mesh, in_specs=(P(), BATCH), out_specs=BATCH)
    return lambda weights, *batches: mapped(weights, batches)
