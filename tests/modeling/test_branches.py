"""Exits with layers of their own (`exit_branch_layers`), and exits on the embeddings, in every architecture."""

import copy
import functools

import pytest
import torch

from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from hf_adaptive import calibrate_exits, evaluate_exits
from hf_adaptive.calibration.exit_table import ExitTable
from hf_adaptive.calibration.threshold_search import find_thresholds
from hf_adaptive.calibration.wishes import make_wish
from tests import tiny
from tests.modeling import architectures
from tests.modeling.test_architectures import assert_rows_leave_alike_alone, assert_same, gradients, stock_weights

ROWS = 8
INPUTS = tiny.batch(ROWS)
LAYERS = architectures.LAYERS
# Between its first layer and the next it has a convolution, which a branch does not run.
BETWEEN_LAYERS = ("deberta-v2",)


@pytest.fixture(params=architectures.NAMES)
def name(request):
    """Every architecture in turn."""
    return request.param


@functools.cache
def branched(name, **fields):
    """A model with branches that no test changes."""
    return architectures.model(name, **{"exit_branch_layers": 1, **fields})


def examples_of(inputs):
    return [{key: value.tolist() for key, value in zip(inputs, row)} for row in zip(*inputs.values())]


@pytest.fixture
def plain(name, tmp_path):
    """A stock checkpoint."""
    architectures.stock(name).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "exits", "length"),
    [
        *((name, [1, 2, 4], 1) for name in architectures.NAMES),
        *((name, [2, 4], 2) for name in ("bert", "deberta-v2", "gemma3_text", "gpt2", "modernbert")),
    ],
)
def test_a_branch_starts_as_the_pretrained_layers_and_sees_what_they_see(plain, name, exits, length):
    """Masks, windows, position biases and rotary tables included: the exits answer as those on the trunk do."""
    with_branches, info = WithExits.from_pretrained(
        plain, exit_layers=exits, exit_branch_layers=length, output_loading_info=True
    )
    without = WithExits.from_pretrained(plain, exit_layers=exits)
    assert not any(info.values())
    assert [len(head.branch) for head in with_branches.exits] == [length] * (len(exits) - 1) + [0]
    expected = without(**INPUTS).exit_logits
    if name in BETWEEN_LAYERS:
        kept = [index for index, depth in enumerate(exits) if depth - length > 0 or depth == LAYERS]
        expected = expected[:, kept]
    else:
        kept = slice(None)
    torch.testing.assert_close(with_branches(**INPUTS).exit_logits[:, kept], expected, atol=2e-6, rtol=1e-5)
    for index, depth in enumerate(exits[:-1]):
        early = with_branches(**INPUTS, exit_at=depth)
        torch.testing.assert_close(early.logits, with_branches(**INPUTS).exit_logits[:, index], atol=2e-6, rtol=1e-5)
        assert early.exit_logits.isnan().all(dim=-1).sum() == ROWS * (len(exits) - 1)


@pytest.mark.parametrize(("exits", "length"), [((2, 4), 2), ((3, 4), 3), ((0, 1, 2, 4), 0), ((0, 2, 4), 2)])
def test_each_row_is_answered_as_alone_with_other_exits(exits, length):
    assert_rows_are_answered_alike("bert", exits, length)


def test_each_row_is_answered_as_alone_and_as_with_everything_run(name):
    assert_rows_are_answered_alike(name, (0, 1, 2, 4), 1)


@torch.no_grad()
def assert_rows_are_answered_alike(name, exits, length):
    own = branched(name, exit_layers=exits, exit_branch_layers=length, exit_pooling="mean")
    assert_rows_leave_alike_alone(own, INPUTS, range(ROWS))
    thresholds = tiny.thresholds_between(own, INPUTS)
    expected = own(**INPUTS, exit_thresholds=thresholds, output_hidden_states=True)
    assert_same(own(**INPUTS, exit_thresholds=thresholds), expected, atol=5e-6)
    answers = own.predict(examples_of(INPUTS), batch_size=3, exit_thresholds=thresholds, show_progress=False)
    assert_same(answers, expected, atol=5e-6)


