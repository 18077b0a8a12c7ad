"""Every shipped recipe parses, and its training step has consistent shapes at full size."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from larp_jax.cli import app
from larp_jax.cli.recipe import load_recipe
from larp_jax.config import GENERATOR_SIZES, PRIOR_SIZES, TOKENIZER_SIZES, default_recipe, parse_recipe, take_sizes
from larp_jax.data import parse_spec
from larp_jax.errors import InputError
from larp_jax.training.router import RouterStage
from larp_jax.training.stages import TASKS
from larp_jax.training.tokenizer import TokenizerStage

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.py"))


def load(name, *variant):
    return parse_recipe(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](*variant))


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def stage_and_batch(recipe):
    """The stage of a recipe and the shapes of its batches; runs of tokenizers are named after their recipes."""
    rows = recipe.data.batch_size
    if recipe.stage == "tokenizer":
        return TokenizerStage(recipe), {"video": shape(rows, *recipe.model.clip_shape, dtype=jnp.uint8)}
    if recipe.stage == "router":
        recipe = dataclasses.replace(recipe, model=recipe.model.for_tokenizer(load("evatok_ucf_k600").model))
        batch = {"video": shape(rows, *recipe.model.clip_shape, dtype=jnp.uint8)}
        return RouterStage(recipe), batch | {"rewards": shape(rows, recipe.model.adaptive.count, dtype=jnp.float32)}
    tokenizer = load(recipe.tokenizer.removeprefix("runs/")).model if recipe.tokenizer else None
    if tokenizer is not None:
        found = {"num_tokens": tokenizer.num_tokens}
        name = "codebook_size" if recipe.model.has_codes else "code_dim"
        found[name] = getattr(tokenizer.quantizer, name)
        found |= {"blocks": tokenizer.blocks, "ladder": tokenizer.ladder} if tokenizer.ladder else {}
        assert all(getattr(recipe.model, name) in (0, 1, (), size) for name, size in found.items())
        classes = recipe.model.num_classes or 16
        model = dataclasses.replace(recipe.model, **found, num_classes=classes)
        recipe = dataclasses.replace(recipe, model=model)
    batch, stage_class = {"label": shape(rows)}, TASKS[recipe.stage].stage_class
    if recipe.model.ladder:
        batch["lengths"] = shape(rows, recipe.model.blocks)
    if recipe.data.train.startswith("folder:"):
        return stage_class(recipe, tokenizer), batch | {"video": shape(rows, *tokenizer.clip_shape, dtype=jnp.uint8)}
    name, dtype = ("codes", jnp.int32) if recipe.model.has_codes else ("latents", jnp.float16)
    return stage_class(recipe), batch | {name: shape(rows, *recipe.model.token_shape, dtype=dtype)}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_and_step(path):
    assert f"--config configs/{path.name}" in runpy.run_path(str(path))["__doc__"]
    check_step(load(path.stem))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adversarial", "perceptual"])
def test_step_of_the_variants_of_the_quickstart(variant):
    check_step(load("quickstart", variant))


def test_step_of_the_small_router():
    check_step(load("router", "small"))


def check_step(recipe):
    """Its data can be named, and a step keeps the shapes of the state and logs scalars."""
    for spec in filter(None, (recipe.data.train, recipe.data.eval)):
        parse_spec(spec)
    (stage, batch), key = stage_and_batch(recipe), jax.random.key(0)
    state = jax.eval_shape(stage.init, key)
    after, logs = jax.eval_shape(stage.train_step, state, batch, key, stage.frozen_shapes())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {(x.shape, str(x.dtype)) for x in logs.values()} == {((), "float32")}


@pytest.mark.parametrize(
    ("stage", "name", "value", "says"),
    [
        ("tokenizer", "model.channels", 1, "model.channels=1 is not supported: videos are RGB; set it to 3"),
        ("tokenizer", "model.decoder_patch_size", -1, "must not be negative"),
        ("tokenizer", "model.latent_position_base", 0.0, "must be positive"),
        ("tokenizer", "model.quantizer.entropy_temperature", 0.0, "must be positive"),
        ("tokenizer", "model.quantizer.temperature_ramp", 2.0, r"must be in \[0, 1\], got 2.0"),
        ("tokenizer", "model.quantizer.kl_weight", -1.0, "must not be negative"),
        ("tokenizer", "model.resolution", 8, "needs a model.resolution of at least 16, got 8; set it to 'none'"),
        ("tokenizer", "prior.positions", 7, "prior.positions=7 is less than model.num_tokens=1024; set it to 0"),
        ("tokenizer", "prior.temperature", 0.0, "must be positive"),
        ("tokenizer", "loss.prior_weight", -1.0, "must not be negative"),
        ("tokenizer", "loss.prior_weight", math.nan, "must be a finite number, got nan"),
        ("tokenizer", "start.continuous_steps", -1, "must not be negative"),
        ("tokenizer", "start.kmeans_clips", 0, "must be positive"),
        ("tokenizer", "data.eval_clips", -1, "must not be negative"),
        ("tokenizer", "optim.learning_rate", math.inf, "must be a finite number, got inf"),
        ("tokenizer", "optim.warmup_steps", -1, "must not be negative"),
        ("generator", "optim.b1", 1.0, r"must be in \[0, 1\), got 1.0"),
        ("generator", "model.init_std", -1.0, "must not be negative"),
    ],
)
def test_invalid_settings_are_refused(stage, name, value, says):
    values = default_recipe(stage).to_dict()
    *path, last = name.split(".")
    functools.reduce(dict.__getitem__, path, values)[last] = value
    with pytest.raises(InputError, match=says) as error:
        parse_recipe(values)
    assert last in str(error.value) and len(str(error.value).splitlines()) == 1


def test_no_number_may_be_nan_infinite_or_negative():
    """For every setting; only seeds and `mesh.data`, where -1 means all devices, may be negative."""
    for stage in ("tokenizer", "generator", "router"):
        taken = set()
        for name, default in numbers_in(default_recipe(stage).to_dict()):
            for value in (-1,) if isinstance(default, int) else (-1.0, math.nan, math.inf):
                values = default_recipe(stage).to_dict()
                functools.reduce(dict.__getitem__, name[:-1], values)[name[-1]] = value
                with contextlib.suppress(InputError):
                    parse_recipe(values)
                    taken.add(".".join(name))
        assert taken <= {"mesh.data", "seed"}


def numbers_in(values, path=()):
    """(keys, value) of each number in nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "multipliers":
            yield from numbers_in(value, (*path, key))
        elif type(value) in (int, float):
            yield (*path, key), value


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


