"""Tokenised examples, read in one way from whatever holds them. Without torch: models exported to other engines read
their data by this code, too."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .checks import shortened

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# Rows that are converted at a time, so that Python's lists of numbers are never there for all rows.
_WINDOW = 1024
_HOW = (
    "Give tokenised examples, such as a datasets.Dataset or a list of {'input_ids': [...], 'attention_mask': [...]}."
)


def as_rows(examples: Any) -> Sequence[Mapping[str, Any]]:
    """Examples that can be counted and asked for one by one: what was given, or the rows of a dict of columns.

    Args:
        examples: A sequence of mappings (a `datasets.Dataset`, a list), or a mapping from a column's name to its rows,
            as a tokenizer returns it for a list of texts.

    Raises:
        ValueError: Anything else; it says what was given and what to do.
    """
    if isinstance(examples, Mapping):
        return _Columns(examples)
    if isinstance(examples, (str, bytes)):
        raise ValueError(f"examples must be tokenised, got a text: {shortened(examples)}. {_HOW}")
    kind = type(examples)
    if isinstance(examples, np.ndarray) or _is_tensor(examples):
        raise ValueError(
            f"examples must be a sequence of mappings, or a mapping of columns, got a {kind.__name__}. Give "
            "{'input_ids': ..., 'attention_mask': ...}."
        )
    missing = [name for name in ("__len__", "__getitem__") if not callable(getattr(kind, name, None))]
    if missing:
        raise ValueError(
            f"examples must have a length and be asked for by number, but {kind.__name__} has no "
            f"{' and no '.join(missing)}. Give list(...) of it, if it fits into memory."
        )
    return examples


class _Columns(Sequence[Mapping[str, Any]]):
    """The rows of a mapping of columns.

    Args:
        columns (`Mapping[str, Any]`): By name, what has one entry an example: lists, arrays or tensors.
    """

    def __init__(self, columns: Mapping[str, Any]):
        self.columns = {name: _column(name, values) for name, values in columns.items() if is_list(values)}
        counts = {name: len(values) for name, values in self.columns.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"columns of examples must have one entry an example each, got entries: {counts}.")
        if not counts:
            raise ValueError(
                f"examples given as a mapping must map names to columns, got the names {shortened(list(columns))}. "
                f"Did you mean one of its splits? {_HOW}"
            )
        self.rows = next(iter(counts.values()))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(self.rows))]
        return {name: values[index] for name, values in self.columns.items()}


def _column(name: str, values: Any) -> Any:
    if name in INPUT_NAMES and len(values) and np.ndim(values[0]) == 0 and not isinstance(values[0], (str, bytes)):
        raise ValueError(
            f"examples[{name!r}] must have one list of numbers an example, got numbers. For a single example give a "
            "list of one: [example]."
        )
    return as_array(values) if _is_tensor(values) else values


def is_list(values: Any) -> bool:
    """Whether it can be a column: a list, an array or a tensor."""
    return isinstance(values, (list, tuple, np.ndarray)) or _is_tensor(values)


@dataclass(frozen=True)
class _Part:
    """Some consecutive rows, the values of each column one after another.

    Args:
        values (`dict[str, np.ndarray]`): By column; without the mask if it leaves out nothing between a row's first
            and last real token.
        starts (`np.ndarray` of shape `(rows,)`): Where each row's first real token stands.
        lengths (`np.ndarray` of shape `(rows,)`): Tokens from the first real one to the last.
        is_whole (`np.ndarray` of shape `(rows,)`): Whether all of these are real.
    """

    values: dict[str, np.ndarray]
    starts: np.ndarray
    lengths: np.ndarray
    is_whole: np.ndarray


class TokenisedExamples:
    """Checked examples without the padding around them.

    Attributes:
        names (`tuple[str, ...]`): Columns, `attention_mask` among them in any case.
        has_masks (`bool`): Whether the examples said themselves what is padding.
        lengths (`np.ndarray` of shape `(rows,)`): Tokens from the first real one to the last.
        is_whole (`np.ndarray` of shape `(rows,)`): Whether all of these are real.
    """

    def __init__(self, names: tuple[str, ...], parts: list[_Part]):
        self.has_masks = "attention_mask" in names
        self.names = names if self.has_masks else (*names, "attention_mask")
        self.lengths = np.concatenate([part.lengths for part in parts], dtype=np.int32)
        self.is_whole = np.concatenate([part.is_whole for part in parts])
        # Each of _WINDOW rows, but for the last one.
        self._values = [part.values for part in parts]
        self._starts = np.concatenate([part.starts for part in parts], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, name: str, rows: np.ndarray, padding: int) -> np.ndarray:
        """A column of some rows, padded on the right.

        Args:
            name (`str`): One of `names`.
            rows (`np.ndarray` of shape `(batch,)`): Numbers of examples.
            padding (`int`): What to pad with.

        Returns:
            `np.ndarray` of shape `(batch, longest of them)`: int64.
        """
        lengths = self.lengths[rows]
        padded = np.full((len(rows), lengths.max()), padding, dtype=np.int64)
        if name == "attention_mask" and self.is_whole[rows].all():
            np.copyto(padded, 1, where=np.arange(padded.shape[1]) < lengths[:, None])
            return padded
        spans = zip((rows // _WINDOW).tolist(), self._starts[rows].tolist(), lengths.tolist())
        for line, (part, start, length) in zip(padded, spans):
            values = self._values[part].get(name)
            line[:length] = 1 if values is None else values[start : start + length]
        return padded


def read_examples(examples: Any, limits: Mapping[str, int] | None = None) -> TokenisedExamples:
    """Reads and checks `len(examples)` rows.

    Args:
        examples: As for [`as_rows`]: with `input_ids` and, where there are any, `attention_mask`, `token_type_ids` and
            `position_ids`; lists, arrays or tensors, of shape `(length,)` or `(1, length)`. Other columns are left
            alone.
        limits (`Mapping[str, int]`, *optional*): By column, how many values there are: each is below its limit.

    Returns:
        `TokenisedExamples`.

    Raises:
        ValueError: No examples, or one that cannot be used, by its number: without tokens; with a mask or segments of
            another length than `input_ids`; with a mask of other values than 0 and 1; with numbers out of range.
    """
    rows = as_rows(examples)
    if len(rows) == 0:
        raise ValueError("there are no examples to classify: give at least one.")
    names = _names(rows[0])
    return TokenisedExamples(names, list(_parts(rows, names, dict(limits or {}))))


def _names(first: Any) -> tuple[str, ...]:
    first = check_mapping(first, 0)
    names = tuple(name for name in INPUT_NAMES if name in first)
    if "input_ids" not in names:
        raise ValueError(
            f"examples must be tokenised: they have {sorted(map(str, first))}, but no input_ids. Run the tokenizer "
            "first."
        )
    return names


def _parts(rows: Sequence[Mapping[str, Any]], names: tuple[str, ...], limits: dict[str, int]) -> Iterator[_Part]:
    dataset: Any = rows if _is_dataset(rows) else None
    columns = None if dataset is None else dataset.with_format("arrow", columns=list(names))
    for first in range(0, len(rows), _WINDOW):
        stop = min(first + _WINDOW, len(rows))
        if columns is not None:
            flat = _flattened_by_arrow(columns[first:stop], names)
        else:
            flat = _flattened_arrays(rows, names, first, stop)
        if flat is None:
            window = [_checked_row(rows[row], row, names) for row in range(first, stop)]
            flat = {name: _flattened(name, [row[name] for row in window], first) for name in names}
        yield _part(flat, first, limits)


def _flattened_by_arrow(table: Any, names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """As `_flattened` for every column of a table; None if one is anything but plain lists of numbers of its kind.

    Arrow has the values of a column one after another already, so that no number becomes an object of Python's.
    """
    # Whoever has a table has imported it; an import here would make the code of every checkpoint ask for it.
    types = sys.modules["pyarrow"].types
    flat = {}
    for name in names:
        column = table.column(name)
        # Combining copies even a single chunk.
        lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if lists.null_count or not (types.is_list(lists.type) or types.is_large_list(lists.type)):
            return None
        values = lists.flatten()
        if values.null_count or not types.is_primitive(values.type):
            return None
        numbers = values.to_numpy(zero_copy_only=False)
        if numbers.dtype.kind not in _kinds(name):
            return None
        flat[name] = numbers, lists.value_lengths().to_numpy(zero_copy_only=False)
    return flat


def _flattened_arrays(
    rows: Sequence[Mapping[str, Any]], names: tuple[str, ...], first: int, stop: int
) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """As `_flattened` for every column of a mapping; None unless each is an array of shape `(rows, length)`."""
    if not isinstance(rows, _Columns):
        return None
    arrays = {name: rows.columns[name] for name in names}
    if not all(
        isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in _kinds(name)
        for name, array in arrays.items()
    ):
        return None
    lengths = {name: np.full(stop - first, array.shape[1]) for name, array in arrays.items()}
    return {name: (array[first:stop].reshape(-1), lengths[name]) for name, array in arrays.items()}


def _checked_row(row: Any, number: int, names: tuple[str, ...]) -> Mapping[str, Any]:
    row = check_mapping(row, number)
    if tuple([name for name in INPUT_NAMES if name in row]) != names:
        raise ValueError(
            f"examples must have the same inputs: the first has {list(names)}, but number {number} has "
            f"{sorted(map(str, row))}. Tokenise all of them alike."
        )
    return row


def _flattened(name: str, values: list[Any], first: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of some rows one after another, and how many each has."""
    try:
        rows = [_one_row(value) for value in values]
        lengths = np.array([len(row) for row in rows])
        if all(isinstance(row, list) for row in rows):
            flat = np.array(list(chain.from_iterable(rows)))
        else:
            flat = np.concatenate([np.asarray(row) for row in rows])
    except (TypeError, ValueError, OverflowError):
        _refuse_values(name, values, first)
        raise
    if len(flat) and flat.dtype.kind not in _kinds(name):
        _refuse_values(name, values, first)
    return flat, lengths