def losses_apart(own, **settings):
    """Gradients of each exit's loss alone, where nothing stops them."""
    weights = [[float(index == other) for other in range(len(own.exits))] for index in range(len(own.exits))]
    return [gradients(own, INPUTS, exit_routing="joint", exit_loss_weights=one, **settings) for one in weights]


@pytest.mark.parametrize(("name", "is_local"), [*((name, True) for name in architectures.NAMES), ("bert", False)])
def test_sweet_keeps_to_branch_and_head_and_the_trunk_is_plain_fine_tuning(name, is_local):
    own = branched(name)
    found = gradients(own, INPUTS, exit_routing="sweet", exit_local_gradients=is_local)
    assert found.keys() == {key for key, _ in own.named_parameters()}
    stock = architectures.stock(name).train()
    stock.load_state_dict(stock_weights(own, own.state_dict()))
    stock(**INPUTS, labels=tiny.labels(ROWS)).loss.backward()
    trunk = stock_weights(own, found)
    for key, parameter in stock.named_parameters():
        # Not bit by bit: some kernels add in another order where tensors lie at another address.
        torch.testing.assert_close(trunk[key], parameter.grad, atol=1e-6, rtol=1e-5, msg=key)
    for index, alone in enumerate(losses_apart(own)):
        for key in found:
            if key.startswith(f"exits.{index}."):
                torch.testing.assert_close(found[key], alone[key], atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.5) for name in architectures.NAMES), ("bert", "joint"), ("deberta", "joint")]
)
def test_a_share_of_an_exit_s_gradient_enters_the_trunk(name, share):
    """As with one early exit whose loss is so much smaller, for what lies below its branch."""
    own = branched(name, exit_layers=(2, 4))
    found = gradients(own, INPUTS, exit_routing=share)
    early, last = losses_apart(own)
    for key, gradient in found.items():
        weight = 1.0 if key.startswith("exits.") or share == "joint" else share
        expected = weight * early.get(key, 0) + last.get(key, 0)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4, msg=key)


def test_disjoint_branches_learn_on_a_frozen_trunk():
    own = branched("bert", exit_routing="disjoint")
    found = gradients(own, INPUTS)
    assert found.keys() == {key for key, _ in own.named_parameters() if key.startswith("exits.")}
    assert found["exits.0.branch.0.attention.self.query.weight"].any()


@pytest.mark.parametrize("routing", ["joint", "sweet"])
@pytest.mark.parametrize("is_local", [True, False])
def test_an_exit_on_the_embeddings_divides_nothing(routing, is_local):
    """Under SWEET it owns its head; the embeddings are the first segment's, as without it."""
    own = branched("bert", exit_layers=(0, 1, 4), exit_branch_layers=0, exit_pooling="mean")
    found = gradients(own, INPUTS, exit_routing=routing, exit_local_gradients=is_local)
    apart = losses_apart(own)
    table = "bert.embeddings.word_embeddings.weight"
    sources = apart[1:2] if routing == "sweet" else apart
    torch.testing.assert_close(found[table], sum(one[table] for one in sources), atol=1e-6, rtol=1e-4)
    head = "exits.0.classifier.weight"
    torch.testing.assert_close(found[head], apart[0][head], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["joint", "sweet"])
def test_gradient_checkpointing_changes_no_gradient(routing, reentrant):
    own = architectures.model("bert", exit_branch_layers=1, exit_routing=routing)
    expected = gradients(own, INPUTS)
    own.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert own.exits[0].branch[0].gradient_checkpointing
    if reentrant:
        own.enable_input_require_grads()
    found = gradients(own, INPUTS)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-4, msg=key)


# Files


@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    own = branched(name)
    own.save_pretrained(tmp_path)
    loaded = WithExits.from_pretrained(tmp_path)
    assert loaded.config.exit_branch_layers == 1
    tiny.assert_alike(loaded(**INPUTS).exit_logits, own(**INPUTS).exit_logits)
    loaded.set_attn_implementation("eager")
    branch = loaded.exits[0].branch[0]
    configs = [getattr(module, "config", None) for module in branch.modules()]
    assert all(config._attn_implementation == "eager" for config in configs if config is not None)


