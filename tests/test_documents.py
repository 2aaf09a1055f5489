"""What the documents show can be run: code, commands with their flags, and links inside the project."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

import hf_adaptive
from tests import tiny

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("examples/**/README.md"))]
MOST_WORDS = 1400
# A tiny encoder of as many layers stands for the one on the Hub.
ENCODER, LAYERS = "google-bert/bert-base-uncased", 12
# As many that a tenth of them suffices for the promise.
ROWS = 5000


@pytest.fixture
def a_reader(tmp_path, monkeypatch):
    """Someone in an empty folder, whose Hub holds a tiny encoder and a tiny data set, and who trains for two steps."""
    monkeypatch.chdir(tmp_path)
    plain = tiny.plain_model("bert", "Model", num_hidden_layers=LAYERS, num_labels=2)
    for each in (plain, tiny.tokenizer()):
        each.save_pretrained(ENCODER)
    columns = {"sentence": tiny.sentences(ROWS), "label": tiny.labels(ROWS, num_labels=2).tolist()}
    train = datasets.Dataset.from_dict(columns)
    splits = datasets.DatasetDict(train=train, validation=train.select(range(50)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    for shared in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(shared, "push_to_hub", lambda self, name: self.save_pretrained(name))
    train_all = hf_adaptive.ExitsTrainer.train

    def train_shortly(trainer):
        trainer.args.max_steps = 2
        return train_all(trainer)

    monkeypatch.setattr(hf_adaptive.ExitsTrainer, "train", train_shortly)


@tiny.on_few_rows
def test_the_code_of_the_readme_runs(a_reader):
    known = {}
    for code in blocks(README, "python"):
        if "onnx" not in code or importlib.util.find_spec("onnxruntime"):
            exec(compile(code, README.name, "exec"), known)
    assert known["model"].config.exit_layers[-1] == LAYERS
    assert len(known["classify"](["good film", "bad"])) == 2


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands():
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if any(word.endswith(".py") for word in words):
                    yield words


def script_and_flags(words):
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[place], {word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")}


HELP = """
import contextlib, io, json, os, runpy, sys, traceback

path, shown = list(sys.path), {}
for script in sys.argv[1:]:
    sys.argv, sys.path, text = [script, "--help"], [os.path.dirname(script), *path], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
    except SystemExit:
        pass
    except Exception:
        traceback.print_exc(file=text)
    shown[script] = text.getvalue()
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def helps():
    """What every script with flags says of itself, in one process, because imports take longest."""
    scripts = {str(script) for script, flags in map(script_and_flags, commands()) if flags and script.exists()}
    done = subprocess.run([sys.executable, "-c", HELP, *sorted(scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_a_script_and_flags_that_are_there(words, request):
    script, flags = script_and_flags(words)
    assert script.exists(), f"there is no {script}"
    code = script.read_text(encoding="utf-8")
    if flags:
        shown = request.getfixturevalue("helps")[str(script)]
        assert "usage:" in shown, shown
        # A script may hand on what it does not know itself to `TrainingArguments`.
        handed_on = [f"--{one.name}" for one in fields(TrainingArguments)] if "TrainingArguments" in code else []
        missing = sorted(flag for flag in flags if flag not in shown and flag not in handed_on)
        assert not missing, f"{script.name} has no {missing}"


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("model_cards/**/*.md"))])
def test_links_inside_the_project_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
