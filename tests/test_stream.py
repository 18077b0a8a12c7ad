"""Video of any length, block after block: the blocks of a generator and of a tokenizer, and the command stream."""

import json
import logging

import jax
import numpy as np
import pytest
from data_helpers import moving_frames
from flax import nnx
from test_generate import SIZES, write_generator
from test_sequences import CLASSES, CONFIG, ROWS, random_params

from larp_jax import Stream, cli, load_generator, load_tokenizer
from larp_jax.api import LoadedGenerator
from larp_jax.config import MeshConfig
from larp_jax.data.video import probe, write_video
from larp_jax.errors import InputError
from larp_jax.evaluation.probe import ClipProbe
from larp_jax.inference import stream
from larp_jax.models.classifier import Classifier
from larp_jax.runtime.sharding import make_mesh


@pytest.fixture(scope="module")
def adaptive(untrained):
    return load_tokenizer(untrained)


@pytest.fixture(scope="module")
def checkpoint(adaptive, tmp_path_factory):
    """A generator for the tokenizer, with random weights."""
    config = adaptive.config
    sizes = {"num_tokens": config.num_tokens, "blocks": config.blocks, "ladder": config.ladder}
    metadata = {"tokenizer_fingerprint": adaptive.fingerprint}
    return write_generator(tmp_path_factory.mktemp("g") / "adaptive", metadata, class_dropout=0.1, **sizes)


@pytest.fixture(scope="module")
def generator(checkpoint):
    return load_generator(checkpoint)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "top_k": 5}])
def test_blocks_one_after_the_other_are_a_sample(options):
    """Rows have blocks of different lengths, and the first of a row may be as long as two of another."""
    loaded, key = LoadedGenerator(CONFIG, random_params()), jax.random.key(5)
    codes, lengths = (np.asarray(x) for x in loaded.sample(CLASSES, key=key, **options))
    assert len({tuple(row) for row in lengths.tolist()}) > 2
    first = None
    for count in range(1, CONFIG.blocks + 1):
        first = loaded.sample_block(CLASSES, key=key, frames=first, **options)
        np.testing.assert_array_equal(first[1], lengths[:, :count])
        own = np.arange(CONFIG.num_tokens) < lengths[:, :count].sum(axis=1, keepdims=True)
        np.testing.assert_array_equal(first[0], np.where(own, codes, 0))
    with pytest.raises(ValueError, match="all 3 blocks of a clip"):
        loaded.sample_block(CLASSES, key=key, frames=first)
    with pytest.raises(InputError, match="cfg_interval 3 counts the codes of whole clips"):
        loaded.sample_block(CLASSES, key=key, cfg_interval=3)
    if options:
        return
    split = LoadedGenerator(CONFIG, random_params(), mesh=make_mesh(MeshConfig(data=4, fsdp=2, model=1)))
    found = split.sample_block(CLASSES, key=key, frames=(first[0], first[1][:, :2]))
    jax.tree.map(np.testing.assert_array_equal, found, first)
    given = loaded.sample_block(CLASSES, key=key, budget=(2, 5, 1))
    given = loaded.sample_block(CLASSES, key=key, frames=given, budget=(2, 5, 1))
    np.testing.assert_array_equal(given[1], [[2, 5]] * ROWS)


