"""Two processes share a data set, and both get the answers that one process gives."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.modeling import predicting_processes


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each of two processes (gloo) found."""
    out = tmp_path_factory.mktemp("processes")
    arguments = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    arguments += ["--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *arguments]
        + [predicting_processes.__file__, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(out / f"{rank}.safetensors") for rank in (0, 1)]


def test_both_processes_have_every_answer(launched):
    first, second = launched
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].nan_to_num(7), second[key].nan_to_num(7)) for key in first.keys() - {"own"})


def test_data_that_somebody_divided_are_left_alone(launched):
    for rank, found in enumerate(launched):
        torch.testing.assert_close(found["own"], predicting_processes.own_answers(rank), atol=1e-6, rtol=1e-5)


@tiny.on_few_rows
def test_answers_are_those_of_one_process(launched):
    alone = {**predicting_processes.answers(), **predicting_processes.report_and_thresholds()}
    assert launched[0].keys() == alone.keys() | {"own"}
    for key, expected in alone.items():
        torch.testing.assert_close(launched[0][key], expected, atol=2e-6, rtol=1e-4, equal_nan=True, msg=key)
    early = alone["bert/early/21/exit_index"]
    assert early.unique().numel() > 1
