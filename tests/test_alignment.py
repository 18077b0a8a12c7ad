"""Alignment with a frozen network, and the discriminator on the features of one."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax import data
from larp_jax.config import (
    CorruptionConfig,
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerRecipe,
    TransformerConfig,
    to_dict,
)
from larp_jax.config.teachers import TeacherConfig
from larp_jax.errors import InputError
from larp_jax.models.alignment import resampled
from larp_jax.models.layers import unstack
from larp_jax.models.teachers import make_teacher
from larp_jax.runtime import sharding
from larp_jax.tools import benchmark, flops
from larp_jax.training import losses, warm_start
from larp_jax.training.tokenizer import TokenizerStage, TokenizerTask
from larp_jax.weights import checkpoint, networks

TEACHER = TeacherConfig("videomae", 24, 4, 8, heads=2, hidden=48, resolution=24, table=(4, 3, 3))
LAYER = 1  # of three in the decoder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a tiny VideoMAE with random weights: 2 x 3 x 3 places for clips of 4 frames."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_teacher(path, 7)
    return str(path)


def write_teacher(path, seed):
    params = nnx.to_pure_dict(nnx.state(make_teacher(TEACHER, rngs=nnx.Rngs(seed)), nnx.Param))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {"/".join(str(key.key) for key in keys): np.asarray(x) for keys, x in leaves}
    networks.save(path, "videomae", named, [], TEACHER)


@pytest.fixture(scope="module")
def recipe(teacher):
    """Everything at once: blocks of frames, alignment, and a discriminator on the same network."""
    return TokenizerRecipe(
        steps=20,
        log_every=1,
        precision="bfloat16",
        model=TokenizerConfig(
            size="custom",
            frames=4,
            resolution=16,
            patch_frames=2,
            patch_size=4,
            num_tokens=8,
            encoder=TransformerConfig(width=16, depth=1, heads=2),
            decoder=TransformerConfig(width=16, depth=3, heads=2),
            quantizer=QuantizerConfig(codebook_size=64, code_dim=4),
        ),
        discriminator=DiscriminatorConfig(kind="frozen", trunk=teacher, layers=(1, 3), width=16),
        loss=LossConfig(
            prior_weight=0.0,
            perceptual="none",
            adversarial="ns",  # with hinge, the biases of heads do not move at first
            discriminator_every=2,
            alignment_weight=0.7,
            alignment=teacher,
            alignment_layer=LAYER,
        ),
        data=DataConfig(batch_size=2),
        optim=OptimConfig(learning_rate=3e-3, discriminator_learning_rate=1e-3, ema_decay=0.9),
    )


VIDEO = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def trained(recipe):
    """Stage, frozen weights as they were and after ten steps, the states before and after, logs, and the program."""
    stage, key = TokenizerStage(recipe), jax.random.key(0)
    frozen = jax.device_put(stage.frozen())
    before = jax.device_get(frozen)
    state = first = jax.jit(stage.init)(key)
    step = jax.jit(stage.train_step).lower(state, {"video": VIDEO}, key, frozen).compile()
    logs = []
    for _ in range(10):
        state, log = step(state, {"video": VIDEO}, key, frozen)
        logs.append({name: float(x) for name, x in log.items()})
    return stage, before, jax.device_get(frozen), first, state, logs, step


def moved(before, after):
    """Names of the arrays that differ."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path) for (path, a), b in pairs if not np.array_equal(a, b)}


