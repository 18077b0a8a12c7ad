"""Missing files, false sizes and files that change while they are read: one-line errors, before memory is allocated."""

import errno
import json
import os
import pathlib
import shutil
import sys
import time
import tracemalloc
import zipfile

import av
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data_helpers import moving_frames

import larp_jax
from larp_jax import cli, npz
from larp_jax.cli import app
from larp_jax.config import MeshConfig, default_recipe, parse_recipe
from larp_jax.data import codes as codes_on_disk, open_source, prepare, video
from larp_jax.errors import InputError, printable
from larp_jax.evaluation.frechet import FeatureStatistics
from larp_jax.files import DEEPEST, parse_json, read_json
from larp_jax.runtime.sharding import make_mesh
from larp_jax.training import writers
from larp_jax.training.generator import GeneratorTask
from larp_jax.training.tokenizer import TokenizerStage, TokenizerTask
from larp_jax.weights import checkpoint, checksums, released
from larp_jax.weights.i3d import import_i3d
from larp_jax.weights.lpips import import_lpips
from larp_jax.weights.tensors import float_arrays

MUCH = 2**27  # bytes that files in these tests claim to contain
LITTLE = 2**24  # bytes of memory that reading them may use


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard", "media"))


def write_zeros(path, **arrays):
    """Writes an npz file of zeros with these shapes and dtypes, compressed to about a thousandth of their size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (shape, dtype) in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                left = int(np.prod(shape)) * np.dtype(dtype).itemsize
                while left > 0:
                    left -= member.write(bytes(min(left, 2**20)))
    assert path.stat().st_size < LITTLE


def refused(match, function, *arguments, **options):
    """Asserts that a call is refused in one line that matches, and uses little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match) as caught:
            function(*arguments, **options)
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def change_metadata(directory, change):
    """Changes the metadata of a checkpoint and its checksums, as if it had been written like that."""
    path = directory / "metadata" / "metadata"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    sums = directory / checkpoint.CHECKSUMS
    if sums.exists():
        known = json.loads(sums.read_text())
        known["metadata/metadata"] = checksums.digests(directory, ["metadata"])["metadata/metadata"]
        sums.write_text(json.dumps(known))


# -------------------------------------------------------------------------------------------------------------- missing


def test_missing_items(workdir):
    newest = workdir / "checkpoints" / "6"
    assert checkpoint.read_metadata(workdir)["items"] == ["ema", "metadata", "optimizer", "params"]
    shutil.rmtree(newest / "ema")
    for weights in ("ema", "raw"):
        if weights == "ema":
            with pytest.raises(InputError, match=r"6 is damaged \(ema/.* is missing\); use another step"):
                larp_jax.load_tokenizer(workdir, weights=weights)
        else:
            assert checkpoint.load(workdir, weights=weights).step == 6
    sums = json.loads((newest / checkpoint.CHECKSUMS).read_text())
    kept = {name: digest for name, digest in sums.items() if not name.startswith("ema/")}
    (newest / checkpoint.CHECKSUMS).write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"6 is damaged \(checksums.json lists no files of ema\)"):
        checkpoint.load(workdir)


@pytest.mark.parametrize("part", ["metadata", "params"])
def test_a_damaged_newest_checkpoint_is_not_skipped(workdir, part):
    shutil.rmtree(workdir / "checkpoints" / "6" / part)
    with pytest.raises(InputError, match="checkpoints/6 is damaged .*is missing"):
        checkpoint.load(workdir, weights="raw")
    with pytest.raises(InputError, match="checkpoints/6 is damaged"):
        checkpoint.load(workdir / "checkpoints" / "6", weights="raw")
    assert checkpoint.load(workdir / "checkpoints" / "4").step == 4


def test_missing_checksums(workdir, caplog):
    newest = workdir / "checkpoints" / "6"
    (newest / checkpoint.CHECKSUMS).unlink()
    flip_a_bit(largest_file(newest / "ema"))
    with pytest.raises(InputError, match=r"6 is damaged \(checksums.json is missing\)"):
        checkpoint.load(workdir)
    with pytest.raises(InputError, match="checksums.json is missing"):
        checkpoint.read_metadata(workdir)
    assert checkpoint.find_damage(newest) == "checksums.json is missing"
    (newest / checkpoint.CHECKSUMS).write_text("{}")
    assert "checksums.json lists no files of" in checkpoint.find_damage(newest)


