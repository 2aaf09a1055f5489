"""Multi-model cascades: one checkpoint, rows answered by the first model that is sure."""

import json
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    GptOssConfig,
    GptOssForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import hf_adaptive
from hf_adaptive import (
    CascadeConfig,
    CascadeForSequenceClassification,
    ExitsTrainer,
    calibrate_exits,
    evaluate_exits,
)
from hf_adaptive.modeling.answers import Answers, choose_exits
from hf_adaptive.modeling.criteria import CRITERIA, ThresholdPolicy
from tests import fresh_process, tiny
from tests.golden_sweet import FOLDER
from tests.modeling import architectures

DEPTHS = [1, 2, 4]


def cascade(name="bert", **fields):
    return tiny.cascade(name, DEPTHS, **fields)


def mixed_cascade():
    """Of three architectures, one without segments, one with an attention of its own."""
    names = ("distilbert", "deberta", "bert")
    models = [tiny.plain_model(name, num_hidden_layers=depth) for name, depth in zip(names, DEPTHS)]
    return CascadeForSequenceClassification.from_models(models)


CASCADES = {"bert": cascade("bert"), "mixed": mixed_cascade(), "roberta": cascade("roberta")}


def rows_of(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def thresholds_between(model, inputs):
    """One a member that about half of all rows reach, far from every row's confidence."""
    with torch.no_grad():
        confidence = model(**inputs).exit_logits.softmax(dim=-1).amax(dim=-1)[:, :-1].sort(dim=0).values
    middle = len(confidence) // 2
    return confidence[middle - 1 : middle + 1].mean(dim=0).tolist()


def dataset(count=24):
    texts = tiny.sentences(count)
    return Dataset.from_dict({**tiny.tokenizer()(texts), "label": [int("good" in text) for text in texts]})


# Answers


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(CASCADES)),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=16),
    batch_size=st.integers(1, 7),
    thresholds=st.lists(st.none() | st.floats(0.34, 0.9), min_size=2, max_size=2),
    seed=st.integers(0, 5),
)
def test_every_row_is_answered_as_by_the_models_themselves(name, lengths, batch_size, thresholds, seed):
    model, rows = CASCADES[name], rows_of(lengths, seed)
    with torch.no_grad():
        alone = torch.stack(
            [torch.cat([member(torch.tensor([row["input_ids"]])).logits for member in model.members]) for row in rows]
        )
    confidence = alone.softmax(dim=-1).amax(dim=-1)[:, :-1]
    # Above 1 nothing leaves.
    limits = torch.tensor([2.0 if threshold is None else threshold for threshold in thresholds])
    if (confidence - limits).abs().min() < 1e-5:
        return
    sure = torch.cat((confidence >= limits, torch.ones(len(rows), 1, dtype=torch.bool)), dim=1)
    expected = sure.int().argmax(dim=1)
    padded = tiny.tokenizer().pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        together = model(**padded, exit_thresholds=thresholds)
    staged = model.predict(rows, batch_size=batch_size, exit_thresholds=thresholds, show_progress=False)
    for outputs in (together, staged):
        assert outputs.exit_index.tolist() == expected.tolist()
        taken = alone[torch.arange(len(rows)), expected]
        torch.testing.assert_close(outputs.logits, taken, atol=2e-5, rtol=1e-4)
        if model._policy(thresholds, None) is None:
            continue
        reached = torch.arange(len(DEPTHS))[None] <= expected[:, None]
        assert outputs.exit_logits[~reached].isnan().all()
        torch.testing.assert_close(outputs.exit_logits[reached], alone[reached], atol=2e-5, rtol=1e-4)


def test_a_member_is_given_the_rows_that_stay_only():
    model, inputs, seen = CASCADES["bert"], tiny.batch(rows=12), []
    thresholds = thresholds_between(model, inputs)
    hooks = [
        member.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        for member in model.members
    ]
    try:
        index = model(**inputs, exit_thresholds=thresholds).exit_index
    finally:
        for hook in hooks:
            hook.remove()
    expected = [int((index >= member).sum()) for member in range(3)]
    assert seen == [rows for rows in expected if rows]
    assert 12 == seen[0] > seen[1]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_of_decoders_do_not_depend_on_the_others(padding):
    # GPT-2 counts learned positions from the first token on, padding or not.
    models = [architectures.stock(name, num_hidden_layers=depth) for name, depth in (("gpt2", 1), ("llama", 2))]
    model, inputs = CascadeForSequenceClassification.from_models(models), tiny.batch(padding=padding)
    together = model(**inputs)
    for row in range(6):
        alone = model(**tiny.row(inputs, row))
        torch.testing.assert_close(together.exit_logits[row], alone.exit_logits[0], atol=2e-5, rtol=1e-4)


