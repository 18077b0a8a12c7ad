"""Shardings of arrays on a mesh: rules by parameter path, kept outside the models.

The mesh has four axes. `data` splits the batch, `fsdp` splits the batch and the parameters, `model` splits the
parameters of single layers (tensor parallelism). `dcn` splits the batch over TPU slices, which a data center network
connects; the other axes lie within a slice, so only sums of gradients cross that network, once a step.
"""

import collections
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

AXES = ("dcn", "data", "fsdp", "model")
MIN_SHARDED = 0.98
NEGLIGIBLE_BYTES = 64e6  # in small models biases and norms are more than 2% of the bytes, which does not matter
BATCH = P(("dcn", "data", "fsdp"))

# The first match applies. A spec is for the last axes; stacked layers have one more in front, which is never split.
RULES = (
    (r"(qkv|gate|up|proj|in_linear|modulation)/kernel", P("fsdp", "model")),
    (r"(out|down|head|out_linear)/kernel", P("model", "fsdp")),
    # by columns: the number of rows, codes and a separator or classes and null, is odd
    (r"(token_embedding|class_embedding|positions|queries)(/table)?$", P(None, ("fsdp", "model"))),
    (r"embedding", P(("fsdp", "model"), None)),
    (r".*", P()),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a configuration over the given (default: all) devices.

    Neighbors in the mesh are close to each other in a TPU slice. An axis may split a physical axis: 8 chips of 4x4x4.
    The configuration is that of one slice; `dcn` is the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = collections.defaultdict(list)
    for device in devices:
        # JAX also numbers the hosts of GPUs as slices, but their axes may span hosts; a single slice has no number
        slices[getattr(device, "slice_index", 0) if device.platform == "tpu" else 0].append(device)
    shape = config.shape(len(devices) // len(slices))
    grids = [
        mesh_utils.create_device_mesh(shape, slices[number], allow_split_physical_axes=True)
        for number in sorted(slices)
    ]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The sharding of one parameter. A mesh axis that does not divide its dimension is left out."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(spec) > len(shape):
        return P()
    spec = (None,) * (len(shape) - len(spec)) + tuple(spec)

    def fits(axes, size):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        for some in (names, names[:1]):  # if two axes do not fit, the first alone
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
    """Shardings of a whole `TrainState`, by the same rules.

    The paths of optimizer state and EMA end with those of their parameters, so they get the same shardings. (Without
    explicit shardings, jit would silently replicate the optimizer state.)
    """
    return param_shardings(shapes, mesh)


def check_sharded(shapes: TrainState, shardings: TrainState, mesh: Mesh) -> float:
    """Fraction of the bytes of parameters, optimizer state and EMA that is sharded over `fsdp`; 1.0 if fsdp is 1.

    Raises:
      InputError: it is below `MIN_SHARDED`, and the replicated rest is not negligible.
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
            f"mesh.fsdp={mesh.shape['fsdp']} shards only {share:.1%} of the parameter and optimizer bytes;"
            f" {sum(whole.values()) / 1e6:,.0f} MB would be replicated on every device, mostly {largest}; choose a"
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
    """Number of devices that a batch is split over."""
    return mesh.shape["dcn"] * mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """`InputError` if the batch, or each of its parts, does not split evenly over the mesh."""
    devices = batch_parts(mesh)
    if batch_size % (devices * accumulate):
        into = f" into accumulate={accumulate} parts" if accumulate > 1 else ""
        over = "dcn x data x fsdp" if mesh.shape["dcn"] > 1 else "data x fsdp"
        raise InputError(f"data.batch_size={batch_size} does not split{into} over {over} = {devices} devices")


def to_mesh(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a batch (NumPy) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def replicate(tree, mesh: Mesh):
    """A pytree of arrays, replicated on every device; each process passes the whole pytree."""
    # through the host, because a process may not be able to read the devices of another
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))


def clip_by_clip(f: Callable, mesh: Mesh) -> Callable:
    """Maps a function of one clip over a batch, with the memory of one clip per device.

    Args:
      f: `f(weights, *arrays)`, with the arrays of one clip.
      mesh: each device computes its rows of the batch one after the other.

    Returns:
      `g(weights, *batches)`, where arrays have a batch axis, for use under `jax.jit`.
    """

    def rows(weights, batches):
        return jax.lax.map(lambda arrays: f(weights, *arrays), batches)

    mapped = jax.shard_map(rows, mesh=mesh, in_specs=(P(), BATCH), out_specs=BATCH)
    return lambda weights, *batches: mapped(weights, batches)
