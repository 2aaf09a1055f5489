"""Stage-by-stage prediction over a data set gives what the plain path gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive.modeling.scheduling import cheapest_sizes
from tests import tiny

POOLINGS = ("cls", "mean", "last", "late")
MODELS = {
    (name, pooling): tiny.model(name, exit_pooling=pooling) for name in tiny.ARCHITECTURES for pooling in POOLINGS
}


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


def test_more_rows_than_are_split_into_batches_at_once():
    model, rows = MODELS["bert", "mean"], examples([1 + number % 7 for number in range(300)])
    single, batched = (model.predict(rows, batch_size=size, show_progress=False) for size in (1, 32))
    assert single.exit_index.tolist() == batched.exit_index.tolist()
    torch.testing.assert_close(single.logits, batched.logits, atol=2e-5, rtol=1e-4)


@settings(max_examples=25)
@given(
    name=st.sampled_from(tiny.ARCHITECTURES),
    pooling=st.sampled_from(POOLINGS),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=24),
    batch_size=st.integers(1, 9),
    thresholds=st.lists(st.one_of(st.none(), st.floats(0.3, 1)), min_size=2, max_size=2),
    seed=st.integers(0, 5),
)
def test_equals_every_example_alone(name, pooling, lengths, batch_size, thresholds, seed):
    model, rows = MODELS[name, pooling], examples(lengths, seed)
    confidence = confidences(model, rows)
    thresholds = [None if t is None else far_from(confidence[:, i], t) for i, t in enumerate(thresholds)]
    outputs = model.predict(rows, batch_size=batch_size, exit_thresholds=thresholds, show_progress=False)
    expected = alone(model, rows, exit_thresholds=thresholds)
    assert outputs.exit_index.tolist() == [one.exit_index.item() for one in expected]
    torch.testing.assert_close(outputs.logits, torch.cat([one.logits for one in expected]), atol=2e-5, rtol=1e-4)
    expected_logits = torch.cat([one.exit_logits for one in expected])
    torch.testing.assert_close(outputs.exit_logits, expected_logits, atol=2e-5, rtol=1e-4, equal_nan=True)


def test_padding_in_the_data_set_is_dropped_on_either_side():
    model, rows = MODELS["bert", "mean"], examples([3, 9, 5])
    padded = [
        {"input_ids": [tiny.PAD] * 4 + row["input_ids"] + [tiny.PAD] * 2, "attention_mask": [0] * 4 + mask + [0] * 2}
        for row in rows
        for mask in [[1] * len(row["input_ids"])]
    ]
    outputs = [model.predict(data, show_progress=False).logits for data in (rows, padded)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("depth", tiny.EXIT_LAYERS)
def test_forced_exit(depth):
    model, rows = MODELS["mpnet", "cls"], examples([4, 7, 2, 7])
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


def splits(count, limit):
    """Every way to cut so many rows into batches."""
    if count == 0:
        yield []
    for first in range(1, min(limit, count) + 1):
        yield from ([first, *rest] for rest in splits(count - first, limit))


def work(lengths, sizes, overhead):
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return sum(size * lengths[start] + overhead for start, size in zip(starts, sizes))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).map(lambda rows: sorted(rows, reverse=True)),
    limit=st.integers(1, 5),
    overhead=st.integers(0, 60),
)
def test_no_other_batches_cost_less(lengths, limit, overhead):
    sizes = cheapest_sizes(lengths, limit, overhead)
    assert sum(sizes) == len(lengths)
    assert max(sizes) <= limit
    least = min(work(lengths, other, overhead) for other in splits(len(lengths), limit))
    assert work(lengths, sizes, overhead) == least


def test_holes_in_a_mask_are_no_tokens():
    """A row as long as its batch is not read whole by the heads if its mask leaves tokens out."""
    model = MODELS["bert", "mean"]
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1, 0, 1, 1]}, {"input_ids": [9, 5, 6, 7]}]
    rows[1]["attention_mask"] = [1, 1, 1, 1]
    outputs = model.predict(rows, exit_thresholds=0.99, show_progress=False)
    inputs = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = model(**inputs, exit_thresholds=0.99)
    torch.testing.assert_close(outputs.exit_logits, expected.exit_logits, equal_nan=True)


def test_two_data_sets_at_once():
    model = MODELS["roberta", "mean"]
    data = [examples(torch.arange(2, 14).tolist(), seed) for seed in range(6)]

    def run(rows):
        return model.predict(rows, batch_size=3, exit_thresholds=0.6, show_progress=False)

    expected = [run(rows) for rows in data]
    with ThreadPoolExecutor(max_workers=6) as pool:
        together = list(pool.map(run, data * 3))
    for own, alone_ in zip(together, expected * 3):
        assert torch.equal(own.exit_index, alone_.exit_index)
        assert torch.equal(own.exit_logits.nan_to_num(7), alone_.exit_logits.nan_to_num(7))


def test_bad_calls():
    model = tiny.model("bert")
    with pytest.raises(ValueError, match="no examples"):
        model.predict([])
    with pytest.raises(ValueError, match="no input_ids"):
        model.predict([{"text": "not tokenised"}])
    with pytest.raises(ValueError, match=r"same inputs: the first has \['input_ids'\], but number 1 has"):
        model.predict([*examples([3]), {"input_ids": [5, 6], "attention_mask": [1, 0]}])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        model.predict(examples([3]), batch_size=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train().predict(examples([3]))


@pytest.mark.parametrize("arguments", [{}, {"exit_thresholds": 0.4}])
def test_answers_are_ordinary_tensors(arguments):
    """With which one can compute on, also something that has a gradient."""
    outputs = tiny.model().predict(examples([3, 5, 8]), show_progress=False, **arguments)
    weight = torch.ones(3, requires_grad=True)
    (outputs.logits * weight).sum().backward()
    assert weight.grad.any()
    for value in outputs.values():
        assert not value.is_inference()
        value += 1
