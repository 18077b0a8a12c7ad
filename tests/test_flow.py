"""The flow generator against diffusers (tests/reference/flow), and its samplers against a flow in closed form."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.api import LoadedFlow
from larp_jax.config import FLOW_SIZES, FlowConfig, GeneratorConfig, MeshConfig, parse_recipe
from larp_jax.errors import InputError
from larp_jax.models.condition import Condition
from larp_jax.models.flow import Flow, flow_errors, times_of
from larp_jax.models.flow_sampling import euler, heun, sample_latents
from larp_jax.models.sampling import SamplingOptions
from larp_jax.runtime import sharding
from larp_jax.tools import flops
from larp_jax.training.flow import FlowStage
from larp_jax.weights import released

REFERENCE = pathlib.Path(__file__).parent / "reference" / "flow"
SIZES = {"size": "custom", "width": 16, "depth": 2, "heads": 2, "num_tokens": 6, "code_dim": 3, "num_classes": 4}


def random_params(config, seed=0):
    """Parameters of which none is zero, so that everything has an effect."""
    params = nnx.to_pure_dict(nnx.state(Flow(config, rngs=nnx.Rngs(seed)), nnx.Param))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def reference():
    """The network with the weights of the reference, and its arrays."""
    config = FlowConfig(**SIZES)
    weights = np.load(REFERENCE / "weights.npz")
    items = released.model_tensors(config)
    assert {name: weights[name].shape for name in weights.files} == released.expected_shapes(items)
    flow = Flow(config, rngs=nnx.Rngs(0))
    nnx.update(flow, jax.tree.map(jnp.asarray, released.params_from_released(items, weights)["generator"]))
    return flow, dict(np.load(REFERENCE / "io.npz"))


def test_network_and_loss_are_those_of_diffusers(reference):
    flow, io = reference
    label = np.where(io["label"] == 4, -1, io["label"])  # the last row is the null class
    t = io["times"][:, None, None]
    noised = (1 - t) * io["latents"] + t * io["noise"]
    velocity = jax.jit(lambda: flow(noised, io["times"], Condition(label)))()
    np.testing.assert_allclose(velocity, io["velocity"], rtol=1e-4, atol=1e-4)
    arguments = flow, io["latents"], Condition(label), io["noise"], io["times"]
    errors, squares = jax.jit(lambda: flow_errors(*arguments))()
    np.testing.assert_allclose(errors, io["loss"], rtol=1e-4)
    np.testing.assert_allclose(squares, np.square(io["noise"] - io["latents"]).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_samples_are_those_of_diffusers(reference, solver, monkeypatch):
    flow, io = reference
    monkeypatch.setattr("larp_jax.models.flow_sampling.noise_of", lambda keys, shape: io["noise"])
    options = SamplingOptions(cfg_scale=1.5, solver=solver, solver_steps=4)
    condition = Condition(np.array([1, 3, 0], np.int32))
    arguments = flow, condition, np.arange(3), jax.random.key(0), options.scalars(), options.plan(6)
    found = jax.jit(lambda: sample_latents(*arguments))()
    np.testing.assert_allclose(found.latents, io[solver], rtol=1e-4, atol=1e-4)
    assert int(found.passes) == {"euler": 4, "heun": 7}[solver]


def test_a_gaussian_is_sampled_exactly():
    """Of latents with mean m and deviation s, the flow takes noise e to m + s e, and its velocity is known."""
    mean, std = 1.5, 0.5

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    noise = jnp.linspace(-3.0, 3.0, 101)
    exact = mean + std * noise
    for solve, steps, tolerance in ((euler, 200, 0.02), (heun, 50, 0.005)):
        found, passes = jax.jit(solve, static_argnums=0)(velocity, noise, steps)
        np.testing.assert_allclose(found - mean, exact - mean, rtol=tolerance, atol=1e-3)
        assert int(passes) == (steps if solve is euler else 2 * steps - 1)


def test_a_network_learns_the_flow_of_a_gaussian():
    """In some steps of the stage itself: samples have its mean and deviation within 2 %."""
    model = SIZES | {"depth": 1, "num_tokens": 2, "code_dim": 1, "condition": "none", "num_classes": 1}
    optim = {"learning_rate": 1e-2, "floor": 0.05, "ema_decay": 0.95}
    recipe = parse_recipe({"stage": "flow", "model": model, "optim": optim, "steps": 120})
    stage, key, mean, std = FlowStage(recipe), jax.random.key(0), np.float32([2.0]), np.float32([0.5])
    frozen, label = {"statistics": {"mean": mean, "std": std}}, jnp.zeros(256, jnp.int32)

    def step(state, i):
        latents = mean + std * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (256, 2, 1))
        return stage.train_step(state, {"latents": latents, "label": label}, key, frozen)

    state, _ = jax.jit(lambda: jax.lax.scan(step, stage.init(key), jnp.arange(recipe.steps)))()
    generator = LoadedFlow(recipe.model, state.ema["generator"], statistics=(mean, std))
    found = np.asarray(generator.sample(indices=np.arange(4096), key=key, solver="heun", solver_steps=10))
    np.testing.assert_allclose(found.mean(), 2.0, rtol=0.02)
    np.testing.assert_allclose(found.std(), 0.5, rtol=0.02)


def test_samples_depend_on_nothing_beside_them():
    """On a number and its condition: not on the devices that a batch is split over, nor on the rows beside it."""
    config = FlowConfig(**SIZES, condition="class+frames")
    params, statistics = random_params(config), (np.full(3, 0.5), np.full(3, 2.0))
    frames = np.random.default_rng(0).normal(size=(8, 6, 3)).astype(np.float32)
    options = {"key": jax.random.key(3), "solver_steps": 3, "cfg_scale": 2.0, "frames_scale": 1.5}
    alone = LoadedFlow(config, params, statistics=statistics)
    whole = np.asarray(alone.sample(np.arange(8) % 4, frames=frames, **options))
    split = LoadedFlow(config, params, statistics=statistics, mesh=sharding.make_mesh(MeshConfig(fsdp=2)))
    order = np.array([3, 1, 7, 5, 0, 2, 6, 4])
    found = split.sample(order % 4, frames=frames[order], indices=order, **options)
    np.testing.assert_allclose(found, whole[order], atol=1e-4)


def test_guidance_by_class_and_by_frames():
    """A single step: neither + 1.5 (frames - neither) + 2 (both - frames)."""
    config = FlowConfig(**SIZES, condition="class+frames")
    flow = Flow(config, rngs=nnx.Rngs(0))
    nnx.update(flow, random_params(config))
    both = Condition(jnp.array([0, 1]), jax.random.normal(jax.random.key(1), (2, 6, 3)))
    key, options = jax.random.key(3), SamplingOptions(cfg_scale=2.0, frames_scale=1.5, solver_steps=1)
    sample = jax.jit(lambda: sample_latents(flow, both, np.arange(2), key, options.scalars(), options.plan(6)))
    found = sample().latents
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), (6, 3)) for i in range(2)])
    frames, neither = both.without_class(), both.without_class().without_frames()
    velocity = jax.jit(lambda condition: flow(noise, jnp.ones(2), condition))
    given, framed, free = map(velocity, (both, frames, neither))
    expected = noise - (free + 1.5 * (framed - free) + 2.0 * (given - framed))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="temperature 0.5 is for generators of codes"):
        SamplingOptions(temperature=0.5).fitting(config)
    with pytest.raises(InputError, match="solver heun is for generators of latents"):
        SamplingOptions(solver="heun").fitting(GeneratorConfig())


def test_what_is_left_out_in_training():
    """Classes and frames are left out at their rates, and then nothing of them is seen."""
    config = FlowConfig(**SIZES, condition="class+frames", class_dropout=0.5, frames_dropout=0.25)
    flow = Flow(config, rngs=nnx.Rngs(0))
    classes, frames = jnp.zeros(512, jnp.int32), jnp.ones((512, 6, 3))
    condition, key = Condition(classes, frames), jax.random.key(0)
    none = Condition(classes, frames).without_class().without_frames()
    for embed, rate in ((flow.embed_classes, 0.5), (flow.embed_frames, 0.25)):
        dropped = np.asarray((embed(condition, key=key) == embed(none)).reshape(512, -1).all(axis=1))
        assert abs(dropped.mean() - rate) < 0.08
        assert not (embed(condition) == embed(none)).reshape(512, -1).all(axis=1).any()
    times = np.asarray(times_of(jax.random.split(key, 4096)))  # logit-normal
    logits = np.log(times / (1 - times))
    assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.06


def test_sizes_are_those_of_dit():
    """Millions of parameters, table 1 of arXiv 2212.09748."""

    def millions(size):
        flow = nnx.eval_shape(lambda: Flow(FlowConfig(size=size), rngs=nnx.Rngs(0)))
        return round(sum(x.size for x in jax.tree.leaves(nnx.state(flow, nnx.Param))) / 1e6)

    assert {size: millions(size) for size in FLOW_SIZES} == {"S": 33, "B": 130, "L": 458, "XL": 675}


def test_flops_are_those_of_the_compiler():
    model = SIZES | {"width": 64, "depth": 1, "num_tokens": 48, "condition": "class+frames"}
    recipe = parse_recipe({"stage": "flow", "model": model, "data": {"batch_size": 2}})
    stage = FlowStage(recipe)
    batch = {"latents": jnp.zeros((2, 48, 3)), "condition": jnp.zeros((2, 48, 3)), "label": jnp.zeros(2, jnp.int32)}
    frozen = {"statistics": {"mean": jnp.zeros(3), "std": jnp.ones(3)}}
    state, key = jax.eval_shape(stage.init, jax.random.key(0)), jax.random.key(0)
    program = jax.jit(stage.train_step).lower(state, batch, key, frozen).compile()
    counted = program.cost_analysis()["flops"]
    ours = 2 * sum(flops.flow_train_step(recipe.model).values())
    assert 1.0 < counted / ours < 1.2  # the compiler also counts norms, activations and the optimizer
