"""The PAPA models against the numbers of PAPA's own code, and as models of transformers."""

import json
import re
import textwrap
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

import hf_adaptive
from hf_adaptive import mean_attention
from hf_adaptive.modeling.constant_heads import install_constant_heads
from hf_adaptive.modeling.papa import PapaPooler, PapaTokenHead
from tests import fresh_process
from tests import golden_papa as golden

LOGITS = {"atol": 1e-5, "rtol": 0}
STATES = {"atol": 2e-5, "rtol": 0}
GRADIENTS = {"atol": 2e-5, "rtol": 0}
TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")


def heads_of(family, head_set):
    return golden.results(family)["static_heads"][head_set]


@pytest.mark.parametrize("head_set", golden.HEAD_SETS)
@pytest.mark.parametrize(
    ("family", "attn_implementation"),
    [("bert", "eager"), ("bert", "sdpa"), ("roberta", "eager"), ("roberta", "sdpa"), ("deberta", "eager")],
)
def test_constant_heads_match_the_reference(family, attn_implementation, head_set):
    model = golden.model(family, heads_of(family, head_set), attn_implementation=attn_implementation)
    inputs, expected = (
        golden.tensors(f"{family}/inputs"),
        golden.under(f"{head_set}/", golden.tensors(f"{family}/static")),
    )
    wants_attentions = "attentions" in expected and attn_implementation == "eager"
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=wants_attentions)

    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits, expected["logits"], **LOGITS)
    reference_loss = golden.results(family)["static"][head_set]["loss"]
    assert outputs.loss.item() == pytest.approx(reference_loss, abs=1e-5)
    states = torch.stack(outputs.hidden_states)
    torch.testing.assert_close(states[:, real], expected["hidden_states"][:, real], **STATES)
    if wants_attentions:
        attentions = torch.stack(outputs.attentions).transpose(2, 3)[:, real.nonzero()[:, 0], real.nonzero()[:, 1]]
        reference = expected["attentions"].transpose(2, 3)[:, real.nonzero()[:, 0], real.nonzero()[:, 1]]
        torch.testing.assert_close(attentions, reference, **LOGITS)


@pytest.mark.parametrize("head_set", golden.HEAD_SETS)
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_constant_heads_under_the_stock_classifier_match_the_reference(family, head_set):
    """`install_constant_heads` serves any model that holds a stock backbone, not only the PAPA classes."""
    model = stock_classifier(family)
    config = golden.class_of(family, "Config")(
        **golden.results(family)["config"], constant_heads=heads_of(family, head_set), constant_length=golden.LENGTH
    )
    install_constant_heads(model.base_model, hf_adaptive.ARCHITECTURES[family], config, golden.averages(family))
    logits = model(**golden.tensors(f"{family}/inputs")).logits
    expected = golden.tensors(f"{family}/static")[f"{head_set}/logits_ordinary_pooler"]
    torch.testing.assert_close(logits, expected, **LOGITS)


def stock_classifier(family):
    config = AutoConfig.for_model(family, **golden.results(family)["config"])
    model = golden.stock_class_of(family, "ForSequenceClassification")(config)
    weights = {
        name: weight
        for name, weight in golden.tensors(f"{family}/vanilla_state_dict").items()
        if not name.endswith("position_ids")
    }
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("mask", ["ones", None])
def test_inputs_without_padding_match_the_reference(family, mask):
    expected = golden.tensors(f"{family}/static")
    inputs = {**golden.tensors(f"{family}/inputs"), "input_ids": expected["no_padding/input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"]) if mask else None
    logits = golden.model(family, heads_of(family, "half"))(**inputs).logits
    torch.testing.assert_close(logits, expected["no_padding/half/logits"], **LOGITS)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_gradients_match_the_reference(family):
    heads = heads_of(family, "half")
    model = golden.model(family, heads)
    model(**golden.tensors(f"{family}/inputs")).loss.backward()
    expected = golden.tensors(f"{family}/static_half_gradients")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    for name, gradient in golden.probe_weights(family, golden.under("grad/", expected)).items():
        torch.testing.assert_close(gradients[name], gradient, **GRADIENTS)
    for name in (f"{family}.embeddings.word_embeddings.weight", f"{family}.encoder.layer.5.output.dense.weight"):
        torch.testing.assert_close(gradients[name], expected[f"grad/{name}"], **GRADIENTS)
    for layer in range(6):
        attention = f"{family}.encoder.layer.{layer}.attention.self"
        constant = sorted(head for index, head in heads if index == layer)
        own = golden.under(f"{attention}.", gradients)
        reference = golden.under(f"grad/{attention}.", expected)
        assert_attention_gradients_match(own, reference, constant, golden.averages(family)[layer, constant])


