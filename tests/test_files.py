"""Files are complete or missing, files of others are not replaced, and leftovers of killed processes are removed."""

import argparse
import errno
import json
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import textwrap

import av
import pytest

import larp_jax
from larp_jax import cli, files, storage
from larp_jax.cli import app, evaluation, tools
from larp_jax.cli.arguments import check_paths
from larp_jax.data import parse_spec, tfds
from larp_jax.errors import InputError, reason
from larp_jax.evaluation import fvd
from larp_jax.weights import networks
from larp_jax.weights.importing import import_huggingface


@pytest.mark.parametrize("path", ["s3://bucket/x", "hdfs:///x", "file:///x", "https://x.org/y", "az:/container/x"])
def test_urls_are_not_paths(path):
    for locate in (files.any_path, files.local_path):
        with pytest.raises(InputError, match="--workdir .* is not supported"):
            locate(path, "--workdir")


@pytest.mark.parametrize("path", ["gs://bucket/run", "gs:/bucket/run", "GS://bucket/run"])
def test_what_is_read_from_a_disk_is_not_in_a_bucket(path):
    with pytest.raises(InputError, match="--input .*: this is read from a disk, not from gs://; mount the bucket"):
        files.local_path(path, "--input")


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_path("~/x") == tmp_path / "x"
    assert files.local_path("runs/a:b") == files.pathlib.Path("runs/a:b")
    with pytest.raises(InputError):
        files.local_path("~no such user/x")


def test_a_failed_block_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.writing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_longest_name(tmp_path):
    path = tmp_path / ("x" * 255)
    files.write_bytes(path, b"1")
    assert path.read_bytes() == b"1"


def test_links_are_followed(tmp_path):
    target = tmp_path / "real"
    target.write_bytes(b"0")
    (tmp_path / "link").symlink_to(target)
    files.write_bytes(tmp_path / "link", b"1")
    assert target.read_bytes() == b"1"
    assert (tmp_path / "link").is_symlink()


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(InputError, match="not a regular file"):
            files.write_bytes(path, b"1")
        with pytest.raises(InputError, match="not a regular file"):
            files.check_output(path)
    assert not os.path.isfile("/dev/null")


def test_check_output(tmp_path):
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(InputError, match="not written by this command"):
        files.check_output(foreign)
    assert files.check_output(foreign, ours=lambda path: path.read_text() == "mine") == foreign
    with pytest.raises(InputError, match="is a folder"):
        files.check_output(tmp_path)
    with pytest.raises(InputError, match="cannot be"):
        files.check_output(foreign / "x.json")


