"""What every architecture has to do, forward and backward; what concerns files is in test_architectures_loading.py."""

import copy
import functools
import itertools
import threading

import pytest
import torch

from tests import tiny
from tests.modeling import architectures

ROWS, LENGTH = 8, 12
EXITS = len(architectures.EXIT_LAYERS)
# Their stock models refuse it.
NO_CHECKPOINTING = ("albert", "mpnet")
# Its stock model cannot go back through its normalised table of relative positions once a layer.
NO_REENTRANT_CHECKPOINTING = ("deberta-v2",)


@pytest.fixture(params=architectures.NAMES)
def name(request):
    """Every architecture in turn."""
    return request.param


@functools.cache
def model_of(name, **fields):
    """A model that no test changes."""
    return architectures.model(name, **fields)


@functools.cache
def stock_of(name, **fields):
    """The stock classifier with the weights of `model_of`: the last exit's head is its head."""
    own = model_of(name, **fields)
    stock = architectures.stock(name, **fields)
    stock.load_state_dict(stock_weights(own, own.state_dict()))
    return stock


def stock_weights(own, values):
    """What belongs to each weight of the stock classifier, of things named as the parameters of a model with exits."""
    last = f"exits.{len(own.exits) - 1}."
    sources = own.architecture.head.sources
    head = {
        f"{source}{key.removeprefix(last + part)}": value
        for part, source in sources.items()
        for key, value in values.items()
        if key.startswith(f"{last}{part}.")
    }
    return {**{key: value for key, value in values.items() if not key.startswith("exits.")}, **head}


def batch(rows=ROWS, length=LENGTH, **options):
    return tiny.batch(rows, length, **options)


def assert_same(outputs, expected, atol=2e-6):
    assert torch.equal(outputs.exit_index, expected.exit_index)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=atol, rtol=2e-5)


# As the stock model


@torch.no_grad()
def test_last_exit_answers_as_the_stock_classifier(name):
    for inputs in (batch(), tiny.row(batch(), 0), {"input_ids": batch()["input_ids"][:1]}):
        expected = stock_of(name)(**inputs).logits
        torch.testing.assert_close(model_of(name)(**inputs).logits, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_hidden_states_and_attentions_are_the_stock_model_s(name):
    own, stock = (kind(name, attn_implementation="eager") for kind in (model_of, stock_of))
    asked = {"output_hidden_states": True, "output_attentions": True}
    outputs, expected = own(**batch(), **asked), stock(**batch(), **asked)
    assert len(outputs.hidden_states) == architectures.LAYERS + 1
    assert len(outputs.attentions) == architectures.LAYERS
    for kind in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(outputs, kind), getattr(expected, kind), strict=True):
            assert torch.equal(ours, theirs)
    backbone = stock.base_model(**batch(), **own.architecture.forward_arguments).last_hidden_state
    assert torch.equal(outputs.hidden_states[-1], backbone)


@torch.no_grad()
def test_each_exit_sees_the_hidden_state_after_its_layer(name):
    own = model_of(name)
    hidden = stock_of(name)(**batch(), output_hidden_states=True).hidden_states
    outputs = own(**batch())
    for index, depth in enumerate(own.config.exit_layers):
        head = own.exits[index]
        pooled = head.pool(hidden[depth], own.config.exit_pooling, batch()["attention_mask"])
        torch.testing.assert_close(outputs.exit_logits[:, index], head.classifier(pooled), atol=1e-6, rtol=1e-6)


def test_joint_gradients_of_the_last_exit_are_the_stock_classifier_s(name):
    own = copy.deepcopy(model_of(name, exit_routing="joint", exit_loss_weights=(0, 0, 1))).train()
    stock = copy.deepcopy(stock_of(name)).train()
    stock.load_state_dict(stock_weights(own, own.state_dict()))
    labels = tiny.labels(ROWS)
    own(**batch(), labels=labels).loss.backward()
    stock(**batch(), labels=labels).loss.backward()
    gradients = stock_weights(own, {key: parameter.grad for key, parameter in own.named_parameters()})
    for key, parameter in stock.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, atol=1e-6, rtol=1e-4, msg=key)


# Rows


def assert_rows_leave_alike_alone(own, inputs, rows):
    thresholds = tiny.thresholds_between(own, inputs)
    together = own(**inputs, exit_thresholds=thresholds)
    assert len(together.exit_index.unique()) > 1
    for index in rows:
        alone = own(**tiny.row(inputs, index), exit_thresholds=thresholds)
        assert alone.exit_index.item() == together.exit_index[index].item()
        torch.testing.assert_close(alone.logits[0], together.logits[index], atol=5e-6, rtol=5e-5)


@torch.no_grad()
def test_each_row_of_a_padded_batch_equals_the_row_alone(name):
    assert_rows_leave_alike_alone(model_of(name), batch(), range(ROWS))


