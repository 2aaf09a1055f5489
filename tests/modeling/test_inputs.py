"""What forward is given: refused by name where it is no batch, and where the backbone has no place for it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
MODELS = {
    "exits": tiny.model,
    "cascade": lambda: tiny.cascade(depths=(1, 2)),
}
BAD_INPUTS = {
    "a list": ({"input_ids": IDS.tolist()}, "input_ids must be a torch.Tensor, got a list.*torch.tensor"),
    "an array": ({"input_ids": IDS.numpy()}, "input_ids must be a torch.Tensor, got a ndarray"),
    "a list for a mask": ({"input_ids": IDS, "attention_mask": [[1]]}, "attention_mask must be a torch.Tensor"),
    "one row": ({"input_ids": IDS[0]}, r"input_ids must have the shape \(batch, length\), got \(3,\)"),
    "floats": ({"input_ids": IDS.float()}, "input_ids must be of type torch.int64, got torch.float32"),
    "no rows": ({"input_ids": IDS[:0]}, "the batch is empty"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "the batch is empty"),
    "a mask that is shorter": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 2)},
        r"attention_mask must have the shape \(2, 3\) .*got \(2, 2\)",
    ),
    "segments of one row": (
        {"input_ids": IDS, "token_type_ids": torch.zeros(1, 3).long()},
        r"token_type_ids must have the shape \(2, 3\)",
    ),
    "positions of other rows": (
        {"input_ids": IDS, "position_ids": torch.zeros(3, 3).long()},
        r"position_ids must have the shape \(2, 3\)",
    ),
    "tokens not in the vocabulary": (
        {"input_ids": IDS + tiny.VOCABULARY},
        r"input_ids must lie between 0 and 63.* got values from 69 to 74",
    ),
    "negative tokens": ({"input_ids": IDS - 6}, "input_ids must lie between 0 and 63.*from -1 to 4"),
    "too long": ({"input_ids": IDS.repeat(1, 20)}, "input_ids of 60 tokens need more positions than the model has"),
    "positions that are not there": (
        {"input_ids": IDS, "position_ids": torch.full((2, 3), 48)},
        "position_ids must lie between 0 and 47.*from 48 to 48",
    ),
    "labels of another batch": ({"input_ids": IDS, "labels": torch.tensor([0])}, "labels must have one entry a row"),
    "labels as a list": ({"input_ids": IDS, "labels": [0, 1]}, "labels must be a torch.Tensor, got a list"),
    "labels as an array": ({"input_ids": IDS, "labels": np.array([0, 1])}, "labels must be a torch.Tensor"),
    "exit_at as text": ({"input_ids": IDS, "exit_at": "1"}, r"exit_at must be one of exit_layers.*got '1'"),
    "exit_at as a tensor": ({"input_ids": IDS, "exit_at": torch.tensor([1, 2])}, "exit_at must be one of exit_layers"),
    "thresholds as a tensor": ({"input_ids": IDS, "exit_thresholds": torch.ones(2)}, "exit_thresholds must be a list"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_batch_is_named(kind, case):
    inputs, says = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=says):
        MODELS[kind]()(**inputs)


def test_embeddings_that_do_not_fit():
    model = tiny.model()
    for inputs, says in [
        ({"inputs_embeds": torch.ones(2, 3)}, r"inputs_embeds must have the shape \(batch, length, hidden\)"),
        ({"inputs_embeds": torch.ones(2, 3, 5)}, r"no use for \{'inputs_embeds': \(2, 3, 5\)\}"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 7, 9)}, r"no use for \{'attention_mask'"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 3, 16)}, "exactly one of"),
        ({}, "exactly one of"),
    ]:
        with pytest.raises(ValueError, match=says):
            model(**inputs)


def test_positions_are_those_of_every_row():
    model = tiny.model()
    expected = model(IDS, position_ids=torch.tensor([[4, 5, 6]] * 2)).logits
    for positions in (torch.tensor([4, 5, 6]), torch.tensor([[4, 5, 6]])):
        assert torch.equal(model(IDS, position_ids=positions).logits, expected)


@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(st.sampled_from([tiny.PAD, 7, 8, 9]), min_size=1, max_size=6), min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    threshold=st.sampled_from([None, 0.45, 0.6]),
    depth=st.sampled_from([None, 2]),
)
def test_without_masks_predict_says_what_forward_says_of_each_row(rows, batch_size, threshold, depth):
    """Pooling "last" takes the token before the padding at a row's end, though all are attended to."""
    model = LAST
    asked = {"exit_at": depth} if depth else {"exit_thresholds": threshold}
    with torch.no_grad():
        alone = [model(torch.tensor([row]), **asked) for row in rows]
    outputs = model.predict([{"input_ids": row} for row in rows], batch_size, show_progress=False, **asked)
    together = torch.cat([one.exit_logits for one in alone])
    torch.testing.assert_close(outputs.exit_logits, together, atol=2e-5, rtol=1e-4, equal_nan=True)


LAST = tiny.model(exit_pooling="last")
