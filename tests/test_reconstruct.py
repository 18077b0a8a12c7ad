"""Videos next to their reconstructions."""

import json
import os

import jax
import numpy as np
import pytest
from data_helpers import moving_frames

from larp_jax import cli, files
from larp_jax.data import ClipSpec
from larp_jax.data.inputs import Inputs, output_names
from larp_jax.data.video import probe, read_windows, write_video
from larp_jax.errors import InputError
from larp_jax.inference.reconstruct import _assembled, _resized, _tiles, reconstruct
from larp_jax.inference.tokenize import detokenize, tokenize


@pytest.fixture
def folder(tmp_path):
    """Two videos of the same name in two folders, of 20 and 5 frames, and a file that is not a video."""
    folder = tmp_path / "videos"
    for name, count in (("a/x.mp4", 20), ("b/x.mp4", 5)):
        path = folder / name
        path.parent.mkdir(parents=True)
        write_video(path, moving_frames(count), 12.0)
    (folder / "b" / "broken.mp4").write_bytes(b"no video")
    return folder


def test_a_folder(trained, tokenizer, folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["reconstruct", "--checkpoint", str(trained), "--input", str(folder), "--output", str(output)]
    arguments.append("--fit=crop")
    assert cli.main(arguments) == 0
    printed, errors = capsys.readouterr()
    assert "a/x.mp4: " in printed and "mean of 2 videos" in printed
    assert errors.count("broken.mp4") == 1 and "skipped 1 of 3 videos" in errors

    summary = json.loads((output / "psnr.json").read_text())
    assert summary["tokenizer"] == tokenizer.fingerprint
    assert [video["frames"] for video in summary["videos"].values()] == [20, 5]
    assert list(summary["skipped"]) == ["b/broken.mp4"]
    squares = []
    for _, frames, valid in read_windows(folder / "a" / "x.mp4", ClipSpec(8, 32)):
        error = np.asarray(tokenizer.reconstruct(frames[None]))[0, :valid] - frames[:valid] / 255.0
        squares.append(np.square(error).reshape(valid, -1).mean(axis=1))
    expected = -10 * np.log10(np.concatenate(squares).mean())
    assert summary["videos"]["a/x.mp4"]["psnr"] == pytest.approx(expected, abs=1e-3)
    scores = [video["psnr"] for video in summary["videos"].values()]
    assert summary["mean_psnr"] == pytest.approx(np.mean(scores))

    written = probe(output / "a" / "x.mp4")
    assert (written.frames, written.fps, written.width, written.height) == (20, 12.0, 64, 32)
    assert (output / "b" / "x.png").stat().st_size > 100
    assert cli.main(arguments) == 0  # replaces its own results


@pytest.mark.parametrize("fit", ["resize", "tile"])
def test_the_shape_of_a_file_is_kept(tokenizer, tmp_path, fit):
    """Every pixel of an odd shape is compared; a side below the model's 32 is no special case."""
    for height, width in ((48, 70), (20, 90)):
        source, output = tmp_path / f"{width}.mp4", tmp_path / f"{width}"
        write_video(source, moving_frames(9, height=height, width=width), 12.0)
        summary = reconstruct(tokenizer, str(source), output, fit=fit)
        written = probe(output / source.name)
        assert (written.frames, written.fps, written.width, written.height) == (9, 12.0, 2 * width, height)
        assert summary["fit"] == fit and "at the video's size" in summary["definition"]
        ((_, frames, _), (_, last, valid)) = read_windows(source, ClipSpec(8, 32), whole=True)
        assert frames.shape == last.shape == (8, height, width, 3) and valid == 1


@pytest.mark.parametrize("fit, error", [("resize", 0.05), ("tile", 1e-6)])
def test_a_perfect_model_reconstructs_any_shape(tmp_path, fit, error):
    """Tiles are put back in their places; resizing loses only detail."""
    y, x = np.mgrid[:48, :70]
    smooth = np.stack([y / 48, x / 70, (x + y) / 118], axis=-1)
    frames = np.uint8(np.repeat(255 * smooth[None], 8, axis=0))
    for shape, size in ((frames, (32, 32)), (frames[:, :20], (32, 32)), (frames, (40, 24)), (frames, (48, 70))):
        parts = _tiles(shape, size, fit)
        assert parts.shape[1:] == (8, *size, 3)
        again = _assembled(parts, shape.shape, fit)
        assert np.abs(again - shape / 255.0).max() < error


@pytest.mark.parametrize("old, new", [((40, 70), (32, 32)), ((32, 32), (20, 90))])
def test_resizing_is_that_of_jax(old, new):
    video = np.random.default_rng(0).random((2, *old, 3), np.float32)
    expected = jax.image.resize(video, (2, *new, 3), "bilinear", antialias=True)
    np.testing.assert_allclose(_resized(video, new), expected, atol=2e-6)


def test_a_data_set(tokenizer, tmp_path):
    summary = reconstruct(tokenizer, "moving_shapes:test", tmp_path, max_clips=3)
    assert len(summary["videos"]) == 3
    assert (tmp_path / "test_000000.mp4").exists()
    assert summary["mean_psnr"] < 30


def test_nothing_of_the_users_is_overwritten(tokenizer, folder, tmp_path):
    before = (folder / "a" / "x.mp4").read_bytes()
    with pytest.raises(InputError, match=r"x\.mp4 exists and is not an earlier reconstruction"):
        reconstruct(tokenizer, str(folder), folder)
    (folder / "psnr.json").write_text("{}")
    with pytest.raises(InputError, match=r"x\.mp4 exists and is not an earlier reconstruction"):
        reconstruct(tokenizer, str(folder), folder)
    assert (folder / "a" / "x.mp4").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be created"):
        reconstruct(tokenizer, str(folder), tmp_path / "file")


def test_outputs_of_a_killed_call_are_written_again(tokenizer, folder, tmp_path, monkeypatch):
    output, write = tmp_path / "out", files.write_json

    def killed(path, values):
        if path.name == "psnr.json":
            raise KeyboardInterrupt
        write(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            reconstruct(tokenizer, str(folder), output)
    assert (output / "a" / "x.mp4").exists() and not (output / "psnr.json").exists()
    with files.claim(output):
        with pytest.raises(InputError, match="another process is writing"):
            reconstruct(tokenizer, str(folder), output)
    (output / "b" / "x.mp4").write_bytes(b"")
    reconstruct(tokenizer, str(folder), output)
    assert probe(output / "b" / "x.mp4").frames == 5
    assert sorted(path.name for path in output.iterdir()) == ["a", "b", "psnr.json"]
    # its own results, but not an image of the user
    reconstruct(tokenizer, str(folder / "a"), output)
    (output / "x.png").unlink()
    reconstruct(tokenizer, str(folder), output)
    files.write_json(output / "psnr.json", {"files": []})
    (output / "b" / "x.mp4").unlink()
    with pytest.raises(InputError, match=r"b/x\.png exists and is not an earlier"):
        reconstruct(tokenizer, str(folder / "b"), output / "b")


def test_the_longest_names(tokenizer, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    names = ["x" * 251 + ".mp4", "x" * 250 + ".webm", "é" * 125 + ".mp4"]
    write_video(folder / "short.mp4", moving_frames(9), 12.0)
    for name in names:
        os.link(folder / "short.mp4", folder / name)
    for output, command in (("out", reconstruct), ("codes", tokenize)):
        command(tokenizer, str(folder), tmp_path / output)
    videos = detokenize(tokenizer, tmp_path / "codes", tmp_path / "again")
    assert len(videos) == len(set(videos)) == 4 and all(probe(path).frames == 9 for path in videos)
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4
    assert (tmp_path / "out" / "short.mp4").exists()


def test_what_cannot_be_read(tokenizer, folder, tmp_path):
    for source, message in [
        (folder / "b" / "broken.mp4", "cannot be read as video"),
        (tmp_path / "missing.mp4", "does not exist; give a video file"),
        ("folder:" + str(tmp_path / "missing"), "does not exist"),
        ("moving_shape:test", "does not exist"),
        (tmp_path / "empty", "contains no video file"),
        (tmp_path / "bad", "none of its 1 videos can be read"),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "x.mp4").touch()
        with pytest.raises(InputError, match=message):
            reconstruct(tokenizer, str(source), tmp_path / "out")


def test_a_video_that_breaks_between_opening_and_reading_is_skipped(folder):
    inputs = Inputs(str(folder), ClipSpec(8, 32))
    (folder / "a" / "x.mp4").write_bytes(b"gone")
    windows = [window for batch, _ in inputs.batches(4) for window in batch]
    assert [(window.video, window.start, window.valid) for window in windows] == [(1, 0, 5)]
    assert [name for name, _ in inputs.skipped] == ["b/broken.mp4", "a/x.mp4"]


def test_batches_are_filled_up(folder):
    inputs = Inputs(f"folder:{folder}", ClipSpec(8, 32))
    batches = list(inputs.batches(3))
    assert [len(windows) for windows, _ in batches] == [3, 1]
    assert all(clips.shape == (3, 8, 32, 32, 3) for _, clips in batches)
    assert [window.label for windows, _ in batches for window in windows] == [0, 0, 0, 1]
    assert inputs.label_names == ("a", "b")
    assert inputs.windows == 4


def test_output_names():
    assert output_names(["a/x.mp4", "b/x.mp4", "test_3"]) == ["a/x", "b/x", "test_3"]
    assert output_names(["x.mp4", "X.avi"]) == ["x.mp4", "X.avi"]
    assert output_names(["x.v2", "x.mp4"]) == ["x.v2", "x"]


@pytest.mark.slow
def test_odd_files_one_by_one(tokenizer, videos_dir, tmp_path, monkeypatch):
    """Short files and those that cannot be read; `test_a_folder_of_odd_files` reads all to their ends."""
    monkeypatch.chdir(videos_dir / "odd")
    done = 0
    for i, path in enumerate(sorted((videos_dir / "odd").iterdir())):
        try:
            found = probe(path)
            if found.frames > 40:
                continue
            large = found.frames * found.height * found.width > 2e6  # takes seconds to write at its own size
            fit = "crop" if large else "resize"
            summary = reconstruct(tokenizer, path.name, tmp_path / str(i), fit=fit, batch_size=8)
        except InputError as error:
            assert str(error).count("\n") == 0 and path.name in str(error)
        else:
            done += 1
            assert np.isfinite(summary["mean_psnr"])
    assert done >= 20


@pytest.mark.slow
def test_a_folder_of_odd_files(trained, videos_dir, tmp_path, capsys):
    for command in ("reconstruct", "tokenize"):
        arguments = [command, "--checkpoint", str(trained), f"--input={videos_dir / 'odd'}"]
        arguments += ["--fit", "crop"] if command == "reconstruct" else []  # large pictures take minutes to write
        assert cli.main([*arguments, "--output", str(tmp_path / command)]) == 0
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert errors.count("made_text.mp4") == 1
    assert len(json.loads((tmp_path / "reconstruct" / "psnr.json").read_text())["videos"]) >= 30
    name = str(tmp_path / "dash")
    dash = videos_dir / "odd" / "-leading-dash.mp4"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dash.parent)
        assert (
            cli.main(["reconstruct", "--checkpoint", str(trained), "--input=-leading-dash.mp4", "--output", name]) == 0
        )