def test_training_moves_projector_and_heads_and_no_frozen_network(trained):
    stage, before, after, first, state, logs, _ = trained
    assert before.keys() == {"teacher", "trunk"} and not moved(before, after)
    stored = networks.load_teacher(stage.recipe.loss.alignment)
    stored = nnx.to_pure_dict(nnx.state(stored, nnx.Param))
    for name in ("teacher", "trunk"):  # kernels are rounded to the dtype of the products, the rest is as in the file
        expected = jax.tree.map(lambda x, y: np.asarray(x, y.dtype), stored, after[name])
        assert not moved(expected, after[name])
        assert {x.dtype for x in jax.tree.leaves(after[name])} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert state.params.keys() == {"tokenizer", "projector", "discriminator"} and "projector" in state.ema
    assert state.params["discriminator"].keys() == {"layer1", "layer3"}  # only the heads
    for name in ("projector", "discriminator"):
        assert len(moved(first.params[name], state.params[name])) == len(jax.tree.leaves(state.params[name]))
    assert logs[-1]["loss_alignment"] < logs[0]["loss_alignment"] - 0.1
    assert logs[1]["loss_discriminator"] == logs[0]["loss_discriminator"] != logs[2]["loss_discriminator"]
    assert all(np.isfinite(list(log.values())).all() for log in logs)


def test_flops_are_those_of_the_compiler(trained, recipe):
    counted = sum(flops.as_compiled(recipe).values()) * len(VIDEO)
    assert 1.0 < trained[-1].cost_analysis()["flops"] / counted < 2.0
    found = flops.train_step(recipe)
    without = flops.train_step(
        dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, alignment_weight=0.0))
    )
    assert without == found | {"alignment": 0.0} and found["alignment"] > 0


@pytest.mark.slow
def test_the_step_without_alignment_needs_less_memory(trained, recipe):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    (name, megabytes), = benchmark.memory_without_terms(recipe, mesh).items()  # of the terms, it has only this one
    used = trained[-1].memory_analysis()
    assert name == "memory_without_alignment_mb"
    assert 0 < megabytes < (used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes) / 1e6


def test_alignment_reaches_the_tokenizer_only_through_its_layer(trained, recipe):
    """The value from NumPy and single blocks, and the gradient: none in later blocks, norm and head of the decoder."""
    stage, _, frozen, _, state, _, _ = trained
    recipe = dataclasses.replace(recipe, precision="float32")
    stage, model = TokenizerStage(recipe), {name: state.params[name] for name in ("tokenizer", "projector")}
    frozen = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), frozen))
    video = jnp.asarray(VIDEO / np.float32(255))
    z_q = jax.random.normal(jax.random.key(1), (2, 8, 4))

    def loss(model, z_q):
        tokenizer = stage.module("tokenizer", model)
        reconstruction, features = tokenizer.decode_with_features(z_q, None, LAYER)
        return stage._alignment_loss(model, frozen, {"video": video}, features), (reconstruction, features)

    (value, (reconstruction, features)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(model, z_q)
    @jax.jit
    def one_by_one(model, z_q):
        tokenizer = stage.module("tokenizer", model)
        decoder = tokenizer.decoder
        x, first, _ = decoder._inputs(tokenizer.quantizer.expand(z_q), None, decoder.grid)
        states = [x := block(x) for block in unstack(decoder.transformer.blocks)]
        return states[LAYER - 1][:, first:], decoder._video(states[-1][:, first:], decoder.grid)

    expected, video_of_blocks = one_by_one(model, z_q)
    np.testing.assert_allclose(features.reshape(2, -1, 16), expected, atol=1e-5)
    np.testing.assert_allclose(reconstruction, video_of_blocks, atol=1e-5)

    teach = jax.jit(lambda frozen, video: stage.module("teacher", frozen)(video))
    target = np.asarray(teach(frozen, video))  # [2, 2, 3, 3, 24], for patches of 2 x 4 x 4
    share = np.array([[3, 0, 0], [1, 2, 0], [0, 2, 1], [0, 0, 3]]) / 3
    target = np.einsum("yh,xw,bthwc->btyxc", share, share, target)
    projected = np.asarray(stage.module("projector", model)(features))
    lengths = np.linalg.norm(projected, axis=-1) * np.linalg.norm(target, axis=-1)
    assert value == pytest.approx(-np.mean((projected * target).sum(-1) / lengths), abs=1e-5)

    tokenizer_grads, projector_grads = (grads[0][name] for name in ("tokenizer", "projector"))
    of = tokenizer_grads["decoder"]
    for leaf in jax.tree.leaves(of["transformer"]["blocks"]):
        assert np.any(np.asarray(leaf[:LAYER])) and not np.any(np.asarray(leaf[LAYER:]))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves((of["norm"], of["head"])))
    assert np.any(np.asarray(grads[1])) and all(np.any(np.asarray(x)) for x in jax.tree.leaves(projector_grads))


