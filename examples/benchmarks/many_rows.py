"""The rows on a million texts: memory of `predict` beside the texts themselves, and `predict_stream` beside `predict`.

    python many_rows.py '{"of": "predict", "rows": 1000000}'    # or "predict_stream": alone in its process

The classifier is a tiny one with random weights: what is asked is what the library itself needs for every row.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from inference import WARM_UP_TEXTS
from measuring import Spread, measure_in_turn, measured_alone, medians, ratio
from memory_probe import ProcessMemory
from results import Result, Target
from workload import Workload

from hf_adaptive import BertForSequenceClassificationWithExits, BertWithExitsConfig

VOCABULARY, WINDOW, BATCH_SIZE = 1000, 4096, 64
# Tokens of a text, on average; as those of sentences, some are much longer.
MEAN_LENGTH, LONGEST = 24, 60
# What libraries need is there after a first, small call.
WARM_UP_ROWS = 2 * WINDOW


def many_rows(workload: Workload) -> list[Result]:
    """Each in a process of its own, on the CPU."""
    rows = workload.size.many_rows
    whole, stream = (_measured({"of": of, "rows": rows}) for of in ("predict", "predict_stream"))
    fewer = _measured({"of": "predict_stream", "rows": rows // 10})
    return [
        Result(
            "many_rows",
            f"memory of predict on {rows:,} rows",
            "rows, and the rise of the peak less one window / rows and answers",
            Target(1.2),
            Spread.of([(whole["rows"] + whole["rise"] - whole["window"]) / (whole["rows"] + whole["answers"])]),
            {f"{name}, MB": whole[name] for name in ("rows", "answers", "window", "rise")},
        ),
        Result(
            "many_rows",
            f"memory of predict_stream on {rows:,} rows",
            "rise of the peak / that of a tenth of the rows",
            Target(1.1),
            Spread.of([stream["rise"] / fewer["rise"]]),
            {"window, MB": stream["window"], "rise, MB": stream["rise"], "of a tenth, MB": fewer["rise"]},
        ),
        _stream_beside_predict(workload),
    ]


def _stream_beside_predict(workload: Workload) -> Result:
    """The workload's own texts, thresholds and encoder, in turn."""
    texts = Dataset.from_list([dict(text) for text in workload.texts])
    model, thresholds = workload.model, workload.thresholds
    runs = {"predict": lambda: predict(model, texts, thresholds), "stream": lambda: stream(model, texts, thresholds)}
    few = texts.select(range(min(WARM_UP_TEXTS, len(texts))))
    warm_up = {"predict": lambda: predict(model, few, thresholds), "stream": lambda: stream(model, few, thresholds)}
    seconds = measure_in_turn(runs, warm_up, workload.size.repeats, workload.device, "predict_stream")
    return Result(
        "many_rows",
        f"predict_stream on {len(texts)} texts",
        "time / predict",
        Target(1.05),
        ratio(seconds["stream"], seconds["predict"]),
        medians(seconds),
    )


def _measured(job: dict[str, Any]) -> dict[str, float]:
    # oneDNN keeps kernels of shapes that it has seen, up to a number: they would be counted for the rows.
    return measured_alone(Path(__file__), job, OMP_NUM_THREADS="1", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1")


def main() -> None:
    """Runs the job."""
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    run = {"predict": predict, "predict_stream": stream}[job["of"]]
    model = classifier()
    run(model, texts(WARM_UP_ROWS))
    examples, memory = texts(job["rows"]), ProcessMemory()
    # What making the texts left behind would else be given back meanwhile.
    pyarrow.default_memory_pool().release_unused()
    memory.start()
    run(model, examples)
    rise = memory.rise() / 1000
    # Of each row: the exit taken, its scores, and those of every exit.
    answers = job["rows"] * (8 + 4 * model.config.num_labels * (1 + len(model.config.exit_layers))) / 1e6
    own = examples.data.nbytes / 1e6
    window = own * WINDOW / job["rows"]
    print(json.dumps({"rows": own, "answers": answers, "window": window, "rise": rise}))


def classifier() -> Any:
    """Two layers, two exits, some rows leaving at each."""
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 2}
    exits = {"exit_layers": [1, 2], "exit_pooling": "mean", "exit_thresholds": 0.5, "num_labels": 2}
    config = BertWithExitsConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **exits)
    return BertForSequenceClassificationWithExits(config).eval()


def texts(rows: int) -> Dataset:
    """Random tokens, as a data set that is tokenised holds them."""
    random = np.random.default_rng(0)
    lengths = np.minimum(3 + random.geometric(1 / (MEAN_LENGTH - 3), rows), LONGEST)
    ends = pyarrow.array(np.concatenate([[0], lengths.cumsum()]), type=pyarrow.int32())
    tokens = int(lengths.sum())
    columns = {
        "input_ids": random.integers(5, VOCABULARY, tokens, dtype=np.int32),
        "token_type_ids": np.zeros(tokens, dtype=np.int8),
        "attention_mask": np.ones(tokens, dtype=np.int8),
    }
    lists = {name: pyarrow.ListArray.from_arrays(ends, pyarrow.array(values)) for name, values in columns.items()}
    return Dataset(pyarrow.table(lists))


def predict(model: Any, examples: Dataset, thresholds: list[float] | None = None) -> Any:
    """All at once."""
    return model.predict(examples, BATCH_SIZE, thresholds, show_progress=False)


def stream(model: Any, examples: Dataset, thresholds: list[float] | None = None) -> int:
    """One after the other, in windows, from what can only be iterated over."""
    return sum(1 for _ in model.predict_stream(iter(examples), BATCH_SIZE, WINDOW, thresholds))


if __name__ == "__main__":
    main()
