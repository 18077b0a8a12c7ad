"""The commands sample and predict: their outputs, resuming and errors."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from data_helpers import moving_frames
from flax import nnx
from network_weights import write_i3d
from test_evaluators import IDENTITY, Stub

from larp_jax import cli, files, load_generator
from larp_jax.api import LoadedGenerator
from larp_jax.cli import app, inference
from larp_jax.config import GeneratorConfig, GeneratorRecipe, to_dict
from larp_jax.data import ClipSpec, codes as codes_on_disk
from larp_jax.data.video import probe, resize_frames, write_png, write_video
from larp_jax.errors import InputError
from larp_jax.evaluation import fvd, generated, protocols
from larp_jax.inference import batches, generate
from larp_jax.inference.tokenize import detokenize
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator
from larp_jax.weights import checkpoint, networks

SIZES = dict(width=16, depth=1, heads=2, codebook_size=32, num_tokens=8, num_classes=3, mlp_multiple=16)


def write_generator(folder, metadata, **options):
    """Writes a checkpoint of a generator with random weights and this metadata."""
    config = GeneratorConfig(**SIZES | options)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Generator(config, rngs=nnx.Rngs(0))), nnx.Param))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)
    checkpoint.write_imported(folder, to_dict(GeneratorRecipe(model=config)), {"generator": params})
    path = folder / "metadata" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | metadata))
    checkpoint.write_digests(folder)
    return folder


@pytest.fixture(scope="module")
def by_class(tokenizer, tmp_path_factory):
    metadata = {"tokenizer_fingerprint": tokenizer.fingerprint, "class_counts": [6, 0, 2]}
    return write_generator(tmp_path_factory.mktemp("g") / "by_class", metadata)


@pytest.fixture(scope="module")
def predictor(tokenizer, tmp_path_factory):
    metadata = {"tokenizer_fingerprint": tokenizer.fingerprint}
    return write_generator(tmp_path_factory.mktemp("g") / "predictor", metadata, frame_prediction=True)


def run(command, generator, trained, output, *options):
    return cli.main([command, f"--checkpoint={generator}", f"--tokenizer={trained}", f"--output={output}", *options])


def fails(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("larp-jax: error: ")


@pytest.fixture(scope="module")
def samples(by_class, trained, tmp_path_factory):
    """Five samples with seed 3, in batches of four."""
    output = tmp_path_factory.mktemp("samples") / "out"
    assert run("sample", by_class, trained, output, *FIVE) == 0
    return output


FIVE = ("--num=5", "--seed=3", "--batch-size=4", "--cfg-scale=1.5")


@pytest.fixture
def sampled(monkeypatch):
    """A list of the numbers of the samples that commands compute."""
    numbers, codes = [], generate.Sampler.codes
    monkeypatch.setattr(
        generate.Sampler, "codes", lambda self, rows, **given: numbers.extend(rows) or codes(self, rows, **given)
    )
    return numbers


def all_codes(folder):
    manifest = codes_on_disk.read_manifest(folder)
    shards = range(len(manifest["shards"]))
    return np.concatenate([codes_on_disk.read_shard(folder, manifest, i)["codes"] for i in shards])


def test_what_sample_writes(samples, by_class, tokenizer):
    labels = [0, 2, 0, 0, 0]  # 6 : 0 : 2 in training
    names = [f"{i:06d}_{label}" for i, label in enumerate(labels)]
    codes = ["codes-00000-of-00002.npz", "codes-00001-of-00002.npz"]
    assert {path.name for path in samples.iterdir()} == {
        *(f"{name}.mp4" for name in names), *codes, "samples.png", "settings.json", "manifest.json"
    }  # fmt: skip
    info = probe(samples / f"{names[1]}.mp4")
    assert (info.frames, info.width, info.height) == (8, 32, 32)
    manifest = codes_on_disk.read_manifest(samples)
    assert manifest["fingerprint"] == tokenizer.fingerprint
    assert [row["source"] for row in manifest["rows"]] == names
    assert [row["label"] for row in manifest["rows"]] == labels
    expected = load_generator(by_class).sample(labels, key=jax.random.key(3), cfg_scale=1.5)
    np.testing.assert_array_equal(all_codes(samples), expected)


def test_detokenize_reads_samples(samples, tokenizer, tmp_path):
    written = detokenize(tokenizer, samples, tmp_path / "again")
    assert [path.stem for path in written] == [row["source"] for row in codes_on_disk.read_manifest(samples)["rows"]]


def test_a_stopped_run_resumes(samples, by_class, trained, tmp_path, sampled, capsys):
    output = tmp_path / "out"
    shutil.copytree(samples, output)
    for name in ("manifest.json", "codes-00001-of-00002.npz", "000004_0.mp4", "samples.png"):
        (output / name).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run("sample", by_class, trained, output, *FIVE) == 0
    assert sampled == [4]
    assert all((output / name).stat().st_mtime_ns == time for name, time in kept.items())
    np.testing.assert_array_equal(all_codes(output), all_codes(samples))
    assert (output / "samples.png").read_bytes() == (samples / "samples.png").read_bytes()

    sampled.clear()
    assert run("sample", by_class, trained, output, *FIVE) == 0
    assert not sampled

    for option, message in (
        ("--seed=4", "started with seed 3, not 4; name another --output"),
        ("--cfg-scale=2", "started with cfg_scale 1.5, not 2.0"),
        ("--num=6", "started with counts {'0': 4, '2': 1}, not"),
    ):
        assert message in fails(capsys, "sample", by_class, trained, output, *FIVE, option)


def test_incomplete_outputs_are_sampled_again(samples, by_class, trained, tmp_path, sampled, capsys):
    output = tmp_path / "out"
    shutil.copytree(samples, output)
    (output / "codes-00000-of-00002.npz").write_bytes(b"")
    (output / "000004_0.mp4").unlink()
    assert run("sample", by_class, trained, output, *FIVE) == 0
    assert sampled == [0, 1, 2, 3, 4]
    assert "codes-00000-of-00002.npz is damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(all_codes(output), all_codes(samples))
    assert {path.name for path in output.iterdir()} == {path.name for path in samples.iterdir()}
    (output / "000001_2.mp4").write_bytes(b"")
    sampled.clear()
    assert run("sample", by_class, trained, output, *FIVE) == 0
    assert sampled == [0, 1, 2, 3] and (output / "000001_2.mp4").stat().st_size


def test_samples_are_written_by_one_command_at_a_time(samples, by_class, trained, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(samples, output)
    with files.claim(output):
        assert "another process is writing --output" in fails(capsys, "sample", by_class, trained, output, *FIVE)
    # as if killed while writing the settings
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f"{files._prefix(output / 'settings.json')}{'0' * 16}.tmp").write_text("{")
    assert run("sample", by_class, trained, tmp_path / "begun", *FIVE) == 0
    assert {path.name for path in (tmp_path / "begun").iterdir()} == {path.name for path in samples.iterdir()}


def test_each_host_takes_its_share(by_class, tokenizer, tmp_path, monkeypatch):
    generator, met = load_generator(by_class), []

    def sample():
        options = generate.SamplingOptions()
        generate.sample(generator, tokenizer, tmp_path, counts={0: 6}, options=options, batch_size=2)

    def other_host(name):
        """Called in place of a barrier: the second host samples its share."""
        met.append(sorted(path.name for path in tmp_path.glob("codes-*")))
        if len(met) == 1:
            monkeypatch.setattr(jax, "process_index", lambda: 1)
            sample()
            assert not (tmp_path / "manifest.json").exists()
            monkeypatch.setattr(jax, "process_index", lambda: 0)

    monkeypatch.setattr(batches.multihost_utils, "sync_global_devices", other_host)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sample()
    names = [f"codes-{i:05d}-of-00003.npz" for i in range(3)]
    assert met == [[names[0], names[2]], names]
    monkeypatch.undo()
    np.testing.assert_array_equal(all_codes(tmp_path), generator.sample([0] * 6, key=jax.random.key(0)))


@pytest.mark.parametrize(
    "names, options, labels",
    [
        ((), ["--classes=2,0", "--num=3"], [0, 2, 0]),
        ((), ["--classes=1:1,0:2"], [0, 1, 0]),
        (("run", "walk", "jump"), ["--classes=jump,run", "--num=3"], [0, 2, 0]),
        (("run", "walk", "jump"), ["--classes=walk:1, 0:2"], [0, 1, 0]),
        (("run", "walk"), ["--classes=2:1"], [2]),  # a class without a name
        (("1", "2", "3"), ["--classes=2", "--num=1"], [1]),
        (("001", "002", "010"), ["--classes=10:1,2:1"], [2, 1]),
        (("Walk", "1", "Run"), ["--classes=0,1,2", "--num=3"], [0, 1, 2]),  # class 1 has no name
        (('walk, "slow" 0', "a:1", "b"), ['--classes="walk, ""slow"" 0":1,a:1:2'], [0, 1, 1]),
        (("walk, slow", "b"), ["--classes=walk, slow", "--num=1"], [0]),
    ],
)
def test_classes_that_are_given(by_class, names, options, labels):
    arguments = app.parse(["sample", f"--checkpoint={by_class}", "--tokenizer=x", "--output=y", *options])
    found = dataclasses.replace(checkpoint.load(by_class), class_names=names)
    counts = inference._counts_of_classes(arguments, LoadedGenerator.of(found))
    assert sorted(generate.alternate(counts)) == sorted(labels)


@pytest.mark.parametrize(
    "names, text, says",
    [
        (("run", "walk", "jump"), "wlak", "'wlak' is not a class of the generator; its classes are run, walk, jump"),
        (("run", "walk", "jump"), "3", "'3' is not a class of the generator; its classes are run, walk, jump"),
        (("run", "walk", "jump"), "walk,1", "each class once"),
        (("run", "walk", "jump"), "walk:0", "the count must be at least 1"),
        (("run", "walk", "jump"), "", "'' is not a class"),
        (("1", "2", "3"), "0", "'0' is not a class of the generator; its classes are 1, 2, 3"),
        ((), "", "'' is not the number of a class"),
        ((), "\u00b2", "is not the number of a class"),
    ],
)
def test_classes_that_do_not_exist(by_class, names, text, says):
    found = dataclasses.replace(checkpoint.load(by_class), class_names=names)
    with pytest.raises(InputError) as error:
        generate.read_classes(text, LoadedGenerator.of(found))
    assert says in str(error.value)


def test_with_many_classes_the_nearest_is_named(trained, tmp_path):
    names = [f"class {number}" for number in range(29)] + ["walking"]
    generator = load_generator(write_generator(tmp_path / "many", {"class_names": names}, num_classes=30))
    expected = "'waking' is not one of the 30 classes of the generator; did you mean 'walking'"
    with pytest.raises(InputError, match=expected):
        generate.read_classes("waking", generator)


def test_names_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="4 class names do not match the generator, which has 3 classes"):
        load_generator(write_generator(tmp_path / "names", {"class_names": list("abcd")}))
    with pytest.raises(InputError, match="its class_names are not strings"):
        load_generator(write_generator(tmp_path / "numbers", {"class_names": [1, 2]}))


def test_a_class_without_training_videos_is_sampled_with_a_warning(by_class, trained, tmp_path, capsys):
    assert run("sample", by_class, trained, tmp_path / "out", "--classes=1,2", "--num=2") == 0
    assert "no training video has the class 1: its samples are meaningless" in capsys.readouterr().err


def test_samples_carry_the_names_of_their_classes(trained, tokenizer, real, tmp_path, no_i3d):
    names = ["run", "walk", "jump"]
    metadata = {"tokenizer_fingerprint": tokenizer.fingerprint, "class_counts": [1, 2, 0], "class_names": names}
    generator = write_generator(tmp_path / "named", metadata)
    assert load_generator(generator).class_names == tuple(names)
    assert run("sample", generator, trained, tmp_path / "out", "--classes=walk:2,run:1") == 0
    manifest = codes_on_disk.read_manifest(tmp_path / "out")
    assert manifest["label_names"] == names and [row["label"] for row in manifest["rows"]] == [0, 1, 1]
    evaluate(generator, trained, real, tmp_path / "fvd.json", "--metrics=fvd", f"--samples={tmp_path / 'kept'}")
    assert codes_on_disk.read_manifest(tmp_path / "kept")["label_names"] == names


def test_labels_of_clips_are_matched_by_name(trained, tokenizer, real, tmp_path):
    """run and walk are 0 and 1 in the clips, 2 and 0 in the generator: its own numbers are used."""
    scores = []
    for name, metadata in (("own", {"class_names": ["walk", "fly", "run"]}), ("numbers", {})):
        generator = write_generator(tmp_path / name, {"tokenizer_fingerprint": tokenizer.fingerprint} | metadata)
        scores.append(evaluate(generator, trained, real, tmp_path / f"{name}.json", "--metrics=cross_entropy"))
        loaded = load_generator(generator)
        assert (
            generated.classes_for(loaded, clips_of(real)).tolist()
            == ([2, 2, 2, 0, 0, 0], [0, 0, 0, 1, 1, 1])[name == "numbers"]
        )
    assert scores[0]["metrics"]["cross_entropy"] != scores[1]["metrics"]["cross_entropy"]
    few = load_generator(write_generator(tmp_path / "few", {"class_names": ["walk", "fly"]}))
    with pytest.raises(InputError, match="a clip has the class 'run', which the generator lacks"):
        generated.classes_for(few, clips_of(real))


def test_shares():
    assert generate.split_in_proportion(10, [1, 1, 1]) == {0: 4, 1: 3, 2: 3}
    assert generate.split_in_proportion(10_000, [121, 80, 0, 99]) == {0: 4033, 1: 2667, 3: 3300}
    assert generate.split_in_proportion(2, [5, 1, 4]) == {0: 1, 2: 1}
    assert generate.alternate({0: 3, 3: 2}) == [0, 3, 0, 3, 0]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video of two windows and three more frames, which are too few to predict from."""
    path = tmp_path_factory.mktemp("videos") / "walk.mp4"
    write_video(path, moving_frames(19), 12.0)
    return path


