"""The comparison of deployments, as from the command line on a tiny encoder, and what its page says of given numbers.

No time is asserted.
"""

import csv
import json

import pytest

from tests import tiny
from tests.scripts import run_here

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

from deployment_results import Comparison  # noqa: E402
from deployment_systems import OURS, PROMISED, REFERENCE, SMALLER, TODAY  # noqa: E402

pytestmark = tiny.on_few_rows
EXITS = ("exits, torch", "exits, ONNX fp32", "exits, ONNX int8")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a run, the arguments, and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    tiny.save_encoder(folder / "encoder")
    with (folder / "labelled.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, "good" if "good" in text else "other"] for text in tiny.sentences(240))
    arguments = ["--quick", "--encoder", "encoder", "--exit_layers", 2, 4, "--tasks", "films=labelled.csv"]
    return folder, arguments, run_here("compare_deployments", *arguments, "--output_dir", "out", folder=folder)


def test_every_way_is_measured(compared):
    folder, _, printed = compared
    results = json.loads((folder / "out" / "results" / "results.json").read_text())
    points = {point["name"]: point for point in results["tasks"]["films"]["points"]}
    assert {REFERENCE, "torch bf16, sorted by length", "ONNX int8", "2 layers fine-tuned alone, ONNX int8"} <= set(
        points
    )
    assert {"static embeddings", "half of the heads constant, torch", "exit 2 as a stock model, torch"} <= set(points)
    assert {f"{name}, {PROMISED}" for name in (*EXITS, "cascade, torch")} <= set(points)
    assert points[REFERENCE]["speed"]["mean"] == 1
    for point in points.values():
        assert 0 <= point["accuracy"]["mean"] <= 100
        assert point["texts_per_second"] > 0
        assert 0 < point["median_ms"] <= point["p99_ms"]
    assert (folder / "out" / "results" / "films.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "out" / "results" / "results.md").read_text().strip() in printed


def test_ways_that_compute_the_same_answer_alike(compared):
    folder, _, _ = compared
    results = json.loads((folder / "out" / "results" / "results.json").read_text())
    accuracy = {point["name"]: point["accuracy"]["mean"] for point in results["tasks"]["films"]["points"]}
    assert accuracy[REFERENCE] == accuracy["torch fp32, sorted by length"] == accuracy["ONNX fp32"]
    for setting in (PROMISED, "0.5 points", "2 points"):
        assert accuracy[f"exits, torch, {setting}"] == accuracy[f"exits, ONNX fp32, {setting}"]


def test_it_is_taken_up_where_it_was(compared):
    folder, arguments, _ = compared
    [lost] = (folder / "out" / "runs").glob("*static*")
    lost.unlink()
    printed = run_here("compare_deployments", *arguments, "--output_dir", "out", folder=folder)
    done = [line for line in printed.splitlines() if line.startswith("films, seed 0: ")]
    assert done == ["films, seed 0: static embeddings"]
    with pytest.raises(ValueError, match="out holds results of other settings: max_length=64"):
        run_here("compare_deployments", *arguments, "--max_length", 8, "--output_dir", "out", folder=folder)


def measured(task="films", seed=0, **points):
    """A file of `timing/`: by name a kind, an accuracy, and the time."""
    machine = {"cpu": "some", "cores": 2, "threads": 2, "torch": "2", "transformers": "5"}
    return {
        "task": task,
        "seed": seed,
        "machine": machine,
        "points": {
            name.replace("_", " "): {
                "series": name,
                "label": name,
                "kind": kind,
                "setting": {},
                "accuracy": accuracy,
                "texts": 100,
                "seconds": [seconds],
                "tokenised_seconds": [seconds],
                "single_seconds": [seconds / 100] * 3,
                "single_tokenised_seconds": [seconds / 100] * 3,
                "cost": None,
            }
            for name, (kind, accuracy, seconds) in points.items()
        },
    }


def page(*runs):
    return Comparison(list(runs), {"encoder": "some"}).text()


def test_the_page_says_where_a_rival_is_better():
    points = {"torch_fp32": (TODAY, 0.9, 10.0), "own": (OURS, 0.896, 2.0), "small": (SMALLER, 0.89, 1.0)}
    text = page(measured(**points))
    assert "At most 0.5 points below the whole model in torch (90.0 %): own (89.6 %, 5.0 times); the fastest" in text
    assert "At most 1 points below the whole model in torch (90.0 %): **a rival is better**: small (89.0 %" in text
    text = page(measured(**{**points, "own": (OURS, 0.7, 0.1)}))
    assert text.count("of ours nothing is within") == 4


def test_the_front_holds_what_nothing_beats():
    points = {"torch_fp32": (TODAY, 0.9, 10.0), "own": (OURS, 0.9, 5.0), "small": (SMALLER, 0.8, 5.0)}
    [task] = Comparison([measured(**points)], {"encoder": "some"}).tasks
    assert [point.name for point in task.front] == ["own"]
    assert "| **own** | 90.0 | 2.00 |" in page(measured(**points))


def test_intervals_are_over_seeds():
    runs = [
        measured(seed=seed, torch_fp32=(TODAY, 0.9, 10.0), own=(OURS, accuracy, seconds))
        for seed, accuracy, seconds in ((0, 0.88, 5.0), (1, 0.92, 2.0))
    ]
    # Student's t of one degree of freedom at 95 % is 12.706.
    assert "| **own** | 90.0 ± 25.4 | 3.50 ± 19.06 |" in page(*runs)