def test_segments_reach_the_members_that_have_them():
    model, inputs = CASCADES["mixed"], tiny.batch()
    segments = torch.ones_like(inputs["input_ids"])
    plain, with_segments = model(**inputs).exit_logits, model(**inputs, token_type_ids=segments).exit_logits
    assert [torch.equal(plain[:, index], with_segments[:, index]) for index in range(3)] == [True, True, False]


def test_a_forced_member_answers():
    outputs = CASCADES["bert"](**tiny.batch(), exit_at=2)
    assert outputs.exit_index.tolist() == [1] * 6
    assert outputs.exit_logits[:, 2].isnan().all()
    with pytest.raises(ValueError, match=r"exit_at must be one of exit_layers=\[1, 2, 4\]"):
        CASCADES["bert"](**tiny.batch(), exit_at=3)


def test_costs_add_up_over_the_members_run():
    assert CASCADES["bert"].config.exit_costs == [0.25, 0.75, 1.75]
    assert CASCADES["bert"].config.exit_layers == DEPTHS


def test_parity_with_the_papers_multi_model_script():
    golden = load_file(FOLDER / "multi_model.safetensors")
    results = json.loads((FOLDER / "multi_model.json").read_text())
    members = [tiny.plain_config("bert", num_hidden_layers=depth).to_dict() for depth in (1, 3, 4, 6)]
    config = CascadeConfig(members=json.loads(json.dumps(members)), num_labels=3)
    logits = golden["logits"].transpose(0, 1)
    compared = 0
    for key in [key for key in golden if key.endswith("/chosen_model")]:
        threshold = float(key.split("/")[0])
        thresholds = [None if threshold > 1 else threshold] * 3
        answers = Answers(logits, torch.zeros(len(logits), dtype=torch.long))
        chosen = choose_exits(answers, ThresholdPolicy(CRITERIA["confidence"], thresholds), config)
        assert chosen.tolist() == golden[key].tolist()
        recorded = results["results"][key.split("/")[0]]
        assert chosen.bincount(minlength=4).tolist() == recorded["counts"]
        predictions = Answers(logits, chosen).taken.argmax(dim=-1)
        assert predictions.tolist() == golden[f"{key.split('/')[0]}/prediction"].tolist()
        cost = torch.tensor(config.exit_costs, dtype=torch.float64)[chosen].mean().item()
        accuracy = (predictions == golden["labels"]).double().mean().item()
        assert cost == pytest.approx(recorded["speedup_ratio"], abs=1e-15)
        assert accuracy == recorded["accuracy"]
        compared += 1
    assert compared == len(results["thresholds"]) == 6


# Making


@pytest.mark.parametrize("name", architectures.NAMES)
def test_from_backbone_takes_the_first_layers(name, tmp_path):
    stock, inputs = architectures.stock(name), tiny.batch()
    real = inputs["attention_mask"] == 1
    stock.save_pretrained(tmp_path / "stock")
    model = CascadeForSequenceClassification.from_backbone(tmp_path / "stock", depths=[1, 2, 4], num_labels=3)
    assert [member.config.num_hidden_layers for member in model.members] == [1, 2, 4]
    with torch.no_grad():
        states = stock(**inputs, output_hidden_states=True).hidden_states
        norm_path = hf_adaptive.ARCHITECTURES[name].final_norm
        norm = torch.nn.Identity() if norm_path is None else stock.base_model.get_submodule(norm_path)
        for member, depth in zip(model.members[:2], (1, 2)):
            own = member.base_model(**inputs).last_hidden_state
            torch.testing.assert_close(own[real], norm(states[depth])[real], atol=0, rtol=0)
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, atol=1e-6, rtol=1e-5)
        model.save_pretrained(tmp_path / "cascade")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cascade")
        tiny.assert_alike(again(**inputs).exit_logits, model(**inputs).exit_logits)
    assert again.config.members == model.config.members
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_from_backbone_takes_the_cascades_fields(tmp_path):
    tiny.plain_model("deberta").save_pretrained(tmp_path)
    model = CascadeForSequenceClassification.from_backbone(
        tmp_path, depths=[1, 4], num_labels=3, exit_thresholds=0.7, exit_criterion="entropy", dtype=torch.bfloat16
    )
    assert (model.config.exit_thresholds, model.config.exit_criterion) == ([0.7], "entropy")
    # DeBERTa makes some as float32.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**tiny.batch(), exit_at=4).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"'exit_tresholds'.*Did you mean exit_thresholds"):
        CascadeForSequenceClassification.from_backbone(tmp_path, depths=[1, 4], exit_tresholds=0.7)


