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

PUSH = """
import sys
import hf_adaptive
model = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(sys.argv[1])
model.push_to_hub(sys.argv[2])
"""
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
TRAIN = """
import sys
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainingArguments
from hf_adaptive import ExitsTrainer
from tests import tiny
texts = tiny.sentences(8)
data = Dataset.from_dict({**tiny.tokenizer()(texts), "label": [i % 3 for i in range(8)]})
arguments = TrainingArguments(
    output_dir=sys.argv[1], hub_model_id=sys.argv[2], report_to="none", use_cpu=True, max_steps=1, save_strategy="no",
    disable_tqdm=True,
)
collator = DataCollatorWithPadding(tiny.tokenizer())
trainer = ExitsTrainer(tiny.model("bert"), arguments, collator, data, data, processing_class=tiny.tokenizer())
trainer.train()
trainer.push_to_hub(dataset="someone/some-data")
"""


def run_with_package(hub, script, home, *arguments):
    return hub.run(script, home, *map(str, arguments), PYTHONPATH=f"{ROOT / 'src'}:{ROOT}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.model("bert").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pushed(hub_server, saved, tmp_path_factory):
    run_with_package(hub_server, PUSH, tmp_path_factory.mktemp("home"), saved, "someone/pushed")
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


def test_a_card_of_ones_own_is_not_overwritten_unasked(pushed, saved, tmp_path):
    own = b"---\nlicense: mit\n---\n\nMy own words.\n"
    pushed.write("someone/pushed", "README.md", own)
    run_with_package(pushed, PUSH, tmp_path / "home", saved, "someone/pushed")
    assert b"My own words." in pushed.read("someone/pushed", "README.md")


def test_trainer_pushes_the_report_with_the_model(hub_server, tmp_path):
    run_with_package(hub_server, TRAIN, tmp_path / "home", tmp_path / "out", "someone/trained")
    files = set(hub_server.files("someone/trained"))
    assert {"model.safetensors", "exits.py", "exits.png", "exit_report.json", "README.md"} <= files
    card = hub_server.read("someone/trained", "README.md").decode()
    assert "someone/some-data" in card
    assert 'from_pretrained("someone/trained", trust_remote_code=True)' in card
    report = json.loads(hub_server.read("someone/trained", "exit_report.json"))
    assert f"{report['accuracy'][-1]:.4f}" in card


def test_trainer_keeps_a_card_that_is_there(hub_server, tmp_path):
    run_with_package(
        hub_server, "from huggingface_hub import create_repo; create_repo('someone/kept')", tmp_path / "home"
    )
    hub_server.write("someone/kept", "README.md", b"Words of somebody.\n")
    run_with_package(hub_server, TRAIN, tmp_path / "home", tmp_path / "out", "someone/kept")
    assert hub_server.read("someone/kept", "README.md") == b"Words of somebody.\n"
    assert "model.safetensors" in hub_server.files("someone/kept")
