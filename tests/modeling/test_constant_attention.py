"""The mechanism of constant heads: masks, precision, what is computed and what is not."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import hf_adaptive
from hf_adaptive.modeling.constant_attention import constant_context, constant_probabilities
from hf_adaptive.modeling.constant_heads import install_constant_heads
from hf_adaptive.modeling.head_choice import select_heads
from tests import golden_papa as golden

HEADS = [[0, 0], [0, 3], [2, 1], [3, 0], [3, 1], [3, 2], [3, 3]]


def backbone(family, *, heads=HEADS, dropout=0.0, attn_implementation="eager", seed=0, device="cpu"):
    """A tiny backbone with random weights and random constants, in eval mode."""
    torch.manual_seed(seed)
    fields = {**golden.results(family)["config"], "attention_probs_dropout_prob": dropout}
    config = transformers.AutoConfig.for_model(family, **fields, attn_implementation=attn_implementation)
    with torch.device(device):
        model = golden.stock_class_of(family, "Model")(config, **hf_adaptive.ARCHITECTURES[family].model_arguments)
    config.constant_heads, config.constant_length = heads, golden.LENGTH
    constants = torch.rand(6, 4, golden.LENGTH, golden.LENGTH) if device == "cpu" else None
    install_constant_heads(model, hf_adaptive.ARCHITECTURES[family], config, constants)
    return model.eval()


def inputs(rows=3, length=golden.LENGTH, seed=0):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


masks = st.lists(
    st.lists(st.booleans(), min_size=9, max_size=9).map(lambda row: [True, *row]), min_size=1, max_size=4
).map(torch.tensor)


@given(real=masks, seed=st.integers(0, 100))
def test_context_is_the_masked_and_renormalised_constant_times_the_values(real, seed):
    generator = torch.Generator().manual_seed(seed)
    constants = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    constants[0, 4] = 0
    value = torch.randn(*real.shape, 3, 5, generator=generator, dtype=torch.float64)

    pairs = real.double()[:, None, :, None] * real.double()[:, None, None, :]
    matrices = torch.nn.functional.normalize(constants[None, :, :10, :10] * pairs, p=1, dim=-1, eps=1e-12)
    expected = torch.einsum("bhqk,bkhd->bqhd", matrices, value)
    torch.testing.assert_close(constant_context(constants, value, real), expected)
    torch.testing.assert_close(constant_probabilities(constants, 10, real), matrices)


@given(real=masks, seed=st.integers(0, 100))
def test_a_row_does_not_depend_on_the_others_nor_on_what_padding_holds(real, seed):
    generator = torch.Generator().manual_seed(seed)
    constants = torch.rand(2, 10, 10, generator=generator)
    value = torch.randn(*real.shape, 2, 4, generator=generator)
    together = constant_context(constants, value, real)
    assert (together[~real] == 0).all()
    changed = value.masked_fill(~real[:, :, None, None], 1e6)
    for row in range(len(real)):
        alone = constant_context(constants, changed[row : row + 1], real[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(golden.FAMILIES),
    attn_implementation=st.sampled_from(["eager", "sdpa"]),
    real=masks,
    seed=st.integers(0, 20),
)
def test_a_padded_batch_equals_its_rows_alone(family, attn_implementation, real, seed):
    if family == "deberta":
        attn_implementation = "eager"
    model = backbone(family, attn_implementation=attn_implementation)
    ids, mask = inputs(*real.shape, seed=seed), real.long()
    together = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row in range(len(real)):
        alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).last_hidden_state[0]
        torch.testing.assert_close(alone[real[row]], together[row][real[row]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_no_mask_equals_a_mask_of_ones_and_a_shorter_input_its_padded_form(family):
    model, ids = backbone(family), inputs(length=9)
    states = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    padded = torch.nn.functional.pad(ids, (0, 5), value=model.config.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    wide = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :9]
    torch.testing.assert_close(states, wide, atol=1e-4, rtol=1e-4)


def mask_forms(layout, real):
    """Every form in which transformers hands the padding vector `real` to a layer."""
    square = real[:, None, :, None] & real[:, None, None, :]
    if not layout.has_additive_mask:
        return [square.long(), square.float(), square]
    keys = real[:, None, None, :]
    wide = keys.expand(-1, -1, real.shape[1], -1)
    additive = torch.zeros(wide.shape).masked_fill(~wide, torch.finfo(torch.float32).min)
    return [wide, keys, additive, additive[:, :, :1], real.long(), real]


@given(real=masks)
def test_padding_is_read_from_every_form_of_mask(real):
    for name in ("bert", "deberta"):
        layout = hf_adaptive.ARCHITECTURES[name].attention
        for mask in mask_forms(layout, real):
            assert torch.equal(layout.real_positions(mask), real)
        assert layout.real_positions(None) is None


def test_an_unreadable_mask_is_an_error():
    layout = hf_adaptive.ARCHITECTURES["bert"].attention
    with pytest.raises(ValueError, match=r"mask of type object.*attn_implementation"):
        layout.real_positions(object())


class RecordsShapes(TorchDispatchMode):
    """Shapes of all tensors made while it is active."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.shapes |= {tuple(tensor.shape) for tensor in tensors if isinstance(tensor, torch.Tensor)}
        return result


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_no_matrix_is_made_for_each_input(family):
    """Neither scores of constant heads nor copies of the constants: nothing that grows with batch × length²."""
    every_head = [[layer, head] for layer in range(6) for head in range(4)]
    model, ids = backbone(family, heads=every_head), inputs(rows=5, length=13)
    mask = torch.ones_like(ids)
    mask[2, 7:] = 0
    per_input = {(5, 4, 13, 13), (5 * 4, 13, 13)}
    with torch.no_grad():
        with RecordsShapes() as recorded:
            model(input_ids=ids, attention_mask=mask)
        assert not recorded.shapes & per_input
        with RecordsShapes() as recorded:
            model(input_ids=ids, attention_mask=mask, output_attentions=True)
        assert recorded.shapes & per_input


