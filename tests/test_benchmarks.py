"""The benchmark runs from the command line, on a tiny encoder and a local file. No time is asserted."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

RUN_BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks" / "run_benchmarks.py"
ROWS = {
    "early_exit_in_batches": 1,
    "prediction": 2,
    "one_at_a_time": 1,
    "nothing_exits": 2,
    "host_work": 1,
    "sweet_step": 1,
    "sweet_memory": 4,
    "branch_step": 2,
    "branch_memory": 1,
    "constant_heads": 6,
    "constant_heads_memory": 1,
    "remote_code_load": 1,
}


def run(*arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home")}
    command = [sys.executable, str(RUN_BENCHMARKS), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny.save_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "labelled.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, "good" if "good" in text else "other"] for text in tiny.sentences(240))
    return path


@pytest.fixture(scope="module")
def measured(encoder, labelled, tmp_path_factory):
    """Output folder of a run of every row of the quick size, and what was printed."""
    folder = tmp_path_factory.mktemp("benchmarks")
    finished = run(
        *("--quick", "--encoder", encoder, "--exit_layers", 1, 2, 4, "--repeats", 1),
        *("--dataset", labelled, "--output_dir", "out"),
        folder=folder,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "out", finished.stdout


def test_every_row_has_ratios(measured):
    folder, _ = measured
    rows = json.loads((folder / "benchmarks.json").read_text())["rows"]
    names = [row["row"] for row in rows]
    assert {name: names.count(name) for name in names} == ROWS
    for row in rows:
        ratios = [row["ratio"][name] for name in ("lower", "median", "upper")]
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios), row
        assert ratios == sorted(ratios), row


def test_fraction_of_layers_is_that_of_the_exits_taken(measured):
    folder, _ = measured
    rows = json.loads((folder / "benchmarks.json").read_text())["rows"]
    early = [row["values"] for row in rows if row["row"] in ("early_exit_in_batches", "prediction", "one_at_a_time")]
    assert len(early) == 4
    for values in early:
        assert 1 / 4 <= values["fraction of layers"] < 1
        assert 1 / 4 <= values["weighted by tokens"] < 1
    nothing = [row["values"]["fraction of layers"] for row in rows if row["row"] == "nothing_exits"]
    assert nothing == [1.0, 1.0]


def test_table_names_targets_and_machine(measured):
    folder, printed = measured
    table = (folder / "benchmarks.md").read_text()
    assert table.strip() in printed
    assert "CPU cores, 1 threads; torch" in table
    inference = ("≤ 1.1 ", "≤ 1.03 ", "≥ 3.8 ", "≥ 6 ", "≤ 20 ")
    for target in (*inference, "≤ 1.05 ", "≤ 0.6 ", "≤ 1 ", "≤ 1.3 "):
        assert f"| {target}|" in table, target


def test_plot_is_over_thresholds(measured):
    folder, _ = measured
    curve = json.loads((folder / "benchmarks.json").read_text())["curve"]
    assert [point["threshold"] for point in curve] == sorted(point["threshold"] for point in curve)
    costs = [point["layers"] for point in curve]
    assert costs == sorted(costs), "a higher threshold lets nobody leave earlier"
    assert costs[0] == 1 / 4
    assert (folder / "cost_and_time.png").read_bytes().startswith(b"\x89PNG")


def test_where_time_goes(encoder, labelled, tmp_path):
    finished = run(
        *("--quick", "--rows", "where_time_goes", "--encoder", encoder, "--exit_layers", 1, 2, 4, "--repeats", 1),
        *("--dataset", labelled, "--output_dir", "out"),
        folder=tmp_path,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = json.loads((tmp_path / "out" / "benchmarks.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [
        f"where the time of {name} goes" for name in ("forward",) * 3 + ("predict",) * 3
    ]
    for tokens, layers, outside in (rows[:3], rows[3:]):
        assert 0.5 < tokens["ratio"]["median"] < 2, "about as many tokens as texts are saved"
        assert layers["ratio"]["median"] > 0
        assert outside["ratio"]["median"] > 0


def test_unknown_rows_are_named(tmp_path):
    finished = run("--rows", "prediction", "predictions", folder=tmp_path)
    assert finished.returncode != 0
    assert "there are no rows ['predictions']: --rows can be early_exit_in_batches, prediction" in finished.stderr