@torch.no_grad()
@pytest.mark.parametrize("name", architectures.DECODERS)
def test_each_row_of_a_decoder_s_batch_padded_on_the_left_equals_the_row_alone(name):
    assert_rows_leave_alike_alone(model_of(name), batch(padding="left"), range(ROWS))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", architectures.DECODERS)
def test_padding_that_no_mask_names_is_read_alike_by_rows_that_leave_early(name, padding):
    """As in the stock decoders: attended to, but not taken for the last token."""
    own = model_of(name)
    tokens = {"input_ids": batch(padding=padding)["input_ids"]}
    thresholds = tiny.thresholds_between(own, tokens)
    expected = own(**tokens, exit_thresholds=thresholds, output_hidden_states=True)
    assert_same(own(**tokens, exit_thresholds=thresholds), expected)
    torch.testing.assert_close(own(**tokens).logits, stock_of(name)(**tokens).logits, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, LENGTH, 16, architectures.HIDDEN, architectures.VOCABULARY])
def test_batch_as_large_as_another_dimension(name, rows):
    """Of the hidden state, of tables of relative positions, of heads: nothing is taken for a row that is none."""
    own, inputs = model_of(name), batch(rows)
    thresholds = tiny.thresholds_between(own, inputs)
    expected = own(**inputs, exit_thresholds=thresholds, output_hidden_states=True)
    assert_same(own(**inputs, exit_thresholds=thresholds), expected, atol=5e-6)


@torch.no_grad()
def test_a_data_set_stage_by_stage_is_answered_as_its_rows(name):
    own, inputs = model_of(name), batch(20, padding="left" if name in architectures.DECODERS else "right")
    thresholds = tiny.thresholds_between(own, inputs)
    examples = [{key: value.tolist() for key, value in zip(inputs, row)} for row in zip(*inputs.values())]
    answers = own.predict(examples, batch_size=6, exit_thresholds=thresholds, show_progress=False)
    assert_same(answers, own(**inputs, exit_thresholds=thresholds), atol=5e-6)


@torch.no_grad()
def test_embeddings_instead_of_tokens(name):
    own, inputs = model_of(name), batch()
    thresholds = tiny.thresholds_between(own, inputs)
    embeddings = own.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    for settings in ({"exit_thresholds": thresholds}, {"exit_at": 2}, {}):
        assert_same(own(**given, **settings), own(**inputs, **settings))


@torch.no_grad()
def test_two_threads_at_once(name):
    own = model_of(name)
    batches = [batch(seed=seed, length=8 + 4 * seed) for seed in range(2)]
    thresholds = [tiny.thresholds_between(own, inputs, share) for inputs, share in zip(batches, (0.3, 0.7))]
    expected = [own(**inputs, exit_thresholds=each) for inputs, each in zip(batches, thresholds)]
    results, start = [[], []], threading.Barrier(2)

    def run(index):
        start.wait()
        with torch.no_grad():
            results[index] = [own(**batches[index], exit_thresholds=thresholds[index]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, one in zip(results, expected):
        assert len(answers) == 5
        for answer in answers:
            assert torch.equal(answer.logits, one.logits)
            assert torch.equal(answer.exit_index, one.exit_index)


# Who learns


def gradients(own, inputs=None, **settings):
    """Gradient of every parameter; those that have none are left out."""
    own = copy.deepcopy(own).train()
    for key, value in settings.items():
        setattr(own.config, key, value)
    own(**(inputs or batch()), labels=tiny.labels(ROWS)).loss.backward()
    return {key: parameter.grad for key, parameter in own.named_parameters() if parameter.grad is not None}


def first_depths(own):
    """The first layer that each module of the backbone's list is run for."""
    groups = len(own._layers)
    return [index * own.config.num_hidden_layers // groups for index in range(groups)]


def owner(own, key):
    """Index of the one exit that may change a parameter."""
    kind, _, rest = key.partition(".")
    if kind == "exits":
        return int(rest.partition(".")[0])
    if rest.startswith(f"{own.architecture.layers}."):
        index = int(rest.removeprefix(f"{own.architecture.layers}.").partition(".")[0])
        return sum(depth <= first_depths(own)[index] for depth in own.config.exit_layers)
    is_after_the_layers = own.architecture.final_norm is not None and rest.startswith(own.architecture.final_norm)
    # Embeddings and what the layers share belong to the first exit.
    return len(own.exits) - 1 if is_after_the_layers else 0


def assert_sweet_separates(own):
    """Every parameter gets what its own exit's loss alone would give it, and nothing of any other exit."""
    together = gradients(own, exit_routing="sweet")
    alone = [
        gradients(own, exit_routing="joint", exit_loss_weights=[float(index == other) for other in range(EXITS)])
        for index in range(EXITS)
    ]
    assert together.keys() == {key for key, _ in own.named_parameters()}
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone[owner(own, key)][key], atol=1e-6, rtol=1e-4, msg=key)
    # Not empty words: without SWEET the later exits do reach the first layers.
    assert any(owner(own, key) == 0 and alone[-1][key].any() for key in alone[-1])


def test_sweet_gives_no_gradient_across_a_boundary(name):
    assert_sweet_separates(model_of(name))


@pytest.mark.parametrize("exit_layers", [[1, 2, 4], [1, 3, 4], [2, 3, 4]])
def test_sweet_with_several_groups_of_albert_layers(exit_layers):
    """Each group learns from the first exit that it is run for."""
    assert_sweet_separates(architectures.model("albert", num_hidden_groups=2, exit_layers=exit_layers))


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_layers_that_are_one_module_cannot_pass_a_share(share):
    with pytest.raises(ValueError, match=rf"exit_routing={share} .*Albert.* one shared module: use 'joint', 'sweet'"):
        architectures.model("albert", exit_routing=share)


@pytest.mark.parametrize(("routing", "reentrant"), [("joint", True), ("sweet", False)])
def test_gradient_checkpointing_changes_no_gradient(name, routing, reentrant):
    own = architectures.model(name, exit_routing=routing)
    if name in NO_CHECKPOINTING:
        with pytest.raises(ValueError, match="does not support"):
            own.gradient_checkpointing_enable()
        return
    if reentrant and name in NO_REENTRANT_CHECKPOINTING:
        pytest.skip("the stock model cannot do it")
    expected = gradients(own)
    own.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert own.is_gradient_checkpointing
    if reentrant:
        # As for any model: a reentrant checkpoint passes no gradient to a layer whose input needs none.
        own.enable_input_require_grads()
    found = gradients(own)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-4, msg=key)
    own.gradient_checkpointing_disable()
    assert not own.is_gradient_checkpointing


# Ways to run it


@torch.no_grad()
def test_backbone_saved_alone_comes_back_and_its_exits_are_new(name, tmp_path, warnings_given):
    own = model_of(name)
    own.base_model.save_pretrained(tmp_path)
    loaded, info = type(own).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"exits.{key}" for key in own.exits.state_dict()}
    report = "\n".join(warnings_given())
    assert "exits." in report
    assert "MISSING" in report
    hidden = [each(**batch(), output_hidden_states=True).hidden_states[-1] for each in (loaded, own)]
    tiny.assert_alike(*hidden)
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())
    assert loaded._exits_are_untrained


