"""What README and the examples' README say to run, runs: Python blocks on tiny models, commands by their flags."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

import hf_adaptive
from tests import tiny

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md"]
MOST_WORDS = 1400


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Names on the Hub that the documents use, and the folders that stand for them."""
    encoder = tmp_path / "encoder"
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=16,
            num_hidden_layers=12,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=160,
        )
    ).save_pretrained(encoder)
    tiny.tokenizer().save_pretrained(encoder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: tiny_task())
    monkeypatch.setattr(PreTrainedTokenizerBase, "push_to_hub", lambda self, name, **_: self.save_pretrained(name))
    monkeypatch.setattr(hf_adaptive.ExitsMixin, "push_to_hub", lambda self, name, **_: self.save_pretrained(name))
    return {"google-bert/bert-base-uncased": str(encoder), "me/sst2-exits": str(tmp_path / "sst2-exits")}


def tiny_task():
    texts = tiny.sentences(400)
    rows = datasets.Dataset.from_dict({"sentence": texts, "label": [int("good" in text) for text in texts]})
    return datasets.DatasetDict(train=rows, validation=rows.select(range(40)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run_one_after_another(path, names):
    namespace: dict = {}
    for code in blocks(path, "python"):
        for name, folder in names.items():
            code = code.replace(name, folder)
        exec(compile(code, str(path), "exec"), namespace)


def commands():
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if any(word.endswith(".py") for word in words):
                    yield words


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_a_script_and_flags_that_are_there(words):
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[place]
    assert script.exists(), f"there is no {script}"
    flags = {word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")}
    if flags:
        shown = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
        missing = sorted(flag for flag in flags if flag not in shown.stdout)
        assert not missing, f"{script.name} has no {missing}"


def test_readme_is_short():
    prose = re.sub(r"<!-- architectures -->.*<!-- /architectures -->", "", DOCUMENTS[0].read_text(), flags=re.DOTALL)
    assert len(prose.split()) <= MOST_WORDS


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "model_cards" / "README.md"])
def test_links_inside_the_project_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