PUBLISHED = ("larp_l_long", "ucf101", "generator_ucf101", "generator_k600_prediction")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_do_what_the_released_code_does(name):
    """It never mirrors a clip, and its prior learns at the tokenizer's rate."""
    recipe = load(name)
    assert not recipe.data.flip
    assert "--flips" not in runpy.run_path(str(FOLDER / f"{name}.py"))["__doc__"]
    if recipe.stage == "tokenizer":
        assert set(recipe.optim.multipliers.values()) == {1.0}


def on_command_line(name, *overrides):
    return load_recipe(app.parse(["train", "--workdir=x", "--config", str(FOLDER / f"{name}.py"), *overrides]))


def numbers(part):
    return part.width, part.depth, part.heads


def test_a_size_on_the_command_line_overrides_the_numbers_of_the_recipe(caplog):
    found = on_command_line("quickstart", "--config.model.size=larp_b", "--config.prior.size", "XS")
    assert numbers(found.model.encoder) == numbers(found.model.decoder) == TOKENIZER_SIZES["larp_b"]
    assert numbers(found.prior) == PRIOR_SIZES["XS"]
    found = on_command_line("quickstart", "--config.model.size=larp_b")
    assert numbers(found.prior) == (64, 2, 2)  # its size was not given
    assert numbers(on_command_line("generator_quickstart", "--config.model.size=L").model) == GENERATOR_SIZES["L"]
    assert not caplog.records


def test_numbers_on_the_command_line_override_a_size():
    found = on_command_line("quickstart", "--config.model.size=larp_b", "--config.model.decoder.depth=3")
    assert numbers(found.model.encoder) == (768, 6, 12) and numbers(found.model.decoder) == (768, 3, 12)
    with pytest.raises(ValueError, match=r"model.size='custom' is not known; choose one of larp_s"):
        on_command_line("quickstart", "--config.model.size=custom")


def test_a_size_without_effect_is_warned_of(caplog):
    all_numbers = [f"--config.model.{name}={n}" for name, n in (("width", 128), ("depth", 1), ("heads", 2))]
    found = on_command_line("generator_s", "--config.model.size=B", *all_numbers)
    assert numbers(found.model) == (128, 1, 2)
    assert "config.model.size='B' has no effect, because width, depth and heads of model are given" in caplog.text
    caplog.clear()
    recipe = default_recipe()
    recipe.prior.size, recipe.prior.width, recipe.prior.depth, recipe.prior.heads = "XS", 64, 1, 2
    take_sizes(recipe, ())
    assert "config.prior.size='XS' has no effect" in caplog.text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_have_no_size_without_effect(path, caplog):
    take_sizes(runpy.run_path(str(path))["get_config"](), ())
    assert not caplog.records
