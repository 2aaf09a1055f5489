"""Constant heads in every architecture, against references that need no other implementation."""

import contextlib
import copy
import pickle
from collections.abc import Iterator

import pytest
import torch

import hf_adaptive
from hf_adaptive.modeling.constant_heads import install_constant_heads, self_attentions
from tests import tiny
from tests.modeling import architectures

NAMES = tuple(name for name in architectures.NAMES if hf_adaptive.ARCHITECTURES[name].attention is not None)
ENCODERS = tuple(name for name in NAMES if name not in architectures.DECODERS)
LAYERS, HEADS, LENGTH = architectures.LAYERS, 4, 12
EVERY = [[layer, head] for layer in range(LAYERS) for head in range(HEADS)]
# One layer has none, one has all; groups of two that share keys and values lose both, one, or none.
SOME = [[0, 0], [0, 1], [1, 2], [3, 0], [3, 1], [3, 2], [3, 3]]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=NAMES)
def name(request):
    """Every architecture that can have constant heads, in turn."""
    return request.param


def stock(name, **fields):
    return architectures.stock(name, "Model", **{"attn_implementation": "eager", **fields})


def constants(seed=0):
    return torch.rand(LAYERS, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(seed))


def converted(plain, name, heads, values=None, length=LENGTH):
    """A copy of a stock backbone with constant heads."""
    own = copy.deepcopy(plain)
    own.config.constant_heads, own.config.constant_length = heads, length
    install_constant_heads(own, hf_adaptive.ARCHITECTURES[name], own.config, values)
    return own.eval()


def run(backbone, name, inputs, **asked):
    return backbone(**inputs, **hf_adaptive.ARCHITECTURES[name].forward_arguments, **asked)


def batch(name, rows=5):
    """Padded on the right, and rows with a hole, which the papers' preprocessing makes."""
    inputs = tiny.batch(rows, LENGTH)
    inputs["attention_mask"][0, 5:7] = 0
    return inputs


