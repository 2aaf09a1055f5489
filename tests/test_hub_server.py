"""The Hub server of the tests, with the real client and stock models, so that failures elsewhere are not its own."""

import json

import pytest
import torch

from tests import tiny
from tests.hub_server import metadata_errors, served_hub  # noqa: F401

CLIENT = """
import json, os, sys
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

api, name, found = HfApi(), "someone/files", {}
found["user"] = api.whoami()["name"]
found["created"] = [api.create_repo("files", exist_ok=True).repo_id, api.create_repo(name, exist_ok=True).repo_id]
for path, content in {"a.txt": b"one", "below/b.txt": b"two", "w.safetensors": b"w" * 70_000, "e.bin": b""}.items():
    os.makedirs(os.path.dirname(os.path.join("folder", path)), exist_ok=True)
    open(os.path.join("folder", path), "wb").write(content)
first = api.upload_folder(folder_path="folder", repo_id=name).oid
found["nothing new is no commit"] = api.upload_folder(folder_path="folder", repo_id=name).oid == first
second = api.upload_file(path_or_fileobj=b"changed", path_in_repo="a.txt", repo_id=name).oid
found["main"] = open(os.path.join(snapshot_download(name), "a.txt")).read()
old = snapshot_download(name, revision=first)
found["old"] = open(os.path.join(old, "a.txt")).read()
walk = [os.path.join(place, file) for place, _, files in os.walk(old) for file in files]
found["files"] = sorted(os.path.relpath(path, old) for path in walk)
found["large"] = os.path.getsize(os.path.join(old, "w.safetensors"))
request = api.upload_file(path_or_fileobj=b"3", path_in_repo="c.txt", repo_id=name, create_pr=True)
places = [(name, "a.txt"), (name, "c.txt"), ("someone/nothing", "a.txt")]
found["exists"] = [api.file_exists(*place) for place in places]
found["exists in the request"] = api.file_exists(name, "c.txt", revision=request.pr_revision)
api.create_branch(name, branch="a/b", exist_ok=True)
api.create_tag(name, tag="v1", revision=first)
refs = api.list_repo_refs(name, include_pull_requests=True)
found["refs"] = {ref.name: ref.target_commit == first for ref in [*refs.branches, *refs.tags, *refs.pull_requests]}
found["tree"] = [entry.path for entry in api.list_repo_tree(name)]
ModelCard("---\\nlicense: mit\\n---\\nwords").push_to_hub(name)
found["card"] = ModelCard.load(name).data.license
api.delete_file("a.txt", name)
found["titles"] = [commit.title for commit in api.list_repo_commits(name)]
failures = {
    "repository": lambda: api.model_info("someone/nothing"),
    "revision": lambda: api.model_info(name, revision="nothing"),
    "entry": lambda: api.hf_hub_download(name, "nothing"),
    "others": lambda: api.create_repo("others/files"),
    "token": lambda: HfApi(token="hf_wrong").upload_file(path_or_fileobj=b"1", path_in_repo="d.txt", repo_id=name),
    "parent": lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="d", repo_id=name, parent_commit=first),
    "metadata": lambda: ModelCard("---\\nbase_model: /a/b\\n---\\n").push_to_hub(name),
}
for what, call in failures.items():
    try:
        call()
    except (EntryNotFoundError, HfHubHTTPError, ValueError) as error:
        found[what] = type(error).__name__
print(json.dumps(found))
"""

CODE = '''
"""A model of one's own, with code in two files."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .scaling import scale


class ScaledConfig(PreTrainedConfig):
    model_type = "scaled"
    factor: float = 2.0


class ScaledModel(PreTrainedModel):
    config_class = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.post_init()

    def forward(self, input_ids):
        return scale(self.weight, self.config.factor) * input_ids
'''

PUSH = """
import os, sys, torch, transformers
from transformers import AutoTokenizer, Trainer, TrainingArguments
sys.path.insert(0, os.getcwd())

folder = sys.argv[1]
model = transformers.BertForSequenceClassification.from_pretrained(folder)
model.push_to_hub("stock")
AutoTokenizer.from_pretrained(folder).push_to_hub("stock")

from own.modeling_scaled import ScaledConfig, ScaledModel
ScaledConfig.register_for_auto_class()
ScaledModel.register_for_auto_class("AutoModel")
ScaledModel(ScaledConfig(factor=3.0)).push_to_hub("scaled")

arguments = TrainingArguments(
    "trained", max_steps=1, use_cpu=True, report_to=[], hub_model_id="someone/trained", push_to_hub=True
)
data = [{"input_ids": [0, 5, 2], "labels": 1}] * 4
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
trainer.push_to_hub()
"""

