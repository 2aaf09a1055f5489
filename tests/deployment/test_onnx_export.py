"""Exported by stages: the same answers and exits as torch, from files that are whole."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_adaptive
from hf_adaptive import CascadeForSequenceClassification, OnnxClassifierWithExits, export_onnx
from hf_adaptive.deployment import onnx_export
from tests import fresh_process, tiny
from tests.modeling import architectures

onnx_package = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

# Of another version, with what runs exported classifiers.
SECOND_PYTHON = os.environ.get("SECOND_PYTHON")
WITHOUT = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors")
SCRIPT = """
import json, sys
import hf_adaptive
from hf_adaptive import OnnxClassifierWithExits

onnx = OnnxClassifierWithExits.from_pretrained("exported", threads=1)
texts = json.load(open("texts.json"))
examples = onnx.tokenize(texts)
answers = onnx.predict(examples, batch_size=4)
streamed = [answer.logits.tolist() for answer in onnx.predict_stream(iter(examples), batch_size=2, window=4)]
onnx.save_pretrained("saved")
messages = []
for name in ("ExitsTrainer", "BertForSequenceClassificationWithExits", "export_onnx"):
    try:
        getattr(hf_adaptive, name)
    except ImportError as error:
        messages.append(str(error))
found = {"logits": answers.logits.tolist(), "exit_index": answers.exit_index.tolist(), "messages": messages}
found["streamed"] = streamed
json.dump(found, open("found.json", "w"))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def examples(own, rows=12, length=17, **columns):
    inputs = {**tiny.batch(rows, length, seed=1), **columns}
    return [{key: values.tolist() for key, values in tiny.row(inputs, index).items()} for index in range(rows)]


def batch(rows=7, length=13):
    inputs = tiny.batch(rows, length, seed=2)
    return inputs, {key: tensor.numpy() for key, tensor in inputs.items()}


