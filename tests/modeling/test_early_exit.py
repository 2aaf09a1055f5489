"""Rows leave on their own: a row's answer and exit depend on nothing else in its batch."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import hf_adaptive
from tests import tiny
from tests.modeling import architectures

MODELS = {
    (name, pooling): tiny.model(name, exit_pooling=pooling)
    for name in tiny.ARCHITECTURES
    for pooling in ("cls", "mean", "last")
}


def all_exits(model, inputs):
    with torch.no_grad():
        return model(**inputs, exit_thresholds=[None] * (len(model.exits) - 1)).exit_logits.float()


def confidences(logits):
    return logits.softmax(dim=-1).amax(dim=-1)


def expected_exits(logits, thresholds):
    """The definition, row by row: the first exit at or above its threshold, else the last."""
    exits = []
    for row in confidences(logits).tolist():
        reached = [index for index, limit in enumerate(thresholds) if limit is not None and row[index] >= limit]
        exits.append(reached[0] if reached else len(row) - 1)
    return exits


@st.composite
def masks(draw, padding=("right", "left", "middle")):
    """Up to 7 rows of up to 10 tokens, padded at the right, the left or in between."""
    rows, length = draw(st.integers(1, 7)), draw(st.integers(2, 10))
    mask = torch.ones(rows, length).long()
    for row in mask:
        gap = draw(st.integers(0, length - 1))
        start = {
            "right": length - gap,
            "left": 0,
            "middle": draw(st.integers(0, length - gap)),
        }[draw(st.sampled_from(padding))]
        row[start : start + gap] = 0
    return mask


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@given(data=st.data())
def test_rows_of_a_batch_equal_rows_alone(name, data):
    model = MODELS[name, data.draw(st.sampled_from(["cls", "mean", "last"]))]
    mask = data.draw(masks())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    # Random tokens under the padding too: it must not matter what stands there.
    ids = torch.randint(3, tiny.VOCABULARY, mask.shape, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask}
    thresholds = data.draw(st.lists(st.none() | st.floats(0.3, 0.9), min_size=2, max_size=2))
    logits = all_exits(model, inputs)
    for index, limit in enumerate(thresholds):
        assume(limit is None or (confidences(logits)[:, index] - limit).abs().min() > 1e-5)
    with torch.no_grad():
        together = model(**inputs, exit_thresholds=thresholds)
        alone = [model(ids[row : row + 1], mask[row : row + 1], exit_thresholds=thresholds) for row in range(len(ids))]
    assert together.exit_index.tolist() == expected_exits(logits, thresholds)
    assert together.exit_index.tolist() == [row.exit_index.item() for row in alone]
    exit_logits = torch.cat([row.exit_logits for row in alone])
    torch.testing.assert_close(together.exit_logits, exit_logits, atol=1e-5, rtol=1e-4, equal_nan=True)
    check_answer(together, logits, all_run=thresholds == [None, None])


def check_answer(outputs, logits, all_run=False, atol=1e-5):
    """`logits` are those of the exit taken; exits behind it are NaN, exits before it are there."""
    exits = torch.arange(logits.shape[1])
    reached = exits[None] <= outputs.exit_index[:, None]
    assert torch.equal(outputs.exit_logits.isnan().any(dim=-1), ~reached & (not all_run))
    torch.testing.assert_close(outputs.exit_logits.float()[reached], logits[reached], atol=atol, rtol=1e-4)
    rows = torch.arange(len(logits))
    assert torch.equal(outputs.logits, outputs.exit_logits[rows, outputs.exit_index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_within_its_precision(name, dtype):
    model = copy.deepcopy(MODELS[name, "mean"]).to(dtype)
    inputs = tiny.batch(rows=24, length=16)
    logits = all_exits(model, inputs)
    thresholds = tiny.thresholds_between(model, inputs)
    together = model(**inputs, exit_thresholds=thresholds)
    assert together.logits.dtype == dtype
    check_answer(together, logits, atol=5e-2)
    assert len(together.exit_index.unique()) == 3
    margin = (confidences(logits)[:, :2] - torch.tensor(thresholds)).abs().min(dim=1).values
    clear = margin > 2e-2
    assert clear.sum() >= 6
    alone = [model(**tiny.row(inputs, row), exit_thresholds=thresholds).exit_index.item() for row in range(24)]
    assert together.exit_index[clear].tolist() == torch.tensor(alone)[clear].tolist()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_exit_at_forces_every_row(name, padding):
    model, inputs = MODELS[name, "cls"], tiny.batch(padding=padding)
    logits = all_exits(model, inputs)
    for index, depth in enumerate(tiny.EXIT_LAYERS):
        outputs = model(**inputs, exit_at=depth)
        assert outputs.exit_index.tolist() == [index] * 6
        check_answer(outputs, logits, all_run=index == 2)


def layers_run(model, **arguments):
    """Rows that each layer was given."""
    rows = [0] * tiny.LAYERS
    hooks = []
    for depth, layer in enumerate(model.base_model.encoder.layer):
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, depth=depth: rows.__setitem__(
                    depth, rows[depth] + len(args[0] if args else kwargs["hidden_states"])
                ),
                with_kwargs=True,
            )
        )
    outputs = model(**arguments)
    for hook in hooks:
        hook.remove()
    return rows, outputs.exit_index


def test_only_rows_that_stay_are_run_and_no_layer_twice(name):
    model, inputs = MODELS[name, "cls"], tiny.batch(rows=12)
    rows, exits = layers_run(model, **inputs, exit_thresholds=tiny.thresholds_between(model, inputs))
    depth = torch.tensor(tiny.EXIT_LAYERS)[exits]
    assert rows == [int((depth > layer).sum()) for layer in range(tiny.LAYERS)]
    assert len(set(rows)) == 3
    assert layers_run(model, **inputs, exit_at=1)[0] == [12, 0, 0, 0]
    assert layers_run(model, **inputs, exit_thresholds=0.0)[0] == [12, 0, 0, 0]
    assert layers_run(model, **inputs)[0] == [12] * 4


def test_thresholds_per_exit_none_closes_an_exit():
    model, inputs = MODELS["bert", "cls"], tiny.batch(rows=12)
    assert model(**inputs, exit_thresholds=[None, 0.0]).exit_index.tolist() == [1] * 12
    assert model(**inputs, exit_thresholds=[0.0, None]).exit_index.tolist() == [0] * 12
    everything = model(**inputs, exit_thresholds=[None, None])
    assert everything.exit_index.tolist() == [2] * 12
    assert everything.exit_logits.isfinite().all()


def test_threshold_is_reached_by_an_equal_confidence():
    model, inputs = MODELS["bert", "cls"], tiny.batch(rows=1)
    exact = confidences(all_exits(model, inputs))[0, 0].item()
    assert model(**inputs, exit_thresholds=[exact, None]).exit_index.item() == 0
    above = math.nextafter(exact, 2) + 1e-6
    assert model(**inputs, exit_thresholds=[above, None]).exit_index.item() == 2


def test_configured_thresholds_are_used_and_an_argument_goes_before_them():
    model, inputs = tiny.model(exit_thresholds=0.0), tiny.batch()
    assert model(**inputs).exit_index.tolist() == [0] * 6
    assert model(**inputs, exit_thresholds=[None, 0.0]).exit_index.tolist() == [1] * 6
    assert model(**inputs, exit_at=2).exit_index.tolist() == [1] * 6
    model.config.exit_thresholds = 1.0
    assert model(**inputs).exit_index.tolist() == [2] * 6
    model.config.exit_thresholds = [0.5]
    with pytest.raises(ValueError, match="exit_thresholds must have 2 entries"):
        model(**inputs)


def test_training_mode_computes_every_exit():
    model = tiny.model(exit_thresholds=0.0).train()
    outputs = model(**tiny.batch(), labels=tiny.labels())
    assert outputs.exit_logits.isfinite().all()
    assert outputs.exit_index.tolist() == [2] * 6
    assert model(**tiny.batch(), exit_at=1).exit_logits.isfinite().all()


BAD_CALLS = [
    ({"exit_thresholds": [0.5]}, "exit_thresholds must have 2 entries"),
    ({"exit_thresholds": [0.5, 0.5, 0.5]}, "exit_thresholds must have 2 entries"),
    ({"exit_thresholds": 1.5}, "probability from 0 to 1"),
    ({"exit_thresholds": torch.tensor([0.5, 0.5])}, "exit_thresholds must be a list"),
    ({"exit_at": 3}, r"exit_at must be one of exit_layers=\[1, 2, 4\]"),
    ({"exit_at": 0}, "exit_at must be one of"),
    ({"exit_at": True}, "exit_at must be one of"),
    ({"exit_at": 2, "exit_thresholds": 0.5}, "not both"),
]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("arguments", "says"), BAD_CALLS)
def test_bad_arguments_are_refused(arguments, says, mode):
    model = getattr(tiny.model(), mode)()
    with pytest.raises(ValueError, match=says):
        model(**tiny.batch(), **arguments)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batch_is_refused(name, shape):
    empty = torch.zeros(shape).long()
    for arguments in ({}, {"exit_thresholds": 0.5}, {"exit_at": 1}):
        with pytest.raises(ValueError, match=r"batch is empty: shape \(\d, \d\)"):
            MODELS[name, "cls"](input_ids=empty, attention_mask=empty, **arguments)


def test_inputs_are_needed_and_not_twice():
    model = MODELS["bert", "cls"]
    ids = tiny.batch()["input_ids"]
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**arguments)


def test_nan_never_leaves_the_row_goes_on_and_it_is_said(warnings_given):
    model, inputs = tiny.model(), tiny.batch(rows=8)
    with torch.no_grad():
        model.exits[0].classifier.bias[1] = torch.nan
    outputs = model(**inputs, exit_thresholds=0.0)
    assert outputs.exit_index.tolist() == [1] * 8
    assert outputs.exit_logits[:, 0, 1].isnan().all()
    assert outputs.logits.isfinite().all()
    assert any("exit after layer 1 gave NaN for 8 of 8 rows" in text for text in warnings_given())


def test_nan_of_one_row_does_not_touch_the_others(warnings_given):
    model, inputs = tiny.model(), tiny.batch(rows=8)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[3] = torch.nan
    clean = {"inputs_embeds": embeds[[0, 1, 2, 4]], "attention_mask": inputs["attention_mask"][[0, 1, 2, 4]]}
    thresholds = tiny.thresholds_between(model, clean)
    outputs = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], exit_thresholds=thresholds)
    own = model(**clean, exit_thresholds=thresholds)
    assert outputs.exit_index[[0, 1, 2, 4]].tolist() == own.exit_index.tolist()
    assert outputs.exit_index[3] == 2
    assert outputs.logits[3].isnan().all()
    torch.testing.assert_close(outputs.logits[[0, 1, 2, 4]], own.logits, atol=1e-5, rtol=1e-4)
    assert any("gave NaN for 1 of 8 rows" in text for text in warnings_given())


def test_nan_with_everything_run_is_not_chosen_either(warnings_given):
    model, inputs = tiny.model(), tiny.batch(rows=4)
    with torch.no_grad():
        model.exits[0].classifier.bias[:] = torch.nan
    outputs = model(**inputs, exit_thresholds=0.0, output_hidden_states=True)
    assert outputs.exit_index.tolist() == [1] * 4
    assert any("exit after layer 1 gave NaN for 4 of 4 rows" in text for text in warnings_given())


def test_infinite_logits_do_not_count_as_sure():
    """softmax of several infinities is NaN."""
    model, inputs = tiny.model(), tiny.batch(rows=4)
    with torch.no_grad():
        model.exits[0].classifier.bias[:] = torch.inf
    assert model(**inputs, exit_thresholds=0.0).exit_index.tolist() == [1] * 4


def test_many_threads_on_one_model(name):
    model = MODELS[name, "mean"]
    batches = [tiny.batch(rows=1 + seed % 5, length=6 + seed % 7, seed=seed) for seed in range(16)]
    calls = [(inputs, {"exit_at": 1}) for inputs in batches]
    calls += [(inputs, {"exit_thresholds": tiny.thresholds_between(model, inputs)}) for inputs in batches]
    calls += [(inputs, {"exit_thresholds": 0.0}) for inputs in batches] + [(inputs, {}) for inputs in batches]

    def run(call):
        with torch.no_grad():
            return model(**call[0], **call[1]).exit_logits

    expected = [run(call) for call in calls]
    with ThreadPoolExecutor(max_workers=8) as pool:
        together = list(pool.map(run, calls * 3))
    for own, logits in zip(expected * 3, together):
        assert torch.equal(own.nan_to_num(7.0), logits.nan_to_num(7.0))


def test_a_thread_that_trains_does_not_disturb_one_that_predicts():
    model, inputs = tiny.without_dropout(), tiny.batch()
    expected = model(**inputs, exit_at=1).logits

    def train(seed):
        return torch.autograd.grad(model(**inputs, labels=tiny.labels()).loss, model.exits[0].classifier.weight)[0]

    with ThreadPoolExecutor(max_workers=4) as pool:
        trained = pool.map(train, range(8))
        predicted = pool.map(lambda seed: model(**inputs, exit_at=1).logits, range(8))
        gradients = list(trained)
        assert all(torch.equal(logits, expected) for logits in predicted)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_an_error_inside_a_layer_leaves_the_model_usable():
    model, inputs = tiny.model(), tiny.batch()
    expected = model(**inputs, exit_at=2).logits
    layer = model.base_model.encoder.layer[1]

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**inputs, exit_at=2)
    hook.remove()
    assert torch.equal(model(**inputs, exit_at=2).logits, expected)
    assert model.base_model(**inputs).last_hidden_state.shape == (6, 12, tiny.HIDDEN)


@pytest.mark.parametrize("length", [4, 16])
def test_batch_as_large_as_deberta_s_table_of_relative_positions(length):
    """512 rows of relative embeddings and 512 rows of a batch look alike by their first dimension."""
    model = tiny.model("deberta", max_relative_positions=256)
    assert model.base_model.encoder.rel_embeddings.weight.shape[0] == 512
    inputs = tiny.batch(rows=512, length=length)
    thresholds = tiny.thresholds_between(model, inputs)
    with torch.no_grad():
        together = model(**inputs, exit_thresholds=thresholds)
        parts = [
            model(**{name: tensor[start : start + 100] for name, tensor in inputs.items()}, exit_thresholds=thresholds)
            for start in range(0, 512, 100)
        ]
    assert together.exit_index.tolist() == torch.cat([part.exit_index for part in parts]).tolist()
    assert len(together.exit_index.unique()) == 3
    torch.testing.assert_close(
        together.exit_logits,
        torch.cat([part.exit_logits for part in parts]),
        atol=1e-5,
        rtol=1e-4,
        equal_nan=True,
    )


@pytest.mark.parametrize("rows", [tiny.HIDDEN, 12, 2, 32, 1])
def test_batch_as_large_as_other_dimensions(name, rows):
    """Hidden size, length, heads, twice the relative positions."""
    model, inputs = MODELS[name, "mean"], tiny.batch(rows=rows)
    thresholds = tiny.thresholds_between(model, inputs)
    together = model(**inputs, exit_thresholds=thresholds)
    check_answer(together, all_exits(model, inputs))
    alone = [model(**tiny.row(inputs, row), exit_thresholds=thresholds).exit_index.item() for row in range(rows)]
    assert together.exit_index.tolist() == alone


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "eager") for name in tiny.ARCHITECTURES), ("bert", "sdpa"), ("roberta", "sdpa")]
)
def test_hidden_states_and_attentions_are_the_plain_model_s(name, attention):
    model = tiny.model(name)
    plain = tiny.plain_model(name, "Model")
    plain.load_state_dict(model.base_model.state_dict(), strict=False)
    inputs = tiny.batch()
    wants = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    for own in (model, plain):
        if name in ("bert", "roberta"):
            own.set_attn_implementation(attention)
    thresholds = tiny.thresholds_between(model, inputs)
    expected = plain(**inputs, **wants)
    early = model(**inputs, exit_thresholds=thresholds)
    for arguments in ({}, {"exit_thresholds": thresholds}, {"exit_at": 1}):
        outputs = model(**inputs, **wants, **arguments)
        for field in ("hidden_states", "attentions"):
            own, stock = outputs.get(field) or (), expected.get(field) or ()
            assert len(own) == len(stock)
            assert all(torch.equal(a, b) for a, b in zip(own, stock))
    assert len(outputs.hidden_states) == tiny.LAYERS + 1
    chosen = model(**inputs, **wants, exit_thresholds=thresholds)
    assert chosen.exit_index.tolist() == early.exit_index.tolist()
    torch.testing.assert_close(chosen.logits, early.logits, atol=1e-5, rtol=1e-4)
    assert chosen.exit_logits.isfinite().all()


def test_outputs_asked_for_in_the_configuration():
    model = tiny.model(output_hidden_states=True)
    outputs = model(**tiny.batch(), exit_at=1)
    assert len(outputs.hidden_states) == tiny.LAYERS + 1
    assert outputs.attentions is None


def test_tuple_instead_of_a_dictionary():
    model, inputs = tiny.model(), tiny.batch()
    named = model(**inputs, labels=tiny.labels(), exit_thresholds=0.5)
    for plain in (
        model(**inputs, labels=tiny.labels(), exit_thresholds=0.5, return_dict=False),
        tiny.model(return_dict=False)(**inputs, labels=tiny.labels(), exit_thresholds=0.5),
    ):
        assert isinstance(plain, tuple)
        assert len(plain) == 4
        for own, value in zip(plain, (named.loss, named.logits, named.exit_logits, named.exit_index)):
            assert torch.equal(own.nan_to_num(7.0), value.nan_to_num(7.0))


@pytest.mark.parametrize("labels", [None, tiny.labels()])
def test_a_loss_on_logits_in_training_is_of_the_last_exit_and_warned_of(labels, warnings_given):
    model = hf_adaptive.BertForSequenceClassificationWithExits(tiny.config(exit_routing="joint")).train()
    outputs = model(**tiny.batch(), labels=labels)
    assert torch.equal(outputs["logits"], outputs.exit_logits[:, -1])
    assert not warnings_given()
    functional.cross_entropy(outputs.logits, tiny.labels()).backward()
    learned = [exit.classifier.weight.grad for exit in model.exits]
    assert [grad is not None and bool(grad.any()) for grad in learned] == [False, False, True]
    assert [text for text in warnings_given() if "exits after layers [1, 2] learn nothing" in text]
    assert model._exits_are_untrained


@pytest.mark.parametrize("routing", ["joint", "sweet"])
def test_a_loss_on_exit_logits_trains_every_exit(routing, warnings_given):
    model = hf_adaptive.BertForSequenceClassificationWithExits(tiny.config(exit_routing=routing)).train()
    model(**tiny.batch()).exit_logits.sum().backward()
    assert all(exit.classifier.weight.grad.any() for exit in model.exits)
    assert not model._exits_are_untrained
    assert not warnings_given()


def test_scores_that_a_sweet_model_has_freed_say_why_they_have_no_gradient():
    outputs = tiny.model().train()(**tiny.batch(), labels=tiny.labels())
    with pytest.raises(RuntimeError, match="these scores have no gradient"):
        outputs.logits.sum().backward()


def test_one_exit_learns_from_logits(warnings_given):
    model = hf_adaptive.BertForSequenceClassificationWithExits(tiny.config(exit_layers=[4])).train()
    model(**tiny.batch()).logits.sum().backward()
    assert not model._exits_are_untrained
    assert not warnings_given()


@pytest.mark.parametrize("routing", ["sweet", "disjoint", 0.3])
@pytest.mark.parametrize("arguments", [{}, {"exit_at": 2}, {"exit_at": 4}, {"exit_thresholds": 0.4}])
def test_gradients_in_evaluation_mode_are_the_networks(name, routing, arguments):
    """For saliency: whatever the exits were trained with."""
    gradients = []
    for each in ("joint", routing):
        model, inputs = tiny.model(name, exit_routing=each), tiny.batch()
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **arguments).logits
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), embeds)[0])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_embeddings_instead_of_tokens(name):
    model, inputs = MODELS[name, "mean"], tiny.batch(padding="right")
    thresholds = tiny.thresholds_between(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    if name in ("mpnet", "roberta"):
        # Without tokens these count positions from the start, padding included: the same for right padding.
        inputs["position_ids"] = torch.arange(2, 14)[None]
    from_ids = model(**inputs, exit_thresholds=thresholds)
    inputs.pop("input_ids")
    from_embeds = model(inputs_embeds=embeds, **inputs, exit_thresholds=thresholds)
    assert from_embeds.exit_index.tolist() == from_ids.exit_index.tolist()
    torch.testing.assert_close(from_embeds.exit_logits, from_ids.exit_logits, equal_nan=True)


def test_gradient_through_rows_that_left_early():
    """For saliency: a model in evaluation mode can be differentiated."""
    model, inputs = tiny.model(exit_routing="joint"), tiny.batch()
    thresholds = tiny.thresholds_between(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    outputs = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], exit_thresholds=thresholds)
    outputs.logits.sum().backward()
    together = embeds.grad.clone()
    for row, exit_index in enumerate(outputs.exit_index.tolist()):
        embeds.grad = None
        depth = tiny.EXIT_LAYERS[exit_index]
        alone = model(
            inputs_embeds=embeds[row : row + 1], attention_mask=inputs["attention_mask"][row : row + 1], exit_at=depth
        )
        alone.logits.sum().backward()
        torch.testing.assert_close(together[row], embeds.grad[row], atol=1e-5, rtol=1e-3)


def test_untrained_exits_are_warned_of_once(warnings_given):
    config = tiny.config()
    model = hf_adaptive.BertForSequenceClassificationWithExits(config).eval()
    model(**tiny.batch())
    assert not warnings_given()
    for _ in range(3):
        model(**tiny.batch(), exit_thresholds=0.9)
    assert len([text for text in warnings_given() if "never trained" in text]) == 1
    model.train()(**tiny.batch(), labels=tiny.labels()).loss.backward()
    assert not model._exits_are_untrained


def test_token_types_and_positions_go_with_their_rows():
    model = tiny.model()
    inputs = tiny.batch()
    inputs["token_type_ids"] = torch.randint(0, 2, (6, 12))
    inputs["position_ids"] = torch.arange(12).flip(dims=(0,))[None]
    thresholds = tiny.thresholds_between(model, inputs)
    together = model(**inputs, exit_thresholds=thresholds)
    assert len(together.exit_index.unique()) > 1
    for row in range(6):
        own = {name: tensor[row : row + 1] if len(tensor) > 1 else tensor for name, tensor in inputs.items()}
        alone = model(**own, exit_thresholds=thresholds)
        torch.testing.assert_close(
            alone.exit_logits[0], together.exit_logits[row], equal_nan=True, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["bert", "mpnet", "roberta"])
def test_extended_attention_mask(name):
    """A mask of its own for every pair of tokens, where the backbone takes one."""
    model = MODELS[name, "cls"]
    ids = tiny.batch()["input_ids"]
    mask = torch.rand(6, 1, 12, 12) > 0.3
    mask |= torch.eye(12).bool()
    thresholds = [0.55, 0.55]
    together = model(ids, mask, exit_thresholds=thresholds)
    for row in range(6):
        alone = model(ids[row : row + 1], mask[row : row + 1], exit_thresholds=thresholds)
        torch.testing.assert_close(
            alone.exit_logits[0], together.exit_logits[row], equal_nan=True, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["bert", "deberta-v2"])
@pytest.mark.parametrize("selection", [[0, -1], -1, [2], True])
def test_hidden_states_are_those_that_a_stock_model_gives(name, selection):
    model, inputs = architectures.model(name), tiny.batch()
    backbone = architectures.stock(name, "Model")
    backbone.load_state_dict(model.base_model.state_dict(), strict=False)
    expected = backbone(**inputs, output_hidden_states=selection).hidden_states
    states = model(**inputs, output_hidden_states=selection, exit_at=1).hidden_states
    torch.testing.assert_close(states, expected)