def test_earlier_versions(workdir, caplog):
    """Checkpoints without a list of items load, with a warning if they have no checksums either."""
    directory = workdir / "checkpoints" / "4"
    change_metadata(directory, lambda values: values.pop("items"))
    assert checkpoint.load(directory).step == 4 and not caplog.records
    (directory / checkpoint.CHECKSUMS).unlink()
    assert checkpoint.load(directory).step == 4
    (record,) = caplog.records
    assert "4 was written without checksums: damage would not be noticed" in record.getMessage()
    directory = workdir / "checkpoints" / "6"
    change_metadata(directory, lambda values: values.pop("items"))
    shutil.rmtree(directory / "ema")
    with pytest.raises(InputError, match="ema/.* is missing"):
        checkpoint.load(directory)


def test_imported_checkpoints_name_their_items(workdir, tmp_path):
    found = checkpoint.load(workdir)
    checkpoint.write_imported(tmp_path / "imported", json.loads((workdir / "config.json").read_text()), found.params)
    assert checkpoint.read_metadata(tmp_path / "imported")["items"] == ["metadata", "params"]
    (tmp_path / "imported" / checkpoint.CHECKSUMS).unlink()
    with pytest.raises(InputError, match="checksums.json is missing"):
        checkpoint.load(tmp_path / "imported")


def test_the_recipe_of_a_run_without_config(workdir):
    before = checkpoint.read_config(workdir)
    (workdir / checkpoint.CONFIG).unlink()
    assert checkpoint.read_config(workdir) == before
    shutil.rmtree(workdir / "checkpoints")
    assert checkpoint.read_config(workdir) is None


# --------------------------------------------------------------------------------------------------------------- claims


def test_a_mean_clip_of_another_shape(workdir):
    path = workdir / checkpoint.MEAN_CLIP
    assert checkpoint.load(workdir).mean_clip.shape == (8, 32, 32, 3)
    write_zeros(path, mean_clip=((MUCH // 12, 1, 1, 3), np.float32))
    wrong = r"mean_clip.npz contains float32 \[11184810, 1, 1, 3\] instead of float32 \[8, 32, 32, 3\]; remove it"
    refused(wrong, checkpoint.read_mean_clip, path, (8, 32, 32, 3))
    with pytest.raises(InputError, match=wrong):
        checkpoint.load(workdir)
    recipe = parse_recipe(json.loads((workdir / "config.json").read_text()))
    task = object.__new__(TokenizerTask)
    task.recipe = recipe
    refused(wrong, task.open_evaluation, workdir)
    np.savez(path, mean_clip=np.zeros((8, 32, 32, 3)))
    refused(r"contains float64 \[8, 32, 32, 3\]", checkpoint.read_mean_clip, path, (8, 32, 32, 3))


def sizes(path, value):
    def change(values):
        *parents, name = path.split(".")
        for parent in parents:
            values = values[parent]
        assert name in values
        values[name] = value

    return lambda metadata: change(metadata["config"])


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.frames", 4 * 10**9, "make .* positions, above the limit"),
        ("model.resolution", 8 * 10**8, "make .* positions, above the limit"),
        ("model.num_tokens", 10**9, "make .* positions, above the limit"),
        ("model.num_tokens", 2**19, "encoder/queries/table has 256 values, its settings require 16777216"),
        ("model.encoder.width", 10**9, "tokenizer/encoder/.* has .* values, its settings require"),
        ("model.encoder.depth", 10**9, "tokenizer/encoder/transformer/.* its settings require"),
        ("model.channels", 10**9, "model.channels"),
        ("model.quantizer.codebook_size", 10**9, "quantizer/embedding has 128 values"),
        ("prior.width", 10**9, "prior/.* its settings require"),
    ],
)
def test_settings_that_claim_too_much(trained, tmp_path, path, value, message):
    directory = shutil.copytree(trained / "checkpoints" / "6", tmp_path / "6")
    change_metadata(directory, sizes(path, value))
    refused(message, larp_jax.load_tokenizer, directory)


def test_sizes_are_checked_for_every_bottleneck():
    for kind in ("svq", "kl"):
        config = default_recipe()
        config.loss.perceptual, config.model.quantizer.kind = "none", kind
        config.loss.prior_weight = 0.0 if kind == "kl" else 1.0
        recipe = parse_recipe(config)
        shapes = jax.eval_shape(TokenizerStage(recipe).init, jax.random.key(0)).params
        released.check_sizes(recipe, shapes)
        with pytest.raises(ValueError, match="settings require"):
            encoder = shapes["tokenizer"]["encoder"]
            larger = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), encoder)
            released.check_sizes(recipe, {"tokenizer": {"encoder": larger}})


