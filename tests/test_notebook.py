"""The notebook runs from top to bottom, with tiny models."""

import os
import pathlib

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


def test_the_committed_notebook_is_small_and_has_no_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 2e6
