"""The training step of the tokenizer: independence of the mesh, schedules, sharding of the state."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from larp_jax.config import (
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    PriorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
)
from larp_jax.errors import InputError
from larp_jax.models.lpips import Lpips
from larp_jax.models.next_code import next_code
from larp_jax.runtime import sharding
from larp_jax.training import losses, optim
from larp_jax.training.tokenizer import TokenizerStage

RECIPE = TokenizerRecipe(
    steps=20,
    log_every=2,
    model=TokenizerConfig(
        size="larp_s",
        frames=4,
        resolution=16,
        patch_frames=2,
        num_tokens=8,
        encoder=TransformerConfig(width=32, depth=2, heads=2),
        decoder=TransformerConfig(width=32, depth=2, heads=2),
        quantizer=QuantizerConfig(codebook_size=64, code_dim=4, entropy_weight=0.1, entropy_temperature=0.02),
    ),
    prior=PriorConfig(size="XXS", width=16, depth=2, heads=2),
    # step 0: no discriminator; odd steps: adversarial loss only; even steps: adversarial loss and discriminator update
    discriminator=DiscriminatorConfig(width=16, depth=2, heads=2, patch_frames=2),
    loss=LossConfig(perceptual="none", adversarial_start=1, discriminator_every=2),
    data=DataConfig(batch_size=8),
    # At a higher rate, rounding changes sampled codes within ten steps, because the first steps of Adam are signs.
    optim=OptimConfig(learning_rate=1e-4, multipliers={"prior": 5.0}, warmup_steps=5, ema_decay=0.9),
)


def video(step):
    rng = np.random.default_rng(step)
    return rng.integers(0, 256, (8, *RECIPE.model.clip_shape), dtype=np.uint8)


def run(recipe, shape, steps=4, watch=lambda state: None, start=None):
    """Losses of some steps, and the last state, on a mesh; `watch` is called with each state.

    `start` is the state before the first step; without it, `init` makes one on the mesh, which takes a compilation.
    """
    stage = TokenizerStage(recipe)
    count = int(np.prod(shape))
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], model=shape[2]), jax.devices()[:count])
    key = jax.random.key(0)
    placement = sharding.state_shardings(jax.eval_shape(stage.init, key), mesh)
    with jax.set_mesh(mesh):
        init = jax.jit(stage.init, out_shardings=placement)
        state = init(key) if start is None else jax.device_put(start, placement)
        step = jax.jit(
            stage.train_step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh))
        )
        logs = []
        for i in range(steps):
            watch(jax.device_get(state))
            state, log = step(state, sharding.to_mesh({"video": video(i)}, mesh), jax.random.key(1), {})
            logs.append({name: float(value) for name, value in log.items()})
    assert step._cache_size() == 1  # the discriminator update is not a second program
    return logs, state


STEPS = 10


@functools.cache
def on_one_device():
    """The logs, and the states before and after each step."""
    states = []
    logs, state = run(RECIPE, (1, 1, 1), steps=STEPS, watch=states.append)
    return logs, [*states, jax.device_get(state)]


@pytest.mark.slow
def test_losses_are_the_same_on_a_mesh():
    """On all its axes at once; tests/test_generator_steps.py has meshes of one axis, for the generator."""
    expected, _ = on_one_device()
    logs, state = run(RECIPE, (2, 2, 2), steps=STEPS)
    for one, other in zip(expected, logs, strict=True):
        assert {"loss_adversarial", "loss_discriminator", "loss_lecam"} <= one.keys()
        for name in one:
            if name.startswith(("loss", "logits")):
                np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(state.step) == STEPS
    for part in ("tokenizer/encoder", "discriminator"):
        node = functools.reduce(dict.__getitem__, part.split("/"), state.params)
        kernel = node["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "model")
        moments = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
            if "up" in str(path) and leaf.shape == kernel.shape
        ]
        assert len(moments) >= 2 and all(m.sharding == kernel.sharding for m in moments)


def test_ema_follows_the_weights():
    _, (start, one, *_, last) = on_one_device()
    assert last.ema.keys() == {"tokenizer", "prior"}
    leaf = lambda tree: np.asarray(tree["tokenizer"]["encoder"]["queries"]["table"])  # noqa: E731
    np.testing.assert_allclose(leaf(one.ema), 0.9 * leaf(start.params) + 0.1 * leaf(one.params), rtol=1e-5)
    assert not np.allclose(leaf(last.ema), leaf(last.params))


def test_every_term_is_logged_and_the_total_is_their_weighted_sum():
    logs, _ = on_one_device()
    for log in logs:
        weights = {"loss_reconstruction": 1.0, "loss_quantizer": 0.1, "loss_prior": 0.06, "loss_adversarial": 0.3}
        np.testing.assert_allclose(log["loss"], sum(w * log[name] for name, w in weights.items()), rtol=1e-5)
        for name in ("psnr", "usage_clip", "usage_batch", "perplexity", "kl_from_uniform", "prior_top1", "grad_norm"):
            assert np.isfinite(log[name]), name


def test_steps_of_the_discriminator():
    logs, states = on_one_device()
    assert [log["loss_adversarial"] != 0.0 for log in logs] == [step >= 1 for step in range(STEPS)]
    assert [log["loss_discriminator"] != 0.0 for log in logs] == [step >= 2 for step in range(STEPS)]
    for name in ("loss_discriminator", "loss_lecam", "logits_real", "logits_fake", "lecam_real"):
        assert logs[2][name] == logs[3][name], name  # from the last update
    for side in ("real", "fake"):
        np.testing.assert_allclose(logs[2][f"lecam_{side}"], 0.001 * logs[2][f"logits_{side}"], rtol=1e-4)
    heads = [state.params["discriminator"]["head"]["kernel"] for state in states]
    changes = [np.abs(after - before) for before, after in itertools.pairwise(heads)]
    assert [change.any() for change in changes] == [step in (2, 4, 6, 8) for step in range(STEPS)]
    # its first update is a first step of Adam, at the third of 5 warmup steps: 0.01 + 3 / 5 * 0.99 of the full rate
    np.testing.assert_allclose(changes[2], 3e-5 * 0.604, rtol=0.05)


PLAIN = dataclasses.replace(
    RECIPE,
    model=dataclasses.replace(RECIPE.model, quantizer=QuantizerConfig(kind="vq", codebook_size=64, code_dim=4)),
    prior=dataclasses.replace(RECIPE.prior, dropout=0.0, rounds=1),
    loss=LossConfig(
        reconstruction="l2",
        perceptual="none",
        adversarial="hinge",
        discriminator_every=2,
        lecam_weight=0.0,
        r1_weight=1.0,
    ),
)


@pytest.mark.slow
def test_accumulated_gradients_equal_those_of_the_whole_batch():
    states = []
    whole, state = run(PLAIN, (1, 1, 1), steps=2, watch=states.append)
    assert whole[0]["loss_r1"] > 0
    parts, other = run(dataclasses.replace(PLAIN, accumulate=2), (2, 2, 1), steps=2, start=states[0])
    for i in range(2):
        for name in whole[i].keys() - {"loss_lecam", "ssim"}:  # LeCam takes the relu of means over the clips of a part
            np.testing.assert_allclose(parts[i][name], whole[i][name], rtol=2e-5, atol=1e-6, err_msg=name)
    # Adam's first steps are the sign of the gradient, which rounding decides where it is zero
    state, other = jax.device_get((state.params, other.params))
    close = jax.tree.map(lambda x, y: np.mean(np.abs(x - y) < 1e-5), state, other)
    assert np.mean(jax.tree.leaves(close)) > 0.99


@pytest.mark.slow
def test_perceptual_weights_are_an_argument_and_frames_may_be_sampled(narrow_vgg):
    recipe = dataclasses.replace(
        RECIPE, loss=LossConfig(adversarial_weight=0.0, prior_weight=0.0, perceptual_frames=1, perceptual_weight=2.0)
    )
    stage = TokenizerStage(recipe)
    assert jax.eval_shape(stage.init, jax.random.key(0)).params.keys() == {"tokenizer"}
    frozen = {"lpips": nnx.to_pure_dict(nnx.state(Lpips(rngs=nnx.Rngs(0)), nnx.Param))}
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, stage.frozen_shapes())
    step, state, batch = jax.jit(stage.train_step), jax.jit(stage.init)(jax.random.key(0)), {"video": video(0)}
    _, log = step(state, batch, jax.random.key(1), frozen)
    total = log["loss_reconstruction"] + 0.1 * log["loss_quantizer"] + 2.0 * log["loss_perceptual"]
    np.testing.assert_allclose(log["loss"], total, rtol=1e-5)
    assert log["loss_perceptual"] > 0 and np.isfinite(log["loss"])
    _, blind = step(state, batch, jax.random.key(1), jax.tree.map(jnp.zeros_like, frozen))
    assert blind["loss_perceptual"] == 0 and blind["grad_norm"] != log["grad_norm"]
    _, other = step(state, batch, jax.random.key(2), frozen)
    assert other["loss_perceptual"] != log["loss_perceptual"]  # with another frame


def test_value_and_gradient_of_the_perceptual_loss():
    truth, guess = (np.random.default_rng(seed).random((2, 3, 4, 4, 3), dtype=np.float32) for seed in (0, 1))
    distance = lambda x, y: jnp.sum(jnp.abs(x - y) ** 3, axis=(1, 2, 3))  # noqa: E731
    value, gradient = jax.value_and_grad(lambda x: losses.perceptual_loss(distance, truth, x))(guess)
    plain = lambda guess: jnp.sum(jnp.abs(truth - guess) ** 3, axis=(2, 3, 4)).mean()  # noqa: E731
    np.testing.assert_allclose(value, plain(guess), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(plain)(guess), rtol=1e-5, atol=1e-7)


def test_smoothed_targets_stay_within_their_bounds():
    """For logits far from 0, the binary cross-entropy gives the means of the targets, which are not 1 and 0."""
    real, fake = np.full(20_000, 10.0, np.float32), np.full(20_000, -10.0, np.float32)
    smooth = losses.discriminator_loss("ns_smooth", real, fake, jax.random.key(0))
    noise = 0.15 * np.abs(np.random.default_rng(0).standard_normal(200_000))
    np.testing.assert_allclose(smooth / 10.0, 2 * np.minimum(noise, 0.3).mean(), rtol=0.02)
    sharp = losses.discriminator_loss("ns", real, fake)
    np.testing.assert_allclose(sharp, 2 * np.log1p(np.exp(-10.0)), rtol=1e-3)


def test_ssim_is_logged_in_logged_steps_only():
    logs, _ = on_one_device()
    assert [np.isfinite(log["ssim"]) for log in logs] == [step % 2 == 1 for step in range(STEPS)]


@pytest.mark.slow
def test_a_step_in_half_precision_that_computes_activations_again():
    start = on_one_device()[1][0]
    logs, _ = run(dataclasses.replace(RECIPE, precision="bfloat16", remat="block"), (1, 1, 1), steps=2, start=start)
    assert np.isfinite(logs[-1]["loss"])


def test_clips_must_divide_into_the_discriminators_patches():
    recipe = dataclasses.replace(RECIPE, discriminator=DiscriminatorConfig(patch_frames=3))
    with pytest.raises(InputError, match="4x16x16 are not divisible into discriminator patches of 3x8x8"):
        TokenizerStage(recipe)


def test_learning_rate_warms_up_and_decays_per_step():
    config = OptimConfig(learning_rate=1e-3, warmup_steps=10)
    rate = optim.learning_rate(config, 110)
    np.testing.assert_allclose(rate(0), 1e-5, rtol=1e-5)
    np.testing.assert_allclose(rate(5), (1e-5 + 1e-3) / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(10), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rate(60), 1e-3 * 0.505, rtol=1e-5)
    np.testing.assert_allclose(rate(110), 1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_first_update_is_step_1_of_every_schedule():
    """Learning rate, temperature and mixing ratio, as in the released trainer."""
    quantizer = QuantizerConfig(
        codebook_size=64, code_dim=4, temperature_start=0.3, temperature=0.1, temperature_ramp=0.5
    )

    start = on_one_device()[1][0]
    trained = {"params": start.params, "opt_state": start.opt_state}  # of which this recipe has no discriminator
    without = {name: {k: x for k, x in part.items() if k != "discriminator"} for name, part in trained.items()}
    start = dataclasses.replace(start, **without)

    def first(mix_max):
        recipe = dataclasses.replace(
            RECIPE,
            model=dataclasses.replace(RECIPE.model, quantizer=quantizer),
            prior=dataclasses.replace(RECIPE.prior, mix_max=mix_max, mix_ramp=1 / RECIPE.steps),
            loss=LossConfig(perceptual="none", adversarial_weight=0.0),
        )
        return jax.jit(TokenizerStage(recipe).train_step)(start, {"video": video(0)}, jax.random.key(1), {})[1]

    mixed, plain = first(1.0), first(0.0)
    np.testing.assert_allclose(mixed["temperature"], 0.3 - 0.2 / 10, rtol=1e-5)
    np.testing.assert_allclose(mixed["learning_rate"], 1e-4 * (0.01 + 0.99 / 5), rtol=1e-5)
    assert abs(mixed["loss_prior"] - plain["loss_prior"]) > 1e-5


def test_the_multiplier_of_the_longest_path_applies_and_zero_freezes():
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
    scored = next_code(predicted, targets, codebook, temperature=1.0)
    log_sum = np.log(np.e + 3)
    np.testing.assert_allclose(scored.cross_entropy, np.where(targets == 1, log_sum - 1, log_sum), rtol=1e-6)
    np.testing.assert_array_equal(scored.rank == 0, targets == 1)


@pytest.mark.parametrize(("objective", "detached"), [("code", True), ("latent", False), ("latent", True)])
def test_a_detached_prior_learns_but_does_not_shape_the_codes(objective, detached):
    prior = dataclasses.replace(RECIPE.prior, objective=objective, detached=detached)
    recipe = dataclasses.replace(RECIPE, prior=prior)
    stage = TokenizerStage(dataclasses.replace(recipe, loss=LossConfig(perceptual="none", adversarial_weight=0.0)))
    params = {name: on_one_device()[1][0].params[name] for name in ("tokenizer", "prior")}

    @jax.jit
    def gradient(params):
        def prior_loss(params):
            tokenizer = stage.module("tokenizer", params)
            quantized = tokenizer.quantize(jnp.asarray(video(0), jnp.float32) / 255, key=jax.random.key(1))
            terms = stage._prior_losses(params, quantized, tokenizer.quantizer.codebook, 5, jax.random.key(2))
            return terms["loss_prior"]

        return jax.grad(prior_loss)(params)

    norms = {name: float(optax.tree.norm(tree)) for name, tree in gradient(params).items()}
    assert norms["prior"] > 0
    assert (norms["tokenizer"] == 0) == detached
