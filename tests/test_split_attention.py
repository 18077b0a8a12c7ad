"""Attention by blocks on meshes: the same values, nothing gathered, and the kernel of TPUs in interpret mode."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas
from jax.sharding import NamedSharding, PartitionSpec as P

from larp_jax.config import MeshConfig, TransformerConfig
from larp_jax.models import attention
from larp_jax.models.attention import Blocks
from larp_jax.models.layers import Transformer
from larp_jax.runtime import sharding
from larp_jax.tools import hlo

ROOT = pathlib.Path(__file__).parents[1]
ROWS, LENGTH, WIDTH, HEADS = 8, 512, 64, 2
QUERIES = ROWS // 4 * LENGTH * WIDTH  # numbers in the queries of a pair of devices that share clips


def compiled(devices, dtype):
    """The gradient of a transformer with blocks on a mesh of 2x2x2, compiled; and its parameters and arguments."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2), devices)
    make = functools.partial(Transformer, TransformerConfig(width=WIDTH, depth=2, heads=HEADS), dtype=dtype)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(params)

    def loss(params, x, of):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(x, Blocks(of, 4))))

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placement, batch = sharding.param_shardings(params, mesh), NamedSharding(mesh, sharding.BATCH)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32, sharding=batch)
    of = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(NamedSharding(mesh, P()), placement))
        return step.lower(jax.tree.map(placed, params, placement), x, of).compile(), make, loss


def moved(text, bytes_each):
    """The collectives of a program that move as much as the queries of a pair of devices, apart from sums."""
    kinds = "all-gather", "all-to-all", "collective-permute"
    found = hlo.Program(text).collectives()
    assert found
    return [[c.kind, c.bytes] for c in found if c.kind in kinds and c.bytes >= QUERIES * bytes_each]


def some_blocks(rows, length):
    """Blocks 0 to 3 in any order, [rows, length]."""
    return jax.random.randint(jax.random.key(5), (rows, length), 0, 4)


def test_a_mesh_changes_no_values_and_gathers_no_queries():
    program, make, loss = compiled(jax.devices(), jnp.float32)
    assert not moved(program.as_text(), 4)
    params = nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(0))))
    x, of = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH)), some_blocks(ROWS, LENGTH)
    there = jax.device_put((params, x, of), program.input_shardings[0])
    found, expected = program(*there), jax.jit(jax.value_and_grad(loss))(params, x, of)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "heads"), [(3, 4), (8, 3)])
def test_what_the_mesh_does_not_divide_stays_whole(rows, heads):
    q, k, v = jax.random.normal(jax.random.key(0), (3, rows, 8, heads, 4))
    blocks = Blocks(some_blocks(rows, 8), 4)
    expected = attention.attention(q, k, v, blocks=blocks)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        found = jax.jit(attention.attention)(q, k, v, blocks=blocks)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "width"), [(200, 16), (300, 126)])  # in one piece; in three, with 256 lanes
def test_the_fused_kernel_masks_blocks_by_coordinates(length, width, monkeypatch):
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    q, k, v, weights = jax.random.normal(jax.random.key(0), (4, 1, length, 2, width))
    blocks = Blocks(some_blocks(1, length), 4)

    def ours(q, k, v):
        y = attention._pallas_attention(q, k, v, False, blocks)
        return jnp.sum(y * weights), y

    def plain(q, k, v):
        y = jax.nn.dot_product_attention(q, k, v, mask=attention._visible(blocks.of))
        return jnp.sum(y * weights), y

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (ours, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), found, expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e '.[tpu]'")
def test_tpus_use_the_fused_kernel_and_gather_no_queries():
    """In a process of its own: libtpu cannot be unloaded, and refuses this process's flags for CPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, __file__]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"fused": True, "moved": []}


if __name__ == "__main__":
    from larp_jax.tools.plan import _topology_devices

    text = compiled(_topology_devices("v5e:2x4"), jnp.bfloat16)[0].as_text()
    print(json.dumps({"fused": "tpu_custom_call" in text, "moved": moved(text, 2)}))
