"""Training a flow generator from the command line, and what the commands make of it."""

import json
import pathlib
import shutil

import chaos
import jax
import numpy as np
import pytest

import larp_jax
from larp_jax import cli
from larp_jax.data.codes import CodeSet
from larp_jax.weights import checkpoint

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny_flow.py")


def train(workdir, tokenizer, *overrides):
    return cli.main(
        ["train", "--config", CONFIG, "--workdir", str(workdir), f"--config.tokenizer={tokenizer}", *overrides]
    )


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [chaos.without_times(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def online(continuous, tmp_path_factory):
    """The workdir of a run that encodes clips during training, and is given classes and frames."""
    workdir = tmp_path_factory.mktemp("flow") / "run"
    assert train(workdir, continuous, "--config.model.condition=class+frames") == 0
    return workdir


def test_what_a_run_leaves(online, continuous):
    logged = rows(online)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(logged[0]["train/explained"], 0.0, atol=1e-6)  # the head starts at zero
    assert 1.7 < logged[0]["train/loss"] < 2.3  # noise and standardized latents have variance 1
    assert {"eval/flow_loss", "eval/explained"} <= logged[5].keys()
    assert {path.name for path in (online / "media").iterdir()} == {
        f"{step:08d}_samples.{suffix}" for step in (3, 6) for suffix in ("png", "mp4")
    }
    found = checkpoint.load(online)
    assert found.recipe.model.token_shape == (8, 4) and found.recipe.model.num_classes == 16


def test_a_resumed_run_equals_an_uninterrupted_one(online, continuous, tmp_path):
    workdir = shutil.copytree(online, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    # other statistics than those of the checkpoint would change everything
    options = ["--config.model.condition=class+frames", "--config.statistics_clips=12"]
    assert train(workdir, continuous, *options) == 0
    assert rows(workdir) == rows(online)
