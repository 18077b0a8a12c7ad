"""The wheel is complete: installed without the repository, it trains with a shipped recipe."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# Settings with which configs/quickstart.py trains in seconds.
SMALL = "steps=2 eval_every=2 start.continuous_steps=1 start.ramp_steps=1 start.kmeans_clips=8 data.batch_size=2"
SMALL += " data.eval_clips=4 model.encoder.depth=1 model.decoder.depth=1"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # built from a copy, because setuptools writes folders next to the sources
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                             check=False).stdout.splitlines()  # fmt: skip
    if not tracked:
        pytest.skip("no git repository")
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(build, cwd=folder / "source", check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_contents_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"larp_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "larp_jax").rglob("*.py")}
    assert recipes | modules | {"larp_jax/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"larp_jax"}


@pytest.mark.slow
def test_it_trains_without_the_repository(wheel, tmp_path):
    place = tmp_path / "site"
    install = [*PIP, "install", "--quiet", "--no-deps", "--no-compile", "--target", str(place), str(wheel)]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu"}
    environment["TFDS_DATA_DIR"] = str(tmp_path / "tfds")
    overrides = [f"--config.{setting}" for setting in SMALL.split()]
    commands = [
        ["train", "--config", "configs/quickstart.py", "--workdir", "runs/quickstart", *overrides],
        ["export", "--checkpoint=runs/quickstart", "--format=codebook-npz", "--output=codebook.npz"],
        ["train", "--config", "configs/quickstarts.py", "--workdir", "runs/other"],
    ]
    # a small data set in place of 2,048 clips
    code = "import larp_jax.data.moving_shapes as m; m.SPLITS.update(train=16, test=8)\n"
    code += f"import larp_jax; assert larp_jax.__file__.startswith({str(place)!r})\n"
    code += f"from larp_jax import cli; print('codes:', *map(cli.main, {commands!r}))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "codes: 0 0 2" in result.stdout and "trained to step 2" in result.stdout, result.stderr
    assert (tmp_path / "codebook.npz").exists()
    assert "is not a file; give a recipe such as configs/quickstart.py" in result.stderr
