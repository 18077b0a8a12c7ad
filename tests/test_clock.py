"""Where the wall time of a run goes: metrics, report and traces."""

import itertools
import json
import time

import jax
import jax.numpy as jnp
import pytest

from larp_jax.runtime import clock
from larp_jax.runtime.clock import Clock
from larp_jax.tools.report import _goodput, report
from larp_jax.training.profile import Profile


@pytest.fixture
def now(monkeypatch):
    """The time that clocks see: a list of one number, in seconds."""
    seconds = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_activities_and_steps_add_up(now):
    found = Clock()
    with found.measure("start"):
        now[0] += 30
    now[0] += 10  # the first step
    assert found.read(1) == {"time/step": 10, "time/input": 0, "time/start": 30, "time/goodput": 0.25}
    for _ in range(5):
        with found.measure("input"):
            now[0] += 0.5
        now[0] += 1.5
    with found.measure("evaluation"), pytest.raises(KeyError):
        now[0] += 6
        raise KeyError
    with found.measure("checkpoint"):
        now[0] += 4
    times = {"step": 1.5, "input": 0.5, "evaluation": 6, "checkpoint": 4, "goodput": 7.5 / 20}
    assert found.read(6) == pytest.approx({f"time/{name}": value for name, value in times.items()})


def test_goodput_of_a_run_counts_pauses(tmp_path):
    rows = [{"step": step, "wall_time": 10.0 * step, "train/loss": 1.0, "time/step": 0.9} for step in (10, 20, 30)]
    assert _goodput(rows) == pytest.approx(0.09)
    late = rows + [{"step": 40, "wall_time": 500.0, "time/step": 9.0}]  # after a restart
    assert _goodput(late) == pytest.approx((9 + 9 + 90) / 400)
    assert _goodput(rows[:1]) is None and _goodput([]) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late))
    page = report(tmp_path).read_text()
    assert "goodput, with pauses and restarts" in page and "27.0%" in page and "Time per step" in page


def test_a_trace_of_some_steps(tmp_path):
    compute = jax.jit(lambda x: x * 2)
    for attempt in ("00000005", "00000005.2"):  # an earlier trace is not replaced
        trace, x = Profile(tmp_path, 2, first=3), jnp.ones(4)
        for step in itertools.count(4):
            x = compute(x)
            trace.at(step, x)
            if step == 8:
                break
        trace.close()
        names = [path.name for path in (tmp_path / "profile" / attempt).rglob("*") if path.is_file()]
        assert any(name.endswith(".xplane.pb") for name in names), names
        assert any(name.endswith(".trace.json.gz") for name in names), names
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["00000005", "00000005.2"]


def test_without_steps_there_is_no_trace(tmp_path):
    trace = Profile(tmp_path, 0, first=0)
    for step in range(5):
        trace.at(step, None)
    trace.close()
    assert not list(tmp_path.iterdir()) and time.monotonic()
