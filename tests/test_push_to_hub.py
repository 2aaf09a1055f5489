"""Sharing through the real client of the Hub, against a server on loopback."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.hub_server import served_hub  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
INPUTS = tiny.batch(rows=4)
OWN = b"---\nlicense: mit\n---\n\nMy own words.\n"

LOAD = """
import sys
sys.modules["hf_adaptive"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).exit_logits}, sys.argv[3])
"""
PUSH = """
import sys
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainingArguments
from hf_adaptive import AutoModelForSequenceClassificationWithExits, ExitsTrainer
from tests import tiny

saved, out = sys.argv[1:]
for name in ("someone/pushed", "someone/with-own-card"):
    AutoModelForSequenceClassificationWithExits.from_pretrained(saved).push_to_hub(name)

texts = tiny.sentences(8)
data = Dataset.from_dict({**tiny.tokenizer()(texts), "label": [i % 3 for i in range(8)]})
collator = DataCollatorWithPadding(tiny.tokenizer())
for name in ("someone/trained", "someone/kept"):
    arguments = TrainingArguments(
        output_dir=f"{out}/{name}", hub_model_id=name, report_to="none", use_cpu=True, max_steps=1,
        save_strategy="no", disable_tqdm=True,
    )
    trainer = ExitsTrainer(tiny.model("bert"), arguments, collator, data, data, processing_class=tiny.tokenizer())
    trainer.train()
    trainer.push_to_hub(dataset="someone/some-data")
"""


@pytest.fixture(scope="module")
def pushed(hub_server, tmp_path_factory):
    """The server after a process with the package pushed to it; two of the repositories had a card before."""
    folder = tmp_path_factory.mktemp("pushed")
    tiny.model("bert").save_pretrained(folder / "saved")
    hub_server.write("someone/with-own-card", "README.md", OWN)
    hub_server.write("someone/kept", "README.md", OWN)
    arguments = map(str, (folder / "saved", folder / "out"))
    hub_server.run(PUSH, folder / "home", *arguments, PYTHONPATH=f"{ROOT / 'src'}:{ROOT}")
    return hub_server


def test_code_weights_configuration_and_card_arrive(pushed):
    files = set(pushed.files("someone/pushed"))
    assert {"config.json", "model.safetensors", "README.md", "architectures.py", "exits.py", "layers.py"} <= files
    card = pushed.read("someone/pushed", "README.md").decode()
    assert "early-exit" in card
    assert "exits after layers | 1, 2, 4" in card
    config = json.loads(pushed.read("someone/pushed", "config.json"))
    assert config["auto_map"]["AutoConfig"] == "architectures.BertWithExitsConfig"


def test_loads_from_the_hub_without_the_package(pushed, tmp_path):
    save_file(INPUTS, tmp_path / "inputs.safetensors")
    pushed.run(LOAD, tmp_path / "home", "someone/pushed", str(tmp_path / "inputs.safetensors"), str(tmp_path / "out"))
    with torch.no_grad():
        expected = tiny.model("bert")(**INPUTS).exit_logits
    tiny.assert_alike(load_file(tmp_path / "out")["logits"], expected)


def test_a_card_of_ones_own_is_not_overwritten_unasked(pushed):
    assert pushed.read("someone/with-own-card", "README.md") == OWN
    assert "model.safetensors" in pushed.files("someone/with-own-card")


def test_trainer_pushes_the_report_with_the_model(pushed):
    files = set(pushed.files("someone/trained"))
    assert {"model.safetensors", "exits.py", "exits.png", "exit_report.json", "README.md"} <= files
    card = pushed.read("someone/trained", "README.md").decode()
    assert "someone/some-data" in card
    assert 'from_pretrained("someone/trained", trust_remote_code=True)' in card
    report = json.loads(pushed.read("someone/trained", "exit_report.json"))
    assert f"{report['accuracy'][-1]:.4f}" in card


def test_trainer_keeps_a_card_that_is_there(pushed):
    assert pushed.read("someone/kept", "README.md") == OWN
    assert "model.safetensors" in pushed.files("someone/kept")