KILLED = """
    import os, sys, pathlib
    from larp_jax import files
    with files.{block}(sys.argv[1]) as x:
        print("inside", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("block", ["replacing", "new_folder"])
def test_leftovers_of_killed_processes_are_removed_but_not_those_of_running_ones(tmp_path, block):
    target = tmp_path / "out"
    code = textwrap.dedent(KILLED).format(block=block)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    (left,) = os.listdir(tmp_path)
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [left]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with getattr(files, block)(target) as temporary:
        assert os.listdir(tmp_path) == [temporary.name] != [left]
    assert os.listdir(tmp_path) == ["out"]


def test_new_folder_refuses_what_exists(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="already exists"), files.new_folder(tmp_path / "full"):
        pass


def test_a_folder_is_claimed_once(tmp_path):
    code = "import sys; from larp_jax import files\nwith files.claim(sys.argv[1]): pass"
    with files.claim(tmp_path / "run") as folder:
        assert files.is_empty(folder)
        second = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert "another process is writing" in second.stderr
    assert not list(folder.iterdir())
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device"),
        (RuntimeError("rpc failed: No space left on device; [a] [b]\nmore"), "No space left on device"),
        (ValueError("one\ntwo"), "one"),
        (KeyError(), "KeyError"),
        (av.error.InvalidDataError(1, "Invalid data found", "x.mp4"), "Invalid data found"),
    ],
)
def test_reasons(error, said):
    assert reason(error) == said


URLS = "s3://bucket/x", "file:///x", "folder:az://bucket/x", "0.5*folder:/a+0.5*tfds:hf://bucket/x:train"
REMOTE = {"workdir", "checkpoint", "tokenizer", "router", "output", "samples", "source"}  # may be in a bucket
COMMANDS = (
    "train evaluate analyze reconstruct tokenize detokenize allocate features sample predict stream export import"
    " prepare plan benchmark report"
).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_takes_urls(command, capsys):
    with pytest.raises(SystemExit):
        app.parse([command, "--help"])
    options = re.findall(r"^  --([a-z0-9-]+) (?:FILE|DIR|PATH|SPEC|P|G|I|S)\b", capsys.readouterr().out, re.MULTILINE)
    options = set(options) - {"top-p", "cfg-interval", "cfg-scale", "frames-scale", "process-id", "seconds", "size"}
    assert options
    for option in options:
        for url in URLS:
            values = [url] if option == "input" and command == "prepare" else url
            arguments = argparse.Namespace(command=command, **{option.replace("-", "_"): values})
            with pytest.raises(InputError, match=f"--{option} .* is not supported"):
                check_paths(arguments)
        if option in REMOTE or (command, option) == ("detokenize", "input"):
            continue
        for url in ("gs://bucket/x", "folder:gs://bucket/x"):
            values = [url] if option == "input" and command == "prepare" else url
            arguments = argparse.Namespace(command=command, **{option.replace("-", "_"): values})
            with pytest.raises(InputError, match=f"--{option} .*: this is read from a disk, not from gs://"):
                check_paths(arguments)


def test_settings_and_variables_take_no_urls_either(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "--workdir=s3://bucket/run"]) == 2
    message = capsys.readouterr().err
    assert "--workdir s3://bucket/run: s3:// is not supported" in message and "on this machine" in message
    for setting in ("tokenizer=s3://bucket/x", "data.train=folder:s3://bucket/x"):
        assert cli.main(["train", "--config=x.py", "--workdir=run", f"--config.{setting}"]) == 2
        assert f"--config.{setting}: s3:// is not supported" in capsys.readouterr().err
    assert cli.main(["train", "--config=x.py", "--workdir=run", "--config.data.train=folder:gs://bucket/x"]) == 2
    assert "not from gs://; mount the bucket (gcsfuse" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_gcsfs_a_bucket_is_refused_before_anything_else(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    for command in ("train --config=x.py --workdir=gs://b/x", "report --workdir=gs://b/x"):
        assert cli.main(command.split()) == 2
        assert "--workdir gs://b/x: gs:// needs gcsfs: pip install 'larp_jax[gcs]'" in capsys.readouterr().err
    with pytest.raises(InputError, match="init_from gs://b/x: gs:// needs gcsfs"):
        files.any_path("gs://b/x", "init_from")
    assert not list(tmp_path.iterdir())


def test_variables_are_paths_of_this_machine(monkeypatch):

    for variable, use in (
        ("LARP_LPIPS", lambda: networks.locate("lpips")),
        ("LARP_I3D", lambda: networks.locate("i3d")),
        ("XDG_CACHE_HOME", fvd.cache_folder),
        ("TFDS_DATA_DIR", tfds.tfds_root),
    ):
        monkeypatch.setenv(variable, "gs://bucket/x")
        with pytest.raises(InputError, match=f"{variable} .*not from gs://"):
            use()
        monkeypatch.setenv(variable, "~/x")
        assert "~" not in str(use())


@pytest.mark.parametrize("text", ["folder:gs://b/x", "tfds:gs://b/x:train", "gs://b/x", "0.5*folder:/a+tfds:gs://b"])
def test_videos_are_on_this_machine(text):
    with pytest.raises(InputError, match="this is read from a disk, not from gs://; mount the bucket"):
        parse_spec(text)
    assert parse_spec("tokens:gs://b/x").name == "gs://b/x"


def test_python_takes_no_urls_and_expands_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for load in (larp_jax.load_tokenizer, larp_jax.load_generator, import_huggingface):
        with pytest.raises(InputError, match="s3:// is not supported"):
            load("s3://bucket/run")
        with pytest.raises(InputError, match=re.escape(str(tmp_path / "run"))):
            load("~/run")
    assert parse_spec("folder:/a").name == "/a" and parse_spec("tokens:~/a").name == str(tmp_path / "a")


@pytest.fixture
def workdir(tmp_path):
    """A workdir with files of a run and other files."""
    folder = tmp_path / "run"
    folder.mkdir()
    contents = {"config.json": "{}", "metrics.jsonl": "{}\n", "mean_clip.npz": "PK", "video.mp4": "mp4", "a.txt": "a"}
    for name, text in contents.items():
        (folder / name).write_text(text)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "mean_clip.npz", "video.mp4", "a.txt", "pipe", ""])
@pytest.mark.parametrize(
    "command",
    [
        "evaluate --checkpoint=x --data=moving_shapes",
        "plan --config=configs/quickstart.py --devices=1",
        "benchmark data --config=configs/quickstart.py",
        "report --workdir={run}",
        "import --kind=i3d --source=x",
        "import --source=x",
    ],
)
def test_no_output_replaces_another_file(workdir, name, command, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    output = workdir / name
    assert cli.main([*command.format(run=workdir).split(), f"--output={output}"]) == 2
    assert str(output) in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    assert stat.S_ISFIFO((workdir / "pipe").stat().st_mode)


def test_outputs_of_another_kind_are_not_replaced(tmp_path):
    files.write_json(tmp_path / "evaluation.json", {"metrics": {}, "protocol": {}})
    files.write_json(tmp_path / "plan.json", {"format": "larp_jax.plan"})
    for name, command in (("plan.json", "plan"), ("evaluation.json", "evaluate")):
        for other in ("plan.json", "evaluation.json"):
            arguments = argparse.Namespace(command=command, output=tmp_path / other)
            check = tools._check_numbers if command == "plan" else lambda found: files.check_output(
                found.output, ours=evaluation._is_evaluation
            )  # fmt: skip
            if other == name:
                check(arguments)
            else:
                with pytest.raises(InputError, match="not written by this command"):
                    check(arguments)


def test_checks_create_nothing(tmp_path):
    files.check_output(tmp_path / "a" / "b" / "x.json")
    files.check_folder(tmp_path / "a" / "b")
    files.check_new_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for check in (files.check_folder, files.check_new_folder):
        with pytest.raises(InputError, match=r"cannot be created \(Not a directory\)"):
            check(tmp_path / "file" / "x")
        with pytest.raises(InputError, match=r"cannot be created \(File name too long\)"):
            check(tmp_path / ("x" * 256))


STOPPED = """
    import os, sys, signal
    from larp_jax import files
    with files.outputs(sys.argv[1], ["a/x.mp4", "y.mp4"]) as folder:
        files.make_folder(folder / "a")
        files.write_bytes(folder / "a" / "x.mp4", b"1")
        with files.writing(folder / "y.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_outputs_of_a_killed_call_are_written_again_and_others_stay(tmp_path):
    subprocess.run([sys.executable, "-c", textwrap.dedent(STOPPED), str(tmp_path)], check=False)
    assert (tmp_path / "a" / "x.mp4").exists() and len(list(tmp_path.iterdir())) == 4
    names = ["a/x.mp4", "y.mp4"]
    with pytest.raises(InputError, match=r"x\.mp4 exists; name another --output"):
        with files.outputs(tmp_path, names, inputs=[tmp_path / "a" / "x.mp4"]):
            pass
    with files.outputs(tmp_path, names) as folder:
        for name in names:
            files.write_bytes(folder / name, b"2")
    assert sorted(os.listdir(tmp_path)) == ["a", "y.mp4"]
    with pytest.raises(InputError, match=r"x\.mp4 exists and why; name another --output"):
        with files.outputs(tmp_path, names, but=" and why"):
            pass
    with files.outputs(tmp_path, names, ours=names):
        pass


def test_leftovers_of_earlier_versions(tmp_path):
    names = [".settings.json.42", ".codes-00001.42", ".codes-00001-of-00002.npz.42", ".x.mp4.42.tmp"]
    others = [".notes.json.42", ".x.tmp", "codes-00001-of-00002.npz"]
    for name in names + others:
        (tmp_path / name).touch()
    with files.claim(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_two_new_folders_of_one_name(tmp_path):
    with pytest.raises(InputError, match="already exists"):
        with files.new_folder(tmp_path / "x") as first:
            (first / "a").touch()
            with files.new_folder(tmp_path / "x") as second:
                (second / "b").touch()
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["b"]
