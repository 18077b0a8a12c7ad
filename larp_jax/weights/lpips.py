"""Conversion of LPIPS from its public files."""

import os
from collections.abc import Iterator

import numpy as np
from einops import rearrange

from larp_jax.models.lpips import STAGES
from larp_jax.weights.tensors import finished, read_expected

# Tensors in the public file of VGG16 that LPIPS does not use.
CLASSIFIER = r"classifier\.[036]\.(weight|bias)"


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


def _vgg_convs() -> Iterator[tuple[str, str, int]]:
    """The path here, the name in torchvision and the width of each convolution."""
    index = 0  # in torchvision's sequence, where each is followed by a ReLU and each stage by pooling
    for stage, widths in enumerate(STAGES, 1):
        for i, width in enumerate(widths, 1):
            yield f"conv{stage}_{i}", f"features.{index}", width
            index += 2
        index += 1