def _one_row(value: Any) -> Any:
    """A row as a list or an array, without an extra dimension of 1 (a tokenizer's `return_tensors`)."""
    if isinstance(value, (list, tuple)):
        if len(value) == 1 and (isinstance(value[0], (list, tuple, np.ndarray)) or _is_tensor(value[0])):
            return _one_row(value[0])
        return value if isinstance(value, list) else list(value)
    array = as_array(value)
    return array[0] if array.ndim == 2 and len(array) == 1 else array


def _kinds(name: str) -> str:
    return "iubf" if name == "attention_mask" else "iu"


def _refuse_values(name: str, values: list[Any], first: int) -> None:
    """Raises `ValueError` for the first row that is no list of whole numbers."""
    for row, value in enumerate(values):
        try:
            array = np.asarray(_one_row(value))
        except (TypeError, ValueError, OverflowError):
            array = np.array(None)
        if array.ndim != 1 or (len(array) and array.dtype.kind not in _kinds(name)):
            raise ValueError(
                f"examples[{first + row}][{name!r}] must be a list of whole numbers, got {shortened(value)}."
            ) from None


def _part(flat: dict[str, tuple[np.ndarray, np.ndarray]], first: int, limits: dict[str, int]) -> _Part:
    """Checks some rows and finds their real tokens."""
    counts = flat["input_ids"][1]
    for name, (_, lengths) in flat.items():
        _check_counts(name, lengths, counts, first)
    starts = np.concatenate([[0], counts.cumsum()[:-1]])
    values = {name: _compact(name, numbers, starts, first, limits) for name, (numbers, _) in flat.items()}
    mask = values.pop("attention_mask", None)
    if mask is None:
        return _Part(values, starts, counts, np.ones(len(counts), dtype=bool))
    reals = np.add.reduceat(mask, starts, dtype=np.int64)
    if not reals.all():
        row = first + int(reals.argmin())
        raise ValueError(
            f"examples[{row}] has no tokens: its attention_mask is 0 everywhere. Leave it out, or give it a token."
        )
    begins, stops = _real_spans(mask, reals)
    is_whole = reals == stops - begins
    return _Part(values if is_whole.all() else {**values, "attention_mask": mask}, begins, stops - begins, is_whole)


