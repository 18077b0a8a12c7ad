"""Evaluators count every clip once, for any batch size and mesh, and use the statistics of the right real clips."""

import dataclasses
import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import moving_frames
from flax import nnx
from test_steps import RECIPE

from larp_jax import metrics
from larp_jax.config import MeshConfig
from larp_jax.data import ClipSpec
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.evaluation import evaluators, fvd, metrics as metric_classes, registry
from larp_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from larp_jax.evaluation.protocols import ClipSet, Protocol
from larp_jax.runtime import sharding
from larp_jax.training import losses
from larp_jax.training.tokenizer import TokenizerStage

CLIP = ClipSpec(frames=4, resolution=16, flip=False)
CLIPS = 11  # windows of 4 frames in the folder below
STAGE = TokenizerStage(RECIPE)
IDENTITY = {"sha256": "of a stub"}


class Stub(nnx.Module):
    """In place of I3D, with five features per clip, and of LPIPS."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(np.random.default_rng(7).standard_normal((6, 5), np.float32)))

    def logits(self, video):
        return jnp.concatenate([video.mean((1, 2, 3)), video.std((1, 2, 3))], axis=-1) @ self.kernel[...]

    def distance(self, x, y):
        return jnp.abs((x - y) @ self.kernel[:3]).mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i, frames in enumerate((4, 9, 12, 17, 5)):
        write_video(folder / f"{i}.mp4", moving_frames(frames, 16, 24, seed=i), 8.0)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "larp_jax"


def clips_of(folder, **options):
    return ClipSet(f"folder:{folder}", CLIP, **options)


@functools.cache
def params():
    """Random parameters of all modules; none are zero as in the initialization."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(STAGE.init, jax.random.key(0)).params
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)


def on_devices(count):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:count])


OF_CODES = tuple(name for name in registry.METRICS if name not in ("codes", "latents"))  # without a ladder


def evaluate(folder, devices, batch_size, names=OF_CODES):
    mesh = on_devices(devices)
    with jax.set_mesh(mesh):
        features = fvd.VideoFeatures(Stub(), IDENTITY)
        clips = clips_of(folder)
        real = fvd.real_statistics(features, clips, batch_size=batch_size)
        joined = registry.default_metrics(names, RECIPE, mean_clip=np.full(CLIP.shape, 0.5, np.float32))
        joined.append(metric_classes.ReconstructionFvd(features, real, "sample", mesh))
        if "lpips" in names:
            joined.append(metric_classes.LpipsDistance(Stub(), mesh))
        evaluator = evaluators.ReconstructionEvaluator(
            lambda params: STAGE.module("tokenizer", params), clips, mesh, joined, batch_size=batch_size
        )
        return evaluator.run(params())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The results on one device with all clips in one batch, without padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return evaluate(folder, devices=1, batch_size=CLIPS)


@pytest.mark.slow
def test_batches_devices_and_padding_change_nothing(folder, whole, cache):
    whole, extras = whole
    assert extras["clips"] == CLIPS
    padded, padded_extras = evaluate(folder, devices=8, batch_size=8)
    assert padded.keys() == whole.keys()
    assert set(whole) == {
        "psnr", "psnr_mean_clip", "ssim", "lpips", "rfvd", "usage", "perplexity", "kl_from_uniform", "position_entropy",
        "prior_cross_entropy", "prior_top1", "prior_top5",
    }  # fmt: skip
    for name, value in whole.items():
        assert value == pytest.approx(padded[name], rel=1e-4), name
    np.testing.assert_array_equal(extras["codes"].counts, padded_extras["codes"].counts)
    assert padded_extras["clips"] == CLIPS and extras["codes"].counts.sum() == CLIPS * RECIPE.model.num_tokens
    assert extras["examples"].shape == (8, 2, *CLIP.shape)
    np.testing.assert_array_equal(extras["examples"][:, 0], padded_extras["examples"][:, 0])

    # and each agrees with its definition, computed directly from all clips
    with clips_of(folder).batches(CLIPS) as batches:
        video = next(batches)["video"] / np.float32(255)
    expected, indices, features = jax.jit(written_out)(params(), video)
    for name, value in expected.items():
        assert whole[name] == pytest.approx(float(value), rel=1e-4), name
    assert whole["usage"] == len(np.unique(indices)) / RECIPE.model.quantizer.codebook_size
    real, made = map(FeatureStatistics.of, features)
    assert whole["rfvd"] == pytest.approx(frechet_distance(real, made, covariance="sample"), rel=1e-4)


