"""Training a generator from the command line: from clips, from codes on disk, and mismatched inputs."""

import json
import pathlib
import runpy
import shutil

import chaos
import jax
import numpy as np
import pytest
from data_helpers import moving_frames

from larp_jax import cli, load_generator
from larp_jax.config import MeshConfig, parse_recipe
from larp_jax.data.codes import CodeSet
from larp_jax.data.video import VideoFile, probe, write_video
from larp_jax.errors import InputError
from larp_jax.inference.tokenize import detokenize
from larp_jax.runtime import sharding
from larp_jax.training.generator import GeneratorTask
from larp_jax.weights import checkpoint

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny_generator.py")


def train(workdir, tokenizer, *overrides):
    return cli.main(
        ["train", "--config", CONFIG, "--workdir", str(workdir), f"--config.tokenizer={tokenizer}", *overrides]
    )


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert train(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def online(trained, tmp_path_factory):
    """The workdir of a run that encodes clips during training."""
    workdir = tmp_path_factory.mktemp("online") / "run"
    assert train(workdir, trained) == 0
    return workdir


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two classes, three videos of 8, 20 and 30 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("run/a", 8), ("run/b", 20), ("walk/c", 30)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / f"{name}.mp4", moving_frames(count, seed=count), 8.0)
    return folder


@pytest.fixture(scope="module")
def codes(trained, videos, tmp_path_factory):
    """Codes of these videos: at most four windows of each, also mirrored, with codes for frame prediction."""
    output = tmp_path_factory.mktemp("codes") / "out"
    options = ["--windows=4", "--flips", "--cond-frames=3"]
    command = ["tokenize", f"--checkpoint={trained}", f"--input={videos}", f"--output={output}", *options]
    assert cli.main(command) == 0
    return output


def test_what_a_run_leaves(online, tokenizer):
    logged = chaos.rows(online)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert {"train/loss", "train/top1", "train/top5", "train/grad_norm"} <= logged[0].keys()
    assert {"eval/cross_entropy", "eval/top1", "eval/top5"} <= logged[5].keys()
    np.testing.assert_allclose(logged[0]["train/loss"], np.log(32), rtol=1e-5)
    assert {path.name for path in (online / "media").iterdir()} == {
        f"{step:08d}_samples.{suffix}" for step in (3, 6) for suffix in ("png", "mp4")
    }
    assert logged[5]["train/loss"] < logged[0]["train/loss"] - 0.1
    found = checkpoint.load(online)
    assert found.params.keys() == {"generator"}
    model = found.recipe.model
    assert (model.codebook_size, model.num_tokens, model.num_classes) == (32, 8, 16)
    metadata = json.loads((found.path / "metadata" / "metadata").read_text())
    assert metadata["tokenizer_fingerprint"] == found.recipe.tokenizer_fingerprint == tokenizer.fingerprint
    generator = load_generator(online)
    assert generator.class_counts.sum() == 32 and generator.tokenizer_fingerprint == tokenizer.fingerprint
    generator.check_tokenizer(tokenizer)
    assert sum(metadata["class_counts"]) == 32 and len(metadata["class_counts"]) == len(metadata["class_names"]) == 16


def test_a_resumed_run_equals_an_uninterrupted_one(online, trained, tmp_path):
    workdir = shutil.copytree(online, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert train(workdir, trained) == 0
    assert chaos.rows(workdir) == chaos.rows(online)
    for weights in ("ema", "raw"):
        one, other = (checkpoint.load(path, weights=weights).params for path in (workdir, online))
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_starting_from_the_weights_of_another_run(online, trained, tmp_path, capsys):
    workdir, start = tmp_path / "run", f"--config.init_from={online}"
    message = error_of(capsys, workdir, trained, start, "--config.model.num_classes=20", "--config.model.heads=4")
    assert "model.heads is 4 here, 2 there; " in message
    assert "generator/class_embedding is [21, 16] here, [17, 16] there" in message
    assert "holds a tokenizer; give a generator" in error_of(capsys, workdir, trained, f"--config.init_from={trained}")
    assert not workdir.exists()
    rates = ["--config.optim.learning_rate=1e-9", "--config.model.frames_dropout=0.5"]
    assert train(workdir, trained, start, "--config.steps=1", *rates) == 0
    for weights in ("raw", "ema"):
        found = checkpoint.load(workdir, weights=weights).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, checkpoint.load(online).params)


