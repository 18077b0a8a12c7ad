"""The generator's training step: loss, independence of the mesh, weight decay, sharding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.config import (
    DataConfig,
    GeneratorConfig,
    GeneratorOptimConfig,
    GeneratorRecipe,
    MeshConfig,
    QuantizerConfig,
    TokenizerConfig,
    TransformerConfig,
)
from larp_jax.errors import InputError
from larp_jax.models.chunks import TOKENS_PER_CHUNK
from larp_jax.models.condition import Condition
from larp_jax.models.generator_codes import with_random_codes
from larp_jax.models.paths import path_name
from larp_jax.models.sequence import join
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import sharding
from larp_jax.training.generator import GeneratorStage

TOKENIZER = TokenizerConfig(
    size="larp_s",
    frames=4,
    resolution=16,
    patch_frames=2,
    num_tokens=TOKENS_PER_CHUNK + 8,  # more than one chunk
    encoder=TransformerConfig(width=16, depth=1, heads=2),
    decoder=TransformerConfig(width=16, depth=1, heads=2),
    quantizer=QuantizerConfig(codebook_size=32, code_dim=4),
)
STEPS = 4

RECIPE = GeneratorRecipe(
    steps=100,
    model=GeneratorConfig(
        width=32, depth=2, heads=2, codebook_size=32, num_tokens=TOKENIZER.num_tokens, num_classes=3, mlp_multiple=32
    ),
    data=DataConfig(batch_size=8),
    optim=GeneratorOptimConfig(learning_rate=1e-2, ema_decay=0.9),
)
DROPOUTS = ("class", "token", "attention", "residual", "mlp", "path")
STILL = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, **{f"{d}_dropout": 0.0 for d in DROPOUTS}))
PREDICTION = dataclasses.replace(
    STILL, cond_frames=2, model=dataclasses.replace(STILL.model, frame_prediction=True, num_classes=1)
)


@functools.cache
def frozen():
    """A tokenizer with random weights."""
    params = nnx.to_pure_dict(nnx.state(Tokenizer(TOKENIZER, rngs=nnx.Rngs(0)), nnx.Param))
    return {"tokenizer": jax.device_get(params)}


def clips(seed=0):
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (8, *TOKENIZER.clip_shape), dtype=np.uint8)
    return {"video": video, "label": np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)}


@functools.cache
def codes_of_clips(recipe):
    return jax.device_get(jax.jit(GeneratorStage(recipe, TOKENIZER).codes)(clips(), frozen()))


def run(recipe, shape=(1, 1, 1), steps=2, from_codes=False):
    """Logs of some steps on the same clips, and the last state."""
    stage = GeneratorStage(recipe, None if from_codes else TOKENIZER)
    batch = codes_of_clips(recipe) if from_codes else clips()
    mesh = MeshConfig(data=shape[0], fsdp=shape[1], model=shape[2])
    mesh = sharding.make_mesh(mesh, jax.devices()[: math.prod(shape)])
    key = jax.random.key(0)
    placement = sharding.state_shardings(jax.eval_shape(stage.init, key), mesh)
    weights = {} if from_codes else frozen()
    weights = jax.device_put(weights, sharding.param_shardings(weights, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(stage.init, out_shardings=placement)(key)
        step = jax.jit(stage.train_step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh)))
        logs = []
        for _ in range(steps):
            state, log = step(state, sharding.to_mesh(batch, mesh), jax.random.key(1), weights)
            logs.append({name: float(value) for name, value in log.items()})
    return logs, state


@functools.cache
def from_clips():
    return run(RECIPE, steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_losses_are_the_same_on_a_mesh(shape):
    expected, _ = from_clips()
    logs, state = run(RECIPE, shape, steps=STEPS)
    for one, other in zip(expected, logs, strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
    assert int(state.step) == STEPS
    if shape == (2, 2, 2):
        kernel = lambda tree: tree["generator"]["blocks"]["mlp"]["gate"]["kernel"]  # noqa: E731
        assert kernel(state.params).sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "model")
        moments = state.opt_state["generator"][1]
        assert kernel(moments.mu).sharding == kernel(moments.nu).sharding == kernel(state.params).sharding


def test_training_from_codes_equals_training_from_their_clips():
    online, state = from_clips()
    offline, other = run(RECIPE, steps=STEPS, from_codes=True)
    for one, two in zip(online, offline, strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), state.params, other.params)


@functools.cache
def memorized():
    return run(STILL, steps=80, from_codes=True)


def test_a_few_clips_can_be_memorized():
    logs, _ = memorized()
    np.testing.assert_allclose(logs[0]["loss"], np.log(32), rtol=1e-4)  # the head starts at zero
    assert logs[-1]["loss"] < 0.5 and logs[-1]["top1"] > 0.9


def test_the_loss_is_the_mean_cross_entropy_of_every_code():
    """Compared with complete logits, for trained weights."""
    stage, batch = GeneratorStage(STILL), codes_of_clips(STILL)
    params = jax.device_get(memorized()[1].params)
    condition = Condition(jnp.asarray(batch["label"]))
    logits = stage.module("generator", params)(condition, jnp.asarray(batch["codes"][:, :-1]))
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["codes"][..., None], axis=-1)[..., 0]
    scored = stage.score(params, batch)
    np.testing.assert_allclose(scored.cross_entropy, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scored.rank == 0, logits.argmax(-1) == batch["codes"])


def random_params(stage):
    """Random parameters of all modules; none are zero as in the initialization."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(stage.init, jax.random.key(0)).params
    return jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)