def _check_counts(name: str, lengths: np.ndarray, expected: np.ndarray, first: int) -> None:
    if (lengths == 0).any() and name == "input_ids":
        raise ValueError(
            f"examples[{first + int(lengths.argmin())}] has no tokens: its input_ids are empty. Leave it out, or "
            "tokenise it with special tokens."
        )
    if (lengths != expected).any():
        row = int((lengths != expected).argmax())
        raise ValueError(
            f"examples[{first + row}][{name!r}] must have one entry a token, got {lengths[row]} for {expected[row]} "
            "input_ids. Tokenise it again, or leave the column out."
        )


def _compact(name: str, values: np.ndarray, starts: np.ndarray, first: int, limits: dict[str, int]) -> np.ndarray:
    """The values in few bytes, after a check of their range."""
    most = 2 if name == "attention_mask" else limits.get(name, 2**31)
    is_allowed = (values >= 0) & (values < most)
    if name == "attention_mask":
        is_allowed &= (values == 0) | (values == 1)
    if not is_allowed.all():
        place = int(is_allowed.argmin())
        row = int(starts.searchsorted(place, side="right")) - 1
        allowed = "0 or 1" if name == "attention_mask" else f"numbers from 0 to {most - 1}"
        raise ValueError(
            f"examples[{first + row}][{name!r}] must hold {allowed}, got {values[place].item()} at position "
            f"{place - starts[row]}. Was it made by this model's tokenizer?"
        )
    return values.astype(np.int8 if most <= 127 else np.int32, copy=False)


def _real_spans(mask: np.ndarray, reals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's first real token stands, and where one past its last would."""
    places, stops = np.flatnonzero(mask), reals.cumsum()
    return places[stops - reals], places[stops - 1] + 1


def as_array(values: Any) -> np.ndarray:
    """A list, an array, or a tensor on any device as an array."""
    return np.asarray(values.detach().cpu() if _is_tensor(values) else values)


def _is_tensor(value: Any) -> bool:
    # Whoever has a tensor has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def check_mapping(row: Any, number: int) -> Mapping[str, Any]:
    """The row, if it is a mapping.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"examples[{number}] must be a mapping with input_ids, got {shortened(row)}. {_HOW}")
    return row


def column_of(examples: Any, name: str) -> list[Any]:
    """One column of all examples.

    Raises:
        ValueError: An example without it, by its number.
    """
    if _is_dataset(examples):
        return examples.with_format("arrow", columns=[name])[:].column(name).to_pylist()
    column = []
    for row in range(len(examples)):
        example = check_mapping(examples[row], row)
        if name not in example:
            raise ValueError(f"examples[{row}] has no {name!r}, as the first has: {shortened(example)}.")
        column.append(example[name])
    return column


def _is_dataset(examples: Any) -> Any:
    """Whether columns can be read from Arrow's tables: a `datasets.Dataset` whose rows no function makes."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(examples, datasets.Dataset) and examples.format["type"] != "custom"
