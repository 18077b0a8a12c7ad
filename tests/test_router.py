"""Routers: training on rewards, choices under --budget auto and greedy, and tokenizers trained under them."""

import dataclasses
import json
import pathlib
import runpy
import shutil

import chaos
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import larp_jax
from larp_jax import api, cli
from larp_jax.config import RouterConfig, default_recipe, parse_recipe
from larp_jax.data import rewards
from larp_jax.data.codes import read_manifest
from larp_jax.models.router import Router, log_differences
from larp_jax.runtime import rng
from larp_jax.tools import plan, report
from larp_jax.training.router import RouterStage
from larp_jax.weights import checkpoint

CONFIGS = pathlib.Path(__file__).parent / "configs"
TINY = CONFIGS / "tiny_router.py"


def call(*arguments, code=0):
    assert cli.main([*map(str, arguments)]) == code


@pytest.fixture(scope="module")
def folders(untrained, tmp_path_factory):
    """Rewards of training and test clips, and a router trained on them."""
    folder = tmp_path_factory.mktemp("router")
    for split, count in (("train", 16), ("test", 8)):
        data = ["--data", f"moving_shapes:{split}", "--max-clips", count, "--output", folder / split]
        call("allocate", "--checkpoint", untrained, "--metric", "psnr", "--length-weight", 0, *data)
    call("train", "--config", TINY, "--workdir", folder / "run", *data_of(folder))
    return folder


def data_of(folder):
    return [f"--config.data.{name}=rewards:{folder / split}" for name, split in (("train", "train"), ("eval", "test"))]


