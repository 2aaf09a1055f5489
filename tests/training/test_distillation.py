"""What exits learn from the last one or from a teacher, and what is refused."""

import functools

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DataCollatorWithPadding

from hf_adaptive import ExitDistillation, ExitsTrainer, add_teacher_logits
from tests import tiny
from tests.training.test_trainer import ROWS, KeepsGradients, Rows, trainer

TEMPERATURE, WEIGHT = 3.0, 0.7


class LabelledRows(Rows):
    """The same rows with labels of another kind, and further columns."""

    def __init__(self, labels=None, **columns):
        super().__init__()
        self.labels = self.labels if labels is None else labels
        self.columns = columns

    def __getitem__(self, index):
        return {**super().__getitem__(index), **{name: values[index] for name, values in self.columns.items()}}


def distilling(folder, model, distillation, rows=None, loss=None, callbacks=(), **arguments):
    """A trainer for one step over all rows."""
    settings = {"max_steps": 1, "max_grad_norm": 0, "per_device_train_batch_size": ROWS, **arguments}
    kind = functools.partial(ExitsTrainer, distillation=distillation)
    own = trainer(model, folder, rows=rows, callbacks=callbacks, kind=kind, loss=loss, **settings)
    own.eval_dataset = None
    return own


def gradients(folder, model, distillation, **settings):
    kept = KeepsGradients()
    distilling(folder, model, distillation, callbacks=[kept], **settings).train()
    return kept.steps[0]


def divergence(logits, teacher):
    """By torch's own function."""
    scaled = (logits / TEMPERATURE).log_softmax(dim=-1)
    expected = (teacher / TEMPERATURE).softmax(dim=-1)
    return TEMPERATURE**2 * functional.kl_div(scaled, expected, reduction="batchmean")


def expected_gradients(model, distance, loss=None, rows=None, teacher=None, weights=(1.0, 1.0, 1.0)):
    """Of the exits' losses from the labels, and of the first two exits' distance to the teacher."""
    rows = rows or Rows()
    loss = loss or functional.cross_entropy
    exits = model.train()(**rows.inputs).exit_logits.unbind(dim=1)
    teacher = exits[-1].detach() if teacher is None else teacher
    total = sum(weight * loss(logits, rows.labels) for weight, logits in zip(weights, exits))
    total = total + WEIGHT * sum(weight * distance(logits, teacher) for weight, logits in zip(weights, exits[:-1]))
    total.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


DISTILLATION = ExitDistillation(weight=WEIGHT, temperature=TEMPERATURE)


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_routing": "joint"},
        {"exit_routing": "sweet"},
        {"exit_routing": "joint", "exit_branch_layers": 1, "exit_loss_weights": [2.0, 0.5, 1.0]},
        {"exit_routing": "sweet", "exit_branch_layers": 1},
    ],
)
def test_every_exit_learns_from_the_last_which_learns_nothing_from_them(fields, tmp_path):
    found = gradients(tmp_path, tiny.without_dropout(**fields), DISTILLATION)
    weights = fields.get("exit_loss_weights", (1.0, 1.0, 1.0))
    expected = expected_gradients(tiny.without_dropout(**fields), divergence, weights=weights)
    assert_same_gradients(found, expected)
    alone = expected_gradients(tiny.without_dropout(**fields), lambda logits, teacher: 0.0 * logits.sum())
    key = "exits.2.classifier.weight"
    torch.testing.assert_close(found[key], alone[key], atol=1e-6, rtol=1e-4)


def test_gradient_accumulation_changes_nothing(tmp_path):
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    at_once = gradients(tmp_path, tiny.without_dropout(), DISTILLATION)
    assert_same_gradients(gradients(tmp_path, tiny.without_dropout(), DISTILLATION, **parts), at_once)


