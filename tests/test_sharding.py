"""Sharding rules: which arrays are sharded, and errors if too little is."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from larp_jax.config import MeshConfig, default_recipe, parse_recipe
from larp_jax.errors import InputError
from larp_jax.runtime import sharding
from larp_jax.state import TrainState
from larp_jax.training.generator import GeneratorStage
from larp_jax.training.tokenizer import TokenizerStage


def mesh_of(data, fsdp, model):
    return AbstractMesh((1, data, fsdp, model), sharding.AXES)


@pytest.fixture(scope="module")
def state():
    """Shapes of the state of the published recipe, with EMA: tokenizer, prior, discriminator, optimizer state."""
    config = default_recipe()
    config.optim.ema_decay = 0.999
    return jax.eval_shape(TokenizerStage(parse_recipe(config)).init, jax.random.key(0))


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 128, 1), (2, 2, 2), (16, 16, 1), (1, 64, 4)])
def test_nearly_all_bytes_are_split(state, shape):
    mesh = mesh_of(*shape)
    placement = sharding.state_shardings(state, mesh)
    assert sharding.check_sharded(state, placement, mesh) >= 0.98
    # for each module, and for one device
    for name in ("tokenizer", "prior", "discriminator"):
        part = TrainState(state.step, {name: state.params[name]}, {}, {})
        where = TrainState(placement.step, {name: placement.params[name]}, {}, {})
        assert sharding.check_sharded(part, where, mesh) >= 0.98
    held = total = 0
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placement), strict=True):
        held += np.prod(s.shard_shape(x.shape), dtype=float)
        total += x.size
    assert held / total < 1 / (shape[1] * shape[2]) + 0.02


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (16, 16, 1), (4, 16, 4)])
def test_nearly_all_bytes_of_the_generator_are_split(shape):
    state = jax.eval_shape(GeneratorStage(parse_recipe({"stage": "generator"})).init, jax.random.key(0))
    mesh = mesh_of(*shape)
    assert sharding.check_sharded(state, sharding.state_shardings(state, mesh), mesh) >= 0.98


def test_without_fsdp_nothing_needs_to_be_split(state):
    mesh = mesh_of(8, 1, 1)
    assert sharding.check_sharded(state, sharding.state_shardings(state, mesh), mesh) == 1.0


def test_a_mesh_that_divides_nothing_is_refused(state):
    mesh = mesh_of(1, 7, 1)
    message = r"mesh.fsdp=7 shards only .* MB would be replicated on every device, mostly .*kernel"
    with pytest.raises(InputError, match=message):
        sharding.check_sharded(state, sharding.state_shardings(state, mesh), mesh)


def test_replicated_optimizer_state_is_refused(state):
    mesh = mesh_of(1, 8, 1)
    placement = sharding.state_shardings(state, mesh)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), placement.opt_state)
    with pytest.raises(InputError, match="shards only"):
        sharding.check_sharded(state, dataclasses.replace(placement, opt_state=whole), mesh)


def test_very_small_models_may_be_replicated():
    small = TrainState(
        jax.ShapeDtypeStruct((), np.int32), {"norm": {"scale": jax.ShapeDtypeStruct((64,), np.float32)}}, {}, {}
    )
    mesh = mesh_of(1, 8, 1)
    assert sharding.check_sharded(small, sharding.state_shardings(small, mesh), mesh) == 0.0


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 64, 1), (16, 2, 2), (2, 32, 1)])
def test_a_mesh_axis_may_be_part_of_an_axis_of_the_slice(shape):
    chips = [
        # devices of a mesh must be hashable
        type("Chip", (), dict(id=i, coords=at, core_on_chip=0, platform="tpu", device_kind="TPU v5p"))()
        for i, at in enumerate(itertools.product(range(4), repeat=3))
    ]
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], model=shape[2]), chips)
    assert mesh.devices.shape == (1, *shape) and set(mesh.devices.flat) == set(chips)


def chips_of(slices):
    """Devices of slices of 2x2 chips."""
    return [
        type("Chip", (), dict(id=100 * s + i, coords=(*at, 0), core_on_chip=0, platform="tpu", device_kind="TPU v5e",
                              slice_index=s, process_index=s))()
        for i, at in enumerate(itertools.product(range(2), repeat=2)) for s in slices
    ]  # fmt: skip


def test_slices_split_the_batch_and_nothing_else():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), chips_of([1, 0]))
    assert dict(mesh.shape) == {"dcn": 2, "data": 2, "fsdp": 2, "model": 1}
    for number in (0, 1):
        assert {chip.slice_index for chip in mesh.devices[number].flat} == {number}
    assert sharding.batch_parts(mesh) == 8
    with pytest.raises(InputError, match="does not split over dcn x data x fsdp = 8 devices"):
        sharding.check_batch(12, mesh)
    for shape in ((64, 128), (128, 64)):
        assert "dcn" not in str(sharding.param_spec("blocks/mlp/up/kernel", shape, mesh))
    with pytest.raises(InputError, match="does not match 4 device"):  # the mesh of one slice
        sharding.make_mesh(MeshConfig(data=8), chips_of([0, 1]))


def test_hosts_of_gpus_are_not_slices():
    chips = chips_of([0, 1])
    for chip in chips:
        chip.platform = "gpu"
    assert dict(sharding.make_mesh(MeshConfig(fsdp=8), chips).shape)["fsdp"] == 8
