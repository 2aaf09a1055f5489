"""Whatever a public function is given, it answers, or says which argument is wrong."""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import hf_adaptive
from hf_adaptive.serving import DeadlineExceededError, ExitsEngine
from tests import tiny

ROWS = [{"input_ids": [5, 6 + row], "label": row % 3} for row in range(6)]
MODEL = tiny.model()
MEMBERS = [tiny.plain_model(num_hidden_layers=depth) for depth in (1, 2)]
CASCADE = hf_adaptive.CascadeForSequenceClassification.from_models(MEMBERS)
PAPA = hf_adaptive.PapaBertForSequenceClassification(
    hf_adaptive.PapaBertConfig(**tiny.plain_config().to_dict(), constant_length=8)
)
TOKENIZER = tiny.tokenizer()
BATCH = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([0, 1])}
_KEPT = tempfile.TemporaryDirectory()
CHECKPOINTS = Path(_KEPT.name)
MEMBERS[1].save_pretrained(CHECKPOINTS / "plain")
CASCADE.save_pretrained(CHECKPOINTS / "cascade")
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
    """Not carried out where nothing is wrong: the constants do not fit, which is found out last."""
    arguments = {"model": PAPA, "constants": torch.zeros(1), "train_dataset": ROWS, "args": arguments_of_training()}
    try:
        return hf_adaptive.rank_heads(**{**arguments, **given})
    except ValueError as error:
        if "constants" in given or "constants must have the shape" not in str(error):
            raise


def from_pretrained(**given):
    arguments = {"pretrained_model_name_or_path": CHECKPOINTS / "plain", "exit_layers": [1, 2]}
    return hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(**{**arguments, **given})


def papa_from_pretrained(**given):
    choice = 0.5 if "head_ranking" in given else [[0, 1]]
    arguments = {"constants": torch.zeros(2, 2, 8, 8), "constant_heads": choice}
    loader = hf_adaptive.PapaBertForSequenceClassification
    return loader.from_pretrained(CHECKPOINTS / "plain", **{**arguments, **given})


def cascade_from_pretrained(**given):
    loader = hf_adaptive.CascadeForSequenceClassification
    return loader.from_pretrained(**{"pretrained_model_name_or_path": CHECKPOINTS / "cascade", **given})


def cascade_from_backbone(**given):
    arguments = {"pretrained_model_name_or_path": CHECKPOINTS / "plain", "depths": [1, 2]}
    return hf_adaptive.CascadeForSequenceClassification.from_backbone(**{**arguments, **given})


def stream(**given):
    return list(MODEL.predict_stream(**{"examples": ROWS, **given}))


def classify(**given):
    return make_pipeline()(**{"inputs": ["good film", "bad"], **given})


def make_pipeline(**given):
    return hf_adaptive.ExitsTextClassificationPipeline(**{"model": MODEL, "tokenizer": TOKENIZER, **given})


def make_trainer(**given):
    arguments = {"model": MODEL, "args": arguments_of_training(), "train_dataset": ROWS}
    return hf_adaptive.ExitsTrainer(**{**arguments, **given})


def train(**given):
    return make_trainer().train(**given)


def arguments_of_training():
    return TrainingArguments(CHECKPOINTS / "trained", report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)


def serve(**given):
    ExitsEngine(**{"model": MODEL, "audit_share": 0.0, **given}).close()


def submit(**given):
    with ExitsEngine(MODEL, tokenizer=TOKENIZER, audit_share=0.0) as engine:
        try:
            return engine.submit(**{"example": ROWS[0], **given}).result()
        except DeadlineExceededError:  # that was soon
            return None


