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


def cells_with_parameters(name, parameters):
    """A notebook's cells, with a line for each of its parameters after the cell that sets them."""
    notebook = read(name)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    lines = [f"{name} = {value!r}" for name, value in parameters.items() if name in cell.source]
    cell.source = "\n".join([cell.source, *lines])
    return notebook.cells


@pytest.fixture(scope="module")
def shown(parameters, tmp_path_factory):
    """What each notebook shows. One kernel runs all, each without the names of those before, as imports take long."""
    notebook = nbformat.v4.new_notebook()
    cells = {name: cells_with_parameters(name, parameters) for name in NAMES}
    for own in cells.values():
        notebook.cells += [nbformat.v4.new_code_cell("%reset -f"), *own]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=":")
        resources = {"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}}
        nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    return {
        name: "".join(text_of(output) for cell in own for output in cell.get("outputs", []))
        for name, own in cells.items()
    }


def text_of(output):
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def test_each_runs_and_says_what_it_found(shown):
    assert "after layer" in shown["fine_tune_and_promise"]
    assert "{0: 0." in shown["how_much_attention"], "the score of no constant head"


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_without_outputs(name):
    for cell in read(name).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