def test_new_classifiers_of_members_differ(tmp_path, warnings_given):
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path)
    model = CascadeForSequenceClassification.from_backbone(tmp_path, depths=[1, 2])
    first, second = (member.classifier.weight for member in model.members)
    assert not torch.equal(first, second)
    model(**tiny.batch(), exit_thresholds=0.9)
    assert any("never trained" in text for text in warnings_given())


def test_depths_may_be_anything_that_gives_them(tmp_path):
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path)
    model = CascadeForSequenceClassification.from_backbone(tmp_path, depths=iter([1, 2]))
    assert model.config.exit_layers == [1, 2]


def test_members_share_nothing(tmp_path):
    tiny.plain_model("bert").save_pretrained(tmp_path)
    model = CascadeForSequenceClassification.from_backbone(tmp_path, depths=DEPTHS, num_labels=3)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(addresses) == len(set(addresses))
    model.train()(**tiny.batch(), labels=tiny.labels(), exit_thresholds=[0.5, 0.5]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.members.parameters())


def test_members_of_different_architectures():
    models = [tiny.plain_model("bert", num_hidden_layers=1), tiny.plain_model("roberta")]
    model = CascadeForSequenceClassification.from_models(models)
    assert model.config.exit_costs == [0.25, 1.25]
    outputs = model(**tiny.batch(), exit_thresholds=[0.5])
    assert outputs.logits.shape == (6, 3)


def test_saved_and_loaded(tmp_path):
    model = cascade(id2label={0: "a", 1: "b", 2: "c"})
    model.config.exit_thresholds = [0.5, None]
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    inputs = tiny.batch()
    for name in ("one", "shards"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert isinstance(again, CascadeForSequenceClassification)
        assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
        ours, theirs = model(**inputs), again(**inputs)
        # Not bit by bit: some kernels add in another order where weights lie at another address.
        torch.testing.assert_close(ours.exit_logits, theirs.exit_logits, atol=1e-6, rtol=1e-5, equal_nan=True)
        assert torch.equal(ours.exit_index, theirs.exit_index)
        assert again.config.exit_thresholds == [0.5, None]
        assert not again._exits_are_untrained


def test_mixed_members_load_in_any_type_and_attention(tmp_path):
    model, inputs = mixed_cascade(), tiny.batch()
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [member.config._attn_implementation for member in again.members] == ["sdpa", "eager", "sdpa"]
    eager = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert {member.config._attn_implementation for member in eager.members} == {"eager"}
    torch.testing.assert_close(eager(**inputs).exit_logits, model(**inputs).exit_logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="DebertaForSequenceClassification does not support"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="sdpa")
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(**inputs).exit_logits.isfinite().all()


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_no_layer_of_a_member_is_spread_over_two_places(name, tmp_path):
    model, inputs = CASCADES[name], tiny.batch()
    model.save_pretrained(tmp_path / "cascade")
    size = sum(parameter.nbytes for parameter in model.parameters())
    maps = []
    for share in (0.5, 0.7, 0.9):
        spread = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "cascade",
            device_map="auto",
            max_memory={"cpu": int(share * size)},
            offload_folder=tmp_path / "offloaded",
        )
        maps.append(spread.hf_device_map)
        torch.testing.assert_close(spread(**inputs).exit_logits, model(**inputs).exit_logits, atol=1e-5, rtol=1e-4)
    parts = [part for places in maps for part in places]
    assert any(re.search(r"layer\.\d+$", part) for part in parts)
    assert not [part for part in parts if re.search(r"layer\.\d+\.", part)]


