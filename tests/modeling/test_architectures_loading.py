"""What holds of every architecture where checkpoints, configurations, training and pipelines are concerned."""

import json
import re
import shutil
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutput

import hf_adaptive
from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from tests import fresh_process, tiny
from tests.modeling import architectures
from tests.without_package import answers

EXITS = architectures.EXIT_LAYERS
INPUTS = tiny.batch()
PROBLEMS = [
    (1, "regression"),
    (2, "regression"),
    (7, "regression"),
    (2, "single_label_classification"),
    (7, "single_label_classification"),
    (1, "multi_label_classification"),
    (2, "multi_label_classification"),
    (7, "multi_label_classification"),
]
# Stock checkpoints are read by what is particular to an architecture; those with exits in the same way for all.
STOCK_AND_SOME_OWN = [
    *((name, "classifier") for name in architectures.NAMES),
    *((name, "exits") for name in ("bert", "albert", "nomic_bert")),
]


@pytest.fixture(params=architectures.NAMES)
def name(request):
    """Every architecture in turn."""
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by architecture and kind: `classifier`, `backbone` (both stock), `exits`."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {
        "classifier": architectures.stock,
        "backbone": lambda name: architectures.stock(name, "Model"),
        "exits": architectures.model,
    }

    def folder(name, kind):
        path = root / name / kind
        if not path.exists():
            made[kind](name).save_pretrained(path)
        return path

    return folder


