"""Tokenised examples are read alike from whatever holds them; what cannot be read is named by its row."""

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from hf_adaptive.modeling.examples import as_rows, read_examples
from tests import tiny

IDS = [[5, 6, 7], [8], [9, 10]]
MASKS = [[1, 1, 0], [1], [0, 1]]


class MapStyle:
    """As a DataLoader takes it: a length, and rows by number for ever."""

    def __len__(self):
        return len(IDS)

    def __getitem__(self, number):
        place = number % len(IDS)
        return {"input_ids": IDS[place], "attention_mask": MASKS[place], "label": number}


def rows_of(kind):
    return [{"input_ids": kind(ids), "attention_mask": kind(mask)} for ids, mask in zip(IDS, MASKS)]


def data_sets():
    """Of Arrow's ways to hold lists, and of ways to a part of a table."""
    columns = {"input_ids": IDS, "attention_mask": MASKS}
    plain = Dataset.from_dict(columns)
    types = {
        "large lists": (LargeList(Value("int32")), LargeList(Value("bool"))),
        "small integers": (List(Value("uint8")), List(Value("int8"))),
        "masks of floats": (List(Value("int64")), List(Value("float32"))),
        "rows of shape (1, length)": (List(List(Value("int64"))), List(List(Value("int64")))),
    }
    wrapped = {name: [[row] for row in rows] for name, rows in columns.items()}
    typed = {
        name: Dataset.from_dict(
            wrapped if name.startswith("rows") else columns,
            features=Features({"input_ids": ids, "attention_mask": masks}),
        )
        for name, (ids, masks) in types.items()
    }
    return {
        **typed,
        "as tensors": plain.with_format("torch"),
        "picked": concatenate_datasets([plain, plain]).select([3, 1, 5]),
        "sliced": concatenate_datasets([plain, plain]).select(range(3, 6)),
        "joined": concatenate_datasets([plain.select(range(2)), plain.select([2])]),
        "made by a function": plain.with_transform(lambda batch: batch),
    }


