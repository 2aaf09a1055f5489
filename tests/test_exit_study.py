"""The study of examples/run_exit_study.py, as from the command line, on a tiny encoder and local files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

import exit_study_both_ends
import run_exit_study
from exit_study_figures import style
from tests import tiny
from tests.scripts import run_here

SCRIPT = Path(run_exit_study.__file__)
FLAGS = (
    *("--model", "encoder", "--tasks", "toy=toy", "pairs=pairs.csv,text=first,pair=second,label=answer"),
    *("--exit_layers", "1", "2", "4", "--seeds", "0", "1", "--num_train_epochs", "1", "--use_cpu", "True"),
    *("--mean_methods", "joint", "multi-model", "open-to-closed", "--cls_methods", "sweet", "--timed_examples", "8"),
    *("--per_device_train_batch_size", "16", "--output_dir"),
)
LAUNCH = (
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
# What is enough to see that another way of running it gives the same: two methods on one task, twice each.
PART = (
    *("--tasks", "toy=toy", "--mean_methods", "joint", "multi-model", "--cls_methods", "none"),
    *("--timed_examples", "0"),
)
RUNS_OF_PART = 2 * 2


def study(folder, *flags):
    """In this process, which has imported what takes longest."""
    run_here(SCRIPT.stem, *FLAGS, *flags, folder=folder)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_alike(found, expected):
    """The same values, numbers up to the order in which another process adds."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_alike(found[key], value)
    elif isinstance(expected, list):
        for own, value in zip(found, expected, strict=True):
            assert_alike(own, value)
    else:
        assert found == (pytest.approx(expected, rel=1e-5, abs=1e-6) if isinstance(expected, float) else expected)


def assert_part_of(whole, part):
    """The runs of `PART` have the results that they have in the whole study."""
    found, expected = results(part), results(whole)
    runs = [run for run in expected["runs"] if run["task"] == "toy" and run["method"] in ("joint", "multi-model")]
    assert len(runs) == RUNS_OF_PART
    assert_alike(found["runs"], runs)
    own, theirs = (values["summary"]["settings"]["toy, mean"]["exits"] for values in (found, expected))
    assert own.keys() == {"joint", "multi-model"}
    assert_alike(own, {method: theirs[method] for method in own})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an encoder and two tasks."""
    folder = tmp_path_factory.mktemp("study")
    tiny.save_encoder(folder / "encoder")
    (folder / "toy").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        texts = tiny.sentences(60, seed)
        rows = {"text": texts, "label": [int("good" in text) for text in texts]}
        Dataset.from_dict(rows).to_parquet(folder / "toy" / f"{split}.parquet")
    texts = tiny.sentences(120, 2)
    answers = ["same" if len(first) > len(second) else "other" for first, second in zip(texts[::2], texts[1::2])]
    pairs = {"first": texts[::2], "second": texts[1::2], "answer": answers}
    Dataset.from_dict(pairs).to_csv(folder / "pairs.csv")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Of the study in one go, on one process: the output folder."""
    cards = ("--cards_dir", folder / "cards", "--card_methods", "multi-model", "sweet")
    study(folder, "whole", *cards)
    return folder / "whole"


def test_every_run_is_in_the_results(whole):
    found = results(whole)
    wanted = {
        (task, pooling, method, seed)
        for task in ("toy", "pairs")
        for pooling, method in (
            ("mean", "joint"),
            ("mean", "multi-model"),
            ("mean", "open-to-closed"),
            ("cls", "sweet"),
        )
        for seed in (0, 1)
    }
    assert {(run["task"], run["pooling"], run["method"], run["seed"]) for run in found["runs"]} == wanted
    for run in found["runs"]:
        assert len(run["report"]["accuracy"]) == 3
        records = run["gradient_conflict"]
        assert (records is not None) == (run["seed"] == 0 and run["method"] in ("joint", "sweet"))
    assert set(found["summary"]["settings"]) == {"toy, mean", "toy, cls", "pairs, mean", "pairs, cls"}


def test_tables_and_figures(whole):
    found = results(whole)
    table = (whole / "results.md").read_text()
    joint = found["summary"]["settings"]["toy, mean"]["exits"]["joint"][0]
    assert f"| joint | {100 * joint['mean']:.1f} ± {100 * joint['half']:.1f} |" in table
    assert sum(joint["values"]) / 2 == pytest.approx(joint["mean"])
    assert {file.name for file in (whole / "figures").iterdir()} == {
        *(f"{kind}-{task}-{pooling}.svg" for kind in ("curves", "exits") for task in ("toy", "pairs")
          for pooling in ("mean", "cls")),
        *(f"gradient-conflict-{task}-{pooling}.svg" for task in ("toy", "pairs") for pooling in ("mean", "cls")),
        *("time.svg", "score-over-time.svg"),
    }  # fmt: skip


def test_nothing_tells_of_the_machine_that_trained(whole, folder):
    written = [file for place in (whole, folder / "cards") for file in place.rglob("*") if file.is_file()]
    assert not [file for file in written if str(folder).encode() in file.read_bytes()]


