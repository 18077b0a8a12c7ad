"""The script with all measurements on a GPU, run at small size on the devices of the tests."""

import json
import pathlib
import runpy
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "bench_gpu.py"


@pytest.mark.slow
def test_small(tmp_path, monkeypatch, capsys, small_ceilings):
    output = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--small", "--seconds", "0.1", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(output.read_text())
    train = "train, batch 8, remat none"
    assert list(found) == [train, "encode, batch 8", "decode, batch 8", "sample"]
    assert not [name for name, result in found.items() if "failed" in result]
    for name in (train, "encode, batch 8", "decode, batch 8"):
        assert found[name]["precision"] == "bfloat16" and 0 < found[name]["mfu"] < 1
    full = found[train]
    # a model this small spends most time outside matrix products
    assert 1.0 < full["compiler_flops_share"] < 2.0
    assert full["memory_over_parts"] < 1.0
    assert full["gan_time_ratio"] > 0 and full["gan_flops_ratio"] > 1.0
    turns = full["step_discriminator_turn_ms"], full["step_between_turns_ms"]
    assert full["step_ms"] == pytest.approx((turns[0] + 4 * turns[1]) / 5)
    assert 0 < found["sample"]["share_of_bandwidth_ceiling"] < 1
    assert f"best training: {train}, " in capsys.readouterr().out


def test_measurements_that_do_not_fit_in_memory_are_noted(tmp_path, monkeypatch):
    from larp_jax.tools import benchmark, benchmark_sampling

    def out_of_memory(*arguments, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    for module, name in (
        (benchmark, "benchmark_train"), (benchmark, "benchmark_codec"), (benchmark_sampling, "benchmark_sample")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, out_of_memory)
    output = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--small", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(output.read_text())
    assert {result["failed"] for result in found.values()} == {"RESOURCE_EXHAUSTED: Out of memory"}