def assert_same(found, expected):
    assert np.array_equal(found.exit_index, expected.exit_index.numpy())
    for name in ("logits", "exit_logits", "exit_certainty"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def assert_answers_alike(own, onnx, thresholds=None):
    tensors, arrays = batch()
    thresholds = tiny.thresholds_between(own, tensors) if thresholds is None else thresholds
    first, *_, last = own.config.exit_layers
    for settings in ({}, {"exit_thresholds": thresholds}, {"exit_at": first}, {"exit_at": last}):
        assert_same(onnx(**arrays, **settings), own(**tensors, **settings))
        expected = own.predict(examples(own), batch_size=5, show_progress=False, **settings)
        assert_same(onnx.predict(examples(own), batch_size=5, **settings), expected)


def small(name, **fields):
    """Two layers, and an exit after each."""
    layers = {"num_hidden_layers": 2, "exit_layers": [1, 2]}
    types = architectures.fields(name).get("layer_types")
    return architectures.model(name, **layers, **({"layer_types": types[:2]} if types else {}), **fields)


@pytest.fixture(scope="module")
def own():
    return architectures.model("bert", exit_temperatures=[0.5, 2.0, 1.5], exit_thresholds=[0.6, None])


@pytest.fixture(scope="module")
def exported(own, tmp_path_factory):
    """A folder that no test changes."""
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(own, folder, tokenizer=tiny.tokenizer())
    return folder


def load(folder):
    return OnnxClassifierWithExits.from_pretrained(folder, threads=1)


# The same answers


def test_answers_of_every_way_are_those_of_torch(own, exported):
    onnx = load(exported)
    assert onnx.config.exit_thresholds == [0.6, None]
    assert_answers_alike(own, onnx)


@pytest.mark.parametrize("criterion", ["entropy", "patience"])
def test_every_criterion_decides_alike(own, exported, criterion):
    onnx = load(exported)
    other = architectures.model("bert", exit_criterion=criterion)
    other.load_state_dict(own.state_dict())
    onnx.config.exit_criterion, onnx.config.exit_temperatures, onnx.config.exit_thresholds = criterion, None, None
    assert_answers_alike(other, onnx, thresholds={"entropy": [0.7, 0.6], "patience": [None, 2]}[criterion])


def test_a_learned_criterion_and_exits_beside_the_trunk(tmp_path):
    layers = {"exit_layers": [0, 1, 2], "num_hidden_layers": 2, "exit_branch_layers": 1}
    own = architectures.model("bert", exit_criterion="learned", exit_pooling="mean", **layers)
    for head in own.exits:
        torch.nn.init.normal_(head.certainty.linear.weight, std=0.5)
        head.certainty.least.fill_(0.2)
        head.certainty.largest.fill_(0.7)
    export_onnx(own, tmp_path)
    onnx = load(tmp_path)
    for thresholds in ([0.5, 0.5], [0.5, None]):
        assert_answers_alike(own, onnx, thresholds=thresholds)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_branch_that_is_not_asked_is_not_run(quantize, tmp_path):
    own = small("bert", exit_branch_layers=1)
    export_onnx(own, tmp_path, quantize=quantize)
    onnx, arrays = load(tmp_path), batch()[1]
    assert onnx.config.exit_branch_costs == own.config.exit_branch_costs
    inputs = {**arrays, "token_type_ids": np.zeros_like(arrays["input_ids"])}
    asked, not_asked = (onnx.graphs.run(0, inputs, is_asked) for is_asked in (True, False))
    assert np.array_equal(asked["next_state"], not_asked["next_state"])
    assert (asked["logits"].shape, not_asked["logits"].shape) == ((7, 3), (0, 3))
    assert np.isnan(onnx(**arrays, exit_at=2).exit_logits[:, 0]).all()
    found, expected = onnx(**arrays).exit_logits, own(**batch()[0]).exit_logits.detach().numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


def test_a_decoder(tmp_path):
    own = small("gpt2")
    export_onnx(own, tmp_path)
    assert_answers_alike(own, load(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture(name, tmp_path):
    own = small(name, exit_temperatures=[0.5, 2.0])
    export_onnx(own, tmp_path)
    assert_answers_alike(own, load(tmp_path))


@pytest.mark.slow
def test_constant_heads(tmp_path):
    fields = {"constant_heads": [[0, 0], [1, 1]], "constant_length": 24, "num_hidden_layers": 2, "exit_layers": [1, 2]}
    own = tiny.model("bert", **fields)
    export_onnx(own, tmp_path)
    assert_answers_alike(own, load(tmp_path))


@torch.no_grad()
def test_a_cascade_whose_members_read_different_inputs(tmp_path):
    members = [small(name).to_stock(exit_at=depth) for name, depth in (("distilbert", 1), ("bert", 2))]
    own = CascadeForSequenceClassification.from_models(members, exit_temperatures=[2.0, 0.5])
    export_onnx(own, tmp_path)
    onnx = load(tmp_path)
    assert onnx.config.exit_costs == own.config.exit_costs
    tensors, arrays = batch()
    thresholds = [float(own(**tensors).exit_logits.softmax(-1).amax(-1)[:, 0].median()) + 1e-4]
    assert_answers_alike(own, onnx, thresholds=thresholds)
    segments = torch.ones_like(tensors["input_ids"])
    found = onnx(**arrays, token_type_ids=segments.numpy())
    assert_same(found, own(**tensors, token_type_ids=segments))
    assert not np.array_equal(found.logits, onnx(**arrays).logits)


def test_texts_are_read_without_transformers(own, exported):
    onnx, tokenizer = load(exported), tiny.tokenizer()
    texts = [*tiny.sentences(4), "good film " * 50, ("the plot", "was dull")]
    for found, text in zip(onnx.tokenize(texts), texts):
        pair = text if isinstance(text, tuple) else (text,)
        assert found["input_ids"] == tokenizer(*pair, truncation=True)["input_ids"]
    assert len(onnx.predict(onnx.tokenize(texts)).logits) == len(texts)


def test_what_is_no_number_goes_on_and_is_warned_of_where_it_was_asked(exported):
    onnx = load(exported)
    onnx.config.exit_temperatures = [np.nan, 1.0, 1.0]
    with pytest.warns(UserWarning, match="the exit after layer 1 gave NaN for 7 of 7 rows") as warned:
        found = onnx(**batch()[1], exit_thresholds=0.0)
    assert {warning.filename for warning in warned} == {__file__}
    assert found.exit_index.tolist() == [1] * 7


@torch.no_grad()
def test_arrays_of_every_kind_are_read_alike(own, exported):
    onnx = load(exported)
    ids = np.arange(12).reshape(3, 4) + 20
    expected = own(torch.from_numpy(ids))
    ones, zeros = np.ones_like(ids), np.zeros_like(ids)
    left = np.concatenate([np.zeros((3, 2), dtype=np.int64), ids], axis=1)
    for found in (
        onnx(ids),
        onnx(ids.tolist()),
        onnx(ids.astype(np.int32), ones.astype(bool)),
        onnx(np.asfortranarray(ids), ones, zeros),
        onnx(left, np.repeat([[0, 0, 1, 1, 1, 1]], 3, axis=0)),
    ):
        assert_same(found, expected)
    with pytest.raises(ValueError, match="attention_mask is 0 everywhere"):
        onnx(ids, zeros)
    with pytest.raises(ValueError, match=r"'token_type_ids'\] must hold numbers from 0 to 1"):
        onnx(ids, ones, ids)
    with pytest.raises(ValueError, match=r"must have one entry a token"):
        onnx(ids, ones[:, :3])
    for nothing in (None, ids[:0], ids[:, :0], ids[0]):
        with pytest.raises(ValueError, match="example"):
            onnx(nothing)
    assert len(onnx([[20, 21], [22]]).logits) == 2


# Streams


def test_a_stream_is_answered_in_order_as_torch_does(own, exported):
    onnx, rows = load(exported), examples(own)
    for settings in ({}, {"exit_thresholds": 0.5}, {"exit_at": 2}):
        expected = list(own.predict_stream(iter(rows), batch_size=3, window=5, **settings))
        found = list(onnx.predict_stream(iter(rows), batch_size=3, window=5, **settings))
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)


def test_a_stream_is_read_no_further_than_its_window(exported):
    taken = itertools.count()
    endless = ({"input_ids": [5, 6, next(taken) % 50 + 4]} for _ in itertools.count())
    answers = load(exported).predict_stream(endless, window=16, exit_at=1)
    assert next(answers).exit_index == 0
    assert next(taken) == 16


def test_streams_that_cannot_be_read(own, exported):
    onnx, rows = load(exported), examples(own)
    assert list(onnx.predict_stream([])) == []
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, got 0"):
        onnx.predict_stream(rows, window=0)
    with pytest.raises(ValueError, match=r"rows 12 to 12 of the stream: examples\[0\] has no tokens"):
        list(onnx.predict_stream([*rows, {"input_ids": [], "attention_mask": []}], window=4))


# Without torch


@pytest.mark.parametrize("python", [sys.executable, SECOND_PYTHON], ids=["this Python", "another Python"])
def test_it_runs_without_torch(python, own, exported, tmp_path):
    if python is None:
        pytest.skip("SECOND_PYTHON names no other interpreter: make test-second sets one up")
    shutil.copytree(exported, tmp_path / "exported")
    texts = tiny.sentences(9)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    source = str(Path(__file__).parents[2] / "src")
    fresh_process.run(SCRIPT, folder=tmp_path, hidden=WITHOUT, python=python, PYTHONPATH=source)
    found = json.loads((tmp_path / "found.json").read_text())
    expected = own.predict(tiny.tokenizer()(texts), show_progress=False)
    assert found["exit_index"] == expected.exit_index.tolist()
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["streamed"], expected.logits.numpy(), atol=1e-5)
    names = ("ExitsTrainer", "BertForSequenceClassificationWithExits", "export_onnx")
    for name, message in zip(names, found["messages"], strict=True):
        assert message.startswith(f"hf_adaptive.{name} needs torch and transformers")
    assert load(tmp_path / "saved").config.exit_thresholds == [0.6, None]


def test_what_is_missing_is_named(exported, monkeypatch, tmp_path):
    uses = {
        "onnx": lambda: export_onnx(tiny.model(), tmp_path),
        "onnxscript": lambda: export_onnx(tiny.model(), tmp_path),
        "onnxruntime": lambda: load(exported),
        "tokenizers": lambda: load(exported).tokenize(["good film"]),
    }
    for package, use in uses.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf'{package} is not installed.*pip install "hf_adaptive\[onnx\]"'):
                use()
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_there():
    for name in hf_adaptive.__all__:
        assert getattr(hf_adaptive, name) is not None