def export(**given):
    """Not carried out where nothing is wrong: that would take seconds."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = CHECKPOINTS / "plain" / "config.json"
    with contextlib.suppress(NotADirectoryError):
        hf_adaptive.export_onnx(**{"model": MODEL, "folder": file / "below a file", **given})


def load_exported(**given):
    exported()
    return hf_adaptive.OnnxClassifierWithExits.from_pretrained(**{"folder": CHECKPOINTS / "onnx", **given})


def predict_exported(**given):
    return exported().predict(**{"examples": ROWS, **given})


def stream_exported(**given):
    return list(exported().predict_stream(**{"examples": ROWS, **given}))


def call_exported(**given):
    return exported()(**{"input_ids": [[5, 6], [7, 8]], **given})


def save_exported(**given):
    return exported().save_pretrained(**given)


@functools.cache
def exported():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    hf_adaptive.export_onnx(tiny.model(num_hidden_layers=2, exit_layers=[1, 2]), CHECKPOINTS / "onnx")
    return hf_adaptive.OnnxClassifierWithExits.from_pretrained(CHECKPOINTS / "onnx", threads=1)


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
    "mean_attention": (average, ["model", "dataloader_or_dataset", "max_length", "batch_size", "path", "save_every"]),
    "rank_heads": (rank, ["model", "constants", "train_dataset", "args", "lambda_learning_rate"]),
    "RoutingSchedule": (schedule, ["start", "end", "shape"]),
    "ExitDistillation": (hf_adaptive.ExitDistillation, ["weight", "temperature", "teacher"]),
    "ExitsTrainer": (make_trainer, ["model", "args", "distillation", "compute_loss_func", "compute_metrics"]),
    "ExitsTrainer.train": (train, ["resume_from_checkpoint"]),
    "from_pretrained": (
        from_pretrained,
        ["pretrained_model_name_or_path", "config", "exit_layers", "exit_branch_layers", "exit_thresholds"]
        + ["exit_pooling", "num_labels"],
    ),
    "from_pretrained of PAPA": (
        papa_from_pretrained,
        ["config", "constants", "constant_heads", "constant_length", "head_ranking"],
    ),
    "from_pretrained of a cascade": (
        cascade_from_pretrained,
        ["pretrained_model_name_or_path", "exit_criterion", "exit_thresholds"],
    ),
    "from_backbone": (cascade_from_backbone, ["pretrained_model_name_or_path", "depths", "exit_thresholds"]),
    "save_pretrained": (MODEL.save_pretrained, ["save_directory"]),
    "to_stock": (MODEL.to_stock, ["exit_at"]),
    "predict_stream": (stream, ["examples", "batch_size", "window", "exit_thresholds", "exit_at"]),
    "pipeline": (make_pipeline, ["model", "tokenizer"]),
    "pipeline's call": (classify, ["inputs", "batch_size"]),
    "ExitsEngine": (
        serve,
        ["model", "max_batch_size", "max_wait_ms", "tokenizer", "exit_thresholds", "exit_at", "max_waiting"]
        + ["when_full", "audit_share", "when_broken", "false_alarm_rate", "seed"],
    ),
    "ExitsEngine.submit": (submit, ["example", "timeout_ms"]),
    "export_onnx": (export, ["model", "folder", "tokenizer", "quantize", "opset"]),
    "OnnxClassifierWithExits": (load_exported, ["folder", "providers", "threads"]),
    "predict of an exported model": (predict_exported, ["examples", "batch_size", "exit_thresholds", "exit_at"]),
    "predict_stream of an exported model": (stream_exported, ["examples", "batch_size", "window"]),
    "call of an exported model": (
        call_exported,
        ["input_ids", "attention_mask", "token_type_ids", "exit_thresholds", "exit_at"],
    ),
    "save of an exported model": (save_exported, ["folder"]),
    "register_architecture": (hf_adaptive.register_architecture, ["architecture"]),
}
# A text is a right one, if not of something that is there.
PATHS = ("pretrained_model_name_or_path", "save_directory", "folder", "path")
# None is right, and starts what takes time or leaves a folder.
OPTIONAL = ("args", "resume_from_checkpoint")
# What a message may call an argument instead.
ALSO_CALLED = {
    "dataset": ("examples", "data set", "labels"),
    "dataloader_or_dataset": ("examples", "dataset", "mean_attention"),
    "models": ("cascade",),
    "model": ("needs a",),
    "labels": ("label",),
    "values": ("report",),
    "input_ids": ("batch", "examples"),
    "metric": ("score",),
    "confidence": ("examples",),
    "thresholds": ("exit_thresholds",),
    "train_dataset": ("examples",),
    "inputs": ("text",),
    "config": ("exit_layers",),
    "constants": ("constant_heads",),
}


@pytest.mark.parametrize(("name", "argument"), [(name, one) for name in FUNCTIONS for one in FUNCTIONS[name][1]])
def test_wrong_argument_is_named(name, argument):
    function = FUNCTIONS[name][0]

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(wrong=WRONG)
    def try_it(wrong):
        assume(argument != "metric" or not callable(wrong))  # its errors are its own
        assume(argument not in PATHS or not isinstance(wrong, str))
        assume(argument not in OPTIONAL or (wrong is not None and wrong is not False))
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
