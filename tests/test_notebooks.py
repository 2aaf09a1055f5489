"""The notebooks run, on a tiny encoder and few texts, and hold no outputs."""

import csv
from pathlib import Path

import pytest

from tests import tiny

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install nbclient")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
NAMES = ["fine_tune_and_promise", "how_much_attention"]


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    tiny.save_encoder(folder / "encoder")
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = [(text, "good" if "good" in text else "bad") for text in tiny.sentences(120)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return {
        "MODEL": str(folder / "encoder"),
        "DATASET": str(folder / "texts.csv"),
        "TRAIN_TEXTS": 40,
        "HELD_OUT_TEXTS": 40,
        "EXIT_LAYERS": [1, 2, 4],
        "MAX_LENGTH": 16,
        "SHARES": [0, 1],
    }


def with_parameters(notebook, parameters):
    """The notebook with a line for each of its parameters after the cell that sets them."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    lines = [f"{name} = {value!r}" for name, value in parameters.items() if name in cell.source]
    cell.source = "\n".join([cell.source, *lines])
    return notebook


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=":")
    notebook = with_parameters(read(name), parameters)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    if name == "fine_tune_and_promise":
        assert any("after layer" in text for text in printed)


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_without_outputs(name):
    for cell in read(name).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