def codes_folder(folder, rows, N, fingerprint="0" * 16):
    folder.mkdir()
    name = "codes-00000-of-00001.npz"
    listed = [{"source": f"{i}.mp4", "start": 0, "frames": 1, "fps": 8.0, "label": 0} for i in range(rows)]
    manifest = codes_on_disk.new_manifest(
        fingerprint=fingerprint, step=0, K=2, N=N, clip=(1, 8, 8, 3), sizes=[rows], label_names=["a"], rows=listed
    )
    codes_on_disk.write_manifest(folder, manifest)
    write_zeros(folder / name, codes=((rows, N), np.int32))
    return folder


def test_codes_of_another_tokenizer_are_not_read(tmp_path):
    folder = codes_folder(tmp_path / "codes", 64, MUCH // 256)
    config = default_recipe("generator")
    config.data.train = f"tokens:{folder}"
    config.tokenizer_fingerprint = "1" * 16
    mesh, other = make_mesh(MeshConfig()), "is of tokenizer 0000000000000000, not of 1111111111111111"
    refused(other, GeneratorTask, parse_recipe(config), mesh)
    config.tokenizer_fingerprint = ""
    config.model.codebook_size = 2
    refused("model.num_tokens=1024, but data", GeneratorTask, parse_recipe(config), mesh)
    manifest = codes_on_disk.read_manifest(folder)
    refused(
        r"contains int32 \[64, 524288\] instead of int32 \[64, 8\]",
        codes_on_disk.read_shard,
        folder,
        manifest | {"N": 8},
        0,
    )


def test_codes_above_the_limit_are_not_read_even_without_given_sizes(tmp_path):
    config = default_recipe("generator")
    config.data.train = f"tokens:{codes_folder(tmp_path / 'codes', 1, MUCH // 4)}"
    config.model.num_tokens = config.model.codebook_size = 0
    refused("positions, above the limit", GeneratorTask, parse_recipe(config), make_mesh(MeshConfig()))


def test_feature_statistics_that_claim_too_much(tmp_path):
    path, side = tmp_path / "i3d.npz", int((MUCH // 8) ** 0.5)
    others = {"count": ((), np.int64), "mean": ((side,), np.float64), "metadata": ((2,), np.uint8)}
    write_zeros(path, scatter=((side, side), np.float64), **others)
    wrong = r"is damaged \(mean has \d+ bytes, but 32768 according to its header\); delete it"
    refused(wrong, FeatureStatistics.load, path)


@pytest.mark.parametrize("kind", ["lpips", "i3d"])
def test_weights_that_claim_too_much(tmp_path, kind):
    path = tmp_path / "weights.npz"
    write_zeros(path, **{"features.0.weight": ((MUCH // 4,), np.float32)})
    read = {"lpips": lambda: import_lpips(path, path), "i3d": lambda: import_i3d(path)}[kind]
    refused("do not fit .*weights.npz: missing", read)


def test_a_tensor_of_one_value_repeated(tmp_path):
    torch = pytest.importorskip("torch")
    repeated = {"x": torch.zeros(1, dtype=torch.bfloat16).expand(MUCH)}
    refused("x claims more values than the file contains", float_arrays, repeated, tmp_path / "weights.pth")


def test_arrays_of_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(6.0).reshape(2, 3), n=np.int64(7))
    assert npz.headers(path, "")["x"] == (np.float64, (2, 3))
    found = npz.read(path, {"x": npz.Array("f8", (2, None)), "n": npz.Array("i8", ())}, "")
    assert np.array_equal(found["x"], [[0, 1, 2], [3, 4, 5]]) and found["n"] == 7
    for name, dtype, shape, message in (
        ("x", "f4", (2, 3), r"contains float64 \[2, 3\] instead of float32 \[2, 3\]; fix it"),
        ("x", "f8", (3, None), r"instead of float64 \[3, n\]"),
        ("x", "f8", (6,), r"instead of float64 \[6\]"),
        ("y", "f8", (6,), "is damaged .*y.npy.*; fix it"),
    ):
        with pytest.raises(InputError, match=message):
            npz.read(path, {name: npz.Array(dtype, shape)}, "fix it")
    with pytest.raises(InputError, match="is missing; fix it"):
        npz.read(tmp_path / "b.npz", {}, "fix it")
    path.write_bytes(path.read_bytes().replace(np.float64(5).tobytes(), np.float64(6).tobytes()))
    with pytest.raises(InputError, match="is damaged .Bad CRC"):
        npz.read(path, {"x": npz.Array("f8", (2, 3)), "n": npz.Array("i8", ())}, "fix it")


def test_a_video_that_claims_more_frames_than_bytes(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        for image in moving_frames(5, 32, 32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image))))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32
    content[length : length + 4] = (2 * 10**9).to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 2 * 10**9
    assert video.probe(path).frames == 5


def test_a_prepared_data_set_that_claims_more_frames_than_it_has(tmp_path):
    (tmp_path / "videos").mkdir()
    video.write_video(tmp_path / "videos" / "a.mp4", moving_frames(20, 16, 16), 8)
    folder = tmp_path / "prepared"
    settings = prepare.Settings(16, "raw")
    prepare.prepare([str(tmp_path / "videos")], folder, settings, workers=1, progress=lambda text: None)
    assert open_source(f"tfds:{folder}:train").frames(0) == 20
    index = json.loads((folder / "videos.json").read_text())
    index["frames_per_record"] = 10**9
    index["splits"]["train"]["videos"][0][3] = 2 * 10**9
    (folder / "videos.json").write_text(json.dumps(index))
    refused("its records have 16 frames, but videos.json declares 1000000000", open_source, f"tfds:{folder}:train")


def test_a_tfds_data_set_that_claims_more_frames_than_it_has(trained, tmp_path):
    (features,) = pathlib.Path(os.environ["TFDS_DATA_DIR"]).glob("moving_shapes/32/*/features.json")
    folder = shutil.copytree(features.parent, tmp_path / "data_set")
    text = (folder / "features.json").read_text()
    values = json.loads(text)
    dimensions = values["featuresDict"]["features"]["video"]["tensor"]["shape"]["dimensions"]
    frames, dimensions[0] = dimensions[0], "4000000000"
    (folder / "features.json").write_text(json.dumps(values))
    refused(f"its videos have {frames} frames, but its features declare 4000000000", open_source, f"tfds:{folder}:test")


@pytest.mark.parametrize("levels, sound", [(DEEPEST, True), (DEEPEST + 1, False), (100_000, False)])
def test_nested_json(tmp_path, levels, sound):
    text = "[" * levels + "]" * levels
    if sound:
        assert parse_json(text)[0]
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait forever for a writer
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------------ read while it changes


def replace_newest(workdir, step):
    """Does what a run with `keep=1` does: a new checkpoint appears, the one before is deleted."""
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / str(step), checkpoints / "new")
    (checkpoints / "new").rename(checkpoints / str(step + 1))
    shutil.rmtree(checkpoints / str(step))


def test_a_checkpoint_that_is_deleted_while_it_is_read(workdir, monkeypatch):
    """At each stage of reading; then the checkpoint that is newest by then is read."""
    step = 6

    def deleting(function, times):
        left = iter(range(times))

        def call(*arguments, **options):
            nonlocal step
            for _ in left:
                replace_newest(workdir, step)
                step += 1
                break
            return function(*arguments, **options)

        return call

    for holder, name in (
        (checksums, "checksums"),
        (checksums, "digests"),
        (checksums, "read_json_item"),
        (ocp.PyTreeCheckpointer, "metadata"),
        (ocp.PyTreeCheckpointer, "restore"),
    ):
        for read in (checkpoint.load, checkpoint.read_metadata):
            before = step
            with monkeypatch.context() as patch:
                patch.setattr(holder, name, deleting(getattr(holder, name), times=2))
                found = read(workdir)
            assert (found if isinstance(found, dict) else vars(found))["step"] == 6  # all are copies of step 6
            assert step == before + 2 or read is checkpoint.read_metadata, name
            if read is checkpoint.load:
                assert found.path.name == str(step)


def test_a_checkpoint_that_is_always_deleted(workdir, monkeypatch):
    monkeypatch.setattr(checkpoint, "TRIES", 3)
    step = 6

    def damage(*arguments):
        nonlocal step
        replace_newest(workdir, step)
        step += 1
        return "gone"

    monkeypatch.setattr(checkpoint, "find_damage", damage)
    with pytest.raises(InputError, match="is damaged .gone."):
        checkpoint.load(workdir)
    assert step == 9


def test_failing_to_read_shows_no_tracebacks_of_threads(workdir, monkeypatch):
    """Threads of TensorStore, which continue to read after Orbax has failed and closed its event loop."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_value))
    monkeypatch.setattr(checkpoint, "find_damage", lambda *arguments: "")
    files = (workdir / "checkpoints" / "6" / "ema" / "ocdbt.process_0" / "d").iterdir()
    max(files, key=lambda path: path.stat().st_size).unlink()  # of an array; small files may never be read
    for _ in range(5):
        with pytest.raises(InputError, match="cannot be read"):
            checkpoint.load(workdir)
    time.sleep(0.5)
    assert not shown
    sys.unraisablehook(type("Unraisable", (), {"exc_value": ValueError("other")}))
    assert [str(error) for error in shown] == ["other"]


def test_metrics_while_they_are_written(tmp_path):
    rows = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    odd = ["[" * 100_000, '{"step": 1' + "0" * 400 + "}", '{"step": true}', '{"step": "3"}', '{"step": -1}', "\xff"]
    (tmp_path / "metrics.jsonl").write_bytes(("\n".join(odd) + "\n" + lines + '{"step": 3, "tr').encode("latin-1"))
    assert writers.read_metrics(tmp_path) == rows


# ------------------------------------------------------------------------------------------------------------ terminals

NASTY = "a\x1b[2J\x1b]0;title\x07\r\x9b\u202e\udcff"


def is_harmless(text):
    return not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 or c in "\u202e\udcff" for c in text)


def test_what_is_printable():
    assert printable(NASTY) == r"a\x1b[2J\x1b]0;title\x07\r\x9b\u202e\udcff"
    assert printable("a\tb\n", keep="\n") == "a\\tb\n"
    assert printable("naïve 漢字.mp4") == "naïve 漢字.mp4"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors_with_control_characters_in_names(tmp_path, capsys, debug):
    assert cli.main(["report", "--workdir", str(tmp_path / NASTY), *debug]) == 2
    said = capsys.readouterr().err
    assert r"a\x1b[2J" in said and is_harmless(said)


def test_messages_and_results_with_such_names(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / NASTY
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')

    def report(*arguments):
        writers.logger.warning("%s: skipped", workdir)
        print(f"read {workdir}")
        return report_page(*arguments)

    from larp_jax.tools import report as module

    report_page = module.report
    monkeypatch.setattr(module, "report", report)
    assert cli.main(["report", "--workdir", str(workdir)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and err.count("\n") == 1 and is_harmless(err) and r"\x1b[2J" in err
    assert out.count(r"\x1b[2J") == 2 and out.count("\n") == 2 and is_harmless(out)
    assert (workdir / "report.html").stat().st_size


def test_reasons_come_from_one_place():
    """Also messages of the system about disks, within any text of a library."""
    wrapped = RuntimeError(f"RESOURCE: writing failed: {os.strerror(errno.ENOSPC)} [tensorstore='...']\nmore")
    assert os.strerror(errno.ENOSPC) in app._reason(wrapped) and "tensorstore" not in app._reason(wrapped)
