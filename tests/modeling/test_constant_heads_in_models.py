"""Constant heads in models of every architecture: PAPA's, with exits, ranked, compiled, and where no package is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_adaptive
from hf_adaptive.probing import mean_attention
from hf_adaptive.probing.ranking import install_interpolation
from tests import fresh_process, tiny
from tests.modeling import architectures
from tests.modeling.test_constant_heads import (
    CLOSE,
    HEADS,
    LAYERS,
    LENGTH,
    NAMES,
    SOME,
    batch,
    constants,
    converted,
    run,
    stock,
)

TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")


@pytest.fixture(params=NAMES)
def name(request):
    """Every architecture that can have constant heads, in turn."""
    return request.param


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Makes the folder of a plain backbone of an architecture, once."""
    root = tmp_path_factory.mktemp("plain")

    def folder(name):
        if not (root / name).exists():
            stock(name).save_pretrained(root / name)
        return root / name

    return folder


def papa(name, task="ForSequenceClassification", **fields):
    """A PAPA model with random weights."""
    architecture = hf_adaptive.ARCHITECTURES[name]
    torch.manual_seed(0)
    config_class = hf_adaptive.make_class(architecture.papa_config_name)
    values = {**architectures.fields(name), "constant_heads": SOME, "constant_length": LENGTH, **fields}
    return hf_adaptive.make_class(architecture.papa_names[task])(config_class(**values)).eval()


# PAPA models


def test_the_tasks_are_those_that_stock_has(name):
    architecture = hf_adaptive.ARCHITECTURES[name]
    assert tuple(architecture.papa_names) == tuple(
        task for task in TASKS if getattr(architecture.source, architecture.name + task, None) is not None
    )
    assert ("ForMaskedLM" in architecture.papa_names) is (name not in architectures.DECODERS)


# The head of masked words is the architecture's own, that of tokens is alike in all.
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "ForTokenClassification"),
        *((name, "ForSequenceClassification") for name in NAMES),
        *((name, "ForMaskedLM") for name in NAMES if name not in architectures.DECODERS),
    ],
)
def test_a_plain_checkpoint_becomes_a_papa_model_that_is_saved_and_loaded(name, task, plain, tmp_path):
    model_class = hf_adaptive.make_class(hf_adaptive.ARCHITECTURES[name].papa_names[task])
    own = model_class.from_pretrained(plain(name), constants=constants(), constant_heads=SOME)
    states = own(**batch(name), output_hidden_states=True).hidden_states
    expected = run(converted(stock(name), name, SOME, constants()), name, batch(name), output_hidden_states=True)
    real = batch(name)["attention_mask"] == 1
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **CLOSE)
    own.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert again.config.constant_heads == SOME
    torch.testing.assert_close(again(**batch(name)).logits, own(**batch(name)).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [True, False, [0, -1], 2, [-99, 1]])
def test_hidden_states_that_were_asked_for(wanted):
    own = papa("bert")
    given = own(**batch("bert"), output_hidden_states=wanted).hidden_states
    expected = run(own.base_model, "bert", batch("bert"), output_hidden_states=wanted).hidden_states
    assert (given is None) is (expected is None)
    for ours, theirs in zip(given or (), expected or (), strict=True):
        assert theirs is None if ours is None else torch.equal(ours, theirs)


def test_albert_s_layers_are_no_longer_one(plain, tmp_path):
    load = hf_adaptive.PapaAlbertForMaskedLM.from_pretrained
    own = load(plain("albert"), constants=constants(), constant_heads=SOME)
    assert own.config.num_hidden_groups == LAYERS
    assert len(own.albert.encoder.albert_layer_groups) == LAYERS
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_groups"] == LAYERS
    shared = load(plain("albert"), constant_length=LENGTH)
    assert shared.config.num_hidden_groups == len(shared.albert.encoder.albert_layer_groups) == 1
    with pytest.raises(ValueError, match="inner_group_num must be 1"):
        papa("albert", inner_group_num=2)


# Averages and ranking


@torch.no_grad()
def test_averages_are_those_of_the_attentions(name):
    backbone, inputs = stock(name), tiny.batch(6, LENGTH)
    rows = [{key: tensor[index] for key, tensor in inputs.items()} for index in range(6)]
    averages = mean_attention(backbone, rows, LENGTH, batch_size=3).average
    attentions = torch.stack(run(backbone, name, inputs, output_attentions=True).attentions)
    pairs = inputs["attention_mask"][:, :, None] * inputs["attention_mask"][:, None, :]
    expected = (attentions * pairs[None, :, None]).sum(1) / pairs.sum(0).clamp(min=1)
    torch.testing.assert_close(averages, expected, **CLOSE)