def test_a_stream_of_frames_is_coded_as_its_clips_are(adaptive, tokenizer):
    video = np.stack([moving_frames(19, 32, 32, seed=seed) for seed in (1, 2)])
    blocks = list(adaptive.encode_stream(np.split(video, [3, 4, 14], axis=1), budget="4,8"))
    assert [block.shape for block in blocks] == [(2, 4), (2, 8)] * 2 + [(2, 4)]
    last = video[:, np.minimum(np.arange(16, 24), 18)]
    decoded = list(adaptive.decode_stream(blocks))
    for number, clip in enumerate((video[:, :8], video[:, 8:16], last)):
        codes, lengths = adaptive.encode(clip, budget="4,8")
        found = np.concatenate(blocks[2 * number :][:2], axis=1)
        np.testing.assert_array_equal(found, np.asarray(codes)[:, : found.shape[1]])
        frames = np.concatenate(decoded[2 * number :][:2], axis=1)
        np.testing.assert_allclose(frames, adaptive.decode(codes, lengths)[:, : frames.shape[1]], atol=1e-5)

    (codes,) = tokenizer.encode_stream(iter(video[:1, i : i + 1] for i in range(8)))  # a block is a clip
    np.testing.assert_array_equal(codes, tokenizer.encode(video[:1, :8]))
    np.testing.assert_array_equal(next(tokenizer.decode_stream([codes])), tokenizer.decode(codes))
    with pytest.raises(InputError, match="budget greedy:30 depends on whole clips"):
        next(adaptive.encode_stream([video], budget="greedy:30"))
    with pytest.raises(InputError, match="this tokenizer has no blocks"):
        tokenizer.encode_block(video[:, :8], [8, 8])
    with pytest.raises(ValueError, match="a clip has 2 blocks"):
        adaptive.decode_block(np.zeros((1, 8), int), [8], (None, None))


def test_a_stream_goes_on_in_constant_memory(generator, adaptive, caplog):
    """After the first block of the second clip nothing is compiled, and no array is kept."""
    video = Stream(generator, adaptive, key=jax.random.key(0), classes=[0, 2])
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):  # the command line raises that level
        first = [next(video).shape for _ in range(3)]
        assert any("Compiling" in record.getMessage() for record in caplog.records)
        caplog.clear()
        before, last = next(video), next(video)
        alive = len(jax.live_arrays())
        for _ in range(20):
            before, last = last, next(video)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
    assert len(jax.live_arrays()) == alive
    assert {*first, last.shape} == {(2, 4, 32, 32, 3)}
    np.testing.assert_array_equal(video.state.recent, stream.to_uint8(last))
    found = adaptive.encode_frames(stream.to_uint8(before), budget=adaptive.config.adaptive.largest)
    assert video.state.number == 25 and video.state.lengths[0, 0] == found[1][0, 0]
    np.testing.assert_array_equal(video.state.codes[:, : found[1][0, 0]], found[0][:, : found[1][0, 0]])
    begun = Stream(generator, adaptive, key=jax.random.key(0), classes=[0, 2], first=stream.to_uint8(before))
    assert next(begun).shape == last.shape and (begun.state.number, begun.state.lengths.shape) == (1, (2, 2))
    np.testing.assert_array_equal(begun.state.codes[:, : found[1][0, 0]], found[0][:, : found[1][0, 0]])


def test_a_class_that_changes_changes_only_later_blocks(generator, adaptive):
    def frames(labels, count=20):
        options = {"key": jax.random.key(1), "frames": count, "cfg_scale": 20.0}
        options["classes"] = np.array(labels)[:, None]
        return np.concatenate(list(Stream(generator, adaptive, **options)), axis=1)

    plain, changed = frames([0]), frames([0, 0, 0, 2, 2])
    assert plain.shape == (1, 20, 32, 32, 3)
    np.testing.assert_array_equal(changed[:, :12], plain[:, :12])
    assert np.abs(changed[:, 12:16] - plain[:, 12:16]).max() > 0.01
    np.testing.assert_array_equal(frames([0], 18), plain[:, :18])


def run(checkpoint, untrained, output, *options):
    models = f"--checkpoint={checkpoint}", f"--tokenizer={untrained}"
    return cli.main(["stream", *models, f"--output={output}", *options])


@pytest.fixture
def contents(monkeypatch):
    """The content of each file in a folder; of a video the frames that it was written from.

    x264 rarely writes other bytes for equal frames of this size (once in some thousand calls, also with one thread).
    """
    frames_of, write = {}, stream.write_video

    def write_video(path, frames, fps):
        frames = list(frames)
        write(path, frames, fps)
        frames_of[str(path)] = np.stack(frames).tobytes()

    def read(folder):
        return {
            path.name: frames_of[str(path)] if path.suffix == ".mp4" else path.read_bytes() for path in folder.iterdir()
        }

    monkeypatch.setattr(stream, "write_video", write_video)
    return read