def test_weights_that_do_not_fit_the_branches_are_refused(tmp_path):
    architectures.model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"exit_branch_layers=1, saved with 0; missing \['exits.0.branch.0"):
        WithExits.from_pretrained(tmp_path, exit_branch_layers=1)


@torch.no_grad()
def test_a_backbone_saved_alone_gives_its_layers_to_new_branches(tmp_path):
    own = branched("bert")
    own.base_model.save_pretrained(tmp_path)
    loaded, info = WithExits.from_pretrained(tmp_path, output_loading_info=True)
    assert any("branch" in key for key in info["missing_keys"])
    for depth, head in zip(own.config.exit_layers[:-1], loaded.exits):
        trunk = loaded._layers[depth - 1].state_dict()
        assert all(torch.equal(trunk[key], value) for key, value in head.branch[0].state_dict().items())


# What is run


def calls_of(own, **settings):
    """How often each layer is run, by name, for one pass over the batch."""
    counts = {}
    handles = []
    modules = dict(own.named_modules())
    names = [f"exits.{index}.branch.{at}" for index, head in enumerate(own.exits) for at in range(len(head.branch))]
    prefix = f"{own.base_model_prefix}.{own.architecture.layers}."
    for name in [*names, *(f"{prefix}{index}" for index in range(LAYERS))]:
        counts[name] = 0

        def count(*_, name=name):
            counts[name] += 1

        handles.append(modules[name].register_forward_hook(count))
    try:
        with torch.no_grad():
            own(**INPUTS, **settings)
    finally:
        for handle in handles:
            handle.remove()
    return {name.removeprefix("exits.").removeprefix(prefix): count for name, count in counts.items()}


@pytest.mark.parametrize(
    ("settings", "run"),
    [
        ({"exit_at": 1}, {"0.branch.0"}),
        ({"exit_at": 2}, {"0", "1.branch.0"}),
        ({"exit_at": 4}, {"0", "1", "2", "3"}),
        ({"exit_thresholds": [None, 0.0]}, {"0", "1.branch.0"}),
        ({"exit_thresholds": [0.0, None]}, {"0.branch.0"}),
        ({"exit_thresholds": [1.0, None]}, {"0.branch.0", "0", "1", "2", "3"}),
        ({"exit_thresholds": [None, None]}, {"0.branch.0", "1.branch.0", "0", "1", "2", "3"}),
    ],
)
def test_only_what_is_needed_is_run(settings, run):
    own = branched("bert")
    counts = calls_of(own, **settings)
    assert {name for name, count in counts.items() if count} == run
    assert max(counts.values()) == 1


def test_branches_of_several_layers_are_run_before_the_trunk():
    own = branched("bert", exit_layers=(2, 4), exit_branch_layers=2)
    counts = calls_of(own, exit_at=2)
    assert {name for name, count in counts.items() if count} == {"0.branch.0", "0.branch.1"}


def test_patience_still_hears_an_exit_that_nothing_leaves_at():
    own = branched("bert", exit_criterion="patience")
    assert calls_of(own, exit_thresholds=[None, 2])["0.branch.0"] == 1
    assert calls_of(own, exit_thresholds=[2, None])["1.branch.0"] == 0


def test_costs_count_the_branches_passed():
    costs = branched("bert").config.exit_costs
    assert costs == [1 / 4, (1 + 2) / 4, (2 + 4) / 4]
    with_zero = branched("bert", exit_layers=(0, 1, 2, 4), exit_pooling="mean").config
    assert with_zero.exit_costs == [0.0, *costs]
    assert with_zero.exit_branch_costs == [0.0, 1 / 4, 1 / 4, 0.0]
    assert branched("bert", exit_layers=(2, 4), exit_branch_layers=2).config.exit_costs == [2 / 4, (2 + 4) / 4]


