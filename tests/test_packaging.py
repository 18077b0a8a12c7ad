import pathlib
import runpy
import subprocess

import pytest
import setuptools
from packaging.requirements import Requirement

import larp_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def arguments():
    """What setup.py hands to setuptools."""
    with pytest.MonkeyPatch.context() as patch:
        captured = {}
        patch.setattr(setuptools, "setup", lambda **kwargs: captured.update(kwargs))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return captured


def wanted_by(python, requirements):
    """Those of the requirements that hold for a Python version."""
    parsed = map(Requirement, requirements)
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"python_version": python})]


def test_version_is_the_packages_own(arguments):
    assert arguments["version"] == larp_jax.__version__


@pytest.mark.parametrize(
    ("python", "jax", "flax", "not_jax", "not_flax"),
    [
        ("3.11", "0.10.2", "0.12.8", "0.11.2", "0.12.12"),
        ("3.12", "0.11.2", "0.12.12", "0.10.2", "0.12.8"),
        ("3.13", "0.12.0", "0.12.12", "0.10.2", "0.12.8"),
    ],
)
def test_each_python_gets_a_jax_and_flax_that_work_together(arguments, python, jax, flax, not_jax, not_flax):
    requirements = wanted_by(python, arguments["install_requires"])
    wanted = {r.name: r.specifier for r in requirements}
    assert len(wanted) == len(requirements)  # each package once
    assert wanted["jax"].contains(jax) and not wanted["jax"].contains(not_jax)
    assert wanted["flax"].contains(flax) and not wanted["flax"].contains(not_flax)
    assert "importlib_resources" in wanted


def test_every_folder_of_modules_is_packaged(arguments):
    folders = {path.parent for path in (ROOT / "larp_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(arguments["packages"])


def test_extras_are_those_promised(arguments):
    extras = arguments["extras_require"]
    assert set(extras) == {"cuda", "tpu", "tensorboard", "dev"}
    for requirements in extras.values():
        assert all(map(Requirement, requirements))


@pytest.mark.parametrize("script", ["launch/test.sh", "launch/quickstart.sh", "launch/venv.sh", ".ci/run"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0


def test_venv_script_refuses_a_python_that_is_too_old(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", "source launch/venv.sh; install_into_venv ."],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "needs Python 3.11 to 3.13" in result.stderr and "Python 3.9.2" in result.stderr
