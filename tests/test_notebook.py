"""The notebook runs from top to bottom, with tiny models."""

import importlib.util
import os
import pathlib
import shutil
import subprocess

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "codes.ipynb"


@pytest.mark.slow
def test_it_runs(trained, monkeypatch, tmp_path):
    for name, value in {
        "LARP_NOTEBOOK_SMALL": "1",
        "TFDS_DATA_DIR": os.environ["TFDS_DATA_DIR"],  # the few clips written by `trained`
        "JAX_PLATFORMS": "cpu",
        "TMPDIR": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LARP_TOKENIZER", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in output["data"] for output in pictures) == 4
    assert sum("image/svg+xml" in output["data"] for output in pictures) == 1


def test_the_first_cell_installs_what_is_missing(monkeypatch, tmp_path):
    """As on Colab: from an uploaded wheel or an address, for the accelerator that is there."""
    cell = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code").source
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command[-1]))
    monkeypatch.chdir(tmp_path)
    exec(cell, {})
    assert not commands  # it is installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(SystemExit, match="upload its wheel"):
        exec(cell, {})
    wheel = tmp_path / "larp_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    exec(cell, {})
    assert 'SOURCE = ""' in cell
    exec(cell.replace('SOURCE = ""', 'SOURCE = "git+https://host/larp_jax"'), {})
    assert commands == [f"larp_jax[cuda12] @ {wheel.as_uri()}", "larp_jax[cuda12] @ git+https://host/larp_jax"]


def test_the_committed_notebook_is_small_and_has_no_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 2e6
