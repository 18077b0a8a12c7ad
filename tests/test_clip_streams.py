"""Streams of generators that sample whole clips and are given the last frames of the clip before: flows, and codes."""

import json
import logging

import jax
import numpy as np
import pytest
from conftest import random_checkpoint
from data_helpers import moving_frames
from flax import nnx
from test_generate import write_generator
from test_stream import contents, run  # noqa: F401  (`contents` is a fixture)

from larp_jax import Stream, cli, load_generator, load_tokenizer
from larp_jax.config import FlowConfig, FlowRecipe, to_dict
from larp_jax.data.video import write_video
from larp_jax.errors import InputError
from larp_jax.inference import stream
from larp_jax.models.flow import Flow
from larp_jax.models.pixels import to_uint8
from larp_jax.tools import demo, demo_page
from larp_jax.weights import checkpoint

GIVEN = 3  # of the 8 frames of a clip


def write_flow(folder, fingerprint, **options):
    """A flow generator with random weights for the variant `continuous` of tests/configs/tiny.py."""
    sizes = {"size": "custom", "width": 16, "depth": 1, "heads": 2, "num_tokens": 8, "code_dim": 4, "num_classes": 16}
    config = FlowConfig(**{"condition": "class+frames", **sizes, **options})
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Flow(config, rngs=nnx.Rngs(0))), nnx.Param))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)
    known = {
        "tokenizer_fingerprint": fingerprint,
        "latent_statistics": {"mean": [0.1, 0.0, -0.2, 0.0], "std": [1.0, 0.5, 2.0, 1.0]},
        "class_names": ["walk", "run", "jump"],
    }
    recipe = FlowRecipe(model=config, cond_frames=GIVEN)
    checkpoint.write_imported(folder, to_dict(recipe), {"generator": params}, known=known)
    return folder


@pytest.fixture(scope="module")
def flow(continuous, tmp_path_factory):
    """The path of a flow generator that is given classes and frames."""
    fingerprint = load_tokenizer(continuous).fingerprint
    return write_flow(tmp_path_factory.mktemp("g") / "flow", fingerprint)


@pytest.fixture(scope="module")
def coders(tmp_path_factory):
    """The paths of a generator of codes that is given frames, or sometimes nothing, and of its tokenizer."""
    folder = tmp_path_factory.mktemp("codes")
    return write_generator(folder / "g", {}, condition="frames", frames_dropout=0.1), random_checkpoint(folder, "plain")


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_clips_go_on_from_the_last_frames_in_constant_memory(kind, request, caplog):
    """After the second clip nothing is compiled, and no array is kept."""
    if kind == "latents":
        paths = request.getfixturevalue("flow"), request.getfixturevalue("continuous")
        given, options = {"classes": [0, 2]}, {"solver_steps": 2, "frames_scale": 1.5}
    else:
        paths = request.getfixturevalue("coders")
        given, options = {"indices": [0, 1]}, {"temperature": 0.5}
    generator, tokenizer = load_generator(paths[0]), load_tokenizer(paths[1])
    count = generator.given_frames
    assert count == (GIVEN if kind == "latents" else 5)
    video = Stream(generator, tokenizer, key=jax.random.key(0), **given, **options)
    found, before = [], [None]
    for _ in range(2):
        found.append(next(video))
        before.append(video.state.recent)
    for number, (block, recent) in enumerate(zip(found, before, strict=False)):
        frames = None if recent is None else tokenizer.encode_frames(recent)
        key = jax.random.fold_in(jax.random.key(0), number)
        whole = tokenizer.decode(generator.sample(key=key, frames=frames, **({"indices": [0, 1]} | given), **options))
        np.testing.assert_array_equal(block, whole[:, count:])
        np.testing.assert_array_equal(before[number + 1], to_uint8(whole)[:, -count:])
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        last = next(video)
        alive = len(jax.live_arrays())
        for _ in range(4):
            last = next(video)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
    assert len(jax.live_arrays()) == alive and last.shape == (2, 8 - count, 32, 32, 3)

    again = Stream(generator, tokenizer, key=jax.random.key(0), frames=2 * (8 - count) - 1, **given, **options)
    again.resume(video.state._replace(number=1, recent=before[1]))
    (last,) = again
    np.testing.assert_array_equal(last, found[1][:, :-1])

    begun = Stream(generator, tokenizer, key=jax.random.key(0), first=before[1], **given, **options)
    assert begun.state.number == 0 and (next(begun) != found[0]).any()
    with pytest.raises(ValueError, match=r"first must be uint8 \[2, "):
        Stream(generator, tokenizer, key=jax.random.key(0), first=before[1][:, 1:], **given)


