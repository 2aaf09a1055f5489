"""Constant attention and early exit in one checkpoint."""

import pytest
import torch

import hf_adaptive
from tests import tiny

LENGTH = 12
HEADS = [[0, 1], [1, 0], [1, 1], [3, 0]]
NAMES = ("bert", "roberta", "deberta")


def constants():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(tiny.LAYERS, 2, LENGTH, LENGTH, generator=generator)


@pytest.fixture(scope="module", params=NAMES)
def checkpoints(request, tmp_path_factory):
    """A plain checkpoint, and the model with exits and constant heads that is made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.plain_model(request.param, "Model").save_pretrained(folder)
    model = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(
        folder, num_labels=3, exit_layers=tiny.EXIT_LAYERS, constants=constants(), constant_heads=HEADS
    )
    model._exits_are_untrained = False
    return folder, model


def test_the_backbone_computes_what_the_papa_model_computes(checkpoints):
    folder, model = checkpoints
    papa_class = getattr(hf_adaptive, f"Papa{model.architecture.name}ForSequenceClassification")
    papa = papa_class.from_pretrained(folder, constants=constants(), constant_heads=HEADS)
    inputs = tiny.batch(length=LENGTH)
    real = inputs["attention_mask"] == 1
    own = model(**inputs, output_hidden_states=True).hidden_states
    expected = papa(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(own, expected):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-6, rtol=0)


def test_rows_leave_on_their_own(checkpoints):
    _, model = checkpoints
    for padding in ("right", "left"):
        inputs = tiny.batch(8, LENGTH, padding=padding)
        thresholds = tiny.thresholds_between(model, inputs)
        together = model(**inputs, exit_thresholds=thresholds)
        assert len(set(together.exit_index.tolist())) > 1
        for index in range(8):
            alone = model(**{name: t[index : index + 1] for name, t in inputs.items()}, exit_thresholds=thresholds)
            assert alone.exit_index.item() == together.exit_index[index].item()
            torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-5, rtol=0)


def test_queries_and_keys_of_constant_heads_are_gone(checkpoints):
    folder, model = checkpoints
    plain = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(
        folder, num_labels=3, exit_layers=tiny.EXIT_LAYERS
    )
    per_head = 2 * (tiny.HIDDEN // 2) * tiny.HIDDEN - LENGTH * LENGTH
    assert plain.num_parameters() - model.num_parameters() >= per_head * len(HEADS)


def test_saved_and_loaded(checkpoints, tmp_path):
    _, model = checkpoints
    model.save_pretrained(tmp_path)
    again = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(tmp_path)
    assert again.config.constant_heads == HEADS
    inputs = tiny.batch(length=LENGTH)
    # Not bit by bit: some kernels add in another order where weights lie at another address.
    torch.testing.assert_close(again(**inputs).exit_logits, model(**inputs).exit_logits, atol=1e-6, rtol=1e-5)


def test_sweet_trains_them_by_their_own_exit(checkpoints):
    _, model = checkpoints
    model.zero_grad()
    model.train()(**tiny.batch(length=LENGTH), labels=tiny.labels()).loss.backward()
    model.eval()
    attention = model.base_model.encoder.layer[0].attention.self
    assert attention.constants.grad.abs().sum() > 0


def test_bad_calls(checkpoints):
    folder, model = checkpoints
    load = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained
    with pytest.raises(ValueError, match="constants are missing"):
        load(folder, constant_heads="all", constant_length=LENGTH)
    with pytest.raises(ValueError, match="constants must have the shape"):
        load(folder, constants=constants()[:2], constant_heads="all")
    with pytest.raises(ValueError, match="layer 9"):
        load(folder, constants=constants(), constant_heads=[[9, 0]])
    with pytest.raises(ValueError, match="Did you mean constant_heads"):
        load(folder, constant_head=[[0, 0]])
    with pytest.raises(ValueError, match="reach 12"):
        model(**tiny.batch(length=LENGTH + 1))
