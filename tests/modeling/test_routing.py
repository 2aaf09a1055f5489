"""Which layers an exit's loss reaches (`exit_routing`)."""

import pytest
import torch

from tests import tiny

ROUTINGS = ("joint", "sweet", "disjoint", 0, 0.3, 1)
EXITS = len(tiny.EXIT_LAYERS)
SHARED_BY_LAYERS = ("rel_embeddings", "relative_attention_bias")


def gradients(name, routing, **fields):
    """Gradient of every parameter; None where there is none."""
    model = tiny.without_dropout(name, exit_routing=routing, **fields).train()
    model(**tiny.batch(), labels=tiny.labels()).loss.backward()
    return {key: parameter.grad for key, parameter in model.named_parameters()}


def gradient_of_each_exit(name, **fields):
    """What each exit's own loss gives every parameter, with nothing held back."""
    each = []
    for index in range(EXITS):
        weights = [float(index == other) for other in range(EXITS)]
        each.append(gradients(name, "joint", exit_loss_weights=weights, **fields))
    return each


def segment(key):
    """Index of the exit that owns a backbone parameter: the first at or above its layer."""
    if ".layer." not in key:
        return 0
    layer = int(key.split(".layer.")[1].split(".")[0])
    return next(index for index, depth in enumerate(tiny.EXIT_LAYERS) if layer < depth)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_is_the_same_bit_for_bit(name, routing):
    logits = tiny.without_dropout(name, exit_routing=routing).train()(**tiny.batch()).exit_logits
    expected = tiny.without_dropout(name, exit_routing="joint").train()(**tiny.batch()).exit_logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("share", [0, 0.3, 1, "sweet", "joint"])
def test_each_boundary_passes_its_share_of_every_later_exit(name, share):
    """The gradient of a parameter is the sum over exits of share to the power of the boundaries between."""
    own = gradients(name, share)
    each = gradient_of_each_exit(name)
    factor = {"sweet": 0.0, "joint": 1.0}.get(share, share)
    for key, gradient in own.items():
        owner = int(key.split(".")[1]) if key.startswith("exits.") else segment(key)
        later = [factor ** (index - owner) * each[index][key] for index in range(owner, EXITS)]
        torch.testing.assert_close(gradient, sum(later), atol=1e-6, rtol=1e-4, msg=f"{key}, {share}")


def test_what_layers_share_is_covered_by_that(name):
    shared = [key for key in gradients(name, 0.3) if any(part in key for part in SHARED_BY_LAYERS)]
    assert bool(shared) == (name in ("deberta", "mpnet"))


def test_disjoint_trains_heads_only(name):
    own = gradients(name, "disjoint")
    expected = gradients(name, "joint")
    heads = {key for key in own if key.startswith("exits.")}
    assert all(own[key] is None for key in own.keys() - heads)
    for key in heads:
        torch.testing.assert_close(own[key], expected[key], atol=1e-7, rtol=1e-5)


def test_disjoint_stays_frozen_through_saving_resizing_and_loading(tmp_path):
    model = tiny.model(exit_routing="disjoint")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.resize_token_embeddings(tiny.VOCABULARY + 3)
    trained = {key for key, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in loaded.named_parameters() if key.startswith("exits.")}
    joint = type(model).from_pretrained(tmp_path, exit_routing="joint")
    assert all(parameter.requires_grad for parameter in joint.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["joint", "sweet", 0.3])
@pytest.mark.parametrize("name", ["bert", "deberta", "roberta"])
def test_gradient_checkpointing_changes_no_gradient(name, routing, reentrant):
    model = tiny.without_dropout(name, exit_routing=routing).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # As for any model: a reentrant checkpoint passes no gradient to a layer whose input needs none.
        model.enable_input_require_grads()
    model(**tiny.batch(), labels=tiny.labels()).loss.backward()
    expected = gradients(name, routing)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-7, rtol=1e-5, msg=key)


def test_dropout_is_drawn_alike_for_every_routing(name):
    logits = []
    for routing in ("joint", "sweet", 0.5):
        model = tiny.model(name, exit_routing=routing).train()
        torch.manual_seed(3)
        logits.append(model(**tiny.batch()).exit_logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_gradient_checkpointing_where_the_backbone_has_none():
    with pytest.raises(ValueError, match=r"MPNet.* does not support"):
        tiny.model("mpnet").gradient_checkpointing_enable()
