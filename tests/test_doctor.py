import importlib.metadata
import sys

import jax
import pytest

import larp_jax
from larp_jax import doctor


@pytest.fixture
def versions(monkeypatch):
    """A dictionary of package versions that stand for the installed ones; None stands for missing."""
    pretended = {}
    real = importlib.metadata.version

    def version(name):
        found = pretended.get(name, "") or (real(name) if name not in pretended else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


def test_report_names_versions_and_devices():
    report = doctor.report()
    assert larp_jax.__version__ in report
    assert jax.__version__ in report
    assert f"{jax.device_count()} x {jax.devices()[0].device_kind}" in report
    assert "could not be found out" not in report


@pytest.mark.parametrize(("jax_version", "flax_version"), [("0.11.2", "0.12.8"), ("0.10.2", "0.12.12")])
def test_pairs_that_break_are_told(versions, jax_version, flax_version):
    versions.update(jax=jax_version, flax=flax_version)
    assert f"flax {flax_version} does not work with jax {jax_version}: pip install" in doctor.report()


def test_pairs_that_work_are_not_told(versions):
    for jax_version, flax_version in [("0.10.2", "0.12.8"), ("0.11.2", "0.12.12"), ("0.12.0", "0.12.10")]:
        versions.update(jax=jax_version, flax=flax_version)
        assert "does not work with" not in doctor.report()


def test_unmet_requirements_are_told(versions, monkeypatch):
    listed = ["optax>=0.2.8", "einops>=0.8", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    versions.update(optax="0.1.0", einops=None)
    report = doctor.report()
    assert "optax 0.1.0: pip install 'optax>=0.2.8'" in report
    assert "einops is missing: pip install 'einops>=0.8'" in report
    assert "pytest" not in report


def test_missing_parts_come_with_how_to_get_them(versions, monkeypatch):
    versions.update({package: None for package, *_ in doctor.OPTIONAL_PACKAGES} | {"tensorflow-cpu": None})
    monkeypatch.setitem(sys.modules, "av", None)  # its import raises
    report = doctor.report()
    for name in ("tensorflow", "tensorboard", "huggingface_hub", "torch", "libtpu", "H.264 encoder"):
        (line,) = [line for line in report.splitlines() if line.strip().startswith(f"{name} ")]
        assert "missing" in line and "pip install" in line


def test_report_survives_a_backend_that_fails(monkeypatch):
    def fail():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "devices", fail)
    report = doctor.report()
    assert "could not be found out: RuntimeError: no backend" in report
    assert "Optional parts" in report
