"""The Ray examples on a local Ray of two workers: answers are the model's, and a killed worker loses nothing."""

import importlib
import os
import signal
import sys
import time

import httpx
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch

from hf_adaptive.serving.loading import load_for_serving
from tests import tiny

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.skipif("RUN_RAY" not in os.environ, reason="takes minutes: RUN_RAY=1 runs it"),
    # Two workers are too many for so few texts, and other advice of Ray's.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny.model("bert", exit_thresholds=[0.6, 0.6]).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cluster():
    # Workers find the examples where this process does.
    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=paths)
    yield
    ray.shutdown()


def expected(checkpoint, texts):
    model, tokenizer = load_for_serving(str(checkpoint))
    with torch.no_grad():
        outputs = [model(**tokenizer(text, return_tensors="pt")) for text in texts]
    labels = [model.config.id2label[out.logits.argmax().item()] for out in outputs]
    return list(zip(labels, [model.config.exit_layers[out.exit_index.item()] for out in outputs]))


def write_texts(folder, files, rows):
    texts = tiny.sentences(files * rows)
    folder.mkdir()
    for number in range(files):
        own = texts[number * rows : (number + 1) * rows]
        table = pyarrow.table({"id": range(number * rows, (number + 1) * rows), "text": own})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    return texts


def read_answers(folder):
    rows = pyarrow.parquet.read_table(folder).to_pylist()
    return {row["id"]: (row["label"], row["layers_run"]) for row in rows}, len(rows)


def dying_once(predict, mark):
    """The actor of the example, of which the first that is asked dies as on a machine that fails."""

    class Dying(predict):
        def __call__(self, batch):
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    return Dying


def test_a_folder_of_texts_is_answered_and_a_killed_worker_loses_nothing(checkpoint, cluster, tmp_path, monkeypatch):
    predict_ray = importlib.import_module("predict_ray")
    texts = write_texts(tmp_path / "in", files=3, rows=40)
    mark = tmp_path / "died"
    monkeypatch.setattr(predict_ray, "Predict", dying_once(predict_ray.Predict, mark))
    arguments = [str(checkpoint), str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "2"]
    predict_ray.main([*arguments, "--files_at_a_time", "2"])
    assert mark.exists()
    answers, rows = read_answers(tmp_path / "out")
    assert rows == len(texts)
    assert [answers[number] for number in range(len(texts))] == expected(checkpoint, texts)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    predict_ray.main([*arguments, "--files_at_a_time", "2"])
    assert done == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def replicas():
    """Processes of the replicas, which Ray names by what they run."""
    return [one for one in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(one.info["cmdline"] or [])]


def asked(client, texts):
    """Labels and layers run, or nothing while a replica is being replaced."""
    response = client.post("http://127.0.0.1:8765/", json={"inputs": texts})
    return [(one[0]["label"], one[0]["layers_run"]) for one in response.json()] if response.is_success else None


def test_two_replicas_answer_as_the_model_and_a_killed_one_is_replaced(checkpoint, cluster):
    serve_ray = importlib.import_module("serve_ray")
    serve = importlib.import_module("ray.serve")
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    serve.run(serve_ray.application(str(checkpoint), least=2, most=2, target=8))
    texts = tiny.sentences(20)
    answers = expected(checkpoint, texts)
    with httpx.Client(timeout=60) as client:
        assert asked(client, texts) == answers
        bad = client.post("http://127.0.0.1:8765/", content="no JSON")
        assert (bad.status_code, bad.json()["error_type"]) == (400, "json")
        first = {one.pid for one in replicas()}
        assert len(first) == 2
        os.kill(min(first), signal.SIGKILL)
        limit = time.monotonic() + 120
        while len(now := {one.pid for one in replicas()}) < 2 or min(first) in now:
            assert asked(client, texts) in (answers, None)
            assert time.monotonic() < limit, "the killed replica was not replaced"
            time.sleep(1)
        assert asked(client, texts) == answers
    serve.shutdown()
