"""The study of examples/run_papa.py, on a tiny model."""

import json

import pytest
import torch
import transformers
from datasets import Dataset

import papa_study_parts
import papa_study_results
import run_papa
from tests import tiny
from tests.scripts import run_here

FIGURES = {"scores.svg", "heads-model.png", "constants-model.png"}


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint, and three tasks of random sentences."""
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    for task in ("texts", "words", "pairs"):
        (tmp_path / task).mkdir()
        for split, count in (("train", 60), ("test", 20)):
            rows(task, count, len(split)).to_parquet(tmp_path / task / f"{split}.parquet")
    return tmp_path


@pytest.fixture
def run(folder):
    """Runs the study; returns its results."""

    def run(*tasks, **flags):
        flags = {
            "models": (folder / "model",),
            "output_dir": folder / "out",
            "tasks": tuple(f"{task}={folder / task},length=14" for task in tasks),
            "seeds": (0, 1),
            "fractions": (0, 0.5, 1),
            "epochs": 1,
            "ranking_epochs": 1,
            "exits_epochs": 1,
            "timed_examples": 4,
            **flags,
        }
        words = [
            word
            for name, value in flags.items()
            for word in (f"--{name}", *(value if isinstance(value, tuple) else [value]))
        ]
        run_here("run_papa", *words, folder=folder)
        return json.loads((folder / "out" / "page" / "results.json").read_text())

    return run


@pytest.fixture
def no_figures(monkeypatch):
    """To draw takes longest, and the first test looks at what is drawn."""
    for draw in ("draw_scores", "plot_head_ranks", "plot_constants"):
        monkeypatch.setattr(papa_study_results, draw, lambda *_: None)


def rows(task, count, seed):
    sentences = [sentence.split() for sentence in tiny.sentences(count, seed)]
    if task == "words":
        return Dataset.from_dict(
            {"tokens": sentences, "label": [[len(word) % 3 for word in words] for words in sentences]}
        )
    texts = [" ".join(words) for words in sentences]
    labels = [len(words) % 3 for words in sentences]
    if task == "pairs":
        return Dataset.from_dict({"sentence1": texts, "sentence2": texts[::-1], "label": labels})
    return Dataset.from_dict({"text": texts, "label": labels})


@pytest.mark.parametrize("fixed_positions", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_command_gives_a_page_on_all_tasks(run, folder, fixed_positions):
    results = run("texts", "words", "pairs", fixed_positions=fixed_positions)
    page = folder / "out" / "page"
    assert {file.name for file in page.iterdir()} >= {"results.md", "results.json", *FIGURES}
    parts = {part["task"]: part for part in results["parts"]}
    assert {task: part["metric"] for task, part in parts.items()} == {
        "texts": "accuracy",
        "words": "token accuracy",
        "pairs": "accuracy",
    }
    for part in parts.values():
        assert [(row["fraction"], row["constant_heads"], list(row["by_seed"])) for row in part["scores"]] == [
            (0, 0, ["0", "1"]),
            (0.5, 4, ["0", "1"]),
            (1, 8, ["0", "1"]),
        ]
        parameters = [row["parameters"] for row in part["scores"]]
        assert parameters == sorted(parameters, reverse=True)
    words = (page / "results.md").read_text()
    assert "| score | most frequent label | no head constant | 50 % | all |" in words
    written = [file for file in folder.joinpath("out").rglob("*") if file.is_file()]
    assert not [file for file in written if str(folder).encode() in file.read_bytes()]


def test_stored_states_give_the_answers_of_the_whole_model(folder):
    """The probe is trained and scored on what the frozen backbone gave once."""
    task = papa_study_parts.Task.parse(f"texts={folder / 'texts'},length=14")
    part = papa_study_parts.Part(
        str(folder / "model"), task, run_papa.StudyArguments(tasks=[], output_dir=str(folder / "out"))
    )
    model = part.papa_model(1, 0).eval()
    stored = papa_study_parts.collate_states(part._stored_states(model, "test"))
    expected = torch.cat([model(**batch).logits for batch in part.batches("test")])
    setattr(model, model.base_model_prefix, papa_study_parts.StoredStates(1 + model.config.num_hidden_layers))
    torch.testing.assert_close(model(**stored).logits, expected, atol=5e-3, rtol=0)


def test_a_stopped_study_goes_on_without_repeating_steps(run, folder, no_figures, monkeypatch):
    whole = run("texts")
    (folder / "out" / "page" / "results.json").unlink()
    next(folder.joinpath("out").rglob("constant-1.0000-seed-1.json")).unlink()
    trained = []
    train = transformers.Trainer.train
    monkeypatch.setattr(transformers.Trainer, "train", lambda self: (trained.append(1), train(self)))
    again = run("texts")
    assert len(trained) == 1
    assert again == whole


def test_more_may_be_added_but_other_settings_are_refused(run, no_figures):
    run("texts", fractions=(0,), seeds=(0,))
    (part,) = run("texts", fractions=(0, 1), seeds=(0,))["parts"]
    assert [row["fraction"] for row in part["scores"]] == [0, 1]
    with pytest.raises(ValueError, match="other settings: epochs=1"):
        run("texts", epochs=2)


@tiny.on_few_rows
def test_constant_heads_and_exits_alone_and_together_with_their_time(run, folder, no_figures):
    flags = {"exits_on": ("model/texts",), "seeds": (0,)}
    (part,) = run("texts", **flags)["parts"]
    methods = {one["method"]: one for one in part["exits"]}
    assert set(methods) == {"neither", "constant heads", "exits", "both"}
    assert methods["neither"]["exit_layers"] == methods["constant heads"]["exit_layers"] == [4]
    assert methods["both"]["exit_layers"] == methods["exits"]["exit_layers"] != [4]
    assert all(0 < one["cost"] <= 1 for one in methods.values())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "out/parts/model/texts/checkpoints/both"
    )
    assert len(model.config.constant_heads) == 4
    timing = run("texts", **flags, measure_time=True)["timing"]["parts"]["model/texts"]
    assert set(timing["heads"]) == {"stock", "0.5000", "1.0000"}
    assert timing["exits"]["neither"]["ratio"] == 1
    assert all(one["ratio"] > 0 for one in timing["exits"].values())


def test_bad_tasks_and_models_are_named(run, folder):
    with pytest.raises(ValueError, match=r"a task must be name=folder.*got 'texts'"):
        run(tasks=("texts",))
    with pytest.raises(ValueError, match=r"exits_on names \['model/words'\], but the parts are model/texts"):
        run("texts", exits_on=("model/words",))
    with pytest.raises(ValueError, match=r"must have one file train that ends in one of \.parquet"):
        run(tasks=(f"texts={folder}",), output_dir=folder / "another")
    transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(folder / "model")
    with pytest.raises(ValueError, match=r"'gpt2' has no PAPA model ForSequenceClassification; supported are albert"):
        run("texts", output_dir=folder / "other")
