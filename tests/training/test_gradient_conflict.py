"""Gradients of the exits in each layer."""

import json
import math

import pytest
import torch

from hf_adaptive import CascadeForSequenceClassification, gradient_conflict
from tests import tiny
from tests.modeling import architectures

EXITS = len(tiny.EXIT_LAYERS)
# The first exit that each of the four layers is below, for exits after layers 1, 2 and 4.
OWN_EXIT = [0, 1, 2, 2]


def batch():
    return {**tiny.batch(), "labels": tiny.labels()}


def direct_gradients(model, layer):
    """Gradients of every exit's loss in a layer, by plain backward passes."""
    vectors = []
    for index in range(EXITS):
        model.zero_grad()
        logits = model(**tiny.batch()).exit_logits[:, index]
        torch.nn.functional.cross_entropy(logits, tiny.labels()).backward()
        parameters = model._layers[layer].parameters()
        vectors.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        )
    return torch.stack(vectors).double()


def test_joint_training_matches_plain_backward_passes(name):
    conflict = gradient_conflict(tiny.without_dropout(name, exit_routing="joint"), batch())
    assert conflict.exit_layers == tiny.EXIT_LAYERS
    assert conflict.similarity.shape == (tiny.LAYERS, EXITS, EXITS)
    # In training mode every exit is computed.
    model = tiny.without_dropout(name, exit_routing="joint").train()
    for layer in range(tiny.LAYERS):
        vectors = direct_gradients(model, layer)
        torch.testing.assert_close(conflict.norms[layer], vectors.norm(dim=1), rtol=1e-4, atol=1e-7)
        own = OWN_EXIT[layer]
        cosines = torch.nn.functional.cosine_similarity(vectors[own:, None], vectors[None, own:], dim=-1)
        torch.testing.assert_close(conflict.similarity[layer, own:, own:], cosines, rtol=1e-4, atol=1e-5)
        assert conflict.similarity[layer, :own].isnan().all()
        torch.testing.assert_close(conflict.similarity[layer], conflict.similarity[layer].T, equal_nan=True)


def test_under_sweet_no_layer_gets_two_gradients(name):
    conflict = gradient_conflict(tiny.model(name, exit_routing="sweet"), batch())
    for layer, own in enumerate(OWN_EXIT):
        reached = conflict.norms[layer] > 0
        assert reached.tolist() == [index == own for index in range(EXITS)]
        assert conflict.similarity[layer].isnan().sum() == EXITS**2 - 1
        assert conflict.similarity[layer, own, own] == pytest.approx(1)
    assert conflict.mean_similarity.isnan().all()


def test_a_share_scales_lengths_at_every_boundary_but_turns_nothing(name):
    joint = gradient_conflict(tiny.model(name, exit_routing="joint"), batch())
    half = gradient_conflict(tiny.model(name, exit_routing=0.5), batch())
    boundaries = torch.tensor([[0, 1, 2], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(half.norms, joint.norms * 0.5**boundaries, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(half.similarity, joint.similarity, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_loss_weights_count(name):
    plain = gradient_conflict(tiny.model(name, exit_routing="joint"), batch())
    weighted = gradient_conflict(tiny.model(name, exit_routing="joint", exit_loss_weights=[1, 0, 2]), batch())
    torch.testing.assert_close(weighted.norms, plain.norms * torch.tensor([1, 0, 2]), rtol=1e-4, atol=1e-7)
    assert weighted.similarity[0, 1].isnan().all()


def test_a_frozen_backbone_gets_no_gradient():
    conflict = gradient_conflict(tiny.model(exit_routing="disjoint"), batch())
    assert not conflict.norms.any()
    assert conflict.similarity.isnan().all()


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture(name):
    model = architectures.model(name, exit_routing="joint")
    conflict = gradient_conflict(model, batch())
    assert len(conflict.norms) == len(model._layers)
    assert (conflict.norms[0] > 0).all()
    assert conflict.similarity[0].diagonal().tolist() == pytest.approx([1] * conflict.norms.shape[1])


def test_nothing_of_the_model_changes():
    model = tiny.model(exit_routing="joint").train()
    model.exits.eval()
    model(**batch()).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = gradient_conflict(model, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[key]), key
    # Nothing is dropped out: the same again.
    assert torch.equal(gradient_conflict(model, batch()).norms, first.norms)


def test_an_untrained_model_still_counts_as_untrained():
    model = tiny.model()
    model._exits_are_untrained = True
    gradient_conflict(model, batch())
    assert model._exits_are_untrained


def test_thresholds_of_the_configuration_play_no_part():
    free = gradient_conflict(tiny.model(exit_routing="joint"), batch())
    early = gradient_conflict(tiny.model(exit_routing="joint", exit_thresholds=0.0), batch())
    assert torch.equal(free.norms, early.norms)


def test_summary_and_plain_values():
    conflict = gradient_conflict(tiny.model(exit_routing="joint"), batch())
    pairs = [conflict.similarity[0, i, j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert conflict.mean_similarity[0] == pytest.approx(sum(pairs).item() / 3)
    assert conflict.mean_similarity[1] == pytest.approx(conflict.similarity[1, 1, 2].item())
    values = json.loads(json.dumps(conflict.to_dict(), allow_nan=False))
    assert values["norms"] == conflict.norms.tolist()
    assert values["mean_similarity"][3] is None
    assert values["similarity"][1][0][1] is None


def test_a_single_exit_has_no_pairs():
    conflict = gradient_conflict(tiny.model(exit_layers=[4]), batch())
    assert all(math.isnan(value) for value in conflict.mean_similarity.tolist())


def test_what_cannot_be_compared_is_named():
    cascade = CascadeForSequenceClassification.from_models([tiny.plain_model()])
    with pytest.raises(ValueError, match="needs a classifier with exits, got a CascadeForSequenceClassification"):
        gradient_conflict(cascade, batch())
    with pytest.raises(ValueError, match=r"the batch has no labels: .* got \['attention_mask', 'input_ids'\]"):
        gradient_conflict(tiny.model(), tiny.batch())
    with pytest.raises(ValueError, match="labels must lie between 0 and 2"):
        gradient_conflict(tiny.model(), {**tiny.batch(), "labels": tiny.labels() + 5})