def changed_copy(source, target, change):
    """A copy of a checkpoint with other weights."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_all_finite(model):
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), key


def assert_same_state(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], tensor), key
    for (key, tensor), (_, expected) in zip(one.named_buffers(), other.named_buffers()):
        assert torch.equal(tensor, expected), key


# Loading stock checkpoints


def test_every_weight_of_a_stock_checkpoint_is_used(name, folders):
    model, info = WithExits.from_pretrained(folders(name, "classifier"), exit_layers=EXITS, output_loading_info=True)
    assert not any(info.values())
    own, head = model.state_dict(), hf_adaptive.ARCHITECTURES[name].head
    for key, tensor in architectures.stock(name).state_dict().items():
        part = next((part for part, path in head.sources.items() if key.startswith(f"{path}.")), None)
        kept = [key] if part is None else [f"exits.{index}.{part}.{key.rsplit('.')[-1]}" for index in range(3)]
        assert all(torch.equal(own[other], tensor) for other in kept), key
    with torch.no_grad():
        expected = architectures.stock(name)(**INPUTS).logits
        torch.testing.assert_close(model(**INPUTS).logits, expected, atol=2e-6, rtol=1e-5)


def test_new_heads_are_reported_finite_and_follow_the_seed(name, folders):
    folder, made = folders(name, "backbone"), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model, info = WithExits.from_pretrained(folder, output_loading_info=True)
        made.append(model)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"exits"}
    assert {f"exits.{index}.classifier.weight" for index in range(4)} <= set(info["missing_keys"])
    assert_all_finite(model)
    assert_same_state(made[0], made[1])
    weights = [model.exits[0].classifier.weight for model in made]
    assert not torch.equal(weights[0], weights[2])
    # A copy of a norm is no new weight: it starts as the backbone's.
    assert not [key for key in info["missing_keys"] if "final_norm" in key]


def test_earlier_exits_start_with_a_copy_of_the_final_norm(name, folders):
    model = WithExits.from_pretrained(folders(name, "classifier"), exit_layers=EXITS)
    path = hf_adaptive.ARCHITECTURES[name].final_norm
    assert model.exits[-1].final_norm is None
    for own in (exit.final_norm for exit in model.exits[:-1]):
        assert (own is None) == (path is None)
        if own is not None:
            norm = model.base_model.get_submodule(path)
            assert torch.equal(own.weight, norm.weight)
            assert own.weight is not norm.weight


def test_a_new_model_is_finite_and_follows_the_seed(name):
    made = [architectures.model(name, exit_criterion="learned") for _ in range(2)]
    assert_all_finite(made[0])
    assert_same_state(*made)


@pytest.mark.parametrize(("name", "kind"), STOCK_AND_SOME_OWN)
def test_missing_weights_are_reported_and_filled(name, kind, folders, tmp_path):
    stored = load_file(folders(name, kind) / "model.safetensors")
    key = max(key for key in stored if re.search(r"\.3\.|albert_layer_groups", key))
    folder = changed_copy(folders(name, kind), tmp_path / "checkpoint", lambda tensors: tensors.pop(key))
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        model, info = WithExits.from_pretrained(folder, output_loading_info=True)
        made.append(model)
    # NomicBert's files have names of their own.
    layers = f"{model.base_model_prefix}.{hf_adaptive.ARCHITECTURES[name].layers}."
    assert info["missing_keys"]
    assert all(key.startswith(layers) for key in info["missing_keys"])
    assert_all_finite(model)
    assert_same_state(*made)


def test_surplus_weights_are_reported(name, folders, tmp_path):
    def add(tensors):
        tensors[f"{architectures.model(name).base_model_prefix}.surplus.weight"] = torch.ones(2)

    for kind in ("classifier", "exits"):
        folder = changed_copy(folders(name, kind), tmp_path / kind, add)
        _, info = WithExits.from_pretrained(folder, output_loading_info=True)
        assert [key for key in info["unexpected_keys"] if key.endswith("surplus.weight")], kind


def test_missing_and_surplus_exits_are_refused(name, folders, tmp_path):
    lost = changed_copy(folders(name, "exits"), tmp_path / "a", lambda own: own.pop("exits.1.classifier.weight"))
    with pytest.raises(ValueError, match=r"missing \['exits.1.classifier.weight'\]"):
        WithExits.from_pretrained(lost)


# Saving, loading, types


def test_saved_and_loaded_bit_for_bit(name, folders):
    model = architectures.model(name)
    for loaded in (
        WithExits.from_pretrained(folders(name, "exits")),
        AutoModelForSequenceClassification.from_pretrained(folders(name, "exits")),
    ):
        assert type(loaded) is type(model)
        assert_same_state(loaded, model)
        with torch.no_grad():
            tiny.assert_alike(loaded(**INPUTS).exit_logits, model(**INPUTS).exit_logits)
    backbone = AutoModel.from_pretrained(folders(name, "exits"))
    with torch.no_grad():
        tiny.assert_alike(
            backbone(**INPUTS).last_hidden_state, model.base_model(**INPUTS, use_cache=False).last_hidden_state
        )


def test_configuration_round_trip(name, tmp_path):
    plain = architectures.stock(name).config
    own = type(architectures.config(name)).from_plain(plain, exit_layers=[2, 4], exit_thresholds=[None])
    assert own.to_plain().to_dict() == plain.to_dict()
    own.save_pretrained(tmp_path)
    for loaded in (type(own).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is type(own)
        assert {**loaded.to_dict(), "_name_or_path": ""} == own.to_dict()
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(("name", "kind"), STOCK_AND_SOME_OWN)
def test_half_precision(name, kind, folders):
    model = WithExits.from_pretrained(folders(name, kind), exit_layers=EXITS, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = WithExits.from_pretrained(folders(name, kind), exit_layers=EXITS)
    with torch.no_grad():
        logits, expected = model(**INPUTS).exit_logits, exact(**INPUTS).exit_logits
        early = model(**INPUTS, exit_thresholds=tiny.thresholds_between(model, INPUTS))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.1)
    assert early.logits.isfinite().all()


def test_new_tokens(name, tmp_path):
    model = architectures.model(name)
    with torch.no_grad():
        expected = model(**INPUTS).exit_logits
        model.resize_token_embeddings(architectures.VOCABULARY + 5)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == architectures.VOCABULARY + 5
        assert torch.equal(model(**INPUTS).exit_logits, expected)
        model.save_pretrained(tmp_path)
        more = {**INPUTS, "input_ids": INPUTS["input_ids"].clone()}
        more["input_ids"][0, 1] = architectures.VOCABULARY + 4
        loaded = WithExits.from_pretrained(tmp_path)
        tiny.assert_alike(loaded(**more).exit_logits, model(**more).exit_logits)
        model.set_input_embeddings(nn.Embedding(9, model.get_input_embeddings().embedding_dim))
    assert len(model.get_input_embeddings().weight) == 9


# Training


def labels_for(count, problem):
    generator = torch.Generator().manual_seed(0)
    if problem == "single_label_classification":
        return torch.randint(0, count, (6,), generator=generator)
    values = torch.rand(6, count, generator=generator)
    return values.squeeze(-1) if problem == "regression" else values.round()


def plain_loss(logits, labels, problem):
    """The definition, for one exit."""
    if problem == "regression":
        return nn.functional.mse_loss(logits.squeeze(), labels)
    if problem == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def test_labels_and_problem_types(name):
    for count, problem in PROBLEMS:
        model = architectures.model(name, num_labels=count, problem_type=problem).train()
        labels = labels_for(count, problem)
        outputs = model(**INPUTS, labels=labels)
        assert outputs.exit_logits.shape == (6, 3, count)
        expected = sum(plain_loss(outputs.exit_logits[:, index], labels, problem) for index in range(3))
        torch.testing.assert_close(outputs.loss, expected)
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.exits.parameters())


@pytest.mark.parametrize(
    ("name", "routing"), [*((name, "sweet") for name in architectures.NAMES), ("bert", "joint"), ("albert", "joint")]
)
def test_training_lowers_the_loss_at_every_exit(name, routing):
    model = architectures.model(name, exit_routing=routing, initializer_range=0.05).train()
    labels = tiny.labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(12):
        outputs = model(**INPUTS, labels=labels)
        losses.append([nn.functional.cross_entropy(outputs.exit_logits[:, exit], labels).item() for exit in range(3)])
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert all(after < before for before, after in zip(losses[0], losses[-1])), losses


# Use


def test_tuple_instead_of_a_dictionary(name):
    model = architectures.model(name)
    flags = {"output_hidden_states": True, "labels": tiny.labels()}
    with torch.no_grad():
        outputs, values = model(**INPUTS, **flags), model(**INPUTS, **flags, return_dict=False)
        model.config.return_dict = False
        configured = model(**INPUTS, **flags)
    assert isinstance(values, tuple)
    for own, other, expected in zip(values, configured, outputs.to_tuple()):
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(other, expected)


def test_outputs_asked_for_in_the_configuration(name):
    model = architectures.model(name)
    with torch.no_grad():
        assert model(**INPUTS).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(**INPUTS).hidden_states) == architectures.LAYERS + 1


def test_pipeline_answers_as_the_model(name):
    model = architectures.model(name)
    tokenizer, texts = tiny.tokenizer(), tiny.sentences(7)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    found = classify(texts, batch_size=3, top_k=None)
    for text, scores in zip(texts, found):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(dim=-1)
        own = {score["label"]: score["score"] for score in scores}
        torch.testing.assert_close(torch.tensor([own[f"LABEL_{index}"] for index in range(3)]), expected)


# Without the package


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What one process without the package says of a checkpoint of every architecture, its exits with branches.

    Folders of one name have one copy of the code there, which is imported once.
    """
    root = tmp_path_factory.mktemp("elsewhere")
    checkpoints, models = {}, {}
    for name in architectures.NAMES:
        models[name] = architectures.model(name, exit_branch_layers=1)
        folder = root / name / "checkpoint"
        models[name].save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        thresholds = tiny.thresholds_between(models[name], INPUTS)
        checkpoints[name] = {"path": str(folder), "thresholds": thresholds, "save_to": None}
    found = fresh_process.answers_without_package(root / "job", checkpoints, INPUTS, [], HF_HUB_OFFLINE="1")
    return models, checkpoints, found