def test_the_command_goes_on_after_a_stop(flow, continuous, tmp_path, contents, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stream, "PART_BLOCKS", 2)
    write_video(tmp_path / "first.mp4", moving_frames(4, 32, 32, seed=1), 8.0)
    given = ("--classes=0:15,jump:5", "--seed=3", "--cfg-scale=1.5", "--solver=heun", "--solver-steps=2")
    whole = (*given, f"--input={tmp_path / 'first.mp4'}")
    # a program may round differently where it was compiled and where it came from the cache: compiled before
    assert run(flow, continuous, tmp_path / "compiled", "--frames=10", *given) == 0
    assert run(flow, continuous, tmp_path / "whole", "--frames=23", *whole) == 0
    expected = contents(tmp_path / "whole")
    manifest = json.loads(expected["manifest.json"])
    assert [(part["frames"], part["classes"]) for part in manifest["parts"]] == [(10, [0, 0]), (10, [0, 2]), (3, [0])]
    assert manifest["context"] == GIVEN and manifest["solver"] == "heun"

    written = stream.write_video

    def stop(path, frames, fps):
        if path.name == "000010.mp4":
            next(frames)
            raise KeyboardInterrupt
        written(path, frames, fps)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_video", stop)
        assert run(flow, continuous, tmp_path / "stopped", "--frames=23", *whole) == 1
    assert run(flow, continuous, tmp_path / "stopped", "--frames=15", *whole) == 0
    assert run(flow, continuous, tmp_path / "stopped", "--frames=23", *whole) == 0
    assert contents(tmp_path / "stopped") == expected
    # it goes on from the video, and this is part of the settings
    assert contents(tmp_path / "compiled")["000000.mp4"] != expected["000000.mp4"]
    assert run(flow, continuous, tmp_path / "whole", "--frames=23", *given) == 2


def test_what_does_not_fit_is_refused(flow, continuous, tmp_path, capsys):
    fingerprint = load_tokenizer(continuous).fingerprint
    by_class = write_flow(tmp_path / "by_class", fingerprint, condition="class")
    always = write_flow(tmp_path / "always", fingerprint, frames_dropout=0.0)
    write_video(tmp_path / "short.mp4", moving_frames(2, 32, 32), 8.0)
    for path, options, said in (
        (by_class, (), "trained with model.condition='class+frames' or 'frames', or on codes of a tokenizer with"),
        (always, (), "cannot sample a first clip: it was always given frames (model.frames_dropout=0)"),
        (flow, ("--context=8",), "context 8: of the 8 frames of a clip, the next can take over 1 to 7"),
        (flow, ("--classes=0:8",), "8 frames are no whole blocks of 5 frames; give 5 or 10"),
        (flow, (f"--input={tmp_path / 'short.mp4'}",), "has the 3 frames that the stream goes on from"),
        (flow, ("--top-k=3",), "top_k 3 is for generators of codes"),
        (flow, ("--budget=8",), "budget 8: all samples of this generator have as many codes"),
    ):
        assert run(path, continuous, tmp_path / "x", "--frames=8", *options) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_drift_and_benchmark(flow, continuous, tmp_path, monkeypatch):
    always = write_flow(tmp_path / "always", load_tokenizer(continuous).fingerprint, frames_dropout=0.0)
    drift = ["--drift=moving_shapes:test", "--frames=17", "--max-clips=2", "--batch-size=2", "--solver-steps=2"]
    for path in (flow, always):
        assert run(path, continuous, tmp_path / "drift", *drift) == 0
        found = json.loads((tmp_path / "drift" / "drift.json").read_text())
        assert (found["frames"], [window["start"] for window in found["stream"]]) == (8, [0, 8])
        # windows of 8 frames have more than one block of 5: the first block is the same, what follows is not
        assert found["stream"][1] != found["anchored"][1]
    monkeypatch.setattr("larp_jax.tools.benchmark.CPU_WORK", (32, 2**10))
    command = ["benchmark", "sample", "--stream", f"--checkpoint={flow}", f"--tokenizer={continuous}", "--cfg-scale=1"]
    assert cli.main([*command, "--seconds=0.1", "--solver-steps=2", f"--output={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["block_frames"], found["clip_frames"], found["solver_steps"]) == (5, 8, 2)
    assert found["frames_per_second"] > 0


def test_the_demo_shows_latents_and_samples_from_a_flow(flow, continuous, tmp_path):
    tokenizer, always = load_tokenizer(continuous), tmp_path / "always"
    shown = demo.Demo(tokenizer, load_generator(flow))
    for name, seed in (("first", 1), ("second", 2)):
        write_video(tmp_path / f"{name}.mp4", moving_frames(8, 32, 32, seed=seed), 8.0)
    first, second = (shown.read(tmp_path / f"{name}.mp4") for name in ("first", "second"))
    assert first.codes.shape == (8, 4) and first.codes.dtype == np.float32
    np.testing.assert_array_equal(shown.swap(first, second, range(8)), second.reconstruction)
    maps = shown.maps(first)
    assert maps.patches.shape[0] == 8 and maps.patches.max() > 0
    page = demo_page.reconstruction(first, 0) + demo_page.code_grid(first, maps)
    page += demo_page.position_map(first, maps, 2)
    assert "<dt>latents</dt><dd>8</dd>" in page and "<dt>floats</dt><dd>32</dd>" in page
    assert page.count("data-position=") == 8 and "<dt>code</dt>" not in page and "<b>" not in page

    assert shown.streams and shown.classes[:2] == [("any class", -1), ("0 walk", 0)]
    assert shown.sample(1, guidance=1.5).shape == (4, 8, 32, 32, 3)
    assert [len(block) for block in shown.stream(1, frames=8)] == [5, 3]
    write_flow(always, tokenizer.fingerprint, frames_dropout=0.0)
    with pytest.raises(InputError, match="needs given frames, and the page samples without"):
        demo.Demo(tokenizer, load_generator(always))
