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
from larp_jax.api import LoadedFlow
from larp_jax.data import ClipSpec
from larp_jax.data.codes import CodeSet
from larp_jax.errors import InputError
from larp_jax.evaluation.generated import videos_for
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.inference.generate import Sampler
from larp_jax.models.sampling import SamplingOptions
from larp_jax.weights import checkpoint

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny_flow.py")


def train(workdir, tokenizer, *overrides):
    return cli.main(
        ["train", "--config", CONFIG, "--workdir", str(workdir), f"--config.tokenizer={tokenizer}", *overrides]
    )


@pytest.fixture(scope="module")
def online(continuous, tmp_path_factory):
    """The workdir of a run that encodes clips during training, and is given classes and frames."""
    workdir = tmp_path_factory.mktemp("flow") / "run"
    assert train(workdir, continuous, "--config.model.condition=class+frames") == 0
    return workdir


def test_what_a_run_leaves(online, continuous):
    logged = chaos.rows(online)
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
    assert train(workdir, continuous, "--config.model.condition=class+frames") == 0
    assert chaos.rows(workdir) == chaos.rows(online)
    for weights in ("ema", "raw"):
        one, other = (checkpoint.load(path, weights=weights) for path in (workdir, online))
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
        np.testing.assert_array_equal(one.statistics, other.statistics)


@pytest.fixture(scope="module")
def offline(continuous, tmp_path_factory):
    """The workdir of a run on latents on disk, given classes alone."""
    folder = tmp_path_factory.mktemp("flow_offline")
    command = ["tokenize", f"--checkpoint={continuous}", f"--output={folder / 'latents'}"]
    assert cli.main([*command, "--input=moving_shapes:train", "--windows=1"]) == 0
    data = [f"--config.data.{name}=tokens:{folder / 'latents'}" for name in ("train", "eval")]
    assert train(folder / "run", continuous, *data, "--config.steps=3", "--config.eval_every=3") == 0
    return folder


def test_latents_on_disk_are_standardized_by_their_statistics(offline, online, continuous):
    manifest = CodeSet(offline / "latents").manifest
    found = checkpoint.load(offline / "run")
    np.testing.assert_allclose(found.statistics, [manifest["mean"], manifest["std"]], rtol=1e-6)
    assert found.tokenizer_fingerprint == larp_jax.load_tokenizer(continuous).fingerprint
    # those of other windows of the same clips are similar
    np.testing.assert_allclose(checkpoint.load(online).statistics, found.statistics, rtol=0.3, atol=0.1)
    assert 1.7 < chaos.rows(offline / "run")[0]["train/loss"] < 2.3


def test_sampling_from_python(online, continuous):
    generator, tokenizer = larp_jax.load_generator(online), larp_jax.load_tokenizer(continuous)
    generator.check_tokenizer(tokenizer)
    video = np.random.default_rng(0).random((4, 8, 32, 32, 3), np.float32)
    frames, key = np.asarray(tokenizer.encode_frames(video[:, :3])), jax.random.key(1)
    options = {"cfg_scale": 2.0, "frames_scale": 1.5}
    latents = np.asarray(generator.sample([0, 1, 2, 3], key=key, frames=frames, solver_steps=5, **options))
    assert latents.shape == (4, 8, 4) and np.isfinite(latents).all()
    assert tokenizer.decode(latents).shape == video.shape
    # a sample depends on its number and condition alone; another number of steps needs no other program
    some = generator.sample([2, 0], key=key, frames=frames[[2, 0]], indices=[2, 0], solver_steps=5, **options)
    np.testing.assert_allclose(some, latents[[2, 0]], atol=1e-4)
    before = generator._sample._cache_size()
    more = generator.sample_counted([0, 1, 2, 3], key=key, frames=frames, solver_steps=7, **options)
    assert generator._sample._cache_size() == before and int(more.passes) == 7
    assert not np.allclose(more.latents, latents, atol=1e-3)
    for message, arguments in (
        ("top_k 5 is for generators of codes", {"top_k": 5}),
        ("budget 8: ", {"budget": "8"}),
    ):
        with pytest.raises(InputError, match=message):
            generator.sample([0], key=key, frames=frames[:1], **arguments)
    with pytest.raises(ValueError, match=r"latents must be \[B, 8, 4\]"):
        generator.sample([0], key=key, frames=frames[:1, :3])
    with pytest.raises(InputError, match="has no logits"):
        generator.logits(latents)


