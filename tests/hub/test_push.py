"""Cards on the Hub: ours where there is none, and never over one that somebody wrote."""

import json
from pathlib import Path

import pytest

import hf_adaptive
from tests import tiny
from tests.hub.test_model_card import REPORT, snippets
from tests.hub_server import served_hub  # noqa: F401

PACKAGE = str(Path(hf_adaptive.__file__).parents[1])
OWN = "---\n# a note in the metadata\nlicense: mit\n---\n\nMy own words.\n"

# Pushes to repositories of which some have a card; what is pushed where is said by the names.
SCRIPT = """
import json, sys
from pathlib import Path
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from hf_adaptive import AutoModelForSequenceClassificationWithExits, ExitReport
from hf_adaptive.hub import card_on_hub, keep_card_of_hub, model_card, push_model_card

folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassificationWithExits.from_pretrained(folder)
report = ExitReport.from_json(folder / "exit_report.json")

def push(name, **options):
    model.push_to_hub(name, **options)

push("empty")
push("own")
push("own-tagged", tags=["mine"])
push("branch", revision="side")
push("request", create_pr=True)
tokenizer.push_to_hub("tokenizer-first")
push("tokenizer-first")
push("tokenizer-last")
tokenizer.push_to_hub("tokenizer-last")

found = {"cards": {}, "kept": {}}
numbers = model_card(model, report, repo_id="someone/tokenizer-last", dataset_name="stanfordnlp/sst2")
for name in ("tokenizer-last", "own", "new"):
    found["cards"][name] = push_model_card(numbers, name, plot=folder / "exits.png") is not None
found["cards"]["overwritten"] = push_model_card(numbers, "overwritten", overwrite=True) is not None
found["none"] = card_on_hub("someone/bare")
for place in ("fresh", "ours", "mine"):
    Path(place).mkdir()
model_card(model).save("ours/README.md")
Path("mine/README.md").write_text("Words in my folder.")
for place in ("fresh", "ours", "mine"):
    found["kept"][place] = keep_card_of_hub("someone/own", place), Path(place, "README.md").read_text()
found["kept"]["ours on the hub"] = keep_card_of_hub("someone/new", "fresh2"), Path("fresh2").exists()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(hub_server, tmp_path_factory):
    """What a process found that pushed with the package, and the server after it."""
    folder = tmp_path_factory.mktemp("pushed")
    tiny.model("bert", exit_thresholds=[0.9, 0.9]).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    REPORT.to_json(folder / "model" / "exit_report.json")
    REPORT.plot(folder / "model" / "exits.png")
    for name in ("own", "own-tagged", "overwritten", "branch"):
        hub_server.write(f"someone/{name}", "README.md", OWN.encode())
    hub_server.write("someone/bare", "a.txt", b"")
    return json.loads(hub_server.run(SCRIPT, folder / "home", folder / "model", PYTHONPATH=PACKAGE)), hub_server


def card(server, name, revision="main"):
    return server.read(f"someone/{name}", "README.md", revision).decode()


def test_a_repository_without_a_card_gets_ours(pushed):
    _, server = pushed
    assert "## The exits" in card(server, "empty")
    assert 'from_pretrained("someone/empty", trust_remote_code=True)' in card(server, "empty")
    assert {"model.safetensors", "config.json", "exits.py"} <= set(server.files("someone/empty"))
    assert len(server.titles("someone/empty")) == 2  # it came with the model, in one commit


def test_what_the_card_says_to_run_without_the_package_runs(pushed, tmp_path):
    _, server = pushed
    code = [part for part in snippets(card(server, "tokenizer-last")) if "import hf_adaptive" not in part]
    tell = "print(outputs.exit_index.tolist(), type(model).__module__, model.config.exit_thresholds)"
    said = server.run("\n".join([*code, tell]), tmp_path / "home")
    assert len(code) == 3
    assert "transformers_modules.someone.tokenizer" in said
    assert said.endswith(" [0.9, 0.9]\n")


def test_a_card_that_is_there_is_not_touched(pushed):
    _, server = pushed
    assert "model.safetensors" in server.files("someone/own")
    assert card(server, "own") == OWN
    assert card(server, "branch", "side") == OWN


def test_only_tags_that_were_asked_for_are_added(pushed):
    _, server = pushed
    assert "tags:\n- mine\n" in card(server, "own-tagged")
    assert "My own words." in card(server, "own-tagged")


def test_a_pull_request_has_the_card_and_main_has_nothing(pushed):
    _, server = pushed
    assert "## The exits" in card(server, "request", "refs/pr/1")
    assert server.files("someone/request") == [".gitattributes"]


def test_the_empty_form_of_a_tokenizer_is_no_card(pushed):
    _, server = pushed
    assert "## The exits" in card(server, "tokenizer-first")


def test_a_card_of_ours_gets_its_numbers_later(pushed):
    found, server = pushed
    assert found["cards"]["tokenizer-last"]
    assert "## Speed and accuracy" in card(server, "tokenizer-last")
    assert server.read("someone/tokenizer-last", "exits.png")[:4] == b"\x89PNG"
    assert "model.safetensors" in server.files("someone/tokenizer-last")


def test_a_card_is_pushed_over_somebodys_only_when_asked(pushed):
    found, server = pushed
    assert found["cards"] == {"tokenizer-last": True, "own": False, "new": True, "overwritten": True}
    assert card(server, "own") == OWN
    assert "## The exits" in card(server, "overwritten")


def test_a_folder_to_be_pushed_takes_over_the_card_of_the_hub(pushed):
    found, _ = pushed
    assert found["none"] is None
    assert found["kept"]["fresh"] == [True, OWN]
    assert found["kept"]["ours"] == [True, OWN]
    assert found["kept"]["mine"] == [False, "Words in my folder."]
    assert found["kept"]["ours on the hub"] == [False, False]