def test_the_same_answers_where_the_package_is_not_installed(name, elsewhere):
    models, checkpoints, found = elsewhere
    result, tensors = found[name]
    for key, expected in answers(models[name], INPUTS, checkpoints[name]["thresholds"]).items():
        # Not bit by bit: some kernels add in another order where weights lie at another address.
        torch.testing.assert_close(tensors[key], expected, atol=2e-6, rtol=1e-5, equal_nan=True, msg=key)
    assert len(tensors["early/exit_index"].unique()) > 1
    assert all(path.startswith("transformers_modules.") for path in result["classes"].values())


# The registry


def test_the_table_in_the_readme_is_that_of_the_registry():
    for page, section in architectures.sections().items():
        assert section in page.read_text(), "run: python -m tests.modeling.architectures"


def test_every_name_is_the_one_in_checkpoints():
    assert all(name == architecture.model_type for name, architecture in hf_adaptive.ARCHITECTURES.items())


@pytest.mark.parametrize(
    ("name", "chosen", "pooling"),
    [
        ("modernbert", "cls", "cls"),
        ("modernbert", "mean", "mean"),
        ("eurobert", "bos", "cls"),
        ("eurobert", "mean", "mean"),
        ("eurobert", "late", "late"),
    ],
)
def test_pooling_of_the_stock_classifier_is_kept(name, chosen, pooling, tmp_path):
    stock = architectures.stock(name, classifier_pooling=chosen)
    stock.save_pretrained(tmp_path)
    model = WithExits.from_pretrained(tmp_path)
    assert model.config.exit_pooling == pooling
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, stock(**INPUTS).logits, atol=2e-6, rtol=1e-5)


