"""Conversion of I3D from its public file."""

import os
from collections.abc import Iterator

import numpy as np
from einops import rearrange

from larp_jax.models.i3d import MIXED
from larp_jax.weights.networks import template
from larp_jax.weights.tensors import finished, read_expected

BATCH_NORM_EPSILON = 1e-5  # PyTorch's default, which FVD uses with these weights
COUNTERS = r".+\.num_batches_tracked"


def import_i3d(source: str | os.PathLike, *, batch_norm_epsilon: float = BATCH_NORM_EPSILON) -> dict[str, np.ndarray]:
    """Reads I3D from its public file.

    Args:
      source: RGB weights for Kinetics-400 with the names of pytorch-i3d (`Conv3d_1a_7x7.conv3d.weight`, ...); PyTorch,
        safetensors or npz as for `import_lpips`.
      batch_norm_epsilon: added to the variances by the batch norms of the weights.

    Returns:
      Float32 parameters of `I3d` by path (`conv3d_1a/kernel`), batch norms folded in.

    Raises:
      InputError: the file cannot be read, is a TorchScript archive, or does not contain exactly these tensors.
    """
    ours = template("i3d")
    names = dict(_i3d_convs())
    expected = {"logits.conv3d.weight": (*ours["head/kernel"][::-1], 1, 1, 1), "logits.conv3d.bias": ours["head/bias"]}
    for path, name in names.items():
        t, h, w, inputs, outputs = ours[f"{path}/kernel"]
        expected[f"{name}.conv3d.weight"] = (outputs, inputs, t, h, w)
        expected |= {f"{name}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    tensors = read_expected(source, expected, COUNTERS)

    params = {"head/kernel": rearrange(tensors["logits.conv3d.weight"], "o i 1 1 1 -> i o")}
    params["head/bias"] = tensors["logits.conv3d.bias"]
    for path, name in names.items():
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, bias, mean, variance = (tensors[f"{name}.bn.{part}"].astype(np.float64) for part in parts)
        variance[variance < 0.0] = np.nan  # rejected below, like all values that are not finite
        scale = scale / np.sqrt(variance + batch_norm_epsilon)
        kernel = tensors[f"{name}.conv3d.weight"] * scale[:, None, None, None, None]
        params[f"{path}/kernel"] = rearrange(kernel, "o i t h w -> t h w i o")
        params[f"{path}/bias"] = bias - mean * scale
    return finished(params, str(source))


def _i3d_convs() -> Iterator[tuple[str, str]]:
    """The path here and the name in pytorch-i3d of each convolution with batch norm."""
    yield from {"conv3d_1a": "Conv3d_1a_7x7", "conv3d_2b": "Conv3d_2b_1x1", "conv3d_2c": "Conv3d_2c_3x3"}.items()
    for block in MIXED:
        for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b"):
            yield f"{block}/{branch}", f"{block.capitalize()}.{branch}"
