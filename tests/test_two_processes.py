"""Two processes give the gradients of one on the joined batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from hf_adaptive import ExitReport
from tests import tiny
from tests.training import two_processes

RUNS = [
    *((name, routing) for name in ("bert", "deberta") for routing in ("joint", "sweet")),
    ("mpnet", "sweet"),
    ("roberta", "disjoint"),
    ("bert", 0.3),
    ("bert+distilled", "joint"),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes left their gradients."""
    out = tmp_path_factory.mktemp("two")
    (out / "job.json").write_text(json.dumps({"runs": RUNS, "processes": 2, "out": str(out)}))
    arguments = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    arguments += ["--dynamo_backend", "no", "--main_process_port", "0"]
    job = [two_processes.__file__, str(out / "job.json")]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *arguments, *job],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize(("name", "routing"), RUNS)
def test_gradients_are_those_of_one_process(name, routing, launched, tmp_path):
    together = load_file(launched / f"{name}-{routing}.safetensors")
    alone, _ = two_processes.gradients(name, routing, tmp_path, processes=1)
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
