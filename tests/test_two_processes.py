"""Two processes give the gradients of one on the joined batch, and the answers of one on the whole data set."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from hf_adaptive import ExitReport
from tests import tiny, two_processes
from tests.modeling import predicting_processes
from tests.training.two_processes import gradients

RUNS = [
    *((name, routing) for name in ("bert", "deberta") for routing in ("joint", "sweet")),
    ("mpnet", "sweet"),
    ("roberta", "disjoint"),
    ("bert", 0.3),
    ("bert+distilled", "joint"),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes (gloo) left what they found."""
    out = tmp_path_factory.mktemp("two")
    (out / "runs.json").write_text(json.dumps(RUNS))
    arguments = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    arguments += ["--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *arguments]
        + [two_processes.__file__, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


# Training


@pytest.mark.parametrize(("name", "routing"), RUNS)
def test_gradients_are_those_of_one_process(name, routing, launched, tmp_path):
    together = load_file(launched / f"{name}-{routing}.safetensors")
    alone, _ = gradients(name, routing, tmp_path, processes=1)
    assert together.keys() == alone.keys()
    assert any(gradient.any() for gradient in alone.values())
    for key, gradient in alone.items():
        torch.testing.assert_close(together[key], gradient, atol=1e-6, rtol=1e-4, msg=f"{name}, {routing}: {key}")


def test_report_is_written_once_all_have_measured(launched):
    folder = launched / "reported"
    assert {"exit_report.json", "exits.png", "README.md"} <= {path.name for path in folder.iterdir()}
    assert ExitReport.from_json(folder / "exit_report.json").curve


@pytest.mark.parametrize(("name", "routing"), RUNS)
def test_what_they_saved_is_whole(name, routing, launched):
    folder = launched / f"saved-{name}-{routing}"
    assert not list(folder.glob(".incomplete-*"))
    model = WithExits.from_pretrained(folder)
    assert model.config.exit_routing == routing
    assert model(**tiny.batch()).exit_logits.isfinite().all()


# Predictions


@pytest.fixture(scope="module")
def found(launched):
    """What each process found."""
    return [load_file(launched / f"{rank}.safetensors") for rank in (0, 1)]


def test_both_processes_have_every_answer(found):
    first, second = found
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].nan_to_num(7), second[key].nan_to_num(7)) for key in first.keys() - {"own"})


def test_data_that_somebody_divided_are_left_alone(found):
    for rank, answers in enumerate(found):
        torch.testing.assert_close(answers["own"], predicting_processes.own_answers(rank), atol=1e-6, rtol=1e-5)


@tiny.on_few_rows
def test_answers_are_those_of_one_process(found):
    alone = {**predicting_processes.answers(), **predicting_processes.report_and_thresholds()}
    assert found[0].keys() == alone.keys() | {"own"}
    for key, expected in alone.items():
        torch.testing.assert_close(found[0][key], expected, atol=2e-6, rtol=1e-4, equal_nan=True, msg=key)
    early = alone["bert/early/21/exit_index"]
    assert early.unique().numel() > 1