@torch.no_grad()
def test_the_ends_of_the_interpolation_are_the_constant_heads(name):
    own = papa(name, constant_heads=[])
    backbone = converted(own.base_model, name, SOME, constants())
    mixed = papa(name, constant_heads=[])
    lambdas = torch.full((LAYERS, HEADS), 100.0)
    for layer, head in SOME:
        lambdas[layer, head] = -100
    for parameter, values in zip(install_interpolation(mixed, constants()), lambdas, strict=True):
        parameter.copy_(values)
    real = batch(name)["attention_mask"] == 1
    states = run(mixed.base_model, name, batch(name)).last_hidden_state
    expected = run(backbone, name, batch(name)).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], **CLOSE)


# With exits


@torch.no_grad()
def test_rows_with_exits_and_constant_heads_leave_alone_as_together(name, plain, tmp_path):
    load = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained
    fields = {"num_labels": 3, "exit_layers": [1, 2, 4], "exit_pooling": "mean"}
    own = load(plain(name), **fields, constants=constants(), constant_heads=SOME).eval()
    own._exits_are_untrained = False
    inputs = tiny.batch(6, LENGTH)
    thresholds = tiny.thresholds_between(own, inputs)
    together = own(**inputs, exit_thresholds=thresholds)
    for index in range(6):
        alone = own(**tiny.row(inputs, index), exit_thresholds=thresholds)
        assert alone.exit_index.item() == together.exit_index[index].item()
        torch.testing.assert_close(alone.logits[0], together.logits[index], **CLOSE)
    own.save_pretrained(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(again(**inputs).exit_logits, own(**inputs).exit_logits, **CLOSE)


def test_an_architecture_without_a_layout_says_so():
    config = architectures.config("gpt2", constant_heads=[[0, 0]], constant_length=4)
    with pytest.raises(ValueError, match="GPT2Model cannot have constant heads"):
        hf_adaptive.AutoModelForSequenceClassificationWithExits.from_config(config)


# Compiled


# Separate projections; relative positions, which are no one graph in stock; one projection, and windows; groups.
@torch.no_grad()
@pytest.mark.parametrize("name", architectures.kinds(NAMES, "bert", "deberta", "modernbert", "gemma2"))
def test_a_compiled_layer_is_one_graph(name):
    # Of the first layer some heads are constant, of the second all.
    heads = [[0, 0], [0, 1], *([1, head] for head in range(HEADS))]
    own = converted(stock(name, **architectures.two_layers(name)), name, heads, constants()[:2])
    inputs = batch(name)
    if own._supports_sdpa:
        own.set_attn_implementation("sdpa")
    expected = run(own, name, inputs).last_hidden_state
    torch.compiler.reset()
    for layer in own.get_submodule(hf_adaptive.ARCHITECTURES[name].layers):
        layer.compile(backend="aot_eager", fullgraph=name != "deberta")
    states = run(own, name, inputs).last_hidden_state
    torch.compiler.reset()
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(states[real], expected[real], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "backend", "layers"),
    [
        ("bert", "aot_eager", 2),
        ("modernbert", "aot_eager", 2),
        # Compiled by C++'s compiler, which takes longest.
        ("modernbert", "inductor", 1),
        pytest.param("bert", "inductor", 2, marks=pytest.mark.slow),
        pytest.param("modernbert", "inductor", 2, marks=pytest.mark.slow),
    ],
)
def test_a_whole_model_is_compiled(name, backend, layers):
    heads = [[layer, 1 - layer] for layer in range(layers)]
    own, inputs = papa(name, num_hidden_layers=layers, layer_types=None, constant_heads=heads), batch(name)
    expected = own(**inputs).logits
    torch.compiler.reset()
    logits = torch.compile(own, backend=backend)(**inputs).logits
    torch.compiler.reset()
    torch.testing.assert_close(logits, expected, **CLOSE)


# Elsewhere

ELSEWHERE = """
import json, pathlib, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
for name in json.loads(sys.argv[2]):
    model = AutoModelForSequenceClassification.from_pretrained(root / name / "papa", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    save_file({"logits": model(**inputs).logits.detach()}, root / f"{name}.safetensors")
"""


def test_the_same_answers_where_the_package_is_not_installed(tmp_path):
    inputs = batch("bert")
    save_file(inputs, tmp_path / "inputs.safetensors")
    models = {name: papa(name) for name in NAMES}
    for name, own in models.items():
        # Folders of one name have one copy of the code there, which is imported once.
        own.save_pretrained(tmp_path / name / "papa")
    fresh_process.run(ELSEWHERE, tmp_path, json.dumps(NAMES), folder=tmp_path, HF_HUB_OFFLINE="1")
    for name, own in models.items():
        logits = load_file(tmp_path / f"{name}.safetensors")["logits"]
        torch.testing.assert_close(logits, own(**inputs).logits, **CLOSE)