def test_class_dropout_uses_the_null_class():
    model = dataclasses.replace(STILL.model, class_dropout=0.99)
    stage = GeneratorStage(dataclasses.replace(STILL, model=model))

    @jax.jit
    def gradient(params, batch):
        loss = lambda params: stage.score(params, batch, jax.random.key(0)).cross_entropy.mean()  # noqa: E731
        return jax.grad(loss)(params)["generator"]["class_embedding"]

    def touched(label):
        batch = codes_of_clips(STILL) | {"label": np.full(8, label, np.int32)}
        return (np.abs(gradient(random_params(stage), batch)).max(axis=1) > 0).tolist()

    assert touched(-1) == [False, False, False, True]
    assert touched(0)[1:] == [False, False, True]


def test_random_codes_in_the_context_are_of_a_share_that_decays():
    model = dataclasses.replace(STILL.model, ladder=(2, 4), blocks=2, num_tokens=6)
    lengths = jnp.tile(jnp.array([[2, 4], [4, 2]]), (1000, 1))
    symbols = join(model, jnp.zeros((2000, 6), jnp.int32), lengths)
    noisy = np.asarray(with_random_codes(model, symbols, jax.random.key(0), 0.5))
    is_code = np.asarray(symbols) < model.codebook_size
    np.testing.assert_array_equal(noisy[~is_code], np.asarray(symbols)[~is_code])
    np.testing.assert_allclose((noisy[is_code] > 0).mean(), 0.25 * 31 / 32, atol=0.02)
    np.testing.assert_array_equal(np.unique(noisy[is_code]), np.arange(32))

    stage, batch = GeneratorStage(dataclasses.replace(STILL, context_noise=0.8)), codes_of_clips(STILL)
    shares = [stage.scheduled(step)["context_noise"] for step in (0, 30, 75, 100)]
    np.testing.assert_allclose(shares, [0.8, 0.48, 0, 0], atol=1e-6)
    score = jax.jit(lambda params, batch, key, *noise: stage.score(params, batch, key, *noise).cross_entropy)
    params, key = random_params(stage), jax.random.key(0)
    clean, still, noisy = (score(params, batch, key, *noise) for noise in ((), (0.0,), (1.0,)))
    np.testing.assert_allclose(still, clean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(noisy[:, 0], clean[:, 0], rtol=1e-5, atol=1e-5)  # which has no context
    assert np.mean(np.abs(noisy - clean)[:, 1:] > 1e-3) > 0.9
    state = jax.eval_shape(stage.init, jax.random.key(0))
    _, logs = jax.eval_shape(stage.train_step, state, batch, jax.random.key(0), {})
    assert "context_noise" in logs


def test_weight_decay_is_of_linear_kernels_only():
    params = random_params(GeneratorStage(STILL))

    def updates(decay):
        optim = GeneratorOptimConfig(learning_rate=1e-2, weight_decay=decay)
        optimizer = GeneratorStage(dataclasses.replace(STILL, optim=optim)).optimizer
        return jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]

    difference = jax.tree.map(lambda x, y: x - y, updates(0.5), updates(0.0))
    kernels = set()
    for (path, change), param in zip(
        jax.tree_util.tree_leaves_with_path(difference), jax.tree.leaves(params), strict=True
    ):
        if np.abs(change).max() > 1e-9:
            kernels.add(path_name(path).removeprefix("generator/"))
            np.testing.assert_allclose(change, -1e-2 * 0.5 * param, rtol=1e-3, atol=1e-7)
    blocks = ("attention/qkv", "attention/out", "mlp/gate", "mlp/up", "mlp/down")
    assert kernels == {"head/kernel", *(f"blocks/{name}/kernel" for name in blocks)}


def test_frame_prediction_is_given_its_first_frames():
    batch = codes_of_clips(PREDICTION)
    changed = clips()
    changed["video"][:, 2:] = 0  # the frames after the given ones
    other = jax.jit(GeneratorStage(PREDICTION, TOKENIZER).codes)(changed, frozen())
    np.testing.assert_array_equal(other["condition"], batch["condition"])
    assert (np.asarray(other["codes"]) != batch["codes"]).any()

    logs, _ = run(PREDICTION, from_codes=True)
    assert logs[1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("condition", ["class+frames", "none"])
def test_generators_train_with_both_conditions_and_with_none(condition):
    recipe = dataclasses.replace(STILL, cond_frames=2, model=dataclasses.replace(STILL.model, condition=condition))
    assert recipe.given_frames == (2 if condition == "class+frames" else 0)
    logs, state = run(recipe, from_codes=True)
    assert logs[1]["loss"] < logs[0]["loss"]
    rows = state.params["generator"]["class_embedding"].shape[0]
    with_null = STILL.model.num_classes + (STILL.model.class_dropout > 0)
    assert rows == (with_null if condition == "class+frames" else 1)


@pytest.mark.parametrize(
    ("change", "tolerance"), [({"accumulate": 2}, 1e-5), ({"remat": "block", "precision": "bfloat16"}, 1e-2)]
)
def test_a_batch_in_parts_or_in_half_precision(change, tolerance):
    logs, _ = run(dataclasses.replace(STILL, **change), from_codes=True)
    for one, other in zip(memorized()[0], logs, strict=False):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=tolerance)


@pytest.mark.parametrize("options", [{}, {"frame_prediction": True}])
def test_nearly_all_bytes_are_sharded(options):
    stage = GeneratorStage(GeneratorRecipe(model=GeneratorConfig(size="LP", **options)))
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    placement = sharding.state_shardings(shapes, mesh)
    whole, split = 0, 0
    for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(placement), strict=True):
        whole += math.prod(x.shape)
        split += math.prod(x.shape) * (math.prod(s.shard_shape(x.shape)) * mesh.size == math.prod(x.shape))
    assert split / whole > 0.999


def test_sizes_must_be_known():
    with pytest.raises(InputError, match="model.num_classes must be positive, got 0; give a number"):
        GeneratorStage(dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, num_classes=0)))
