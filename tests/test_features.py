"""Clips with the features of a frozen network on disk, and training on them."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax import cli
from larp_jax.cli import app
from larp_jax.cli.recipe import load_recipe
from larp_jax.config.teachers import TEACHERS, TeacherConfig
from larp_jax.data import features as on_disk, open_source
from larp_jax.data.clips import mirror
from larp_jax.data.features import FeatureSet
from larp_jax.errors import InputError
from larp_jax.inference import batches, features
from larp_jax.models.alignment import resampled
from larp_jax.models.teachers import make_teacher
from larp_jax.runtime import sharding
from larp_jax.tools import flops, plan
from larp_jax.training.features import open_features
from larp_jax.training.tokenizer import TokenizerStage
from larp_jax.weights import networks

TINY = pathlib.Path(__file__).parent / "configs" / "tiny.py"
TEACHER = TeacherConfig("videomae", 24, 2, 8, heads=2, hidden=48, resolution=24, table=(4, 3, 3))
NAMES = [f"features-0000{i}-of-00003.npy" for i in range(3)]


def write_teacher(path, config=TEACHER, seed=7):
    """A file of this network with random weights."""
    params = nnx.to_pure_dict(nnx.state(make_teacher(config, rngs=nnx.Rngs(seed)), nnx.Param))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {"/".join(str(key.key) for key in keys): np.asarray(x) for keys, x in leaves}
    networks.save(path, "videomae", named, [], config)
    return path


def call(*arguments, code=0):
    assert cli.main([*map(str, arguments)]) == code


def recipe_of(*settings):
    return load_recipe(app.parse(["train", "--config", f"{TINY}:plain", "--workdir", "x", *map(str, settings)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_moving_shapes):
    """The folder `out` of 32 videos, two windows each and mirrored, beside the teacher; and the command's arguments."""
    folder = tmp_path_factory.mktemp("features")
    teacher = write_teacher(folder / "teacher.safetensors")
    settings = ["--config.loss.alignment_weight=0.7", f"--config.loss.alignment={teacher}"]
    settings += ["--config.loss.alignment_layer=1"]
    command = ["features", "--config", f"{TINY}:plain", *settings, "--windows", 2, "--flips", "--output"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SHARD_WINDOWS", 24)
        call(*command, folder / "out")
        yield folder / "out", command, recipe_of(*settings, f"--config.data.train=features:{folder / 'out'}")


def test_the_folder_holds_clips_and_what_the_teacher_sees_in_them_and_continues(made, tmp_path, capsys):
    output, command, recipe = made
    found = FeatureSet(output)
    rows = found.manifest["rows"]
    assert len(found) == 32 and len(rows) == 32 * 2 * 2 == len(set(found.names()))
    assert [shard["rows"] for shard in found.manifest["shards"]] == [48, 48, 32]
    assert found.manifest["features"] == [2, 4, 4, 24] and found.manifest["clip"] == [8, 32, 32, 3]
    source, teacher = open_source("moving_shapes", found.clip), networks.load_teacher(recipe.loss.alignment)
    numbers = [0, 8, 64, 127]
    assert [rows[number]["flip"] for number in numbers] == [False, True, False, True]
    expected = []
    for number in numbers:
        row = found.row(number)
        clip, _ = source.read_clip(rows[number]["video"], rows[number]["start"], found.clip)
        np.testing.assert_array_equal(row["video"], mirror(clip) if rows[number]["flip"] else clip)
        expected.append(row["video"])
    expected = resampled(jax.jit(lambda t, x: t(x))(teacher, np.stack(expected) / np.float32(255)), (2, 4, 4))
    for number, wanted in zip(numbers, expected, strict=True):
        assert found.row(number)["features"].dtype == np.float16
        np.testing.assert_allclose(found.row(number)["features"], wanted, rtol=2e-3, atol=2e-3)

    again = shutil.copytree(output, tmp_path / "again")
    for name in ("manifest.json", NAMES[0]):  # as if it had been killed
        (again / name).unlink()
    (again / NAMES[1]).write_bytes((again / NAMES[1]).read_bytes()[:-1])
    with pytest.raises(InputError, match=r"manifest\.json is missing; give a folder that larp-jax features completed"):
        FeatureSet(again)
    whole = (again / NAMES[2]).stat().st_mtime_ns
    call(*command, again)
    assert json.loads((again / "manifest.json").read_text()) == found.manifest
    assert all((again / name).read_bytes() == (output / name).read_bytes() for name in NAMES)
    assert (again / NAMES[2]).stat().st_mtime_ns == whole

    capsys.readouterr()
    for arguments, said in (
        ((*command, again, "--windows", 1), "was started with clips 64 of"),
        ((*command, again, "--data", f"features:{output}"), "give videos: tfds:"),
        ((*command, tmp_path / "x", "--teacher", "clip"), "--teacher clip: clip is neither a teacher (vgg16, "),
        ((*command, "gs://bucket/x"), "--output gs://bucket/x: this is read from a disk, not from gs://"),
        (("features", "--config", "configs/router.py", "--output", "x"), "is of a router; give the recipe of a token"),
    ):
        call(*arguments, code=2)
        error = capsys.readouterr().err.strip()
        assert said in error and len(error.splitlines()) == 1


def test_two_hosts_write_what_one_writes(made, tmp_path, monkeypatch):
    """Both in this process: the second works while the first waits for it."""
    output, _, recipe = made
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train="moving_shapes"))
    written, host = [], [0]

    def run():
        return features.write_features(recipe, tmp_path / "out", windows=2, flips=True)

    def wait(name):
        if host[0] == 0:
            host[0] = 1
            assert run() == {}
            host[0] = 0

    write = on_disk.write_shard
    monkeypatch.setattr(on_disk, "write_shard", lambda path, rows: written.append(path.name) or write(path, rows))
    monkeypatch.setattr(features, "SHARD_WINDOWS", 24)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: host[0])
    monkeypatch.setattr(batches.multihost_utils, "sync_global_devices", wait)
    assert run() == FeatureSet(output).manifest
    assert written == [NAMES[i] for i in (0, 2, 1)]
    assert all((tmp_path / "out" / name).read_bytes() == (output / name).read_bytes() for name in NAMES)


