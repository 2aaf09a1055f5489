"""The engine answers every row as the model does alone, whatever arrives, leaves, or goes wrong beside it."""

import asyncio
import contextlib
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive.serving import (
    DeadlineExceededError,
    EngineBrokenError,
    EngineClosedError,
    EngineFullError,
    ExitsEngine,
    NotANumberError,
)
from tests import tiny

MODELS = {
    "bert": tiny.model("bert"),
    "mpnet": tiny.model("mpnet"),
    "learned": tiny.model("roberta", exit_criterion="learned"),
    "patience": tiny.model("bert", exit_criterion="patience"),
    "cascade": tiny.cascade(),
}


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def alone(model, row, thresholds):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"]]), exit_thresholds=thresholds)


def check(answer, expected):
    assert answer.exit_index == expected.exit_index.item()
    np.testing.assert_allclose(answer.logits, expected.logits[0], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(answer.exit_logits, expected.exit_logits[0], atol=2e-5, rtol=1e-4)


def is_close_to_a_threshold(model, row, thresholds):
    """Whether rounding could change the exit."""
    if model.config.exit_criterion == "patience":
        return False
    out = alone(model, row, [None] * len(thresholds))
    signal = out.exit_logits[0].softmax(dim=-1).amax(dim=-1) if out.exit_certainty is None else out.exit_certainty[0]
    return any(t is not None and abs(value - t) < 1e-4 for value, t in zip(signal.tolist(), thresholds))


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=24),
    batch_size=st.integers(1, 9),
    max_wait_ms=st.sampled_from([0, 1, 5]),
    thresholds=st.lists(st.none() | st.floats(0.3, 1), min_size=2, max_size=2),
    pauses=st.lists(st.sampled_from([0, 0, 0.001]), min_size=1, max_size=5),
    cancelled=st.sets(st.integers(0, 23), max_size=5),
)
def test_equals_every_row_alone(name, lengths, batch_size, max_wait_ms, thresholds, pauses, cancelled):
    model, examples = MODELS[name], rows(lengths)
    if name == "patience":
        thresholds = [None if t is None else 2.0 for t in thresholds]
    futures = []
    with ExitsEngine(model, batch_size, max_wait_ms, exit_thresholds=thresholds, audit_share=0) as engine:
        for number, row in enumerate(examples):
            futures.append(engine.submit(row))
            time.sleep(pauses[number % len(pauses)])
            if number in cancelled:
                futures[-1].cancel()
    for row, future in zip(examples, futures):
        if future.cancelled():
            continue
        if not is_close_to_a_threshold(model, row, thresholds):
            check(future.result(0), alone(model, row, thresholds))
    done = engine.statistics()
    assert done.answered + done.cancelled == len(examples)
    assert sum(done.exits.values()) == done.answered
    assert all(size <= batch_size for sizes in done.batches for size in sizes)


def test_texts_pairs_and_rows_from_many_threads_and_coroutines():
    model, tokenizer = MODELS["bert"], tiny.tokenizer()
    texts = tiny.sentences(24)
    examples = [*texts, *zip(texts[:8], texts[8:16]), *({"input_ids": tokenizer(text).input_ids} for text in texts)]
    with ExitsEngine(model, tokenizer=tokenizer, exit_thresholds=0.5) as engine:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda example: engine.submit(example).result(), examples))

        async def ask_all():
            return await asyncio.gather(*(engine.answer(example) for example in examples))

        again = asyncio.run(ask_all())
    for example, answer, other in zip(examples, answers, again):
        ids = example["input_ids"] if isinstance(example, dict) else None
        ids = tokenizer(*([example] if isinstance(example, str) else example)).input_ids if ids is None else ids
        check(answer, alone(model, {"input_ids": ids}, 0.5))
        assert answer.exit_index == other.exit_index


