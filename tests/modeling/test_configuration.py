"""What a configuration accepts, what it refuses and how it says so, and that files keep it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import hf_adaptive
from tests import tiny

BAD = [
    ("exit_layers", [0, 4], r"\[0, 4\] has an exit on the embeddings.*exit_pooling='cls'.*exit_pooling='mean'"),
    ("exit_branch_layers", -1, "whole number"),
    ("exit_branch_layers", 1.0, "whole number"),
    ("exit_branch_layers", True, "whole number"),
    ("exit_branch_layers", 5, r"longer than the way.*\[1, 1\] layers apart.*after \[1, 2\]"),
    ("exit_branch_layers", [1], "list of 2 whole numbers"),
    ("exit_branch_layers", [1, 0.5], "list of 2 whole numbers"),
    ("exit_branch_layers", [1, 2], r"too little for those after \[2\]"),
    ("exit_layers", [1, 5], "between 0 and 4"),
    ("exit_layers", [-1, 4], "between 0 and 4"),
    ("exit_layers", [2, 1, 4], r"Use \[1, 2, 4\]"),
    ("exit_layers", [1, 1, 4], r"Use \[1, 4\]"),
    ("exit_layers", [1, 2], r"Use \[1, 2, 4\]"),
    ("exit_layers", [], "list of whole numbers"),
    ("exit_layers", [1.0, 4], "list of whole numbers"),
    ("exit_layers", ["1", 4], "list of whole numbers"),
    ("exit_layers", [True, 4], "list of whole numbers"),
    ("exit_layers", 4, "list of whole numbers"),
    ("exit_layers", "14", "list of whole numbers"),
    ("exit_layers", {1: 2, 4: 3}, "list of whole numbers"),
    ("exit_routing", "sweat", "'sweet'"),
    ("exit_routing", -0.1, "from 0"),
    ("exit_routing", 1.5, "from 0"),
    ("exit_routing", math.nan, "from 0"),
    ("exit_routing", None, "from 0"),
    ("exit_pooling", "max", "'cls', 'mean', 'last'"),
    ("exit_pooling", 1, "'cls', 'mean', 'last'"),
    ("exit_criterion", "certainty", "'confidence'"),
    ("exit_criterion", None, "'confidence'"),
    ("exit_thresholds", [0.5], "2 entries"),
    ("exit_thresholds", [0.5, 0.5, 0.5], "2 entries"),
    ("exit_thresholds", [0.5, 1.01], r"exit_thresholds\[1\]"),
    ("exit_thresholds", [-0.1, 0.5], r"exit_thresholds\[0\]"),
    ("exit_thresholds", 1.01, "probability"),
    ("exit_thresholds", [math.nan, 0.5], "probability"),
    ("exit_thresholds", ["0.5", 0.5], "probability"),
    ("exit_thresholds", True, "list"),
    ("exit_thresholds", "0.9", "list"),
    ("exit_thresholds", {1: 0.5, 2: 0.5}, "list"),
    ("exit_temperatures", [1.0, 0.0, 1.0], r"exit_temperatures\[1\]"),
    ("exit_temperatures", [1.0, -2.0, 1.0], "above 0"),
    ("exit_temperatures", [1.0, 2.0], "list of 3"),
    ("exit_temperatures", 1.5, "list of 3"),
    ("exit_temperatures", [1.0, math.inf, 1.0], "above 0"),
    ("exit_loss_weights", [1, 1], "list of 3"),
    ("exit_loss_weights", [1, -1, 1], "at least 0"),
    ("exit_loss_weights", [1, math.nan, 1], "at least 0"),
    ("exit_loss_weights", [0, 0, 0], "above 0"),
    ("exit_loss_weights", "111", "list of 3"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD)
def test_bad_value_is_named_with_what_is_allowed(field, value, says):
    with pytest.raises(ValueError, match=says) as error:
        tiny.config(**{field: value})
    assert field in str(error.value)


# transformers takes None for: not given.
@pytest.mark.parametrize(("field", "value", "says"), [bad for bad in BAD if bad[1] is not None])
def test_bad_value_is_refused_when_a_saved_configuration_is_changed(field, value, says, tmp_path):
    """`from_pretrained(path, exit_layers=...)` sets fields after the configuration was made."""
    tiny.config().save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, hf_adaptive.BertWithExitsConfig.from_pretrained):
        with pytest.raises(ValueError, match=says) as error:
            load(tmp_path, **{field: value})
        assert field in str(error.value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("exit_layer", "exit_layers"), ("exit_treshold", "exit_thresholds"), ("exit_loss_weight", "exit_loss_weights")],
)
def test_typing_error_is_refused_and_the_field_suggested(typo, meant, tmp_path):
    with pytest.raises(ValueError, match=f"{typo}.*Did you mean {meant}"):
        tiny.config(**{typo: [1]})
    tiny.config().save_pretrained(tmp_path / "exits")
    with pytest.raises(ValueError, match=f"{typo}.*Did you mean {meant}"):
        AutoConfig.from_pretrained(tmp_path / "exits", **{typo: [1]})
    tiny.plain_model().save_pretrained(tmp_path / "plain")
    for folder in ("exits", "plain"):
        with pytest.raises((ValueError, TypeError), match=typo):
            hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(tmp_path / folder, **{typo: [1]})


def test_field_changed_at_loading_is_completed_as_when_made(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path, exit_thresholds=0.75, exit_routing="joint", num_labels=5)
    assert changed.exit_thresholds == [0.75, 0.75]
    assert (changed.exit_routing, changed.num_labels) == ("joint", 5)
    with pytest.raises(ValueError, match="exit_thresholds must have 2 entries"):
        AutoConfig.from_pretrained(tmp_path, exit_thresholds=[0.5])


def test_lists_are_lists_as_in_the_file_whatever_they_were_given_as():
    given = {
        "exit_layers": (1, 2, 4),
        "exit_loss_weights": (1, 0.5, 2),
        "exit_temperatures": (1.0, 2.0, 0.5),
        "exit_thresholds": (0.5, None),
        "exit_branch_layers": (0, 1),
    }
    config = tiny.config(**given)
    assert {name: getattr(config, name) for name in given} == {name: list(values) for name, values in given.items()}


def test_unused_arguments_are_returned(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    changed, unused = AutoConfig.from_pretrained(
        tmp_path, exit_pooling="mean", something_else=3, return_unused_kwargs=True
    )
    assert changed.exit_pooling == "mean"
    assert unused == {"something_else": 3}


@pytest.mark.parametrize(("layers", "exits"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4])])
def test_default_exits_of_shallow_models(layers, exits):
    assert tiny.config(exit_layers=None, num_hidden_layers=layers).exit_layers == exits


def test_default_exits_are_quarters():
    assert tiny.config(exit_layers=None, num_hidden_layers=12).exit_layers == [3, 6, 9, 12]


def test_default_pooling(name):
    assert tiny.config(name).exit_pooling == "cls"


@st.composite
def valid_fields(draw):
    layers = draw(st.integers(1, 12))
    inner = draw(st.sets(st.integers(1, layers), max_size=5))
    exits = sorted(inner | {layers})
    per_exit = lambda numbers: st.none() | st.lists(numbers, min_size=len(exits), max_size=len(exits))  # noqa: E731
    probability = st.floats(0, 1)
    thresholds = st.lists(st.none() | probability, min_size=len(exits) - 1, max_size=len(exits) - 1)
    return {
        "num_hidden_layers": layers,
        "exit_layers": exits,
        "exit_routing": draw(st.sampled_from(["sweet", "joint", "disjoint", 0, 1]) | probability),
        "exit_loss_weights": draw(per_exit(st.floats(0.5, 10) | st.integers(1, 3))),
        "exit_pooling": draw(st.sampled_from(["cls", "mean", "last"])),
        "exit_thresholds": draw(st.none() | thresholds),
        "exit_temperatures": draw(per_exit(st.floats(0.01, 100))),
    }


@given(fields=valid_fields())
def test_any_valid_configuration_survives_its_file(fields):
    made = tiny.config(**fields)
    assert {name: getattr(made, name) for name in fields} == fields
    read = type(made).from_dict(json.loads(made.to_json_string(use_diff=True)))
    assert read.to_dict() == made.to_dict()


@given(fields=valid_fields())
def test_any_valid_configuration_survives_the_way_to_a_plain_one_and_back(fields):
    made = tiny.config(**fields)
    plain = made.to_plain()
    assert plain.model_type == "bert"
    assert not [name for name in plain.to_dict() if name.startswith("exit_")]
    back = type(made).from_plain(plain, **{name: getattr(made, name) for name in made.added_fields()})
    assert back.to_dict() == made.to_dict()


OUT_OF_RANGE = st.floats(max_value=-1e-9) | st.floats(min_value=1 + 1e-9) | st.just(math.nan)
NO_NUMBER = st.text() | st.booleans() | st.binary() | st.dictionaries(st.integers(), st.integers())
INVALID = {
    "exit_layers": st.lists(st.integers()).filter(
        lambda exits: exits != sorted(set(exits)) or not exits or exits[0] < 1 or exits[-1] != tiny.LAYERS
    )
    | st.lists(st.floats(1, 4) | NO_NUMBER, min_size=1)
    | st.integers()
    | NO_NUMBER,
    "exit_routing": OUT_OF_RANGE | NO_NUMBER.filter(lambda routing: routing not in ("sweet", "joint", "disjoint")),
    "exit_thresholds": st.lists(st.floats(0, 1)).filter(lambda thresholds: len(thresholds) != 2)
    | st.tuples(OUT_OF_RANGE | NO_NUMBER, st.floats(0, 1)).map(list)
    | OUT_OF_RANGE
    | NO_NUMBER,
    "exit_temperatures": st.lists(st.floats(0.1, 9)).filter(lambda temperatures: len(temperatures) != 3)
    | st.tuples(st.floats(max_value=0) | st.just(math.nan) | NO_NUMBER, st.just(1.0), st.just(1.0)).map(list)
    | st.floats()
    | NO_NUMBER,
    "exit_loss_weights": st.lists(st.floats(0.1, 9)).filter(lambda weights: len(weights) != 3)
    | st.tuples(st.floats(max_value=-1e-9) | NO_NUMBER, st.just(1.0), st.just(1.0)).map(list)
    | NO_NUMBER,
}


@pytest.mark.parametrize("field", INVALID)
@given(data=st.data())
def test_any_invalid_value_is_refused_by_name(field, data):
    value = data.draw(INVALID[field])
    with pytest.raises(ValueError, match=field):
        tiny.config(**{field: value})


# As written by older versions: rotary settings in fields of their own, a list as text.
OLDER = {
    "deberta-v2": {"pos_att_type": "p2c|c2p"},
    "eurobert": {"rope_theta": 250000.0},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "llama": {"rope_theta": 5e5, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "modernbert": {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
    "qwen2": {"rope_theta": 1e6, "max_window_layers": 28},
}


@pytest.mark.parametrize("name", sorted(hf_adaptive.ARCHITECTURES))
def test_a_plain_configuration_survives_exits_and_back(name):
    architecture = hf_adaptive.ARCHITECTURES[name]
    for fields in ({}, OLDER.get(name, {})):
        plain = architecture.stock("Config")(**fields)
        own = hf_adaptive.make_class(architecture.config_name).from_plain(plain)
        assert own.exit_layers[-1] == plain.num_hidden_layers
        assert own.to_plain().to_dict() == plain.to_dict()


def test_a_calibration_is_in_force_while_thresholds_and_temperatures_are_its_own():
    stored = {"thresholds": [0.5, None], "temperatures": [2.0, 1.0, 1.0]}
    record = {**dict.fromkeys(("wish", "guarantee", "measured", "profile")), "num_examples": 9, **stored}
    fields = {"exit_thresholds": stored["thresholds"], "exit_temperatures": stored["temperatures"]}
    assert tiny.config(**fields).calibration_in_force is None
    assert tiny.config(**fields, exit_calibration=record).calibration_in_force == record
    for changed in ({"exit_thresholds": [0.5, 0.5]}, {"exit_temperatures": None}):
        assert tiny.config(**{**fields, **changed}, exit_calibration=record).calibration_in_force is None