def test_codes_of_windows_mirrored_and_for_prediction(codes, tokenizer, videos):
    found = CodeSet(codes)
    manifest = found.manifest
    assert manifest["cond_frames"] == 3
    starts = {"run/a.mp4": [0], "run/b.mp4": [0, 4, 8, 12], "walk/c.mp4": [0, 7, 15, 22]}
    windows = [(name, start) for name, several in starts.items() for start in several]
    listed = [(row["source"], row["start"], row.get("flip", False)) for row in manifest["rows"]]
    assert listed == [(*window, flip) for flip in (False, True) for window in windows]
    assert found.labels().tolist() == [0, 0, 1] and found.label_names == ("run", "walk")

    source = VideoFile(videos / "run" / "b.mp4").read(4, 8, (32, 32), exact=True)
    held = np.concatenate([source[:3], np.repeat(source[2:3], 5, axis=0)])
    stored = found.rows
    number = listed.index(("run/b.mp4", 4, False))
    np.testing.assert_array_equal(stored["codes"][number], tokenizer.encode(source[None])[0])
    np.testing.assert_array_equal(stored["condition"][number], tokenizer.encode(held[None])[0])
    mirrored = listed.index(("run/b.mp4", 4, True))
    np.testing.assert_array_equal(stored["codes"][mirrored], tokenizer.encode(source[None, :, :, ::-1])[0])
    assert len(found.some(0)["codes"]) == 9 and len(found.some(4)["codes"]) == 4


def test_detokenize_joins_only_windows_that_follow_each_other(codes, tokenizer, tmp_path):
    written = detokenize(tokenizer, codes, tmp_path / "out")
    names = [path.relative_to(tmp_path / "out").as_posix() for path in written]
    assert names[:8] == ["run/a.mp4", "run/b.mp4", *(f"run/b.mp4-{start:06d}.mp4" for start in (4, 8, 12)),
                         "walk/c.mp4", "walk/c.mp4-000007.mp4", "walk/c.mp4-000022.mp4"]  # fmt: skip
    assert probe(written[6]).frames == 16
    assert names[8:10] == ["run/a.mp4-flipped.mp4", "run/b.mp4-flipped.mp4"] and len(names) == 16


def test_every_video_is_sampled_equally_often(codes):
    found = CodeSet(codes)
    order = {"batch_size": 4, "seed": 5}
    with found.batches(**order) as batches:
        drawn = [next(batches) for _ in range(90)]
    labels = np.concatenate([batch["label"] for batch in drawn])
    assert np.bincount(labels).tolist() == [240, 120]
    sequences = {tuple(row) for batch in drawn for row in batch["codes"]}
    assert sequences == set(map(tuple, found.rows["codes"]))
    with found.batches(**order, start_step=7) as batches:
        later = next(batches)
    jax.tree.map(np.testing.assert_array_equal, later, drawn[7])
    for index in range(2):
        with found.batches(**order, process_index=index, process_count=2) as batches:
            half = next(batches)
        np.testing.assert_array_equal(half["codes"], drawn[0]["codes"][2 * index : 2 * index + 2])


@pytest.mark.slow
def test_training_from_codes(codes, trained, tokenizer, tmp_path):
    data = [f"--config.data.train=tokens:{codes}", f"--config.data.eval=tokens:{codes}"]
    assert train(tmp_path / "by_class", "", *data) == 0
    found = checkpoint.load(tmp_path / "by_class")
    assert found.recipe.tokenizer_fingerprint == tokenizer.fingerprint
    metadata = json.loads((found.path / "metadata" / "metadata").read_text())
    assert metadata["class_counts"] == [2, 1] and metadata["class_names"] == ["run", "walk"]

    assert train(tmp_path / "prediction", trained, *data, "--config.model.frame_prediction") == 0
    found = checkpoint.load(tmp_path / "prediction")
    assert found.params["generator"]["token_embedding"].shape == (33, 16)
    assert (tmp_path / "prediction" / "media" / "00000006_samples.png").exists()
    assert "class_counts" not in json.loads((found.path / "metadata" / "metadata").read_text())
    assert chaos.rows(tmp_path / "prediction")[-1]["train/loss"] < np.log(32) - 0.1


@pytest.fixture
def mixed(videos, tmp_path):
    """Three classes named by numbers, the first only in `test`; and a video without a class."""
    folder = tmp_path / "mixed"
    for name, source in (("train/2/a", "run/a"), ("train/10/b", "run/b"), ("train/10/c", "walk/c"),
                         ("train/d", "run/a"), ("test/0/e", "run/a")):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / f"{source}.mp4", folder / f"{name}.mp4")
    return folder


