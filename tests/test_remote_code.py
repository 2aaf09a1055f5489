"""A checkpoint works where this package is not installed, with the same answers."""

import json
import shutil

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import hf_adaptive
from tests import fresh_process, tiny
from tests.without_package import answers, classified

TEXTS = tiny.sentences(12)
INPUTS = tiny.batch(rows=12)
REPOSITORY = "someone/tiny-{}-with-exits"
FIELDS = {
    "bert": {"exit_thresholds": [None, 0.45], "exit_pooling": "mean"},
    "deberta": {"exit_thresholds": [0.5, 0.5], "exit_temperatures": [1.0, 2.0, 0.5]},
    "mpnet": {"problem_type": "multi_label_classification", "exit_thresholds": [0.55, None]},
    "roberta": {"exit_thresholds": [0.5, None], "exit_pooling": "last", "exit_routing": 0.5},
}
# How a checkpoint is reached does not depend on its architecture. "again" is what the process saved from "folder".
SOURCES = [
    *((name, "folder") for name in tiny.ARCHITECTURES),
    *(("bert", "hub"), ("roberta", "hub"), ("roberta", "again")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of every architecture and the folder that it is saved in."""
    root = tmp_path_factory.mktemp("saved")
    models = {}
    for name in tiny.ARCHITECTURES:
        model = tiny.model(name, id2label={0: "bad", 1: "so-so", 2: "good"}, **FIELDS[name])
        # Folders of one name have one copy of the code elsewhere, which is imported once.
        folder = root / name / "checkpoint"
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        models[name] = model, folder
    return models


@pytest.fixture(scope="module")
def elsewhere(models, tmp_path_factory):
    """What a process without the package says of checkpoints in folders, in the Hub's cache, and saved by itself."""
    folder = tmp_path_factory.mktemp("elsewhere")
    checkpoints = {}
    for name, source in SOURCES:
        model, path = models[name]
        again = str(folder / f"again-{name}")
        checkpoint = {"thresholds": tiny.thresholds_between(model, INPUTS), "save_to": None}
        if source == "folder":
            checkpoint |= {"path": str(path), "save_to": again}
        elif source == "hub":
            fresh_process.put_into_hub_cache(path, folder / "home", REPOSITORY.format(name))
            checkpoint["path"] = REPOSITORY.format(name)
        else:
            checkpoint["path"] = again
        checkpoints[f"{name}-{source}"] = checkpoint
    found = fresh_process.answers_without_package(folder, checkpoints, INPUTS, TEXTS, HF_HUB_OFFLINE="1")
    return found, folder


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_answers_are_the_same(name, source, models, elsewhere):
    model, path = models[name]
    _, tensors = elsewhere[0][f"{name}-{source}"]
    expected = answers(model, INPUTS, tiny.thresholds_between(model, INPUTS))
    for key, tensor in expected.items():
        tiny.assert_alike(tensors[key], tensor)
    tiny.assert_alike(tensors["backbone"], AutoModel.from_pretrained(path)(**INPUTS).last_hidden_state)
    assert len(tensors["early/exit_index"].unique()) > 1
    assert tensors["changed/exit_index"].tolist() == [0] * 12


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_pipelines_say_the_same(name, source, models, elsewhere):
    _, path = models[name]
    expected = classified(str(path), AutoTokenizer.from_pretrained(path), TEXTS)
    texts = elsewhere[0][f"{name}-{source}"][0]["texts"]
    for own, other in zip(texts, expected, strict=True):
        assert [score["label"] for score in own] == [score["label"] for score in other]
        assert [score["score"] for score in own] == pytest.approx([score["score"] for score in other], abs=2e-6)
    assert {score["label"] for score in texts[0]} == {"bad", "so-so", "good"}
    assert len({round(scores[0]["score"], 3) for scores in texts}) > 3


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_classes_come_with_the_checkpoint(name, source, elsewhere):
    classes = elsewhere[0][f"{name}-{source}"][0]["classes"]
    prefix = hf_adaptive.ARCHITECTURES[name].name
    assert all(path.startswith("transformers_modules.") for path in classes.values())
    assert {kind: path.rpartition(".")[2] for kind, path in classes.items()} == {
        "config": f"{prefix}WithExitsConfig",
        "model": f"{prefix}ForSequenceClassificationWithExits",
        "backbone": f"{prefix}WithExitsModel",
    }


def test_a_model_saved_elsewhere_is_the_same_checkpoint(name, models, elsewhere):
    _, path = models[name]
    again = elsewhere[1] / f"again-{name}"
    files, found = ({file.name for file in place.iterdir() if "token" not in file.name} for place in (path, again))
    assert found == files
    for file in files - {"config.json"}:
        assert (again / file).read_bytes() == (path / file).read_bytes(), file
    saved, own = (json.loads((folder / "config.json").read_text()) for folder in (again, path))
    assert saved == own


def test_a_model_saved_elsewhere_loads_here(models, elsewhere):
    model, _ = models["roberta"]
    thresholds = tiny.thresholds_between(model, INPUTS)
    again = AutoModelForSequenceClassification.from_pretrained(elsewhere[1] / "again-roberta")
    here = answers(again, INPUTS, thresholds)
    for key, tensor in answers(model, INPUTS, thresholds).items():
        tiny.assert_alike(here[key], tensor)


@pytest.mark.parametrize("trust", [True, False, None])
def test_the_imported_package_goes_before_the_code_in_the_checkpoint(name, trust, models, tmp_path):
    model, path = models[name]
    folder = shutil.copytree(path, tmp_path / "checkpoint")
    (folder / "exits.py").write_text("raise RuntimeError('the copy ran')")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is type(model.config)
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)).__module__.startswith("hf_adaptive.")
