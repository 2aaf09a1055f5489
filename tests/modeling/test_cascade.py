"""Multi-model cascades: one checkpoint, rows answered by the first model that is sure."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments

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

DEPTHS = [1, 2, 4]


def cascade(name="bert", **fields):
    models = [tiny.plain_model(name, num_hidden_layers=depth, **fields) for depth in DEPTHS]
    return CascadeForSequenceClassification.from_models(models)


CASCADES = {name: cascade(name) for name in ("bert", "roberta")}


def rows_of(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def dataset(count=24):
    texts = tiny.sentences(count)
    return Dataset.from_dict({**tiny.tokenizer()(texts), "label": [int("good" in text) for text in texts]})


# Answers


@settings(max_examples=20)
@given(
    name=st.sampled_from(sorted(CASCADES)),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=16),
    batch_size=st.integers(1, 7),
    threshold=st.floats(0.34, 0.9),
    seed=st.integers(0, 5),
)
def test_every_row_is_answered_as_by_the_models_themselves(name, lengths, batch_size, threshold, seed):
    model, rows = CASCADES[name], rows_of(lengths, seed)
    with torch.no_grad():
        alone = torch.stack(
            [torch.cat([member(torch.tensor([row["input_ids"]])).logits for member in model.members]) for row in rows]
        )
    confidence = alone.softmax(dim=-1).amax(dim=-1)[:, :-1]
    if (confidence - threshold).abs().min() < 1e-5:
        return
    sure = torch.cat((confidence >= threshold, torch.ones(len(rows), 1, dtype=torch.bool)), dim=1)
    expected = sure.int().argmax(dim=1)
    padded = tiny.tokenizer().pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        together = model(**padded, exit_thresholds=threshold)
    staged = model.predict(rows, batch_size=batch_size, exit_thresholds=threshold, show_progress=False)
    for outputs in (together, staged):
        assert outputs.exit_index.tolist() == expected.tolist()
        taken = alone[torch.arange(len(rows)), expected]
        torch.testing.assert_close(outputs.logits, taken, atol=2e-5, rtol=1e-4)
        reached = torch.arange(len(DEPTHS))[None] <= expected[:, None]
        assert outputs.exit_logits[~reached].isnan().all()


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
        predictions = Answers(logits, chosen).taken.argmax(dim=-1)
        assert predictions.tolist() == golden[f"{key.split('/')[0]}/prediction"].tolist()
        cost = torch.tensor(config.exit_costs, dtype=torch.float64)[chosen].mean().item()
        accuracy = (predictions == golden["labels"]).double().mean().item()
        recorded = _recorded(results, key.split("/")[0])
        assert cost == pytest.approx(recorded["speedup_ratio"], abs=1e-6)
        assert accuracy == pytest.approx(recorded["accuracy"], abs=1e-6)
        compared += 1
    assert compared >= 5


def _recorded(results, threshold):
    """What the reference's code gives for a threshold when it is called as intended."""
    found = []

    def search(value):
        if isinstance(value, dict):
            if threshold in value and "speedup_ratio" in value[threshold]:
                found.append(value[threshold])
            for name, inner in value.items():
                if name != "as_shipped":
                    search(inner)

    search(results)
    return found[0]


# Making


def test_from_backbone_takes_the_first_layers(tmp_path):
    stock = tiny.plain_model("roberta")
    stock.save_pretrained(tmp_path)
    model = CascadeForSequenceClassification.from_backbone(tmp_path, depths=DEPTHS, num_labels=3)
    assert [member.config.num_hidden_layers for member in model.members] == DEPTHS
    for member in model.members:
        own = member.state_dict()
        assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in own.items())
    ours = model(**tiny.batch()).logits
    torch.testing.assert_close(ours, stock(**tiny.batch()).logits)


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
        assert torch.equal(ours.exit_logits.nan_to_num(7), theirs.exit_logits.nan_to_num(7))
        assert torch.equal(ours.exit_index, theirs.exit_index)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_loads_where_the_package_is_not_installed(tmp_path):
    model = CASCADES["bert"]
    model.save_pretrained(tmp_path / "cascade")
    script = (
        "import sys, torch; sys.modules['hf_adaptive'] = None\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'cascade')!r}, "
        "trust_remote_code=True)\n"
        "ids = torch.arange(3, 13)[None]\n"
        "with torch.no_grad():\n"
        "    print(model(ids).exit_logits.flatten().double().tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=fresh_process.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.arange(3, 13)[None]).exit_logits.flatten().double().tolist()
    assert json.loads(done.stdout.strip().splitlines()[-1]) == expected


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
    assert "independent models" in (tmp_path / "README.md").read_text()


def test_loss_is_the_sum_of_the_members_losses():
    model, inputs, labels = CASCADES["bert"], tiny.batch(), tiny.labels()
    alone = sum(member(**inputs, labels=labels).loss for member in model.members)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, alone)


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "patience"])
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


def test_bad_members(tmp_path):
    make = CascadeForSequenceClassification.from_models
    with pytest.raises(ValueError, match="at least one member"):
        make([])
    with pytest.raises(ValueError, match="stock sequence classifier, got a BertModel"):
        make([tiny.plain_model("bert", "Model")])
    with pytest.raises(ValueError, match="same id2label"):
        make([tiny.plain_model("bert"), tiny.plain_model("bert", id2label={0: "x", 1: "y", 2: "z"})])
    with pytest.raises(ValueError, match="same vocab_size"):
        make([tiny.plain_model("bert"), tiny.plain_model("bert", vocab_size=70)])
    with pytest.raises(ValueError, match="fewest layers to the one of the most, got \\[4, 1\\]"):
        make([tiny.plain_model("bert"), tiny.plain_model("bert", num_hidden_layers=1)])


def test_bad_depths(tmp_path):
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path)
    make = CascadeForSequenceClassification.from_backbone
    for depths in ([1, 9], [2, 1], [0, 4], []):
        with pytest.raises(ValueError, match="depths="):
            make(tmp_path, depths=depths)
    assert make(tmp_path, depths=[1, 2]).config.exit_layers == [1, 2]


def test_bad_configuration():
    with pytest.raises(ValueError, match="'learned' is not there for a cascade"):
        CascadeConfig(members=CASCADES["bert"].config.members, exit_criterion="learned")
    with pytest.raises(ValueError, match="must have 2 entries"):
        CascadeConfig(members=CASCADES["bert"].config.members, exit_thresholds=[0.5])
    with pytest.raises(ValueError, match="empty"):
        CASCADES["bert"](torch.zeros(0, 4, dtype=torch.long))
    assert hf_adaptive.CascadeConfig().exit_layers == []
