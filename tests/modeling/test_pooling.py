"""What an exit's head sees of a padded sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive.modeling.heads import pool
from tests import tiny

POOLINGS = ("cls", "mean", "last")


def of_real_tokens(hidden, pooling):
    """The plain definition, for one row without padding."""
    return {"cls": hidden[0], "mean": hidden.mean(dim=0), "last": hidden[-1]}[pooling]


@pytest.mark.parametrize("pooling", POOLINGS)
@given(mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=1, max_size=5))
def test_only_real_tokens_count_wherever_the_padding_is(pooling, mask):
    mask = torch.tensor(mask).long()
    hidden = torch.randn(len(mask), 7, 4)
    hidden[mask == 0] = torch.nan
    expected = torch.stack([of_real_tokens(row[keep == 1], pooling) for row, keep in zip(hidden, mask)])
    torch.testing.assert_close(pool(hidden, pooling, mask), expected)
    torch.testing.assert_close(pool(hidden, pooling, mask.bool()), expected)
    torch.testing.assert_close(pool(hidden, pooling, mask.float()), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_a_mask_all_tokens_are_real(pooling):
    hidden = torch.randn(3, 5, 4)
    expected = torch.stack([of_real_tokens(row, pooling) for row in hidden])
    torch.testing.assert_close(pool(hidden, pooling, None), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_gives_no_gradient(pooling):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    hidden = torch.randn(2, 3, 4).masked_fill(mask[..., None] == 0, torch.inf).requires_grad_()
    pool(hidden, pooling, mask).sum().backward()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[mask == 0].any()
    assert hidden.grad[mask == 1].any()


def test_rows_of_padding_only_stay_finite():
    for pooling in POOLINGS:
        assert pool(torch.randn(2, 3, 4), pooling, torch.zeros(2, 3).long()).isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_answers_of_a_model_ignore_padding(name, pooling, padding):
    """Left padding moves the positions of a BERT, so it is given the positions."""
    model = tiny.model(name, exit_pooling=pooling)
    inputs = tiny.batch(padding=padding)
    positions = {}
    if name in ("bert", "deberta"):
        positions = {"position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}
    together = model(**inputs, **positions).exit_logits
    alone = torch.cat([model(**tiny.row(inputs, index)).exit_logits for index in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_last_token_without_a_mask_is_found_by_the_padding_token():
    model = tiny.model(exit_pooling="last")
    inputs = tiny.batch()
    own = model(input_ids=inputs["input_ids"][:, :5], attention_mask=torch.ones(6, 5).long())
    padded = torch.nn.functional.pad(inputs["input_ids"][:, :5], (0, 3), value=tiny.PAD)
    assert model(input_ids=padded).logits.shape == own.logits.shape
    with_mask = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert not torch.equal(with_mask.logits, model(input_ids=inputs["input_ids"]).logits)


def test_last_token_of_several_rows_needs_a_padding_token():
    model = tiny.model(exit_pooling="last", pad_token_id=None)
    inputs = tiny.batch()
    assert model(**tiny.row(inputs, 0)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"pad_token_id"):
        model(**inputs)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_mask_that_names_no_tokens_is_refused(pooling):
    inputs = tiny.batch()
    mask = inputs["attention_mask"][:, None, None].expand(-1, 1, 12, -1).bool()
    assert tiny.model()(input_ids=inputs["input_ids"], attention_mask=mask).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, length\)"):
        tiny.model(exit_pooling=pooling)(input_ids=inputs["input_ids"], attention_mask=mask)
