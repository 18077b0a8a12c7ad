"""Files in the layout of the public weights of LPIPS, I3D and teachers, with the random values of the reference."""

import ast
import json
import math
import pathlib

import numpy as np
from safetensors.numpy import save_file

from larp_jax.models import lpips

VGG_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def fill(shapes: dict[str, tuple], seed: int) -> dict[str, np.ndarray]:
    """Tensors as described in setup.json, sampled in the order of their names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = shapes[name]
        r = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("running_var"):
            tensors[name] = 1 + np.float32(0.1) * np.abs(r)
        elif name.endswith(("running_mean", "bias")):
            tensors[name] = np.float32(0.1) * r
        elif len(shape) == 1:
            tensors[name] = 1 + np.float32(0.1) * r
        else:
            tensors[name] = r * np.float32(math.sqrt(2 / math.prod(shape[1:])))
    return tensors


def vgg_tensors() -> dict[str, np.ndarray]:
    shapes, inputs = {}, 3
    for index, width in zip(VGG_INDICES, (width for stage in lpips.STAGES for width in stage), strict=True):
        shapes |= {f"features.{index}.weight": (width, inputs, 3, 3), f"features.{index}.bias": (width,)}
        inputs = width
    return fill(shapes, 61)


def head_tensors(reference: pathlib.Path) -> dict[str, np.ndarray]:
    ends = np.cumsum([stage[-1] for stage in lpips.STAGES])
    heads = np.split(np.load(reference / "lpips" / "io.npz")["lin"][: ends[-1]], ends[:-1])
    return {f"lin{i}.model.1.weight": head[None, :, None, None] for i, head in enumerate(heads)}


def i3d_tensors(reference: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of I3D, with the counters of batch norms, as in the public file."""
    io = np.load(reference / "i3d" / "io.npz")
    shapes = {str(name): ast.literal_eval(str(shape)) for name, shape in zip(io["names"], io["shapes"], strict=True)}
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    tensors = fill({name: shape for name, shape in shapes.items() if name not in counters}, 63)
    return tensors | {name: np.array(7) for name in counters}


def write_lpips(folder: pathlib.Path, reference: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The files of VGG16 and of the heads."""
    save_file(vgg_tensors(), folder / "vgg16.safetensors")
    save_file(head_tensors(reference), folder / "heads.safetensors")
    return folder / "vgg16.safetensors", folder / "heads.safetensors"


def write_i3d(folder: pathlib.Path, reference: pathlib.Path) -> pathlib.Path:
    save_file(i3d_tensors(reference), folder / "rgb_imagenet.safetensors")
    return folder / "rgb_imagenet.safetensors"


def write_teacher(folder: pathlib.Path, reference: pathlib.Path, case: str) -> pathlib.Path:
    """The folder of a tiny teacher as on the Hugging Face hub: config.json and model.safetensors."""
    setup = json.loads((reference / "teachers" / "setup.json").read_text())["cases"][case]
    folder = folder / case
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(setup["config"]))
    save_file(fill(setup["tensors"], 71), folder / "model.safetensors", {"format": "pt"})
    return folder
