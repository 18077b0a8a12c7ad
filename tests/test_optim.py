"""Optimizers: what Muon updates, and by how much."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from larp_jax.config import OptimConfig, default_recipe, parse_recipe
from larp_jax.errors import InputError
from larp_jax.runtime import sharding
from larp_jax.training import optim
from larp_jax.training.tokenizer import TokenizerStage

RATE = 1e-3
CONFIG = {"learning_rate": RATE, "multipliers": {"prior": 0.5}}


def update(kind, params, grads):
    optimizer = optim.make_optimizer(OptimConfig(kind=kind, **CONFIG), steps=10)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_muon_makes_the_updates_of_kernels_of_blocks_orthogonal():
    draw = np.random.default_rng(0).standard_normal
    params = {
        "encoder": {
            "blocks": {"qkv": {"kernel": draw((2, 8, 24)), "bias": draw((2, 24))}, "norm": {"scale": draw((2, 8))}},
            "head": {"kernel": draw((8, 4))},
        },
        "prior": {"blocks": {"up": {"kernel": draw((2, 32, 8))}}},
    }
    grads = jax.tree.map(lambda x: draw(x.shape).astype("f4"), params)
    muon, adam = (update(kind, params, grads) for kind in ("muon", "adam"))
    for name, side, factor in (("encoder", "qkv", 1.0), ("prior", "up", 0.5)):
        kernel = muon[name]["blocks"][side].pop("kernel")
        adam[name]["blocks"][side].pop("kernel")
        # the Newton-Schulz iteration leaves singular values of 0.7 to 1.2 in place of 1
        values = np.linalg.svd(kernel, compute_uv=False) / (RATE * factor * 0.2 * max(kernel.shape[1:]) ** 0.5)
        assert values.shape == (2, 8) and 0.6 < values.min() and values.max() < 1.3
        # each layer on its own: the direction is that of its gradient
        assert all(np.vdot(kernel[i], grads[name]["blocks"][side]["kernel"][i]) < 0 for i in range(2))
    jax.tree.map(np.testing.assert_array_equal, muon, adam)


def test_the_state_of_muon_is_split_like_its_parameters():
    config = default_recipe()
    config.optim.kind = "muon"
    state = jax.eval_shape(TokenizerStage(parse_recipe(config)).init, jax.random.key(0))
    mesh = AbstractMesh((1, 2, 4, 2), sharding.AXES)
    assert sharding.check_sharded(state, sharding.state_shardings(state, mesh), mesh) >= 0.98
    plain = jax.eval_shape(optax.scale_by_adam().init, state.params)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.opt_state) < 0.8 * size(plain)  # Muon has one moment, Adam two


def test_another_optimizer_is_refused():
    with pytest.raises(InputError, match="optim.kind='sgd' is not known; choose one of adam, muon"):
        OptimConfig(kind="sgd")
