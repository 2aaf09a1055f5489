"""The study of examples/run_papa.py, on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import transformers
from datasets import Dataset

from tests import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_papa.py"
OUTPUTS = {"results.json", "table.md", "scores.png", "attention_weights.png", "constants.png"}


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("run_papa", EXAMPLE)
    module = sys.modules["run_papa"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(study, tmp_path, monkeypatch):
    """Runs the study on a tiny checkpoint and a few random sentences; returns its results."""
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(task="sequence", **flags):
        for name, seed in (("train", 0), ("validation", 1)):
            rows(task, seed).to_parquet(tmp_path / f"{task}-{name}.parquet")
        flags = {
            "model": tmp_path / "model",
            "output_dir": tmp_path / "out",
            "train_file": tmp_path / f"{task}-train.parquet",
            "validation_file": tmp_path / f"{task}-validation.parquet",
            "task": task,
            "max_length": 10,
            "seeds": (0, 1),
            "fractions": (0, 0.5, 1),
            "epochs": 1,
            **flags,
        }
        words = [
            word
            for name, value in flags.items()
            for word in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
        ]
        monkeypatch.setattr(sys, "argv", ["run_papa.py", *words])
        study.main()
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def rows(task, seed):
    sentences = [sentence.split() for sentence in tiny.sentences(40, seed)]
    if task == "token":
        return Dataset.from_dict(
            {"tokens": sentences, "label": [[len(word) % 3 for word in words] for words in sentences]}
        )
    return Dataset.from_dict(
        {"text": [" ".join(words) for words in sentences], "label": [len(words) % 3 for words in sentences]}
    )


@pytest.mark.parametrize("fixed_positions", [False, True])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_one_command_gives_table_pictures_and_results(run, tmp_path, task, fixed_positions):
    results = run(task, fixed_positions=fixed_positions, max_length=14)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= OUTPUTS
    assert [(row["fraction"], row["heads"], len(row["scores"])) for row in results["summary"]] == [
        (0, 0, 2),
        (0.5, 4, 2),
        (1, 8, 2),
    ]
    parameters = [row["parameters"] for row in results["summary"]]
    assert parameters == sorted(parameters, reverse=True)
    baseline, half, _ = results["summary"]
    assert half["relative_drop"] == pytest.approx(1 - half["mean"] / baseline["mean"])
    assert "| 8 (100 %) |" in (tmp_path / "out" / "table.md").read_text()
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in written if str(tmp_path).encode() in file.read_bytes()]


def test_a_stopped_study_goes_on_without_repeating_steps(run, study, tmp_path, monkeypatch):
    whole = run()
    for file in [*OUTPUTS, "runs/constant-1.0000-seed-1.json"]:
        (tmp_path / "out" / file).unlink()
    trained = []
    train = study.Trainer.train
    monkeypatch.setattr(study.Trainer, "train", lambda self: (trained.append(1), train(self)))
    again = run()
    assert len(trained) == 1
    assert [row["scores"] for row in again["summary"]] == [row["scores"] for row in whole["summary"]]
    assert again["head_ranking"] == whole["head_ranking"]


def test_more_seeds_may_be_added_but_other_settings_are_refused(run):
    run(fractions=(0,), seeds=(0,))
    assert len(run(fractions=(0, 1), seeds=(0,))["runs"]) == 2
    with pytest.raises(ValueError, match="other settings: epochs=1"):
        run(epochs=2)


def test_bad_files_and_models_are_named(run, tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.parquet"):
        run(train_file=tmp_path / "train.txt")
    transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"'gpt2' has no PAPA model ForSequenceClassification; supported are albert"):
        run(output_dir=tmp_path / "other")
