"""The training step: the same on every mesh, schedules of the step, sharding of the state."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from larp_jax import losses, optim, sharding
from larp_jax.config import (
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    PriorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
)
from larp_jax.steps import TokenizerStage

RECIPE = TokenizerRecipe(
    steps=20,
    model=TokenizerConfig(
        size="larp_s",
        frames=4,
        resolution=16,
        patch_frames=2,
        num_tokens=8,
        encoder=TransformerConfig(width=32, depth=2, heads=2),
        decoder=TransformerConfig(width=32, depth=2, heads=2),
        quantizer=QuantizerConfig(codebook_size=64, code_dim=4, entropy_weight=0.1),
    ),
    prior=PriorConfig(size="XXS", width=16, depth=2, heads=2),
    data=DataConfig(batch_size=8),
    optim=OptimConfig(learning_rate=1e-3, multipliers={"prior": 5.0}, warmup_steps=5, ema_decay=0.9),
)


def video(step):
    rng = np.random.default_rng(step)
    return rng.integers(0, 256, (8, *RECIPE.model.clip_shape), dtype=np.uint8)


def run(recipe, shape, steps=4):
    """Losses of some steps, and the last state, on a mesh."""
    stage = TokenizerStage(recipe)
    count = int(np.prod(shape))
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], model=shape[2]), jax.devices()[:count])
    key = jax.random.key(0)
    placement = sharding.state_shardings(jax.eval_shape(stage.init, key), stage.optimizer, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(stage.init, out_shardings=placement)(key)
        step = jax.jit(
            stage.train_step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh))
        )
        logs = []
        for i in range(steps):
            state, log = step(state, sharding.to_mesh({"video": video(i)}, mesh), jax.random.key(1))
            logs.append({name: float(value) for name, value in log.items()})
    return logs, state


@functools.cache
def on_one_device():
    return run(RECIPE, (1, 1, 1))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_losses_are_the_same_on_every_mesh(shape):
    expected, _ = on_one_device()
    logs, state = run(RECIPE, shape)
    for one, other in zip(expected, logs, strict=True):
        for name in one:
            if name.startswith("loss"):
                np.testing.assert_allclose(other[name], one[name], rtol=1e-5, err_msg=name)
    assert int(state.step) == 4


def test_fsdp_shards_parameters_and_moments_alike():
    _, state = run(RECIPE, (2, 2, 2), steps=1)
    kernel = state.params["tokenizer"]["encoder"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "model")
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "up" in str(path) and "mu" in str(path) and leaf.shape == kernel.shape
    ]
    assert moments and all(m.sharding == kernel.sharding for m in moments)


def test_average_of_weights_trails_them():
    _, state = on_one_device()
    _, one = run(RECIPE, (1, 1, 1), steps=1)
    start = TokenizerStage(RECIPE).init(jax.random.key(0)).params
    leaf = lambda tree: np.asarray(tree["tokenizer"]["encoder"]["queries"]["table"])  # noqa: E731
    np.testing.assert_allclose(leaf(one.ema), 0.9 * leaf(start) + 0.1 * leaf(one.params), rtol=1e-5)
    assert not np.allclose(leaf(state.ema), leaf(state.params))


def test_every_term_is_logged_and_the_total_is_their_weighted_sum():
    logs, _ = on_one_device()
    for log in logs:
        weights = {"loss_reconstruction": 1.0, "loss_quantizer": 0.1, "loss_prior": 0.06}
        np.testing.assert_allclose(log["loss"], sum(w * log[name] for name, w in weights.items()), rtol=1e-5)
        for name in ("psnr", "usage_clip", "usage_batch", "perplexity", "kl_from_uniform", "prior_top1", "grad_norm"):
            assert np.isfinite(log[name]), name


def test_ssim_is_logged_in_logged_steps_only():
    logs, _ = run(dataclasses.replace(RECIPE, log_every=2), (1, 1, 1))
    assert [np.isfinite(log["ssim"]) for log in logs] == [False, True, False, True]


@pytest.mark.parametrize("change", [
    {"loss": LossConfig(prior_weight=0.0)},
    {"loss": LossConfig(reconstruction="l2")},
    {"precision": "bfloat16", "remat": "block"},
])  # fmt: skip
def test_variants_of_the_recipe_take_a_step(change):
    logs, state = run(dataclasses.replace(RECIPE, **change), (1, 1, 1), steps=2)
    assert np.isfinite(logs[-1]["loss"])
    assert ("prior" in state.params) == ("loss" not in change or change["loss"].prior_weight > 0)


def test_learning_rate_warms_up_and_decays_per_step():
    config = OptimConfig(learning_rate=1e-3, warmup_steps=10)
    rate = optim.learning_rate(config, 110)
    np.testing.assert_allclose(rate(0), 1e-5, rtol=1e-5)
    np.testing.assert_allclose(rate(5), (1e-5 + 1e-3) / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(10), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rate(60), 1e-3 * 0.505, rtol=1e-5)
    np.testing.assert_allclose(rate(110), 1e-5, rtol=1e-5)


def test_multiplier_of_the_longest_path_counts_and_zero_freezes():
    rule = optim.scale_by_path({"tokenizer": 2.0, "tokenizer/encoder": 0.0})
    updates = {"tokenizer": {"encoder": np.ones(2), "decoder": np.ones(2)}, "prior": np.ones(2)}
    scaled, _ = rule.update(updates, rule.init(updates))
    assert scaled["tokenizer"]["encoder"].max() == 0
    assert scaled["tokenizer"]["decoder"].min() == 2
    assert scaled["prior"].min() == 1


def test_temperature_and_mixing_follow_the_step():
    model = dataclasses.replace(
        RECIPE.model, quantizer=QuantizerConfig(temperature=0.03, temperature_start=0.3, temperature_ramp=0.5)
    )
    stage = TokenizerStage(dataclasses.replace(RECIPE, model=model))
    np.testing.assert_allclose([stage.temperature(s) for s in (0, 5, 10, 20)], [0.3, 0.165, 0.03, 0.03], rtol=1e-5)
    np.testing.assert_allclose([stage.mix_ratio(s) for s in (0, 3, 6, 20)], [0.0, 0.25, 0.5, 0.5], rtol=1e-5)


def test_prior_loss_averages_rounds_over_all_predicted_positions():
    codebook = np.eye(4, dtype=np.float32)
    predicted = np.broadcast_to(codebook[1], (2, 3, 4))
    targets = np.array([[1, 1, 0], [1, 2, 3]])
    scored = losses.next_code(predicted, targets, codebook, temperature=1.0)
    log_sum = np.log(np.e + 3)
    np.testing.assert_allclose(scored.cross_entropy, np.where(targets == 1, log_sum - 1, log_sum), rtol=1e-6)
    np.testing.assert_array_equal(scored.rank == 0, targets == 1)