# Int8


def test_int8_replaces_a_larger_export_and_is_close(tmp_path, exported):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    own = small("bert")
    export_onnx(own, tmp_path, quantize="int8")
    assert sorted(path.name for path in tmp_path.glob("*.onnx*")) == ["stage-1.onnx", "stage-2.onnx"]
    onnx = load(tmp_path)
    assert onnx.stages.quantize == "int8"
    tensors, arrays = batch()
    found, expected = onnx(**arrays).exit_logits, own(**tensors).exit_logits.detach().numpy()
    assert not np.array_equal(found, expected)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98
    nodes = onnx_package.load(tmp_path / "stage-2.onnx").graph.node
    # Six of the layer are quantised; dense and classifier of the head are not.
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == 6
    assert sum(node.op_type in ("Gemm", "MatMul") for node in nodes) >= 2


# Files


def test_saved_with_what_a_calibration_changed(exported, tmp_path):
    onnx = load(exported)
    onnx.config.exit_thresholds, onnx.config.exit_temperatures = [0.9, 0.8], [1.0, 2.0, 3.0]
    onnx.save_pretrained(tmp_path)
    onnx.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.exit_thresholds == [0.9, 0.8]
    assert again.config.exit_temperatures == [1.0, 2.0, 3.0]
    assert again.tokenize(["good film"]) == onnx.tokenize(["good film"])
    again.config.exit_thresholds = None
    again.save_pretrained(tmp_path)
    assert load(tmp_path).config.exit_thresholds is None
    assert load(exported).config.exit_thresholds == [0.6, None]