def assert_attention_gradients_match(own, reference, constant, averages):
    """Compares one layer; the reference keeps the values of all heads together."""
    dynamic = [head for head in range(4) if head not in constant]
    for name, gradient in reference.items():
        if name == "static_heads_content":
            seen = averages.abs().sum(-1) > 0
            torch.testing.assert_close(own["constants"][seen], gradient[seen], **GRADIENTS)
            # The reference passes one over 1e-12 there: a step would ruin the constants. Ours stay as they are.
            assert (own["constants"][~seen] == 0).all()
        elif name.startswith("value.") or name == "v_bias":
            suffix = "bias" if name == "v_bias" else name.removeprefix("value.")
            rows = gradient.unflatten(0, (4, 8))
            if dynamic:
                torch.testing.assert_close(own[name], rows[dynamic].flatten(0, 1), **GRADIENTS)
            if constant:
                torch.testing.assert_close(own[f"constant_value.{suffix}"], rows[constant].flatten(0, 1), **GRADIENTS)
        elif name == "in_proj.weight":
            rows = gradient.unflatten(0, (4, 24))
            torch.testing.assert_close(own[name], rows[dynamic].flatten(0, 1), **GRADIENTS)
            if constant:
                torch.testing.assert_close(
                    own["constant_value.weight"], rows[constant, 16:].flatten(0, 1), **GRADIENTS
                )
        elif dynamic:
            torch.testing.assert_close(own[name], gradient, **GRADIENTS)


@pytest.mark.parametrize("head_set", golden.HEAD_SETS)
def test_token_classification_matches_the_reference(head_set):
    stored = golden.tensors("bert/token_classification")
    model = golden.model(
        "bert",
        heads_of("bert", head_set),
        task="ForTokenClassification",
        state="token_classification_state_dict",
        constants=stored["averages/avgs"],
    )
    inputs = golden.under("inputs/", stored)
    outputs = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], stored[f"{head_set}/logits"][real], **LOGITS)
    torch.testing.assert_close(
        outputs.hidden_states[-1][real], stored[f"{head_set}/last_hidden_state"][real], **STATES
    )
    assert outputs.loss.item() == pytest.approx(golden.results("bert")["token"][head_set]["loss"], abs=1e-5)


def test_pooler_and_token_head_match_the_reference():
    stored = golden.tensors("functions")
    states = stored["hidden_states"]
    config = golden.class_of("bert", "Config")(**golden.results("bert")["config"], constant_length=golden.LENGTH)
    pooler, head = PapaPooler(config), PapaTokenHead(config)
    weights = {
        name.replace("sequence_pooler/", "pooler.").replace("token_classifier/", "classifier."): weight
        for name, weight in stored.items()
        if name.startswith(("sequence_pooler/", "token_classifier/")) and not name.endswith("/output")
    }
    weights = golden.probe_weights("bert", weights)
    pooler.load_state_dict(golden.under("pooler.", weights))
    head.load_state_dict(golden.under("classifier.", weights))
    torch.testing.assert_close(pooler(states.unbind(), stored["mask"]), stored["sequence_pooler/output"], **LOGITS)
    torch.testing.assert_close(head(states.unbind()), stored["token_classifier/output"], **LOGITS)


def test_pooler_takes_one_text_no_mask_and_short_inputs_and_starts_uniform():
    config = golden.class_of("bert", "Config")(**golden.results("bert")["config"], constant_length=golden.LENGTH)
    model = golden.class_of("bert", "ForSequenceClassification")(config)
    assert (model.pooler.position_weights == 1 / golden.LENGTH).all()
    for length in (1, 7, golden.LENGTH):
        states = torch.randn(7, 1, length, 32).unbind()
        torch.testing.assert_close(model.pooler(states), model.pooler(states, torch.ones(1, length)))


# --- Converting, saving and loading ---------------------------------------------------------------------------------


