"""Parity of `exit_criterion="learned"` with the reference's learning to exit (tests/golden/README.md)."""

import pytest
import torch

import hf_adaptive
from tests import golden_sweet as golden
from tests.modeling.test_golden_sweet import GRADIENT_TOLERANCE, is_shared_between_layers

pytestmark = pytest.mark.parametrize("family", golden.FAMILIES)
ROUTINGS = {"sweet": "sweet_true", "joint": "sweet_false"}
THRESHOLDS = ("0.3", "0.5", "0.7")


def own_name(family, key, index):
    if key.startswith("lte_classifier."):
        _, place, rest = key.split(".", 2)
        return f"exits.{index}.certainty.linear.{rest}" if int(place) == index else None
    return golden.own_name(family, key, index)


def learned_model(family, **fields):
    model = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_config(
        golden.config(family, exit_criterion="learned", **fields)
    )
    reference = golden.tensors(family, "lte_state_dict")
    weights = {
        name: tensor.clone()
        for index in range(len(model.exits))
        for key, tensor in reference.items()
        if (name := own_name(family, key, index)) is not None and not key.endswith("position_ids")
    }
    outcome = model.load_state_dict(weights, strict=False)
    assert not outcome.unexpected_keys
    assert all(name.endswith((".least", ".largest")) for name in outcome.missing_keys)
    model._exits_are_untrained = False
    return model


@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_loss_and_gradients(family, routing):
    expected, mode = golden.tensors(family, "lte"), f"train/{ROUTINGS[routing]}"
    model = learned_model(family, exit_routing=routing).train()
    outputs = model(**golden.inputs(family))
    torch.testing.assert_close(outputs.exit_logits, expected[f"{mode}/logits"].transpose(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.exit_certainty, expected[f"{mode}/lte"].t(), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.loss.reshape(1), expected[f"{mode}/loss"].reshape(1), atol=1e-5, rtol=0)
    outputs.loss.backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for key in [key.removeprefix(f"{mode}/grad/") for key in expected if key.startswith(f"{mode}/grad/")]:
        if routing == "sweet" and is_shared_between_layers(key):
            continue
        names = {own_name(family, key, index) for index in range(len(model.exits))} - {None}
        gradient = torch.stack([own[name] for name in names]).sum(dim=0)
        reference = expected[f"{mode}/grad/{key}"]
        torch.testing.assert_close(gradient, reference, atol=GRADIENT_TOLERANCE, rtol=0, msg=key)
        compared += 1
    assert compared >= 100


def batch(family):
    return {name: tensor for name, tensor in golden.inputs(family).items() if name != "labels"}


def check_exits(outputs, expected, prefix):
    assert outputs.exit_index.tolist() == expected[f"{prefix}/exit_index"].tolist()
    reached = torch.arange(outputs.exit_logits.shape[1])[None] <= outputs.exit_index[:, None]
    for own, name in ((outputs.exit_logits, "logits"), (outputs.exit_certainty, "lte")):
        torch.testing.assert_close(own[reached], expected[f"{prefix}/{name}"][reached], atol=1e-5, rtol=0)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_exits_without_calibration(family, threshold):
    model = learned_model(family).eval()
    outputs = model(**batch(family), exit_thresholds=float(threshold))
    check_exits(outputs, golden.tensors(family, "lte"), f"eval/{threshold}")


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_exits_after_calibration(family, threshold):
    model, expected = learned_model(family).eval(), golden.tensors(family, "lte")
    inputs = golden.inputs(family)
    rows = [
        {name: tensor[row].tolist() for name, tensor in inputs.items() if name != "labels"}
        for row in range(len(inputs["labels"]))
    ]
    rows = [{**row, "label": label} for row, label in zip(rows, inputs["labels"].tolist())]
    hf_adaptive.calibrate_exits(model, rows, target_cost=0.9, temperatures=False, show_progress=False)
    everything = model(**batch(family), exit_thresholds=[None] * (len(model.exits) - 1))
    torch.testing.assert_close(
        everything.exit_certainty, expected["calibrated_lte_all_exits"], atol=2e-5, rtol=0, equal_nan=True
    )
    outputs = model(**batch(family), exit_thresholds=float(threshold))
    assert outputs.exit_index.tolist() == expected[f"eval_calibrated/{threshold}/exit_index"].tolist()
