"""A few of the mutated inputs of tests/fuzz.py, and that it notices failures."""

import random
import subprocess
import sys

import fuzz
import pytest

from larp_jax.errors import InputError

COUNTS = {"configs": 40, "codes": 60, "features": 60, "safetensors": 60, "prepared": 40, "lists": 60, "checkpoints": 12}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_inputs_are_read_or_refused(kind, tmp_path):
    fuzz.KINDS[kind]().make(tmp_path)
    outcomes = [fuzz.attempt(kind, tmp_path, 5, number) for number in range(COUNTS[kind])]
    assert set(outcomes) <= {"read", "refused"}, outcomes
    assert "refused" in outcomes


@pytest.mark.slow
def test_mutated_videos_in_a_process_of_little_memory():
    said = []
    outcomes, found = fuzz.fuzz("videos", 30, 5, say=said.append)
    assert not found and sum(outcomes.values()) == 30 and outcomes["refused"]
    assert said[0].startswith("videos: 30 inputs in ")


class Kind:
    """A kind of inputs that raise a given error."""

    error = None

    def try_one(self, rng, good, scratch):
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "error, outcome",
    [
        (None, "read"),
        (InputError("a line"), "refused"),
        (InputError(""), "refused without a word"),
        (KeyError("x"), "KeyError in test_fuzz.py:"),
        (MemoryError(), "MemoryError in test_fuzz.py:"),
        (SystemExit(1), "SystemExit in test_fuzz.py:"),
    ],
)
def test_failures_are_noticed(monkeypatch, tmp_path, error, outcome):
    monkeypatch.setitem(fuzz.KINDS, "kind", Kind)
    monkeypatch.setattr(Kind, "error", error)
    assert fuzz.attempt("kind", tmp_path, 0, 0).startswith(outcome)


def test_processes_that_hang_are_killed(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    watch = fuzz._Watch(process)
    watch.restart()
    assert process.wait(30) == -9 and watch.killed


def test_an_input_is_a_function_of_its_number():
    content = bytes(range(256)) * 8
    one, again, other = (fuzz.mutate_bytes(random.Random(seed), content) for seed in ("1", "1", "2"))
    assert one == again != other
    values = {"a": [1, {"b": "text"}], "c": 0.5}
    changed = [fuzz.mutate_values(random.Random(i), values) for i in range(50)]
    assert values == {"a": [1, {"b": "text"}], "c": 0.5} and sum(one != values for one in changed) > 40