def logged(workdir):
    return [chaos.without_times(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective, reads", [("best", "pixels"), ("rewards", "pixels"), ("rewards", "differences")])
def test_a_router_learns_a_separable_rule(objective, reads):
    """Bright or noisy clips need the most codes, others the fewest, and clips that become so something between."""
    model = {"width": 16, "depth": 1, "heads": 2, "patch_frames": 2, "patch_size": 4, "input": reads}
    clips = {"frames": 4, "resolution": 8, "num_tokens": 12, "blocks": 2, "ladder": (2, 4, 8)}
    recipe = {"stage": "router", "steps": 90, "objective": objective}
    recipe |= {"model": model | clips, "optim": {"learning_rate": 3e-3, "warmup_steps": 5}}
    stage = RouterStage(parse_recipe(recipe))
    assignments = list(stage.recipe.model.adaptive.assignments)
    best = np.array([assignments.index(x) for x in ((2, 2), (8, 4), (2, 8))])
    generator = np.random.default_rng(0)

    def batch(size):
        kind = generator.integers(3, size=size)
        level = np.stack([kind == 1, (kind == 1) | (kind == 2)], axis=1)  # of each block
        level = level.repeat(2, axis=1)[..., None, None, None]
        light, noise = (150 * level, 40) if reads == "pixels" else (0, 40 + 150 * level)
        video = 40 + light + generator.random((size, 4, 8, 8, 3)) * noise
        values = generator.normal(size=(size, len(assignments))).astype(np.float32)
        values[np.arange(size), best[kind]] = 5.0
        return {"video": video.astype(np.uint8), "rewards": values}

    state = jax.jit(stage.init)(rng.key(0))
    step = jax.jit(stage.train_step)
    first = None
    for _ in range(90):
        state, logs = step(state, batch(16), rng.key(0), {})
        first = first or logs
    if objective == "best":
        np.testing.assert_allclose(first["loss"], np.log(len(assignments)), rtol=1e-5)
    unseen = batch(32)
    lengths = stage.module("router", state.params).lengths(unseen["video"] / 255.0)
    assert np.mean(np.all(lengths == np.array(assignments)[unseen["rewards"].argmax(axis=1)], axis=1)) > 0.95
    assert logs["reward"] > 0.95 * logs["reward_best"] > first["reward"]


def test_log_differences():
    video = np.random.default_rng(0).random((2, 4, 8, 12, 3), np.float32)
    video[1] = video[1, :1, :1, :1]  # nothing differs
    found = np.asarray(log_differences(jnp.asarray(video), (2, 4, 4)))
    assert found.shape == (2, 2 * 2 * 3, 3) and found.dtype == np.float32
    step = np.diff(video[0], axis=0)[1:3, 4:, 8:]  # of the last patch; its first frame differs from the patch before
    np.testing.assert_allclose(found[0, -1, 0], np.log(np.square(step).mean() + 1e-5) / 2 + 3, rtol=1e-5)
    right = np.diff(video[0], axis=2)[:2, :4, 3:7]  # of the second patch
    np.testing.assert_allclose(found[0, 1, 2], np.log(np.square(right).mean() + 1e-5) / 2 + 3, rtol=1e-5)
    down = np.diff(video[0], axis=1)[:2, 3:7, :4]  # of the first patch of the second row
    np.testing.assert_allclose(found[0, 3, 1], np.log(np.square(down).mean() + 1e-5) / 2 + 3, rtol=1e-5)
    np.testing.assert_allclose(found[1], np.log(1e-5) / 2 + 3, rtol=1e-5)


def test_what_a_run_leaves_and_how_it_continues(folders, tmp_path, capsys):
    lines = logged(folders / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"train/loss", "train/assignment_top1", "train/reward"} <= lines[0].keys()
    scores = {name: value for name, value in lines[3].items() if name.startswith("eval/")}
    assert scores["eval/reward_share"] <= 1.0 and scores["eval/reward_share_uniform"] < 1.0
    found = checkpoint.load(folders / "run")
    assert found.recipe.model.ladder == (2, 4, 8) and found.recipe.model.frames == 8
    assert found.tokenizer_fingerprint == rewards.read_manifest(folders / "train")["fingerprint"]

    again = shutil.copytree(folders / "run", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    call("train", "--config", TINY, "--workdir", again, *data_of(folders))
    assert logged(again) == lines
    for weights in ("ema", "raw"):
        one, other = (checkpoint.load(path, weights=weights).params for path in (again, folders / "run"))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    export = ["export", "--checkpoint", folders / "run", "--format", "huggingface", "--output", tmp_path / "x"]
    call(*export, code=2)
    assert "holds a router, which the authors' code does not know" in capsys.readouterr().err
    page = report.report(again).read_text()
    assert "share of the best reward, evaluation" in page and "best uniform assignment" in page


def test_scores_are_those_of_the_choices(folders):
    clips = rewards.RewardSet(folders / "test")
    module, params = api.load_router(folders / "run")
    router = nnx.merge(nnx.graphdef(module), params)
    windows = [(row["video"], row["start"]) for row in clips.manifest["rows"]]
    video = np.stack([clips.source.read_clip(*window, clips.clip)[0] for window in windows])
    chosen = np.asarray(router(video / np.float32(255)).argmax(axis=-1))
    own = clips.rewards[np.arange(8), chosen]
    scores = logged(folders / "run")[3]
    assert scores["eval/reward_share"] == pytest.approx(own.mean() / clips.rewards.max(axis=1).mean(), rel=1e-4)
    assert scores["eval/codes"] == np.mean([sum(clips.ladder.assignments[i]) for i in chosen])
    uniform = [clips.rewards[:, clips.ladder.assignments.index(x)].mean() for x in clips.ladder.uniform]
    best = clips.rewards.max(axis=1).mean()
    assert scores["eval/reward_share_uniform"] == pytest.approx(max(uniform) / best, rel=1e-4)


@pytest.mark.slow
def test_budgets_that_depend_on_the_clip(folders, untrained, tmp_path, capsys):
    tokenizer = larp_jax.load_tokenizer(untrained, router=folders / "run")
    clips = rewards.RewardSet(folders / "test")
    video = np.stack([clips.source.read_clip(i, 0, clips.clip)[0] for i in range(4)])
    levels = np.sort(clips.values["psnr"], axis=None)
    for budget in ("auto", f"greedy:{levels[len(levels) // 2]}"):
        codes, lengths = tokenizer.encode(video, budget=budget)
        assert codes.shape == (4, 12) and lengths.sum(axis=1).max() <= 12
        assert {tuple(row) for row in lengths} <= set(clips.ladder.assignments)
        np.testing.assert_array_equal(lengths, tokenizer.assign(video, budget))
    tokenize = ["tokenize", "--checkpoint", untrained, "--input", "moving_shapes:test", "--max-clips", 4, "--output"]
    call(*tokenize, tmp_path / "auto", "--budget", "auto", "--router", folders / "run")
    manifest = read_manifest(tmp_path / "auto")
    assert manifest["budget"] == "auto"
    some = ["evaluate", "--checkpoint", untrained, "--data", "moving_shapes:test", "--max-clips", 8, "--output"]
    call(*some, tmp_path / "e.json", "--budget", "auto", "--router", folders / "run", "--batch-size", 8)
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["codes"] == logged(folders / "run")[3]["eval/codes"]
    call(*some, tmp_path / "e.json", "--budget", "greedy:0", "--batch-size", 8)
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["codes"] == 4.0

    def refused(*options):
        capsys.readouterr()
        call(*tokenize, tmp_path / "x", *options, code=2)
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "budget auto needs a router" in refused("--budget", "auto")
    assert "holds a tokenizer; give a router" in refused("--budget", "auto", "--router", untrained)
    assert "no checkpoint in" in refused("--budget", "auto", "--router", tmp_path / "missing")
    assert "give the PSNR in dB" in refused("--budget", "greedy:much")
    assert "give the PSNR in dB" in refused("--budget", "greedy:ssim=0.9")
    assert "bits=B, auto or greedy:DB" in refused("--budget", "few")
    for budget in ("greedy:10", "auto"):
        call("analyze", "--checkpoint", untrained, "--data", "moving_shapes:test", "--output", tmp_path / "y",
             "--budget", budget, code=2)  # fmt: skip
        assert "gives clips different numbers of codes" in capsys.readouterr().err
    call("evaluate", "--checkpoint", folders / "run", "--data", "moving_shapes:test", code=2)
    assert "holds a router; give its tokenizer, with --budget auto" in capsys.readouterr().err


def test_the_table_of_the_docs(folders, untrained, tmp_path, capsys):
    table = runpy.run_path(str(CONFIGS.parents[1] / "docs" / "adaptive_table.py"))
    table["main"](str(untrained), str(folders / "run"), str(folders / "test"), str(tmp_path / "clips.png"))
    said, scores = capsys.readouterr().out, logged(folders / "run")[3]
    assert f"| auto | {scores['eval/codes']:.1f} |" in said and "rank correlation of codes and motion" in said
    assert " for all: " in said and "mean codes by label: 0: " in said
    assert f"reward_share: {scores['eval/reward_share']:.4f}" in said
    assert (tmp_path / "clips.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_tokenizer_trains_under_a_router(folders, tmp_path, capsys):
    config = f"{CONFIGS / 'tiny.py'}:adaptive"
    adaptive = ["train", "--config", config, "--config.steps=3", "--config.loss.prior_weight=0"]
    under = [*adaptive, "--config.budget=auto", f"--config.router={folders / 'run'}"]
    call(*under, "--workdir", tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert lines[2]["eval/codes"] == logged(folders / "run")[3]["eval/codes"]
    other = shutil.copytree(folders / "run", tmp_path / "moved")  # the same router at another place
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    call(*adaptive, "--config.budget=auto", f"--config.router={other}", "--workdir", tmp_path / "run")
    assert logged(tmp_path / "run") == lines
    capsys.readouterr()
    call(*adaptive, "--config.budget=auto", "--workdir", tmp_path / "x", code=2)
    assert "budget=auto and the path of a router belong together" in capsys.readouterr().err
    call(*under, "--config.model.ladder=2,4", "--config.model.num_tokens=8", "--workdir", tmp_path / "x", code=2)
    assert "the router is for clips of 8x32x32 and model.ladder=2,4,8" in capsys.readouterr().err


def test_wrong_data_and_plans(folders, tmp_path, capsys):
    def refused(*options):
        capsys.readouterr()
        call("train", "--config", TINY, "--workdir", tmp_path / "x", *options, code=2)
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    data = data_of(folders)
    assert "model.input" in refused(*data, "--config.model.input=edges")
    assert "a router trains on rewards" in refused("--config.data.train=moving_shapes")
    assert "model.num_tokens=16, but data.train=rewards:" in refused(*data, "--config.model.num_tokens=16")
    assert "manifest.json is missing" in refused(f"--config.data.train=rewards:{tmp_path}")
    assert "is that of the rewards for a router" in refused(*data, "--config.data.flip=True")
    damaged = shutil.copytree(folders / "train", tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    for change, said in (
        ({"ladder": [4, 2]}, "is damaged (model.ladder=4,2 must be"),
        ({"rows": manifest["rows"][1:]}, "16 rows in shards, 15 listed"),
        ({"metrics": ["ssim"]}, "do not fit the reward"),
        ({"clip": 3}, "is damaged (TypeError"),
        ({"version": 9}, "only 1 is supported"),
    ):
        (damaged / "manifest.json").write_text(json.dumps(manifest | change))
        assert said in refused(f"--config.data.train=rewards:{damaged}")
    manifest["rows"][3]["source"] = "another"
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert "has no another at its place any more" in refused(f"--config.data.train=rewards:{damaged}")

    recipe = parse_recipe(json.loads((folders / "run" / "config.json").read_text()))
    planned = plan.plan(recipe, gpus="H200:1")
    assert planned["fits"] and planned["flops_step"] > 0
    of_pixels = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, input="pixels"))
    assert plan.plan(of_pixels, gpus="H200:1")["flops_step"] > planned["flops_step"]
    call("plan", "--config", TINY, "--gpus", "H200:1", code=2)
    assert "model.frames must be given, because no rewards say it" in capsys.readouterr().err


def test_the_published_size():
    recipe = default_recipe("router")
    model = parse_recipe(recipe).model
    assert (model.width, model.depth, model.heads) == (384, 12, 6)
    clips = {"frames": 16, "resolution": 128, "num_tokens": 1024, "blocks": 4, "ladder": (32, 64, 128, 256, 512)}
    abstract = nnx.eval_shape(lambda: Router(RouterConfig(**clips), rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    assert 20e6 < count < 30e6