def test_members_keep_in_float32_what_they_would_alone(tmp_path):
    sizes = {"intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    fields = {**architectures.fields("llama"), **sizes}
    stock = [GptOssForSequenceClassification(GptOssConfig(**{**fields, "num_hidden_layers": n})) for n in (1, 2)]
    stock[1].save_pretrained(tmp_path / "stock")
    CascadeForSequenceClassification.from_models(stock).save_pretrained(tmp_path / "cascade")
    alone, together = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name, dtype=torch.float16)
        for name in ("stock", "cascade")
    )
    expected = {name: parameter.dtype for name, parameter in alone.named_parameters()}
    assert set(expected.values()) == {torch.float16, torch.float32}
    assert {name: parameter.dtype for name, parameter in together.members[1].named_parameters()} == expected


def test_labels_and_fields_can_be_changed_at_loading(tmp_path):
    CASCADES["bert"].save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path, id2label={0: "x", 1: "y", 2: "z"}, exit_thresholds=0.5)
    assert model.config.exit_thresholds == [0.5, 0.5]
    assert [member.config.id2label[2] for member in model.members] == ["z"] * 3
    other = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other(**tiny.batch()).exit_logits.shape == (6, 3, 5)
    assert other._exits_are_untrained


def test_missing_weights_are_initialised(tmp_path):
    CASCADES["mixed"].save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "embeddings" in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == weights.keys() - kept.keys()
    assert all(parameter.isfinite().all() and parameter.abs().max() < 3 for parameter in model.parameters())
    assert model._exits_are_untrained


