"""LoRA adapters of PEFT are saved whole, find their layers, and keep thresholds and card."""

import json

import pytest
import torch
from datasets import Dataset

import hf_adaptive
from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from hf_adaptive import ExitsTrainer, calibrate_exits
from hf_adaptive.hub import model_card
from tests import tiny
from tests.hub.test_model_card import REPORT, snippets
from tests.modeling import architectures
from tests.training.test_trainer import Rows, trainer

peft = pytest.importorskip("peft")


def with_adapter(model, **fields):
    """Changes something at once: both matrices are random."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, **fields)
    return peft.get_peft_model(model, config).eval()


def loaded(path, seed, **fields):
    """In another process new weights start elsewhere."""
    torch.manual_seed(seed)
    return WithExits.from_pretrained(path, num_labels=3, exit_layers=tiny.EXIT_LAYERS, **fields)


def answers(model):
    with torch.no_grad():
        return model(**tiny.batch()).exit_logits


@pytest.fixture
def plain(tmp_path):
    tiny.plain_model("bert", "Model").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("name", architectures.NAMES)
def test_an_adapter_of_the_default_layers_reloads_to_the_same_answers(name, tmp_path):
    architectures.stock(name, "Model").save_pretrained(tmp_path / "plain")
    own = with_adapter(loaded(tmp_path / "plain", 0))
    assert any("lora_A" in key for key, _ in own.named_parameters())
    own.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(tmp_path / "plain", 1), tmp_path / "adapter").eval()
    assert torch.equal(answers(again), answers(own))
    with own.disable_adapter():
        assert not torch.equal(answers(own), answers(again))


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        ({"exit_branch_layers": 1}, None),
        ({"exit_branch_layers": 1}, "all-linear"),
        ({"exit_criterion": "learned"}, ["query", "dense"]),
    ],
)
def test_whole_heads_are_trained_and_saved(fields, targets, plain, tmp_path):
    own = with_adapter(loaded(plain, 0, **fields), target_modules=targets)
    trained = {key for key, parameter in own.named_parameters() if parameter.requires_grad}
    heads = {key for key, _ in own.named_parameters() if ".exits." in key and "original_module" not in key}
    assert heads <= trained
    assert not any("lora" in key for key in heads)
    with torch.no_grad():
        for key, parameter in own.named_parameters():
            if key in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    own.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(plain, 1, **fields), tmp_path / "adapter").eval()
    assert torch.equal(answers(again), answers(own))


def test_the_adapter_names_its_base(plain, tmp_path):
    own = with_adapter(loaded(plain, 0))
    own.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(plain)


def test_a_calibrated_adapter_keeps_its_thresholds(plain, tmp_path):
    own = with_adapter(loaded(plain, 0))
    rows = Dataset.from_list([{"input_ids": ids, "label": 0} for ids in tiny.batch(rows=40)["input_ids"].tolist()])
    calibrate_exits(own, rows, target_cost=0.7, show_progress=False)
    assert own.config.exit_thresholds is not None
    own.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(plain, 1), tmp_path / "adapter").eval()
    for name in ("exit_thresholds", "exit_temperatures", "exit_calibration"):
        assert getattr(again.config, name) == getattr(own.config, name), name
    assert torch.equal(answers(again).nan_to_num(7), answers(own).nan_to_num(7))


def test_an_adapter_of_a_cascade_is_trained_and_reloads_to_the_same_answers(tmp_path):
    own = with_adapter(tiny.cascade(), target_modules=["query", "value"])
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    trainer(own, tmp_path / "run", Rows(), kind=ExitsTrainer, max_steps=2, learning_rate=1e-2).train()
    changed = {key for key, tensor in own.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {".lora_" in key or "modules_to_save" in key for key in changed} == {True}
    for member in range(3):
        heads = [key for key in changed if f"members.{member}.classifier" in key]
        assert len(heads) == 2
        assert any(f"members.{member}." in key and ".lora_" in key for key in changed)
    own.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny.cascade(), tmp_path / "adapter").eval()
    torch.testing.assert_close(answers(again), answers(own))
    with own.disable_adapter():
        assert not torch.equal(answers(own), answers(again))


def test_an_adapter_of_other_exits_is_refused(plain, tmp_path):
    with_adapter(loaded(plain, 0)).save_pretrained(tmp_path / "adapter")
    other = WithExits.from_pretrained(plain, num_labels=3, exit_layers=[1, 3, 4])
    with pytest.raises(ValueError, match=r"was made for exit_layers=\[1, 2, 4\], but the model has \[1, 3, 4\]"):
        peft.PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_stock_models_are_treated_as_before(tmp_path):
    own = with_adapter(tiny.plain_model())
    assert set(own.peft_config["default"].modules_to_save) == {"classifier", "score"}
    own.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert "hf_adaptive" not in (tmp_path / "README.md").read_text()
    again = peft.PeftModel.from_pretrained(tiny.plain_model(), tmp_path)
    assert type(again) is type(own)


def test_the_card_stays_ours_and_its_snippet_loads_the_adapter(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = with_adapter(loaded(plain, 0))
    own.config.exit_thresholds = [0.6, 0.7]
    own.save_pretrained("adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    assert "library_name: peft" in text
    assert "## The exits" in text
    found = {}
    exec(snippets(text)[0], found)
    assert isinstance(found["model"], peft.PeftModel)
    assert found["model"].config.exit_thresholds == [0.6, 0.7]
    assert torch.equal(answers(found["model"]).nan_to_num(7), answers(own).nan_to_num(7))
    card = str(model_card(own, REPORT, repo_id="adapter"))
    (tmp_path / "adapter/README.md").write_text(card)
    own.save_pretrained("adapter")
    assert (tmp_path / "adapter/README.md").read_text() == card


@pytest.mark.parametrize("routing", ["joint", "sweet"])
def test_a_trainer_trains_it_and_reports(routing, plain, tmp_path):
    own = with_adapter(loaded(plain, 0, exit_routing=routing))
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    schedule = hf_adaptive.RoutingSchedule("joint", "sweet")
    arguments = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    run = trainer(own, tmp_path / "run", Rows(), [schedule], kind=ExitsTrainer, **arguments)
    run.train()
    changed = {key for key, tensor in own.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {".lora_" in key or "modules_to_save" in key for key in changed} == {True}
    assert any("layer.0" in key and "lora" in key for key in changed)
    assert "library_name: peft" in (tmp_path / "run/README.md").read_text()
    assert run.report.num_examples == len(Rows())
    again = peft.PeftModel.from_pretrained(loaded(plain, 1), tmp_path / "run/checkpoint-2").eval()
    torch.testing.assert_close(answers(again), answers(own.eval()))