@torch.no_grad()
def test_attention_implementations_agree(name):
    own, inputs = model_of(name), batch()
    if not own._supports_sdpa:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            architectures.model(name, attn_implementation="sdpa")
        return
    thresholds = tiny.thresholds_between(own, inputs)
    answers = []
    for implementation in ("eager", "sdpa"):
        other = copy.deepcopy(own)
        other.set_attn_implementation(implementation)
        assert other.base_model.config._attn_implementation == implementation
        answers.append(other(**inputs, exit_thresholds=thresholds))
    assert_same(*answers, atol=5e-5)


@torch.no_grad()
def test_feed_forward_in_chunks(name):
    own = model_of(name)
    chunked = architectures.model(name, chunk_size_feed_forward=1)
    thresholds = tiny.thresholds_between(own, batch())
    assert_same(chunked(**batch(), exit_thresholds=thresholds), own(**batch(), exit_thresholds=thresholds))


@pytest.fixture
def compile_layers():
    """Compiles each layer in place."""
    torch.compiler.reset()

    def compile_each(own, backend):
        for layer in own._layers:
            layer.compile(backend=backend)

    yield compile_each
    torch.compiler.reset()


# Tensors handed from layer to layer; one shared module; tuples, and a convolution between two; windows, rotary tables.
@torch.no_grad()
@pytest.mark.parametrize(
    "name", architectures.kinds(architectures.NAMES, "bert", "albert", "deberta-v2", "gpt2", "gemma2")
)
def test_compiled_layers_give_the_same(name, compile_layers):
    own = architectures.model(name, exit_layers=[1, 2], **architectures.two_layers(name))
    thresholds = tiny.thresholds_between(own, batch())
    expected = own(**batch(), exit_thresholds=thresholds)
    assert len(expected.exit_index.unique()) == 2
    compile_layers(own, "eager")
    assert_same(own(**batch(), exit_thresholds=thresholds), expected)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_compiled_layers_learn_the_same(name, compile_layers):
    own = architectures.model(name, exit_layers=[1, 2], **architectures.two_layers(name)).train()
    expected = gradients(own)
    compile_layers(own, "aot_eager")
    own(**batch(), labels=tiny.labels(ROWS)).loss.backward()
    for key, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-6, rtol=1e-4, msg=key)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(name):
    own = model_of(name)
    other = copy.deepcopy(own)
    assert torch.equal(other(**batch()).logits, own(**batch()).logits)
    for parameter in other.base_model.parameters():
        parameter.zero_()
    other(**batch(), exit_at=1)
    assert not torch.equal(own(**batch()).logits, torch.zeros(ROWS, 3))
    shared = itertools.product(own.parameters(), other.parameters())
    assert not any(ours is theirs for ours, theirs in shared)
