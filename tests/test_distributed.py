"""Runs of two real processes: same results as one process, common end if one dies, resuming."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import chaos
import numpy as np
import pytest
from test_generate import all_codes, write_generator

from larp_jax import cli, load_tokenizer
from larp_jax.data import moving_shapes
from larp_jax.errors import InputError
from larp_jax.runtime import distributed

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny.py:plain")

# Command lines with four devices, one after the other, that can kill themselves, as `kill -9` does, before they write a
# given step. Only Python prints to standard output: Gloo (C++), which prints there too, gets standard error.
WORKER = """
import json, os, signal, sys
sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import jax
jax.config.update("jax_num_cpu_devices", 4)
from larp_jax import cli
from larp_jax.training import train
dies_at, commands, flags = map(json.loads, sys.argv[1:])
write = train.Run._write
def write_or_die(self, pending, progress):
    if dies_at and pending and pending[0] == dies_at:
        self.manager.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, pending, progress)
train.Run._write = write_or_die
sys.exit(next(filter(None, (cli.main(words + flags * (words is commands[0])) for words in commands)), 0))
"""


def together(*commands, dies_at=0):
    """Return codes, outputs and errors of two processes, and the seconds that the first survived the second.

    They run the commands one after the other, and join for the first. The second dies before it writes the step given.
    """
    commands = json.dumps([[str(word) for word in command] for command in commands])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    processes = []
    for i in range(2):
        flags = ["--coordinator", address, "--num-processes", "2", "--process-id", str(i)]
        command = [sys.executable, "-c", chaos.WITHOUT_TORCH + WORKER, str(i * dies_at), commands, json.dumps(flags)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    second = processes[1].communicate(timeout=600)
    ended = time.monotonic()
    first = processes[0].communicate(timeout=600)
    survived = time.monotonic() - ended
    return [(process.returncode, *output) for process, output in zip(processes, (first, second), strict=True)], survived


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """Workdir of a run in this process, which has as many devices as the two together."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(moving_shapes, "SPLITS", {"train": 32, "test": 16})
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(tmp_path / "one")]) == 0
    return tmp_path / "one"


@pytest.mark.slow
def test_two_processes_agree_with_one_end_together_and_resume(one_process, tmp_path):
    workdir = tmp_path / "two"
    command = ["train", "--config", CONFIG, "--workdir", workdir]
    evaluate = ["evaluate", "--checkpoint", str(workdir), "--data", "moving_shapes:test", "--max-clips", "12"]
    generator = write_generator(tmp_path / "g", {"tokenizer_fingerprint": load_tokenizer(one_process).fingerprint})
    pair = [f"--checkpoint={generator}", f"--tokenizer={one_process}"]
    sample = ["sample", *pair, "--num=5", "--batch-size=2", "--seed=3"]
    to = lambda by: ([*evaluate, f"--output={tmp_path / by}.json"], [*sample, f"--output={tmp_path / by}"])  # noqa: E731
    ((code, _, errors), (victim, _, _)), survived = together(command, dies_at=5)
    assert victim == -9 and code not in (0, None), errors
    assert survived < 60
    assert re.search("(another process|process 1) of this run has ended|another task died", errors), errors
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"2", "4"}
    alone = shutil.copytree(workdir, tmp_path / "alone")

    ((code, printed, errors), (other, silent, _)), _ = together(command, *to("by_two"))
    assert (code, other) == (0, 0), errors
    assert "continuing" in errors and "trained to step 6" in printed and not silent
    # the same number of devices in another number of processes
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(alone)]) == 0
    expected = rows(one_process)
    for found in (rows(workdir), rows(alone)):
        assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
        for one, other in zip(expected, found, strict=True):
            one, other = chaos.without_times(one), chaos.without_times(other)
            assert one.keys() == other.keys()
            for name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)

    assert [cli.main(command) for command in to("by_one")] == [0, 0]
    one, two = (json.loads((tmp_path / f"{by}.json").read_text()) for by in ("by_one", "by_two"))
    assert one["protocol"] == two["protocol"] and one["protocol"]["clips"] == 12
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    names = [{path.name for path in (tmp_path / by).iterdir()} for by in ("by_two", "by_one")]
    assert names[0] == names[1] and sum(name.endswith(".mp4") for name in names[0]) == 5
    np.testing.assert_array_equal(all_codes(tmp_path / "by_two"), all_codes(tmp_path / "by_one"))


@pytest.fixture
def alone(monkeypatch):
    """An environment in which no launcher can be found."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        (None, {}),
        (None, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}),  # the batch script itself
        (None, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}),
        ("Slurm", {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "a[1-2]"}),
        (None, {"OMPI_COMM_WORLD_SIZE": "1"}),
        ("Open MPI", {"OMPI_COMM_WORLD_SIZE": "2"}),
        (None, {"TPU_WORKER_HOSTNAMES": "localhost"}),
        ("TPU", {"TPU_WORKER_HOSTNAMES": "a,b"}),
        ("TPU", {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}),
        (None, {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}),
    ],
)
def test_launchers_are_known_by_their_variables(alone, launcher, variables):
    alone.setattr(distributed.importlib.util, "find_spec", lambda name: name)  # libtpu is installed
    for name, value in variables.items():
        alone.setenv(name, value)
    assert distributed.detect() == launcher


def test_a_tpu_vm_asks_for_its_pod(alone):
    alone.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    alone.setattr(distributed.glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    assert distributed.detect() == "TPU"
    alone.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert distributed.detect() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--num-processes, --process-id must be given too"),
        ({"processes": 2, "process": 0}, "--coordinator must be given too"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "must be below --num-processes 2"),
    ],
)
def test_flags_that_make_no_sense(given, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(**given)


def test_one_process_initializes_nothing(alone):
    distributed.initialize()
    distributed.initialize("localhost:1", 1, 0)
    assert distributed.is_first()
    distributed.leave(1)  # returns
    assert distributed.explain(RuntimeError("Connection closed by peer")) is None


HANGS = """
import sys, time
import jax
from larp_jax.runtime import distributed, watchdog
watchdog.LIMIT, watchdog.POLL = 4.0, 0.5
index = int(sys.argv[2])
distributed.initialize(sys.argv[1], 2, index)
with watchdog.Watchdog() as found:
    for step in range(3):
        found.at(step, watchdog.READ)
        time.sleep(1.5)
    found.at(3, watchdog.READ if index == int(sys.argv[3]) else watchdog.COMPUTE)
    time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("culprit", "said"),
    [
        (1, "process 1 on {host} hangs: it waits for the clips of step 4, and the others wait for it"),
        (2, "all 2 processes hang: each computes step 4, so a device or the network between them is stuck"),
    ],
)
def test_a_process_that_hangs_is_named(culprit, said):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HANGS, address, str(index), str(culprit)],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for index in range(2)
    ]  # fmt: skip
    for process in reversed(processes):
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 1, errors
        assert said.format(host=socket.gethostname()) in errors and "no progress for " in errors