def test_costs_under_thresholds_leave_out_what_is_not_run():
    config = branched("bert").config
    assert config.exit_costs_under([None, 0.9]) == [1 / 4, 2 / 4, 5 / 4]
    assert config.exit_costs_under([0.9, None]) == [1 / 4, 3 / 4, 5 / 4]
    assert config.exit_costs_under(0.9) == config.exit_costs_under([None, None]) == config.exit_costs
    config = branched("bert", exit_criterion="patience").config
    assert config.exit_costs_under([None, 2]) == config.exit_costs


@tiny.on_few_rows
@tiny.on_rows_used_before
def test_a_report_and_a_calibration_count_the_branches():
    own = architectures.model("bert", exit_branch_layers=1)
    labels = own(**INPUTS).exit_logits[:, -1].argmax(dim=-1).tolist()
    examples = [{**example, "labels": label} for example, label in zip(examples_of(INPUTS), labels)]
    quiet = {"show_progress": False}
    report = evaluate_exits(own, examples, thresholds=[0.0, 1.0], timed_examples=0, **quiet)
    assert report.costs == own.config.exit_costs
    assert [point.cost for point in report.curve] == [1 / 4, 6 / 4]
    found = calibrate_exits(own, examples, target_cost=0.6, temperatures=False, **quiet)
    taken = own.predict(examples, **quiet).exit_index
    costs = torch.tensor(own.config.exit_costs_under(own.config.exit_thresholds))
    assert found.choice.measured.mean_cost == pytest.approx(costs[taken].mean().item())
    assert found.choice.measured.mean_cost <= 0.6


@pytest.mark.parametrize(("place", "layers_run"), [(0, 1), (1, 2)])
def test_a_report_leaves_out_the_branch_of_an_exit_that_answers_nothing(place, layers_run):
    """Rows that go on have run all layers of the trunk and one branch, whichever of the two it is."""
    own = architectures.model("bert", exit_branch_layers=1)
    own.config.exit_thresholds = [None, None]
    own.config.exit_thresholds[place] = tiny.thresholds_between(own, INPUTS)[place]
    examples = [{**example, "labels": 0} for example in examples_of(INPUTS)]
    report = evaluate_exits(own, examples, thresholds=[0.0], timed_examples=0, show_progress=False)
    left = (own(**INPUTS).exit_index == place).sum().item()
    assert 0 < left < ROWS
    assert report.chosen.exit_distribution[place] == pytest.approx(left / ROWS)
    layers = left * layers_run + (ROWS - left) * (LAYERS + 1)
    assert report.chosen.cost == pytest.approx(layers / (ROWS * LAYERS))


def test_a_wish_is_not_granted_at_more_than_the_last_exit_s_own_cost():
    """Branches that most rows pass: cheaper than running everything is not cheap enough."""
    scores = torch.tensor([[0.9, 0.1, 1.0]] + [[0.1, 0.1, 1.0]] * 3)
    agrees = torch.tensor([[True, False, True]] + [[False, False, True]] * 3)
    costs = torch.tensor([0.25, 0.75, 1.5])
    table = ExitTable(scores, agrees, costs, branch_costs=torch.tensor([0.25, 0.25, 0.0]))
    wish = make_wish(max_disagreement=0.0)
    assert table.measure((0.5, 0.5)).mean_cost == pytest.approx((0.25 + 3 * 1.5) / 4)
    assert table.measure((0.5, None)).mean_cost == pytest.approx((0.25 + 3 * 1.25) / 4)
    assert not find_thresholds(table, wish).found
    assert find_thresholds(table, wish, per_exit=True).found == (table.measure((0.5, None)).mean_cost <= 1.0)
    assert find_thresholds(ExitTable(scores, agrees, costs), wish).found


# Architectures whose layers are one module


def test_layers_that_are_one_module_may_pass_a_share_to_branches():
    """Nothing but the branches divides the trunk, so that the share has a meaning there."""
    own = architectures.model("albert", exit_routing=0.3, exit_branch_layers=1)
    groups = [head.branch[0] for head in own.exits[:-1]]
    assert len({id(group) for group in (*groups, own._layers[0])}) == 3


