"""The examples run as from the command line, on a tiny encoder and a local file."""

import csv
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import quickstart as quickstart_script
from tests import tiny
from tests.scripts import run_here
from text_data import DataArguments, load_splits


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny.save_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    texts = tiny.sentences(240)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["first", "second", "answer"])
        for first, second in zip(texts[::2], texts[1::2]):
            writer.writerow([first, second, "same" if ("good" in first) == ("good" in second) else "other"])
    return path


@pytest.fixture(scope="module")
def quickstart(encoder, pairs, tmp_path_factory):
    """The folder in which a user ran it, and what was printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    flags = (
        *("--model", encoder, "--dataset", pairs, "--text_column", "first", "--text_pair_column", "second"),
        *("--label_column", "answer", "--exit_layers", 1, 2, 4, "--num_train_epochs", 1, "--output_dir", "out"),
        *("--use_cpu", "True", "--max_length", 32),
    )
    finished = subprocess.run(
        [sys.executable, quickstart_script.__file__, *map(str, flags)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, finished.stdout


def test_quickstart_on_pairs_from_a_local_file(quickstart):
    folder, printed = quickstart
    for step in range(1, 7):
        assert f"[{step}/6]" in printed
    # 36 texts to test a promise on are too few, and it says how many would do.
    assert re.search(r"No promise can be made: .* needs at least \d+ examples to test on", printed)
    assert "plain model, no exits" in printed
    assert "NOTHING WAS PROMISED" in printed or "Nothing leaves early" in printed
    sentences = [line for line in printed.splitlines() if "sure, after layer" in line]
    assert len(sentences) == 4
    assert all(line.split()[0] in ("same", "other") for line in sentences)
    assert (folder / "out" / "checkpoint" / "model.safetensors").exists()
    for name in ("exits.png", "README.md", "exit_report.json"):
        assert (folder / "out" / "checkpoint" / name).exists()
        assert f"checkpoint/{name}" in printed or name == "exit_report.json"
    assert "-m hf_adaptive.serving" in printed
    card = (folder / "out" / "checkpoint" / "README.md").read_text()
    assert "## The exits" in card
    assert "widget" not in card, "texts of one's own are not published"


def test_quickstart_names_a_column_that_is_not_there(encoder, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"has no column \['text', 'label'\]; it has \['first', 'second', 'answer'\]"):
        run_here("quickstart", "--model", encoder, "--dataset", pairs, folder=tmp_path)


def test_nothing_is_calibrated_on_that_the_quickstart_trained_on(pairs):
    columns = {"text_column": "first", "text_pair_column": "second", "label_column": "answer"}
    trained = load_splits(quickstart_script.DemoDataArguments(str(pairs), **columns))["train"]
    held_out = load_splits(DataArguments(str(pairs), **columns))
    seen = set(zip(trained["text"], trained["text_pair"]))
    for name in ("validation", "test"):
        assert seen.isdisjoint(zip(held_out[name]["text"], held_out[name]["text_pair"]))


@tiny.on_few_rows
@tiny.on_rows_used_before
def test_calibrate_takes_the_quickstarts_checkpoint(quickstart, pairs, tmp_path):
    folder, _ = quickstart
    printed = run_here(
        "calibrate",
        *("--checkpoint", folder / "out" / "checkpoint", "--dataset", pairs, "--label_column", "answer"),
        *("--text_column", "first", "--text_pair_column", "second", "--max_length", 32),
        *("--max_disagreement", 0.3, "--output_dir", "calibrated", "--write_pool", "pool.safetensors"),
        folder=tmp_path,
    )
    assert "The reloaded model on unseen test data: cost" in printed
    assert (tmp_path / "calibrated" / "calibration.json").exists()
    pool = load_file(tmp_path / "pool.safetensors")
    assert pool["exit_logits"].shape == (len(pool["labels"]), 3, 2)
