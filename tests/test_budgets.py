"""A tokenizer with a ladder from training to codes on disk, on the command line and in Python."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_generate import write_generator

import larp_jax
from larp_jax import cli
from larp_jax.config import parse_recipe
from larp_jax.data import ClipSpec, codes as codes_on_disk
from larp_jax.data.inputs import Inputs
from larp_jax.data.video import VideoFile, write_video
from larp_jax.errors import InputError
from larp_jax.evaluation import generated, protocols
from larp_jax.inference import generate
from larp_jax.models.sampling import SamplingOptions
from larp_jax.training.tokenizer import TokenizerStage

CONFIG = pathlib.Path(__file__).parent / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_programs, small_moving_shapes):
    """Workdir of a run of tests/configs/tiny.py:adaptive."""
    folder = tmp_path_factory.mktemp("adaptive")
    assert cli.main(["train", "--config", f"{CONFIG}:adaptive", "--workdir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def adaptive(run):
    return larp_jax.load_tokenizer(run)


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), np.uint8)


@pytest.mark.slow
def test_training_draws_assignments(run, adaptive):
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for line in logs for name, value in line.items()}
    assert found["eval/codes"] == 8.0  # evaluation has the most codes in equal blocks
    assert {"train/loss_prior", "train/perplexity", "train/usage_clip", "eval/prior_top1"} <= found.keys()
    assert np.isfinite(list(found.values())).all()
    recipe = parse_recipe(json.loads((run / "config.json").read_text()))
    assert recipe.model == adaptive.config
    stage = TokenizerStage(recipe)
    clips = np.zeros((4096, 1))
    drawn, again, other = (np.asarray(stage.lengths(clips, jax.random.key(i), {})) for i in (0, 0, 1))
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, other)
    rows, counts = np.unique(drawn, axis=0, return_counts=True)
    assert rows.tolist() == [list(x) for x in recipe.model.adaptive.assignments]
    assert counts.min() > 0.8 * 4096 / len(rows)


@pytest.mark.slow
def test_encoding_and_decoding_in_python(adaptive, video):
    codes, lengths = adaptive.encode(video)
    assert lengths.tolist() == [[4, 4]] * 3 and codes.shape == (3, 12) and not codes[:, 8:].any()
    codes, lengths = adaptive.encode(video, budget=[[2, 4], [8, 4], [4, 2]])
    assert lengths.tolist() == [[2, 4], [8, 4], [4, 2]] and lengths.dtype == np.int32
    whole = adaptive.decode(codes, lengths)
    np.testing.assert_allclose(whole, adaptive.reconstruct(video, budget=lengths), atol=1e-5)
    np.testing.assert_allclose(adaptive.decode(codes, lengths[:, :1]), whole[:, :4], atol=1e-5)
    for budget, row in ((4, [2, 2]), ("bits=30", [2, 2]), ("2,8", [2, 8]), ((8, 2), [8, 2])):
        assert adaptive.assign(video, budget).tolist() == [row] * 3

    def refused(message, f, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            f(*arguments, **options)

    refused("this tokenizer has a ladder: give the lengths", adaptive.decode, codes)
    refused(r"must be \[3, 2\], or those of the first blocks; got shape \[2, 2\]", adaptive.decode, codes, lengths[:2])
    refused("must be of the ladder", adaptive.decode, codes, [[2, 3]] * 3)
    refused("and at most 12 together", adaptive.decode, codes, [[8, 8]] * 3)
    refused(r"codes must be \[B, 12\]", adaptive.decode, codes[:, :8], lengths)
    refused(r"lengths must be \[3, 2\]; got", adaptive.encode, video, budget=[[2], [2], [2]])
    refused("does not split into 2 equal blocks", adaptive.encode, video, budget=6)


def test_a_tokenizer_without_a_ladder_takes_no_budget(tokenizer, video):
    with pytest.raises(InputError, match="budget 8: this tokenizer has no model.ladder and gives every clip 8 codes"):
        tokenizer.encode(video, budget=8)
    codes = tokenizer.encode(video)
    with pytest.raises(ValueError, match="gives every clip the same number of codes"):
        tokenizer.decode(codes, [[4, 4]] * 3)


@pytest.mark.slow
def test_budgets_on_the_command_line(run, adaptive, tmp_path, capsys):
    checkpoint, data = ["--checkpoint", str(run)], "moving_shapes:test"
    some = ["--data", data, "--max-clips", "8"]
    where = lambda name: str(tmp_path / name)  # noqa: E731

    def call(*arguments, code=0):
        assert cli.main([*map(str, arguments)]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    tokenize = ["tokenize", *checkpoint, "--input", data, "--max-clips", "4", "--output"]
    assert "4 clips of 4 videos, 10 codes each on average" in call(*tokenize, where("codes"), "--budget", "2,8")
    manifest = codes_on_disk.read_manifest(where("codes"))
    assert (manifest["layout"], manifest["N"], manifest["ladder"]) == ("packed", 12, [2, 4, 8])
    shard = codes_on_disk.read_shard(where("codes"), manifest, 0)
    assert shard["lengths"].tolist() == [[2, 8]] * 4
    call("detokenize", *checkpoint, "--input", where("codes"), "--output", where("again"))
    assert len(list((tmp_path / "again").rglob("*.mp4"))) == 4
    call(*tokenize, where("pictures"), "--budget", "2,8", "--cond-frames", 1)  # as predict gives a picture
    found = codes_on_disk.CodeSet(where("pictures"))
    assert [row.get("picture", False) for row in found.manifest["rows"]] == [False] * 4 + [True] * 4
    rows, (_, clips) = found.rows["codes"], next(iter(Inputs(data, ClipSpec(8, 32), max_clips=4).batches(4)))
    np.testing.assert_array_equal(rows[:4], shard["codes"])
    np.testing.assert_array_equal(rows[4:, :2], adaptive.encode_frames(clips[:, :1], budget="2,8")[0][:, :2])
    after = adaptive.encode(np.concatenate([clips[:, [0, 0, 0]], clips[:, :5]], axis=1), budget="2,8")[0]
    np.testing.assert_array_equal(rows[4:], after)
    call("detokenize", *checkpoint, "--input", where("pictures"), "--output", where("all"))
    assert len(list((tmp_path / "all").rglob("*-picture.mp4"))) == 4

    call("evaluate", *checkpoint, *some, "--budget", "bits=30", "--output", where("e.json"))
    scores = json.loads((tmp_path / "e.json").read_text())
    assert scores["metrics"]["codes"] == 4.0 and scores["protocol"]["budget"] == "bits=30"
    reconstruct = ["reconstruct", *checkpoint, "--input", data, "--max-clips", "2"]
    call(*reconstruct, "--output", where("pairs"), "--budget", "4")
    pairs = json.loads((tmp_path / "pairs" / "psnr.json").read_text())
    assert pairs["budget"] == "4" and [video["codes"] for video in pairs["videos"].values()] == [4, 4]
    header = next((tmp_path / "pairs").rglob("*.png")).read_bytes()
    assert int.from_bytes(header[20:24], "big") == 3 * 32 + 2 * 2  # the height: two rows of frames, and bars below
    call("analyze", *checkpoint, *some, "--ablated-clips", "2", "--output", where("a"), "--budget", "2,4")
    analysis = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert all(len(values) == 6 for values in analysis["by_position"].values())

    call(*tokenize, run / "codes", "--budget", "4,2")
    call("report", "--workdir", run, "--output", where("page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "Numbers of codes" in page and "6.0 on average, 6 to 6" in page and "0.75" in page
    assert "The videos with the fewest codes" in page
    (run / "codes" / manifest["shards"][0]["file"]).write_bytes(b"PK")
    call("report", "--workdir", run, "--output", where("page.html"))
    assert "is damaged" in (tmp_path / "page.html").read_text()

    assert "budget 5 does not split into 2 equal blocks of the ladder; choose from 4, 8" in call(
        *tokenize, where("x"), "--budget", "5", code=2
    )
    options = ["--cond-frames", "2"]
    assert "--cond-frames 2 is for tokenizers without a ladder" in call(*tokenize, where("x"), *options, code=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_generator_samples_codes_of_different_lengths(run, adaptive, tmp_path, capsys):
    """sample, its codes on disk, detokenize, report, and predict from the first block or a picture."""
    model = dict(codebook_size=32, num_tokens=12, blocks=2, ladder=(2, 4, 8))
    classes = {"class_counts": [1, 1, 1], "class_names": ["still", "slow", "busy"], "class_codes": [4.0, None, 12.0]}
    metadata = {"tokenizer_fingerprint": adaptive.fingerprint} | classes
    generator, where = write_generator(tmp_path / "generator", metadata, **model), lambda name: str(tmp_path / name)

    def call(command, *arguments, code=0):
        files = [f"--checkpoint={generator}", f"--tokenizer={run}"] if command in ("sample", "predict") else []
        assert cli.main([command, *files, *map(str, arguments)]) == code
        said = capsys.readouterr()
        return said.err.splitlines()[-1] if code else said.out

    six = ["--num", 6, "--batch-size", 4]
    said = call("sample", *six, "--output", where("samples"), "--cfg-scale", 1.5)
    manifest = codes_on_disk.read_manifest(where("samples"))
    rows = codes_on_disk.CodeSet(where("samples")).rows
    assert set(map(tuple, rows["lengths"].tolist())) <= set(adaptive.config.adaptive.assignments)
    assert len(np.unique(rows["lengths"].sum(axis=1))) > 1
    means = [rows["lengths"][rows["label"] == label].sum(axis=1).mean() for label in range(3)]
    assert manifest["class_codes"] == means and manifest["class_codes_in_training"] == [4.0, None, 12.0]
    assert f"still {means[0]:.0f} (training 4), slow {means[1]:.0f}, busy {means[2]:.0f} (training 12)" in said
    assert json.loads((tmp_path / "samples" / "settings.json").read_text())["budget"] == "auto"
    capsys.readouterr()
    call("sample", *six, "--output", where("samples"), "--cfg-scale", 1.5)  # nothing is left to sample
    np.testing.assert_array_equal(codes_on_disk.CodeSet(where("samples")).rows["codes"], rows["codes"])
    call("detokenize", "--checkpoint", run, "--input", where("samples"), "--output", where("again"))
    assert len(list((tmp_path / "again").rglob("*.mp4"))) == 6
    shutil.copytree(tmp_path / "samples", run / "samples")
    call("report", "--workdir", run, "--output", where("page.html"))
    assert f"still {means[0]:.0f} (training 4)" in (tmp_path / "page.html").read_text()
    shutil.rmtree(run / "samples")
    options = SamplingOptions(cfg_scale=1.5)
    sampler = generate.Sampler(larp_jax.load_generator(generator), adaptive, options=options, batch_size=4)
    clips, described = protocols.ClipSet("moving_shapes:test", ClipSpec(8, 32), None, max_clips=4), {}
    videos = list(generated.videos_for(sampler, clips, np.array([0, 2, 0, 2], np.int32), described=described))
    assert np.concatenate(videos).shape == (4, 8, 32, 32, 3)
    assert described["class_codes"][1] is None and 4 <= described["class_codes"][2] <= 12

    call("sample", "--num", 4, "--output", where("given"), "--budget", "2,8")
    assert codes_on_disk.CodeSet(where("given")).rows["lengths"].tolist() == [[2, 8]] * 4
    clip = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)
    write_video(where("clip.mp4"), clip, 8.0)
    predict = ["--input", where("clip.mp4"), "--output"]
    call("predict", *predict, where("after"))
    found = codes_on_disk.CodeSet(where("after")).rows
    own, lengths = adaptive.encode_frames(VideoFile(where("clip.mp4")).read(0, 8, (32, 32), exact=True)[None, :4])
    assert lengths.tolist() == [[4]] and found["lengths"][0, 0] == 4
    np.testing.assert_array_equal(found["codes"][0, :4], own[0, :4])
    call("predict", *predict, where("picture"), "--cond-frames", 1, "--budget", 4)
    assert codes_on_disk.CodeSet(where("picture")).rows["lengths"].tolist() == [[2, 2]]

    for command, options, message in (
        ("predict", [*predict, where("x"), "--cond-frames", 3], "3 given frames are no whole blocks of this tokenizer"),
        ("sample", ["--output", where("x"), "--budget", "8,8"], "budget 8,8 has 16 codes, above the tokenizer's 12"),
        ("sample", ["--output", where("x"), "--window", 4], "window 4: a generator with a ladder draws one code"),
    ):
        assert message in call(command, *options, code=2)
        assert not (tmp_path / "x").exists()
    plain = write_generator(tmp_path / "plain", {}, num_tokens=12)
    wrong = ["sample", f"--checkpoint={plain}", f"--tokenizer={run}", f"--output={where('x')}"]
    assert cli.main(wrong) == 2
    assert "the generator has no ladder, the tokenizer 2 blocks of (2, 4, 8) codes" in capsys.readouterr().err


@pytest.mark.slow
def test_training_a_generator_of_different_lengths(run, adaptive, tmp_path, capsys):
    """The ladder comes from the codes; the run learns the lengths of each class, and says how they are in the data."""
    folder, rngs = tmp_path / "codes", np.random.default_rng(0)
    lengths = np.array([[2, 2], [4, 8]] * 8)  # of still and busy clips
    rows = [{"source": f"{i:02d}", "start": 0, "frames": 8, "fps": 0.0, "label": i % 2} for i in range(len(lengths))]
    manifest = codes_on_disk.new_manifest(
        fingerprint=adaptive.fingerprint, step=6, K=32, N=12, clip=(8, 32, 32, 3), sizes=[len(rows)],
        adaptive=adaptive.config.adaptive, label_names=["still", "busy"], rows=rows,
    )  # fmt: skip
    codes = rngs.integers(0, 32, (len(rows), 12), dtype=np.int32)
    folder.mkdir()
    codes_on_disk.write_shard(folder / manifest["shards"][0]["file"], {"codes": codes, "lengths": lengths})
    codes_on_disk.write_manifest(folder, manifest)

    def train(workdir, *overrides):
        data = [f"--config.data.train=tokens:{folder}", f"--config.data.eval=tokens:{folder}"]
        config = ["--config", CONFIG.with_name("tiny_generator.py"), f"--config.tokenizer={run}", *data]
        return cli.main(["train", *map(str, config), f"--workdir={workdir}", *overrides])

    assert train(tmp_path / "run", "--config.steps=60", "--config.eval_every=60", "--config.optim.ema_decay=0.0") == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/code_loss", "train/length_loss"} <= {name for row in logged for name in row}
    assert logged[-1]["eval/length_cross_entropy"] < 0.1
    assert (tmp_path / "run" / "media" / "00000060_samples.mp4").exists()
    generator = larp_jax.load_generator(tmp_path / "run")
    assert (generator.config.ladder, generator.config.blocks, generator.config.num_tokens) == ((2, 4, 8), 2, 12)
    assert generator.class_codes == (4.0, 12.0)
    _, sampled = generator.sample([0, 1] * 32, key=jax.random.key(0))
    np.testing.assert_allclose(np.asarray(sampled).sum(axis=1).reshape(-1, 2).mean(axis=0), [4, 12], rtol=0.1)

    for change, said in (
        ("--config.model.ladder=2,4", "model.ladder=(2, 4), but the tokenizer has (2, 4, 8)"),
        ("--config.model.blocks=3", "model.blocks=3 needs model.ladder"),
        ("--config.model.condition=frames", "is for clips of one length"),
        ("--config.data.eval=moving_shapes:test", "training does not choose how many codes a clip gets"),
    ):
        capsys.readouterr()
        assert train(tmp_path / "wrong", change) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_exports(run, adaptive, tmp_path, video, capsys):
    export = ["export", "--checkpoint", str(run), "--format"]
    assert cli.main([*export, "stablehlo", "--output", str(tmp_path / "hlo")]) == 0
    encode, decode = (
        jax.export.deserialize((tmp_path / "hlo" / f"{name}.bin").read_bytes()).call for name in ("encode", "decode")
    )
    lengths = np.array([[2, 4], [8, 4], [4, 2]], np.int32)
    codes, _ = adaptive.encode(video, budget=lengths)
    assert np.array_equal(encode(video.astype(np.float32) / 255, lengths), codes)
    np.testing.assert_allclose(decode(codes, lengths), adaptive.decode(codes, lengths), atol=1e-5)
    manifest = json.loads((tmp_path / "hlo" / "manifest.json").read_text())
    assert (manifest["blocks"], manifest["ladder"]) == (2, [2, 4, 8])
    assert cli.main([*export, "huggingface", "--output", str(tmp_path / "hf")]) == 2
    assert "the released layout does not support model.blocks=2, model.ladder=" in capsys.readouterr().err
