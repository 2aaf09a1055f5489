"""Whatever a public function is given, it answers, or says which argument is wrong."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import hf_adaptive
from tests import tiny

ROWS = [{"input_ids": [5, 6 + row], "label": row % 3} for row in range(6)]
MODEL = tiny.model()
MEMBERS = [tiny.plain_model(num_hidden_layers=depth) for depth in (1, 2)]
CASCADE = hf_adaptive.CascadeForSequenceClassification.from_models(MEMBERS)
PAPA = hf_adaptive.PapaBertForSequenceClassification(
    hf_adaptive.PapaBertConfig(**tiny.plain_config().to_dict(), constant_length=8)
)
BATCH = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([0, 1])}
REPORT = hf_adaptive.evaluate_exits(MODEL, ROWS, timed_examples=0, show_progress=False)

WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(allow_nan=True, allow_infinity=True, width=16),
    st.text("ab1", max_size=3),
    st.binary(max_size=2),
    st.sampled_from([(), [], {}, set(), object(), object, len, iter([1])]),
    st.lists(st.one_of(st.integers(-2, 70), st.none(), st.text("ab", max_size=2), st.floats(width=16)), max_size=4),
    st.lists(st.lists(st.integers(-1, 70), max_size=3), max_size=3),
    st.dictionaries(st.sampled_from(["input_ids", "labels", "label", "x"]), st.lists(st.integers(-1, 9)), max_size=2),
    st.lists(
        st.dictionaries(
            st.sampled_from(["input_ids", "attention_mask", "label"]),
            st.one_of(st.lists(st.integers(-1, 70), max_size=3), st.integers(-1, 4), st.none()),
            max_size=3,
        ),
        max_size=3,
    ),
    st.sampled_from(
        [
            np.array([0.5, 2]),
            np.array(["a"]),
            np.zeros((2, 2)),
            torch.tensor([[1, 2], [3, 4]]),
            torch.tensor([1.5]),
            torch.zeros(2, 3, 4),
            torch.tensor([]),
            MEMBERS[0],
            MODEL.config,
        ]
    ),
)


def predict(**given):
    return MODEL.predict(**{"examples": ROWS, "show_progress": False, **given})


def evaluate(**given):
    arguments = {"model": MODEL, "dataset": ROWS, "timed_examples": 0, "show_progress": False}
    return hf_adaptive.evaluate_exits(**{**arguments, **given})


def calibrate(**given):
    arguments = {"model": tiny.model(), "dataset": ROWS, "show_progress": False, "temperatures": False}
    wish = {} if {"target_cost", "max_accuracy_drop", "max_disagreement"} & given.keys() else {"target_cost": 0.5}
    return hf_adaptive.calibrate_exits(**{**arguments, **wish, **given})


def configure(**given):
    return tiny.config(**given)


def configure_papa(**given):
    return hf_adaptive.PapaBertConfig(**{**tiny.plain_config().to_dict(), "constant_length": 8, **given})


def use_field(**given):
    model = tiny.model()
    for name, value in given.items():
        setattr(model.config, name, value)
    return model(BATCH["input_ids"], exit_thresholds=0.5)


def forward(model):
    return lambda **given: model(**{**BATCH, **given})


def conflict(**given):
    return hf_adaptive.gradient_conflict(**{"model": MODEL, "batch": BATCH, **given})


def record(**given):
    return hf_adaptive.GradientConflictRecorder(**{"batch": BATCH, **given})


def average(**given):
    arguments = {"model": MEMBERS[0], "dataloader_or_dataset": ROWS, "max_length": 4}
    return hf_adaptive.mean_attention(**{**arguments, **given})


def rank(**given):
    arguments = {"model": PAPA, "constants": torch.zeros(1), "train_dataset": ROWS}
    return hf_adaptive.rank_heads(**{**arguments, "args": TrainingArguments(report_to=[], use_cpu=True), **given})


def schedule(**given):
    return hf_adaptive.RoutingSchedule(**{"start": "joint", "end": "sweet", **given})


FUNCTIONS = {
    "predict": (predict, ["examples", "batch_size", "exit_thresholds", "exit_at"]),
    "forward": (
        forward(MODEL),
        ["input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "exit_thresholds", "exit_at"],
    ),
    "forward of a cascade": (
        forward(CASCADE),
        ["input_ids", "attention_mask", "token_type_ids", "labels", "exit_thresholds", "exit_at"],
    ),
    "evaluate_exits": (evaluate, ["model", "dataset", "metric", "thresholds", "batch_size", "timed_examples"]),
    "calibrate_exits": (
        calibrate,
        [
            "model",
            "dataset",
            "target_cost",
            "max_accuracy_drop",
            "max_disagreement",
            "confidence",
            "batch_size",
            "seed",
        ],
    ),
    "configuration": (
        configure,
        ["exit_layers", "exit_routing", "exit_loss_weights", "exit_pooling", "exit_criterion", "exit_thresholds"]
        + ["exit_temperatures", "exit_tolerance", "constant_heads", "constant_length", "num_labels"],
    ),
    "configuration of PAPA": (configure_papa, ["constant_heads", "constant_length", "trainable_part"]),
    "fields set later": (
        use_field,
        ["exit_pooling", "exit_criterion", "exit_thresholds", "exit_temperatures", "exit_tolerance"],
    ),
    "from_config": (hf_adaptive.AutoModelForSequenceClassificationWithExits.from_config, ["config"]),
    "from_models": (hf_adaptive.CascadeForSequenceClassification.from_models, ["models"]),
    "ExitReport.from_dict": (hf_adaptive.ExitReport.from_dict, ["values"]),
    "ExitReport.point_at_cost": (REPORT.point_at_cost, ["cost"]),
    "gradient_conflict": (conflict, ["model", "batch"]),
    "GradientConflictRecorder": (record, ["batch", "every"]),
    "mean_attention": (average, ["model", "dataloader_or_dataset", "max_length", "batch_size", "save_every"]),
    "rank_heads": (rank, ["model", "constants", "args"]),
    "RoutingSchedule": (schedule, ["start", "end", "shape"]),
    "register_architecture": (hf_adaptive.register_architecture, ["architecture"]),
}
# What a message may call an argument instead.
ALSO_CALLED = {
    "dataset": ("examples", "data set", "labels"),
    "dataloader_or_dataset": ("examples", "dataset", "mean_attention"),
    "models": ("cascade",),
    "model": ("needs a",),
    "labels": ("label",),
    "values": ("report",),
    "input_ids": ("batch",),
    "metric": ("score",),
    "confidence": ("examples",),
    "thresholds": ("exit_thresholds",),
}


@pytest.mark.parametrize(("name", "argument"), [(name, one) for name in FUNCTIONS for one in FUNCTIONS[name][1]])
def test_wrong_argument_is_named(name, argument):
    function = FUNCTIONS[name][0]

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(wrong=WRONG)
    def try_it(wrong):
        assume(argument != "metric" or not callable(wrong))  # its errors are its own
        try:
            function(**{argument: wrong})
        except (ValueError, TypeError, OSError) as error:
            says = str(error)
        else:
            return
        names = (argument, *ALSO_CALLED.get(argument, ()))
        assert any(one in says for one in names), f"{wrong!r}: {says}"

    try_it()


@pytest.mark.parametrize(
    "content", [None, "", "[]", "null", "3", '"text"', "{}", "{not json", '{"model_type": "none"}']
)
def test_a_folder_that_holds_no_model(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    loaders = [
        hf_adaptive.AutoModelForSequenceClassificationWithExits,
        hf_adaptive.BertForSequenceClassificationWithExits,
        hf_adaptive.CascadeForSequenceClassification,
        hf_adaptive.PapaBertForSequenceClassification,
    ]
    for loader in loaders:
        with pytest.raises((ValueError, OSError), match=r"config\.json|model_type|of type") as error:
            loader.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value) or "model_type" in str(error.value)


@tiny.on_few_rows
def test_one_exit_has_nothing_to_calibrate_but_its_temperature():
    model = tiny.model(exit_layers=[4])
    with pytest.raises(ValueError, match=r"target_cost=0.5 is about leaving early, and the model has one exit only"):
        hf_adaptive.calibrate_exits(model, ROWS, target_cost=0.5, show_progress=False)
    report = hf_adaptive.calibrate_exits(model, ROWS, show_progress=False)
    assert len(report.temperatures) == 1


@tiny.on_few_rows
def test_a_criterion_without_its_units():
    model = tiny.model()
    model.config.exit_criterion = "learned"
    with pytest.raises(ValueError, match="exit_criterion='learned' needs the units"):
        model(BATCH["input_ids"], exit_thresholds=0.5)
    with pytest.raises(ValueError, match="exit_criterion='learned' needs the units"):
        hf_adaptive.evaluate_exits(model, ROWS, show_progress=False)
    with pytest.raises(ValueError, match="exit_criterion='learned' needs the units"):
        hf_adaptive.calibrate_exits(model, ROWS, target_cost=0.5, show_progress=False)


def test_patience_in_regression_needs_a_tolerance():
    model = tiny.model(num_labels=1, exit_criterion="patience")
    numbers = [{**row, "label": 0.5} for row in ROWS]
    with pytest.raises(ValueError, match="needs exit_tolerance"):
        model.predict(ROWS, exit_thresholds=2, show_progress=False)
    with pytest.raises(ValueError, match="needs exit_tolerance"):
        hf_adaptive.calibrate_exits(model, numbers, max_disagreement=0.1, show_progress=False)
    model.config.exit_tolerance = -1
    with pytest.raises(ValueError, match=r"exit_tolerance must be a finite number of at least 0.*got -1"):
        model.predict(ROWS, exit_thresholds=2, show_progress=False)


def test_reports_that_are_none(tmp_path):
    for content in ("{}", "[]", "3", "null", "{", json.dumps({**REPORT.to_dict(), "curve": 3})):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=r"report|JSON|Expecting"):
            hf_adaptive.ExitReport.from_json(tmp_path / "report.json")