@pytest.fixture
def plain_checkpoint(tmp_path):
    """Makes a folder with a tiny plain checkpoint of a family and task."""

    def make(family="bert", suffix="ForMaskedLM"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **golden.results(family)["config"])
        folder = tmp_path / f"plain-{family}{suffix}"
        golden.stock_class_of(family, suffix)(config).eval().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def constants():
    return torch.rand(6, 4, golden.LENGTH, golden.LENGTH, generator=torch.Generator().manual_seed(1))


# What version 0.1 saved of a layer (hidden size 32), for the heads that are constant and for the others: the first
# dimension is that of one head.
OF_CONSTANT_HEADS = {
    "constants": (1, golden.LENGTH, golden.LENGTH),
    "constant_value.weight": (8, 32),
    "constant_value.bias": (8,),
}
OF_OTHER_HEADS = {
    f"{name}.{kind}": shape
    for name in ("query", "key", "value")
    for kind, shape in (("weight", (8, 32)), ("bias", (8,)))
}
OF_OTHER_HEADS_IN_DEBERTA = {
    "in_proj.weight": (24, 32),
    "pos_proj.weight": (8, 32),
    "pos_q_proj.weight": (8, 32),
    "pos_q_proj.bias": (8,),
    "q_bias": (8,),
    "v_bias": (8,),
}


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_checkpoints_of_version_0_1_load(family, plain_checkpoint, constants, tmp_path):
    heads = [[0, 1], [0, 2], *([4, head] for head in range(4))]
    model_class = golden.class_of(family, "ForSequenceClassification")
    model = model_class.from_pretrained(plain_checkpoint(family), constants=constants, constant_heads=heads)
    model.save_pretrained(tmp_path)
    others = OF_OTHER_HEADS_IN_DEBERTA if family == "deberta" else OF_OTHER_HEADS
    expected = {
        f"{model.base_model_prefix}.encoder.layer.{layer}.attention.self.{name}": (count * first, *rest)
        for layer, constant in ((0, 2), (4, 4))
        for shapes, count in ((OF_CONSTANT_HEADS, constant), (others, 4 - constant))
        for name, (first, *rest) in shapes.items()
    }
    weights = load_file(tmp_path / "model.safetensors")
    stored = {
        name: tuple(tensor.shape) for name, tensor in weights.items() if re.search(r"\.[04]\.attention\.self\.", name)
    }
    assert stored == expected
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == f"papa-{family}"
    assert (fields["constant_heads"], fields["constant_length"]) == (heads, golden.LENGTH)
    inputs = golden.tensors(f"{family}/inputs")
    again, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("family", "task", "heads"),
    [
        *((family, task, [[0, 1], [4, 0], [4, 1], [4, 2], [4, 3]]) for family in golden.FAMILIES for task in TASKS),
        *((family, "ForSequenceClassification", heads) for family in golden.FAMILIES for heads in ([], "all")),
    ],
)
def test_convert_save_load_round_trip(plain_checkpoint, constants, tmp_path, family, task, heads):
    model_class = golden.class_of(family, task)
    plain = plain_checkpoint(family)
    model = model_class.from_pretrained(plain, constants=constants, constant_heads=heads)
    inputs = golden.tensors(f"{family}/inputs")
    inputs.pop("labels")
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "papa")
    again = getattr(transformers, f"AutoModel{task}").from_pretrained(tmp_path / "papa")

    assert type(again) is model_class
    torch.testing.assert_close(again(**inputs).logits, logits, atol=2e-6, rtol=1e-5)
    assert again.config.constant_heads == model.config.constant_heads
    assert all(type(index) is int for pair in again.config.constant_heads for index in pair)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("suffix", ["ForPreTraining", "ForSequenceClassification", "Model"])
def test_the_pooler_of_a_plain_checkpoint_is_left_out(plain_checkpoint, suffix):
    """Its name, without the backbone's prefix, is that of the PAPA pooler, which has other sizes."""
    plain = plain_checkpoint("bert", suffix)
    model = golden.class_of("bert", "ForSequenceClassification").from_pretrained(plain, constant_length=golden.LENGTH)
    stock = transformers.BertModel.from_pretrained(plain)
    torch.testing.assert_close(model.bert.embeddings.state_dict(), stock.embeddings.state_dict())
    assert model.pooler.dense.weight.isfinite().all()


