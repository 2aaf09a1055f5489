"""Averages against the numbers of PAPA's own code, merging, resuming and bad input."""

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_adaptive import mean_attention
from hf_adaptive.probing import MeanAttention
from tests import golden_papa as golden

AVERAGES = {"atol": 1e-5, "rtol": 0, "check_dtype": False}


def examples(family):
    """The reference's averaging inputs, one at a time."""
    batches = golden.batches(golden.tensors(f"{family}/average_inputs"))
    return [{name: column[row] for name, column in batch.items()} for batch in batches for row in range(8)]


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("source", ["dataset", "dataloader"])
def test_averages_match_the_reference(family, source):
    data = examples(family)
    data = DataLoader(data, batch_size=8) if source == "dataloader" else data
    averages = mean_attention(golden.stock_backbone(family), data, golden.LENGTH)
    expected = golden.tensors(f"{family}/averages")
    torch.testing.assert_close(averages.sums, expected["attention_sums"], **AVERAGES)
    assert torch.equal(averages.counts.float(), expected["attention_patterns_sums"])
    torch.testing.assert_close(averages.average, expected["avgs"], **AVERAGES)


def test_token_classification_averages_match_the_reference():
    stored = golden.tensors("bert/token_classification")
    batches = golden.batches(golden.under("average_inputs/", stored))
    rows = [{name: column[row] for name, column in batch.items()} for batch in batches for row in range(8)]
    backbone = golden.stock_backbone("bert", "token_classification_state_dict")
    averages = mean_attention(backbone, rows, golden.LENGTH)
    torch.testing.assert_close(averages.average, stored["averages/avgs"], **AVERAGES)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, golden.LENGTH), min_size=1, max_size=9), batch_size=st.integers(1, 4))
def test_batch_size_and_padding_do_not_matter(lengths, batch_size):
    rows = [{"input_ids": list(range(3, 3 + length))} for length in lengths]
    model = golden.stock_backbone("bert")
    one_by_one = mean_attention(model, rows, golden.LENGTH, batch_size=1)
    together = mean_attention(model, rows, golden.LENGTH, batch_size=batch_size)
    torch.testing.assert_close(one_by_one.average, together.average, **AVERAGES)
    assert torch.equal(one_by_one.counts, together.counts)


def test_the_model_is_left_as_it_was():
    model = golden.stock_backbone("bert").train()
    model.set_attn_implementation("sdpa")
    averages = mean_attention(model, examples("bert"), golden.LENGTH)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(averages.average, golden.averages("bert"), **AVERAGES)


def test_merged_runs_equal_one_run():
    model, rows = golden.stock_backbone("bert"), examples("bert")
    parts = [mean_attention(model, rows[start : start + 16], golden.LENGTH) for start in (0, 16, 32)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    torch.testing.assert_close(merged.average, golden.averages("bert"), **AVERAGES)
    assert merged.batches == 5


class StopsAfter:
    """Examples until an interruption."""

    def __init__(self, rows, number):
        self.rows, self.number = rows, number

    def __iter__(self):
        yield from self.rows[: self.number]
        raise KeyboardInterrupt


def test_an_interrupted_run_is_resumed_without_repeating_batches(tmp_path):
    model, rows, path = golden.stock_backbone("bert"), examples("bert"), tmp_path / "averages.safetensors"
    with pytest.raises(KeyboardInterrupt):
        mean_attention(model, StopsAfter(rows, 25), golden.LENGTH, path=path, save_every=2)
    assert MeanAttention.load(path).batches == 2
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    resumed = mean_attention(model, rows, golden.LENGTH, path=path)
    assert len(calls) == 3
    torch.testing.assert_close(resumed.average, golden.averages("bert"), **AVERAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["averages.safetensors"]


def test_save_and_load(tmp_path):
    averages = mean_attention(golden.stock_backbone("bert"), examples("bert"), golden.LENGTH)
    averages.save(tmp_path / "deep" / "averages.safetensors")
    loaded = MeanAttention.load(tmp_path / "deep" / "averages.safetensors")
    assert torch.equal(loaded.sums, averages.sums)
    assert torch.equal(loaded.average_for(golden.stock_backbone("bert")), averages.average)
    assert loaded.batches == averages.batches == 5


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    averages = MeanAttention.empty(golden.stock_backbone("bert"), 4)
    averages.save(tmp_path / "averages.safetensors")
    before = (tmp_path / "averages.safetensors").read_bytes()

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("hf_adaptive.probing.averages.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        averages.save(tmp_path / "averages.safetensors")
    assert (tmp_path / "averages.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("data", "max_length", "message"),
    [
        ([], 16, "empty"),
        (DataLoader([], batch_size=2), 16, "empty"),
        ([{"input_ids": [1] * 17}], 16, "17 tokens, but max_length is 16"),
        ([{"text": "not tokenized"}], 16, "must be tokenized"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], 16, "Wrap them in a DataLoader"),
        ({"train": [{"input_ids": [1]}]}, 16, "one of its splits"),
    ],
)
def test_bad_input_is_named(data, max_length, message):
    with pytest.raises(ValueError, match=message):
        mean_attention(golden.stock_backbone("bert"), data, max_length)


def test_other_models_and_lengths_are_not_mixed(tmp_path):
    rows, path = examples("bert"), tmp_path / "averages.safetensors"
    model = golden.stock_backbone("bert")
    averages = mean_attention(model, rows, golden.LENGTH, path=path)
    other = transformers.BertModel(model.config)
    with pytest.raises(ValueError, match=r"cannot resume.*merged only for one model"):
        mean_attention(other, rows, golden.LENGTH, path=path)
    with pytest.raises(ValueError, match=r"cannot resume.*merged only for one model and length"):
        mean_attention(model, rows, 20, path=path)
    with pytest.raises(ValueError, match="collected from another model"):
        averages.average_for(other)


def test_half_precision_is_recognised_as_the_same_model():
    model = golden.stock_backbone("bert")
    averages = mean_attention(model, examples("bert"), golden.LENGTH)
    assert averages.average_for(golden.stock_backbone("bert").bfloat16()).shape == (6, 4, 16, 16)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        MeanAttention.load(tmp_path / "noise.safetensors")
    with pytest.raises(ValueError, match="does not hold averages"):
        MeanAttention.load(golden.FOLDER / "bert" / "averages.safetensors")