def written_out(params, video):
    """Expected means, the codes, and features of the clips and of their reconstructions."""
    tokenizer = STAGE.module("tokenizer", params)
    reconstruction, quantized = tokenizer(video)
    reconstruction = jnp.clip(reconstruction, 0.0, 1.0)
    frames = (jnp.reshape(x, (-1, *x.shape[2:])) for x in (video, reconstruction))
    cross_entropy, accuracy = losses.prior_loss(
        STAGE.module("prior", params),
        RECIPE.prior,
        quantized.z_q,
        quantized.indices,
        tokenizer.quantizer.codebook,
        key=None,
        mix_ratio=0.0,
    )
    expected = {
        "psnr": metrics.psnr(video, reconstruction).mean(),
        "psnr_mean_clip": metrics.psnr(video, jnp.full_like(video, 0.5)).mean(),
        "ssim": metrics.ssim(video, reconstruction).mean(),
        "lpips": Stub().distance(*frames).mean(),
        "prior_cross_entropy": cross_entropy,
        **accuracy,
    }
    return expected, quantized.indices, [Stub().logits(x) for x in (video, reconstruction)]


def test_metrics_that_apply_to_a_tokenizer():
    assert registry.available(RECIPE, ["tokenizer", "prior"]) == OF_CODES
    ladder = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, ladder=(RECIPE.model.num_tokens,)))
    assert set(registry.available(ladder, ["tokenizer", "prior"])) == {*OF_CODES, "codes"}
    continuous = dataclasses.replace(RECIPE.model.quantizer, kind="kl")
    model = dataclasses.replace(RECIPE.model, quantizer=continuous)
    recipe = dataclasses.replace(RECIPE, model=model, loss=dataclasses.replace(RECIPE.loss, prior_weight=0.0))
    assert set(registry.available(recipe, ["tokenizer"])) == {*OF_CODES, "latents"} - {"usage", "prior"}
    assert "prior" not in registry.available(RECIPE, ["tokenizer"])


@pytest.fixture
def counted(monkeypatch):
    """A list with one entry for each computation of features of real clips."""
    calls = []
    compute = fvd.VideoFeatures.statistics

    def count(self, *args, **options):
        calls.append(1)
        return compute(self, *args, **options)

    monkeypatch.setattr(fvd.VideoFeatures, "statistics", count)
    return calls