@pytest.mark.slow
def test_commands(offline, online, continuous, tmp_path, capsys, monkeypatch):
    pair = ["--checkpoint", str(offline / "run"), "--tokenizer", str(continuous)]
    steps = ["--solver=heun", "--solver-steps=3", "--batch-size=2"]
    output = tmp_path / "samples"
    sample = ["sample", *pair, "--classes=0:2,3:1", "--cfg-scale=1.5", f"--output={output}", *steps]
    assert cli.main(sample) == 0
    source = CodeSet(output)
    assert source.rows["latents"].shape == (3, 8, 4) and source.labels().tolist() == [0, 3, 0]
    np.testing.assert_allclose(source.manifest["mean"], source.rows["latents"].mean((0, 1), np.float64), atol=1e-3)
    assert (output / "samples.png").is_file() and (output / "000001_3.mp4").is_file()
    detokenize = ["detokenize", f"--checkpoint={continuous}", f"--input={output}", f"--output={tmp_path / 'videos'}"]
    assert cli.main(detokenize) == 0
    # a whole folder is kept, and one of other settings not touched
    assert cli.main(sample) == 0
    assert cli.main([*sample, "--seed=1"]) == 2

    given = ["--checkpoint", str(online), "--tokenizer", str(continuous)]
    predict = ["predict", *given, "--input=moving_shapes:test", f"--output={tmp_path / 'predictions'}"]
    assert cli.main([*predict, "--cond-frames=3", "--max-clips=2", "--classes=1", *steps]) == 0
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 2

    evaluate = ["evaluate", *pair, "--data=moving_shapes:test", f"--output={tmp_path / 'scores.json'}"]
    assert cli.main([*evaluate, "--max-clips=8"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["metrics"].keys() == {"flow_loss", "explained"}
    assert scores["protocol"]["latents"] == {"d": 4, "N": 8}
    logged = chaos.rows(offline / "run")[2]["eval/flow_loss"]
    np.testing.assert_allclose(scores["metrics"]["flow_loss"], logged, rtol=0.5)

    monkeypatch.setattr("larp_jax.tools.benchmark.CPU_WORK", (32, 2**10))
    output = tmp_path / "benchmark.json"
    assert cli.main(["benchmark", "sample", *pair, *steps, "--seconds=0.1", f"--output={output}"]) == 0
    found = json.loads(output.read_text())
    assert (found["passes"], found["latents"], found["channels"], found["solver"]) == (5, 8, 4, "heun")
    assert found["pass_ms"] > 0 and found["first_clip_seconds"] > 0 and "temperature" not in found
    published = str(pathlib.Path(CONFIG).parents[2] / "configs" / "flow_ucf101.py")
    assert cli.main(["plan", "--config", published, "--gpus=H200:8", f"--output={tmp_path / 'plan.json'}"]) == 0
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["memory_mb"]["params"] == pytest.approx(4 * 457.96, rel=1e-3) and planned["fits"]

    capsys.readouterr()
    for command, message in (
        ([*evaluate[:-1], "--metrics=cross_entropy"], "cross_entropy does not apply to this checkpoint"),
        ([*sample[:-4], f"--output={tmp_path / 't'}", "--top-k=3"], "top_k 3 is for generators of codes"),
    ):
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def test_videos_to_evaluate_are_the_same_from_disk(offline, continuous, tmp_path):
    generator, tokenizer = larp_jax.load_generator(offline / "run"), larp_jax.load_tokenizer(continuous)
    sampler = Sampler(generator, tokenizer, options=SamplingOptions(solver_steps=2), batch_size=2)
    clips = ClipSet("moving_shapes:test", ClipSpec(8, 32), max_clips=3)
    videos = lambda: np.concatenate(list(videos_for(sampler, clips, np.arange(3), folder=tmp_path / "kept")))  # noqa: E731
    sampled = videos()
    assert sampled.shape == (3, 8, 32, 32, 3)
    np.testing.assert_array_equal(videos(), sampled)

    statistics = tuple(1e8 * x for x in generator.statistics)
    huge = LoadedFlow(generator.config, jax.device_get(generator.params), statistics=statistics)
    with pytest.raises(InputError, match="float16, in which they are stored, ends at 65504"):
        Sampler(huge, tokenizer, options=SamplingOptions(solver_steps=2), batch_size=2).codes([0, 1])


def test_tokenizers_and_data_of_the_other_kind(offline, continuous, tmp_path, capsys):
    tiny = str(pathlib.Path(CONFIG).with_name("tiny_generator.py"))
    latents = f"--config.data.train=tokens:{offline / 'latents'}"
    for options, message in (
        ([f"--config.tokenizer={continuous}"], "has continuous latents and no codes; give another"),
        (["--config.tokenizer=", latents], "holds latents, and this generator needs codes; give a folder of these"),
    ):
        assert cli.main(["train", "--config", tiny, "--workdir", str(tmp_path / "run"), *options]) == 2
        assert message in capsys.readouterr().err
