"""What `ExitsTrainer` adds: scores of every exit, smoothing of every exit's loss, report and card."""

import functools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

from hf_adaptive import ExitsTrainer
from tests import tiny


def dataset(count=16):
    tokenizer = tiny.tokenizer()
    texts = tiny.sentences(count)
    labels = [int("good" in text) for text in texts]
    return Dataset.from_dict({**tokenizer(texts), "label": labels, "text": texts})


def trainer(folder, model=None, data=None, **arguments):
    data = dataset() if data is None else data
    settings = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "save_strategy": "no",
    }
    names = ("compute_metrics", "preprocess_logits_for_metrics", "data_collator", "model_init")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    own.setdefault("data_collator", DataCollatorWithPadding(tiny.tokenizer()))
    if model is None and "model_init" not in own:
        model = tiny.without_dropout("roberta", num_labels=2)
    return ExitsTrainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny.tokenizer(),
        **own,
    )


def test_accuracy_of_every_exit_at_each_evaluation(tmp_path):
    own = trainer(tmp_path)
    scores = own.evaluate()
    data = dataset()
    for layer, name in ((1, "eval_layer_1_accuracy"), (2, "eval_layer_2_accuracy"), (4, "eval_accuracy")):
        answers = [
            own.model(input_ids=torch.tensor([row]), exit_at=layer).logits.argmax() for row in data["input_ids"]
        ]
        assert scores[name] == pytest.approx(np.mean(np.array(answers) == np.array(data["label"])))


def test_thresholds_play_no_part_in_the_scores(tmp_path):
    free = trainer(tmp_path).evaluate()
    early = trainer(tmp_path, tiny.without_dropout("roberta", num_labels=2, exit_thresholds=[0.5, 0.5])).evaluate()
    assert early["eval_accuracy"] == free["eval_accuracy"]
    assert early["eval_loss"] == pytest.approx(free["eval_loss"])


def test_a_metric_of_the_users_sees_each_exit(tmp_path):
    shapes = []

    def count(prediction):
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    scores = trainer(tmp_path, compute_metrics=count).evaluate()
    assert shapes == [(16, 2)] * 3
    assert {name for name in scores if name.endswith("rows")} == {
        "eval_rows",
        "eval_layer_1_rows",
        "eval_layer_2_rows",
    }


def test_training_ends_with_report_plot_and_card(tmp_path):
    own = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    own.train()
    logged = [entry for entry in own.state.log_history if "eval_layer_2_accuracy" in entry]
    assert len(logged) == 2
    assert json.loads((tmp_path / "exit_report.json").read_text())["exit_layers"] == tiny.EXIT_LAYERS
    assert (tmp_path / "exits.png").exists()
    card = (tmp_path / "README.md").read_text()
    assert "## The exits" in card
    assert f"{own.report.accuracy[-1]:.4f}" in card


def test_label_smoothing_smooths_the_loss_of_every_exit(tmp_path):
    own = trainer(tmp_path, label_smoothing_factor=0.2)
    data = dataset(8)
    inputs = own.data_collator(
        [{name: row[name] for name in ("input_ids", "attention_mask", "label")} for row in data]
    )
    loss, outputs = own.compute_loss(own.model.train(), dict(inputs), return_outputs=True)
    log_probabilities = outputs.exit_logits.log_softmax(dim=-1)
    right = log_probabilities.gather(2, inputs["labels"].view(-1, 1, 1).expand(-1, 3, 1)).squeeze(-1)
    expected = -(0.8 * right + 0.2 * log_probabilities.mean(dim=-1)).mean(dim=0).sum()
    torch.testing.assert_close(loss, expected)
    assert own.train().training_loss > 0


def test_label_smoothing_trains_learned_units_too(tmp_path):
    model = tiny.without_dropout("roberta", num_labels=2, exit_criterion="learned")
    before = {key: value.clone() for key, value in model.state_dict().items() if "certainty.linear" in key}
    trainer(tmp_path, model, label_smoothing_factor=0.1, learning_rate=1e-2).train()
    assert before
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("labels", [[7] * 16, [[0.0, 1.0]] * 16])
def test_smoothing_names_bad_labels(labels, tmp_path):
    data = dataset().remove_columns("label").add_column("label", labels)
    with pytest.raises(ValueError, match=r"labels must lie between 0 and 1|no meaning for problem_type='multi_label"):
        trainer(tmp_path, data=data, label_smoothing_factor=0.1).train()


def test_smoothing_of_numbers_is_refused(tmp_path):
    data = dataset().cast_column("label", Value("float32"))
    model = tiny.model("roberta", num_labels=1)
    with pytest.raises(ValueError, match="label_smoothing_factor has no meaning for problem_type='regression'"):
        trainer(tmp_path, model, data, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True is not supported"),
        ({"include_for_metrics": ["inputs", "loss"]}, "'loss'.* is not supported"),
        ({"preprocess_logits_for_metrics": lambda logits, labels: logits}, "needs compute_metrics"),
        ({"model": tiny.plain_model(num_labels=2)}, "needs a model with exits .* got a BertForSequenceClassification"),
    ],
)
def test_what_cannot_be_done_for_every_exit_is_refused_by_name(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, **arguments)


class Rightness:
    """A metric that is an object, of class indexes."""

    def __call__(self, prediction, scale=1.0):
        predictions, labels = prediction.predictions, prediction.label_ids
        if isinstance(predictions, list):
            predictions, labels = np.concatenate(predictions), np.concatenate(labels)
        assert predictions.shape == labels.shape
        return {"accuracy": scale * (predictions == labels).mean()}