def test_a_stopped_stream_goes_on_with_equal_frames(checkpoint, untrained, tmp_path, contents, monkeypatch, capsys):
    monkeypatch.setattr(stream, "PART_BLOCKS", 3)
    given = ("--classes=0:12,2:8", "--budget=4,8", "--seed=3", "--cfg-scale=1.5")
    # A compiled program may round differently from the same program loaded from the cache: all runs that count load it.
    for frames in (20, 38):  # the second goes on, for which it needs programs of its own
        assert run(checkpoint, untrained, tmp_path / "first", f"--frames={frames}", *given) == 0
    assert run(checkpoint, untrained, tmp_path / "whole", "--frames=38", *given) == 0
    whole = contents(tmp_path / "whole")
    names = [f"{start:06d}.{kind}" for start in (0, 12, 24, 36) for kind in ("mp4", "npz")]
    assert sorted(whole) == sorted([*names, "settings.json", "manifest.json"])
    assert [probe(tmp_path / "whole" / name).frames for name in names[::2]] == [12, 12, 12, 2]
    manifest = json.loads(whole["manifest.json"])
    assert [part["classes"] for part in manifest["parts"]] == [[0, 0, 0], [2, 2, 0], [0, 0, 2], [2]]

    output, written = tmp_path / "stopped", stream.write_video

    def stop(path, frames, fps):
        if path.name == "000024.mp4":
            next(frames)
            raise KeyboardInterrupt
        written(path, frames, fps)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_video", stop)
        assert run(checkpoint, untrained, output, "--frames=38", *given) == 1
    kept = contents(output)
    (output / "000012.npz").write_bytes(b"damaged")
    assert run(checkpoint, untrained, output, "--frames=26", *given) == 0  # its last part is cut off
    assert "000012.npz is damaged" in capsys.readouterr().err
    assert run(checkpoint, untrained, output, "--frames=38", *given) == 0
    assert contents(output) == whole
    assert kept.items() <= whole.items() and "000024.mp4" not in kept

    assert run(checkpoint, untrained, output, "--frames=38", "--seed=4", *given[:2]) == 2
    assert "was started with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stream_in_a_bucket_becomes_longer(checkpoint, untrained, tmp_path, bucket, contents, monkeypatch):
    monkeypatch.setattr(stream, "PART_BLOCKS", 2)
    for folder in (tmp_path / "compiled", bucket):  # the second loads the programs that the first compiles
        assert run(checkpoint, untrained, folder, "--frames=10") == 0
        assert run(checkpoint, untrained, folder, "--frames=20") == 0
    assert run(checkpoint, untrained, tmp_path / "whole", "--frames=20") == 0
    whole = contents(tmp_path / "whole")
    assert whole.keys() >= {"000016.mp4", "000016.npz"} and whole.items() <= contents(bucket).items()


def test_what_does_not_fit_is_refused(checkpoint, untrained, generator, adaptive, tmp_path, capsys):
    for option, said in (
        ("--classes=0:200,3:200", "3 is not a class of the generator; its classes are 0 to 2"),
        ("--classes=0:6", "6 frames are no whole blocks of 4 frames; give 4 or 8"),
        ("--classes=0:8,2", "must be one class, or classes with frames, like 0:4,3:8"),
        ("--classes=0:0", "asks for no frame; the count must be at least 1"),
        ("--classes=0;2", "is not the number of a class"),
        ("--context=2", "of the 2 blocks of a clip, the next can take over 1 to 1"),
        ("--budget=3", "does not split into 2 equal blocks"),
        ("--temperature=0", "temperature must be above 0"),
        ("--window=4", "unrecognized arguments: --window=4"),
    ):
        assert run(checkpoint, untrained, tmp_path / "x", "--frames=8", option) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    whole = write_generator(tmp_path / "plain", {}, **SIZES)
    assert run(whole, untrained, tmp_path / "x", "--frames=8") == 2
    assert "trained with model.condition='class+frames' or 'frames', or on codes of" in capsys.readouterr().err
    with pytest.raises(InputError, match="samples clips without what was before them"):
        load_generator(whole).sample_block([0], key=jax.random.key(0))


