"""The quality of every assignment, rewards, and the fewest codes that reach a quality."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_adaptive import CONFIG, noisy

import larp_jax
from larp_jax import cli, metrics
from larp_jax.budgets import QualityTree, greedy_lengths
from larp_jax.config import Greedy
from larp_jax.data import rewards
from larp_jax.data.rewards import Reward
from larp_jax.inference import allocate, batches
from larp_jax.models.tokenizer import Tokenizer

LADDER = CONFIG.adaptive


@pytest.fixture(scope="module")
def model():
    """`module(params)`, the parameters, and clips."""
    graphdef, params = nnx.split(noisy(Tokenizer(CONFIG, rngs=nnx.Rngs(0))))
    video = jax.random.uniform(jax.random.key(3), (3, *CONFIG.clip_shape))
    return lambda params: nnx.merge(graphdef, params), params, video


def reconstructed(model, lengths):
    """Reconstructions of all clips with these lengths, by the whole tokenizer."""
    module, params, video = model
    return jnp.clip(module(params)(video, jnp.asarray(lengths))[0], 0.0, 1.0)


class InPlaceOfLpips(nnx.Module):
    """A distance of frames that compiles in no time."""

    def distance(self, x, y):
        return jnp.abs(x - y).mean((1, 2, 3))


def test_the_tree_of_prefixes_gives_the_quality_of_full_decodes(model):
    module, params, video = model
    found = QualityTree(CONFIG, module, InPlaceOfLpips()).measure(params, video)
    assert found.keys() == {"psnr", "lpips"} and all(x.shape == (3, LADDER.count) for x in found.values())
    assert found["psnr"].std() > 0.01
    for number, lengths in enumerate(LADDER.assignments):
        full = reconstructed(model, np.tile(lengths, (3, 1)))
        mse = jnp.square(full - video).mean((1, 2, 3, 4))
        np.testing.assert_allclose(10 ** (-found["psnr"][:, number] / 10), mse, rtol=1e-5, err_msg=str(lengths))
        np.testing.assert_allclose(found["psnr"][:, number], metrics.psnr(video, full), atol=1e-4)
        np.testing.assert_allclose(found["lpips"][:, number], jnp.abs(full - video).mean((1, 2, 3, 4)), rtol=1e-5)


def test_greedy_gives_each_block_the_fewest_codes_that_reach_the_target(model):
    module, params, video = model
    blocks = np.stack(np.split(np.asarray(video), CONFIG.blocks, axis=1))

    def of_blocks(lengths):
        full = np.stack(np.split(np.asarray(reconstructed(model, lengths)), CONFIG.blocks, axis=1))
        return -10 * np.log10(np.square(full - blocks).mean((2, 3, 4, 5))).T

    every = np.stack([of_blocks(np.tile(x, (3, 1))) for x in LADDER.assignments])
    choose = jax.jit(lambda target: greedy_lengths(module(params), video, Greedy("psnr", target)))
    levels = np.sort(every, axis=None)
    found = set()
    for place in np.flatnonzero(np.diff(levels) > 1e-3)[::4]:
        target = float(levels[place : place + 2].mean())
        for clip, row in enumerate(np.asarray(choose(target))):
            assert tuple(row) in LADDER.assignments
            found.add(tuple(row))
            for block in range(CONFIG.blocks):  # no smaller number would do
                for other in LADDER.assignments:
                    if other[:block] == tuple(row[:block]) and other[block] < row[block]:
                        assert every[LADDER.assignments.index(other), clip, block] < target
    assert len(found) > 2
    np.testing.assert_array_equal(choose(-50.0), np.full((3, 2), 2))
    np.testing.assert_array_equal(choose(99.0), np.tile([8, 4], (3, 1)))


# ------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_are_z_scores_of_quality_and_length():
    quality = np.random.default_rng(0).normal(30.0, 4.0, (20, LADDER.count)).astype(np.float32)
    codes = np.array([sum(x) for x in LADDER.assignments])
    values = {"psnr": quality, "lpips": quality}
    found = rewards.rewards_of(values, LADDER, Reward(metric="psnr", quality_weight=1.5, length_weight=0.5))
    expected = 1.5 * (quality - quality.mean()) / quality.std() - 0.5 * (codes - codes.mean()) / codes.std()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    worse = rewards.rewards_of(values, LADDER, Reward(metric="lpips", quality_weight=1.5, length_weight=0.5))
    assert np.corrcoef(found.ravel(), worse.ravel())[0, 1] < 0
    mse = 10 ** (-quality / 10)
    for metric, error in (("mse", mse), ("rmse", np.sqrt(mse))):
        found_of_it = rewards.rewards_of(values, LADDER, Reward(metric=metric, quality_weight=1.5, length_weight=0.5))
        expected = -1.5 * (error - error.mean()) / error.std() - 0.5 * (codes - codes.mean()) / codes.std()
        np.testing.assert_allclose(found_of_it, expected, atol=1e-4)
    only = rewards.rewards_of(values, LADDER, Reward(quality_weight=0.0))
    assert (only.argmax(axis=1) == codes.argmin()).all()
    means = rewards.statistics({"psnr": quality}, found, LADDER)
    assert means["best"]["reward"] >= means["uniform"]["reward"] > 0
    assert means["uniform"]["lengths"] in [list(x) for x in LADDER.uniform]


def call(*arguments, code=0):
    assert cli.main([*map(str, arguments)]) == code


@pytest.fixture(scope="module")
def allocated(untrained, tmp_path_factory):
    """Rewards of 12 clips under a tokenizer of tests/configs/tiny.py:adaptive, in three shards."""
    folder = tmp_path_factory.mktemp("allocated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "SHARD_CLIPS", 5)
        command = ["allocate", "--checkpoint", untrained, "--data", "moving_shapes", "--max-clips", 12]
        call(*command, "--metric", "psnr", "--output", folder / "out")
    return folder / "out", command


def test_allocate_writes_what_a_single_clip_gives_and_continues(allocated, untrained, tmp_path, monkeypatch, capsys):
    output, command = allocated
    monkeypatch.setattr(allocate, "SHARD_CLIPS", 5)
    found = rewards.RewardSet(output)
    manifest = found.manifest
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 5, 2] and manifest["statistics"]["clips"] == 12
    tokenizer = larp_jax.load_tokenizer(untrained)
    for number in (0, 11):
        row = manifest["rows"][number]
        video, _ = found.source.read_clip(row["video"], row["start"], found.clip)
        for lengths in (found.ladder.assignments[0], tuple(row["lengths"])):
            whole = tokenizer.reconstruct(video[None], budget=lengths)
            psnr = metrics.psnr(video[None] / np.float32(255), whole)
            measured = found.values["psnr"][number, found.ladder.assignments.index(lengths)]
            np.testing.assert_allclose(measured, psnr, atol=1e-3)
        assert row["reward"] == pytest.approx(found.rewards[number].max())

    again = shutil.copytree(output, tmp_path / "again")
    for name in ("manifest.json", "rewards-00001-of-00003.npz"):  # as if it had been killed
        (again / name).unlink()
    (again / "rewards-00002-of-00003.npz").write_bytes(b"damaged")
    whole = {name: (output / name).stat().st_mtime_ns for name in ("rewards-00000-of-00003.npz",)}
    call(*command, "--metric", "psnr", "--output", again)
    assert json.loads((again / "manifest.json").read_text()) == manifest
    np.testing.assert_array_equal(rewards.RewardSet(again).rewards, found.rewards)
    call(*command, "--metric", "psnr", "--output", output, "--quality-weight", 0)  # nothing is measured again
    assert {name: (output / name).stat().st_mtime_ns for name in whole} == whole
    assert rewards.RewardSet(output).manifest["statistics"]["best"]["codes"] == 4.0
    call(*command, "--metric", "mse", "--output", output)  # of the same arrays
    of_mse = rewards.RewardSet(output)
    assert of_mse.manifest["reward"]["metric"] == "mse" and of_mse.manifest["metrics"] == ["psnr"]
    assert not np.array_equal(of_mse.rewards, found.rewards)
    call(*command, "--metric", "psnr", "--output", output)
    assert rewards.RewardSet(output).manifest == manifest

    capsys.readouterr()
    call(*command, "--max-clips", 6, "--metric", "psnr", "--output", output, code=2)
    assert "was started with max_clips 12, not 6" in capsys.readouterr().err
    call("allocate", "--checkpoint", untrained, "--data", f"rewards:{output}", "--output", tmp_path / "x", code=2)
    assert "contains rewards, on which only routers train" in capsys.readouterr().err


def test_two_hosts_give_what_one_gives(allocated, untrained, tmp_path, monkeypatch):
    """Both in this process: the second works while the first waits for it."""
    output, _ = allocated
    tokenizer, written, host = larp_jax.load_tokenizer(untrained), [], [0]

    def run():
        return allocate.allocate(tokenizer, "moving_shapes", tmp_path / "out", metric="psnr", max_clips=12)

    def wait(name):
        if host[0] == 0:
            host[0] = 1
            assert run() == {}
            host[0] = 0

    write = rewards.write_shard
    monkeypatch.setattr(rewards, "write_shard", lambda path, *rest: written.append(path.name) or write(path, *rest))
    monkeypatch.setattr(allocate, "SHARD_CLIPS", 5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: host[0])
    monkeypatch.setattr(batches.multihost_utils, "sync_global_devices", wait)
    assert run() == rewards.read_manifest(output)
    assert written == [f"rewards-0000{i}-of-00003.npz" for i in (0, 2, 1)]
    np.testing.assert_array_equal(rewards.RewardSet(tmp_path / "out").rewards, rewards.RewardSet(output).rewards)
