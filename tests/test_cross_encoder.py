"""sentence-transformers' `CrossEncoder` loads and trains checkpoints with exits as it does stock ones."""

import json

import pytest
import torch
from datasets import Dataset

from tests import tiny

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.cross_encoder import (  # noqa: E402
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    losses,
)

PAIRS = [("good film", "bad plot"), ("the actor", "a very dull film was not bright")]


def saved(folder, **fields):
    model = tiny.without_dropout("roberta", **fields)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("thresholds", [None, 0.4])
def test_three_labels_are_found_and_predicted(thresholds, tmp_path):
    model = saved(tmp_path, num_labels=3, exit_thresholds=thresholds)
    # A checkpoint names its class only, as those of earlier versions do.
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    encoder = CrossEncoder(str(tmp_path), device="cpu")
    assert encoder.num_labels == 3
    inputs = tiny.tokenizer()([list(pair) for pair in PAIRS], padding=True, return_tensors="pt")
    expected = model(**inputs).logits
    torch.testing.assert_close(torch.from_numpy(encoder.predict(PAIRS)), expected, atol=1e-5, rtol=1e-4)
    encoder.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(
        torch.from_numpy(CrossEncoder(str(tmp_path / "again"), device="cpu").predict(PAIRS)), expected
    )


@pytest.mark.parametrize(("labels", "loss"), [(1, losses.BinaryCrossEntropyLoss), (3, losses.CrossEntropyLoss)])
def test_training_reaches_the_last_exit_and_says_so(labels, loss, tmp_path, warnings_given):
    saved(tmp_path, num_labels=labels, exit_routing="joint")
    encoder = CrossEncoder(str(tmp_path), device="cpu")
    before = {key: tensor.clone() for key, tensor in encoder.model.state_dict().items()}
    rows = [
        {"one": one, "other": other, "label": [0.0, 1.0][i] if labels == 1 else i}
        for i, (one, other) in enumerate(PAIRS)
    ]
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no"
    )
    CrossEncoderTrainer(encoder, arguments, train_dataset=Dataset.from_list(rows), loss=loss(encoder)).train()
    changed = {key for key, tensor in encoder.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert any(".layer.0." in key for key in changed)
    assert {key.split(".")[1] for key in changed if key.startswith("exits.")} == {"2"}
    assert [text for text in warnings_given() if "trains the last exit only" in text]
