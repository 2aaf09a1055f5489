"""SWEET's gradients, computed segment by segment, are those of the ordinary way, and hold less memory."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard

from tests import tiny
from tests.modeling import architectures
from tests.modeling.test_losses import CASES

ROWS = 6


def gradients(model, labels, inputs=None, after=lambda loss: loss, **arguments):
    """Gradients of the loss, and the outputs; dropout is drawn from the same seed each time."""
    model.train().zero_grad()
    torch.manual_seed(7)
    outputs = model(**(inputs or tiny.batch(ROWS)), labels=labels, **arguments)
    after(outputs.loss).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}, outputs


def both_ways(model, labels, **arguments):
    found = []
    for is_local in (True, False):
        model.config.exit_local_gradients = is_local
        found.append(gradients(model, labels, **arguments))
    return found


def assert_alike(model, labels, atol=1e-6, **arguments):
    (own, outputs), (expected, ordinary) = both_ways(model, labels, **arguments)
    assert "HandOver" in str(outputs.loss.grad_fn), "the gradients were not local"
    assert "HandOver" not in str(ordinary.loss.grad_fn)
    assert torch.equal(outputs.exit_logits, ordinary.exit_logits)
    torch.testing.assert_close(outputs.loss, ordinary.loss)
    assert own.keys() == expected.keys()
    assert any(gradient.any() for gradient in own.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(own[key], gradient, atol=atol, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_equal_for_every_architecture(name):
    assert_alike(architectures.model(name, exit_routing="sweet"), tiny.labels(ROWS))


@pytest.mark.parametrize("weights", [None, [0.25, 0.0, 3.0]])
@pytest.mark.parametrize("case", CASES)
def test_equal_for_every_kind_of_problem(case, weights):
    fields, make_labels, _ = CASES[case]
    assert_alike(tiny.model(exit_loss_weights=weights, **fields), make_labels())


def test_equal_with_learned_units(name):
    assert_alike(tiny.model(name, exit_criterion="learned"), tiny.labels(ROWS))


@settings(max_examples=25)
@given(
    name=st.sampled_from(tiny.ARCHITECTURES),
    inner=st.sets(st.integers(1, tiny.LAYERS - 1)),
    rows=st.integers(1, 9),
    length=st.integers(2, 20),
    pooling=st.sampled_from(["cls", "mean", "last", "late"]),
    factor=st.floats(1e-3, 1e5),
    seed=st.integers(0, 5),
)
def test_equal_for_random_exits_and_batches_with_dropout(name, inner, rows, length, pooling, factor, seed):
    """A number times the loss, as a loss scaler or accumulation makes it, gives that number times the gradients."""
    model = tiny.model(name, exit_layers=[*sorted(inner), tiny.LAYERS], exit_pooling=pooling)
    (own, _), (expected, _) = both_ways(
        model, tiny.labels(rows, seed), inputs=tiny.batch(rows, length, seed), after=lambda loss: loss * factor
    )
    for key, gradient in expected.items():
        torch.testing.assert_close(own[key] / factor, gradient / factor, atol=1e-6, rtol=1e-4, msg=key)


def test_gradients_of_several_batches_add_up():
    model, labels = tiny.without_dropout().train(), tiny.labels(ROWS)
    each = [gradients(model, labels, tiny.batch(ROWS, seed=seed))[0] for seed in (0, 1)]
    model.zero_grad()
    for seed in (0, 1):
        model(**tiny.batch(ROWS, seed=seed), labels=labels).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, each[0][key] + each[1][key])


@pytest.mark.parametrize("frozen", ["embeddings", "layer.0", "exits.0", "bert"])
def test_equal_where_a_part_is_frozen(frozen):
    model = tiny.model()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in key)
    assert_alike(model, tiny.labels(ROWS))


def test_nothing_to_train_is_no_error():
    model = tiny.model().train().requires_grad_(False)
    assert not model(**tiny.batch(ROWS), labels=tiny.labels(ROWS)).loss.requires_grad


# Mixed precision


def test_bfloat16_autocast_gives_float32_gradients():
    model = tiny.without_dropout()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (own, _), (expected, _) = both_ways(model, tiny.labels(ROWS))
    for key, gradient in expected.items():
        assert own[key].dtype == torch.float32
        torch.testing.assert_close(own[key], gradient, atol=2e-2, rtol=5e-2, msg=key)


def relative_error(own, expected):
    distance = sum((own[key] - gradient).square().sum() for key, gradient in expected.items())
    return (distance / sum(gradient.square().sum() for gradient in expected.values())).sqrt().item()


def float16_gradients(model, labels, scale):
    """As a training loop with a loss scaler of this scale gets them, after it has taken the scale off again."""
    with torch.autocast("cpu", dtype=torch.float16):
        found, _ = gradients(model, labels, after=lambda loss: loss * scale)
    return {key: gradient / scale for key, gradient in found.items()}


@settings(max_examples=20)
@given(exponent=st.integers(-7, 4))
def test_float16_gradients_are_right_whatever_the_size_of_the_loss(exponent):
    """A loss scaler outside cannot help with these: neither may small ones vanish nor large ones overflow."""
    weight = 10.0**exponent
    model = tiny.without_dropout(exit_loss_weights=[weight] * 3)
    expected, _ = gradients(model, tiny.labels(ROWS))
    assert relative_error(float16_gradients(model, tiny.labels(ROWS), 1.0), expected) < 0.02


def test_float16_loses_such_gradients_the_ordinary_way():
    """What the test above would not notice if float16 held them anyway."""
    model = tiny.without_dropout(exit_loss_weights=[1e-6] * 3, exit_local_gradients=False)
    expected, _ = gradients(model, tiny.labels(ROWS))
    assert relative_error(float16_gradients(model, tiny.labels(ROWS), 1.0), expected) > 0.05


def test_a_loss_scaler_sees_its_scale_and_overflows():
    model, labels = tiny.without_dropout(), tiny.labels(ROWS)
    expected, _ = gradients(model, labels)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=torch.float16):
        gradients(model, labels, after=scaler.scale)
    scaler.unscale_(optimizer)
    own = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert relative_error(own, expected) < 0.02
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        model.exits[1].classifier.bias[0] = torch.nan
    with torch.autocast("cpu", dtype=torch.float16):
        gradients(model, labels, after=scaler.scale)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9


def test_large_numbers_to_regress_in_float16():
    model = tiny.without_dropout(num_labels=1)
    labels = 1e5 * torch.randn(ROWS)
    expected, _ = gradients(model, labels)
    assert relative_error(float16_gradients(model, labels, 1.0), expected) < 0.02


def test_weights_in_float16():
    model = tiny.without_dropout()
    expected, _ = gradients(model, tiny.labels(ROWS))
    own, _ = gradients(model.half(), tiny.labels(ROWS))
    assert {gradient.dtype for gradient in own.values()} == {torch.float16}
    assert relative_error({key: gradient.float() for key, gradient in own.items()}, expected) < 0.05


# Memory


def most_bytes_saved(model):
    """The most that autograd held at one time between forward and backward, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held, most = {}, [0]

    def pack(tensor):
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in weights:
            return tensor
        box = [tensor]
        count, size = held.get(address, (0, storage.nbytes()))
        held[address] = (count + 1, size)
        kept = Box(box)
        weakref.finalize(kept, release, address)
        most[0] = max(most[0], sum(size for _, size in held.values()))
        return kept

    def release(address):
        count, size = held.pop(address)
        if count > 1:
            held[address] = (count - 1, size)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.box[0] if isinstance(kept, Box) else kept):
        model(**tiny.batch(8, 20), labels=tiny.labels(8)).loss.backward()
    assert not held
    return most[0]