class SlowModel:
    """A model whose stages wait for leave."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.may_run = threading.Event()
        self.entered = threading.Semaphore(0)

    def staged(self, **decisions):
        staged = self.model.staged(**decisions)
        run = staged.run

        def slow(stage, batch):
            self.entered.release()
            assert self.may_run.wait(20)
            return run(stage, batch)

        staged.run = slow
        return staged


@pytest.fixture
def slow():
    return SlowModel(tiny.model("bert"))


def test_a_full_engine_refuses_or_blocks(slow):
    row = rows([5])[0]
    engine = ExitsEngine(slow, max_waiting=2)
    futures = [engine.submit(row) for _ in range(2)]
    with pytest.raises(EngineFullError, match="2 rows wait already"):
        engine.submit(row)
    with pytest.raises(EngineFullError):
        asyncio.run(engine.answer(row))
    futures[1].cancel()
    futures.append(engine.submit(row))
    slow.may_run.set()
    engine.close()
    assert [future.cancelled() for future in futures] == [False, True, False]
    blocking = ExitsEngine(slow, max_waiting=1, when_full="block")
    with ThreadPoolExecutor(4) as pool:
        assert len({future.result().exit_index for future in pool.map(blocking.submit, [row] * 9)}) == 1

    async def ask_all():
        return await asyncio.gather(*(blocking.answer(row) for _ in range(5)))

    assert len(asyncio.run(ask_all())) == 5
    blocking.close()


def test_who_waits_for_a_cancelled_row_is_told(slow):
    row = rows([5])[0]
    engine = ExitsEngine(slow, max_batch_size=1)
    running, waiting = engine.submit(row), engine.submit(row)
    assert waiting.cancel()
    slow.may_run.set()
    done, unfinished = wait([running, waiting], timeout=20)
    engine.close()
    assert done == {running, waiting}
    assert not unfinished


def test_a_coroutine_that_is_cancelled_while_it_waits_for_a_place_leaves_it(slow):
    row = rows([5])[0]
    engine = ExitsEngine(slow, max_waiting=1, when_full="block")
    first = engine.submit(row)

    async def give_up():
        waits = asyncio.ensure_future(engine.answer(row))
        await asyncio.sleep(0.05)
        waits.cancel()
        slow.may_run.set()
        with contextlib.suppress(asyncio.CancelledError):
            await waits
        # The place that it would have got is there for the next one, more than once.
        for _ in range(3):
            await asyncio.wait_for(engine.answer(row), timeout=20)

    asyncio.run(give_up())
    assert first.done()
    engine.close()


def test_a_deadline_passes_while_others_are_run(slow):
    row = rows([5])[0]
    with ExitsEngine(slow, max_batch_size=1) as engine:
        first = engine.submit(row)
        slow.entered.acquire()
        late = engine.submit(row, timeout_ms=1)
        time.sleep(0.01)
        slow.may_run.set()
        with pytest.raises(DeadlineExceededError):
            late.result(20)
        assert first.result(20) is not None
        assert engine.submit(row, timeout_ms=20_000).result(20) is not None
    assert engine.statistics().failed == {"DeadlineExceededError": 1}


def test_closing_drains_or_cancels(slow):
    row = rows([5])[0]
    engine = ExitsEngine(slow, max_batch_size=1)
    waiting = [engine.submit(row) for _ in range(3)]
    slow.entered.acquire()
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    with pytest.raises(CancelledError):
        waiting[2].result(20)
    slow.may_run.set()
    closing.join()
    with pytest.raises(EngineClosedError):
        engine.submit(row)
    assert not engine.is_alive
    engine = ExitsEngine(MODELS["bert"])
    waiting = [engine.submit(row) for _ in range(30)]
    engine.close()
    assert all(future.done() for future in waiting)


@pytest.mark.parametrize(
    "bad",
    [
        {"input_ids": []},
        {"input_ids": [3, tiny.VOCABULARY + 5]},
        {"input_ids": [5] * 200},
        {"text": "no tokens"},
        {"input_ids": [3, 4], "attention_mask": [0, 0]},
    ],
    ids=["empty", "no such token", "too long", "not tokenised", "nothing real"],
)
def test_a_bad_row_fails_alone(bad):
    good = rows([5, 9, 3])
    with ExitsEngine(MODELS["bert"], max_wait_ms=20, exit_thresholds=0.5) as engine:
        futures = [engine.submit(row) for row in [good[0], bad, *good[1:]]]
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        futures.pop(1).result(0)
    for row, future in zip(good, futures):
        check(future.result(0), alone(MODELS["bert"], row, 0.5))


def test_a_row_for_which_the_model_says_nan_fails_alone():
    model = tiny.model("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7] = torch.nan
    with ExitsEngine(model, max_wait_ms=20, exit_thresholds=0.5) as engine:
        futures = [engine.submit({"input_ids": ids}) for ids in ([5, 6], [5, 7])]
    assert futures[0].result(0) is not None
    with pytest.raises(NotANumberError):
        futures[1].result(0)


def test_what_is_no_example_is_refused_at_once():
    with ExitsEngine(MODELS["bert"]) as engine:
        with pytest.raises(ValueError, match="texts need a tokenizer"):
            engine.submit("a text")
        for wrong in (5, None, b"bytes", ("one", "two", "three"), ["a", 1]):
            with pytest.raises(TypeError, match="an example must be"):
                engine.submit(wrong)
    with pytest.raises(TypeError, match="needs a classifier with exits"):
        ExitsEngine(tiny.plain_model("bert"))
    for wrong, name in ({"max_batch_size": 0}, "max_batch_size"), ({"when_full": "wait"}, "when_full"):
        with pytest.raises(ValueError, match=name):
            ExitsEngine(MODELS["bert"], **wrong)
    with pytest.raises(ValueError, match="evaluation mode"):
        ExitsEngine(tiny.model("bert").train())


def test_another_model_takes_over_without_losing_a_row():
    first, second = tiny.model("bert"), tiny.model("mpnet", exit_layers=[2, 4])
    examples = rows(range(2, 20))
    with ExitsEngine(first, max_batch_size=3, exit_thresholds=0.5) as engine:
        before = [engine.submit(row) for row in examples]
        engine.reload(second)
        after = [engine.submit(row) for row in examples]
        with pytest.raises(TypeError, match="needs a classifier"):
            engine.reload(object())
    for row, old, new in zip(examples, before, after):
        check(old.result(0), alone(first, row, 0.5))
        check(new.result(0), alone(second, row, 0.5))
    assert engine.statistics().answered == len(examples)


def test_a_dead_worker_fails_those_who_wait(slow, monkeypatch):
    row = rows([5])[0]
    engine = ExitsEngine(slow, max_batch_size=1)
    waiting = [engine.submit(row) for _ in range(3)]
    monkeypatch.setattr(engine, "_answer", lambda *_: 1 / 0)
    slow.may_run.set()
    for future in waiting:
        with pytest.raises(EngineBrokenError):
            future.result(20)
    with pytest.raises(EngineBrokenError):
        engine.submit(row)
    assert not engine.is_alive
    engine.close()


def test_statistics():
    model = MODELS["bert"]
    with ExitsEngine(model, exit_thresholds=0.0, audit_share=0) as engine:
        for row in rows([5] * 10):
            engine.submit(row).result()
        done = engine.statistics().to_dict()
    assert done["exits"] == {1: 10, 2: 0, 4: 0}
    assert done["waiting"] == [0, 0, 0]
    assert done["batches"][0] == {1: 10}
    assert done["latency_ms"][1]["p50"] <= done["latency_ms"][1]["p99"]
    assert done["tokens_per_second"] == pytest.approx(5 * done["rows_per_second"])
    assert done["rows_per_second"] > 0


def test_futures_are_concurrent_futures():
    with ExitsEngine(MODELS["bert"]) as engine:
        assert isinstance(engine.submit(rows([3])[0]), Future)


def test_an_exported_classifier(tmp_path):
    pytest.importorskip("onnxruntime")
    model = MODELS["bert"]
    pytest.importorskip("onnxscript")
    onnx = export(model, tmp_path / "onnx")
    examples = rows(range(2, 14))
    with ExitsEngine(onnx, max_batch_size=4, exit_thresholds=0.5, audit_share=1.0) as engine:
        futures = [engine.submit(row) for row in examples]
    for row, future in zip(examples, futures):
        if not is_close_to_a_threshold(model, row, [0.5, 0.5]):
            check(future.result(0), alone(model, row, 0.5))
    assert engine.statistics().answered == len(examples)


def export(model, folder):
    from hf_adaptive import OnnxClassifierWithExits, export_onnx

    export_onnx(model, folder)
    return OnnxClassifierWithExits.from_pretrained(folder, threads=1)


def test_answered_rows_are_not_kept_until_their_deadline():
    with ExitsEngine(MODELS["bert"], exit_thresholds=0.5, audit_share=0) as engine:
        futures = [engine.submit(row, timeout_ms=600_000) for row in rows([5] * 1500)]
        for future in futures:
            future.result(20)
        # One more request for the worker to look at what it keeps.
        engine.submit(rows([5])[0]).result(20)
        kept = [weakref.ref(future) for future in futures]
        del future, futures
        wait = time.monotonic() + 10
        while sum(one() is not None for one in kept) > 700 and time.monotonic() < wait:
            time.sleep(0.02)
        assert sum(one() is not None for one in kept) <= 700