# A backbone from outside transformers


class MixerConfig(PreTrainedConfig):
    model_type = "mixer"
    vocab_size: int = 64
    hidden_size: int = 16
    num_hidden_layers: int = 3
    pad_token_id: int | None = 1


class MixerPreTrainedModel(PreTrainedModel):
    config_class = MixerConfig
    base_model_prefix = "mixer"


class MixerLayer(nn.Module):
    """Mixes each real token with the mean of all."""

    def __init__(self, config):
        super().__init__()
        self.own = nn.Linear(config.hidden_size, config.hidden_size)
        self.all = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, mask):
        mean = (hidden * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return hidden + torch.tanh(self.own(hidden) + self.all(mean))


class MixerModel(MixerPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MixerLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, return_dict=True):
        hidden = self.words(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for block in self.blocks:
            hidden = block(hidden, mask.unsqueeze(-1))
        return BaseModelOutput(last_hidden_state=hidden)


class MixerForSequenceClassification(MixerPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.mixer = MixerModel(config)
        self.out = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        return self.out(self.mixer(input_ids, attention_mask).last_hidden_state[:, 0])


@pytest.fixture
def register_mixer():
    """Registers it as a user would, for one test."""
    AutoConfig.register("mixer", MixerConfig, exist_ok=True)

    def register(head, source):
        hf_adaptive.register_architecture(hf_adaptive.Architecture("Mixer", "blocks", head, source=source))

    yield register
    del hf_adaptive.ARCHITECTURES["mixer"]


@pytest.fixture
def mixer(register_mixer):
    """The registered architecture's plain classifier."""
    register_mixer(hf_adaptive.Head("out"), sys.modules[__name__])
    return MixerForSequenceClassification(MixerConfig(num_labels=3)).eval()


def test_a_backbone_from_outside_transformers_is_one_entry(mixer, tmp_path):
    mixer.save_pretrained(tmp_path / "plain")
    model = WithExits.from_pretrained(tmp_path / "plain", exit_layers=[1, 3])
    with torch.no_grad():
        tiny.assert_alike(model(**INPUTS).logits, mixer(**INPUTS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(**INPUTS, labels=tiny.labels()).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "exits")
    assert not list((tmp_path / "exits").glob("*.py"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits")
    thresholds = tiny.thresholds_between(model, INPUTS)
    with torch.no_grad():
        early = loaded(**INPUTS, exit_thresholds=thresholds)
        assert len(early.exit_index.unique()) == 2
        for index in range(6):
            alone = loaded(**tiny.row(INPUTS, index), exit_thresholds=thresholds)
            assert alone.exit_index.item() == early.exit_index[index]
            torch.testing.assert_close(alone.logits[0], early.logits[index])


@pytest.mark.parametrize("kind", [MixerModel, MixerForSequenceClassification])
def test_a_backbone_without_a_classifier_of_its_own(kind, register_mixer, tmp_path):
    source = ModuleType("user_code")
    source.MixerConfig, source.MixerModel = MixerConfig, MixerModel
    register_mixer(hf_adaptive.Head(), source)
    plain = kind(MixerConfig()).eval()
    plain.save_pretrained(tmp_path)
    model, info = WithExits.from_pretrained(tmp_path, exit_layers=[1, 3], output_loading_info=True)
    assert info["missing_keys"] == {f"exits.{key}" for key in model.exits.state_dict()}
    assert_all_finite(model)
    with torch.no_grad():
        tiny.assert_alike(model.base_model(**INPUTS).last_hidden_state, plain.base_model(**INPUTS).last_hidden_state)
        assert model(**INPUTS).exit_logits.shape == (6, 2, 2)


def test_a_second_registration_goes_before_the_first(mixer, register_mixer):
    first = hf_adaptive.make_class("MixerForSequenceClassificationWithExits")
    register_mixer(hf_adaptive.Head(dense="inner"), sys.modules[__name__])
    second = hf_adaptive.make_class("MixerForSequenceClassificationWithExits")
    assert first is not second
    model = WithExits.from_config(second.config_class(exit_layers=[1, 3]))
    assert type(model) is second
    assert model.exits[0].dense is not None


def test_classes_are_made_once():
    for architecture in hf_adaptive.ARCHITECTURES.values():
        for name in (architecture.config_name, architecture.backbone_name, architecture.classifier_name):
            assert hf_adaptive.make_class(name) is hf_adaptive.make_class(name)


def test_a_classifier_that_does_not_say_where_its_backbone_is(monkeypatch):
    monkeypatch.setattr(MixerPreTrainedModel, "base_model_prefix", "")
    with pytest.raises(ValueError, match=r"MixerPreTrainedModel\.base_model_prefix is empty; set it to"):
        hf_adaptive.register_architecture(
            hf_adaptive.Architecture("Mixer", "blocks", hf_adaptive.Head("out"), source=sys.modules[__name__])
        )


# Bad input


@pytest.mark.parametrize("model_type", ["t5", "bart", "mbart"])
def test_encoder_decoders_are_refused_with_a_way_out(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=rf"model_type='{model_type}' cannot .* encoder–decoder.*one of the others"):
        WithExits.from_pretrained(tmp_path)


def test_an_unsupported_architecture_lists_those_that_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlnet"}))
    with pytest.raises(ValueError, match="model_type='xlnet' cannot have exits") as error:
        WithExits.from_pretrained(tmp_path)
    assert all(name in str(error.value) for name in architectures.NAMES)
    assert "register_architecture" in str(error.value)


@pytest.mark.parametrize("name", architectures.DECODERS)
def test_a_batch_for_a_decoder_without_a_pad_token(name):
    ids = {"input_ids": torch.full((2, 3), 5)}
    own, stock = architectures.model(name, pad_token_id=None), architectures.stock(name, pad_token_id=None)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1 if no padding token is defined"):
        stock(**ids)
    with pytest.raises(
        ValueError, match=r"Cannot handle batch sizes > 1 if no padding token is defined.*pad_token_id"
    ):
        own(**ids)
    assert own(input_ids=ids["input_ids"][:1]).logits.shape == (1, 3)


def test_a_checkpoint_of_another_architecture(name, folders):
    other = "bert" if name != "bert" else "llama"
    own_class = hf_adaptive.make_class(hf_adaptive.ARCHITECTURES[name].classifier_name)
    with pytest.raises(ValueError, match=rf"model_type='{other}'; {own_class.__name__} loads '{name}'"):
        own_class.from_pretrained(folders(other, "classifier"))