def test_beside_a_loss_of_one_s_own_and_label_smoothing(tmp_path):
    weights = torch.tensor([1.0, 3.0, 0.5])

    def weighted(outputs, labels, num_items_in_batch):
        return functional.cross_entropy(outputs.logits, labels, weights, reduction="sum") / num_items_in_batch

    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    found = gradients(tmp_path, tiny.without_dropout(), DISTILLATION, loss=weighted, **parts)
    loss = lambda logits, labels: functional.cross_entropy(logits, labels, weights, reduction="sum") / ROWS  # noqa: E731
    assert_same_gradients(found, expected_gradients(tiny.without_dropout(), divergence, loss=loss))
    found = gradients(tmp_path, tiny.without_dropout(), DISTILLATION, label_smoothing_factor=0.2)
    loss = functools.partial(functional.cross_entropy, label_smoothing=0.2)
    assert_same_gradients(found, expected_gradients(tiny.without_dropout(), divergence, loss=loss))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(problem, tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(ROWS, tiny.LABELS, generator=generator)
    labels = labels.round() if problem == "multi_label_classification" else labels

    def yes_or_no(logits, teacher):
        expected = (teacher / TEMPERATURE).sigmoid()
        entropy = functional.binary_cross_entropy(expected, expected)
        return TEMPERATURE**2 * (functional.binary_cross_entropy_with_logits(logits / TEMPERATURE, expected) - entropy)

    loss, distance = {
        "multi_label_classification": (functional.binary_cross_entropy_with_logits, yes_or_no),
        "regression": (functional.mse_loss, functional.mse_loss),
    }[problem]
    rows = LabelledRows(labels)
    found = gradients(tmp_path, tiny.without_dropout(problem_type=problem), DISTILLATION, rows=rows)
    model = tiny.without_dropout(problem_type=problem)
    assert_same_gradients(found, expected_gradients(model, distance, loss=loss, rows=rows))


def test_rows_without_a_label_are_left_out(tmp_path):
    rows, few = LabelledRows(), Rows(rows=ROWS)
    rows.labels = rows.labels.clone()
    rows.labels[4:] = -100
    few.inputs = {name: tensor[:4] for name, tensor in few.inputs.items()}
    few.labels = few.labels[:4]
    found = gradients(tmp_path, tiny.without_dropout(), DISTILLATION, rows=rows)
    assert_same_gradients(found, expected_gradients(tiny.without_dropout(), divergence, rows=few))


def test_a_teacher_model_and_its_logits_in_the_data_teach_alike(tmp_path):
    torch.manual_seed(5)
    teacher = tiny.plain_model("bert", hidden_size=32).train()
    rows = Rows()
    with torch.no_grad():
        logits = teacher.eval()(**rows.inputs).logits
    expected = expected_gradients(tiny.without_dropout(), divergence, teacher=logits)
    own = ExitDistillation(WEIGHT, TEMPERATURE, teacher=teacher)
    assert_same_gradients(gradients(tmp_path, tiny.without_dropout(), own), expected)
    column = ExitDistillation(WEIGHT, TEMPERATURE, teacher="scores")
    found = gradients(tmp_path, tiny.without_dropout(), column, rows=LabelledRows(scores=logits))
    assert_same_gradients(found, expected)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def cascade(**fields):
    return tiny.cascade(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **fields)


@pytest.mark.parametrize(
    ("model", "teacher"), [(cascade, tiny.plain_model), (tiny.without_dropout, cascade), (cascade, cascade)]
)
def test_a_cascade_learns_and_teaches(model, teacher, tmp_path):
    taught_by = teacher()
    with torch.no_grad():
        logits = taught_by(**Rows().inputs).logits
    expected = expected_gradients(model(), divergence, teacher=logits)
    assert_same_gradients(gradients(tmp_path, model(), ExitDistillation(WEIGHT, TEMPERATURE, taught_by)), expected)
    with pytest.raises(ValueError, match="vocab_size=99, the model 64: they read different tokens"):
        distilling(tmp_path, model(), ExitDistillation(teacher=teacher(vocab_size=99)))


def test_a_data_set_with_the_teacher_s_column_trains_and_is_evaluated(tmp_path):
    teacher = tiny.plain_model("bert")
    tokenizer, texts = tiny.tokenizer(), tiny.sentences(ROWS)
    collator = DataCollatorWithPadding(tokenizer)
    plain = Dataset.from_dict({**tokenizer(texts), "labels": tiny.labels(ROWS).tolist()})
    data = add_teacher_logits(plain, teacher, collator=collator, batch_size=5, show_progress=False)
    for row in (0, ROWS - 1):
        alone = teacher(**tokenizer(texts[row], return_tensors="pt")).logits[0]
        torch.testing.assert_close(torch.tensor(data[row]["teacher_logits"]), alone, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="has a column 'teacher_logits' already"):
        add_teacher_logits(data, teacher, collator=collator)
    own = distilling(tmp_path, tiny.model(), ExitDistillation(teacher="teacher_logits"), rows=data)
    undistilled = distilling(tmp_path, own.model, None)
    own.data_collator = undistilled.data_collator = collator
    own.train()
    assert own.evaluate(data)["eval_loss"] == pytest.approx(undistilled.evaluate(plain)["eval_loss"])
    assert own.predict(data.remove_columns("labels")).predictions.shape == (ROWS, tiny.LABELS)
    lacking = distilling(tmp_path, tiny.model(), ExitDistillation(teacher="others"), rows=data)
    lacking.data_collator = collator
    with pytest.raises(ValueError, match=r"no column 'others' .*add_teacher_logits"):
        lacking.train()


# Bad input


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weight": -0.1}, "weight must be a finite number of at least 0, got -0.1"),
        ({"weight": float("nan")}, "weight must"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
    ],
)
def test_bad_numbers(values, says):
    with pytest.raises(ValueError, match=says):
        ExitDistillation(**values)


def test_a_teacher_that_is_none():
    with pytest.raises(TypeError, match=r"teacher must be a classifier, the name of a column .*got a int"):
        ExitDistillation(teacher=3)


def test_distillation_without_early_exits(tmp_path):
    with pytest.raises(ValueError, match=r"distillation needs exits before the last.*exit_layers=\[4\]"):
        distilling(tmp_path, tiny.model(exit_layers=[4]), DISTILLATION)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_labels": 2}, "the teacher has 2 labels, the model 3"),
        ({"id2label": {0: "c", 1: "b", 2: "a"}}, r"\['c', 'b', 'a'\], the model's \['a', 'b', 'c'\]"),
        ({"problem_type": "multi_label_classification"}, "the teacher's problem_type is 'multi_label_classification'"),
        ({"vocab_size": 99}, "vocab_size=99, the model 64: they read different tokens.*add_teacher_logits"),
    ],
)
def test_a_teacher_of_something_else(fields, says, tmp_path):
    model = tiny.model(id2label={0: "a", 1: "b", 2: "c"})
    fields = fields if "num_labels" in fields else {"num_labels": 3, **fields}
    teacher = ExitDistillation(teacher=tiny.plain_model("bert", **fields))
    with pytest.raises(ValueError, match=says):
        distilling(tmp_path, model, teacher)
