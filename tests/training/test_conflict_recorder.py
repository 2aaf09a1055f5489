"""Gradient conflict over training."""

import pytest
import torch

from hf_adaptive import GradientConflictRecorder, gradient_conflict
from tests import tiny
from tests.training.test_trainer import trainer


def batch():
    return {**tiny.batch(seed=5), "labels": tiny.labels(seed=5)}


@pytest.mark.parametrize(
    ("every", "steps"),
    [(2, [0, 2, 4, 6]), (0.5, [0, 3, 6]), (0.3, [0, 2, 4, 6]), (0.01, [0, 1, 2, 3, 4, 5, 6])],
)
def test_records_before_and_during_training(every, steps, tmp_path):
    recorder = GradientConflictRecorder(batch(), every)
    own = trainer(tiny.model(exit_routing="joint"), tmp_path, callbacks=[recorder], max_steps=6)
    before = gradient_conflict(own.model, batch())
    own.train()
    assert list(recorder.records) == steps
    assert torch.equal(recorder.records[0].norms, before.norms)
    assert torch.equal(recorder.records[6].norms, gradient_conflict(own.model, batch()).norms)


def test_training_is_not_changed_by_it(tmp_path):
    weights = []
    for callbacks in ([], [GradientConflictRecorder(batch(), 1)]):
        # With dropout, which draws random numbers.
        own = trainer(tiny.model(exit_routing="joint"), tmp_path, callbacks=callbacks, max_steps=4)
        own.train()
        weights.append(own.model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name


def test_bad_steps_are_refused():
    with pytest.raises(ValueError, match="every must be above 0"):
        GradientConflictRecorder(batch(), 0)
