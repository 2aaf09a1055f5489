"""The HTTP server, asked by real clients."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient
from prometheus_client.parser import text_string_to_metric_families

from hf_adaptive.serving import EngineFullError, ExitsEngine
from hf_adaptive.serving.__main__ import main
from hf_adaptive.serving.api import Limits
from hf_adaptive.serving.loading import load_for_serving
from hf_adaptive.serving.server import Service, StoppingServer, make_app
from tests import tiny
from tests.serving.test_engine import SlowModel

LIMITS = Limits(max_texts=4, max_characters=200, max_body_bytes=2000, timeout_ms=20_000, read_timeout_s=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny.model("bert", exit_thresholds=[0.6, 0.6], id2label={0: "bad", 1: "fair", 2: "good"}).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def serving(model, tokenizer, restarts=False, **settings):
    """A server in a thread, and its address."""
    deaths = []
    make_engine = lambda: ExitsEngine(model, tokenizer=tokenizer, **settings)  # noqa: E731
    service = Service(make_engine, "tiny", LIMITS, restarts, on_death=lambda: deaths.append(1))
    service.deaths = deaths
    listener = socket.create_server(("127.0.0.1", 0))
    server = StoppingServer(make_app(service), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    service.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(checkpoint):
    with serving(*load_for_serving(str(checkpoint))) as service:
        yield service


def ask(service, content, **headers):
    return httpx.post(f"{service.address}/classify", content=content, headers=headers)


def test_the_client_of_hugging_face(served, checkpoint):
    model, tokenizer = load_for_serving(str(checkpoint))
    for address in (served.address, f"{served.address}/classify"):
        client = InferenceClient(model=address)
        for text in tiny.sentences(6):
            (best,) = client.text_classification(text)
            every = client.text_classification(text, top_k=3)
            with torch.no_grad():
                expected = model(**tokenizer(text, return_tensors="pt"))
            scores = expected.logits[0].softmax(dim=-1)
            assert best.label == model.config.id2label[scores.argmax().item()]
            assert best.score == pytest.approx(scores.max().item(), abs=1e-5)
            assert [one.score for one in every] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)
            assert best.exit == expected.exit_index.item()
            assert best.layers_run == tiny.EXIT_LAYERS[best.exit]
    raw = client.text_classification("good film", function_to_apply="none")
    expected = model(**tokenizer("good film", return_tensors="pt")).logits.max().item()
    assert raw[0].score == pytest.approx(expected, abs=1e-5)


def test_lists_and_pairs(served):
    texts = ["good film", {"text": "good", "text_pair": "bad"}, {"text": "dull plot"}]
    answers = ask(served, json.dumps({"inputs": texts})).json()
    assert [len(labels) for labels in answers] == [1, 1, 1]
    alone = [ask(served, json.dumps({"inputs": text})).json()[0][0] for text in texts]
    assert [labels[0]["label"] for labels in answers] == [labels["label"] for labels in alone]


BAD = {
    "no JSON": ("{inputs", 400, "json"),
    "deep JSON": ("[" * 900, 400, "json"),
    "not UTF-8": (b'{"inputs": "\xff\xfe"}', 400, "encoding"),
    "half a surrogate": ('{"inputs": "\\ud800"}', 422, "encoding"),
    "no object": ('"good"', 422, "validation"),
    "no inputs": ('{"text": "good"}', 422, "validation"),
    "unknown field": ('{"inputs": "good", "temperature": 1}', 422, "validation"),
    "unknown parameter": ('{"inputs": "good", "parameters": {"k": 1}}', 422, "validation"),
    "wrong parameters": ('{"inputs": "good", "parameters": 3}', 422, "validation"),
    "wrong top_k": ('{"inputs": "good", "parameters": {"top_k": true}}', 422, "validation"),
    "wrong function": ('{"inputs": "good", "parameters": {"function_to_apply": "exp"}}', 422, "validation"),
    "a number": ('{"inputs": 5}', 422, "validation"),
    "null": ('{"inputs": null}', 422, "validation"),
    "empty text": ('{"inputs": " "}', 422, "validation"),
    "no texts": ('{"inputs": []}', 422, "validation"),
    "nested": ('{"inputs": [["a", "b"]]}', 422, "validation"),
    "too many texts": (json.dumps({"inputs": ["a"] * 5}), 413, "validation"),
    "a long text": (json.dumps({"inputs": "a" * 201}), 413, "too_long"),
    "a large body": (json.dumps({"inputs": "a" * 1_000_000}), 413, "too_long"),
    "an empty body": ("", 400, "json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_the_callers_fault(served, name):
    content, status, kind = BAD[name]
    answer = ask(served, content, **{"X-Request-ID": "mine"})
    assert answer.status_code == status
    assert answer.json()["error_type"] == kind
    assert answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"] == "mine"


def test_wrong_ways(served):
    for method, path, status in ("GET", "/classify", 405), ("DELETE", "/health", 405), ("POST", "/elsewhere", 404):
        answer = httpx.request(method, served.address + path)
        assert answer.status_code == status
        assert answer.json()["error_type"] == "http"
    # An identity that cannot stand in a header is replaced.
    assert len(ask(served, '{"inputs": "good"}', **{"X-Request-ID": "a b"}).headers["X-Request-ID"]) == 32
    connection = http.client.HTTPConnection(served.address.removeprefix("http://"))
    connection.putrequest("POST", "/classify")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"inputs"')
    answer = connection.getresponse()
    assert answer.status == 408
    connection.close()


def test_health_and_metrics(served):
    ask(served, '{"inputs": "good film"}')
    health = httpx.get(f"{served.address}/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["leaves_early"] is True
    text = httpx.get(f"{served.address}/metrics").text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    answered = served.engine.statistics().exits
    assert [samples["hf_adaptive_rows_total", str(depth)] for depth in answered] == list(answered.values())
    assert samples["hf_adaptive_requests_total", "/classify", "200"] >= 1
    assert samples[("hf_adaptive_drift",)] == 0


def test_full_late_and_cancelled(checkpoint):
    model, tokenizer = load_for_serving(str(checkpoint))
    slow = SlowModel(model)
    with serving(slow, tokenizer, max_waiting=2) as service, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, service, '{"inputs": ["good film", "bad film"]}')
        slow.entered.acquire()
        full = ask(service, '{"inputs": "good"}')
        assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
        assert full.json()["error_type"] == "overloaded"
        slow.may_run.set()
        assert first.result().status_code == 200
        slow.may_run.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.address}/classify", json={"inputs": ["good", "bad"]}, timeout=0.3)
        slow.may_run.set()
        # The places of those who went away are free again.
        wait_until(lambda: ask(service, '{"inputs": ["good", "bad"]}').status_code == 200)


def wait_until(is_so, seconds=10):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_worker_that_dies(checkpoint, restarts):
    with serving(*load_for_serving(str(checkpoint)), restarts=restarts) as service:
        service.engine._answer = lambda *_: 1 / 0
        failed = ask(service, '{"inputs": "good"}')
        assert (failed.status_code, failed.json()["error_type"]) == (500, "model")
        after = ask(service, '{"inputs": "good"}').status_code
        assert after == (200 if restarts else 500)
        assert httpx.get(f"{service.address}/health").status_code == (200 if restarts else 503)
        assert len(service.deaths) == (0 if restarts else 1)


def test_checkpoints_that_cannot_be_served(checkpoint, tmp_path, capsys):
    tiny.plain_model("bert").save_pretrained(tmp_path / "plain")
    assert main([str(tmp_path / "plain"), "--port", "0"]) == 2
    assert "has no exits" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "nothing" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([str(checkpoint), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert main([str(checkpoint), "--port", "0", "--max-batch-size", "0"]) == 2
    assert "max_batch_size" in capsys.readouterr().err


def test_sigterm_under_load_loses_nothing(checkpoint):
    """Whoever was let in is answered; later callers find nobody, and the process ends well."""
    command = [sys.executable, "-m", "hf_adaptive.serving", str(checkpoint), "--port", "0", "--max-wait-ms", "20"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        address = next(line for line in run.stdout if line.startswith("Serving")).split()[-1]
        answered, refused = [], []

        def ask_on(number):
            with httpx.Client() as client:
                while not refused:
                    try:
                        answer = client.post(f"{address}/classify", json={"inputs": f"good {number}"})
                        answered.append(answer.status_code)
                    except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError) as error:
                        refused.append(error)

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask_on, number) for number in range(4)]
            try:
                wait_until(lambda: len(answered) > 20, 60)
            finally:
                run.send_signal(signal.SIGTERM)
            for one in asking:
                one.result(30)
        assert run.wait(20) == 0
    assert set(answered) == {200}


def test_the_engine_is_full_for_a_list_as_a_whole(checkpoint):
    with serving(*load_for_serving(str(checkpoint)), max_waiting=2) as service:
        assert ask(service, '{"inputs": ["a", "b", "c"]}').status_code == 503
        assert ask(service, '{"inputs": ["a", "b"]}').status_code == 200
        with pytest.raises(EngineFullError):
            [service.engine.submit("good") for _ in range(100)]
