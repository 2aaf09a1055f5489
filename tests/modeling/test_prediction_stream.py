"""`predict_stream`: any iterable, in order, in bounded memory."""

import itertools

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.modeling.test_prediction import examples

FIELDS = ("logits", "exit_logits", "exit_index")


def check_equal(answers, outputs):
    for name in FIELDS:
        torch.testing.assert_close(torch.stack([answer[name] for answer in answers]), outputs[name], equal_nan=True)


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_answers_as_predict_does_in_order(count):
    model, rows = tiny.model("bert"), examples([(7 * number) % 19 + 1 for number in range(count)])
    expected = model.predict(rows, exit_thresholds=0.6, show_progress=False)
    for holder in (iter(rows), Dataset.from_list(rows).to_iterable_dataset(), (row for row in rows), rows):
        answers = list(model.predict_stream(holder, batch_size=3, window=8, exit_thresholds=0.6))
        check_equal(answers, expected)


def test_reads_no_further_than_its_window():
    model, taken = tiny.model("bert"), itertools.count()
    endless = ({"input_ids": [5, 6, next(taken) % 50 + 4]} for _ in itertools.count())
    answers = model.predict_stream(endless, window=16, exit_at=1)
    assert next(answers).exit_index == 0
    assert next(taken) == 16
    for _ in range(16):
        next(answers)
    assert next(taken) == 33


def test_certainties_and_everything():
    model, rows = tiny.model("roberta", exit_criterion="learned"), examples([3, 5])
    expected = model.predict(rows, show_progress=False)
    answers = list(model.predict_stream(rows))
    check_equal(answers, expected)
    torch.testing.assert_close(torch.stack([answer.exit_certainty for answer in answers]), expected.exit_certainty)


def test_bad_calls():
    model = tiny.model("bert")
    assert list(model.predict_stream([])) == []
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, got 0"):
        model.predict_stream(examples([3]), window=0)
    with pytest.raises(ValueError, match="batch_size must be"):
        next(model.predict_stream(examples([3]), batch_size=0))
    answers = model.predict_stream([*examples([3] * 5), {"input_ids": []}], window=4)
    with pytest.raises(ValueError, match=r"rows 4 to 5 of the stream: examples\[1\] has no tokens"):
        list(answers)
