"""Weights of linear layers in int8: a quarter of the bytes that sampling at a small batch size has to read.

Kernels are rounded to 127 steps on either side of zero, with one scale for each output (symmetric, per channel).
Activations, norms, embeddings and the products themselves stay in floating point.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax.models.layers import Linear

STEPS = 127


def quantize_kernels(params: dict) -> dict:
    """Parameters (plain nested dictionaries of NumPy arrays) with every `kernel` in int8 and its `scale` beside it.

    A kernel [..., inputs, outputs] becomes int8, with a scale [..., outputs] float32: `kernel * scale` is the nearest
    to the original.
    """
    quantized = {}
    for name, value in params.items():
        if isinstance(value, dict):
            quantized[name] = quantize_kernels(value)
        elif name == "kernel":
            largest = np.abs(value).max(axis=-2)
            scale = np.where(largest > 0, largest / STEPS, 1.0).astype(np.float32)
            quantized |= {name: np.rint(value / scale[..., None, :]).astype(np.int8), "scale": scale}
        else:
            quantized[name] = value
    return quantized


def quantize_layers(module: nnx.Module) -> None:
    """Makes the linear layers of an abstract module (`nnx.eval_shape`) those of `quantize_kernels`."""
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, Linear):
            shape = layer.kernel.shape
            layer.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.int8))
            layer.scale = nnx.Param(jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32))
