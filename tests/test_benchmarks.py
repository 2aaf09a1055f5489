"""The benchmark as from the command line, on a tiny encoder and a local file. No time is asserted."""

import csv
import json
import math
import os
import subprocess
import sys

import load_probe
import many_rows
import memory_probe
import pytest
import run_benchmarks
import torch
import training

from tests import tiny
from tests.scripts import run_here

ROWS = {
    "early_exit_in_batches": 1,
    "prediction": 2,
    "one_at_a_time": 1,
    "nothing_exits": 2,
    "host_work": 1,
    "many_rows": 3,
    "sweet_step": 1,
    "sweet_memory": 4,
    "branch_step": 2,
    "branch_memory": 1,
    "constant_heads": 6,
    "constant_heads_memory": 1,
    "remote_code_load": 1,
}
# They start several processes each: what these do is tested below, and one such row is run.
IN_PROCESSES = ("many_rows", "sweet_memory", "constant_heads_memory", "remote_code_load")


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
def flags(encoder, labelled):
    return (
        *("--quick", "--encoder", encoder, "--exit_layers", 1, 2, 4, "--repeats", 1),
        *("--dataset", labelled, "--output_dir", "out"),
    )


@pytest.fixture(scope="module")
def measured(flags, tmp_path_factory):
    """Output folder of a run of the quick size, and what was printed."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rows = [row for row in run_benchmarks.ROWS if row not in (*IN_PROCESSES, *run_benchmarks.FULL_ONLY)]
    return folder / "out", run_here("run_benchmarks", *flags, "--rows", *rows, folder=folder)


def rows_of(folder):
    return json.loads((folder / "benchmarks.json").read_text())["rows"]


def assert_has_ratios(rows, expected):
    names = [row["row"] for row in rows]
    assert {name: names.count(name) for name in names} == expected
    for row in rows:
        ratios = [row["ratio"][name] for name in ("lower", "median", "upper")]
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios), row
        assert ratios == sorted(ratios), row


def test_every_row_has_ratios(measured):
    folder, _ = measured
    assert_has_ratios(rows_of(folder), {row: count for row, count in ROWS.items() if row not in IN_PROCESSES})


@pytest.mark.slow
def test_every_row_from_the_command_line(flags, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, run_benchmarks.__file__, *map(str, flags)]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_has_ratios(rows_of(tmp_path / "out"), ROWS)
    table = (tmp_path / "out" / "benchmarks.md").read_text()
    assert table.strip() in finished.stdout
    for target in ("≤ 0.6 ", "≤ 1 ", "≤ 1.3 "):
        assert f"| {target}|" in table, target


def test_memory_is_compared_with_joint_training(flags, tmp_path, monkeypatch):
    peaks = {"sweet": 3.0, "joint": 4.0}

    def peak(workload, exit_layers, fields):
        assert list(exit_layers) == [1, 2, 4]
        own = peaks[fields["exit_routing"]] / (1 if fields.get("exit_local_gradients", True) else 0.5)
        return {"whole": own, "activations": own / 2}

    monkeypatch.setattr(training, "_peak", peak)
    printed = run_here("run_benchmarks", *flags, "--rows", "sweet_memory", folder=tmp_path)
    assert "| ≤ 0.6 |" in printed
    assert [row["ratio"]["median"] for row in rows_of(tmp_path / "out")] == [0.75, 0.75, 1.5, 1.5]


def test_memory_of_many_rows_is_compared_with_the_rows_and_with_that_of_fewer(flags, measured, tmp_path, monkeypatch):
    def peak(job):
        return {"rows": 10.0, "answers": 2.0, "window": 1.0, "rise": 3.0 if job["rows"] == 50_000 else 2.0}

    monkeypatch.setattr(many_rows, "_measured", peak)
    (checkpoint,) = (measured[0] / "models").glob("*-exits-1-2-4")
    run_here("run_benchmarks", *flags, "--checkpoint", checkpoint, "--rows", "many_rows", folder=tmp_path)
    whole, fewer, stream = (row["ratio"]["median"] for row in rows_of(tmp_path / "out"))
    assert (whole, fewer) == (1.0, 1.5)
    assert stream > 0


def test_what_is_measured_in_processes_of_their_own(encoder, monkeypatch, capsys):
    job = {"encoder": str(encoder), "device": "cpu", "rows": 8, "length": 16}
    memory = memory_probe.ProcessMemory()
    for choice in ("stock", "all heads"):
        assert memory_probe.forward_peak({**job, "choice": choice}, torch.device("cpu"), memory)["whole"] >= 0
    monkeypatch.setattr(sys, "argv", ["load_probe.py", str(encoder)])
    load_probe.main()
    assert float(capsys.readouterr().out) > 0


def test_fraction_of_layers_is_that_of_the_exits_taken(measured):
    folder, _ = measured
    rows = rows_of(folder)
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
    for target in ("≤ 1.1 ", "≤ 1.03 ", "≥ 3.8 ", "≥ 6 ", "≤ 20 ", "≤ 1.05 ", "≤ 1.35 "):
        assert f"| {target}|" in table, target


def test_plot_is_over_thresholds(measured):
    folder, _ = measured
    curve = json.loads((folder / "benchmarks.json").read_text())["curve"]
    assert [point["threshold"] for point in curve] == sorted(point["threshold"] for point in curve)
    costs = [point["layers"] for point in curve]
    assert costs == sorted(costs), "a higher threshold lets nobody leave earlier"
    assert costs[0] == 1 / 4
    assert (folder / "cost_and_time.png").read_bytes().startswith(b"\x89PNG")


def test_where_time_goes(flags, tmp_path):
    run_here("run_benchmarks", *flags, "--rows", "where_time_goes", folder=tmp_path)
    rows = rows_of(tmp_path / "out")
    assert [row["what"] for row in rows] == [
        f"where the time of {name} goes" for name in ("forward",) * 3 + ("predict",) * 3
    ]
    for tokens, layers, outside in (rows[:3], rows[3:]):
        assert 0.5 < tokens["ratio"]["median"] < 2, "about as many tokens as texts are saved"
        assert layers["ratio"]["median"] > 0
        assert outside["ratio"]["median"] > 0


def test_unknown_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there are no rows \['predictions'\]: --rows can be early_exit_in_batches"):
        run_here("run_benchmarks", "--rows", "prediction", "predictions", folder=tmp_path)
