"""A plain `Trainer` trains a model with exits right."""

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import hf_adaptive
from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from tests import tiny

ROWS = 16


class Rows(Dataset):
    """Random rows of equal length with labels."""

    def __init__(self, rows=ROWS, seed=0, length=8):
        self.inputs = tiny.batch(rows=rows, length=length, seed=seed)
        self.labels = tiny.labels(rows, seed=seed)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {**{name: tensor[index] for name, tensor in self.inputs.items()}, "labels": self.labels[index]}


def trainer(model, folder, rows=None, callbacks=(), metrics=None, kind=Trainer, loss=None, **arguments):
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "seed": 3,
        **arguments,
    }
    rows = Rows() if rows is None else rows
    return kind(
        model,
        TrainingArguments(**values),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=list(callbacks),
        compute_metrics=metrics,
        compute_loss_func=loss,
    )


class KeepsGradients(TrainerCallback):
    """Notes the gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})


def gradients(model, folder, **arguments):
    kept = KeepsGradients()
    trainer(model, folder, callbacks=[kept], max_steps=1, max_grad_norm=0, **arguments).train()
    return kept.steps[0]


@pytest.mark.parametrize("routing", ["joint", "sweet", "disjoint"])
def test_gradient_accumulation_is_one_large_batch(name, routing, tmp_path):
    at_once = gradients(tiny.without_dropout(name, exit_routing=routing), tmp_path, per_device_train_batch_size=ROWS)
    in_parts = gradients(
        tiny.without_dropout(name, exit_routing=routing),
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    assert at_once.keys() == in_parts.keys()
    assert at_once
    for key, gradient in at_once.items():
        torch.testing.assert_close(in_parts[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


def test_logged_loss_is_the_model_s(tmp_path):
    model = tiny.without_dropout()
    rows = Rows()
    with torch.no_grad():
        expected = model.train()(**rows.inputs, labels=rows.labels).loss.item()
    for batch, parts in ((ROWS, 1), (4, 4)):
        own = trainer(
            tiny.without_dropout(),
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
        )
        assert own.train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fields", [{}, {"exit_thresholds": 0.5}, {"output_hidden_states": True}])
def test_metrics_get_the_logits_of_the_exit_taken(fields, tmp_path):
    seen = []

    def accuracy(prediction):
        seen.append(prediction)
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    model, rows = tiny.model(**fields), Rows(rows=13)
    metrics = trainer(model, tmp_path, rows, metrics=accuracy).evaluate()
    with torch.no_grad():
        expected = model(**rows.inputs).logits
    assert isinstance(seen[0].predictions, numpy.ndarray)
    numpy.testing.assert_allclose(seen[0].predictions, expected.numpy(), atol=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((expected.argmax(-1) == rows.labels).float().mean().item())
    assert numpy.isfinite(metrics["eval_loss"])


def test_predictions_can_keep_every_exit(tmp_path):
    """What evaluation does not gather unasked can be asked for."""
    own = trainer(tiny.model(), tmp_path)
    logits, exit_logits, exit_index = own.predict(Rows(), ignore_keys=[]).predictions
    assert (logits.shape, exit_logits.shape, exit_index.shape) == ((ROWS, 3), (ROWS, 3, 3), (ROWS,))


@pytest.mark.parametrize("routing", ["joint", "sweet"])
def test_training_lowers_the_loss_of_every_exit(name, routing, tmp_path):
    model = tiny.without_dropout(name, exit_routing=routing)
    rows = Rows()
    before = losses(model, rows)
    trainer(model, tmp_path, rows, num_train_epochs=8, learning_rate=3e-3).train()
    assert (losses(model.eval(), rows) < before).all()


def losses(model, rows):
    with torch.no_grad():
        logits = model(**rows.inputs).exit_logits
    return torch.stack([torch.nn.functional.cross_entropy(logits[:, index], rows.labels) for index in range(3)])


def test_disjoint_leaves_the_backbone_as_it_is(tmp_path):
    model = tiny.model(exit_routing="disjoint")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer(model, tmp_path, weight_decay=0.1, learning_rate=1e-2).train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if key.startswith("exits.")}


# The stock DeBERTa stops: it fills masks with a number too large for the lower type (transformers#35332).
@pytest.mark.parametrize("name", ["bert", "mpnet", "roberta"])
def test_bfloat16_autocast(name, tmp_path):
    full = gradients(tiny.without_dropout(name), tmp_path, per_device_train_batch_size=ROWS)
    half = gradients(tiny.without_dropout(name), tmp_path, per_device_train_batch_size=ROWS, bf16=True)
    assert full.keys() == half.keys()
    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    for segment in ("exits.0", "exits.1", "exits.2", "layer.0", "layer.1", "layer.3"):
        own, expected = (torch.cat([g[key].flatten() for key in g if segment in key]) for g in (half, full))
        assert 0 < (own - expected).norm() < 0.1 * expected.norm(), segment
    model = tiny.model(name)
    metrics = trainer(model, tmp_path, bf16=True, bf16_full_eval=True).evaluate()
    assert numpy.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "deberta", "roberta"])
def test_gradient_checkpointing(name, reentrant, tmp_path):
    plain = gradients(tiny.without_dropout(name), tmp_path)
    own = gradients(
        tiny.without_dropout(name),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    # As for any model: a reentrant checkpoint needs an input with a gradient, which the embeddings give.
    assert own.keys() == plain.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(own[key], gradient, atol=1e-7, rtol=1e-5, msg=key)


@pytest.mark.parametrize("routing", ["joint", "sweet", "disjoint"])
def test_resuming_is_bit_identical(routing, tmp_path):
    """With dropout, so that the state of the random numbers counts too."""
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1}
    tiny.plain_model("roberta").save_pretrained(tmp_path / "plain")

    def model():
        torch.manual_seed(0)
        return WithExits.from_pretrained(tmp_path / "plain", exit_routing=routing)

    whole = model()
    trainer(whole, tmp_path / "run", **arguments).train()
    again = model()
    resumed = trainer(again, tmp_path / "again", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for key, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    start = model().state_dict()
    assert not torch.equal(whole.state_dict()["exits.0.classifier.weight"], start["exits.0.classifier.weight"])
    optimisers = [torch.load(tmp_path / run / "checkpoint-8" / "optimizer.pt")["state"] for run in ("run", "again")]
    for index, state in optimisers[0].items():
        assert torch.equal(state["exp_avg"], optimisers[1][index]["exp_avg"])
    frozen = {key for key, parameter in again.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == (routing == "disjoint")


def test_checkpoints_of_a_run_are_models_with_code(tmp_path):
    model = tiny.model()
    trainer(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=1).train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4"
    assert {"config.json", "model.safetensors", "exits.py", "trainer_state.json"} <= {
        path.name for path in checkpoint.iterdir()
    }
    assert not list(tmp_path.rglob(".incomplete-*"))
    loaded = WithExits.from_pretrained(checkpoint)
    tiny.assert_alike(loaded(**tiny.batch()).exit_logits, model.eval()(**tiny.batch()).exit_logits)


def test_best_model_is_loaded_at_the_end(tmp_path):
    """The metric prefers the second of four checkpoints."""
    calls = iter([0.1, 0.9, 0.3, 0.2])
    model = tiny.model("mpnet")
    own = trainer(
        model,
        tmp_path,
        metrics=lambda prediction: {"accuracy": next(calls)},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    own.train()
    assert own.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(tensor, best[key]) for key, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, last[key]) for key, tensor in model.state_dict().items())


def test_label_smoothing_of_one_exit_is_warned_of(tmp_path, warnings_given):
    trainer(tiny.model(), tmp_path, max_steps=1, label_smoothing_factor=0.1).train()
    assert [text for text in warnings_given() if "trains the last exit only" in text and "ExitsTrainer" in text]


def test_trained_exits_are_not_warned_of(tmp_path, warnings_given):
    model = hf_adaptive.BertForSequenceClassificationWithExits(tiny.config(exit_thresholds=0.5))
    own = trainer(model, tmp_path, max_steps=1)
    own.evaluate()
    assert [text for text in warnings_given() if "never trained" in text]
    own.train()
    assert not model._exits_are_untrained


def test_bad_labels_stop_the_run_by_name(tmp_path):
    rows = Rows()
    rows.labels[3] = 7
    with pytest.raises(ValueError, match=r"labels must lie between 0 and 2 .*got \[7\]"):
        trainer(tiny.model(), tmp_path, rows).train()