def test_statistics_of_real_clips_are_computed_once(folder, tmp_path, cache, counted, caplog):
    def statistics(folder=folder, identity=IDENTITY, **options):
        clips = clips_of(folder, **options)
        return fvd.real_statistics(fvd.VideoFeatures(Stub(), identity), clips, batch_size=8)

    first = statistics()
    (kept,) = cache.iterdir()
    assert kept.suffix == ".npz" and counted == [1] and first.count == CLIPS
    again = statistics()
    assert counted == [1]
    np.testing.assert_array_equal(again.scatter, first.scatter)

    # the same content in another folder under other names
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / f"copy_{path.name}").write_bytes(path.read_bytes())
    statistics(copy)
    assert counted == [1]

    # changes lead to a new computation: other windows, other weights, other content of the same size
    statistics(max_clips=3)
    statistics(identity={"sha256": "of another stub"})
    assert len(counted) == 3
    changed = copy / "copy_3.mp4"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    statistics(copy)
    assert len(counted) == 4

    # so does a broken file
    kept.write_bytes(kept.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        statistics()
    assert len(counted) == 5 and "is damaged (File is not a zip file)" in caplog.text
    statistics()
    assert len(counted) == 5


def test_a_cache_that_cannot_be_written_stops_nothing(folder, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        statistics = fvd.real_statistics(fvd.VideoFeatures(Stub(), IDENTITY), clips_of(folder), batch_size=8)
    assert statistics.count == CLIPS
    assert "cannot cache the I3D features" in caplog.text


def test_fvd_of_generated_videos(folder, cache, caplog):
    clips = clips_of(folder, protocol=Protocol(count=7), name="some")
    evaluator = fvd.FvdEvaluator(Stub(), IDENTITY, clips, batch_size=4)
    with clips.batches(7) as batches:
        real = next(batches)["video"]
    scores, protocol = evaluator.run(iter([real[:3], real[3:]]))
    assert scores["fvd"] < 1e-6
    json.dumps(protocol)
    wanted = {"protocol": "some", "seed": 42, "clips": 7, "made": 7, "covariance": "population", "i3d": IDENTITY}
    assert wanted.items() <= protocol.items()

    made = np.random.default_rng(0).integers(0, 256, (7, *CLIP.shape), np.uint8)
    one, _ = evaluator.run([made])
    each, _ = evaluator.run([video[None] for video in made])
    floats, _ = evaluator.run([made / np.float32(255)])
    assert one["fvd"] > 0.01
    assert each["fvd"] == pytest.approx(one["fvd"], rel=1e-4) and floats["fvd"] == pytest.approx(one["fvd"], rel=1e-5)
    assert not [record for record in caplog.records if "generate as many" in record.message]
    evaluator.run([made[:1]])
    assert "1 videos are compared with 7 real clips" in caplog.text


def test_generated_videos_without_a_distance(folder, cache):
    evaluator = fvd.FvdEvaluator(Stub(), IDENTITY, clips_of(folder), batch_size=4)
    broken = np.full((2, *CLIP.shape), np.nan, np.float32)
    for videos, message in (([broken], "2 of 2 clips are NaN"), ([], "there is no clip")):
        with pytest.raises(InputError, match=message) as caught:
            evaluator.run(videos)
        assert "\n" not in str(caught.value)


def test_frames_are_resized_first_as_torchvision_does():
    torch = pytest.importorskip("torch")
    video = np.random.default_rng(0).random((8, 3, 16, 16, 3), np.float32)
    planes = torch.from_numpy(video).reshape(24, 16, 16, 3).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(planes, (8, 8), mode="bilinear", antialias=True)
    small = small.permute(0, 2, 3, 1).reshape(8, 3, 8, 8, 3).numpy()
    features = fvd.VideoFeatures(Stub(), IDENTITY, resolution=8)
    found = features.statistics([(video, np.ones(8))], batch_size=8)
    expected = FeatureStatistics.of(Stub().logits(small))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-3, atol=1e-7)


TWO_PROCESSES = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
import test_evaluators as t
folder = sys.argv[1]
scores, extras = t.evaluate(folder, devices=4, batch_size=8, names=("psnr", "usage"))
made = t.np.random.default_rng(0).integers(0, 256, (7, *t.CLIP.shape), t.np.uint8)
mine = [made[:5], made[5:6]] if jax.process_index() == 0 else [made[6:]]
fvd, protocol = t.fvd.FvdEvaluator(t.Stub(), t.IDENTITY, t.clips_of(folder), batch_size=4).run(mine)
print(json.dumps([scores, extras["clips"], len(extras["examples"]), fvd, protocol["made"]]))
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(folder, whole, cache):
    made = np.random.default_rng(0).integers(0, 256, (7, *CLIP.shape), np.uint8)
    expected, _ = fvd.FvdEvaluator(Stub(), IDENTITY, clips_of(folder), batch_size=4).run([made])
    shutil.rmtree(cache)  # otherwise they would use the cached statistics
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(folder), address, str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (printed, errors), examples in zip(processes, outputs, (7, 4), strict=True):
        assert process.returncode == 0, errors
        scores, clips, shown, made_fvd, made_count = json.loads(printed.splitlines()[-1])
        assert (clips, made_count) == (CLIPS, 7)
        assert shown == examples  # of its own clips
        assert {"psnr", "usage", "position_entropy", "rfvd"} <= scores.keys()
        for name, value in scores.items():
            assert value == pytest.approx(whole[0][name], rel=1e-4), name
        assert made_fvd["fvd"] == pytest.approx(expected["fvd"], rel=1e-4)
