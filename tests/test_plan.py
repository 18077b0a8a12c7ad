"""Plans: compiled for emulated devices, estimated, and errors if neither is possible."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from larp_jax import cli
from larp_jax.config import default_recipe, parse_recipe
from larp_jax.errors import InputError
from larp_jax.runtime.sharding import AXES, make_mesh
from larp_jax.tools import flops, plan
from larp_jax.tools.benchmark import _Step

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "configs" / "tiny.py:plain")


def larp_l(**overrides):
    config = default_recipe()
    config.precision = "bfloat16"
    for name, value in overrides.items():
        config[name] = value
    return config


@pytest.mark.slow
def test_a_plan_agrees_with_the_compiled_program(tmp_path, capsys):
    output = tmp_path / "plan.json"
    assert cli.main(["plan", "--config", TINY, "--devices", "8", "--config.mesh.fsdp=2", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "8 x CPU, emulated" in printed and "all-gather" in printed and "MB of optimizer" in printed
    found = json.loads(output.read_text())
    config = plan_config(TINY)
    config.mesh.fsdp = 2
    recipe = parse_recipe(config)
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        step = _Step(recipe, mesh)
    memory = found["memory_mb"]
    parts = [size for name, size in memory.items() if name != "total"]
    assert sum(parts) == pytest.approx(memory["total"])
    assert memory["total"] == pytest.approx(step.memory / 1e6, rel=0.02)
    kept = (step.state.params, step.state.opt_state, step.state.ema)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(kept))
    assert sum(memory[name] for name in ("params", "optimizer", "ema")) == pytest.approx(held / 1e6)
    assert found["flops_compiler"] == step.flops
    assert found["flops_step"] == 8 * sum(flops.train_step(recipe).values())
    assert found["clip_bits"] == 8 * 5  # of 32 codes
    assert {c["kind"] for c in found["collectives"]} >= {"all-gather", "all-reduce"}
    assert found["traffic_gb"] > 0 and "step_ms" not in found  # peak numbers of emulated devices are unknown


def plan_config(path):
    import runpy

    path, _, variant = path.partition(":")
    return runpy.run_path(path)["get_config"](variant)


def test_gpus_are_estimated():
    one = plan.plan(parse_recipe(larp_l()), gpus="H200:1")
    eight = plan.plan(parse_recipe(larp_l()), gpus="H200:8")
    assert "not compiled" in one["how"] and one["hardware"] == "1 x H200" and eight["mesh"]["data"] == 8
    assert one["mfu"] == pytest.approx(plan.ASSUMED_GPU_SHARE)
    assert one["step_ms"] == pytest.approx(8 * eight["step_ms"])
    assert not one["fits"] and one["change"] == "--config.remat=block"
    assert eight["fits"] and "change" not in eight
    # 172 + 22 + 38 million parameters, and two moments of each
    assert eight["memory_mb"]["params"] == pytest.approx(4 * 232, rel=0.02)
    assert eight["memory_mb"]["optimizer"] == pytest.approx(2 * eight["memory_mb"]["params"], rel=1e-3)


def test_what_to_change():
    one = parse_recipe(larp_l(remat="block"))
    found = plan.plan(one, gpus="H200:1")
    assert found["memory_mb"]["total"] < plan.plan(parse_recipe(larp_l()), gpus="H200:1")["memory_mb"]["total"]
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), AXES)
    chip = plan.CHIPS["v5e"]
    assert plan.change(one, mesh, 1e9, chip) == "--config.accumulate=2"
    assert plan.change(one, mesh, 8e9, chip) == "--config.mesh.data=1 --config.mesh.fsdp=8"
    full = parse_recipe(larp_l(remat="block", accumulate=16))
    assert plan.change(full, mesh, 1e9, chip) == "--config.mesh.data=1 --config.mesh.fsdp=8"


def test_flops_of_the_generator():
    counts = flops.generator_train_step(parse_recipe({"stage": "generator"}).model)
    parameters = 632.0e6 - 8193 * 1280 - 1024 * 1280 - 102 * 1280  # 632 million without the embedding tables
    attention = 3 * 30 * 4 * 1024 * 1024 * 1280
    assert sum(counts.values()) == pytest.approx(6 * 1024 * parameters + attention, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": "B300:8"}, "--gpus B300:8 is not known"),
        ({"gpus": "H200:0"}, "--gpus H200:0 is not known"),
        ({"topology": "v9:4x4"}, "--topology v9:4x4 is not known"),
        ({"topology": "H200:8"}, "--topology H200:8 is not known"),
        ({"gpus": "H200:7"}, "does not split over data x fsdp = 7"),
        ({"devices": 512}, "there are only 8 emulated CPUs"),
    ],
)
def test_what_cannot_be_planned(arguments, message):
    with pytest.raises(InputError, match=message):
        plan.plan(parse_recipe(larp_l()), **arguments)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--topology needs libtpu"):
        plan.plan(parse_recipe(larp_l()), topology="v5e:4x4")


@pytest.mark.parametrize(
    ("message", "gigabytes"),
    [
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (96.37G) exceeds available HBM", 96.37),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.", 17.5),
        ("RESOURCE_EXHAUSTED: something else", float("inf")),
    ],
)
def test_out_of_memory_errors_of_the_compiler(message, gigabytes):
    assert plan._needed(message) == gigabytes * 2**30


def test_names_of_slices():
    assert plan._slices("v5e:16x16") == (1, "v5e:16x16") and plan._slices("2xv5e:16x16") == (2, "v5e:16x16")
    assert plan._chip("4xv5p:4x4x4") == plan.CHIPS["v5p"]
    with pytest.raises(InputError, match="--topology 2x9:4x4 is not known"):
        plan._chip("2x9:4x4")


def plan_for_tpus(output, *arguments):
    """The plan of a process of its own: libtpu cannot be unloaded, and refuses this process's flags for CPUs."""
    command = [sys.executable, "-m", "larp_jax", "plan", *arguments, "--config.data.batch_size=32"]
    command.append(f"--output={output}")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e '.[tpu]'"
)


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_one_slice(tmp_path):
    found, said = plan_for_tpus(tmp_path / "plan.json", "--config", TINY, "--topology", "v5e:2x4")
    assert found["mesh"] == {"dcn": 1, "data": 8, "fsdp": 1, "model": 1} and found["fits"]
    assert "network" not in found and "between slices" not in said


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_two_slices_lists_the_traffic_between_them(tmp_path):
    found, said = plan_for_tpus(tmp_path / "plan.json", "--config", TINY, "--topology", "2xv5e:2x4")
    assert "between slices: all-reduce" in said
    assert found["mesh"] == {"dcn": 2, "data": 8, "fsdp": 1, "model": 1}
    assert {c["chips"] for c in found["network"]} == {2} and {c["chips"] for c in found["collectives"]} == {8}
    # each chip sends its eighth of the gradients; small arrays are sent whole
    gradients = found["memory_mb"]["params"]
    sent = sum(c["count"] * c["mb_each"] for c in found["network"])
    assert gradients / 8 < sent < gradients
    assert found["ms_network"] == pytest.approx(1e9 * sum(c["wire_mb"] for c in found["network"]) / 3.125e9)