def test_what_predict_writes(predictor, trained, tokenizer, video, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["predict", predictor, trained, output, f"--input={video}", "--cond-frames=3", "--batch-size=8"]
    assert run(*arguments) == 0
    assert "2 predictions next to the originals" in capsys.readouterr().out
    info = probe(output / "walk-000008.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (8, 64, 32, 12.0)
    assert (output / "walk-000008.png").exists()
    manifest = codes_on_disk.read_manifest(output)
    assert [row["source"] for row in manifest["rows"]] == ["walk-000000", "walk-000008"]

    clips = np.stack([window.frames for rows, _ in generate.Inputs(
        str(video), generate.ClipSpec(frames=8, resolution=32)).batches(1) for window in rows[:1]])[:2]  # fmt: skip
    condition = tokenizer.encode(generate.hold_last_frame(clips, 3))
    expected = load_generator(predictor).sample(frames=condition, key=jax.random.key(0))
    np.testing.assert_array_equal(all_codes(output), expected)

    time = (output / "walk-000008.mp4").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert (output / "walk-000008.mp4").stat().st_mtime_ns == time
    assert "started with cond_frames 3, not 4" in fails(capsys, *arguments, "--cond-frames=4")
    assert "below the clip's 8" in fails(capsys, *arguments, "--cond-frames=8")


def test_a_picture_and_a_class_become_video(trained, tokenizer, tmp_path, capsys):
    """The picture is held still as the given frames."""
    metadata = {"tokenizer_fingerprint": tokenizer.fingerprint, "class_names": ["run", "walk", "wave"]}
    metadata |= {"class_counts": [1, 1, 1]}
    generator = write_generator(tmp_path / "both", metadata, condition="class+frames", frames_dropout=0.1)
    picture = moving_frames(1, height=40, width=32)
    write_png(tmp_path / "picture.png", picture[0])
    given = ["--classes=wave", "--cfg-scale=2", "--frames-scale=1.5"]
    assert run("predict", generator, trained, tmp_path / "out", f"--input={tmp_path / 'picture.png'}", *given) == 0
    still = tokenizer.encode_frames(resize_frames(picture, (32, 32))[None])
    loaded = load_generator(generator)
    expected = loaded.sample([2], frames=still, key=jax.random.key(0), cfg_scale=2.0, frames_scale=1.5)
    np.testing.assert_array_equal(all_codes(tmp_path / "out"), expected)
    # frames that may be left out need not be given, and a generator without classes is asked for none
    assert run("sample", generator, trained, tmp_path / "sampled", "--classes=wave", "--num=1", *given[1:]) == 0
    expected = loaded.sample([2], key=jax.random.key(0), cfg_scale=2.0, frames_scale=1.5)
    np.testing.assert_array_equal(all_codes(tmp_path / "sampled"), expected)
    unnamed = write_generator(
        tmp_path / "frames", {"tokenizer_fingerprint": tokenizer.fingerprint}, condition="frames", frames_dropout=0.1
    )
    assert run("sample", unnamed, trained, tmp_path / "any", "--num=2") == 0
    manifest = codes_on_disk.read_manifest(tmp_path / "any")
    assert [row["label"] for row in manifest["rows"]] == [-1, -1]
    assert "is given no class" in fails(capsys, "sample", unnamed, trained, tmp_path / "none", "--classes=wave")
    arguments = ["predict", unnamed, trained, tmp_path / "none", f"--input={tmp_path / 'picture.png'}"]
    assert "at least 1 and below" in fails(capsys, *arguments, "--cond-frames=8")
    other = [f"--input={tmp_path / 'picture.png'}", "--classes=run,walk"]
    assert "predict takes one class" in fails(capsys, "predict", generator, trained, tmp_path / "other", *other)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    broken = fails(capsys, "predict", generator, trained, tmp_path / "other", f"--input={tmp_path / 'bad.png'}")
    assert "bad.png: cannot be read as a picture" in broken
    with pytest.raises(ValueError, match=r"F from 1 to 7, got shape \[1, 8, 32, 32, 3\]"):
        tokenizer.encode_frames(np.zeros((1, 8, 32, 32, 3), np.uint8))


def test_what_is_refused(by_class, predictor, trained, video, reference_dir, tmp_path, capsys):
    output = tmp_path / "out"
    source = f"--input={video}"
    assert "use larp-jax predict" in fails(capsys, "sample", predictor, trained, output)
    assert "use larp-jax sample" in fails(capsys, "predict", by_class, trained, output, source)
    assert "holds a tokenizer; give a generator" in fails(capsys, "sample", trained, trained, output)
    assert "holds a generator; give a tokenizer" in fails(capsys, "sample", by_class, by_class, output)
    earlier = trained / "checkpoints" / "2"
    assert "was trained on codes of tokenizer" in fails(capsys, "sample", by_class, earlier, output)
    released = reference_dir / "ar_class"
    assert "the generator samples 12 codes of 64" in fails(capsys, "sample", released, trained, output)
    for option, message in (
        ("--classes=3", "3 is not a class of the generator; its classes are 0 to 2"),
        ("--classes=a", "'a' is not the number of a class"),
        ("--classes=0,0", "each class once"),
        ("--classes=0:1,2", "must be like 0,3 or 0:100,3:50"),
        ("--cfg-scale=0", "cfg_scale must be at least 1"),
        ("--top-p=2", "top_p must be"),
        ("--num=0", "at least 1"),
    ):
        assert message in fails(capsys, "sample", by_class, trained, output, option)
    assert "--num cannot be given" in fails(capsys, "sample", by_class, trained, output, "--classes=0:1", "--num=4")
    output.mkdir(exist_ok=True)
    (output / "mine.txt").write_text("")
    assert "is not empty and contains no samples" in fails(capsys, "sample", by_class, trained, output)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Six windows of two classes."""
    folder = tmp_path_factory.mktemp("real")
    for name, count in (("run/a", 8), ("run/b", 17), ("walk/c", 30)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / f"{name}.mp4", moving_frames(count, seed=count), 8.0)
    return folder


def clips_of(folder):
    return protocols.ClipSet(f"folder:{folder}", ClipSpec(frames=8, resolution=32, flip=False))


@pytest.fixture
def no_i3d(tmp_path, monkeypatch):
    """A network in place of I3D, which needs longer clips."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(networks, "load_i3d", lambda path: Stub())
    monkeypatch.setattr(networks, "identify", lambda kind, path: IDENTITY)


def evaluate(generator, trained, real, output, *options):
    arguments = [f"--data=folder:{real}", "--batch-size=4", "--cfg-interval=-1", *options]
    assert run("evaluate", generator, trained, output, *arguments) == 0
    return json.loads(output.read_text())


def test_fvd_of_samples(by_class, trained, tokenizer, real, tmp_path, no_i3d, sampled, capsys):
    kept = tmp_path / "kept"
    options = ["--metrics=fvd", "--seed=3", "--cfg-scale=1.5", f"--samples={kept}"]
    written = evaluate(by_class, trained, real, tmp_path / "fvd.json", *options)
    assert sampled == list(range(6))
    assert "sample: " in capsys.readouterr().err

    # the same from Python
    labels = [0, 2, 0, 0, 0, 0]  # 6 : 0 : 2 in training
    codes = load_generator(by_class).sample(labels, key=jax.random.key(3), cfg_scale=1.5)
    evaluator = fvd.FvdEvaluator(Stub(), IDENTITY, clips_of(real), batch_size=8)
    expected, _ = evaluator.run([np.asarray(tokenizer.decode(codes))])
    assert written["metrics"].keys() == {"fvd"}
    assert written["metrics"]["fvd"] == pytest.approx(expected["fvd"], rel=1e-4) and expected["fvd"] > 1e-3
    protocol = written["protocol"]
    wanted = {
        "clips": 6, "made": 6, "clips_chosen": 6, "i3d": IDENTITY, "covariance": "population", "resolution": 32,
        "given": "classes, as frequent as in training", "class_counts": {"0": 5, "2": 1},
        "fingerprint": tokenizer.fingerprint, "tokenizer_step": 6, "weights": "ema",
    }  # fmt: skip
    assert wanted.items() <= protocol.items()
    assert {"seed": 3, "cfg_scale": 1.5, "tokenizer": tokenizer.fingerprint}.items() <= protocol["sampling"].items()
    assert {"checkpoint", "tokenizer", "generator_fingerprint", "versions"} <= protocol.keys()
    assert protocol["definitions"].keys() == {"clips", "fvd"}

    # after an interruption, only missing codes are sampled; a finished folder is a folder of codes
    np.testing.assert_array_equal(all_codes(kept), codes)
    for name in ("manifest.json", "codes-00001-of-00002.npz"):
        (kept / name).unlink()
    sampled.clear()
    again = evaluate(by_class, trained, real, tmp_path / "again.json", *options)
    assert sampled == [4, 5] and again["metrics"] == written["metrics"]
    arguments = [f"--data=folder:{real}", "--batch-size=4", *options, "--seed=4"]
    message = fails(capsys, "evaluate", by_class, trained, tmp_path / "x.json", *arguments)
    assert "started with seed 3, not 4; name another --samples" in message


def test_scores_of_predictions(predictor, trained, tokenizer, real, tmp_path, no_i3d):
    written = evaluate(predictor, trained, real, tmp_path / "fvd.json", "--metrics=cross_entropy,fvd")
    with clips_of(real).batches(6) as batches:
        clips = next(batches)["video"]
    generator = load_generator(predictor)
    condition = tokenizer.encode(generate.hold_last_frame(clips, 5))
    codes = generator.sample(frames=condition, key=jax.random.key(0))
    evaluator = fvd.FvdEvaluator(Stub(), IDENTITY, clips_of(real), batch_size=8)
    expected, _ = evaluator.run([np.asarray(tokenizer.decode(codes))])
    assert written["metrics"]["fvd"] == pytest.approx(expected["fvd"], rel=1e-4)
    assert written["protocol"]["given"] == "the first 5 frames of each clip"
    assert written["protocol"]["sampling"]["cond_frames"] == 5

    found = checkpoint.load(predictor)
    make = nnx.eval_shape(lambda: Generator(found.recipe.model, rngs=nnx.Rngs(0)))
    module = nnx.merge(nnx.graphdef(make), found.params["generator"])
    truth = np.asarray(tokenizer.encode(clips))
    logits = module.head(module.features(Condition(frames=condition), truth[:, :-1]))
    likelihoods = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), truth[..., None], axis=-1)
    assert written["metrics"]["cross_entropy"] == pytest.approx(-likelihoods.mean(), rel=1e-4)
    assert written["metrics"]["top1"] == pytest.approx(np.mean(np.argmax(logits, -1) == truth))
    assert written["protocol"]["codes"] == {"K": 32, "N": 8}


