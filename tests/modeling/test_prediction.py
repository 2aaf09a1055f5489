"""Stage-by-stage prediction over a data set gives what the plain path gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny

MODELS = {name: tiny.model(name) for name in tiny.ARCHITECTURES}


def examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def alone(model, rows, **arguments):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row["input_ids"]]), **arguments) for row in rows]


def confidences(model, rows):
    everything = [None] * (len(model.exits) - 1)
    logits = torch.cat([out.exit_logits for out in alone(model, rows, exit_thresholds=everything)])
    return logits.softmax(dim=-1).amax(dim=-1)[:, :-1]


def far_from(confidence, threshold):
    """The threshold, moved to the middle of the gap between confidences that it falls into."""
    values = sorted([0.0, *confidence.tolist(), 1.0])
    above = next((value for value in values if value >= threshold), 1.0)
    below = max(value for value in values if value <= threshold)
    return (above + below) / 2 if above - below > 1e-4 else None


@settings(max_examples=25)
@given(
    name=st.sampled_from(tiny.ARCHITECTURES),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=24),
    batch_size=st.integers(1, 9),
    thresholds=st.lists(st.one_of(st.none(), st.floats(0.3, 1)), min_size=2, max_size=2),
    seed=st.integers(0, 5),
)
def test_equals_every_example_alone(name, lengths, batch_size, thresholds, seed):
    model, rows = MODELS[name], examples(lengths, seed)
    confidence = confidences(model, rows)
    thresholds = [None if t is None else far_from(confidence[:, i], t) for i, t in enumerate(thresholds)]
    outputs = model.predict(rows, batch_size=batch_size, exit_thresholds=thresholds, show_progress=False)
    expected = alone(model, rows, exit_thresholds=thresholds)
    assert outputs.exit_index.tolist() == [one.exit_index.item() for one in expected]
    torch.testing.assert_close(outputs.logits, torch.cat([one.logits for one in expected]), atol=2e-5, rtol=1e-4)
    expected_logits = torch.cat([one.exit_logits for one in expected])
    torch.testing.assert_close(outputs.exit_logits, expected_logits, atol=2e-5, rtol=1e-4, equal_nan=True)


def test_padding_in_the_data_set_is_dropped_on_either_side():
    model, rows = MODELS["bert"], examples([3, 9, 5])
    padded = [
        {"input_ids": [tiny.PAD] * 4 + row["input_ids"] + [tiny.PAD] * 2, "attention_mask": [0] * 4 + mask + [0] * 2}
        for row in rows
        for mask in [[1] * len(row["input_ids"])]
    ]
    outputs = [model.predict(data, show_progress=False).logits for data in (rows, padded)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("depth", tiny.EXIT_LAYERS)
def test_forced_exit(depth):
    model, rows = MODELS["mpnet"], examples([4, 7, 2, 7])
    outputs = model.predict(rows, batch_size=3, exit_at=depth, show_progress=False)
    expected = torch.cat([one.logits for one in alone(model, rows, exit_at=depth)])
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-4)
    assert set(outputs.exit_index.tolist()) == {tiny.EXIT_LAYERS.index(depth)}


def test_layers_are_run_in_full_batches_at_every_stage():
    """Of 32 rows in batches of 4, half leave at the first exit: the second stage needs 4 batches, not 8."""
    model, rows = tiny.model("bert"), examples([6] * 32)
    threshold = confidences(model, rows)[:, 0].median().item() + 1e-6
    sizes = []
    layer = model.bert.encoder.layer[tiny.EXIT_LAYERS[0]]
    layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model.predict(rows, batch_size=4, exit_thresholds=[threshold, None], show_progress=False)
    assert sizes == [4, 4, 4, 4]


def test_bad_calls():
    model = tiny.model("bert")
    with pytest.raises(ValueError, match="no examples"):
        model.predict([])
    with pytest.raises(ValueError, match="no input_ids"):
        model.predict([{"text": "not tokenised"}])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.predict(examples([3]), batch_size=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train().predict(examples([3]))
