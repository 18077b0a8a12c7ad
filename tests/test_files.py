"""Files are whole or not there, nothing foreign is replaced, and killed processes leave nothing behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from larp_jax import files
from larp_jax.errors import InputError, reason


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/x", "hdfs:///x", "file:///x", "gs:/bucket/run"])
def test_urls_are_no_paths(path):
    with pytest.raises(InputError, match="is not supported"):
        files.local_path(path, "--workdir")


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
def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path, block):
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
    with pytest.raises(InputError, match="exists already"), files.new_folder(tmp_path / "full"):
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
    ],
)
def test_reasons(error, said):
    assert reason(error) == said
