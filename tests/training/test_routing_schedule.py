"""Routing that changes over training."""

import pytest
import torch
from transformers import TrainerCallback

from hf_adaptive import CascadeForSequenceClassification, RoutingSchedule
from tests import tiny
from tests.training.test_trainer import trainer

STEPS = 8


class SeesRouting(TrainerCallback):
    """Notes the routing, and the gradient that the last exit sends into the first layer, of every step."""

    def __init__(self):
        self.routings = []
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.routings.append(model.config.exit_routing)
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(folder, schedule, model=None, resume=None, **arguments):
    seen = SeesRouting()
    model = tiny.without_dropout(exit_routing="joint") if model is None else model
    own = trainer(model, folder, callbacks=[schedule, seen], max_steps=STEPS, max_grad_norm=0, **arguments)
    own.train(resume_from_checkpoint=resume)
    return own.model, seen


def test_a_linear_schedule_moves_by_the_same_amount_every_step(tmp_path):
    model, seen = train(tmp_path, RoutingSchedule("sweet", 0.7))
    assert seen.routings[0] == "sweet"
    assert seen.routings[1:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert model.config.exit_routing == 0.7


@pytest.mark.parametrize(("start", "end"), [("joint", "sweet"), ("sweet", "joint"), (0.2, 0.9)])
def test_a_step_changes_once_in_the_middle(start, end, tmp_path):
    model, seen = train(tmp_path, RoutingSchedule(start, end, shape="step"))
    assert seen.routings == [start] * 4 + [end] * 4
    assert model.config.exit_routing == end


def test_gradients_are_those_of_the_routing_of_the_step(tmp_path):
    """A layer below the first exit has, in the first step of a schedule, the gradient of its start."""
    _, scheduled = train(tmp_path, RoutingSchedule("sweet", "joint", shape="step"))
    _, alone = train(tmp_path, RoutingSchedule("sweet", "sweet"))
    _, joint = train(tmp_path, RoutingSchedule("joint", "joint"))
    name = next(name for name in alone.gradients[0] if "layer.0" in name and name.endswith("query.weight"))
    assert torch.equal(scheduled.gradients[3][name], alone.gradients[3][name])
    assert not torch.allclose(scheduled.gradients[4][name], alone.gradients[4][name])
    assert not torch.allclose(scheduled.gradients[0][name], joint.gradients[0][name])


def test_training_goes_on_as_it_was_after_a_checkpoint(tmp_path):
    whole, seen = train(tmp_path, RoutingSchedule("joint", "sweet"), save_strategy="steps", save_steps=3)
    again, rest = train(
        tmp_path, RoutingSchedule("joint", "sweet"), tiny.without_dropout(), resume=str(tmp_path / "checkpoint-3")
    )
    assert rest.routings == seen.routings[3:]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)


def test_the_end_is_stored_where_training_stops_early(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    own = trainer(tiny.model(), tmp_path, callbacks=[RoutingSchedule("joint", "sweet"), Stops()], max_steps=STEPS)
    own.train()
    assert own.state.global_step == 1
    own.save_model(tmp_path / "saved")
    assert type(own.model).from_pretrained(tmp_path / "saved").config.exit_routing == "sweet"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_trainings_end_with_the_end(steps):
    for shape in ("linear", "step"):
        schedule = RoutingSchedule("joint", 0.25, shape=shape)
        assert schedule.routing(steps - 1, steps) == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("joint", "disjoint"), "end must be 'joint', 'sweet' or a share .* got 'disjoint'"),
        (("joint", 1.5), "end must be .* got 1.5"),
        (("loose", "joint"), "start must be .* got 'loose'"),
        (("joint", "sweet", "cosine"), "shape must be one of 'linear', 'step', got 'cosine'"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoutingSchedule(*arguments)


def test_models_without_a_routing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="froze its backbone"):
        train(tmp_path, RoutingSchedule("joint", "sweet"), tiny.model(exit_routing="disjoint"))
    cascade = CascadeForSequenceClassification.from_models([tiny.plain_model()])
    with pytest.raises(ValueError, match="needs a classifier with exits, got a CascadeForSequenceClassification"):
        train(tmp_path, RoutingSchedule("joint", "sweet"), cascade)


def test_shared_layers_take_a_step_but_no_shares(tmp_path):
    def albert():
        return tiny.model("albert", embedding_size=8, num_hidden_groups=1, inner_group_num=1)

    model, seen = train(tmp_path, RoutingSchedule("joint", "sweet", shape="step"), albert())
    assert (seen.routings[0], model.config.exit_routing) == ("joint", "sweet")
    with pytest.raises(ValueError, match="have no meaning for Albert, whose layers are one shared module"):
        train(tmp_path, RoutingSchedule("joint", "sweet"), albert())
