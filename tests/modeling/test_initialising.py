"""New weights start as those of the stock class, in a new model and where a checkpoint lacks them."""

import math

import pytest
import torch
from transformers import AutoConfig

import hf_adaptive
from tests import tiny
from tests.modeling import architectures


def draws(model) -> dict[str, torch.Tensor]:
    """All weights by the stock class's names for them; the exits' together, since they are drawn alike."""
    parts: dict[str, list[torch.Tensor]] = {}
    sources = getattr(model, "architecture", None) and model.architecture.head.sources
    for name, parameter in model.named_parameters():
        if name.startswith("exits."):
            _, _, part, rest = name.split(".", 3)
            name = f"{sources[part]}.{rest}" if part in sources else f"{model.base_model_prefix}.final_norm.{rest}"
        parts.setdefault(name, []).append(parameter.detach().float().flatten())
    return {name: torch.cat(values) for name, values in parts.items()}


def everything_missing(name: str):
    model_class = hf_adaptive.make_class(hf_adaptive.ARCHITECTURES[name].classifier_name)
    return model_class.from_pretrained(None, config=architectures.config(name), state_dict={})


def made_on_meta(name: str):
    with torch.device("meta"):
        model = architectures.model(name)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    model.init_weights()
    return model


@pytest.mark.parametrize("name", architectures.NAMES)
@pytest.mark.parametrize("make", [architectures.model, everything_missing, made_on_meta])
def test_new_weights_are_drawn_as_by_the_stock_class(name, make):
    expected = draws(architectures.stock(name))
    for weight, values in draws(make(name)).items():
        if "final_norm" in weight and weight not in expected:
            assert values.unique().numel() == 1  # copies of the backbone's, whose own name is checked
            continue
        deviation = expected[weight].std(correction=0).item()
        count = min(len(values), len(expected[weight]))
        assert values.mean().item() == pytest.approx(expected[weight].mean().item(), abs=6 * deviation / count**0.5)
        assert values.std(correction=0).item() == pytest.approx(deviation, rel=6 / count**0.5, abs=1e-7), weight


@pytest.mark.parametrize("tensors", ["parameters", "buffers"])
@pytest.mark.parametrize("name", ["bert", "deberta", "gemma3_text", "modernbert"])
def test_nothing_made_on_meta_stays_unset(name, tensors):
    own, new = (
        dict(getattr(model, f"named_{tensors}")()) for model in (made_on_meta(name), architectures.model(name))
    )
    assert own.keys() == new.keys()
    for key, value in own.items():
        assert value.isfinite().all(), key
        if tensors == "buffers":
            torch.testing.assert_close(value, new[key])


CONSTANT = {"constant_heads": [[0, 0], [1, 1]], "constant_length": 16}


@pytest.mark.parametrize(
    "names",
    [
        ("BertForSequenceClassificationWithExits", "BertWithExitsConfig"),
        ("PapaBertForSequenceClassification", "PapaBertConfig"),
        ("PapaBertForMaskedLM", "PapaBertConfig"),
    ],
)
def test_constants_of_another_length_start_uniform(names, tmp_path):
    model_class, config_class = (getattr(hf_adaptive, name) for name in names)
    model_class(config_class(**architectures.fields("bert"), **CONSTANT)).save_pretrained(tmp_path)
    longer = AutoConfig.from_pretrained(tmp_path, constant_length=32)
    model = model_class.from_pretrained(tmp_path, config=longer, ignore_mismatched_sizes=True)
    constants = [value for name, value in model.named_parameters() if name.endswith("self.constants")]
    assert len(constants) == 2
    assert all((value == 1 / 32).all() for value in constants)


def test_a_head_of_another_size_starts_anew(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    model = type(tiny.model()).from_pretrained(tmp_path, num_labels=40, ignore_mismatched_sizes=True)
    spread = model.config.initializer_range
    for exit_head in model.exits:
        assert exit_head.classifier.weight.std().item() == pytest.approx(spread, rel=0.2)
        assert not exit_head.classifier.bias.any()