def test_damaged_weights_are_named(tmp_path):
    CASCADES["bert"].save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(OSError, match=r"model.safetensors\) are truncated or damaged"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_configuration_survives_json():
    config = CASCADES["mixed"].config
    again = CascadeConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert CascadeConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert not {"exit_routing", "exit_pooling", "constant_heads"} & config.to_dict().keys()


def test_a_pad_token_can_be_set_later(tmp_path):
    models = [architectures.stock("llama", num_hidden_layers=depth, pad_token_id=None) for depth in (1, 2)]
    model, inputs = CascadeForSequenceClassification.from_models(models), tiny.batch()
    with pytest.raises(ValueError, match="no padding token"):
        model(**inputs)
    model.config.pad_token_id = tiny.PAD
    expected = model(**inputs).exit_logits
    model.save_pretrained(tmp_path)
    tiny.assert_alike(AutoModelForSequenceClassification.from_pretrained(tmp_path)(**inputs).exit_logits, expected)


ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
path, repository, again = sys.argv[1:4]
texts, thresholds = json.loads(sys.argv[4])
model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    outputs = [model(**inputs), model(**inputs, exit_thresholds=thresholds)]
    staged = model.predict([tokenizer(text) for text in texts], batch_size=3, exit_thresholds=thresholds)
model.save_pretrained(again)
downloaded = AutoModelForSequenceClassification.from_pretrained(repository, trust_remote_code=True)
with torch.no_grad():
    outputs.append(downloaded(**inputs))
classify = pipeline("text-classification", model=again, tokenizer=tokenizer, trust_remote_code=True)
print(json.dumps({
    "class": f"{type(model).__module__}.{type(model).__name__}",
    "logits": [output.exit_logits.nan_to_num(7).double().tolist() for output in outputs],
    "exits": [outputs[1].exit_index.tolist(), staged.exit_index.tolist()],
    "pipeline": classify(texts, batch_size=5),
}))
"""


def test_works_where_the_package_is_not_installed(tmp_path):
    model, texts = CASCADES["mixed"], tiny.sentences(12)
    inputs = tiny.tokenizer()(texts, padding=True, return_tensors="pt")
    thresholds = thresholds_between(model, inputs)
    with torch.no_grad():
        everything, early = model(**inputs), model(**inputs, exit_thresholds=thresholds)
    model.save_pretrained(tmp_path / "cascade")
    tiny.tokenizer().save_pretrained(tmp_path / "cascade")
    fresh_process.put_into_hub_cache(tmp_path / "cascade", tmp_path / "home", "someone/cascade")
    job = [tmp_path / "cascade", "someone/cascade", tmp_path / "again", json.dumps([texts, thresholds])]
    printed = fresh_process.run(ELSEWHERE, *job, folder=tmp_path, HF_HUB_OFFLINE="1")
    found = json.loads(printed.strip().splitlines()[-1])
    for answered, outputs in zip(found["logits"], (everything, early, everything), strict=True):
        tiny.assert_alike(torch.tensor(answered), outputs.exit_logits.nan_to_num(7))
    assert found["exits"] == [early.exit_index.tolist()] * 2
    assert len(set(early.exit_index.tolist())) > 1
    assert found["class"].startswith("transformers_modules.")
    expected = [model.config.id2label[index] for index in everything.logits.argmax(dim=-1).tolist()]
    assert [answer["label"] for answer in found["pipeline"]] == expected
    saved, own = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "cascade"))
    assert saved == own
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "cascade")]
    assert weights[0] == weights[1]


# Training, evaluation, calibration


def test_trains_and_is_reported_like_exits(tmp_path):
    model = cascade(num_labels=2)
    trainer = ExitsTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            max_steps=8,
            learning_rate=1e-2,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert {"eval_layer_1_accuracy", "eval_layer_2_accuracy", "eval_accuracy"} <= set(after)
    assert trainer.report.costs == [0.25, 0.75, 1.75]
    card = (tmp_path / "README.md").read_text()
    assert "independent models" in card
    assert "each model's own" in card


def test_loss_is_the_sum_of_the_members_losses():
    model, inputs, labels = CASCADES["bert"], tiny.batch(), tiny.labels()
    alone = sum(member(**inputs, labels=labels).loss for member in model.members)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, alone)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    def trained(batch_size, steps):
        model = cascade(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            save_strategy="no",
        )
        collator = DataCollatorWithPadding(tiny.tokenizer())
        Trainer(model=model, args=args, train_dataset=dataset(8), data_collator=collator).train()
        return model.state_dict()

    whole, accumulated = trained(8, 1), trained(2, 4)
    for name, tensor in whole.items():
        torch.testing.assert_close(accumulated[name], tensor, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_reaches_the_members():
    model = cascade(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs, labels = tiny.batch(), tiny.labels()
    model(**inputs, labels=labels).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(member.base_model.encoder.layer[0].gradient_checkpointing for member in model.members)
    model(**inputs, labels=labels).loss.backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients))


@pytest.mark.parametrize(
    ("kind", "num_labels", "labels"),
    [
        ("regression", 1, torch.rand(6)),
        ("multi_label_classification", 3, torch.rand(6, 3).round()),
        ("single_label_classification", 3, tiny.labels()),
    ],
)
def test_every_kind_of_problem(kind, num_labels, labels):
    model, inputs = cascade(num_labels=num_labels, problem_type=kind), tiny.batch()
    assert model.config.problem_type == kind
    alone = sum(member(**inputs, labels=labels).loss for member in model.members)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, alone)


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "patience"])
@tiny.on_few_rows
def test_calibrated_and_evaluated(criterion):
    model = cascade(num_labels=2)
    model.config.exit_criterion = criterion
    report = calibrate_exits(model, dataset(60), target_cost=1.0, show_progress=False)
    assert report.choice.measured.mean_cost <= 1.0
    other = Dataset.from_dict(dataset(40).to_dict()).select(range(30, 40))
    evaluated = evaluate_exits(model, other, timed_examples=4, show_progress=False)
    assert evaluated.costs == [0.25, 0.75, 1.75]
    assert all(0.25 <= point.cost <= 1.75 for point in evaluated.curve)


# Bad input


def plain(name="bert", depth=4, **fields):
    return tiny.plain_model(name, num_hidden_layers=depth, **fields)


def shared():
    model = plain()
    return [model, model]


NAMED, OTHERS = ({0: "x", 1: "y", 2: "z"}, {0: "z", 1: "y", 2: "x"})


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (list, "at least one member"),
        (lambda: [plain(), "bert"], "stock sequence classifier, got a str"),
        (lambda: [tiny.plain_model("bert", "Model")], "stock sequence classifier, got a BertModel"),
        (lambda: [tiny.model("bert")], "stock sequence classifier, got a BertForSequenceClassificationWithExits"),
        (lambda: [CASCADES["bert"]], "stock sequence classifier, got a CascadeForSequenceClassification"),
        (lambda: [plain(id2label=NAMED), plain(id2label=OTHERS)], f"same id2label, got {NAMED} .* and {OTHERS}"),
        (lambda: [plain(num_labels=2), plain()], "same id2label"),
        (lambda: [plain(), plain(vocab_size=70)], r"same vocab_size, got 64 in members\[0\] and 70 in members\[1\]"),
        (lambda: [plain(), plain(pad_token_id=3)], "same pad_token_id, got 1 .* and 3"),
        (
            lambda: [plain(), plain(problem_type="regression"), plain(problem_type="multi_label_classification")],
            "prob",
        ),
        (lambda: [plain(), plain(depth=1)], r"fewest layers to the one of the most, got \[4, 1\]"),
        (lambda: [plain(depth=1), plain().to(torch.bfloat16)], "one dtype.*float32.*bfloat16"),
        (shared, "members 0 and 1 share weights"),
    ],
)
def test_bad_members(models, message):
    with pytest.raises(ValueError, match=message):
        CascadeForSequenceClassification.from_models(models())


def test_members_may_leave_open_what_the_tokenizer_says():
    models = [plain(depth=1, eos_token_id=None), plain(problem_type="single_label_classification")]
    config = CascadeForSequenceClassification.from_models(models).config
    assert config.problem_type == "single_label_classification"
    assert [member["eos_token_id"] for member in config.members] == [None, 2]


def test_members_of_equal_depth():
    model = CascadeForSequenceClassification.from_models([plain(depth=2), plain("roberta", depth=2)])
    assert model.config.exit_layers == [2, 2]
    assert model.config.exit_costs == [1.0, 2.0]
    assert model(**tiny.batch(), exit_at=2).exit_index.tolist() == [0] * 6


def test_bad_depths(tmp_path):
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path)
    make = CascadeForSequenceClassification.from_backbone
    for depths in ([1, 9], [2, 1], [0, 4], []):
        with pytest.raises(ValueError, match="depths="):
            make(tmp_path, depths=depths)
    assert make(tmp_path, depths=[1, 2]).config.exit_layers == [1, 2]


def test_groups_of_albert_cannot_be_cut(tmp_path):
    architectures.stock("albert", num_hidden_groups=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_hidden_groups=2"):
        CascadeForSequenceClassification.from_backbone(tmp_path, depths=[1, 4], num_labels=3)


def test_unsupported_checkpoints(tmp_path):
    tiny.plain_model("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"model_type='bert', not a cascade. Use .*from_backbone"):
        CascadeForSequenceClassification.from_pretrained(tmp_path / "plain")
    CASCADES["bert"].save_pretrained(tmp_path / "cascade")
    with pytest.raises(ValueError, match=r"model_type='cascade'.*supported are albert, bert"):
        CascadeForSequenceClassification.from_backbone(tmp_path / "cascade", depths=[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_criterion": "learned"}, "'learned' is not there .* Use one of 'confidence', 'entropy', 'patience'"),
        ({"exit_thresholds": [0.5]}, "must have 2 entries"),
        ({"exit_thresholds": 1.5}, "probability from 0 to 1"),
        ({"exit_temperatures": [1.0, 0.0, 1.0]}, r"exit_temperatures\[1\]"),
        ({"exit_loss_weights": [1.0]}, "list of 3 numbers"),
        ({"exit_layers": [1, 2, 6]}, r"exit_layers=\[1, 2, 6\] do not fit the members, which have \[1, 2, 4\]"),
        ({"exit_routing": "sweet"}, "unknown configuration field 'exit_routing'"),
        ({"constant_heads": [[0, 0]]}, "unknown configuration field 'constant_heads'"),
        ({"members": ["bert"]}, r"members\[0\] must be a configuration as a dict"),
        ({"members": [{"hidden_size": 4}]}, r"members\[0\] must be a configuration as a dict with a model_type"),
        ({"members": [{"model_type": "t5"}]}, r"members\[0\], of model_type='t5', has not one stack"),
        (
            {"members": [tiny.config().to_dict()]},
            r"members\[0\], of model_type='bert-with-exits', leaves early itself",
        ),
        ({"members": [plain().config.to_dict()], "num_labels": 5}, "cascade has 5 labels, but its members have 3"),
    ],
)
def test_bad_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        CascadeConfig(**{"members": CASCADES["bert"].config.members, **fields})


def test_bad_input():
    with pytest.raises(ValueError, match="empty"):
        CASCADES["bert"](torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one member"):
        CascadeForSequenceClassification(CascadeConfig())
    with pytest.raises(ValueError, match="labels must lie between 0 and 2"):
        CASCADES["bert"](**tiny.batch(), labels=torch.full((6,), 3))


def test_every_member_is_resized_and_saved_so(tmp_path):
    model = cascade()
    model.resize_token_embeddings(tiny.VOCABULARY + 6)
    model.save_pretrained(tmp_path)
    loaded = CascadeForSequenceClassification.from_pretrained(tmp_path)
    assert [member.config.vocab_size for member in loaded.members] == [tiny.VOCABULARY + 6] * 3
    inputs = {"input_ids": torch.full((1, 3), tiny.VOCABULARY + 5)}
    torch.testing.assert_close(loaded(**inputs).exit_logits, model.eval()(**inputs).exit_logits)


def test_the_vocabulary_is_that_of_the_members(tmp_path):
    model = cascade()
    assert model.config.vocab_size == tiny.VOCABULARY
    model.resize_token_embeddings(tiny.VOCABULARY + 6)
    assert model.config.vocab_size == tiny.VOCABULARY + 6
    model.save_pretrained(tmp_path)
    assert "vocab_size" not in json.loads((tmp_path / "config.json").read_text())
    assert CascadeConfig.from_pretrained(tmp_path).vocab_size == tiny.VOCABULARY + 6
    with pytest.raises(ValueError, match=r"vocab_size=99 .* its members have it, 70.*resize_token_embeddings"):
        CascadeForSequenceClassification.from_pretrained(tmp_path, vocab_size=99)
    assert CascadeConfig().vocab_size is None


def test_members_that_were_resized_one_by_one(tmp_path):
    model = cascade()
    for member in model.members[:2]:
        member.resize_token_embeddings(tiny.VOCABULARY + 6)
    with pytest.raises(ValueError, match=r"same vocab_size, got 70 in .* and 64"):
        model.save_pretrained(tmp_path)
    model.members[2].resize_token_embeddings(tiny.VOCABULARY + 6)
    model.save_pretrained(tmp_path)
    assert CascadeForSequenceClassification.from_pretrained(tmp_path).members[0].config.vocab_size == 70


def test_noise_on_embeddings_reaches_every_member():
    model, inputs = cascade(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tiny.batch()
    labels = torch.zeros(6, dtype=torch.long)
    model.train()
    before = model(**inputs, labels=labels).exit_logits
    handle = activate_neftune(model, 5.0)
    noisy = model(**inputs, labels=labels).exit_logits
    deactivate_neftune(model, handle)
    assert (noisy - before).abs().amax(dim=(0, 2)).min() > 1e-3
    torch.testing.assert_close(model(**inputs, labels=labels).exit_logits, before)
    assert not any(hasattr(member.get_input_embeddings(), "neftune_noise_alpha") for member in model.members)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_only_members_have_is_refused(name):
    model = cascade()
    with pytest.raises(ValueError, match=rf"{name}=True is not there for a cascade.*cascade\.members\[0\]"):
        model(**tiny.batch(), **{name: True})
    model(**tiny.batch(), **{name: False})
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name}=True is not there"):
        model(**tiny.batch())


def test_one_table_for_all_members_is_refused():
    model = cascade()
    states = model.members[0].get_input_embeddings()(tiny.batch()["input_ids"])
    with pytest.raises(ValueError, match=r"inputs_embeds cannot be given to a cascade.*Give input_ids"):
        model(inputs_embeds=states)
    with pytest.raises(ValueError, match="share no weights"):
        model.set_input_embeddings(model.members[0].get_input_embeddings())