def test_features_on_another_grid_are_the_means_of_what_they_cover():
    features = np.random.default_rng(0).normal(size=(2, 8, 6, 3, 5)).astype(np.float32)
    coarse = resampled(jnp.asarray(features), (4, 2, 3))
    np.testing.assert_allclose(coarse, features.reshape(2, 4, 2, 2, 3, 3, 5).mean((2, 4)), atol=1e-6)
    fine = resampled(jnp.asarray(features), (16, 6, 6))
    np.testing.assert_allclose(fine, features.repeat(2, 1).repeat(2, 3), atol=1e-6)
    uneven = resampled(jnp.asarray(features), (5, 7, 4))
    np.testing.assert_allclose(uneven.mean((1, 2, 3)), features.mean((1, 2, 3)), atol=1e-6)
    line = resampled(jnp.arange(4.0).reshape(1, 4, 1, 1, 1), (3, 1, 1)).ravel()  # cells of 4/3 inputs
    np.testing.assert_allclose(line, [(0 + 1 / 3) * 3 / 4, (2 / 3 * 1 + 2 / 3 * 2) * 3 / 4, (2 / 3 + 3) * 3 / 4])


def test_alignment_is_a_cosine():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    assert losses.alignment_loss(x, 3 * x) == pytest.approx(-1.0)
    assert losses.alignment_loss(x, -x) == pytest.approx(1.0)
    assert losses.alignment_loss(x, y) == pytest.approx(losses.alignment_loss(x, 0.1 * y))
    # rectified features may all be zero at a place: it then counts as orthogonal, without a gradient
    value, gradient = jax.value_and_grad(losses.alignment_loss)(x, jnp.zeros_like(x))
    assert value == 0 and not np.any(gradient)


def changed(recipe, **sections):
    """The recipe with other settings by section."""
    return dataclasses.replace(
        recipe, **{name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()}
    )


@pytest.mark.slow
def test_steps_with_other_settings_keep_the_state(recipe):
    """Everything beside alignment and the frozen discriminator that a step may have, by shapes alone."""
    corrupted = CorruptionConfig(future=0.5, patches=0.5, noise=3.0)
    kl = dataclasses.replace(recipe.model.quantizer, kind="kl")
    for settings, changes in (
        ({"remat": "block"}, {"loss": {"r1_weight": 1.0}}),
        ({"accumulate": 2, "corruption": corrupted}, {"model": {"blocks": 2, "ladder": (2, 4), "quantizer": kl}}),
        ({"trained": "decoder", "init_from": "x"}, {"model": {"layout": "patchwise", "num_tokens": 32}}),
    ):
        stage = TokenizerStage(dataclasses.replace(changed(recipe, **changes), **settings))
        frozen, key = stage.frozen_shapes(), jax.random.key(0)
        state = jax.eval_shape(stage.init, key)
        after, logs = jax.eval_shape(stage.train_step, state, {"video": VIDEO}, key, frozen)
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
        assert kinds[0] == kinds[1] and {"loss_alignment", "loss_adversarial", "loss_discriminator"} <= logs.keys()
        # second derivatives are computed in float32
        kernels = {name: tree["patches"]["proj"]["kernel"].dtype for name, tree in frozen.items()}
        assert kernels == {"teacher": jnp.bfloat16, "trunk": jnp.float32 if "loss_r1" in logs else jnp.bfloat16}


