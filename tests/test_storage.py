"""Files and locks in a bucket: whole or absent, never shared, through faults of the network."""

import importlib.util
import json
import subprocess
import sys
import textwrap
import threading
import time

import gcs
import numpy as np
import pytest

from larp_jax import files, npz, storage
from larp_jax.errors import InputError
from larp_jax.training.writers import MetricWriter, read_metrics


def test_files_appear_when_they_are_complete(bucket, bucket_server):
    path = bucket / "a" / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.writing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1} and files.size(path) == len('{\n "a": 1\n}\n')
    assert files.listing(bucket).keys() == {"a/x.json"}
    assert (bucket_server.root / bucket.name / "a" / "x.json").exists()


def test_arrays_are_read_back(bucket):
    with files.writing(bucket / "x.npz") as file:
        np.savez(file, x=np.arange(3, dtype=np.int32))
    found = npz.read(bucket / "x.npz", {"x": npz.Array(np.int32, (None,))}, fix="write it again")
    assert found["x"].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"y\.npz is missing; write it again"):
        npz.read(bucket / "y.npz", {}, fix="write it again")


def test_outputs_of_others_are_not_replaced(bucket):
    foreign = bucket / "notes.txt"
    files.write_bytes(foreign, b"mine")
    with pytest.raises(InputError, match="not written by this command"):
        files.check_output(foreign)
    assert files.check_output(foreign, ours=lambda path: path.read_text() == "mine") == foreign
    with pytest.raises(InputError, match="is a folder"):
        files.check_output(bucket)
    with pytest.raises(InputError, match="it is a file"):
        files.check_folder(foreign)
    with pytest.raises(InputError, match="already exists and is not empty"):
        files.check_new_folder(bucket)
    with pytest.raises(InputError, match="there is no bucket nowhere; create it"):
        files.check_folder("gs://nowhere/x")
    assert files.listing(bucket).keys() == {"notes.txt"}


def test_a_folder_whose_upload_was_killed_is_written_again(bucket, monkeypatch):
    def write():
        with files.new_folder(bucket / "new") as folder:
            for name in "abc":
                (folder / name).write_text(name)

    uploaded = []

    def killed(source, target):
        if len(uploaded) == 2:
            raise KeyboardInterrupt
        uploaded.append(upload(source, target))

    upload = storage.upload
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "upload", killed)
        write()
    assert files.listing(bucket / "new").keys() == {"a", "b", files.UNFINISHED}
    write()
    assert files.listing(bucket / "new").keys() == {"a", "b", "c"}
    with pytest.raises(InputError, match="already exists and is not empty"):
        write()


# --------------------------------------------------------------------------------------------------------------- locks

HOLD = """
    import sys
    from larp_jax import files
    with files.claim(sys.argv[1]):
        print("mine", flush=True)
        sys.stdin.read()
"""


def hold(folder):
    """A process that has locked a folder."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(storage, "HEARTBEAT", 0.2)
    monkeypatch.setattr(storage, "EXPIRES", 3.0)


def test_a_folder_is_locked_by_one_process(bucket, quick):
    with files.claim(bucket) as folder:
        assert files.is_empty(folder)
        with pytest.raises(InputError, match=rf"another process is writing --output {bucket} \(process \d+ on "):
            with files.claim(bucket):
                pass
    assert not files.listing(bucket)


def test_the_lock_of_a_killed_process_is_taken_at_once_on_its_machine(bucket):
    process = hold(bucket)
    process.kill()
    process.wait()
    assert files.listing(bucket).keys() == {storage.LOCK}
    began = time.monotonic()
    with files.claim(bucket):
        assert time.monotonic() - began < 5
    assert not files.listing(bucket)


def test_the_lock_of_another_machine_expires(bucket, quick, monkeypatch):
    process = hold(bucket)
    process.kill()
    process.wait()
    monkeypatch.setattr(storage, "_system", lambda: "another")
    began = time.monotonic()
    with files.claim(bucket):
        assert 1 < time.monotonic() - began < 10


def test_a_process_that_lost_its_lock_stops_writing(bucket, quick):
    with files.claim(bucket) as folder:
        files.write_bytes(folder / "x", b"1")
        storage._client().pipe_file(str(bucket / storage.LOCK), b'{"pid": 1, "host": "elsewhere"}')
        deadline = time.monotonic() + 5
        with pytest.raises(storage.LockLost, match="another process took over gs://"):
            while time.monotonic() < deadline:
                files.write_bytes(folder / "x", b"2")
                time.sleep(0.05)
    assert json.loads(files.any_path(bucket / storage.LOCK).read_bytes())["host"] == "elsewhere"
    files.write_bytes(bucket / "y", b"3")  # without the lock, nothing is lost


def test_a_lost_answer_does_not_lose_the_lock(bucket, bucket_server, quick):
    with files.claim(bucket):
        bucket_server.faults.lost = 1.0
        time.sleep(0.5)
        bucket_server.faults.lost = 0.0
        time.sleep(2.5)
        storage.check_locks()
        assert bucket_server.faults.count


# -------------------------------------------------------------------------------------------------------------- faults


def test_requests_that_fail_are_repeated(bucket, bucket_server, short_pauses):
    bucket_server.faults.share = 0.3
    for number in range(5):
        files.write_bytes(bucket / str(number), b"x" * number)
    assert bucket_server.faults.count
    assert [len((bucket / str(number)).read_bytes()) for number in range(5)] == list(range(5))


def test_metrics_reach_the_bucket_before_they_are_needed(bucket, bucket_server, caplog, monkeypatch):
    with MetricWriter(bucket) as writer:
        for step in range(1, 5):
            writer.write_scalars(step, {"loss": step / 2})
        writer.flush()
        assert [row["step"] for row in read_metrics(bucket)] == [1, 2, 3, 4]
        writer.write_scalars(4, {"psnr": 20.0})
        writer.write_image(4, "reconstruction", np.zeros((8, 8, 3), np.uint8))
    assert read_metrics(bucket)[-1]["psnr"] == 20.0 and read_metrics(bucket)[-1]["loss"] == 2.0
    assert (bucket / "media" / "00000004_reconstruction.png").exists()
    events = [path for path in (bucket / "tensorboard").glob("*") if b"psnr" in path.read_bytes()]
    assert len(events) == (importlib.util.find_spec("tensorboardX") is not None)

    with MetricWriter(bucket, restored_step=2) as writer:
        assert [row["step"] for row in read_metrics(bucket)] == [1, 2]

        def fails(path, data):
            raise OSError("Forbidden")

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", fails)
            writer.write_image(3, "reconstruction", np.zeros((8, 8, 3), np.uint8))
            writer.write_image(4, "reconstruction", np.zeros((8, 8, 3), np.uint8))
            writer._background.shutdown()
        assert [record.getMessage() for record in caplog.records] == [
            f"cannot write {bucket}/media/00000003_reconstruction.png (Forbidden); training continues"
        ]


def test_faults_are_faults():
    """The tests above can fail: the proxy does what it says."""
    if not gcs.AVAILABLE:
        pytest.skip("no server")
    faults = gcs.Faults(1)
    faults.share = 1.0
    faults.start()
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(faults.url)
    faults.down_until = time.monotonic() + 10
    with pytest.raises(OSError):
        urllib.request.urlopen(faults.url)
    assert faults.count == 2 and threading.active_count()
    faults.stop()
