"""Every recipe that is shipped parses, and its step fits together at full size, which shapes alone can tell."""

import dataclasses
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from larp_jax.config import parse_recipe
from larp_jax.data import parse_spec
from larp_jax.steps import GeneratorStage, TokenizerStage

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.py"))


def load(name):
    return parse_recipe(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]())


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def stage_and_batch(recipe):
    """The stage of a recipe and the shapes of what its step takes; runs of tokenizers are named after their recipes."""
    rows = recipe.data.batch_size
    if recipe.stage == "tokenizer":
        return TokenizerStage(recipe), {"video": shape(rows, *recipe.model.clip_shape, dtype=jnp.uint8)}
    tokenizer = load(recipe.tokenizer.removeprefix("runs/")).model if recipe.tokenizer else None
    if tokenizer is not None:
        found = {"codebook_size": tokenizer.quantizer.codebook_size, "num_tokens": tokenizer.num_tokens}
        assert all(getattr(recipe.model, name) in (0, size) for name, size in found.items())
        classes = recipe.model.num_classes or 16
        model = dataclasses.replace(recipe.model, **found, num_classes=classes)
        recipe = dataclasses.replace(recipe, model=model)
    batch = {"label": shape(rows)}
    if recipe.data.train.startswith("folder:"):
        return GeneratorStage(recipe, tokenizer), batch | {"video": shape(rows, *tokenizer.clip_shape, dtype=jnp.uint8)}
    return GeneratorStage(recipe), batch | {"codes": shape(rows, recipe.model.num_tokens)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_and_step(path):
    recipe = load(path.stem)
    assert f"--config configs/{path.name}" in runpy.run_path(str(path))["__doc__"]
    for spec in filter(None, (recipe.data.train, recipe.data.eval)):
        parse_spec(spec)
    (stage, batch), key = stage_and_batch(recipe), jax.random.key(0)
    state = jax.eval_shape(stage.init, key)
    after, logs = jax.eval_shape(stage.train_step, state, batch, key, stage.frozen_shapes())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {(x.shape, str(x.dtype)) for x in logs.values()} == {((), "float32")}


def millions(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6


def test_the_published_run():
    recipe = load("larp_l_long")
    stage = TokenizerStage(recipe)
    params = jax.eval_shape(stage.init, jax.random.key(0)).params
    found = {name: millions(part) for name, part in params.items()}
    assert found == pytest.approx({"tokenizer": 172.2, "prior": 21.7, "discriminator": 38.2}, abs=0.1)
    assert stage.frozen_shapes().keys() == {"lpips"}
    assert recipe.steps * recipe.data.batch_size / (392_622 + 9_537) == pytest.approx(150, abs=0.1)


def test_the_published_generators():
    recipe = load("generator_ucf101")
    stage, _ = stage_and_batch(recipe)
    assert millions(jax.eval_shape(stage.init, jax.random.key(0)).params) == pytest.approx(632.0, abs=0.1)
    assert millions(stage.frozen_shapes()) == pytest.approx(172.2, abs=0.1)
    assert recipe.steps * recipe.data.batch_size / 9_537 == pytest.approx(3000, rel=1e-3)
    prediction = load("generator_k600_prediction")
    assert prediction.model.condition_tokens == 1025
    assert prediction.steps * prediction.data.batch_size / 392_622 == pytest.approx(75, rel=1e-3)
    for published in (recipe, prediction):
        optim = published.optim
        assert (optim.learning_rate, optim.b1, optim.b2, optim.weight_decay) == (6e-4, 0.9, 0.95, 0.05)
