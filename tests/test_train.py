"""Training from the command line: files of a run, resuming, stopping, diverging."""

import json
import os
import pathlib
import shutil
import signal

import chaos
import jax
import numpy as np
import pytest

from larp_jax import cli
from larp_jax.config import parse_recipe, to_dict
from larp_jax.data import moving_shapes
from larp_jax.errors import InputError
from larp_jax.runtime.stopping import StopRequest
from larp_jax.training import common, stages, warm_start, writers
from larp_jax.training.tokenizer import TokenizerStage, TokenizerTask
from larp_jax.training.train import _may_change
from larp_jax.training.writers import MetricWriter
from larp_jax.weights import checkpoint

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny.py")


def train(workdir, *overrides):
    return cli.main(["train", "--config", CONFIG, "--workdir", str(workdir), *overrides])


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def as_if_killed(trained, workdir, newest):
    """A copy of the run as `kill -9` after its checkpoint `newest` would have left it."""
    shutil.copytree(trained, workdir)
    for step in steps(workdir):
        if step > newest:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def assert_same_weights(a, b):
    for weights in ("ema", "raw"):
        one, other = checkpoint.load(a, weights=weights), checkpoint.load(b, weights=weights)
        assert one.step == other.step == 6
        assert ("discriminator" in one.params) == (weights == "raw")
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_what_a_run_leaves(trained):
    assert steps(trained) == [2, 4, 6]
    assert [row["step"] for row in chaos.rows(trained)] == [1, 2, 3, 4, 5, 6]
    logged = {"loss", "loss_prior", "loss_adversarial", "loss_discriminator", "logits_real", "logits_fake", "psnr"}
    assert {f"train/{name}" for name in logged} <= chaos.rows(trained)[0].keys()
    evaluated = chaos.rows(trained)[5]
    assert {"eval/psnr", "eval/psnr_mean_clip", "eval/ssim", "eval/usage", "eval/prior_top1"} <= evaluated.keys()
    assert (trained / "media" / "00000006_reconstruction.png").exists()
    found = checkpoint.load(trained)
    assert found.recipe.model.num_tokens == 8
    assert found.code_counts.sum() == 8 * 8
    assert found.mean_clip.shape == (8, 32, 32, 3)
    assert json.loads((trained / "config.json").read_text())["steps"] == 6


def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, capsys):
    workdir = as_if_killed(trained, tmp_path / "run", newest=2)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')  # incomplete, as after a kill
    assert train(workdir, "--config.data.workers=2") == 0  # which may change
    assert "settings changed since the run started: data.workers from 0 to 2" in capsys.readouterr().err
    assert chaos.rows(workdir) == chaos.rows(trained)
    assert_same_weights(workdir, trained)