# A length for each exit


@pytest.mark.parametrize("name", ["bert", "deberta", "albert"])
def test_some_exits_with_branches_and_some_without(name):
    own = branched(name, exit_branch_layers=(1, 0))
    assert [len(head.branch) for head in own.exits] == [1, 0, 0]
    assert own.config.exit_costs == [1 / 4, (2 + 1) / 4, (4 + 1) / 4]
    with torch.no_grad():
        assert_rows_leave_alike_alone(own, INPUTS, range(ROWS))
    found = gradients(own, INPUTS, exit_routing="sweet")
    apart = losses_apart(own)
    layers = f"{own.base_model_prefix}.{own.architecture.layers}."
    for key, gradient in found.items():
        # The second exit stands on the trunk and owns what lies below it; the first exit's branch is its own.
        layer = key.removeprefix(layers).partition(".")[0] if key.startswith(layers) else None
        owner = int(key.split(".")[1]) if key.startswith("exits.") else 2 if layer in ("2", "3") else 1
        torch.testing.assert_close(gradient, apart[owner][key], atol=1e-6, rtol=1e-4, msg=key)


# Constant heads


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_constant_heads_in_trunk_and_branch(name, tmp_path):
    architectures.stock(name).save_pretrained(tmp_path / "plain")
    constants = torch.rand(LAYERS, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    fields = {"exit_layers": [1, 2, 4], "constant_heads": [[0, 1], [1, 0], [1, 2]], "constants": constants}
    own = WithExits.from_pretrained(tmp_path / "plain", exit_branch_layers=1, **fields)
    without = WithExits.from_pretrained(tmp_path / "plain", **fields)
    torch.testing.assert_close(own(**INPUTS).exit_logits, without(**INPUTS).exit_logits, atol=2e-6, rtol=1e-5)
    assert own.exits[1].branch[0].attention.self.constants.shape == (2, 12, 12)
    own._exits_are_untrained = False
    assert_rows_leave_alike_alone(own, INPUTS, range(ROWS))
    own.save_pretrained(tmp_path / "own")
    loaded = WithExits.from_pretrained(tmp_path / "own")
    tiny.assert_alike(loaded(**INPUTS).exit_logits, own(**INPUTS).exit_logits)


# Bad input


def test_exits_too_close_for_a_branch():
    with pytest.raises(
        ValueError, match=r"exit_branch_layers=\[2, 2\] is longer .*\[1, 2, 4\] are \[1, 1\] layers apart"
    ):
        architectures.config("bert", exit_branch_layers=2)
    with pytest.raises(ValueError, match=r"there is no exit between .*exit_layers=\[0, 4\]"):
        architectures.config("bert", exit_layers=[0, 4], exit_pooling="mean", exit_branch_layers=1)


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_one_token_of_the_embeddings_is_no_exit(pooling):
    with pytest.raises(ValueError, match=rf"exit on the embeddings.*exit_pooling='{pooling}'.*'mean'"):
        architectures.config("bert", exit_layers=[0, 4], exit_pooling=pooling)


def test_a_copy_is_a_model_of_its_own():
    own = branched("bert")
    other = copy.deepcopy(own)
    assert not {id(parameter) for parameter in own.parameters()} & {id(parameter) for parameter in other.parameters()}


# As one graph


@torch.no_grad()
@pytest.mark.parametrize(("exits", "length", "depth"), [([1, 2, 4], 1, 1), ([1, 2, 4], 1, 2), ([2, 4], 2, 2)])
def test_an_exit_with_a_branch_is_exported(exits, length, depth):
    own = architectures.model("bert", exit_layers=exits, exit_branch_layers=length)

    class OneExit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = own

        def forward(self, input_ids, attention_mask):
            return self.own(input_ids=input_ids, attention_mask=attention_mask, exit_at=depth).logits

    graph = torch.export.export(OneExit(), (), INPUTS).module()
    torch.testing.assert_close(graph(**INPUTS), own(**INPUTS, exit_at=depth).logits, atol=2e-6, rtol=1e-5)
