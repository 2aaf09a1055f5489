"""One exit as a stock model: the same answers from a class of transformers, here and where this package is not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import hf_adaptive
from tests import fresh_process, tiny
from tests.modeling import architectures
from tests.modeling.architectures import NAMES

TEMPERATURES = [0.5, 2.0, 1.5]
SCRIPT = """
import json
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
inputs = load_file("inputs.safetensors")
for name, folder in json.load(open("folders.json")).items():
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(stock).__module__.startswith("transformers.models")
    with torch.no_grad():
        save_file({"logits": stock(**inputs).logits}, f"{name}.safetensors")
"""


def model(name="bert", **fields):
    """Exits whose temperatures are not 1 and whose normalisations differ, as after training."""
    own = architectures.model(name, exit_temperatures=TEMPERATURES, **fields)
    with torch.no_grad():
        for exit_head in own.exits:
            if exit_head.final_norm is not None:
                exit_head.final_norm.weight.add_(torch.rand_like(exit_head.final_norm.weight))
    return own


def batch():
    return tiny.batch(length=16)


@torch.no_grad()
@pytest.mark.parametrize(("exits", "length"), [([1, 2, 4], 1), ([2, 4], 2)])
def test_a_branch_takes_the_place_of_the_trunk_s_layers(exits, length):
    for name in NAMES:
        own = architectures.model(name, exit_layers=exits, exit_branch_layers=length)
        if own.architecture.shares_layers:
            with pytest.raises(ValueError, match=r"with a branch has no stock counterpart: .*one module"):
                own.to_stock(exit_at=2)
        for depth in exits[-1:] if own.architecture.shares_layers else exits:
            answered = own.to_stock(exit_at=depth)(**batch()).logits
            torch.testing.assert_close(answered, exit_logits(own, depth), atol=2e-6, rtol=1e-5, msg=f"{name} {depth}")


def test_no_layers_are_no_stock_model():
    own = architectures.model("modernbert", exit_layers=[0, 4], exit_pooling="mean")
    with pytest.raises(ValueError, match="exit on the embeddings has no stock counterpart"):
        own.to_stock(exit_at=0)


@torch.no_grad()
def exit_logits(own, depth):
    return own(**batch(), exit_at=depth).logits


@torch.no_grad()
def test_every_exit_of_every_architecture_becomes_a_stock_model(tmp_path):
    """Saved, and answered by a process that has transformers but not this package."""
    expected, folders = {}, {}
    for name in NAMES:
        own = model(name)
        for depth in own.config.exit_layers:
            key = f"{name}-{depth}"
            expected[key], folders[key] = exit_logits(own, depth), str(tmp_path / key)
            stock = own.to_stock(exit_at=depth)
            stock.save_pretrained(folders[key])
            assert type(stock) is own.architecture.stock("ForSequenceClassification")
            assert stock.config.num_hidden_layers == depth
            torch.testing.assert_close(stock(**batch()).logits, expected[key], atol=2e-6, rtol=1e-5, msg=key)
            assert_is_stock(folders[key], stock)
    save_file(batch(), tmp_path / "inputs.safetensors")
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    fresh_process.run(SCRIPT, folder=tmp_path)
    for key, logits in expected.items():
        answered = load_file(tmp_path / f"{key}.safetensors")["logits"]
        torch.testing.assert_close(answered, logits, atol=1e-5, rtol=1e-5, msg=key)


def assert_is_stock(folder, stock):
    saved = json.loads((Path(folder) / "config.json").read_text())
    assert saved["architectures"] == [type(stock).__name__]
    assert saved["model_type"] == stock.config.model_type
    assert not [field for field in saved if field.startswith(("exit_", "constant_", "auto_map"))]


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("modernbert", "cls"), ("modernbert", "mean"), ("eurobert", "cls"), ("eurobert", "mean"), ("eurobert", "late")],
)
@torch.no_grad()
def test_the_stock_class_is_told_how_to_pool(name, pooling):
    own = model(name, exit_pooling=pooling)
    for depth in own.config.exit_layers:
        torch.testing.assert_close(
            own.to_stock(depth)(**batch()).logits, exit_logits(own, depth), atol=2e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "pooling", "would_do"),
    [("bert", "mean", "'cls'"), ("llama", "mean", "'last'"), ("modernbert", "last", "'cls' or 'mean'")],
)
def test_a_pooling_without_counterpart_is_refused_and_the_one_that_has_one_is_named(name, pooling, would_do):
    own = architectures.model(name, exit_pooling=pooling)
    with pytest.raises(ValueError, match=rf"exit_pooling='{pooling}' has no counterpart in .*{would_do}"):
        own.to_stock(exit_at=2)


def test_what_no_stock_class_has_is_refused():
    own = model()
    for wrong in (3, True, None):
        with pytest.raises(ValueError, match=r"exit_at must be one of exit_layers=\[1, 2, 4\]"):
            own.to_stock(exit_at=wrong)
    constant = tiny.model("bert", constant_heads=[[0, 0]], constant_length=16)
    with pytest.raises(ValueError, match=r"constant_heads=\[\[0, 0\]\] have no stock counterpart"):
        constant.to_stock(exit_at=1)


@torch.no_grad()
def test_groups_of_albert_that_a_smaller_model_has_at_the_same_places():
    own = model("albert", num_hidden_groups=2)
    for depth in (1, 2, 4):
        torch.testing.assert_close(
            own.to_stock(depth)(**batch()).logits, exit_logits(own, depth), atol=2e-6, rtol=1e-5
        )
    other = architectures.model("albert", num_hidden_groups=2, num_hidden_layers=6, exit_layers=[4, 6])
    with pytest.raises(ValueError, match="num_hidden_groups=2 have no stock counterpart"):
        other.to_stock(exit_at=4)


@torch.no_grad()
def test_the_stock_model_has_weights_of_its_own_and_learns_as_any():
    own = model(id2label={0: "bad", 1: "so-so", 2: "good"})
    before = exit_logits(own, 2)
    stock = own.to_stock(exit_at=2)
    assert stock.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert not stock.training
    assert all(parameter.requires_grad for parameter in stock.parameters())
    for parameter in stock.parameters():
        parameter.zero_()
    assert torch.equal(exit_logits(own, 2), before)


@torch.no_grad()
def test_half_precision_stays():
    own = model("deberta").to(torch.bfloat16)
    stock = own.to_stock(exit_at=2)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(stock(**batch()).logits, exit_logits(own, 2), atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_member_of_a_cascade(tmp_path):
    members = [tiny.plain_model("bert", num_hidden_layers=depth) for depth in (1, 2)]
    cascade = hf_adaptive.CascadeForSequenceClassification.from_models(members, exit_temperatures=[2.0, 0.5])
    for depth in (1, 2):
        expected = cascade(**batch(), exit_at=depth).logits
        stock = cascade.to_stock(exit_at=depth)
        stock.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert type(loaded) is type(members[0])
        torch.testing.assert_close(loaded(**batch()).logits, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(cascade(**batch()).logits, expected)