def test_each_host_generates_videos_for_its_share_of_the_clips(predictor, tokenizer, real, monkeypatch):
    options = generate.SamplingOptions()
    sampler = generate.Sampler(load_generator(predictor), tokenizer, options=options, batch_size=2, cond_frames=3)

    def videos(host, hosts):
        monkeypatch.setattr(jax, "process_index", lambda: host)
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        return list(generated.videos_for(sampler, clips_of(real)))

    whole = videos(0, 1)
    first, second = videos(0, 2), videos(1, 2)
    assert [len(batch) for batch in whole] == [2, 2, 2] and (len(first), len(second)) == (2, 1)
    for batch, expected in zip((first[0], second[0], first[1]), whole, strict=True):
        np.testing.assert_allclose(batch, expected, atol=1e-5)


def test_classes_of_the_clips(trained, real, tmp_path):
    unknown = load_generator(write_generator(tmp_path / "unknown", {}))
    assert generated.classes_for(unknown, clips_of(real)).tolist() == [0, 0, 0, 1, 1, 1]
    few = load_generator(write_generator(tmp_path / "few", {}, num_classes=1))
    with pytest.raises(generate.InputError, match="has the class 1, but the generator has 0 to 0"):
        generated.classes_for(few, clips_of(real))
    none = load_generator(write_generator(tmp_path / "none", {"class_counts": [0, 0, 0]}))
    assert generated.classes_for(none, clips_of(real)).tolist() == [-1] * 6


