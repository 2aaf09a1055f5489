"""A loss of the user's own is asked for every exit, and is scaled as `Trainer` scales it."""

import pytest
import torch
from torch.nn import functional

from hf_adaptive import ExitsTrainer
from tests import tiny
from tests.training.test_trainer import ROWS, KeepsGradients, Rows, trainer

WEIGHTS = torch.tensor([1.0, 3.0, 0.5])


def weighted(outputs, labels, num_items_in_batch):
    """As the README shows it."""
    return functional.cross_entropy(outputs.logits, labels, WEIGHTS, reduction="sum") / num_items_in_batch


def gradients(folder, loss, model=None, **arguments):
    """The gradients of one step over all rows."""
    kept = KeepsGradients()
    settings = {"max_steps": 1, "max_grad_norm": 0, "per_device_train_batch_size": ROWS, **arguments}
    own = trainer(model or tiny.without_dropout(), folder, callbacks=[kept], kind=ExitsTrainer, loss=loss, **settings)
    own.eval_dataset = None
    own.train()
    return kept.steps[0]


@pytest.mark.parametrize("read", [lambda out: out.logits, lambda out: out["logits"], lambda out: out.get("logits")])
def test_it_is_called_once_an_exit_with_that_exits_scores(read, tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(read(outputs))
        return functional.cross_entropy(seen[-1], labels)

    own = trainer(tiny.without_dropout(), tmp_path, kind=ExitsTrainer, loss=loss)
    rows = Rows()
    own.compute_loss(own.model.train(), {**rows.inputs, "labels": rows.labels})
    expected = own.model(**rows.inputs).exit_logits
    assert len(seen) == 3
    torch.testing.assert_close(torch.stack(seen, dim=1), expected)


@pytest.mark.parametrize("routing", ["joint", "sweet"])
def test_its_gradients_are_those_of_the_weighted_sum(routing, tmp_path):
    rows, exit_weights = Rows(), [1.0, 0.0, 2.0]
    fields = {"exit_routing": routing, "exit_loss_weights": exit_weights}
    own = gradients(tmp_path, weighted, tiny.without_dropout(**fields))
    model = tiny.without_dropout(**fields).train()
    of_exits = model(**rows.inputs).exit_logits.unbind(dim=1)
    losses = [functional.cross_entropy(logits, rows.labels, WEIGHTS, reduction="sum") / ROWS for logits in of_exits]
    sum(weight * loss for weight, loss in zip(exit_weights, losses)).backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(own[key], parameter.grad, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("fields", [{}, {"exit_criterion": "learned"}])
def test_gradient_accumulation_changes_nothing(fields, tmp_path):
    at_once = gradients(tmp_path, weighted, tiny.without_dropout(**fields))
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    in_parts = gradients(tmp_path, weighted, tiny.without_dropout(**fields), **parts)
    for key, gradient in at_once.items():
        torch.testing.assert_close(in_parts[key], gradient, atol=1e-6, rtol=1e-4, msg=key)
    assert not fields or any("certainty" in key and gradient.any() for key, gradient in at_once.items())


def test_smoothed_gradients_do_not_depend_on_accumulation(tmp_path):
    at_once = gradients(tmp_path, None, label_smoothing_factor=0.2)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    in_parts = gradients(tmp_path, None, label_smoothing_factor=0.2, **parts)
    for key, gradient in at_once.items():
        torch.testing.assert_close(in_parts[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


def test_smoothing_beside_it_is_warned_of(tmp_path, warnings_given):
    own = gradients(tmp_path, weighted, label_smoothing_factor=0.2)
    assert [text for text in warnings_given() if "label_smoothing_factor has no effect" in text]
    for key, gradient in gradients(tmp_path, weighted).items():
        torch.testing.assert_close(own[key], gradient, msg=key)


def test_labels_of_any_kind_reach_it(tmp_path):
    """Soft labels, say: they are nobody's business but its own."""
    rows = Rows()
    rows.labels = torch.rand(ROWS, 3).softmax(dim=-1)

    def soft(outputs, labels, num_items_in_batch=None):
        return functional.cross_entropy(outputs.logits, labels)

    own = trainer(tiny.without_dropout(), tmp_path, rows, kind=ExitsTrainer, loss=soft, max_steps=1)
    own.eval_dataset = None
    assert own.train().training_loss > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_predictions_is_that_of_the_answers(smoothing, tmp_path):
    """Rows that left early have no scores of the later exits."""
    rows = Rows()
    loss = None if smoothing else weighted
    model = tiny.without_dropout(exit_thresholds=0.4)
    own = trainer(
        model,
        tmp_path,
        rows,
        kind=ExitsTrainer,
        loss=loss,
        label_smoothing_factor=smoothing,
        per_device_eval_batch_size=ROWS,
    )
    outputs = model(**rows.inputs)
    assert outputs.exit_logits.isnan().any()
    if smoothing:
        expected = functional.cross_entropy(outputs.logits, rows.labels, label_smoothing=smoothing)
    else:
        expected = functional.cross_entropy(outputs.logits, rows.labels, WEIGHTS, reduction="sum") / ROWS
    assert own.predict(rows).metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-4)