def test_a_failed_export_leaves_an_earlier_one(exported, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match=r"the graph of stage 1 does not answer as the model.*Nothing was written"):
        export_onnx(architectures.model("bert", num_hidden_layers=1, exit_layers=[1]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_model_is_left_as_it_was(own, exported):
    assert own.config.exit_thresholds == [0.6, None]
    assert own.config.exit_temperatures == [0.5, 2.0, 1.5]
    assert not own.training


# Refused


def test_what_cannot_be_exported_is_refused(tmp_path):
    own = small("bert")
    with pytest.raises(ValueError, match="takes a classifier with exits or a cascade, got a BertForSequence"):
        export_onnx(tiny.plain_model(), tmp_path)
    with pytest.raises(ValueError, match="quantize must be None or one of 'int8', got 'int4'"):
        export_onnx(own, tmp_path, quantize="int4")
    for opset in (17, 20.0, True):
        with pytest.raises(ValueError, match=f"opset must be a whole number of at least 18, got {opset}"):
            export_onnx(own, tmp_path, opset=opset)
    assert not list(tmp_path.iterdir())


def test_another_model_s_folder_is_not_written_to(own, tmp_path):
    own.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds another model"):
        export_onnx(own, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_folders_that_hold_something_else_or_a_part(own, exported, tmp_path):
    with pytest.raises(OSError, match="is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"holds no classifier exported .* stages.json is missing"):
        load(tmp_path)
    part = tmp_path / "part"
    shutil.copytree(exported, part)
    (part / "stage-2.onnx").unlink()
    with pytest.raises(OSError, match=r"holds a part of an exported classifier: \['stage-2.onnx'\] are missing"):
        load(part)
    (part / "stage-2.onnx").write_bytes(b"onnx?")
    with pytest.raises(OSError, match=r"stage-2.onnx cannot be read"):
        load(part)
    shutil.copy(exported / "stage-3.onnx", part / "stage-2.onnx")
    with pytest.raises(OSError, match=r"stage-2.onnx does not fit stages.json"):
        load(part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layers": [1, 4]}, r"has 3 graphs for exit_layers=\[1, 4\]"),
        ({"id2label": {"0": "bad", "1": "good"}}, "score .3. labels, but its configuration names 2"),
    ],
)
def test_graphs_that_do_not_fit_the_configuration(exported, tmp_path, change, message):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(OSError, match=message):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json is damaged"):
        load(tmp_path)


def test_arguments_that_cannot_be_used(own, exported):
    onnx = load(exported)
    with pytest.raises(ValueError, match=r"providers must be a list of some of .*got \['NoSuch'\]"):
        OnnxClassifierWithExits.from_pretrained(exported, providers=["NoSuch"])
    with pytest.raises(ValueError, match="threads must be a whole number from 1 on"):
        OnnxClassifierWithExits.from_pretrained(exported, threads=0)
    arrays = batch()[1]
    with pytest.raises(ValueError, match=r"exit_at must be one of exit_layers=\[1, 2, 4\]"):
        onnx(**arrays, exit_at=3)
    with pytest.raises(ValueError, match="give exit_at=1 or exit_thresholds"):
        onnx(**arrays, exit_at=1, exit_thresholds=0.5)
    with pytest.raises(ValueError, match=r"exit_thresholds\[0\] must be a probability"):
        onnx(**arrays, exit_thresholds=1.5)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        onnx.predict(examples(own), batch_size=0)
    with pytest.raises(ValueError, match="leave the column position_ids out"):
        onnx.predict([{**row, "position_ids": row["input_ids"]} for row in examples(own)])
    with pytest.raises(ValueError, match=r"examples\[0\]\['input_ids'\] must hold numbers from 0 to 63"):
        onnx(np.full((1, 3), 64))


def test_a_model_exported_without_its_tokenizer_says_so(exported, tmp_path):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(OSError, match="exported without its tokenizer"):
        load(tmp_path).tokenize(["good film"])
