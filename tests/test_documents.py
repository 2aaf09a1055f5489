"""The commands that the documents name are there, with their flags, and links inside the project lead somewhere."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md"]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


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
    code = script.read_text(encoding="utf-8")
    flags = {word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")}
    if flags:
        shown = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
        # A script may hand on what it does not know itself to `TrainingArguments`.
        handed_on = [f"--{one.name}" for one in fields(TrainingArguments)] if "TrainingArguments" in code else []
        missing = sorted(flag for flag in flags if flag not in shown.stdout and flag not in handed_on)
        assert not missing, f"{script.name} has no {missing}"


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "model_cards" / "README.md"])
def test_links_inside_the_project_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
