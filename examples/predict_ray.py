"""Answers to a folder of Parquet files with millions of texts, on many machines, with Ray Data.

    pip install "hf_adaptive[ray]"
    python examples/predict_ray.py FOLDER_OR_HUB_NAME reviews/ answers/ --workers 8

Tokenisation runs in tasks, models in actors (`predict_stream`). Every column is kept; label, score and layers run are
added. Files are done some at a time, and what is done is written whole: a run that was stopped goes on where it was,
with the same command. Ray repeats what a dead machine was doing.
"""

import argparse
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from transformers import AutoTokenizer

from hf_adaptive.serving.loading import load_for_serving

Columns = dict[str, Any]
# Texts of a task, and texts that an actor reads at a time.
TOKENISED_AT_ONCE, PREDICTED_AT_ONCE = 1024, 4096


class Tokenise:
    """A task that adds token ids.

    Args:
        path (`str`): Of the tokenizer.
        column (`str`): With the texts.
    """

    def __init__(self, path: str, column: str):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.column = column

    def __call__(self, batch: Columns) -> Columns:
        """Some rows, with their tokens."""
        tokens = self.tokenizer([str(text) for text in batch[self.column]], truncation=True)["input_ids"]
        ids = np.empty(len(tokens), dtype=object)
        ids[:] = [np.array(row, dtype=np.int32) for row in tokens]
        return {**batch, "input_ids": ids}


class Predict:
    """An actor with a model.

    Args:
        path (`str`): Of the checkpoint.
        device (`str`): Where it is run.
    """

    def __init__(self, path: str, device: str):
        self.model, _ = load_for_serving(path, device=device)

    def __call__(self, batch: Columns) -> Columns:
        """Some rows, answered."""
        answers = list(self.model.predict_stream({"input_ids": ids} for ids in batch.pop("input_ids")))
        logits = np.stack([answer.logits.float().numpy() for answer in answers]).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        labels = [self.model.config.id2label[index] for index in logits.argmax(axis=1).tolist()]
        depths = np.array(self.model.config.exit_layers)[[int(answer.exit_index) for answer in answers]]
        score = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
        return {**batch, "label": np.array(labels), "score": score, "layers_run": depths}


def groups(folder: Path, size: int) -> Iterator[list[Path]]:
    """The Parquet files of a folder, so many at a time."""
    files = sorted(folder.glob("**/*.parquet"))
    if not files:
        raise ValueError(f"there are no .parquet files in {folder}.")
    for start in range(0, len(files), size):
        yield files[start : start + size]


def part_name(files: Sequence[Path], root: Path) -> str:
    """The same for the same files, wherever they lie."""
    names = "\n".join(str(file.relative_to(root)) for file in files)
    return "part-" + hashlib.sha256(names.encode()).hexdigest()[:16]


def predict_files(path: str, files: Sequence[Path], into: Path, asked: Mapping[str, Any]) -> None:
    """Answers some files; the folder is there when all of it is."""
    draft = into.with_name(f"{into.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    device, workers = asked["device"], asked["workers"]
    resources = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": 1}
    rows = ray.data.read_parquet([str(file) for file in files])
    rows = rows.map_batches(
        Tokenise,
        fn_constructor_args=(path, asked["text_column"]),
        batch_size=TOKENISED_AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=asked["tokenisers"]),
        num_cpus=0.5,
    )
    rows = rows.map_batches(
        Predict,
        fn_constructor_args=(path, device),
        batch_size=PREDICTED_AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )
    rows.write_parquet(str(draft))
    draft.rename(into)


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers what is not answered yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("input", type=Path, help="folder of Parquet files, that all machines see")
    parser.add_argument("output", type=Path, help="likewise; one folder for each group of files")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--workers", type=int, default=1, help="models")
    parser.add_argument("--tokenisers", type=int, default=1)
    parser.add_argument("--files_at_a_time", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    for files in groups(asked.input, asked.files_at_a_time):
        into = asked.output.resolve() / part_name(files, asked.input)
        if not into.exists():
            predict_files(asked.model, files, into, vars(asked))
        print(f"{into}: {len(files)} files", flush=True)


if __name__ == "__main__":
    main()