def test_a_run_starts_from_weights_with_and_without_projector(trained, recipe, teacher, tmp_path, caplog):
    params = jax.device_get(trained[4].params)
    plain = {"loss": {"alignment_weight": 0.0}, "discriminator": {"kind": "transformer"}}
    only = {"tokenizer": params["tokenizer"]}
    for name, source, tree in (("full", recipe, params), ("plain", changed(recipe, **plain), only)):
        checkpoint.write_imported(tmp_path / name, to_dict(source), tree)

    def read(source, **sections):
        wanted = dataclasses.replace(changed(recipe, **sections), init_from=str(tmp_path / source))
        shapes = jax.eval_shape(TokenizerStage(wanted).init, jax.random.key(0)).params
        caplog.clear()
        with caplog.at_level(logging.INFO, "larp_jax"):
            return set(warm_start.read(wanted, shapes))

    assert read("full") == {"tokenizer", "projector", "discriminator"}
    assert read("full", **plain) == {"tokenizer"}
    assert "the recipe has no projector" in caplog.text
    assert read("plain") == {"tokenizer"}
    assert "no fitting discriminator, which starts afresh" in caplog.text
    assert "no fitting projector, which starts afresh" in caplog.text
    assert read("full", loss={"alignment_layer": 2}, discriminator={"trunk": "videomae_b"}) == {"tokenizer"}
    assert read("full", loss={"alignment": "vgg16"}) == {"tokenizer", "discriminator"}
    with pytest.raises(InputError, match=r"discriminator\.layers is \(2, 3\) here, \(1, 3\) there"):
        read("full", discriminator={"layers": (2, 3)})


class Clips:
    """A data set as far as its identity needs it."""

    name = str

    def __len__(self):
        return 3


def test_a_run_refuses_other_weights_of_its_frozen_networks(recipe, tmp_path, monkeypatch):
    def task_with(seed):
        write_teacher(path, seed)
        return TokenizerTask(other, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))

    path = tmp_path / "teacher.safetensors"
    write_teacher(path, 7)
    monkeypatch.setattr(data, "open_source", lambda *_: Clips())
    other = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, alignment=str(path)))
    metadata = json.loads(json.dumps(task_with(7).metadata()))
    assert metadata["frozen"].keys() == {"teacher", "trunk"}
    task_with(7).resume(metadata)  # written again
    changed = task_with(8)
    with pytest.raises(InputError, match=rf"^loss.alignment={path}: {path} holds other weights than when"):
        changed.resume(metadata)
    changed.resume(metadata | {"frozen": {"trunk": metadata["frozen"]["trunk"]}})  # of the teacher nothing is known
    del metadata["frozen"]  # as of runs before digests were recorded
    changed.resume(metadata)


def test_settings_that_do_not_fit(recipe, tmp_path, monkeypatch):
    for section, values, message in (
        ("loss", {"alignment_layer": 4}, r"loss\.alignment_layer=4 must be from 1 to model\.decoder\.depth=3"),
        ("loss", {"alignment_layer": 0}, r"loss\.alignment_layer=0 must be from 1"),
        ("loss", {"alignment_weight": -1.0}, r"loss\.alignment_weight must not be negative"),
        ("discriminator", {"kind": "unet"}, r"discriminator\.kind='unet' is not known; choose one of transf"),
        ("discriminator", {"layers": ()}, r"discriminator\.layers=\(\) must be increasing numbers from 1; give one"),
        ("discriminator", {"layers": (3, 1)}, r"discriminator\.layers=\(3, 1\) must be increasing numbers"),
    ):
        with pytest.raises(InputError, match=message):
            changed(recipe, **{section: values})
    monkeypatch.setenv("LARP_VGG16", str(tmp_path / "absent"))
    monkeypatch.setenv("LARP_LPIPS", str(tmp_path / "absent"))
    for section, values, message in (
        ("loss", {"alignment": "clip"}, r"loss\.alignment=clip: clip is neither a teacher \(vgg16, "),
        ("discriminator", {"trunk": "vjepa3"}, r"discriminator\.trunk=vjepa3: vjepa3 is neither a teacher"),
        ("discriminator", {"layers": (1, 5)}, r"discriminator\.layers: videomae has no block 5; choose from 1 to 4"),
        ("loss", {"alignment": "vgg16"}, r"loss\.alignment=vgg16: no weights of \w+ at .*absent"),
    ):
        with pytest.raises(InputError, match=message):
            TokenizerStage(changed(recipe, **{section: values})).frozen()