def test_numbers_on_the_cards_are_of_the_json(whole, folder):
    found = results(whole)
    run = next(run for run in found["runs"] if (run["task"], run["method"], run["seed"]) == ("toy", "multi-model", 0))
    card = (folder / "cards" / "toy-multi-model" / "README.md").read_text()
    for score in run["report"]["accuracy"]:
        assert f"| {score:.4f} |" in card
    assert "| training examples |" in card
    assert (folder / "cards" / "toy-multi-model" / "exits.png").exists()
    assert (folder / "cards" / "pairs-sweet" / "cls" / "README.md").exists()


def test_a_killed_study_goes_on_to_the_same_results_on_two_processes(whole, folder):
    command = [str(SCRIPT), *FLAGS, "killed", *PART]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    runs = folder / "killed" / "runs"
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(runs.glob("*.json")):
        assert process.poll() is None, "the study ended before its first run"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert 0 < len(written) < RUNS_OF_PART
    done = subprocess.run(
        [sys.executable, *LAUNCH, *command], cwd=folder, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_part_of(whole, folder / "killed")
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_seeds_may_be_added_but_other_settings_are_refused(whole, folder, monkeypatch):
    shutil.copytree(whole / "runs", folder / "more" / "runs")
    shutil.copytree(whole / "checkpoints", folder / "more" / "checkpoints")
    shutil.copy(whole / "settings.json", folder / "more")
    with pytest.raises(ValueError, match=r"holds results of other settings: learning_rate=0\.0002"):
        study(folder, "more", "--learning_rate", "1e-5")
    monkeypatch.setattr(run_exit_study, "write_figures", lambda *_: None)  # those of the whole study are looked at
    study(folder, "more", "--seeds", 0, 1, 2, "--mean_methods", "joint", "--cls_methods", "none")
    found = results(folder / "more")
    assert [run["seed"] for run in found["runs"] if run["task"] == "toy"] == [0, 1, 2]


def test_bad_tasks_and_methods_are_named():
    with pytest.raises(ValueError, match=r"a task must be name=source, .* got 'toy=toy,txt=text'"):
        run_exit_study.Task.parse("toy=toy,txt=text")
    with pytest.raises(ValueError, match="got 'toy'"):
        run_exit_study.Task.parse("toy")
    for method in ("share-2", "share-", "swet", "joint+twig", "joint+distilled+branch", "multi-model+branch"):
        with pytest.raises(ValueError, match=re.escape(f"unknown method '{method}'")):
            run_exit_study.methods_named(["joint", method])
    assert run_exit_study.methods_named(["share-0.3+branch", "sweet+branch+distilled"])


def report(first, last, dearest=1.0):
    """Of two exits, and thresholds between leaving at once and running everything."""
    curve = [{"cost": 0.1, "accuracy": first}, {"cost": 0.5, "accuracy": last}]
    return {
        "exit_layers": [1, 4],
        "costs": [0.1, dearest],
        "accuracy": [first, last],
        "curve": curve,
        "num_examples": 10,
    }


def test_the_page_on_both_ends_says_what_was_kept_and_what_was_missed(tmp_path, monkeypatch):
    scores = {
        "joint": (0.70, 0.90),
        "sweet": (0.80, 0.84),
        "multi-model": (0.81, 0.90),
        "joint+branch+distilled": (0.81, 0.89),
        "joint+branch": (0.81, 0.89),
    }
    (tmp_path / "runs").mkdir()
    for method, (first, last) in scores.items():
        for seed in (0, 1) if method == "joint+branch" else (0, 1, 2):
            shift = seed / 1000
            run = {"task": "toy", "pooling": "mean", "method": method, "seed": seed}
            run["report"] = report(first + shift, last + shift, 1.5 if "branch" in method else 1.0)
            (tmp_path / "runs" / f"{method}-{seed}.json").write_text(json.dumps(run))
    settings = {"model": "tiny", "exit_layers": [1, 4], "max_train_examples": 9, "num_train_epochs": 1.0}
    settings |= {"learning_rate": 1e-4, "tasks": {"toy": {}, "not yet": {}}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path), str(tmp_path / "page")])
    exit_study_both_ends.main()
    page = (tmp_path / "page" / "results.md").read_text()
    assert "| toy | last exit ≥ plain − 0.3 | -1.0 ± 0.0 | **no** |" in page
    assert "| toy | first exit ≥ its depth alone − 0.5 | +0.0 ± 0.0 | yes |" in page
    assert "| joint | 70.1 ± 0.2 | 90.1 ± 0.2 | 1.00 |" in page
    assert "| joint+branch |" not in page  # a seed is missing
    assert (tmp_path / "page" / "curves-toy.svg").exists()
    task = json.loads((tmp_path / "page" / "results.json").read_text())["tasks"][0]
    assert len(task["methods"]["sweet"]["curve"]) == 3


def test_every_method_has_a_style_of_its_own():
    methods = ["joint", "sweet", "multi-model", "share-0.3", "joint+branch", "joint+branch+distilled", "sweet+branch"]
    styles = [tuple(style(method, methods).items()) for method in methods]
    assert len(set(styles)) == len(methods)
