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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of every architecture and the folder that it is saved in."""
    root = tmp_path_factory.mktemp("saved")
    models = {}
    for name in tiny.ARCHITECTURES:
        model = tiny.model(name, id2label={0: "bad", 1: "so-so", 2: "good"}, **FIELDS[name])
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
        models[name] = model, root / name
    return models


@pytest.fixture(scope="module")
def elsewhere(models, tmp_path_factory):
    """What a process without the package says of every checkpoint, from its folder and from the Hub's cache."""
    folder = tmp_path_factory.mktemp("elsewhere")
    checkpoints = {}
    for name, (model, path) in models.items():
        fresh_process.put_into_hub_cache(path, folder / "home", REPOSITORY.format(name))
        thresholds = tiny.thresholds_between(model, INPUTS)
        again = str(folder / f"again-{name}")
        checkpoints[f"{name}-folder"] = {"path": str(path), "thresholds": thresholds, "save_to": again}
        checkpoints[f"{name}-hub"] = {"path": REPOSITORY.format(name), "thresholds": thresholds, "save_to": None}
    found = fresh_process.answers_without_package(folder, checkpoints, INPUTS, TEXTS, HF_HUB_OFFLINE="1")
    return found, folder


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_answers_are_the_same(name, source, models, elsewhere):
    model, path = models[name]
    _, tensors = elsewhere[0][f"{name}-{source}"]
    expected = answers(model, INPUTS, tiny.thresholds_between(model, INPUTS))
    for key, tensor in expected.items():
        tiny.assert_alike(tensors[key], tensor)
    tiny.assert_alike(tensors["backbone"], AutoModel.from_pretrained(path)(**INPUTS).last_hidden_state)
    assert len(tensors["early/exit_index"].unique()) > 1
    assert tensors["changed/exit_index"].tolist() == [0] * 12


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_pipelines_say_the_same(name, source, models, elsewhere):
    _, path = models[name]
    expected = classified(str(path), AutoTokenizer.from_pretrained(path), TEXTS)
    texts = elsewhere[0][f"{name}-{source}"][0]["texts"]
    for own, other in zip(texts, expected, strict=True):
        assert [score["label"] for score in own] == [score["label"] for score in other]
        assert [score["score"] for score in own] == pytest.approx([score["score"] for score in other], abs=2e-6)
    assert {score["label"] for score in texts[0]} == {"bad", "so-so", "good"}
    assert len({round(scores[0]["score"], 3) for scores in texts}) > 3


@pytest.mark.parametrize("source", ["folder", "hub"])
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
    files = {file.name for file in path.iterdir() if "token" not in file.name}
    assert {file.name for file in again.iterdir()} == files
    for file in files - {"config.json"}:
        assert (again / file).read_bytes() == (path / file).read_bytes(), file
    saved, own = (json.loads((folder / "config.json").read_text()) for folder in (again, path))
    assert saved == own


def test_a_model_saved_elsewhere_loads_elsewhere_and_here(models, elsewhere, tmp_path):
    model, _ = models["roberta"]
    again = elsewhere[1] / "again-roberta"
    tiny.tokenizer().save_pretrained(again)
    thresholds = tiny.thresholds_between(model, INPUTS)
    expected = answers(model, INPUTS, thresholds)
    job = {"again": {"path": str(again), "thresholds": thresholds, "save_to": None}}
    _, tensors = fresh_process.answers_without_package(tmp_path, job, INPUTS, TEXTS, HF_HUB_OFFLINE="1")["again"]
    here = answers(AutoModelForSequenceClassification.from_pretrained(again), INPUTS, thresholds)
    for key, tensor in expected.items():
        tiny.assert_alike(tensors[key], tensor)
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
