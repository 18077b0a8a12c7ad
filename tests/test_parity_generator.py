"""The generator agrees with the released code, and its options work as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import build, generator_deviations
from flax import nnx

from larp_jax.config import GENERATOR_SIZES, GeneratorConfig
from larp_jax.errors import InputError
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator, drop_path


@pytest.mark.parametrize("folder", ["ar_class", "ar_frame_prediction"])
def test_every_quantity_of_the_reference(reference_dir, folder):
    deviations = generator_deviations(reference_dir / folder)
    assert len(deviations) >= 2
    assert not [d for d in deviations if not d.within]


def parameters(config: GeneratorConfig) -> int:
    shapes = nnx.state(nnx.eval_shape(lambda: Generator(config, rngs=nnx.Rngs(0))), nnx.Param)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("size", "millions"), [("B", 98.4), ("L", 326.3), ("LP", 632.0)])
def test_published_sizes(size, millions):
    assert parameters(GeneratorConfig(size=size)) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("size", GENERATOR_SIZES)
def test_every_size_is_consistent(size):
    assert parameters(GeneratorConfig(size=size, frame_prediction=True)) > 0


SMALL = dict(width=32, depth=2, heads=4, codebook_size=16, num_tokens=6, num_classes=3, mlp_multiple=16)


def small(**options) -> Generator:
    """A small generator whose head is not zero."""
    generator = Generator(GeneratorConfig(**SMALL | options), rngs=nnx.Rngs(0))
    shape = generator.head.kernel.shape
    generator.head.kernel[...] = jax.random.normal(jax.random.key(1), shape)
    return generator


TOKENS = np.random.default_rng(0).integers(0, 16, (2, 5))


def test_attention_is_causal():
    generator = small()
    logits = generator(Condition(np.array([0, 1])), TOKENS)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 16
    other = generator(Condition(np.array([0, 1])), changed)
    assert logits.shape == (2, 6, 16) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, :4], other[:, :4], atol=1e-5)
    assert not np.allclose(logits[:, 4:], other[:, 4:], atol=1e-3)
    np.testing.assert_allclose(generator(Condition(np.array([0, 1])), TOKENS[:, :0]), logits[:, :1], atol=1e-5)


FRAMES = np.random.default_rng(1).integers(0, 16, (2, 6))
BATCH = {"label": np.array([0, 2]), "condition": FRAMES}


@pytest.mark.parametrize(
    "condition, positions, rows", [("class", 1, 4), ("frames", 7, 0), ("class+frames", 8, 4), ("none", 1, 1)]
)
def test_conditions_combine(condition, positions, rows):
    """Each part of the condition changes the logits of a generator that is given it, and of no other."""
    generator = small(condition=condition)
    assert generator.config.condition_tokens == positions
    assert generator.config.given == condition
    assert (0 if generator.class_embedding is None else len(generator.class_embedding[...])) == rows
    given = Condition.of_batch(generator.config, BATCH)
    assert given.rows == 2 and generator.embed_condition(given).shape == (2, positions, 32)
    logits = generator(given, TOKENS)
    assert logits.shape == (2, 6, 16)
    for part, changed in (("class", {"label": np.array([1, 2])}), ("frames", {"condition": (FRAMES + 1) % 16})):
        other = generator(Condition.of_batch(generator.config, BATCH | changed), TOKENS)
        assert np.allclose(logits[0], other[0], atol=1e-4) == (part not in condition)
    if condition == "class+frames":
        null = generator(given.without_class(), TOKENS)
        assert not np.allclose(logits, null, atol=1e-4)


def test_each_condition_is_dropped_on_its_own():
    generator = small(condition="class+frames", class_dropout=0.3, frames_dropout=0.6)
    given = Condition(np.zeros(2000, np.int32), np.zeros((2000, 6), np.int32))
    embedded = np.asarray(generator.embed_condition(given, key=jax.random.key(0)))
    kept = np.asarray(generator.embed_condition(given))[0]
    has_class = np.all(embedded[:, 0] == kept[0], axis=-1)
    has_frames = np.all(embedded[:, 1:7] == kept[1:7], axis=(1, 2))
    separator = np.asarray(generator.token_embedding[...][-1])
    assert np.all(embedded[~has_frames][:, 1:] == separator)
    for found, share in ((has_class, 0.7), (has_frames, 0.4), (has_class & has_frames, 0.28)):
        assert abs(found.mean() - share) < 0.04
    assert np.all(np.asarray(generator.embed_condition(given.without_frames()))[:, 1:] == separator)


def test_conditions_that_contradict_each_other():
    with pytest.raises(InputError, match="gives no frames, but model.frame_prediction is True"):
        GeneratorConfig(**SMALL, condition="class", frame_prediction=True)
    with pytest.raises(InputError, match="model.condition='frame' is not known; choose one of class, frames, "):
        GeneratorConfig(**SMALL, condition="frame")
    assert GeneratorConfig(**SMALL, frame_prediction=True) == GeneratorConfig(**SMALL, condition="frames")


def test_an_untrained_generator_predicts_uniformly():
    generator = Generator(GeneratorConfig(**SMALL), rngs=nnx.Rngs(0))
    assert not np.any(generator(Condition(np.array([0, 1])), TOKENS))


def test_grouped_heads_share_keys_and_values():
    """A generator with full heads and repeated keys and values computes the same."""
    grouped, full = small(kv_heads=2), small(kv_heads=4)
    params = nnx.to_pure_dict(nnx.state(grouped, nnx.Param))
    q, k, v = jnp.split(params["blocks"]["attention"]["qkv"]["kernel"], (32, 48), axis=-1)
    k, v = (jnp.repeat(x.reshape(2, 32, 2, 8), 2, axis=2).reshape(2, 32, 32) for x in (k, v))
    params["blocks"]["attention"]["qkv"]["kernel"] = jnp.concatenate([q, k, v], axis=-1)
    same = build(lambda: Generator(full.config, rngs=nnx.Rngs(0)), params)
    condition = Condition(np.array([0, -1]))
    np.testing.assert_allclose(grouped(condition, TOKENS), same(condition, TOKENS), atol=1e-5)


def test_fixed_positions_are_not_parameters():
    assert small(fixed_positions=True).positions is None
    assert np.any(small(fixed_positions=True)(Condition(np.array([0, 1])), TOKENS))


@pytest.mark.parametrize(
    "options",
    [
        {"token_dropout": 0.5},
        {"attention_dropout": 0.5},
        {"residual_dropout": 0.5},
        {"mlp_dropout": 0.5},
        {"path_dropout": 0.5},
        {"class_dropout": 0.9},
    ],
)
def test_each_dropout_acts_in_training_only(options):
    none = {f"{part}_dropout": 0.0 for part in ("token", "attention", "residual", "mlp", "path", "class")}
    generator = small(**none | options)
    condition = Condition(np.array([0, 1]))
    quiet = generator(condition, TOKENS)
    np.testing.assert_array_equal(quiet, generator(condition, TOKENS))
    noisy = generator(condition, TOKENS, key=jax.random.key(3))
    assert not np.allclose(quiet, noisy, atol=1e-4)


def test_drop_path_keeps_the_mean():
    x = jnp.ones((4000, 2))
    y = drop_path(x, jnp.float32(0.25), jax.random.key(0))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1.0, abs=0.05)


def test_bfloat16_computes_close_to_float32():
    config = GeneratorConfig(**SMALL)
    params = nnx.to_pure_dict(nnx.state(small(), nnx.Param))
    half = build(lambda: Generator(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), params)
    full = build(lambda: Generator(config, rngs=nnx.Rngs(0)), params)
    condition = Condition(np.array([0, 1]))
    logits = full(condition, TOKENS)
    assert half(condition, TOKENS).dtype == jnp.float32
    assert np.abs(half(condition, TOKENS) - logits).max() < 0.05 * np.abs(logits).max()