LOAD = """
import json, torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

name = "someone/stock"
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
with torch.no_grad():
    found = {"logits": model(**tokenizer("good film", return_tensors="pt")).logits.tolist()}
found["pipeline"] = len(pipeline("text-classification", model=name)(["good", "bad film"], batch_size=2))
scaled = AutoModel.from_pretrained("someone/scaled", trust_remote_code=True)
found["scaled"] = scaled(torch.tensor([1.0, 2.0, 3.0])).tolist()
found["trained"] = type(AutoModelForSequenceClassification.from_pretrained("someone/trained")).__name__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def client(hub_server, tmp_path_factory):
    """What the client found, and the server after it."""
    return json.loads(hub_server.run(CLIENT, tmp_path_factory.mktemp("client"))), hub_server


@pytest.fixture(scope="module")
def models(hub_server, tmp_path_factory):
    """A stock model, what a process found that loaded it and others, and the server they went through."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.plain_model("bert")
    model.save_pretrained(folder / "stock")
    tiny.tokenizer().save_pretrained(folder / "stock")
    (folder / "first" / "own").mkdir(parents=True)
    (folder / "first" / "own" / "modeling_scaled.py").write_text(CODE)
    (folder / "first" / "own" / "scaling.py").write_text("def scale(weight, factor):\n    return weight * factor\n")
    hub_server.run(PUSH, folder / "first", folder / "stock")
    return model, json.loads(hub_server.run(LOAD, folder / "second")), hub_server


def test_every_commit_can_be_read(client):
    found, server = client
    assert found["created"] == ["someone/files", "someone/files"]
    assert found["nothing new is no commit"]
    assert (found["main"], found["old"]) == ("changed", "one")
    assert found["files"] == [".gitattributes", "a.txt", "below/b.txt", "e.bin", "w.safetensors"]
    assert found["large"] == 70_000
    assert found["titles"][0] == "Delete a.txt with huggingface_hub"
    assert "a.txt" not in server.files("someone/files")
    assert server.read("someone/files", "a.txt", revision="v1") == b"one"


def test_branches_tags_and_pull_requests(client):
    found, server = client
    assert found["refs"] == {"main": False, "a/b": False, "v1": True, "refs/pr/1": False}
    assert found["tree"] == ["below", ".gitattributes", "a.txt", "e.bin", "w.safetensors"]
    assert found["exists"] == [True, False, False]
    assert found["exists in the request"]
    assert server.read("someone/files", "c.txt", revision="refs/pr/1") == b"3"


def test_refusals_are_the_errors_of_the_client(client):
    found, server = client
    assert found["user"] == "someone"
    assert found["card"] == "mit"
    assert {name: found[name] for name in ("repository", "revision", "entry", "metadata")} == {
        "repository": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "metadata": "ValueError",
    }
    assert found["others"] == found["token"] == found["parent"] == "HfHubHTTPError"
    assert "d.txt" not in server.files("someone/files")


def test_a_pushed_model_loads_in_another_process(models):
    model, found, server = models
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(server.files("someone/stock"))
    inputs = tiny.tokenizer()("good film", return_tensors="pt")
    # Another process may compute with other kernels.
    torch.testing.assert_close(torch.tensor(found["logits"]), model(**inputs).logits.detach(), atol=1e-5, rtol=1e-5)
    assert found["pipeline"] == 2


def test_code_travels_with_a_model(models):
    _, found, server = models
    assert {"modeling_scaled.py", "scaling.py"} <= set(server.files("someone/scaled"))
    assert found["scaled"] == [3.0, 6.0, 9.0]


def test_a_trainer_pushes(models):
    _, found, server = models
    assert found["trained"] == "BertForSequenceClassification"
    assert {"model.safetensors", "README.md", "training_args.bin"} <= set(server.files("someone/trained"))


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: [mit", "not valid YAML"),
        ("- a\n- b", "must be an object"),
        ("license: 3", '"license" must be a string'),
        ("tags: [1]", '"tags" must be an array'),
        ("base_model: /home/me/model", "is not valid"),
        ("model-index:\n- name: a\n  results:\n  - task: {}", "task.type"),
        (
            "model-index:\n- name: a\n  results:\n  - task: {type: t}\n    dataset: {name: n, type: d}\n"
            "    metrics: [{type: accuracy, value: .nan}]",
            "finite value",
        ),
    ],
)
def test_metadata_that_the_hub_refuses(metadata, error):
    assert error in " ".join(metadata_errors(f"---\n{metadata}\n---\nwords"))


@pytest.mark.parametrize("card", ["no metadata", "---\n---\nempty", "---\nlicense: mit\ntags: [a]\n---\nwords"])
def test_metadata_that_the_hub_takes(card):
    assert metadata_errors(card) == []
