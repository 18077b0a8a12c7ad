"""A generator with a ladder: sequences of lengths and codes, their training and their sampling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.api import LoadedGenerator
from larp_jax.config import DataConfig, GeneratorConfig, GeneratorOptimConfig, GeneratorRecipe, MeshConfig
from larp_jax.errors import InputError
from larp_jax.models import sequence
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator, lengthen
from larp_jax.models.sampling import SamplingOptions, sample_codes
from larp_jax.runtime.sharding import make_mesh
from larp_jax.training.generator import GeneratorStage

# the bucket is less than three blocks of 5
CONFIG = GeneratorConfig(
    width=32, depth=2, heads=4, codebook_size=16, num_tokens=9, blocks=3, ladder=(1, 2, 5), num_classes=3,
    mlp_multiple=16, class_dropout=0.1,
)  # fmt: skip
STILL = dataclasses.replace(CONFIG, token_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, class_dropout=0.0)
ROWS = 8
CLASSES = np.arange(ROWS, dtype=np.int32) % 3


@functools.cache
def random_params(config=CONFIG):
    """Weights large enough for samples to differ."""
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Generator(config, rngs=nnx.Rngs(0)), nnx.Param)))
    rngs = np.random.default_rng(0)
    return jax.tree.map(lambda x: rngs.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)


def network(params, config=CONFIG) -> Generator:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Generator(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


@functools.cache
def sampler(**options):
    chosen = SamplingOptions(**options)

    def sample(classes, key, known):
        generator, numbers = network(random_params()), jnp.arange(ROWS)
        plan = chosen.plan(CONFIG.symbols)
        return sample_codes(generator, Condition(classes), numbers, key, chosen.scalars(), plan, known)

    return jax.jit(sample)


FREE = sequence.known_symbols(CONFIG, jnp.zeros((ROWS, CONFIG.blocks), jnp.int32))


def random_rows(count, seed=0):
    """Packed codes and lengths of this many clips."""
    rngs = np.random.default_rng(seed)
    lengths = rngs.choice(CONFIG.adaptive.assignments, count)
    codes = rngs.integers(0, 16, (count, CONFIG.num_tokens), dtype=np.int32)
    return np.where(np.arange(CONFIG.num_tokens) < lengths.sum(axis=1)[:, None], codes, 0), lengths


def test_a_sequence_has_each_length_before_its_codes():
    codes, lengths = random_rows(50)
    symbols = sequence.join(CONFIG, jnp.asarray(codes), jnp.asarray(lengths))
    for found, packed, assigned in zip(np.asarray(symbols), codes, lengths, strict=True):
        expected, packed = [], list(packed)
        for length in assigned:
            expected += [16 + (1, 2, 5).index(length)] + [packed.pop(0) for _ in range(length)]
        np.testing.assert_array_equal(found, expected + [0] * (CONFIG.symbols - len(expected)))
    np.testing.assert_array_equal(sequence.split(CONFIG, symbols, jnp.asarray(lengths)), codes)


def test_every_sampled_sequence_is_valid():
    """All assignments that fit the bucket occur, and no other; a batch ends with its longest sequence."""
    found = set()
    for options in ({}, dict(cfg_scale=2.0, cfg_interval=3, temperature=0.8, top_k=5), dict(top_k=1)):
        for seed in range(60):
            codes, lengths, passes = jax.device_get(sampler(**options)(CLASSES, jax.random.key(seed), FREE))
            totals = lengths.sum(axis=1)
            assert passes == totals.max() + CONFIG.blocks - 1
            is_code = np.arange(CONFIG.num_tokens) < totals[:, None]
            assert codes.min() >= 0 and codes.max() < CONFIG.codebook_size and not codes[~is_code].any()
            assert codes[is_code].any()
            found |= {tuple(row) for row in lengths.tolist()}
    assert found == set(CONFIG.adaptive.assignments)
    assert sampler()._cache_size() == 1


def test_lengths_are_not_changed_by_guidance_and_filters():
    """Among fully determined codes, greedy or not, the lengths of a block are drawn from the same distribution."""
    plain = sampler()(CLASSES, jax.random.key(0), FREE).lengths
    for options in (dict(cfg_scale=2.0, cfg_interval=3, temperature=0.8, top_k=5), dict(top_k=1)):
        np.testing.assert_array_equal(sampler(**options)(CLASSES, jax.random.key(0), FREE).lengths[:, 0], plain[:, 0])


def test_given_lengths_and_blocks_are_kept():
    for assignment in ((2, 2, 5), (1, 1, 1)):
        known = sequence.known_symbols(CONFIG, jnp.tile(jnp.asarray(assignment), (ROWS, 1)))
        codes, lengths, passes = sampler()(CLASSES, jax.random.key(0), known)
        np.testing.assert_array_equal(lengths, [assignment] * ROWS)
        assert passes == sum(assignment) + 2
        assert len(np.unique(codes[:, : sum(assignment)], axis=0)) == ROWS
    codes, lengths = random_rows(ROWS, seed=1)
    blocks = np.arange(ROWS)[:, None] % 4
    given = np.where(np.arange(3) < blocks, lengths, 0)
    known = sequence.known_symbols(CONFIG, jnp.asarray(given), jnp.asarray(codes), jnp.asarray(blocks))
    found, sampled, _ = sampler()(CLASSES, jax.random.key(0), known)
    for row in range(ROWS):
        count = given[row].sum()
        np.testing.assert_array_equal(sampled[row, : blocks[row, 0]], lengths[row, : blocks[row, 0]])
        np.testing.assert_array_equal(found[row, :count], codes[row, :count])
    assert (np.asarray(found) != codes).any() and set(map(tuple, np.asarray(sampled).tolist())) <= set(
        CONFIG.adaptive.assignments
    )


def test_decoding_step_by_step_gives_the_logits_of_the_whole_sequence():
    codes, lengths = map(jnp.asarray, random_rows(ROWS))
    condition, generator = Condition(CLASSES), network(random_params())
    symbols = sequence.join(CONFIG, codes, lengths)

    @jax.jit
    def both(symbols):
        blocks = generator.unstacked()
        logits, caches = generator.prefill(blocks, condition)
        caches = [lengthen(cache, CONFIG.condition_tokens + CONFIG.symbols) for cache in caches]

        def step(caches, number):
            last, places = symbols[:, number - 1][:, None], sequence.locate(lengths, 1, number)
            logits, caches = generator.decode_step(blocks, last, caches, CONFIG.condition_tokens + number - 1, places)
            return caches, logits[:, 0]

        _, steps = jax.lax.scan(step, caches, jnp.arange(1, CONFIG.symbols))
        steps = jnp.concatenate([logits[:, None], jnp.swapaxes(steps, 0, 1)], axis=1)
        return generator(condition, symbols[:, :-1], lengths), steps

    whole, steps = both(symbols)
    places = sequence.locate(lengths, CONFIG.symbols)
    masked = np.isinf(whole)
    _, place, valid = map(np.asarray, places)
    due = valid & (place == 0)
    assert masked[due, :16].all() and not masked[due, 16].any()
    assert masked[~due, 16:].all() and not masked[~due, :16].any()
    assert not np.take_along_axis(masked, np.asarray(symbols)[..., None], axis=-1)[valid].any()
    kept = ~masked & valid[..., None]
    np.testing.assert_allclose(np.asarray(steps)[kept], np.asarray(whole)[kept], rtol=1e-5, atol=1e-5)


RECIPE = GeneratorRecipe(
    steps=10, model=STILL, data=DataConfig(batch_size=2), optim=GeneratorOptimConfig(learning_rate=1e-2)
)


def test_packed_clips_are_trained_like_each_alone():
    """Loss and gradient of two clips are those of their tokens one clip at a time; padding changes nothing."""
    codes, lengths = random_rows(2, seed=3)
    assert len(set(lengths.sum(axis=1))) == 2
    batch = {"codes": codes, "lengths": lengths.astype(np.int32), "label": CLASSES[:2]}
    stage, params = GeneratorStage(RECIPE), {"generator": random_params(STILL)}
    tokens = lengths.sum() + 2 * STILL.blocks

    def logs(params, batch, accumulate=1):
        recipe = dataclasses.replace(RECIPE, accumulate=accumulate)
        return GeneratorStage(recipe).gradient(params, batch, jax.random.key(0), {})

    together = jax.jit(logs)
    grads, whole = together(params, batch)

    def alone(params):
        total = 0.0
        for row in range(2):
            generator = network(params["generator"], STILL)
            count = int(lengths[row].sum()) + STILL.blocks
            symbols = sequence.join(STILL, jnp.asarray(codes[row : row + 1]), jnp.asarray(lengths[row : row + 1]))
            symbols, condition = symbols[:, :count], Condition(CLASSES[row : row + 1])
            logits = generator(condition, symbols[:, :-1], jnp.asarray(lengths[row : row + 1]))
            total -= jnp.take_along_axis(jax.nn.log_softmax(logits), symbols[..., None], axis=-1).sum()
        return total / tokens

    loss, expected = jax.jit(jax.value_and_grad(alone))(params)
    np.testing.assert_allclose(whole["loss"], loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), grads, expected)
    split = (whole["code_loss"] * lengths.sum() + whole["length_loss"] * 2 * STILL.blocks) / tokens
    np.testing.assert_allclose(split, loss, rtol=1e-5)
    sums = jax.jit(stage.sums)(params, batch)
    for name, mean in (("cross_entropy", whole["code_loss"]), ("length_cross_entropy", whole["length_loss"])):
        np.testing.assert_allclose(sums[name][0].sum() / sums[name][1].sum(), mean, rtol=1e-5)

    padded = dict(batch, codes=np.where(np.arange(9) < lengths.sum(axis=1)[:, None], codes, 7).astype(np.int32))
    for same in (together(params, padded), jax.jit(functools.partial(logs, accumulate=2))(params, batch)):
        np.testing.assert_allclose(same[1]["loss"], loss, rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), same[0], expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="model.condition='frames' is for clips of one length"):
        dataclasses.replace(CONFIG, condition="frames")
    with pytest.raises(InputError, match="does not fit model.num_tokens=6"):
        dataclasses.replace(CONFIG, num_tokens=6)


def test_samples_do_not_depend_on_the_mesh_and_budgets_are_checked():
    plain = LoadedGenerator(CONFIG, random_params())
    expected = plain.sample(CLASSES, key=jax.random.key(0), cfg_scale=2.0)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, model=1))
    found = LoadedGenerator(CONFIG, random_params(), mesh=mesh).sample(CLASSES, key=jax.random.key(0), cfg_scale=2.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for budget, said in (
        ("7", "does not split into 3 equal blocks"),
        ((2, 5, 5), "12 codes, above"),
        ((2, 3, 1), "a block cannot have 3 codes"),
    ):
        with pytest.raises(InputError, match=said):
            plain.sample(CLASSES, key=jax.random.key(0), budget=budget)
    with pytest.raises(InputError, match="window 4: a generator with a ladder draws one code after the other"):
        plain.sample(CLASSES, key=jax.random.key(0), window=4)
    codes, _ = random_rows(ROWS)
    with pytest.raises(InputError, match="with these they need 11 codes of 9"):
        plain.sample(CLASSES, key=jax.random.key(0), frames=(codes, [[5]] * ROWS), budget=(1, 1, 5))


def test_int8_weights_sample_lengths_too():
    generator = LoadedGenerator(CONFIG, random_params(), precision="int8")
    codes, lengths = generator.sample(CLASSES, key=jax.random.key(0), cfg_scale=2.0)
    assert set(map(tuple, np.asarray(lengths).tolist())) <= set(CONFIG.adaptive.assignments)
    exact = LoadedGenerator(CONFIG, random_params())
    logits, others = (np.asarray(g.logits(codes, CLASSES, lengths=lengths)) for g in (generator, exact))
    np.testing.assert_array_equal(np.isinf(logits), np.isinf(others))
    finite = np.isfinite(logits)
    assert 0 < np.sqrt(np.mean((logits[finite] - others[finite]) ** 2)) < 0.05 * np.std(others[finite])