@pytest.mark.parametrize("kind", ["folder", "mixture", "prepared", "tokens"])
def test_classes_are_counted_alike_for_every_kind_of_data(kind, mixed, trained, tmp_path, capsys):
    spec = f"folder:{mixed}"
    if kind == "mixture":
        spec = f"folder:{mixed}+folder:{mixed / 'train'}"
    elif kind == "prepared":
        assert cli.main(["prepare", f"--input={mixed}", f"--output={tmp_path / 'p'}", "--size=32"]) == 0
        spec = f"tfds:{tmp_path / 'p'}"
    elif kind == "tokens":
        command = ["tokenize", f"--checkpoint={trained}", f"--input={mixed}", f"--output={tmp_path / 'codes'}"]
        assert cli.main(command) == 0
        assert "contains the splits test, train: all are read" in capsys.readouterr().err
        spec = f"tokens:{tmp_path / 'codes'}"
    recipe = runpy.run_path(CONFIG)["get_config"]()
    recipe.tokenizer, recipe.data.train, recipe.data.eval = str(trained), spec, ""
    task = GeneratorTask(parse_recipe(recipe), sharding.make_mesh(MeshConfig()))
    found = task.metadata()
    assert found["class_names"] == ["0", "2", "10"]
    assert found["class_counts"] == {"mixture": [0, 2, 4], "tokens": [1, 1, 2]}.get(kind, [0, 1, 2])
    if kind != "tokens":
        with task.batches(0) as batches:
            drawn = np.concatenate([next(batches)["label"] for _ in range(2 if kind == "mixture" else 1)])
        counts = np.bincount(drawn + 1, minlength=4)
        assert counts.tolist() == ([4, 0, 4, 8] if kind == "mixture" else [2, 0, 2, 4])


@pytest.mark.slow
def test_classes_without_videos_are_warned_of_and_not_sampled(mixed, trained, tmp_path, capsys, monkeypatch):
    data = [f"--config.data.train=folder:{mixed}", "--config.data.eval=", "--config.steps=1"]
    seen = []
    put = jax.device_put

    def watch(x, *rest, **options):
        if isinstance(x, dict) and x.keys() == {"label"}:
            seen.append(x["label"].tolist())
        return put(x, *rest, **options)

    monkeypatch.setattr(jax, "device_put", watch)
    assert train(tmp_path / "run", trained, *data) == 0
    assert "data.train has no video of the classes 0 (0): they are not learned" in capsys.readouterr().err
    assert seen == [[1, 2] * 4]


def test_a_run_does_not_resume_with_other_classes(codes, online, trained, tmp_path, capsys):
    """The labels mean other classes than before, because the codes were written again."""
    other = shutil.copytree(codes, tmp_path / "codes")
    data = [f"--config.data.train=tokens:{other}", "--config.data.eval=", "--config.steps=2"]
    assert train(tmp_path / "run", "", *data) == 0
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["label_names"].reverse()
    (other / "manifest.json").write_text(json.dumps(manifest))
    message = error_of(capsys, tmp_path / "run", "", *data)
    assert "data.train has other classes than before, 'walk' in place of 'run'" in message


def test_labels_without_a_class_are_an_error(codes, tmp_path):
    other = shutil.copytree(codes, tmp_path / "codes")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["rows"][0]["label"] = 2
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="has label 2, but only 2 classes; tokenize again"):
        CodeSet(other)


def test_folders_without_codes_are_refused(videos, tmp_path):
    with pytest.raises(InputError, match=f"contains no codes written by larp-jax tokenize; .* 'folder:{videos}'"):
        CodeSet(videos)


def test_inputs_that_do_not_match(codes, online, trained, videos, tmp_path, capsys):
    run, from_codes = tmp_path / "run", f"--config.data.train=tokens:{codes}"
    other = trained / "checkpoints" / "2"
    for message, tokenizer, *overrides in (
        ("is of tokenizer", other, from_codes, "--config.data.eval="),
        ("is of tokenizer", trained, "--config.tokenizer_fingerprint=0123456789abcdef"),
        ("moving_shapes needs the tokenizer; give its checkpoint", ""),
        ("model.num_tokens=16, but the tokenizer has 8; set it to 8, or to 0", trained, "--config.model.num_tokens=16"),
        ("data.train has label 15, but model.num_classes=4", trained, "--config.model.num_classes=4"),
        ("data.train has the classes run, walk, data.eval", trained, f"--config.data.train=folder:{videos}"),
        ("was not made for cond_frames=2", "", from_codes, "--config.model.frame_prediction", "--config.cond_frames=2"),
        ("cond_frames=8 must be below the clip's 8 frames", trained, "--config.model.frame_prediction",
         "--config.cond_frames=8"),
        ("holds a generator; give a tokenizer", online),
        ("no checkpoint in", tmp_path),
    ):  # fmt: skip
        assert message in error_of(capsys, run, tokenizer, *overrides), message
        assert not run.exists()
    assert "holds a run with tokenizer_fingerprint=" in error_of(capsys, online, other)


def test_codes_are_not_videos(codes, trained, tmp_path, capsys):
    assert cli.main(["evaluate", f"--checkpoint={trained}", f"--data=tokens:{codes}"]) == 2
    assert "contains codes, on which only generators train" in capsys.readouterr().err
    manifest = json.loads((codes / "manifest.json").read_text())
    broken = shutil.copytree(codes, tmp_path / "codes")
    manifest["rows"][0]["flip"] = 1
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="invalid flip of row 0"):
        CodeSet(broken)