def test_the_benchmark_times_a_stream_beside_clips(checkpoint, untrained, tmp_path, capsys):
    command = ["benchmark", "sample", "--stream", f"--checkpoint={checkpoint}", "--cfg-scale=1", "--seconds=0.1"]
    assert cli.main([*command, f"--tokenizer={untrained}", f"--output={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["block_frames"], found["clip_frames"]) == (4, 8)
    assert 0 < found["first_frames_seconds"] <= found["first_frames_p95_seconds"]
    assert found["share_of_clip"] == found["first_frames_seconds"] / found["clip_seconds"]
    assert found["frames_per_second"] > 0 and found["block_p95_seconds"] > 0
    assert cli.main(command) == 2
    assert "give the tokenizer that decodes them, --tokenizer" in capsys.readouterr().err


def test_drift_is_measured_beside_streams_that_go_on_from_real_clips(checkpoint, untrained, adaptive, tmp_path, capsys):
    """The first window of the two differs by nothing but the class; all clips of the control see real frames."""
    shape = adaptive.config.clip_shape
    params = nnx.to_pure_dict(nnx.state(Classifier(shape, 3, rngs=nnx.Rngs(0)), nnx.Param))
    ClipProbe(shape, params).save(tmp_path / "probe.npz")
    for label in range(3):
        (tmp_path / "clips" / "test" / str(label)).mkdir(parents=True)
        write_video(tmp_path / "clips" / "test" / str(label) / "a.mp4", moving_frames(8, 32, 32, seed=label), 8.0)
    options = [f"--drift=folder:{tmp_path / 'clips'}", "--frames=27", "--batch-size=2", "--budget=4,4"]
    output = tmp_path / "drift"
    assert run(checkpoint, untrained, output, *options, f"--probe={tmp_path / 'probe.npz'}") == 0
    found = json.loads((output / "drift.json").read_text())
    assert (found["frames"], found["videos"]) == (8, 3)
    assert [window["start"] for window in found["stream"]] == [0, 8, 16]
    assert found["stream"][0] == found["anchored"][0] != found["stream"][1] != found["anchored"][1]
    charts = {f"drift_{name}.svg" for name in ("mean", "variance", "distance", "accuracy")}
    assert {path.name for path in output.iterdir()} == {"drift.json", *charts}

    generator, videos = load_generator(checkpoint), []
    for batch, labels in enumerate(([0, 1], [2, 2])):
        given = {"key": jax.random.key(0), "classes": labels, "indices": [2 * batch, 2 * batch + 1], "frames": 24}
        videos.append(np.concatenate(list(Stream(generator, adaptive, budget="4,4", **given)), axis=1))
    window = np.concatenate(videos)[:3, 16:].astype(np.float64)
    np.testing.assert_allclose(found["stream"][2]["mean"], window.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["stream"][2]["variance"], window.var(axis=(0, 1, 2, 3)).mean(), rtol=1e-9)
    _, classes = ClipProbe(shape, params).measure(window.astype(np.float32))
    assert found["stream"][2]["accuracy"] == np.mean(classes == [0, 1, 2]) and found["stream"][2]["distance"] > 0
    assert run(checkpoint, untrained, output, *options, "--classes=1") == 2
    assert "--drift samples the classes of the clips" in capsys.readouterr().err
    assert run(checkpoint, untrained, output, *options, "--frames=7") == 2
    assert "drift is measured in windows of 8 frames; give more" in capsys.readouterr().err