def test_masked_language_model_without_constant_heads_is_the_stock_model(plain_checkpoint):
    plain = plain_checkpoint("roberta")
    inputs = golden.tensors("roberta/inputs")
    inputs.pop("labels")
    stock = transformers.RobertaForMaskedLM.from_pretrained(plain)
    ours = hf_adaptive.PapaRobertaForMaskedLM.from_pretrained(plain, constant_length=golden.LENGTH)
    torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_constant_heads_have_no_query_and_key_weights(plain_checkpoint, constants, tmp_path, family):
    plain = plain_checkpoint(family)
    sizes, files = [], []
    for heads in ([], [[0, 1], [4, 0]], "all"):
        # One token long, so that the constants themselves weigh next to nothing.
        model = golden.class_of(family, "ForMaskedLM").from_pretrained(
            plain, constants=constants[..., :1, :1], constant_heads=heads
        )
        sizes.append(sum(weight.numel() for weight in model.parameters()) - 2 * len(model.config.constant_heads) // 2)
        model.save_pretrained(tmp_path / str(len(files)))
        files.append((tmp_path / str(len(files)) / "model.safetensors").stat().st_size)
    # Query, key and their biases; in DeBERTa the query bias and both position projections.
    per_head = 2 * 8 * 32 + (2 * 8 if family != "deberta" else 8 + 2 * 8 * 32 + 8)
    assert sizes == [sizes[0], sizes[0] - 2 * per_head, sizes[0] - 24 * per_head]
    assert files[0] > files[1] > files[2]


def test_what_is_new_is_reported(plain_checkpoint, constants):
    _, info = hf_adaptive.PapaBertForSequenceClassification.from_pretrained(
        plain_checkpoint(), constants=constants, constant_heads="all", output_loading_info=True
    )
    assert info["missing_keys"] == {
        "pooler.position_weights",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_a_head_that_the_plain_checkpoint_lacks_is_new_too(plain_checkpoint, constants):
    _, info = hf_adaptive.PapaBertForMaskedLM.from_pretrained(
        plain_checkpoint(suffix="Model"), constants=constants, constant_heads="all", output_loading_info=True
    )
    assert "cls.predictions.transform.dense.weight" in info["missing_keys"]
    assert not any(name.startswith("bert.") for name in info["missing_keys"])


def test_a_fraction_takes_the_beginning_of_the_ranking(plain_checkpoint, constants):
    ranking = [[layer, head] for head in range(4) for layer in range(6)]
    model = hf_adaptive.PapaBertForMaskedLM.from_pretrained(
        plain_checkpoint(), constants=constants, constant_heads=0.3, head_ranking=ranking
    )
    assert model.config.constant_heads == sorted(ranking[:7])
    assert torch.equal(model.bert.encoder.layer[0].attention.self.constants, constants[0, [0, 1]])


def test_averages_are_taken_from_the_same_checkpoint_only(plain_checkpoint, constants):
    plain = plain_checkpoint()
    loader = DataLoader([{"input_ids": torch.arange(3, 3 + length)} for length in (5, 16, 9)], batch_size=1)
    averages = mean_attention(transformers.BertModel.from_pretrained(plain), loader, golden.LENGTH)
    model = hf_adaptive.PapaBertForSequenceClassification.from_pretrained(
        plain, constants=averages, constant_heads="all"
    )
    torch.testing.assert_close(model.bert.encoder.layer[3].attention.self.constants.data, averages.average[3])

    other = transformers.BertModel(AutoConfig.from_pretrained(plain))
    averages = mean_attention(other, loader, golden.LENGTH)
    with pytest.raises(ValueError, match="collected from another model"):
        hf_adaptive.PapaBertForSequenceClassification.from_pretrained(plain, constants=averages, constant_heads="all")


FRESH_PROCESS = """
    import sys
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
    inputs = load_file(sys.argv[2])
    assert "hf_adaptive" not in sys.modules
    assert "transformers.models.deberta.modeling_deberta" not in sys.modules
    torch.testing.assert_close(model(**inputs).logits, load_file(sys.argv[3])["logits"], atol=2e-6, rtol=1e-5)
    # The code travels on with a copy of the copy.
    model.save_pretrained(sys.argv[1] + "-again")
    again = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=2e-6, rtol=1e-5)
    print(type(model).__name__)
"""


def logits_on_one_thread(model, inputs):
    """The number of threads decides the order of summation, and with it the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logits = model(**inputs).logits.detach()
    torch.set_num_threads(threads)
    return logits


def test_loads_in_a_fresh_process_without_the_package(tmp_path, constants):
    model = golden.model("bert", heads_of("bert", "half"), attn_implementation="sdpa")
    inputs = golden.tensors("bert/inputs")
    model.save_pretrained(tmp_path / "papa")
    save_file({"logits": logits_on_one_thread(model, inputs)}, tmp_path / "logits.safetensors")
    save_file(inputs, tmp_path / "inputs.safetensors")

    arguments = [tmp_path / "papa", tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors"]
    printed = fresh_process.run(textwrap.dedent(FRESH_PROCESS), *arguments, folder=tmp_path)
    assert printed.split()[-1] == "PapaBertForSequenceClassification"


# --- As a model of transformers -------------------------------------------------------------------------------------


def tiny(task="ForSequenceClassification", family="bert", **fields):
    torch.manual_seed(0)
    values = {**golden.results(family)["config"], "constant_heads": [[1, 0], [1, 2], [3, 3]], "constant_length": 16}
    return golden.class_of(family, task)(golden.class_of(family, "Config")(**{**values, **fields})).eval()


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            "probe",
            {
                "pooler.position_weights",
                "pooler.dense.weight",
                "pooler.dense.bias",
                "classifier.weight",
                "classifier.bias",
            },
        ),
        (
            "constants",
            {"bert.encoder.layer.1.attention.self.constants", "bert.encoder.layer.3.attention.self.constants"},
        ),
        ("all", {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"}),
    ],
)
def test_trainable_part(part, expected):
    model = tiny(trainable_part=part)
    parts = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected <= parts
    assert (parts == expected) is (part == "probe")
    assert any(name.endswith("query.weight") for name in parts) is (part == "all")
    model.set_trainable_part("probe")
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 5
    assert model.config.trainable_part == "probe"


@pytest.mark.parametrize(
    ("labels", "fields"),
    [
        (torch.tensor([0, 2]), {}),
        (torch.tensor([0.5, 2.0]), {"num_labels": 1}),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), {"problem_type": "multi_label_classification"}),
    ],
    ids=["single-label", "regression", "multi-label"],
)
def test_problem_types(labels, fields):
    loss = tiny(**fields)(input_ids=torch.randint(3, 100, (2, 9)), labels=labels).loss
    assert loss.isfinite()


def test_threads_do_not_see_each_other():
    model = tiny(constant_heads=[[layer, head] for layer in range(6) for head in range(3)])
    batches = [golden.batches(golden.tensors("bert/average_inputs"))[index] for index in range(5)]
    expected = [model(**batch).logits for batch in batches]
    wrong = []

    def run(index):
        for _ in range(5):
            if not torch.equal(model(**batches[index]).logits, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tuples_and_outputs_on_request():
    model = tiny(attn_implementation="eager")
    inputs = {"input_ids": torch.randint(3, 100, (2, 9))}
    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert torch.equal(model(**inputs, return_dict=False)[0], plain.logits)
    full = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert [tuple(attentions.shape) for attentions in full.attentions] == [(2, 4, 9, 9)] * 6
    assert len(full.hidden_states) == 7


def test_trains_with_a_plain_trainer(tmp_path):
    model = tiny(trainable_part="constants")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for batch in golden.batches(golden.tensors("bert/average_inputs"))[:2]
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])
    ]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constant_heads": [[6, 0]]}, "layers 0 to 5 and heads 0 to 3"),
        ({"constant_heads": [[0, 4]]}, "layers 0 to 5 and heads 0 to 3"),
        ({"constant_heads": [[0, -1]]}, "layers 0 to 5 and heads 0 to 3"),
        ({"constant_heads": [[0, 1], [2, 3], [0, 1]]}, r"\[0, 1\] more than once"),
        ({"constant_heads": {"0": [1]}}, r"list of \[layer, head\] pairs"),
        ({"constant_heads": [[0, 1.0]]}, r"list of \[layer, head\] pairs"),
        ({"constant_heads": "all"}, r"list of \[layer, head\] pairs"),
        ({"constant_heads": [[0, 1]], "constant_length": None}, "constant_length is None"),
        ({"constant_length": 0}, "constant_length must be a positive"),
        ({"constant_length": "16"}, "constant_length must be a positive"),
        ({"trainable_part": "everything"}, "'probe', 'constants', 'all'"),
    ],
)
def test_configuration_names_what_is_wrong(fields, message):
    values = {**golden.results("bert")["config"], "constant_length": 16}
    with pytest.raises(ValueError, match=message):
        hf_adaptive.PapaBertConfig(**{**values, **fields})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"constants": torch.rand(6, 4, 16, 15), "constant_heads": "all"}, "must have the shape"),
        ({"constants": torch.rand(12, 4, 16, 16), "constant_heads": "all"}, r"= \(6, 4, 16, 16\)"),
        ({"constants": torch.full((6, 4, 16, 16), torch.nan), "constant_heads": "all"}, "must be finite"),
        ({"constants": torch.rand(6, 2, 16, 16), "constant_heads": []}, "must have the shape"),
        ({"constants": torch.rand(6, 4, 16, 16), "constant_heads": "all", "constant_length": 8}, "does not fit"),
        ({"constants": torch.rand(6, 4, 16, 16)}, "constant_heads is not"),
        ({"constants": torch.rand(6, 4, 16, 16), "constant_heads": 0.5}, "head_ranking"),
        ({"constants": torch.rand(6, 4, 16, 16), "constant_heads": 1.5}, "between 0 and 1"),
        ({"constants": torch.rand(6, 4, 16, 16), "constant_heads": "half"}, "'all', a fraction"),
        (
            {"constants": torch.rand(6, 4, 16, 16), "constant_heads": 0.5, "head_ranking": [[0, 0]]},
            "each of the 24 heads once",
        ),
        ({"constant_heads": "all"}, "constants are missing"),
        ({"constant_heads": []}, "constant_length is None"),
    ],
)
def test_conversion_names_what_is_wrong(plain_checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        hf_adaptive.PapaBertForSequenceClassification.from_pretrained(plain_checkpoint(), **arguments)


def test_another_architecture_is_refused(plain_checkpoint, constants):
    with pytest.raises(ValueError, match=r"model_type='roberta'; PapaBertForMaskedLM loads 'bert' and 'papa-bert'"):
        hf_adaptive.PapaBertForMaskedLM.from_pretrained(
            plain_checkpoint("roberta"), constants=constants, constant_heads="all"
        )
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)
    gpt2 = transformers.GPT2Model(config)
    config.constant_heads, config.constant_length = [[0, 0]], 4
    with pytest.raises(ValueError, match="GPT2Model cannot have constant heads"):
        install_constant_heads(gpt2, hf_adaptive.ARCHITECTURES["gpt2"], config)


def test_a_checkpoint_with_constants_is_not_converted_again(tmp_path, constants):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="constants, constant_heads can be given for a plain checkpoint only"):
        hf_adaptive.PapaBertForSequenceClassification.from_pretrained(
            tmp_path, constants=constants, constant_heads="all"
        )


@pytest.mark.parametrize("auto_class", [None, AutoModelForTokenClassification])
def test_constants_missing_from_a_checkpoint_are_an_error(tmp_path, auto_class):
    tiny("ForTokenClassification").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if not name.endswith("self.constants")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no constants for the heads in constant_heads"):
        (auto_class or hf_adaptive.PapaBertForTokenClassification).from_pretrained(tmp_path)


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_inputs_longer_than_the_constants_are_an_error(family, task):
    with pytest.raises(ValueError, match="17 tokens, but the constants of this model reach 16"):
        tiny(task, family)(input_ids=torch.randint(3, 100, (1, 17)))


def test_a_pooler_without_constant_heads_has_a_length_too():
    with pytest.raises(ValueError, match="17 tokens"):
        tiny(constant_heads=[])(input_ids=torch.randint(3, 100, (1, 17)))


def test_square_masks_are_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, length\), got \(1, 1, 4, 4\)"):
        tiny()(input_ids=torch.randint(3, 100, (1, 4)), attention_mask=torch.ones(1, 1, 4, 4))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="PapaBertForQuestionAnswering"):
        hf_adaptive.PapaBertForQuestionAnswering  # noqa: B018
    assert (
        AutoModelForSequenceClassification._model_mapping[hf_adaptive.PapaBertConfig]
        is hf_adaptive.PapaBertForSequenceClassification
    )
    assert json.loads(tiny().config.to_json_string())["constant_heads"] == [[1, 0], [1, 2], [3, 3]]