HOLDERS = {
    "rows of lists": rows_of(list),
    "rows of tuples": rows_of(tuple),
    "rows of tensors": rows_of(torch.tensor),
    "rows of arrays": rows_of(np.array),
    "rows of small integers": rows_of(lambda values: np.array(values, dtype=np.int16)),
    "rows of shape (1, length)": rows_of(lambda values: torch.tensor([values])),
    "rows of lists of one list": rows_of(lambda values: [values]),
    "rows of unequal kinds": [rows_of(list)[0], *rows_of(torch.tensor)[1:]],
    "masks of bool": [{**row, "attention_mask": [one == 1 for one in row["attention_mask"]]} for row in rows_of(list)],
    "encodings": [BatchEncoding(row) for row in rows_of(list)],
    "columns": {"input_ids": IDS, "attention_mask": MASKS},
    "columns of a tokenizer": BatchEncoding({"input_ids": IDS, "attention_mask": MASKS}),
    "columns of tensors": {
        "input_ids": torch.tensor([[5, 6, 7], [8, 1, 1], [1, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]]),
    },
    "data set": Dataset.from_dict({"input_ids": IDS, "attention_mask": MASKS, "text": ["a", "b", "c"]}),
    **{f"data set, {name}": data for name, data in data_sets().items()},
    "map-style data set": MapStyle(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_same_rows(holder):
    rows = read_examples(HOLDERS[holder])
    assert rows.lengths.tolist() == [2, 1, 1]
    assert rows.batch("input_ids", np.array([2, 0, 1]), padding=77).tolist() == [[10, 77], [5, 6], [8, 77]]
    assert rows.batch("attention_mask", np.array([2, 0, 1]), padding=0).tolist() == [[1, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_same_answers(holder):
    model = tiny.model(exit_pooling="mean")
    expected = [model(input_ids=torch.tensor([ids])).logits[0] for ids in ([5, 6], [8], [10])]
    outputs = model.predict(HOLDERS[holder], exit_at=4, show_progress=False)
    torch.testing.assert_close(outputs.logits, torch.stack(expected))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 63), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=9)
)
def test_spans_of_any_masks(cells):
    examples = [{"input_ids": [i for i, _ in row], "attention_mask": [int(m) for _, m in row]} for row in cells]
    empty = [number for number, row in enumerate(examples) if 1 not in row["attention_mask"]]
    if empty:
        with pytest.raises(ValueError, match=rf"examples\[{empty[0]}\] has no tokens"):
            read_examples(examples)
        return
    rows = read_examples(examples)
    for number, example in enumerate(examples):
        mask = example["attention_mask"]
        real = slice(mask.index(1), len(mask) - mask[::-1].index(1))
        assert rows.batch("input_ids", np.array([number]), 0).tolist() == [example["input_ids"][real]]
        assert rows.batch("attention_mask", np.array([number]), 0).tolist() == [mask[real]]
        assert rows.is_whole[number] == all(mask[real])


def test_rows_of_many_windows():
    examples = [{"input_ids": [number % 60, 3], "attention_mask": [1, number % 3 % 2]} for number in range(3000)]
    rows = read_examples(examples)
    assert rows.lengths.tolist() == [1 + number % 3 % 2 for number in range(3000)]
    picked = np.array([0, 2999, 1024, 1023])
    assert rows.batch("input_ids", picked, 0)[:, 0].tolist() == [number % 60 for number in picked]


def with_third(**columns):
    return [{"input_ids": [5, 6]}] * 2 + [{"input_ids": [5, 6], **columns}]


def masked(mask, ids=(5, 6)):
    first = {"input_ids": [5], "attention_mask": [1]}
    return [first, first, {"input_ids": list(ids), "attention_mask": mask}]


BAD_EXAMPLES = {
    "mask that is shorter": (masked([1]), r"examples\[2\]\['attention_mask'\] .*got 1 for 2 input_ids"),
    "mask that is longer": (masked([1, 1, 1]), r"examples\[2\]\['attention_mask'\] .*got 3 for 2 input_ids"),
    "mask of twos": (masked([1, 2]), r"examples\[2\]\['attention_mask'\] must hold 0 or 1, got 2 at position 1"),
    "mask of halves": (masked([1, 0.5]), r"examples\[2\]\['attention_mask'\] must hold 0 or 1, got 0.5"),
    "mask of NaN": (masked([1, float("nan")]), r"examples\[2\]\['attention_mask'\] must hold 0 or 1, got nan"),
    "mask of zeros": (masked([0, 0]), r"examples\[2\] has no tokens: its attention_mask"),
    "row without tokens": (masked([], []), r"examples\[2\] has no tokens: its input_ids are empty"),
    "only rows without tokens": ([{"input_ids": []}], r"examples\[0\] has no tokens"),
    "segments that are shorter": (
        [{"input_ids": [5, 6], "token_type_ids": types} for types in ([0, 0], [0])],
        r"examples\[1\]\['token_type_ids'\] .*got 1 for 2",
    ),
    "segments out of range": (
        [{"input_ids": [5, 6], "token_type_ids": types} for types in ([0, 0], [0, 2])],
        r"examples\[1\]\['token_type_ids'\] must hold numbers from 0 to 1, got 2 at position 1",
    ),
    "negative tokens": (with_third(input_ids=[5, -1]), r"examples\[2\]\['input_ids'\] .*from 0 to 63, got -1"),
    "tokens not in the vocabulary": (with_third(input_ids=[64, 5]), r"\[2\]\['input_ids'\] .*got 64 at position 0"),
    "tokens beyond int64": (with_third(input_ids=[2**70]), r"examples\[2\]\['input_ids'\] must be a list of whole"),
    "floats": (with_third(input_ids=[5.5, 6]), r"examples\[2\]\['input_ids'\] must be a list of whole numbers"),
    "float tensor": (with_third(input_ids=torch.ones(2)), r"examples\[2\]\['input_ids'\] must be a list of whole"),
    "text for tokens": (with_third(input_ids="good film"), r"\[2\]\['input_ids'\] must be .*got 'good film'"),
    "tokens as text": (with_third(input_ids=["5", "6"]), r"examples\[2\]\['input_ids'\] must be a list of whole"),
    "nothing for tokens": (with_third(input_ids=None), r"examples\[2\]\['input_ids'\] must be .*got None"),
    "a hole in the tokens": (with_third(input_ids=[5, None]), r"examples\[2\]\['input_ids'\] must be a list of whole"),
    "a batch in a row": (with_third(input_ids=[[5, 6], [5, 6]]), r"examples\[2\]\['input_ids'\] must be a list of"),
    "a number for tokens": (with_third(input_ids=5), r"examples\[2\]\['input_ids'\] must be .*got 5"),
    "another column": (with_third(attention_mask=[1, 1]), "same inputs: .*but number 2 has"),
    "no mapping": ([{"input_ids": [5]}, [5, 6]], r"examples\[1\] must be a mapping with input_ids, got \[5, 6\]"),
    "rows of numbers": ([[5, 6], [5, 6]], r"examples\[0\] must be a mapping with input_ids, got \[5, 6\]"),
    "texts": (["good film"], r"examples\[0\] must be a mapping with input_ids, got 'good film'"),
    "rows of text": ([{"text": "good film"}], r"they have \['text'\], but no input_ids"),
    "a text": ("good film", "examples must be tokenised, got a text: 'good film'"),
    "a tensor": (torch.ones(2, 3).long(), r"got a Tensor. Give \{'input_ids'"),
    "a number": (3, "int has no __len__ and no __getitem__"),
    "nothing": (None, "NoneType has no __len__"),
    "an iterator": (iter([{"input_ids": [5]}]), r"list_iterator has no __len__ .*Give list\(...\)"),
    "a set": ({1, 2}, "set has no __getitem__"),
    "one example": ({"input_ids": [5, 6]}, r"examples\['input_ids'\] .*For a single example give a list of one"),
    "columns of other lengths": ({"input_ids": [[5], [6]], "attention_mask": [[1]]}, "one entry an example each"),
    "splits": (
        {"train": Dataset.from_dict({"input_ids": IDS})},
        "names \\['train'\\]. Did you mean one of its splits",
    ),
    "no examples": ([], "no examples"),
    "columns of no examples": ({"input_ids": []}, "no examples"),
}


# What Arrow can hold in one column.
AS_DATA_SET = (
    *("mask that is shorter", "mask that is longer", "mask of twos", "mask of zeros", "row without tokens"),
    *("segments that are shorter", "segments out of range", "negative tokens", "tokens not in the vocabulary"),
    *("nothing for tokens", "a hole in the tokens", "rows of text", "only rows without tokens"),
)


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_what_cannot_be_read_is_named(case):
    examples, says = BAD_EXAMPLES[case]
    with pytest.raises(ValueError, match=says) as error:
        tiny.model().predict(examples, show_progress=False)
    assert "examples" in str(error.value)


@pytest.mark.parametrize("case", AS_DATA_SET)
def test_a_data_set_is_refused_in_the_same_words(case):
    rows, says = BAD_EXAMPLES[case]
    with pytest.raises(ValueError, match=says):
        tiny.model().predict(Dataset.from_list(rows), show_progress=False)


def test_rows_of_a_data_set_are_not_asked_for_one_by_one(monkeypatch):
    data = Dataset.from_dict({"input_ids": [[5, 6]] * 3000, "label": [0] * 3000})
    asked = []
    getitem = Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: (asked.append(key), getitem(self, key))[1])
    assert len(read_examples(data)) == 3000
    assert len(asked) < 10


def test_a_data_set_is_not_copied():
    rows = Dataset.from_dict({"input_ids": [[5] * 40] * 3000, "attention_mask": [[1] * 40] * 3000})
    before = pyarrow.total_allocated_bytes()
    read = read_examples(rows)
    assert pyarrow.total_allocated_bytes() - before < 0.1 * rows.data.nbytes
    assert len(read) == 3000


def test_no_more_rows_are_read_than_there_are():
    assert len(as_rows(MapStyle())) == len(read_examples(MapStyle())) == 3