def reach(name, layer):
    """Where a position may attend to, `(length, length)`, from the tiny configurations by hand."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    is_local = name == "mistral" or (name in ("gemma2", "gemma3_text", "modernbert", "qwen2") and layer % 2 == 0)
    if name == "modernbert":
        return distance.abs() <= 4 if is_local else distance > -LENGTH
    if name not in architectures.DECODERS:
        return distance > -LENGTH
    return (distance >= 0) & (distance < 8) if is_local else distance >= 0


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_constants_of_this_very_input_give_what_the_stock_model_gives(name, attn_implementation):
    plain = stock(name)
    if attn_implementation == "sdpa" and not plain._supports_sdpa:
        pytest.skip("the stock model has no sdpa")
    inputs = tiny.row(tiny.batch(5, LENGTH), 0)
    inputs["attention_mask"][0, -3:] = 0
    expected = run(plain, name, inputs, output_attentions=True)
    of_this_input = torch.cat(expected.attentions)
    own = converted(plain, name, EVERY, of_this_input)
    own.set_attn_implementation(attn_implementation)
    states = run(own, name, inputs).last_hidden_state
    torch.testing.assert_close(states[:, :-3], expected.last_hidden_state[:, :-3], **CLOSE)


@contextlib.contextmanager
def replaced_matrices(monkeypatch, name, heads, values, real) -> Iterator[list]:
    """Stock code whose attention probabilities of some heads are masked, renormalised constants."""
    softmax, calls = torch.nn.functional.softmax, []

    def replacing(scores, *args, **kwargs):
        probabilities = softmax(scores, *args, **kwargs)
        if scores.dim() == 4:
            layer = len(calls)
            calls.append(layer)
            for head in [head for index, head in heads if index == layer]:
                matrices = values[layer, head] * reach(name, layer) * real[:, :, None] * real[:, None, :]
                probabilities[:, head] = matrices / matrices.sum(-1, keepdim=True).clamp(min=1e-12)
        return probabilities

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "softmax", replacing)
        yield calls


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_some_constant_heads_are_replaced_matrices(name, attn_implementation, monkeypatch):
    plain, inputs, values = stock(name), batch(name), constants()
    real = inputs["attention_mask"] == 1
    own = converted(plain, name, SOME, values)
    if attn_implementation == "sdpa" and own._supports_sdpa:
        own.set_attn_implementation("sdpa")
    states = run(own, name, inputs).last_hidden_state
    with replaced_matrices(monkeypatch, name, SOME, values, real.float()) as calls:
        expected = run(plain, name, inputs).last_hidden_state
    assert len(calls) == LAYERS
    torch.testing.assert_close(states[real], expected[real], **CLOSE)


def test_attentions_are_given_and_have_a_gradient(name):
    own, inputs = converted(stock(name), name, SOME, constants()), batch(name)
    with torch.no_grad():
        expected = run(own, name, inputs).last_hidden_state
    outputs = run(own, name, inputs, output_attentions=True)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(outputs.last_hidden_state[real], expected[real], **CLOSE)
    assert [tuple(attentions.shape) for attentions in outputs.attentions] == [(5, HEADS, LENGTH, LENGTH)] * LAYERS
    gradients = torch.autograd.grad(outputs.last_hidden_state[real].square().sum(), outputs.attentions)
    assert all(gradient[:, head].abs().sum() > 0 for gradient in gradients for head in range(HEADS))


@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_without_a_gradient_padding_is_passed_over(name, padding):
    own, inputs = converted(stock(name), name, SOME, constants()), tiny.batch(5, LENGTH)
    if padding == "left":
        inputs = {key: tensor.flip(1) if tensor.dim() == 2 else tensor for key, tensor in inputs.items()}
    if padding == "none":
        del inputs["attention_mask"]
    real = inputs.get("attention_mask", torch.ones(5, LENGTH)) == 1
    expected = run(own, name, inputs).last_hidden_state
    projected = []
    for attention in self_attentions(own, hf_adaptive.ARCHITECTURES[name]):
        if hasattr(attention, "constant_value"):
            attention.constant_value.register_forward_hook(lambda _, args, __: projected.append(args[0].shape[:-1]))
    with torch.no_grad():
        states = run(own, name, inputs).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], **CLOSE)
    positions = {shape.numel() for shape in projected}
    assert positions == {int(real.sum())}


@torch.no_grad()
def test_what_lies_out_of_reach_has_no_weight(name):
    values, inputs = constants(), batch(name)
    own = converted(stock(name), name, EVERY, values)
    changed = values.clone()
    for layer in range(LAYERS):
        changed[layer, :, ~reach(name, layer)] = 1e3
    states = run(own, name, inputs).last_hidden_state
    assert torch.equal(run(converted(stock(name), name, EVERY, changed), name, inputs).last_hidden_state, states)


@torch.no_grad()
def test_nothing_of_rotary_positions_is_computed_where_no_head_reads_them(name, monkeypatch):
    plain, inputs = stock(name), batch(name)
    if "rotary_emb" not in dict(plain.named_children()):
        pytest.skip("the architecture has none")
    some, every = converted(plain, name, SOME), converted(plain, name, EVERY)
    expected = run(every, name, inputs).last_hidden_state

    def refuse(*args, **kwargs):
        raise AssertionError("rotary positions were computed")

    monkeypatch.setattr(type(plain.rotary_emb), "forward", refuse)
    assert torch.equal(run(every, name, inputs).last_hidden_state, expected)
    with pytest.raises(AssertionError, match="rotary positions were computed"):
        run(some, name, inputs)


def test_queries_and_keys_of_constant_heads_are_gone(name):
    plain = stock(name)
    own = converted(plain, name, EVERY, length=1)
    architecture = hf_adaptive.ARCHITECTURES[name]
    for attention, layer in zip(self_attentions(own, architecture), range(LAYERS)):
        sizes = {key: parameter.numel() for key, parameter in attention.named_parameters() if parameter.dim() == 2}
        kept = {key for key, size in sizes.items() if size}
        outputs = {
            f"{output}{suffix}.weight" for output in architecture.attention.output for suffix in ("", "_of_all_heads")
        }
        assert kept <= {"constant_value.weight", *outputs}, layer


@pytest.mark.parametrize("name", ["eurobert", "llama", "qwen3"])
def test_keys_and_values_stay_as_long_as_one_head_of_the_group_reads_them(name):
    own = converted(stock(name), name, SOME)
    kept = [attention.k_proj.out_features // 8 for attention in self_attentions(own, hf_adaptive.ARCHITECTURES[name])]
    assert kept == [1, 2, 2, 0]


@torch.no_grad()
def test_copied_and_pickled_models_are_the_same(name):
    own, inputs = converted(stock(name), name, SOME, constants()), batch(name)
    states = run(own, name, inputs).last_hidden_state
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(run(twin, name, inputs).last_hidden_state, states)
        assert twin.config is not own.config
        twin.set_attn_implementation("eager")
        for attention in self_attentions(twin, hf_adaptive.ARCHITECTURES[name]):
            attention.register_parameter("constants", None)
    assert torch.equal(run(own, name, inputs).last_hidden_state, states)