@pytest.mark.parametrize("metric", [Rightness(), functools.partial(Rightness(), scale=1.0)])
@pytest.mark.parametrize("arguments", [{}, {"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}])
def test_preprocessed_scores_of_every_exit(metric, arguments, tmp_path):
    expected = trainer(tmp_path).evaluate()
    own = trainer(
        tmp_path,
        compute_metrics=metric,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        per_device_eval_batch_size=5,
        **arguments,
    )
    scores = own.evaluate()
    names = {name for name in expected if name.endswith("accuracy")}
    assert names == {"eval_accuracy", "eval_layer_1_accuracy", "eval_layer_2_accuracy"}
    for name in names:
        assert scores[name] == pytest.approx(expected[name])
    assert own.predict(dataset()).metrics["test_accuracy"] == pytest.approx(expected["eval_accuracy"])


def test_default_metric_of_batches_that_are_not_joined(tmp_path):
    own = trainer(tmp_path, eval_do_concat_batches=False, per_device_eval_batch_size=5)
    assert own.evaluate()["eval_accuracy"] == trainer(tmp_path).evaluate()["eval_accuracy"]
    assert "test_accuracy" in own.predict(dataset()).metrics


def test_a_metric_sees_the_inputs(tmp_path):
    seen = []

    def look(prediction):
        seen.append(prediction.inputs)
        return {}

    trainer(tmp_path, compute_metrics=look, include_for_metrics=["inputs"]).evaluate()
    assert len(seen) == 3
    assert all(len(inputs) == 16 for inputs in seen)


def tokenised_late(rows):
    """A data collator that is given text."""
    encoded = tiny.tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([row["label"] for row in rows])}


@pytest.mark.parametrize("kind", ["text", "stream", "streamed text", "label_ids"])
def test_the_report_reads_what_evaluation_reads(kind, tmp_path):
    expected = trainer(tmp_path / "plain").write_report(timed_examples=0)
    data, arguments = dataset(), {}
    if "text" in kind:
        data, arguments = data.select_columns(["text", "label"]), {"data_collator": tokenised_late}
    if "stream" in kind:
        data = data.to_iterable_dataset()
    if kind == "label_ids":
        data = data.remove_columns("text").rename_column("label", "label_ids")
    keeps_all = {"remove_unused_columns": kind == "stream"}
    own = trainer(tmp_path, data=data, per_device_eval_batch_size=5, **keeps_all, **arguments)
    report = own.write_report(timed_examples=0)
    assert report.num_examples == 16
    assert report.accuracy == pytest.approx(expected.accuracy)
    assert [point.accuracy for point in report.curve] == pytest.approx([point.accuracy for point in expected.curve])


def test_training_is_not_lost_by_a_report_that_cannot_be_made(tmp_path, warnings_given):
    def without_labels(rows):
        return {name: value for name, value in tokenised_late(rows).items() if name != "labels" or own.is_in_train}

    own = trainer(
        tmp_path, data=dataset(), data_collator=without_labels, remove_unused_columns=False, eval_strategy="no"
    )
    assert own.train().global_step == 2
    assert own.report is None
    (text,) = [text for text in warnings_given() if "report could not be made" in text]
    assert "labels (label_names=['labels'])" in text
    with pytest.raises(ValueError, match="a report needs input_ids and one column of labels"):
        own.write_report()


def test_several_evaluation_sets_are_evaluated_and_not_reported_on(tmp_path, warnings_given):
    own = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    own.eval_dataset = {"one": dataset(), "other": dataset(8)}
    own.train()
    assert {"eval_one_accuracy", "eval_other_layer_1_accuracy"} <= set().union(*own.state.log_history)
    assert [text for text in warnings_given() if "no report" in text and "write_report" in text]


def test_a_search_is_for_the_last_exits_score(tmp_path, warnings_given):
    pytest.importorskip("optuna")
    own = trainer(tmp_path, model_init=lambda: tiny.without_dropout("roberta", num_labels=2), eval_strategy="epoch")
    scores = []

    class KeepsScores(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            scores.append(metrics["eval_accuracy"])

    own.add_callback(KeepsScores)
    best = own.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)},
        n_trials=2,
        backend="optuna",
    )
    assert best.objective == max(scores)
    assert [text for text in warnings_given() if "last exit's score (direction: maximize)" in text]


def test_regression_is_scored_by_correlation(tmp_path):
    model = tiny.without_dropout("roberta", num_labels=1)
    data = dataset().cast_column("label", Value("float32"))
    scores = trainer(tmp_path, model, data).evaluate()
    assert {"eval_pearson", "eval_layer_1_pearson", "eval_layer_2_pearson"} <= set(scores)


def test_a_compiled_model_trains_evaluates_and_reports(tmp_path):
    """Slow to compile, so once only: what is learned is what is learned uncompiled."""
    fields = {"num_labels": 2, "num_hidden_layers": 2, "exit_layers": [1, 2]}
    losses, weights = [], []
    for compiled in (False, True):
        model = tiny.without_dropout("roberta", **fields)
        # No padding, so that there is one graph.
        data = Dataset.from_dict({"input_ids": [[0, 5, 2]] * 8, "attention_mask": [[1] * 3] * 8, "label": [0, 1] * 4})
        arguments = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        own = trainer(tmp_path, model, data, max_steps=1, **arguments)
        losses.append(own.train().training_loss)
        weights.append(own.model.state_dict())
        assert own.report is not None
        assert "eval_layer_1_accuracy" in own.evaluate()
    assert losses[1] == pytest.approx(losses[0])
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, atol=1e-5, rtol=1e-4, msg=key)
