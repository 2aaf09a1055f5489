"""The scheduler and the criteria, which other runtimes use without torch."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive.modeling import scheduling
from hf_adaptive.modeling.criteria import CRITERIA, Evidence, ForcedPolicy, ThresholdPolicy
from hf_adaptive.modeling.examples import read_examples
from hf_adaptive.modeling.scheduling import (
    RowAnswers,
    StagedFlow,
    StageResult,
    StageScheduler,
    WaitingRow,
    best_batch,
    cheapest_sizes,
)


class CountingStages:
    """A model in numpy: a row leaves at the stage that its first token says, and answers with what it went through."""

    start_cost = 5

    def __init__(self, stages=3):
        self.stages = stages
        self.batches = []

    def read(self, examples):
        return read_examples(examples)

    def start(self, examples, rows):
        tokens = examples.batch("input_ids", rows, -1)
        return [(line[:length].tolist(), ()) for line, length in zip(tokens, examples.lengths[rows])]

    def join(self, parts):
        return [batch[position] for batch, positions in parts for position in positions]

    def run(self, stage, batch):
        self.batches.append((stage, len(batch), max(len(ids) for ids, _ in batch)))
        run = [(ids, (*seen, stage)) for ids, seen in batch]
        leaving = [position for position, (ids, _) in enumerate(run) if ids[0] <= stage]
        staying = [position for position in range(len(run)) if position not in leaving]
        rest = [run[position] for position in staying]
        return StageResult(leaving, [run[position] for position in leaving], staying, stage + 1, rest or None)

    def run_whole(self, batch):
        return [(ids, tuple(range(self.stages))) for ids, _ in batch]

    def as_arrays(self, answers):
        return RowAnswers(np.zeros((len(answers), self.stages, 2)), np.array([len(seen) - 1 for _, seen in answers]))


# The stage at which a row leaves, its tokens, its deadline, and the time since the row before it came.
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(1, 12), st.sampled_from([np.inf, 2.0]), st.sampled_from([0.0, 0.0, 0.5, 2.0])
    ),
    max_size=30,
)


@settings(max_examples=60)
@given(rows=ROWS, batch_size=st.integers(1, 5), max_tokens=st.none() | st.integers(1, 40))
def test_every_row_goes_through_its_stages_once(rows, batch_size, max_tokens):
    """Whatever the order in which rows come and time passes; batches keep their bounds."""
    model = CountingStages()
    scheduler = StageScheduler(model.stages, batch_size, model.start_cost, max_wait=1.0, max_tokens=max_tokens)
    flow = StagedFlow(model, scheduler, clock=lambda: now)
    times = list(itertools.accumulate(gap for *_, gap in rows))
    coming, answers, now = list(range(len(rows))), {}, 0.0
    while coming or len(scheduler):
        while coming and times[coming[0]] <= now:
            number = coming.pop(0)
            exit_, length, deadline, _ = rows[number]
            examples = model.read([{"input_ids": [exit_] * length}])
            flow.start([WaitingRow(number, length, deadline)], examples, np.arange(1))
        choice = scheduler.choose(now, is_closing=not coming)
        if choice is None:
            assert coming
            assert scheduler.due() > now
        else:
            left, said = flow.run(*choice)
            answers |= dict(zip([row.number for row in left], said))
        now += 0.25
    for number, (exit_, length, *_) in enumerate(rows):
        assert answers[number] == ([exit_] * length, tuple(range(exit_ + 1)))
    for _, size, longest in model.batches:
        assert size <= batch_size
        assert max_tokens is None or size == 1 or size * longest <= max_tokens


def waiting(scheduler, stage, lengths, now=0.0, first=0):
    rows = [WaitingRow(first + number, length) for number, length in enumerate(lengths)]
    scheduler.put(stage, rows, now)
    return rows


def test_waits_for_a_full_batch_but_not_longer_than_allowed():
    scheduler = StageScheduler(2, max_batch_size=3, start_cost=1, max_wait=1.0)
    rows = waiting(scheduler, 0, [4, 4], now=10.0)
    assert scheduler.choose(10.9) is None
    assert scheduler.due() == 11.0
    assert scheduler.choose(11.0) == (0, rows)
    rows += waiting(scheduler, 0, [4], now=10.5, first=2)
    assert scheduler.choose(10.5) == (0, rows)


def test_a_later_stage_waits_only_for_rows_that_can_come():
    scheduler = StageScheduler(2, max_batch_size=3, start_cost=1, max_wait=1.0)
    later = waiting(scheduler, 1, [4], now=0.0)
    assert scheduler.choose(0.0) == (1, later)
    waiting(scheduler, 0, [4], now=0.0, first=1)
    assert scheduler.choose(0.0) is None
    assert scheduler.choose(1.0) == (1, later)


def test_the_latest_full_stage_comes_first():
    scheduler = StageScheduler(3, max_batch_size=2, start_cost=1, max_wait=1.0)
    waiting(scheduler, 0, [4] * 9)
    later = waiting(scheduler, 1, [4] * 2, first=10)
    waiting(scheduler, 2, [4], first=20)
    assert scheduler.choose(0.5) == (1, later)


def test_a_deadline_that_nears_is_not_waited_for():
    scheduler = StageScheduler(2, max_batch_size=4, start_cost=1, max_wait=1.0)
    row = WaitingRow(7, 4, deadline=1.5)
    scheduler.put(0, [row], 0.0)
    assert scheduler.due() == 0.5
    assert scheduler.choose(0.4) is None
    assert scheduler.choose(0.5) == (0, [row])
    scheduler.take([row])
    assert scheduler.due() == np.inf


def test_rows_of_similar_length_are_run_together_with_the_one_that_waited_longest():
    scheduler = StageScheduler(1, max_batch_size=8, start_cost=1, max_wait=1.0)
    rows = waiting(scheduler, 0, [3, 40, 3, 41, 3])
    assert scheduler.choose(1.0) == (0, [rows[0], rows[2], rows[4]])


def test_a_failed_batch_can_be_run_again_row_by_row():
    model = CountingStages()
    scheduler = StageScheduler(model.stages, 8, model.start_cost)
    flow = StagedFlow(model, scheduler)
    rows = [WaitingRow(0, 2), WaitingRow(1, 2)]
    flow.start(rows, model.read([{"input_ids": [0, 0]}, {"input_ids": [1, 1]}]), np.arange(2))
    run, model.run = model.run, lambda stage, batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        flow.run(0, rows)
    model.run = run
    assert [row.number for row in flow.run(0, rows[:1])[0]] == [0]
    flow.drop(rows[1])
    assert len(scheduler) == 0


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).map(lambda rows: sorted(rows, reverse=True)),
    max_tokens=st.integers(1, 80),
)
def test_batches_are_bounded_in_tokens(lengths, max_tokens):
    sizes = cheapest_sizes(lengths, 5, 3, max_tokens)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    assert sum(sizes) == len(lengths)
    assert all(size == 1 or size * lengths[start] <= max_tokens for size, start in zip(sizes, starts))


PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
LOGITS = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).normal(scale=4, size=(7, 4, 3)).round(1).astype(np.float32)
)


@settings(max_examples=40)
@given(
    logits=LOGITS,
    name=st.sampled_from(sorted(CRITERIA)),
    problem=st.sampled_from(PROBLEMS),
    index=st.integers(0, 2),
    threshold=st.none() | st.floats(0, 1),
)
def test_numpy_decides_as_torch_does(logits, name, problem, index, threshold):
    criterion = CRITERIA[name]
    if problem not in criterion.problem_types:
        return
    logits[0, index] = np.nan
    certainty = np.linspace(0, 1, 7, dtype=np.float32)
    threshold = 2 if name == "patience" and threshold is not None else threshold
    policy = ThresholdPolicy(criterion, [threshold] * 3)
    ours = Evidence(logits[:, : index + 1], problem, certainty, tolerance=1.0)
    theirs = Evidence(torch.tensor(ours.logits), problem, torch.tensor(certainty), tolerance=1.0)
    signal = criterion.signal(theirs).numpy()
    np.testing.assert_allclose(criterion.signal(ours)[1:], signal[1:], rtol=1e-5, atol=1e-6)
    if threshold is None or np.abs(signal[1:] - threshold).min() > 1e-5 or name == "patience":
        assert policy.leaves(index, ours).tolist() == policy.leaves(index, theirs).tolist()
    for forced in (0, 2):
        assert ForcedPolicy(forced).leaves(2, ours).tolist() == ForcedPolicy(forced).leaves(2, theirs).tolist()


def test_neither_needs_torch():
    """They are loaded from a package of another name, so that nothing else is."""
    code = (
        "import sys, types\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "package = types.ModuleType('copy'); package.__path__ = [sys.argv[1]]; sys.modules['copy_of'] = package\n"
        "import copy_of.scheduling, copy_of.criteria\n"
        "print(sorted(copy_of.criteria.CRITERIA))"
    )
    folder = Path(scheduling.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(CRITERIA))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).map(lambda rows: sorted(rows, reverse=True)),
    chosen=st.integers(0, 8),
    limit=st.integers(1, 5),
    max_tokens=st.none() | st.integers(1, 80),
)
def test_no_other_batch_with_the_row_is_worth_more(lengths, chosen, limit, max_tokens):
    chosen %= len(lengths)

    def worth(start, stop):
        return sum(lengths[start:stop]) / (7 + (stop - start) * lengths[start])

    def is_allowed(start, stop):
        size = stop - start
        return size <= limit and (size == 1 or max_tokens is None or size * lengths[start] <= max_tokens)

    found = best_batch(lengths, chosen, limit, 7, max_tokens)
    others = [(i, j) for i in range(chosen + 1) for j in range(chosen + 1, len(lengths) + 1) if is_allowed(i, j)]
    assert found in others
    assert worth(*found) == pytest.approx(max(worth(*other) for other in others))
