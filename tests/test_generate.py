"""The commands sample and predict: what they write, that they go on where they stopped, and what they refuse."""

import json
import shutil

import jax
import numpy as np
import pytest
from data_helpers import moving_frames
from flax import nnx

from larp_jax import checkpoint, cli, generate, load_generator, tokens
from larp_jax.config import GeneratorConfig, GeneratorRecipe, to_dict
from larp_jax.data.video import probe, write_video
from larp_jax.models.generator import Generator

SIZES = dict(width=16, depth=1, heads=2, codebook_size=32, num_tokens=8, num_classes=3, mlp_multiple=16)


def write_generator(folder, metadata, **options):
    """A generator with weights at random, as a checkpoint that knows where its codes are from."""
    config = GeneratorConfig(**SIZES | options)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Generator(config, rngs=nnx.Rngs(0))), nnx.Param))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)
    checkpoint.write_imported(folder, to_dict(GeneratorRecipe(model=config)), {"generator": params})
    path = folder / "metadata" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | metadata))
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
    """Five samples of seed 3, four at a time."""
    output = tmp_path_factory.mktemp("samples") / "out"
    assert run("sample", by_class, trained, output, *FIVE) == 0
    return output


FIVE = ("--num=5", "--seed=3", "--batch-size=4", "--cfg-scale=1.5")


def all_codes(folder):
    manifest = tokens.read_manifest(folder)
    return np.concatenate([tokens.read_shard(folder, manifest, i) for i in range(len(manifest["shards"]))])


def test_what_sample_writes(samples, by_class, tokenizer):
    labels = [0, 2, 0, 0, 0]  # 6 : 0 : 2 in training
    names = [f"{i:06d}_{label}" for i, label in enumerate(labels)]
    codes = ["codes-00000-of-00002.npz", "codes-00001-of-00002.npz"]
    assert {path.name for path in samples.iterdir()} == {
        *(f"{name}.mp4" for name in names), *codes, "samples.png", "settings.json", "manifest.json"
    }  # fmt: skip
    info = probe(samples / f"{names[1]}.mp4")
    assert (info.frames, info.width, info.height) == (8, 32, 32)
    manifest = tokens.read_manifest(samples)
    assert manifest["fingerprint"] == tokenizer.fingerprint
    assert [row["source"] for row in manifest["rows"]] == names
    assert [row["label"] for row in manifest["rows"]] == labels
    expected = load_generator(by_class).sample(labels, key=jax.random.key(3), cfg_scale=1.5)
    np.testing.assert_array_equal(all_codes(samples), expected)


def test_detokenize_reads_samples(samples, tokenizer, tmp_path):
    written = tokens.detokenize(tokenizer, samples, tmp_path / "again")
    assert [path.stem for path in written] == [row["source"] for row in tokens.read_manifest(samples)["rows"]]