@pytest.mark.slow
def test_a_continuous_start_gets_its_codebook_after_its_last_step(tmp_path, monkeypatch, capsys):
    """Steps 1 and 2 are continuous; a run resumed from step 1, 2 or 3 is the same as one never stopped."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
    start = ["--config.start.continuous_steps=2", "--config.start.ramp_steps=2", "--config.start.kmeans_clips=12"]
    start += ["--config.keep=10", "--config.save_every=1", "--config.loss.adversarial_weight=0.0", "--config.steps=4"]
    assert train(tmp_path / "run", *start) == 0
    assert "the codebook becomes the k-means of the latents of 16 clips" in capsys.readouterr().err
    found = [checkpoint.load(tmp_path / "run" / "checkpoints" / str(step), weights="raw").params for step in (1, 2, 3)]
    books = [params["tokenizer"]["quantizer"]["embedding"] for params in found]
    np.testing.assert_allclose(np.linalg.norm(books[1], axis=-1), 1.0, rtol=1e-5)  # centers of unit latents
    assert np.abs(books[0] - books[1]).max() > 10 * np.abs(books[1] - books[2]).max()
    prior = [params["prior"]["head"]["kernel"] for params in found]
    np.testing.assert_array_equal(prior[0], prior[1])  # no loss of codes before there are codes
    assert np.any(prior[1] != prior[2])
    for newest in (1, 2, 3):
        workdir = as_if_killed(tmp_path / "run", tmp_path / f"from_{newest}", newest)
        assert train(workdir, *start) == 0
        assert chaos.rows(workdir) == chaos.rows(tmp_path / "run")
        one, other = (checkpoint.load(path).params for path in (workdir, tmp_path / "run"))
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_finished_run_stays_as_it_is(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    assert train(workdir) == 0
    assert "trained to step 6" in capsys.readouterr().out
    assert [row["step"] for row in chaos.rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(workdir, trained)


def test_a_run_killed_before_it_removed_old_checkpoints(trained, tmp_path):
    """The next start removes what the last save should have removed: all but the newest and the best."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    scores = workdir / "checkpoints" / "6" / "metrics" / "metrics"
    better = {name: value + 1 for name, value in json.loads(scores.read_text()).items()}
    (workdir / "checkpoints" / "2" / "metrics").mkdir()
    (workdir / "checkpoints" / "2" / "metrics" / "metrics").write_text(json.dumps(better))
    assert train(workdir, "--config.keep=1") == 0
    assert steps(workdir) == [2, 6]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(trained, tmp_path, capsys, monkeypatch):
    workdir = as_if_killed(trained, tmp_path / "run", newest=2)
    write_scalars = MetricWriter.write_scalars

    def write_and_signal(self, step, scalars):
        write_scalars(self, step, scalars)
        if step == 4:  # written after step 5 has started
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(writers.MetricWriter, "write_scalars", write_and_signal)
        assert train(workdir) == 1
    assert "stopped by SIGTERM at step 5, saved" in capsys.readouterr().err
    assert steps(workdir)[-1] == 5
    assert train(workdir) == 0
    assert [row["step"] for row in chaos.rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(workdir, trained)


def test_a_second_interrupt_does_not_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
    with StopRequest() as stop:
        stop.defer()
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoints(trained, tmp_path, capsys, monkeypatch):
    workdir = as_if_killed(trained, tmp_path / "run", newest=4)
    restore = checkpoint.CheckpointManager.restore

    def restore_broken(self, *args):
        state = restore(self, *args)
        broken = jax.tree.map(lambda x: x * float("nan"), state.params["prior"])
        return type(state)(state.step, state.params | {"prior": broken}, state.opt_state, state.ema)

    monkeypatch.setattr(checkpoint.CheckpointManager, "restore", restore_broken)
    assert train(workdir) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "loss_prior" in error and "step 5" in error and "loss_reconstruction" not in error
    assert "the newest checkpoint is that of step 4. Lower config.optim.learning_rate" in error
    assert steps(workdir) == [2, 4]
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), checkpoint.load(workdir).params))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("seed=1", "holds a run with seed=0, not 1"),
        ("data.batch_size=16", "holds a run with data.batch_size=8, not 16"),
        ("data.train=moving_shapes:test", "with data.train='moving_shapes', not 'moving_shapes:test'"),
        ("model.num_tokens=16", "with model.num_tokens=8, not 16"),
        ("optim.kind=muon", "with optim.kind='adam', not 'muon'"),
        ("optim.ema_decay=0", "with optim.ema_decay=0.9, not 0.0"),
        ("loss.adversarial_weight=0", "with loss.adversarial_weight=0.3, not 0.0"),
        ("loss.reconstruction=l2", "with loss.reconstruction='l1', not 'l2'"),
        ("init_from=elsewhere", "with init_from='', not 'elsewhere'"),
    ],
)
def test_a_workdir_holds_one_run(trained, capsys, setting, message):
    assert train(trained, f"--config.{setting}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "choose another --workdir, or the settings it was started with" in line


@pytest.mark.slow
def test_settings_against_divergence_may_change(trained, tmp_path, capsys):
    workdir = as_if_killed(trained, tmp_path / "run", newest=4)
    old = json.loads((workdir / "config.json").read_text())
    del old["init_from"]  # as in an earlier version
    (workdir / "config.json").write_text(json.dumps(old))
    cures = {"optim.learning_rate": 1e-4, "optim.clip_norm": 1.0, "optim.warmup_steps": 6, "precision": "bfloat16",
             "optim.discriminator_learning_rate": 1e-5, "optim.multipliers.prior": 0.5,
             "loss.adversarial_weight": 0.1, "model.quantizer.entropy_weight": 0.1}  # fmt: skip
    assert train(workdir, *(f"--config.{name}={value}" for name, value in cures.items())) == 0
    error = capsys.readouterr().err
    for name, value in cures.items():
        assert f"{name} from " in error and f" to {value!r}" in error
    assert "init_from" not in error
    assert chaos.rows(workdir)[:4] == chaos.rows(trained)[:4]
    assert chaos.rows(workdir)[4]["train/learning_rate"] < 1.01e-4
    assert checkpoint.load(workdir).recipe.optim.clip_norm == 1.0


def test_weights_of_losses_may_change_but_not_turn_modules_on_or_off():
    for name in ("prior", "adversarial", "alignment", "r1"):
        assert _may_change(f"loss.{name}_weight", 0.7, 0.3)
        assert not _may_change(f"loss.{name}_weight", 0.7, 0.0) and not _may_change(f"loss.{name}_weight", 0.0, 0.7)
    assert _may_change("loss.frame_difference_weight", 0.0, 0.7)  # trains no module of its own
    assert _may_change("optim.weight_decay", 0.1, 0.2) and not _may_change("optim.weight_decay", 0.0, 0.1)
    assert not _may_change("loss.alignment", "vgg16", "vjepa2_l")


@pytest.mark.slow
def test_settings_of_the_environment_change_nothing(trained, tmp_path):
    workdir = as_if_killed(trained, tmp_path / "run", newest=4)
    with jax.enable_x64(True), jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        assert train(workdir) == 0
    assert chaos.rows(workdir) == chaos.rows(trained)
    assert_same_weights(workdir, trained)


@pytest.mark.slow
def test_starting_from_weights_after_a_run_without_checkpoint(trained, tmp_path, capsys, monkeypatch):
    """Such a start is never continuous."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    tried = json.loads((trained / "config.json").read_text())
    tried["model"]["resolution"], tried["seed"] = 64, 3
    (workdir / "config.json").write_text(json.dumps(tried))
    checkpoint.write_mean_clip(workdir, np.zeros((8, 64, 64, 3)))
    start = [f"--config.init_from={trained}", "--config.steps=2", "--config.optim.learning_rate=1e-8"]
    start += ["--config.optim.discriminator_learning_rate=1e-8", "--config.seed=1", "--config.start.continuous_steps=2"]
    assert train(workdir, *start) == 0
    error = capsys.readouterr().err
    assert "contains no checkpoint; the new recipe replaces the old one" in error
    assert f"starting from {trained}/checkpoints/6 (step 6): discriminator, prior, tokenizer" in error
    assert "k-means" not in error
    source = checkpoint.load(trained, weights="raw").params | checkpoint.load(trained).params
    for weights in ("raw", "ema"):
        for name, tree in checkpoint.load(workdir, weights=weights).params.items():
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tree, source[name])
    before, after = (checkpoint.load(path, weights="raw").params["prior"] for path in (trained, workdir))
    assert np.any(before["head"]["kernel"] != after["head"]["kernel"])  # in a continuous start, it gets no gradient
    assert json.loads((workdir / "config.json").read_text())["init_from"] == str(trained)
    assert checkpoint.load(workdir).mean_clip.shape == (8, 32, 32, 3)

    # resuming does not load it again
    monkeypatch.setattr(warm_start, "read", None)
    assert train(workdir, *start) == 0
    assert "continuing" in capsys.readouterr().err and steps(workdir) == [2]


def recipe_of(trained, **changes):
    values = json.loads((trained / "config.json").read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        holder = values
        for key in path:
            holder = holder[key]
        holder[last] = value
    return parse_recipe(values)


def read(recipe):
    return warm_start.read(recipe, jax.eval_shape(TokenizerStage(recipe).init, jax.random.key(0)).params)


def test_weights_of_every_kind_start_a_run(trained, tmp_path, caplog):
    averaged = checkpoint.load(trained).params
    checkpoint.write_imported(tmp_path / "imported", to_dict(recipe_of(trained)), {"tokenizer": averaged["tokenizer"]})
    hf = ["export", "--checkpoint", str(trained), "--format=huggingface", f"--output={tmp_path / 'hf'}"]
    assert cli.main(hf) == 0
    found = {}
    with caplog.at_level("INFO", "larp_jax"):
        for name, path in {"workdir": trained, "step": trained / "checkpoints" / "6", "imported": tmp_path / "imported",
                           "hf": tmp_path / "hf"}.items():  # fmt: skip
            caplog.clear()
            found[name] = read(recipe_of(trained, init_from=str(path)))
            fresh = {record.args[1] for record in caplog.records if "starts afresh" in record.msg}
            assert fresh == {"prior", "discriminator"} - found[name].keys()
            jax.tree.map(np.testing.assert_array_equal, found[name]["tokenizer"], averaged["tokenizer"])
        caplog.clear()
        alone = recipe_of(trained, init_from=str(trained), loss__prior_weight=0.0, loss__adversarial_weight=0.0)
        assert read(alone).keys() == {"tokenizer"}
        assert "the recipe has no prior" in caplog.text
    assert {name: set(params) for name, params in found.items()} == {
        "workdir": {"tokenizer", "prior", "discriminator"},
        "step": {"tokenizer", "prior", "discriminator"},
        "imported": {"tokenizer"},
        "hf": {"tokenizer", "prior"},
    }


@pytest.mark.parametrize("changes, messages", [
    (
        {"model__quantizer__codebook_size": 16},
        ["model.quantizer.codebook_size is 16 here, 32 there",
         "tokenizer/quantizer/embedding is [16, 4] here, [32, 4] there"],
    ),
    ({"model__encoder__heads": 4}, ["does not fit the recipe: model.encoder.heads is 4 here, 2 there"]),
    ({"prior__heads": 4}, ["does not fit the recipe: prior.heads is 4 here, 2 there"]),
    (
        {"model__learned_decoder_latent_pe": True},
        ["tokenizer/decoder/latent_positions/table is [8, 32] here, none there"],
    ),
])  # fmt: skip
def test_weights_that_do_not_fit(trained, changes, messages):
    with pytest.raises(InputError) as error:
        read(recipe_of(trained, init_from=str(trained), **changes))
    assert all(message in str(error.value) for message in messages), error.value


def test_weights_fit_clips_of_another_size(trained):
    params = read(recipe_of(trained, init_from=str(trained), model__resolution=64, model__quantizer__temperature=0.1))
    assert params.keys() == {"tokenizer", "prior", "discriminator"}


def test_a_missing_start_leaves_nothing_behind(tmp_path, capsys):
    assert train(tmp_path / "run", f"--config.init_from={tmp_path / 'absent'}") == 2
    assert f"init_from={tmp_path / 'absent'}: no checkpoint in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_are_not_a_workdir(trained, tmp_path, capsys):
    imported = shutil.copytree(trained / "checkpoints" / "6", tmp_path / "imported")
    published, other = tmp_path / "published", tmp_path / "other"
    for folder in (published, other):
        folder.mkdir()
        (folder / "config.json").write_text('{"bottleneck": {}}')
    (published / "model.safetensors").touch()
    for workdir in (imported, published):
        before = sorted(tmp_path.rglob("*"))
        assert train(workdir) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"holds weights, no run; to train from them, give --config.init_from={workdir}" in line
        assert sorted(tmp_path.rglob("*")) == before
    assert train(other) == 2
    assert "config.json is not that of a run; choose another --workdir" in capsys.readouterr().err
    assert (other / "config.json").read_text() == '{"bottleneck": {}}'


def test_a_signal_before_the_first_step_ends_the_run_with_nothing_saved(tmp_path, capsys, monkeypatch):
    class Slow(TokenizerTask):
        def __init__(self, recipe, mesh):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was ignored")

    monkeypatch.setitem(stages.TASKS, "tokenizer", Slow)
    assert train(tmp_path / "run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "larp-jax: error: stopped by SIGTERM before the first step; nothing new was saved"
    assert not (tmp_path / "run").exists()


def test_other_videos_under_the_same_name_are_noticed(trained, tmp_path, capsys, monkeypatch):
    workdir = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(common, "data_identity", lambda names: {"count": len(list(names)) - 1, "names": "other"})
    assert train(workdir, "--config.steps=4") == 0  # fewer than it has finished
    assert steps(workdir) == [2, 4, 6]
    assert "data.train has changed since the checkpoint was saved (31 videos, was 32): clips" in capsys.readouterr().err


def test_perceptual_weights_that_are_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LARP_LPIPS", str(tmp_path / "absent.safetensors"))
    assert train(tmp_path / "run", "--config.loss.perceptual=lpips") == 2
    error = capsys.readouterr().err
    assert "absent.safetensors" in error and "larp-jax import --kind lpips" in error
    assert "or choose loss.perceptual='none'" in error
    assert not (tmp_path / "run").exists()


def test_the_batch_must_split_over_the_devices(tmp_path, capsys):
    assert train(tmp_path / "run", "--config.accumulate=3") == 2
    assert "data.batch_size=8 does not split into accumulate=3 parts" in capsys.readouterr().err
    assert train(tmp_path / "run", "--config.accumulate=2") == 2
    assert "does not split into accumulate=2 parts over data x fsdp = 8 devices" in capsys.readouterr().err
    assert train(tmp_path / "run", "--config.data.batch_size=9") == 2
    assert "data.batch_size=9 does not split" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