class Box:
    """Something that tells when autograd lets go of it."""

    def __init__(self, box):
        self.box = box


@pytest.mark.parametrize(("exit_layers", "share"), [([1, 4, 6, 12], 0.60), ([3, 6, 9, 12], 0.35)])
def test_activations_of_one_segment_are_held_at_a_time(exit_layers, share):
    fields = {"num_hidden_layers": 12, "exit_layers": exit_layers}
    joint = most_bytes_saved(tiny.model(exit_routing="joint", **fields).train())
    local = most_bytes_saved(tiny.model(exit_routing="sweet", **fields).train())
    ordinary = most_bytes_saved(tiny.model(exit_routing="sweet", exit_local_gradients=False, **fields).train())
    assert local <= share * joint
    assert ordinary > 0.9 * joint


# Where it must not be done, and where it shows


@pytest.fixture
def process_group():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of torch: scores that a user changes in place
def test_sharded_parameters_learn_the_ordinary_way(process_group):
    expected = tiny.without_dropout().train()
    expected(**tiny.batch(), labels=tiny.labels()).loss.backward()
    model = tiny.without_dropout().train()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**tiny.batch(), labels=tiny.labels()).loss.backward()
    for (key, own), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(own.grad.full_tensor(), other.grad, atol=1e-6, rtol=1e-5, msg=key)


def test_scores_say_why_they_have_no_gradient():
    model = tiny.model(exit_criterion="learned").train()
    outputs = model(**tiny.batch(ROWS), labels=tiny.labels(ROWS))
    for scores in (outputs.exit_logits, outputs.logits, outputs.exit_certainty):
        with pytest.raises(
            RuntimeError, match=r"call the model without labels, or set .*exit_local_gradients = False"
        ):
            scores.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    outputs.loss.backward()
    with pytest.raises(RuntimeError, match=r"differentiated once only.*exit_local_gradients = False"):
        outputs.loss.backward()


def test_a_loss_of_one_s_own():
    for arguments in ({"labels": None}, {"labels": tiny.labels(ROWS), "output_hidden_states": True}):
        model = tiny.model().train()
        model(**tiny.batch(ROWS), **arguments).exit_logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_that_are_learned_get_their_gradient():
    model = tiny.without_dropout().train()
    batch = tiny.batch(ROWS)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    mask = batch["attention_mask"]
    model(inputs_embeds=embeddings, attention_mask=mask, labels=tiny.labels(ROWS)).loss.backward()
    assert embeddings.grad.any()


def test_hooks_on_gradients_are_called_once():
    model = tiny.without_dropout().train()
    weight = model.get_input_embeddings().weight
    calls = []
    weight.register_hook(lambda gradient: calls.append(gradient) or gradient * 2)
    gradients(model, tiny.labels(ROWS))
    expected, _ = gradients(tiny.without_dropout(), tiny.labels(ROWS))
    assert len(calls) == 1
    torch.testing.assert_close(weight.grad, 2 * expected["bert.embeddings.word_embeddings.weight"])


def test_one_flag_switches_it(tmp_path):
    model = tiny.model(exit_local_gradients=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.exit_local_gradients is False
    loaded.train()(**tiny.batch(ROWS), labels=tiny.labels(ROWS)).exit_logits.sum().backward()
    with pytest.raises(ValueError, match="exit_local_gradients must be one of True, False, got 'no'"):
        tiny.config(exit_local_gradients="no")
