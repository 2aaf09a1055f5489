"""The interpolation mode against the numbers of PAPA's own code, and the ranking made with it."""

import pytest
import torch
import transformers

from hf_adaptive import mean_attention, rank_heads
from hf_adaptive.probing import HeadRanking
from hf_adaptive.probing.ranking import install_interpolation
from tests import golden_papa as golden

VALUES = {"atol": 1e-5, "rtol": 0}
GRADIENTS = {"atol": 2e-5, "rtol": 0}


def interpolated(family, values):
    model = golden.model(family, [])
    model.set_trainable_part("probe")
    lambdas = install_interpolation(model, golden.averages(family))
    with torch.no_grad():
        for parameter, value in zip(lambdas, values):
            parameter.copy_(value)
    return model, lambdas


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_interpolation_matches_the_reference(family):
    expected = golden.tensors(f"{family}/ranking")
    inputs = golden.tensors(f"{family}/inputs")
    model, lambdas = interpolated(family, expected["lambdas"])
    outputs = model(**inputs, output_hidden_states=True)
    outputs.loss.backward()

    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits, expected["logits"], **VALUES)
    torch.testing.assert_close(outputs.loss.reshape(1), expected["loss"], **VALUES)
    states = torch.stack(outputs.hidden_states)
    torch.testing.assert_close(states[:, real], expected["hidden_states"][:, real], atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.stack([p.grad for p in lambdas]), expected["grad/lambdas"], **GRADIENTS)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in golden.probe_weights(family, golden.under("grad/", expected)).items():
        torch.testing.assert_close(gradients[name], gradient, **GRADIENTS)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_order_and_what_is_trained_match_the_reference(family):
    reference = golden.results(family)["ranking"]
    values = golden.tensors(f"{family}/ranking")["lambdas"]
    assert HeadRanking(values.tolist()).order == reference["sorted_heads"]
    model, _ = interpolated(family, values)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert trained == len(reference["trainable"])


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("head_set", ["half", "all"])
def test_the_ends_of_the_interpolation_are_the_constant_heads(family, head_set):
    heads = golden.results(family)["static_heads"][head_set]
    values = torch.full((6, 4), 100.0)
    for layer, head in heads:
        values[layer, head] = -100
    inputs = golden.tensors(f"{family}/inputs")
    model, _ = interpolated(family, values)
    torch.testing.assert_close(model(**inputs).logits, golden.model(family, heads)(**inputs).logits, **VALUES)


def test_ties_are_ordered_layer_by_layer():
    ranking = HeadRanking(((0.0, 0.0), (0.0, -1.0), (0.0, 0.0)))
    assert ranking.order == [[1, 1], [0, 0], [0, 1], [1, 0], [2, 0], [2, 1]]


def rows():
    batches = golden.batches(golden.tensors("bert/average_inputs"))
    return [{name: column[row] for name, column in batch.items()} for batch in batches for row in range(8)]


def arguments(folder, **fields):
    defaults = {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "seed": 3}
    return transformers.TrainingArguments(
        output_dir=folder, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **{**defaults, **fields}
    )


def test_rank_heads_is_repeatable_saved_and_leaves_the_model_alone(tmp_path):
    model = golden.model("bert", [])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first, second = (
        rank_heads(model, golden.averages("bert"), rows(), arguments(tmp_path / name)) for name in ("first", "second")
    )
    assert first == second == HeadRanking.load(tmp_path / "first" / "head_ranking.json")
    assert len({value for layer in first.lambdas for value in layer}) > 20
    assert ((first.attention_weights > 0) & (first.attention_weights < 1)).all()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config.trainable_part == "all"


def test_lambdas_have_their_own_learning_rate_and_no_decay(tmp_path):
    still = rank_heads(
        golden.model("bert", []), golden.averages("bert"), rows(), arguments(tmp_path), lambda_learning_rate=1e-9
    )
    assert torch.tensor(still.lambdas).abs().max() < 1e-6


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="without constant heads, got one with 2"):
        rank_heads(golden.model("bert", [[0, 0], [1, 1]]), golden.averages("bert"), rows(), arguments(tmp_path))
    with pytest.raises(ValueError, match="must have the shape"):
        rank_heads(golden.model("bert", []), golden.averages("bert")[:, :3], rows(), arguments(tmp_path))
    another = transformers.BertModel(golden.stock_backbone("bert").config)
    others = mean_attention(another, rows(), golden.LENGTH)
    with pytest.raises(ValueError, match="collected from another model"):
        rank_heads(golden.model("bert", []), others, rows(), arguments(tmp_path))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no head ranking"):
        HeadRanking.load(tmp_path / "other.json")