def test_batches_are_a_function_of_seed_and_step(made):
    found, options = FeatureSet(made[0]), {"batch_size": 8, "seed": 3}

    def read(count, **more):
        with found.batches(**options, **more) as endless:
            return [next(endless) for _ in range(count)]

    whole = read(6)
    assert whole[0].keys() == {"video", "features"} and whole[0]["features"].shape == (8, 2, 4, 4, 24)
    parts = [read(2, start_step=4, process_index=i, process_count=2) for i in range(2)]
    for batch, *halves in zip(whole[4:], *parts, strict=True):
        for name, x in batch.items():
            np.testing.assert_array_equal(x, np.concatenate([half[name] for half in halves]))
    rows = {found.row(i)["video"].tobytes(): i for i in range(len(found.names()))}
    seen = [found.manifest["rows"][rows[clip.tobytes()]] for batch in whole for clip in batch["video"]]
    assert len({row["video"] for row in seen[:32]}) == 32  # an epoch has every video once
    assert {row["flip"] for row in seen} == {False, True} and len({row["start"] for row in seen}) > 1
    for batch in whole:
        for clip, values in zip(batch["video"], batch["features"], strict=True):
            np.testing.assert_array_equal(found.row(rows[clip.tobytes()])["features"], values)


@pytest.mark.slow
def test_a_step_from_the_folder_is_that_from_clips(made):
    recipe = made[2]
    with open_features(recipe).batches(batch_size=8, seed=0) as endless:
        batch = next(endless)
    results, key = [], jax.random.key(0)
    for spec, names in ((recipe.data.train, ("video", "features")), ("moving_shapes", ("video",))):
        stage = TokenizerStage(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=spec)))
        frozen = stage.frozen()
        assert frozen.keys() == stage.frozen_shapes().keys() == (set() if "features" in names else {"teacher"})
        state = jax.jit(stage.init)(key)
        results.append((state, *jax.jit(stage.train_step)(state, {name: batch[name] for name in names}, key, frozen)))
    (before, after, logs), (_, expected, expected_logs) = results
    assert logs.keys() == expected_logs.keys() and logs["loss_alignment"] != expected_logs["loss_alignment"]
    for name in ("loss", "loss_alignment", "grad_norm"):
        assert float(logs[name]) == pytest.approx(float(expected_logs[name]), rel=1e-3, abs=1e-4)
    for name in ("tokenizer", "projector"):  # the first update of Adam is nearly the sign of the gradient
        trees = [jax.tree.leaves(state.params[name]) for state in (before, after, expected)]
        start, found, wanted = (np.concatenate([np.ravel(x) for x in tree]) for tree in trees)
        moved = np.abs(wanted - start)
        assert moved.max() > 0 and np.mean(np.abs(found - wanted) <= 0.05 * moved.max()) > 0.99


