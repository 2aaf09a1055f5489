"""What `ExitsTrainer` adds: scores of every exit, smoothing of every exit's loss, report and card."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from transformers import DataCollatorWithPadding, TrainingArguments

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
    own = {name: arguments.pop(name) for name in ("compute_metrics",) if name in arguments}
    return ExitsTrainer(
        model=tiny.without_dropout("roberta", num_labels=2) if model is None else model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny.tokenizer(),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
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


def test_batch_eval_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_eval_metrics"):
        trainer(tmp_path, batch_eval_metrics=True)


def test_regression_is_scored_by_correlation(tmp_path):
    model = tiny.without_dropout("roberta", num_labels=1)
    data = dataset().cast_column("label", Value("float32"))
    scores = trainer(tmp_path, model, data).evaluate()
    assert {"eval_pearson", "eval_layer_1_pearson", "eval_layer_2_pearson"} <= set(scores)
