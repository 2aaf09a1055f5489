"""Plain checkpoints get exits, checkpoints with exits come back as they were, broken ones are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import hf_adaptive
from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from tests import tiny

# Parts of the stock head, and of the pretrained pooler that a stock classifier leaves out, as in the state dict.
STOCK_HEAD = {
    "bert": {"dense": "bert.pooler.dense", "classifier": "classifier"},
    "deberta": {"dense": "pooler.dense", "classifier": "classifier"},
    "mpnet": {"dense": "classifier.dense", "classifier": "classifier.out_proj"},
    "roberta": {"dense": "classifier.dense", "classifier": "classifier.out_proj"},
}
PRETRAINED_POOLER = {"bert": "pooler.dense", "mpnet": "pooler.dense", "roberta": "pooler.dense"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by architecture and kind: `classifier`, `backbone`, `masked` (without a pooler), `exits`."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in tiny.ARCHITECTURES:
        tiny.plain_model(name).save_pretrained(root / name / "classifier")
        tiny.plain_model(name, "Model").save_pretrained(root / name / "backbone")
        tiny.plain_model(name, "ForMaskedLM").save_pretrained(root / name / "masked")
        tiny.model(name).save_pretrained(root / name / "exits")
    return lambda name, kind: root / name / kind


def copied(source, target):
    shutil.copytree(source, target)
    return target


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(folder, change):
    """Changes the weights in place."""
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def part(model, index, name):
    return getattr(model.exits[index], name).state_dict()


def assert_backbone_is(model, tensors, prefix):
    state = model.base_model.state_dict()
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    assert state.keys() <= own.keys() | {"embeddings.position_ids"}
    for key in state:
        assert torch.equal(state[key], own[key]), key


def test_fine_tuned_classifier_gives_its_backbone_and_a_head_to_every_exit(name, folders, warnings_given):
    folder = folders(name, "classifier")
    model, info = WithExits.from_pretrained(folder, exit_layers=[1, 3, 4], output_loading_info=True)
    tensors = weights(folder)
    assert_backbone_is(model, tensors, f"{model.base_model_prefix}.")
    for index in range(3):
        for own, stock in STOCK_HEAD[name].items():
            for key, tensor in part(model, index, own).items():
                assert torch.equal(tensor, tensors[f"{stock}.{key}"])
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not [text for text in warnings_given() if "newly initialized" in text]


def test_last_exit_of_a_fine_tuned_classifier_answers_as_the_plain_one(name, folders):
    folder = folders(name, "classifier")
    inputs = tiny.batch()
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(WithExits.from_pretrained(folder)(**inputs).logits, plain(**inputs).logits)


def test_backbone_gives_its_pooler_to_every_exit_and_the_rest_is_reported(name, folders, warnings_given):
    folder = folders(name, "backbone")
    model, info = WithExits.from_pretrained(folder, exit_layers=[2, 4], num_labels=5, output_loading_info=True)
    tensors = weights(folder)
    assert_backbone_is(model, tensors, "")
    new = {"classifier"}
    if name in PRETRAINED_POOLER:
        for index in range(2):
            for key, tensor in part(model, index, "dense").items():
                assert torch.equal(tensor, tensors[f"{PRETRAINED_POOLER[name]}.{key}"])
    else:
        new.add("dense")
    assert {key.split(".")[2] for key in info["missing_keys"]} == new
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"exits"}
    report = "\n".join(warnings_given())
    assert "classifier.weight" in report
    assert ("dense" in report) == ("dense" in new)
    assert "encoder" not in report
    assert str(folder) in report
    assert model(**tiny.batch()).exit_logits.shape == (6, 2, 5)
    assert model(**tiny.batch()).exit_logits.isfinite().all()


def test_without_a_pooler_every_head_is_new_and_of_the_right_size(name, folders):
    model, info = WithExits.from_pretrained(folders(name, "masked"), output_loading_info=True)
    assert {key.split(".")[2] for key in info["missing_keys"]} == {"dense", "classifier"}
    assert_backbone_is(model, weights(folders(name, "masked")), f"{model.base_model_prefix}.")
    for head in model.exits:
        weight = head.dense.weight
        assert weight.isfinite().all()
        assert 0.1 < weight.std() < 0.6
        assert not head.dense.bias.any()
    assert not torch.equal(model.exits[0].dense.weight, model.exits[1].dense.weight)


def test_new_heads_follow_the_seed(folders):
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(WithExits.from_pretrained(folders("bert", "masked")).state_dict())
    assert all(torch.equal(tensor, made[1][key]) for key, tensor in made[0].items())


def test_every_weight_trains_on_its_own(folders):
    """Heads start equal, but are no views of one tensor."""
    model = WithExits.from_pretrained(folders("bert", "classifier"), exit_layers=[1, 4])
    with torch.no_grad():
        model.exits[0].classifier.weight.zero_()
    assert model.exits[1].classifier.weight.any()


def test_configuration_fields_reach_the_model(folders):
    model = WithExits.from_pretrained(
        folders("roberta", "classifier"),
        exit_layers=[1, 4],
        exit_routing="joint",
        exit_pooling="mean",
        exit_thresholds=0.7,
        exit_temperatures=[2.0, 1.0],
        exit_loss_weights=[1, 2],
        hidden_dropout_prob=0.25,
        id2label={0: "bad", 1: "so-so", 2: "good"},
    )
    config = model.config
    assert type(config) is hf_adaptive.RobertaWithExitsConfig
    assert (config.exit_layers, config.exit_routing, config.exit_pooling) == ([1, 4], "joint", "mean")
    assert (config.exit_thresholds, config.exit_temperatures, config.exit_loss_weights) == ([0.7], [2.0, 1.0], [1, 2])
    assert model.exits[0].dropout.p == 0.25
    assert config.id2label[2] == "good"
    assert config._name_or_path == str(folders("roberta", "classifier"))


def test_a_configuration_can_be_given(folders):
    folder = folders("bert", "backbone")
    given = tiny.config(exit_layers=[3, 4], exit_pooling="mean", num_labels=7)
    model = WithExits.from_pretrained(folder, config=given)
    assert (model.config.exit_layers, model.config.num_labels) == ([3, 4], 7)
    assert_backbone_is(model, weights(folder), "")
    with pytest.raises(ValueError, match=r"BertConfig.*BertWithExitsConfig\.from_plain"):
        WithExits.from_pretrained(folder, config=tiny.plain_config())


def test_checkpoint_with_exits_comes_back_bit_for_bit(name, tmp_path):
    model = tiny.model(name, exit_thresholds=[0.6, None], exit_pooling="mean", exit_temperatures=[0.5, 1.0, 2.0])
    model.save_pretrained(tmp_path)
    inputs = tiny.batch()
    for load in (WithExits, AutoModelForSequenceClassification, type(model)):
        loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        outputs, expected = loaded(**inputs), model(**inputs)
        tiny.assert_alike(outputs.logits, expected.logits)
        assert torch.equal(outputs.exit_index, expected.exit_index)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)


def test_auto_model_loads_the_backbone_without_exits(name, folders):
    folder = folders(name, "exits")
    backbone = AutoModel.from_pretrained(folder)
    model = WithExits.from_pretrained(folder)
    assert "exits" not in dict(backbone.named_children())
    own, expected = backbone(**tiny.batch()), model(**tiny.batch(), output_hidden_states=True)
    tiny.assert_alike(own.last_hidden_state, expected.hidden_states[-1])


def test_wrong_architecture_names_both(folders):
    with pytest.raises(ValueError, match=r"model_type='roberta'; BertForSequenceClassificationWithExits loads 'bert'"):
        hf_adaptive.BertForSequenceClassificationWithExits.from_pretrained(folders("roberta", "classifier"))


def test_unsupported_architecture_lists_the_supported(tmp_path):
    for content in ({"model_type": "t5"}, {"hidden_size": 16}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"cannot have exits; supported are .*bert.*mpnet.*roberta"):
            WithExits.from_pretrained(tmp_path)


def test_a_configuration_without_content_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"has no config\.json, or one without content"):
        WithExits.from_pretrained(tmp_path)


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        WithExits.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        WithExits.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="from_pretrained"):
        WithExits()


@pytest.mark.parametrize("load", [WithExits, AutoModelForSequenceClassification])
def test_missing_exit_weights(load, folders, tmp_path):
    folder = copied(folders("bert", "exits"), tmp_path / "checkpoint")
    changed(folder, lambda tensors: tensors.pop("exits.1.classifier.weight"))
    with pytest.raises(ValueError, match=r"missing \['exits.1.classifier.weight'\]") as error:
        load.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_surplus_exit_weights(folders, tmp_path):
    folder = copied(folders("bert", "exits"), tmp_path / "checkpoint")
    changed(folder, lambda tensors: tensors.update({"exits.3.classifier.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"left over \['exits.3.classifier.bias'\]"):
        WithExits.from_pretrained(folder)


def test_other_exit_layers_than_those_saved(folders):
    """The same number of exits elsewhere would load without a word, and answer nonsense."""
    for exits in ([1, 4], [1, 2, 3, 4], [1, 3, 4]):
        with pytest.raises(ValueError, match=r"exit_layers"):
            WithExits.from_pretrained(folders("bert", "exits"), exit_layers=exits)


@pytest.mark.parametrize("kind", ["exits", "classifier", "backbone"])
def test_missing_backbone_weight_is_reported(kind, folders, tmp_path, warnings_given):
    folder = copied(folders("bert", kind), tmp_path / "checkpoint")
    key = "encoder.layer.2.output.dense.weight"
    changed(folder, lambda tensors: tensors.pop(key if kind == "backbone" else f"bert.{key}"))
    model, info = WithExits.from_pretrained(folder, output_loading_info=True)
    assert key in "\n".join(warnings_given())
    assert f"bert.{key}" in info["missing_keys"]
    assert model(**tiny.batch()).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["exits", "classifier"])
@pytest.mark.parametrize("kept", [0, 4, 2000, 20_000])
def test_truncated_weights_file_is_named(kind, kept, folders, tmp_path):
    folder = copied(folders("bert", kind), tmp_path / "checkpoint")
    file = folder / "model.safetensors"
    assert file.stat().st_size > 20_000
    file.write_bytes(file.read_bytes()[:kept])
    for load in (WithExits, hf_adaptive.BertForSequenceClassificationWithExits):
        with pytest.raises(OSError, match=r"model\.safetensors.*(truncated|damaged)") as error:
            load.from_pretrained(folder)
        assert str(folder) in str(error.value)


def test_no_weights_file(folders, tmp_path):
    folder = copied(folders("bert", "exits"), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        WithExits.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["exits", "classifier", "backbone"])
def test_pickled_weights_are_not_read(kind, folders, tmp_path):
    folder = copied(folders("bert", kind), tmp_path / "checkpoint")
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        WithExits.from_pretrained(folder)


def test_other_number_of_labels(name, folders):
    plain, exits = folders(name, "classifier"), folders(name, "exits")
    for folder in (plain, exits):
        with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|mismatch"):
            WithExits.from_pretrained(folder, num_labels=5)
    for folder in (plain, exits):
        model, info = WithExits.from_pretrained(
            folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
        outputs = model(**tiny.batch(), labels=torch.tensor([4] * 6))
        assert outputs.exit_logits.shape[-1] == 5
        assert outputs.loss.isfinite()
        new = info["missing_keys"] if folder == plain else {key for key, *_ in info["mismatched_keys"]}
        assert {key.split(".")[2] for key in new} == {"classifier"}
        for head in model.exits:
            assert 0.1 < head.classifier.weight.std() < 0.6


@pytest.mark.parametrize("kind", ["exits", "classifier", "backbone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto", None])
def test_types(kind, dtype, folders):
    model = WithExits.from_pretrained(folders("roberta", kind), dtype=dtype)
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32, None: torch.float32}.get(dtype, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model(**tiny.batch()).logits.dtype == expected


@pytest.mark.parametrize("kind", ["exits", "classifier"])
def test_half_precision_checkpoint_keeps_its_type(kind, folders, tmp_path):
    source = WithExits.from_pretrained(folders("bert", kind), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path)
    assert WithExits.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert WithExits.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", ["exits", "classifier", "backbone"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(kind, device_map, folders):
    folder = folders("bert", kind)
    torch.manual_seed(1)
    model = WithExits.from_pretrained(folder, device_map=device_map)
    torch.manual_seed(1)
    plain = WithExits.from_pretrained(folder)
    if kind != "backbone":
        tiny.assert_alike(model(**tiny.batch()).exit_logits, plain(**tiny.batch()).exit_logits)
    device = model.device
    inputs = {key: tensor.to(device) for key, tensor in tiny.batch().items()}
    assert model(**inputs, exit_at=2).exit_index.tolist() == [1] * 6


@pytest.mark.parametrize("kind", ["exits", "classifier"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_attention_implementations_agree(name, kind, folders):
    folder = folders(name, kind)
    models = {how: WithExits.from_pretrained(folder, attn_implementation=how) for how in ("eager", "sdpa")}
    assert {how: model.config._attn_implementation for how, model in models.items()} == {
        "eager": "eager",
        "sdpa": "sdpa",
    }
    inputs = tiny.batch(rows=12)
    thresholds = tiny.thresholds_between(models["eager"], inputs)
    eager, sdpa = (model(**inputs, exit_thresholds=thresholds) for model in models.values())
    assert eager.exit_index.tolist() == sdpa.exit_index.tolist()
    torch.testing.assert_close(eager.exit_logits, sdpa.exit_logits, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_new_tokens(name, folders, tmp_path):
    model = WithExits.from_pretrained(folders(name, "exits"))
    expected = model(**tiny.batch()).exit_logits
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    tiny.assert_alike(model(**tiny.batch()).exit_logits, expected)
    inputs = tiny.batch()
    inputs["input_ids"][0, 0] = tiny.VOCABULARY + 7
    assert model(**inputs, exit_at=1).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = WithExits.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == tiny.VOCABULARY + 8
    tiny.assert_alike(loaded(**inputs).exit_logits, model(**inputs).exit_logits)


@pytest.mark.parametrize("kind", ["exits", "classifier"])
def test_sharded_checkpoint(kind, folders, tmp_path):
    source = WithExits.from_pretrained(folders("deberta", kind), exit_layers=tiny.EXIT_LAYERS)
    if kind == "classifier":
        plain = AutoModelForSequenceClassification.from_pretrained(folders("deberta", kind))
        plain.save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = WithExits.from_pretrained(tmp_path, exit_layers=tiny.EXIT_LAYERS)
    tiny.assert_alike(loaded(**tiny.batch()).exit_logits, source(**tiny.batch()).exit_logits)


@pytest.mark.parametrize("kind", ["exits", "classifier"])
def test_variant(kind, folders, tmp_path):
    """`model.fp16.safetensors` beside, or without, `model.safetensors`."""
    loader = WithExits if kind == "exits" else AutoModelForSequenceClassification
    model = loader.from_pretrained(folders("bert", kind))
    model.half().save_pretrained(tmp_path, variant="fp16")
    loaded = WithExits.from_pretrained(tmp_path, variant="fp16", exit_layers=tiny.EXIT_LAYERS)
    assert loaded.dtype == torch.float16
    torch.testing.assert_close(loaded.exits[2].classifier.weight, weights_of(kind, model))


def weights_of(kind, model):
    return model.exits[2].classifier.weight if kind == "exits" else model.classifier.weight


def test_subfolder(folders, tmp_path):
    for kind in ("exits", "classifier"):
        copied(folders("bert", kind), tmp_path / kind / "inner")
        model = WithExits.from_pretrained(tmp_path / kind, subfolder="inner", exit_layers=tiny.EXIT_LAYERS)
        expected = WithExits.from_pretrained(tmp_path / kind / "inner", exit_layers=tiny.EXIT_LAYERS)
        tiny.assert_alike(model(**tiny.batch()).exit_logits, expected(**tiny.batch()).exit_logits)


def test_trained_exits_are_not_warned_of(folders, warnings_given):
    model = WithExits.from_pretrained(folders("bert", "exits"))
    model(**tiny.batch(), exit_thresholds=0.9)
    assert not [text for text in warnings_given() if "never trained" in text]


@pytest.mark.parametrize("kind", ["classifier", "backbone"])
def test_thresholds_on_untrained_exits_are_warned_of(kind, folders, warnings_given):
    model = WithExits.from_pretrained(folders("bert", kind), exit_thresholds=0.9)
    model(**tiny.batch())
    assert [text for text in warnings_given() if "never trained" in text]


def test_loading_leaves_the_logging_as_it_was(folders):
    import logging

    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level, list(logger.filters)
    WithExits.from_pretrained(folders("bert", "classifier"))
    assert (logger.level, list(logger.filters)) == before


def test_from_config_and_from_state_dict():
    model = WithExits.from_config(tiny.config("mpnet"))
    assert type(model).__name__ == "MPNetForSequenceClassificationWithExits"
    copy = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    tiny.assert_alike(copy(**tiny.batch()).exit_logits, model.eval()(**tiny.batch()).exit_logits)
    with pytest.raises(ValueError, match="cannot have exits; supported are"):
        WithExits.from_config(AutoConfig.for_model("t5"))
    with pytest.raises(ValueError, match=r"BertConfig.*BertWithExitsConfig\.from_plain"):
        WithExits.from_config(tiny.plain_config())
