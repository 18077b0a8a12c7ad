import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import av
import jax
import pytest

import larp_jax
from larp_jax.tools import doctor


@pytest.fixture
def versions(monkeypatch):
    """A dictionary of package versions in place of the installed ones; None means missing."""
    pretended = {}
    real = importlib.metadata.version

    def version(name):
        found = pretended.get(name, "") or (real(name) if name not in pretended else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


@pytest.fixture
def gpu(monkeypatch, tmp_path, versions):
    """Simulates a complete machine with one NVIDIA GPU, for tests to break; JAX itself stays on the CPU."""
    (tmp_path / "nvidia0").touch()
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\n")
    monkeypatch.setattr(doctor, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(doctor, "NVIDIA_VERSION", driver)
    monkeypatch.setattr(doctor, "_backend", lambda: "gpu")
    monkeypatch.setattr(shutil, "which", lambda name, known=shutil.which: name if name == "nvidia-smi" else known(name))
    smi = {"gpu": "0, 400, 81559\n", "compute-apps": ""}

    def run(command, known=subprocess.run, **options):
        if command[0] != "nvidia-smi":
            return known(command, **options)
        query = command[1].removeprefix("--query-").partition("=")[0]
        return subprocess.CompletedProcess(command, 0, smi[query], "")

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TF_FORCE_GPU_ALLOW_GROWTH"):
        monkeypatch.delenv(name, raising=False)
    versions.update({"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "jax-cuda12-plugin": "0.10.2"})
    versions.update({"jax-cuda13-plugin": None, "tensorflow": None, "tensorflow-cpu": "2.19.0"})
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [])
    return smi


def problems():
    """The lines below the title "Problems"."""
    section = doctor.report().split("\n\nProblems\n")[1].split("\n\n")[0]
    return [line.strip() for line in section.splitlines()]


def test_report_names_versions_and_devices():
    report = doctor.report()
    assert larp_jax.__version__ in report
    assert jax.__version__ in report
    assert f"{jax.device_count()} x {jax.devices()[0].device_kind}" in report
    assert "check failed" not in report


@pytest.mark.parametrize(("jax_version", "flax_version"), [("0.11.2", "0.12.8"), ("0.10.2", "0.12.12")])
def test_pairs_that_break_are_reported(versions, jax_version, flax_version):
    versions.update(jax=jax_version, flax=flax_version)
    assert f"flax {flax_version} does not work with jax {jax_version}: pip install" in doctor.report()


def test_pairs_that_work_are_not_reported(versions):
    for jax_version, flax_version in [("0.10.2", "0.12.8"), ("0.11.2", "0.12.12"), ("0.12.0", "0.12.10")]:
        versions.update(jax=jax_version, flax=flax_version)
        assert "does not work with" not in doctor.report()


def test_unmet_requirements_are_reported_once(versions, monkeypatch):
    listed = ["optax>=0.2.8", "einops>=0.8", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    versions.update({"optax": "0.1.0", "einops": None})
    report = doctor.report()
    assert report.count("optax 0.1.0: pip install 'optax>=0.2.8', which larp_jax needs") == 1
    assert report.count("einops is missing: pip install 'einops>=0.8'") == 1
    assert "pytest" not in report


@pytest.mark.parametrize(
    ("package", "version", "wanted_by"), [("jaxlib", "0.4.1", "jax"), ("orbax-checkpoint", "0.5.0", "larp_jax"),
                                         ("flax", "0.7.0", "larp_jax")]  # fmt: skip
)
def test_packages_of_wrong_versions_are_reported(versions, package, version, wanted_by, monkeypatch):
    known = importlib.metadata.requires
    ours = ["flax>=0.12.8", "orbax-checkpoint>=0.12,<0.13"]  # independent of the installed larp_jax
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ours if name == "larp_jax" else known(name))
    versions[package] = version
    (line,) = [line for line in problems() if line.startswith(f"{package} {version}: pip install")]
    assert line.endswith(f"which {wanted_by} needs")


def test_a_machine_in_order_has_no_problems(gpu):
    assert problems() == ["none"]


def only(*, starts: str, fix: str):
    (line,) = problems()
    assert line.startswith(starts) and fix in line, line


def test_a_gpu_without_a_plugin(gpu, versions):
    versions["jax-cuda12-plugin"] = None
    only(starts="found an NVIDIA GPU, but jax has no CUDA plugin", fix="pip install 'jax[cuda12]==0.10.2'")


def test_a_plugin_of_another_version(gpu, versions):
    versions["jax-cuda12-plugin"] = "0.9.0"
    only(starts="jax-cuda12-plugin 0.9.0 is ignored by jaxlib 0.10.2", fix="pip install 'jax[cuda12]==0.10.2'")


def test_two_plugins_and_a_driver_too_old_for_one(gpu, versions):
    versions["jax-cuda13-plugin"] = "0.10.2"
    assert [line.partition(":")[2] for line in problems()] == [" pip uninstall one of them", " install a newer driver"]


@pytest.mark.parametrize(("name", "value"), [("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_an_environment_that_forbids_the_gpu(gpu, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    only(starts=f"{name}=", fix=f"unset {name}")


def test_libraries_of_another_cuda(gpu, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda-11/lib64")
    assert problems() == ["none"]  # JAX uses the GPU nevertheless
    monkeypatch.setattr(doctor, "_backend", lambda: "cpu")
    only(starts="LD_LIBRARY_PATH is set", fix="unset it")


def test_a_container_without_the_gpu(gpu, tmp_path):
    (tmp_path / "nvidia0").unlink()
    only(starts="found an NVIDIA driver but no device file", fix="--gpus all")


def test_a_device_file_that_may_not_be_opened(gpu, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path).name != "nvidia0")
    (line,) = [line for line in problems() if "no permission to open" in line]
    assert "add this user to the group" in line


def test_memory_used_by_other_processes(gpu):
    gpu |= {"gpu": "0, 79000, 81559\n1, 4, 81559\n", "compute-apps": "4711, python, 78990\n"}
    (line,) = problems()
    assert line.startswith("GPU 0: 79000 of 81559 MiB are in use") and "python (process 4711, 78990 MiB)" in line
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in line


def test_tensorflow_for_gpus(gpu, versions, monkeypatch):
    versions["tensorflow"] = "2.19.0"
    only(starts="tensorflow 2.19.0 is built for GPUs", fix="pip install tensorflow-cpu")
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    assert problems() == ["none"]


def test_a_tpu_without_libtpu(gpu, versions, tmp_path):
    (tmp_path / "accel0").touch()
    versions["libtpu"] = None
    only(starts="found a TPU, but jax has no libtpu", fix="pip install 'jax[tpu]==0.10.2'")


def test_a_libtpu_of_another_jax(gpu, versions, monkeypatch):
    wanted = {"jax": ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"']}
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted.get(name, []))
    versions["libtpu"] = "0.0.42.1"
    assert problems() == ["none"]
    versions["libtpu"] = "0.0.52"
    starts = "libtpu 0.0.52 is installed, but jax 0.10.2 needs libtpu==0.0.42.*"
    only(starts=starts, fix="pip install 'jax[tpu]==0.10.2'")


def test_codecs_that_are_missing(gpu, monkeypatch):
    def codec(name, mode, known=av.codec.Codec):
        if name in ("hevc", "libdav1d"):
            raise ValueError("unknown codec")
        return known(name, mode)

    monkeypatch.setattr(av.codec, "Codec", codec)
    only(starts="PyAV lacks the decoders hevc, libdav1d", fix="pip install --force-reinstall")


def test_without_pyav(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # its import raises
    only(starts="videos can be neither read nor written", fix="pip install --force-reinstall av")


def test_missing_parts_come_with_how_to_get_them(versions):
    versions.update({package: None for package, *_ in doctor.OPTIONAL_PACKAGES} | {"tensorflow-cpu": None})
    report = doctor.report()
    for name in ("tensorflow", "tensorboardX", "wandb", "mlflow", "torch", "libtpu"):
        (line,) = [line for line in report.splitlines() if line.strip().startswith(f"{name} ")]
        assert "missing" in line and "pip install" in line


def test_report_survives_a_backend_that_fails(monkeypatch):
    def fail():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "devices", fail)
    report = doctor.report()
    assert "check failed: RuntimeError: no backend" in report
    assert "Optional parts" in report


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda': no device"), AssertionError()])
def test_no_device_at_all(gpu, monkeypatch, error):
    def devices(*args):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax, "default_backend", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    found = problems()
    assert any(line.startswith("JAX has no device to compute on") for line in found)
    assert any("JAX_PLATFORMS=cuda asks for what is not here; unset it" in line for line in found)
    assert not any("check failed" in line for line in found)