def test_evaluations_that_are_refused(by_class, predictor, trained, real, reference_dir, tmp_path, capsys):
    output, data = tmp_path / "x.json", f"--data=folder:{real}"
    i3d = tmp_path / "i3d.safetensors"
    source = write_i3d(tmp_path, reference_dir)
    assert cli.main(["import", "--kind=i3d", f"--source={source}", f"--output={i3d}"]) == 0

    def refused(generator, *options):
        return fails(capsys, "evaluate", generator, trained, output, data, *options)

    assert cli.main(["evaluate", f"--checkpoint={by_class}", data]) == 2
    assert "holds a generator; add --tokenizer P" in capsys.readouterr().err
    assert "psnr is for a tokenizer, this is a generator; choose from fvd" in refused(by_class, "--metrics=fvd,psnr")
    assert "fid is not known; choose from fvd, cross_entropy" in refused(by_class, "--metrics=fid")
    assert "no weights of i3d at" in refused(by_class, "--metrics=fvd", f"--i3d={tmp_path / 'absent'}")
    assert "T at least 9; got [1, 8, 32, 32, 3]" in refused(by_class, "--metrics=fvd", f"--i3d={i3d}")
    assert "--samples is for --metrics fvd" in refused(by_class, "--samples=y")
    assert "--cfg-scale must be 1" in refused(predictor, "--cfg-scale=2")
    assert "larp_ucf101 does not apply to a generator" in refused(by_class, "--protocol=larp_ucf101")
    assert "given 5 frames, this one is given classes" in refused(by_class, "--protocol=larp_k600_prediction")
    assert "given classes, this one is given 5 frames" in refused(predictor, "--protocol=larp_ucf101_generation")
    assert "clips of 16x128x128" in refused(by_class, "--protocol=larp_ucf101_generation")
    earlier = trained / "checkpoints" / "2"
    assert "was trained on codes of" in fails(capsys, "evaluate", by_class, earlier, output, data)
    assert "--tokenizer is for generators" in refused(trained)
    of_tokenizer = ["evaluate", f"--checkpoint={trained}", data]
    assert cli.main([*of_tokenizer, "--metrics=fvd"]) == 2
    assert "fvd is for a generator, this is a tokenizer; choose from psnr" in capsys.readouterr().err
    assert cli.main([*of_tokenizer, "--protocol=larp_k600_prediction"]) == 2
    assert "larp_k600_prediction does not apply to a tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark(by_class, trained, tmp_path, capsys, small_ceilings):
    config = f"--config={app.__file__.replace('larp_jax/cli/app.py', 'configs/generator_s.py')}"
    small = ["--config.model.width=48", "--config.model.depth=1", "--config.model.num_tokens=4"]
    output = tmp_path / "sample.json"
    arguments = ["benchmark", "sample", config, *small, "--batch-size=2", "--seconds=0.1", f"--output={output}"]
    assert cli.main(arguments) == 0
    result = json.loads(output.read_text())
    assert result["tokens_per_second"] == pytest.approx(4 * result["videos_per_second"])
    # attention 48 x 144 and 48 x 48, the MLP, the head; 2.5 positions of 4 rows on average
    read = 4 * (48 * 192 + 3 * 48 * 256 + 48 * 8192 + 4 * 2.5 * 96) / 1e6
    assert result["megabytes_per_step"] == pytest.approx(read)
    assert 0 < result["share_of_bandwidth_ceiling"] and 0 < result["share_of_matmul_ceiling"] < 1
    assert "tokens per second" in capsys.readouterr().out
    assert cli.main(["benchmark", "data", config]) == 2
    assert "needs the config of a tokenizer, not of a generator" in capsys.readouterr().err
    assert cli.main(["benchmark", "sample", config, *small, "--window=2"]) == 2
    assert "--window depends on what the generator has learned" in capsys.readouterr().err
    assert cli.main(["benchmark", "decode", f"--checkpoint={by_class}"]) == 2
    assert "benchmark decode needs --config" in capsys.readouterr().err

    arguments = ["benchmark", "sample", f"--checkpoint={by_class}", f"--tokenizer={trained}", "--batch-size=2"]
    assert cli.main([*arguments, "--seconds=0.1", "--window=3", "--precision=int8", f"--output={output}"]) == 0
    result = json.loads(output.read_text())
    assert 0 < result["single_video_seconds"] <= result["single_video_p95_seconds"]
    assert 0 < result["first_clip_seconds"] <= result["first_clip_p95_seconds"]
    assert [result[f"window_{w}_codes_per_pass"] for w in (1, 2, 3)][0] == 1.0 <= result["window_3_codes_per_pass"] <= 3
    assert result["fastest_window"] in (1, 2, 3)
    assert 0 < result["logits_deviation"] < 0.1 and 0 < result["equal_greedy_codes"] <= 1


def test_a_window_changes_only_the_speed(by_class, trained, samples, tmp_path, sampled, capsys):
    """The folder of the same samples goes on with another window."""
    folder = tmp_path / "samples"
    shutil.copytree(samples, folder)
    (folder / "codes-00001-of-00002.npz").unlink()
    assert run("sample", by_class, trained, folder, *FIVE, "--window=4") == 0
    assert sampled == [4] and "codes per pass" in "".join(capsys.readouterr())
    np.testing.assert_array_equal(all_codes(folder), all_codes(samples))