def test_a_stopped_run_goes_on(samples, by_class, trained, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    shutil.copytree(samples, output)
    for name in ("manifest.json", "codes-00001-of-00002.npz", "000004_0.mp4", "samples.png"):
        (output / name).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    sampled = []
    original = generate.LoadedGenerator.sample
    monkeypatch.setattr(
        generate.LoadedGenerator,
        "sample",
        lambda self, *args, indices, **kw: sampled.extend(indices) or original(self, *args, indices=indices, **kw),
    )
    assert run("sample", by_class, trained, output, *FIVE) == 0
    assert set(sampled) == {4}
    assert all((output / name).stat().st_mtime_ns == time for name, time in kept.items())
    np.testing.assert_array_equal(all_codes(output), all_codes(samples))
    assert (output / "samples.png").read_bytes() == (samples / "samples.png").read_bytes()

    sampled.clear()
    assert run("sample", by_class, trained, output, *FIVE) == 0
    assert not sampled

    for option, message in (
        ("--seed=4", "begun with seed 3, not 4; name another --output"),
        ("--cfg-scale=2", "begun with cfg_scale 1.5, not 2.0"),
        ("--num=6", "begun with counts {'0': 4, '2': 1}, not"),
    ):
        assert message in fails(capsys, "sample", by_class, trained, output, *FIVE, option)


def test_each_host_takes_its_share(by_class, tokenizer, tmp_path, monkeypatch):
    generator, met = load_generator(by_class), []

    def sample():
        options = generate.SamplingOptions()
        generate.sample(generator, tokenizer, tmp_path, counts={0: 6}, options=options, batch_size=2)

    def other_host(name):
        """What happens until both have met: the second host samples its share."""
        met.append(sorted(path.name for path in tmp_path.glob("codes-*")))
        if len(met) == 1:
            monkeypatch.setattr(jax, "process_index", lambda: 1)
            sample()
            assert not (tmp_path / "manifest.json").exists()
            monkeypatch.setattr(jax, "process_index", lambda: 0)

    monkeypatch.setattr(generate.multihost_utils, "sync_global_devices", other_host)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sample()
    names = [f"codes-{i:05d}-of-00003.npz" for i in range(3)]
    assert met == [[names[0], names[2]], names]
    monkeypatch.undo()
    np.testing.assert_array_equal(all_codes(tmp_path), generator.sample([0] * 6, key=jax.random.key(0)))


@pytest.mark.parametrize(
    "options, labels",
    [
        (["--classes=2,0", "--num=3"], [0, 2, 0]),
        (["--classes=1:1,0:2"], [0, 1, 0]),
    ],
)
def test_classes_that_are_given(by_class, options, labels):
    arguments = cli._parse(["sample", f"--checkpoint={by_class}", "--tokenizer=x", "--output=y", *options])
    counts = cli._counts_of_classes(arguments, load_generator(by_class))
    assert sorted(generate._taking_turns(counts)) == sorted(labels)


def test_shares():
    assert generate.spread(10, [1, 1, 1]) == {0: 4, 1: 3, 2: 3}
    assert generate.spread(10_000, [121, 80, 0, 99]) == {0: 4033, 1: 2667, 3: 3300}
    assert generate.spread(2, [5, 1, 4]) == {0: 1, 2: 1}
    assert generate._taking_turns({0: 3, 3: 2}) == [0, 3, 0, 3, 0]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two windows, and three frames that are too few to predict from."""
    path = tmp_path_factory.mktemp("videos") / "walk.mp4"
    write_video(path, moving_frames(19), 12.0)
    return path


def test_what_predict_writes(predictor, trained, tokenizer, video, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["predict", predictor, trained, output, f"--input={video}", "--cond-frames=3", "--batch-size=8"]
    assert run(*arguments) == 0
    assert "2 predictions beside the truth" in capsys.readouterr().out
    info = probe(output / "walk-000008.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (8, 64, 32, 12.0)
    assert (output / "walk-000008.png").exists()
    manifest = tokens.read_manifest(output)
    assert [row["source"] for row in manifest["rows"]] == ["walk-000000", "walk-000008"]

    clips = np.stack([window.frames for rows, _ in generate.Inputs(
        str(video), generate.ClipSpec(frames=8, resolution=32)).batches(1) for window in rows[:1]])[:2]  # fmt: skip
    condition = tokenizer.encode(generate.hold_last_frame(clips, 3))
    expected = load_generator(predictor).sample(condition=condition, key=jax.random.key(0))
    np.testing.assert_array_equal(all_codes(output), expected)

    time = (output / "walk-000008.mp4").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert (output / "walk-000008.mp4").stat().st_mtime_ns == time
    assert "begun with cond_frames 3, not 4" in fails(capsys, *arguments, "--cond-frames=4")
    assert "below the clip's 8" in fails(capsys, *arguments, "--cond-frames=8")


def test_what_is_refused(by_class, predictor, trained, video, reference_dir, tmp_path, capsys):
    output = tmp_path / "out"
    source = f"--input={video}"
    assert "use larp-jax predict" in fails(capsys, "sample", predictor, trained, output)
    assert "use larp-jax sample" in fails(capsys, "predict", by_class, trained, output, source)
    assert "holds a tokenizer; give a generator" in fails(capsys, "sample", trained, trained, output)
    assert "holds a generator; give a tokenizer" in fails(capsys, "sample", by_class, by_class, output)
    earlier = trained / "checkpoints" / "2"
    assert "was trained on codes of tokenizer" in fails(capsys, "sample", by_class, earlier, output)
    assert "the generator makes 12 codes of 64" in fails(capsys, "sample", reference_dir / "ar_class", trained, output)
    for option, message in (
        ("--classes=3", "3 is no class of the generator, which has 0 to 2"),
        ("--classes=a", "'a' is no number"),
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
    assert "is not empty and holds no samples" in fails(capsys, "sample", by_class, trained, output)


def test_benchmark(tmp_path, capsys):
    config = f"--config={cli.__file__.replace('larp_jax/cli.py', 'configs/generator_s.py')}"
    small = ["--config.model.width=48", "--config.model.depth=1", "--config.model.num_tokens=4"]
    output = tmp_path / "sample.json"
    arguments = ["benchmark", "sample", config, *small, "--batch-size=2", "--seconds=1", f"--output={output}"]
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