@pytest.mark.slow
def test_every_other_setting_works_with_features(made, tmp_path):
    """Parts of a batch with a discriminator and its trunk, by shapes; plan and FLOPs; a run whose teacher is absent."""
    recipe = made[2]
    teacher = recipe.loss.alignment
    discriminator = dataclasses.replace(recipe.discriminator, kind="frozen", trunk=teacher, layers=(1, 2))
    loss = dataclasses.replace(recipe.loss, adversarial_weight=0.3)
    full = dataclasses.replace(recipe, discriminator=discriminator, loss=loss, accumulate=2)
    stage, batch = TokenizerStage(full), plan.batch_shapes(full, sharding.make_mesh(full.mesh))
    assert batch["features"].shape == (8, 2, 4, 4, 24) and stage.frozen_shapes().keys() == {"trunk"}
    state = jax.eval_shape(stage.init, jax.random.key(0))
    after, logs = jax.eval_shape(stage.train_step, state, batch, jax.random.key(0), stage.frozen_shapes())
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state) and "loss_alignment" in logs
    clips = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train="moving_shapes"))
    assert 0 < flops.train_step(recipe)["alignment"] < flops.train_step(clips)["alignment"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEACHERS, "tiny", TEACHER)
        patch.setenv("LARP_TINY", str(tmp_path / "absent"))
        settings = ["--config.loss.alignment_weight=0.7", "--config.loss.alignment=tiny", "--config.steps=2"]
        settings += ["--config.loss.alignment_layer=1", f"--config.data.train={recipe.data.train}"]
        call("train", "--config", f"{TINY}:plain", "--workdir", tmp_path / "run", *settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss_alignment" in line] == [1, 2]
    assert any("eval/psnr" in line for line in lines)


def test_folders_that_do_not_fit(made, tmp_path, capsys):
    output, _, recipe = made
    other = write_teacher(tmp_path / "other.safetensors", seed=8)
    smaller = write_teacher(tmp_path / "smaller.safetensors", dataclasses.replace(TEACHER, resolution=16))
    for section, values, said in (
        ("loss", {"alignment_weight": 0.0}, r"is for runs with loss\.alignment_weight above 0; set it, or give videos"),
        ("loss", {"alignment": str(other)}, r"has features of other weights than .*other\.safetensors"),
        ("loss", {"alignment": str(smaller)}, r"has features of videomae, not of .*, or at another resolution"),
        ("loss", {"alignment": "vgg17"}, r"loss\.alignment=vgg17: vgg17 is neither"),
        ("model", {"decoder_patch_size": 4}, r"has features on the grid \[2, 4, 4\], not \[2, 8, 8\]; run larp"),
        ("model", {"resolution": 16}, r"has clips \[8, 32, 32, 3\], not \[8, 16, 16, 3\]"),
        ("data", {"stride": 2}, r"has clips sampled with no rate, not {'stride': 2}"),
        ("data", {"shapes": "32x32,16x64"}, r"leave out data\.shapes=32x32,16x64, or give videos"),
        ("data", {"train": "features:gs://bucket/x"}, r"this is read from a disk, not from gs://"),
    ):
        changed = dataclasses.replace(getattr(recipe, section), **values)
        with pytest.raises(InputError, match=said):
            open_features(dataclasses.replace(recipe, **{section: changed}))
    with pytest.raises(InputError, match=r"which are for data\.train of a tokenizer with loss\.alignment_weight; give"):
        open_source(recipe.data.train)

    damaged = shutil.copytree(output, tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    plain = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, train=f"features:{damaged}", flip=True)
    )
    assert len(open_features(plain)) == 32
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"flips": False}))
    with pytest.raises(InputError, match=r"has no mirrored clips; run larp-jax features with this recipe and --flips"):
        open_features(plain)
    wrong = {"clip": [8, 32], "features": [2, 4, 4, "a"], "teacher": {}, "rows": [], "flips": 3}
    for key, value in (*wrong.items(), ("clip", [8, 2**20, 2**20, 3])):
        (damaged / "manifest.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(InputError, match=r"manifest\.json is damaged \(.*\); run larp-jax features again"):
            FeatureSet(damaged)
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    found = FeatureSet(damaged)
    for content, said in ((b"damaged", "is damaged"), ((output / NAMES[2]).read_bytes(), "has 32 rows, but 48 by the")):
        (damaged / NAMES[0]).write_bytes(content)
        with pytest.raises(InputError, match=said):
            FeatureSet(damaged)
    with pytest.raises(InputError, match=r"cannot be read \(.*\); run larp-jax features again"):
        found.row(40)
    (damaged / NAMES[0]).unlink()
    with pytest.raises(InputError, match=r"of-00003\.npy is missing; run larp-jax features again"):
        FeatureSet(damaged)
