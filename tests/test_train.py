"""The trainer through the command line: what a run leaves, resuming, stopping, diverging."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from larp_jax import checkpoint, cli, tasks, writers
from larp_jax.train import StopRequest
from larp_jax.writers import MetricWriter

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny.py")


def train(workdir, *overrides):
    return cli.main(["train", "--config", CONFIG, "--workdir", str(workdir), *overrides])


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_time"} for line in lines]


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
    assert [row["step"] for row in rows(trained)] == [1, 2, 3, 4, 5, 6]
    logged = {"loss", "loss_prior", "loss_adversarial", "loss_discriminator", "logits_real", "logits_fake", "psnr"}
    assert {f"train/{name}" for name in logged} <= rows(trained)[0].keys()
    evaluated = rows(trained)[5]
    assert {"eval/psnr", "eval/psnr_mean_clip", "eval/ssim", "eval/usage", "eval/prior_top1"} <= evaluated.keys()
    assert (trained / "media" / "00000006_reconstruction.png").exists()
    found = checkpoint.load(trained)
    assert found.recipe.model.num_tokens == 8
    assert found.code_counts.sum() == 8 * 8
    assert found.mean_clip.shape == (8, 32, 32, 3)
    assert json.loads((trained / "config.json").read_text())["steps"] == 6


def test_resuming_is_never_having_stopped(trained, tmp_path, capsys):
    workdir = as_if_killed(trained, tmp_path / "run", newest=2)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')  # cut short by the kill
    assert train(workdir, "--config.data.workers=2") == 0  # which may change
    assert "changed since the run began: data.workers from 0 to 2" in capsys.readouterr().err
    assert rows(workdir) == rows(trained)
    assert_same_weights(workdir, trained)


def test_a_finished_run_stays_as_it_is(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    assert train(workdir) == 0
    assert "trained to step 6" in capsys.readouterr().out
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(workdir, trained)


def test_sigterm_saves_and_the_same_command_continues(trained, tmp_path, capsys, monkeypatch):
    workdir = as_if_killed(trained, tmp_path / "run", newest=2)
    write_scalars = MetricWriter.write_scalars

    def write_and_signal(self, step, scalars):
        write_scalars(self, step, scalars)
        if step == 4:  # written when step 5 has been started
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(writers.MetricWriter, "write_scalars", write_and_signal)
        assert train(workdir) == 1
    assert "stopped by SIGTERM at step 5, saved" in capsys.readouterr().err
    assert steps(workdir)[-1] == 5
    assert train(workdir) == 0
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(workdir, trained)


def test_a_second_interrupt_does_not_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(trained, tmp_path, capsys, monkeypatch):
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
    assert steps(workdir) == [2, 4]
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), checkpoint.load(workdir).params))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("seed=1", "holds a run with seed=0, not 1"),
        ("data.batch_size=16", "holds a run with data.batch_size=8, not 16"),
        ("data.train=moving_shapes:test", "with data.train='moving_shapes', not 'moving_shapes:test'"),
        ("model.num_tokens=16", "with model.num_tokens=8, not 16"),
    ],
)
def test_a_workdir_holds_one_run(trained, capsys, setting, message):
    assert train(trained, f"--config.{setting}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "choose another --workdir, or the settings it was started with" in line


def test_other_videos_under_the_same_name_are_noticed(trained, tmp_path, capsys, monkeypatch):
    workdir = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(tasks, "_identity", lambda names: {"count": len(list(names)) - 1, "names": "other"})
    assert train(workdir, "--config.steps=4") == 0  # fewer than it has done
    assert steps(workdir) == [2, 4, 6]
    assert "data.train has 31 videos, it had 32 when the checkpoint was saved" in capsys.readouterr().err


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
