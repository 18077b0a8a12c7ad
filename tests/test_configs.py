"""Every recipe that is shipped parses, and its step fits together at full size, which shapes alone can tell."""

import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from larp_jax.config import parse_recipe
from larp_jax.data import parse_spec
from larp_jax.steps import STAGES

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_and_step(path):
    module = runpy.run_path(str(path))
    recipe = parse_recipe(module["get_config"]())
    assert f"--config configs/{path.name}" in module["__doc__"]
    for spec in (recipe.data.train, recipe.data.eval):
        parse_spec(spec)
    if recipe.stage != "tokenizer":
        return
    stage, key = STAGES[recipe.stage](recipe), jax.random.key(0)
    state = jax.eval_shape(stage.init, key)
    clips = jax.ShapeDtypeStruct((recipe.data.batch_size, *recipe.model.clip_shape), jnp.uint8)
    after, logs = jax.eval_shape(stage.train_step, state, {"video": clips}, key, stage.frozen_shapes())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {(x.shape, str(x.dtype)) for x in logs.values()} == {((), "float32")}


def test_the_published_run():
    recipe = parse_recipe(runpy.run_path(str(CONFIGS[0].parent / "larp_l_long.py"))["get_config"]())
    stage = STAGES["tokenizer"](recipe)
    params = jax.eval_shape(stage.init, jax.random.key(0)).params
    millions = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) / 1e6 for name, part in params.items()}
    assert millions == pytest.approx({"tokenizer": 172.2, "prior": 21.7, "discriminator": 38.2}, abs=0.1)
    assert stage.frozen_shapes().keys() == {"lpips"}
    assert recipe.steps * recipe.data.batch_size / (392_622 + 9_537) == pytest.approx(150, abs=0.1)
