"""Parity with SWEET's own code on tiny models (tests/golden/README.md)."""

import pytest
import torch

from tests import golden_sweet as golden

pytestmark = pytest.mark.parametrize("family", golden.FAMILIES)
ROUTINGS = {"sweet": "sweet_true", "joint": "sweet_false"}
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5


@pytest.mark.parametrize("routing", ROUTINGS)
def test_logits_and_loss_of_all_exits(family, routing):
    expected = golden.tensors(family, "train")
    outputs = golden.model(family, exit_routing=routing).train()(**golden.inputs(family))
    reference = expected[f"{ROUTINGS[routing]}/logits"].transpose(0, 1)
    torch.testing.assert_close(outputs.exit_logits, reference, atol=LOGITS_TOLERANCE, rtol=0)
    torch.testing.assert_close(outputs.loss.reshape(1), expected[f"{ROUTINGS[routing]}/loss"], atol=1e-5, rtol=0)


def gradients_as_reference(family, model):
    """Our gradients by the reference's names; its pooler is shared, so ours are summed."""
    exits = range(len(model.exits))
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    keys = [
        key.removeprefix("sweet_true/grad/") for key in golden.tensors(family, "train") if "sweet_true/grad" in key
    ]
    return {
        key: torch.stack([own[name] for name in {golden.own_name(family, key, index) for index in exits} if name]).sum(
            dim=0
        )
        for key in keys
    }


def gradients(family, routing, **fields):
    model = golden.model(family, exit_routing=routing, **fields).train()
    model(**golden.inputs(family)).loss.backward()
    return gradients_as_reference(family, model)


def is_shared_between_layers(key):
    return key.endswith("rel_embeddings.weight")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients(family, routing):
    expected = golden.tensors(family, "train")
    own = gradients(family, routing)
    compared = 0
    for key, gradient in own.items():
        if routing == "sweet" and is_shared_between_layers(key):
            continue
        reference = expected[f"{ROUTINGS[routing]}/grad/{key}"]
        torch.testing.assert_close(gradient, reference, atol=GRADIENT_TOLERANCE, rtol=0, msg=key)
        compared += 1
    assert compared >= 100


def test_sweet_separates_what_layers_share(family):
    """DESIGN decision 3: the reference lets every exit reach DeBERTa's relative embeddings; here the first one."""
    shared = [key for key in gradients(family, "sweet") if is_shared_between_layers(key)]
    assert len(shared) == (family == "deberta")
    for key in shared:
        own = gradients(family, "sweet")[key]
        first_exit_only = gradients(family, "joint", exit_loss_weights=[1, 0, 0, 0])[key]
        torch.testing.assert_close(own, first_exit_only, atol=1e-6, rtol=0)
        reference = golden.tensors(family, "train")[f"sweet_true/grad/{key}"]
        assert (own - reference).abs().max() > 1e-3


def run_one_by_one(model, inputs, **arguments):
    rows = [
        model(**{name: tensor[row : row + 1] for name, tensor in inputs.items() if name != "labels"}, **arguments)
        for row in range(len(inputs["input_ids"]))
    ]
    return torch.cat([row.exit_logits for row in rows]), torch.cat([row.exit_index for row in rows])


def run_batch(model, inputs, **arguments):
    outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, **arguments)
    return outputs.exit_logits, outputs.exit_index


def own_thresholds(threshold, exits):
    """The reference's 1.01 means: never."""
    return [None if threshold > 1 else threshold] * (exits - 1)


def check_exits(logits, exit_index, expected_logits, expected_index):
    assert exit_index.tolist() == expected_index.tolist()
    reached = torch.arange(logits.shape[1])[None, :] <= exit_index[:, None]
    torch.testing.assert_close(logits[reached], expected_logits[reached], atol=LOGITS_TOLERANCE, rtol=0)
    never = (exit_index == logits.shape[1] - 1).all()
    assert never or logits[~reached].isnan().all()


@pytest.mark.parametrize("run", [run_one_by_one, run_batch])
def test_exits_by_confidence(family, run):
    expected, results = golden.tensors(family, "eval"), golden.results(family)
    model = golden.model(family).eval()
    for threshold in results["thresholds"]:
        logits, exit_index = run(
            model, golden.inputs(family), exit_thresholds=own_thresholds(threshold, len(model.exits))
        )
        check_exits(
            logits,
            exit_index,
            expected[f"confidence/{threshold}/logits"],
            expected[f"confidence/{threshold}/exit_index"],
        )
        cost = torch.tensor(model.config.exit_costs)[exit_index].mean().item()
        assert cost == pytest.approx(results["eval_confidence"][str(threshold)]["speedup_ratio"], abs=1e-6)


@pytest.mark.parametrize("run", [run_one_by_one, run_batch])
def test_exits_with_temperatures(family, run):
    expected, results = golden.tensors(family, "eval"), golden.results(family)["eval_with_temperatures"]
    model = golden.model(family, exit_temperatures=results["temperatures"]).eval()
    thresholds = [key.split("/")[1] for key in expected if key.startswith("temperature/") and key.endswith("index")]
    assert thresholds
    for threshold in thresholds:
        arguments = {"exit_thresholds": own_thresholds(float(threshold), len(model.exits))}
        logits, exit_index = run(model, golden.inputs(family), **arguments)
        check_exits(
            logits,
            exit_index,
            expected[f"temperature/{threshold}/logits"],
            expected[f"temperature/{threshold}/exit_index"],
        )


@pytest.mark.parametrize("run", [run_one_by_one, run_batch])
def test_forced_exits(family, run):
    expected = golden.tensors(family, "eval")
    model = golden.model(family).eval()
    for index, layer in enumerate(model.config.exit_layers):
        logits, exit_index = run(model, golden.inputs(family), exit_at=layer)
        check_exits(logits, exit_index, expected[f"gold/{layer - 1}/logits"], torch.full_like(exit_index, index))