@settings(max_examples=40)
@given(
    real=masks,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_without_a_gradient_the_context_is_the_same(real, dtype, seed):
    """The one pass over the memory that is made where no gradient is needed."""
    generator = torch.Generator().manual_seed(seed)
    constants = torch.rand(3, 16, 16, generator=generator).to(dtype)
    value = torch.randn(*real.shape, 3, 5, generator=generator).to(dtype)
    for mask in (real, None):
        expected = constant_context(constants, value, mask)
        with torch.no_grad():
            own = constant_context(constants, value, mask)
        assert own.dtype == dtype
        assert own.is_contiguous()
        torch.testing.assert_close(own, expected, atol=1e-6 if dtype is torch.float32 else 2e-2, rtol=1e-5)


@settings(max_examples=20)
@given(
    family=st.sampled_from(golden.FAMILIES),
    heads=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1),
    real=masks,
)
def test_without_a_gradient_any_choice_of_heads_gives_the_same(family, heads, real):
    """Heads are then written into place, in runs of even distance."""
    model = backbone(family, heads=[list(pair) for pair in heads])
    ids = inputs(*real.shape)
    expected = model(input_ids=ids, attention_mask=real.long())
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=real.long())
        with_attentions = model(input_ids=ids, attention_mask=real.long(), output_attentions=True)
    torch.testing.assert_close(own.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    attentions = model(input_ids=ids, attention_mask=real.long(), output_attentions=True).attentions
    torch.testing.assert_close(with_attentions.attentions, attentions, atol=1e-5, rtol=1e-4)


def test_under_autocast_the_same_without_a_gradient():
    model, ids = backbone("bert"), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).last_hidden_state
        with torch.no_grad():
            own = model(input_ids=ids).last_hidden_state
    assert own.dtype == expected.dtype
    torch.testing.assert_close(own, expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_a_compiled_layer_is_one_graph(family):
    model, ids = backbone(family), inputs()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for layer in model.encoder.layer:
            layer.compile(backend="eager", fullgraph=True)
        compiled = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.compiler.reset()
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_dropout_acts_on_constants_in_training_only(family):
    every_head = [[layer, head] for layer in range(6) for head in range(4)]
    model, ids = backbone(family, heads=every_head, dropout=0.5), inputs()
    assert torch.equal(model(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
    model.train()
    first, second = (model(input_ids=ids).last_hidden_state for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_where_a_row_attends_to_nothing(family, dtype):
    model = backbone(family).to(dtype)
    with torch.no_grad():
        model.encoder.layer[3].attention.self.constants[:, 2] = 0
    mask = torch.ones(3, golden.LENGTH, dtype=torch.long)
    mask[0, 5:] = 0
    states = model(input_ids=inputs(), attention_mask=mask).last_hidden_state
    assert states.isfinite().all()
    reference = copy.deepcopy(model).float()(input_ids=inputs(), attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(states[real].float(), reference[real], atol=0.2, rtol=0.1)


def test_unseen_positions_get_no_context_and_no_gradient():
    constants = torch.rand(1, 4, 4)
    constants[0, 2], constants[0, :, 2] = 0, 0
    constants.requires_grad_()
    value = torch.randn(2, 4, 1, 3)
    context = constant_context(constants, value, None)
    context.sum().backward()
    assert (context[:, 2] == 0).all()
    assert constants.grad.isfinite().all()
    assert (constants.grad[0, 2] == 0).all()


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_installs_on_the_meta_device(family):
    shapes = {name: weight.shape for name, weight in backbone(family).state_dict().items()}
    on_meta = backbone(family, device="meta").state_dict()
    assert {name: weight.shape for name, weight in on_meta.items()} == shapes
    assert {weight.device.type for weight in on_meta.values()} == {"meta"}


def test_installing_twice_is_an_error():
    model = backbone("bert")
    with pytest.raises(ValueError, match="constant heads already"):
        install_constant_heads(model, hf_adaptive.ARCHITECTURES["bert"], model.config)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_copy_is_a_model_of_its_own(family):
    model = backbone(family)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.layer[3].attention.self.constants.fill_(1)
    assert not torch.equal(model(input_ids=inputs())[0], twin(input_ids=inputs())[0])


@given(fraction=st.floats(0, 1), layers=st.integers(1, 5), heads=st.integers(1, 5), data=st.data())
def test_a_fraction_selects_the_first_whole_heads(fraction, layers, heads, data):
    every_head = [[layer, head] for layer in range(layers) for head in range(heads)]
    ranking = data.draw(st.permutations(every_head))
    selected = select_heads(fraction, layers, heads, ranking)
    assert selected == sorted(ranking[: int(fraction * len(ranking))])


@pytest.mark.parametrize(
    ("fields", "message"), [({"is_decoder": True}, "bidirectional attention"), ({"add_cross_attention": False}, None)]
)
def test_a_decoder_is_refused(fields, message):
    config = hf_adaptive.PapaBertConfig(
        **golden.results("bert")["config"], **fields, constant_heads=[[0, 0]], constant_length=4
    )
    if message is None:
        hf_adaptive.PapaBertForMaskedLM(config)
        return
    with pytest.raises(ValueError, match=message):
        hf_adaptive.PapaBertForSequenceClassification(config)
