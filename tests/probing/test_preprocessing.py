"""Fixed positions against the outputs of PAPA's own scripts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive.probing import fix_sequence_positions, fix_token_positions
from tests import golden_papa as golden

FUNCTIONS = {"glue": fix_sequence_positions, "ner": fix_token_positions}
CASES = json.loads((golden.FOLDER / "preprocess.json").read_text())
SPECIAL = {"sep_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, list(case.values())[:2])) + case["case"])
def test_positions_match_the_reference(case):
    special = {"sep_token_id": case["special"]["sep"], "pad_token_id": case["special"]["pad"]}
    result = FUNCTIONS[case["script"]]({"input_ids": case["before_ids"]}, max_length=case["max_length"], **special)
    assert result == {"input_ids": case["after_ids"], "attention_mask": case["after_mask"]}


@given(
    first=st.lists(st.integers(10, 99), max_size=20),
    second=st.lists(st.integers(100, 199), max_size=20),
    max_length=st.integers(4, 24),
)
def test_token_types_move_with_their_tokens(first, second, max_length):
    ids = [1, *first, 2, *second, 2]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    result = fix_sequence_positions({"input_ids": ids, "token_type_ids": types}, max_length=max_length, **SPECIAL)
    assert [len(column) for column in result.values()] == [max_length] * 3
    assert (result["input_ids"][-1], result["token_type_ids"][-1]) == (2, 1)
    for token, token_type in zip(result["input_ids"], result["token_type_ids"]):
        assert token == 2 or token_type == int(token >= 100)


def test_labels_of_tokens_stay_with_their_tokens():
    example = {"input_ids": [1, 10, 11, 2], "labels": [-100, 5, 6, -100], "token_type_ids": [0, 0, 0, 0]}
    assert fix_token_positions(example, max_length=6, **SPECIAL) == {
        "input_ids": [1, 10, 11, 0, 0, 2],
        "labels": [-100, 5, 6, -100, -100, -100],
        "token_type_ids": [0, 0, 0, 0, 0, 0],
        "attention_mask": [1, 1, 1, 0, 0, 1],
    }


@pytest.mark.parametrize("function", [fix_sequence_positions, fix_token_positions])
def test_a_text_without_separator_is_an_error(function):
    with pytest.raises(ValueError, match=r"no token 2 \(sep_token_id\)"):
        function({"input_ids": [1, 10, 11]}, max_length=8, **SPECIAL)


def test_a_text_that_is_too_long_for_its_tokens_is_an_error():
    with pytest.raises(ValueError, match="9 tokens, but max_length is 8"):
        fix_token_positions({"input_ids": [1, *range(10, 17), 2]}, max_length=8, **SPECIAL)
