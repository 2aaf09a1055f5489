"""Checkpoints are written whole or not at all, and carry what a machine without the package needs."""

import contextlib
import json
import os
import resource
import signal
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.modeling_utils

import hf_adaptive
from hf_adaptive import AutoModelForSequenceClassificationWithExits as WithExits
from tests import tiny


def content(folder):
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def same_answers(folder, model, **arguments):
    loaded = WithExits.from_pretrained(folder, **arguments)
    return torch.allclose(loaded(**tiny.batch()).exit_logits, model(**tiny.batch()).exit_logits, atol=2e-6, rtol=1e-5)


@pytest.fixture
def older(tmp_path):
    """A folder with an older checkpoint and files that are none of the model's."""
    folder = tmp_path / "checkpoint"
    tiny.model("roberta").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("Mine.")
    (folder / "model_notes.safetensors.txt").write_text("Mine too.")
    return folder


@contextlib.contextmanager
def unprivileged():
    """Permissions do not hold for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def full_disk(limit):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_writes_weights_configuration_and_code(name, tmp_path):
    model = tiny.model(name)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors"} <= files
    code = files - {"config.json", "model.safetensors"}
    folder = Path(hf_adaptive.modeling.__file__).parent
    assert {"architectures.py", "exits.py", "layers.py", "configuration.py"} <= code
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in code)


def test_configuration_file_says_where_the_classes_are_and_nothing_of_this_machine(name, tmp_path):
    tiny.plain_model(name).save_pretrained(tmp_path / "plain")
    model = WithExits.from_pretrained(tmp_path / "plain", exit_layers=[2, 4], exit_thresholds=[0.9])
    model.save_pretrained(tmp_path / "exits")
    text = (tmp_path / "exits" / "config.json").read_text()
    config = json.loads(text)
    prefix = hf_adaptive.ARCHITECTURES[name].name
    assert config["auto_map"] == {
        "AutoConfig": f"architectures.{prefix}WithExitsConfig",
        "AutoModel": f"architectures.{prefix}WithExitsModel",
        "AutoModelForSequenceClassification": f"architectures.{prefix}ForSequenceClassificationWithExits",
    }
    assert config["model_type"] == f"{name}-with-exits"
    assert config["architectures"] == [f"{prefix}ForSequenceClassificationWithExits"]
    assert (config["exit_layers"], config["exit_thresholds"], config["exit_pooling"]) == ([2, 4], [0.9], "cls")
    assert str(tmp_path) not in text


def test_further_entries_of_the_auto_map_survive(tmp_path):
    model = tiny.model()
    model.config.auto_map = {"AutoTokenizer": ["mine.MyTokenizer", None]}
    model.save_pretrained(tmp_path)
    assert WithExits.from_pretrained(tmp_path).config.auto_map.keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
    }


def test_saving_again_gives_the_same_bytes(tmp_path):
    tiny.model().save_pretrained(tmp_path / "first")
    WithExits.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_other_files_stay_and_no_draft_is_left(older):
    before = content(older)
    model = tiny.model("bert")
    model.save_pretrained(older)
    after = content(older)
    assert before.keys() == after.keys()
    assert {file for file in before if before[file] != after[file]} == {"config.json", "model.safetensors"}
    assert not [path for path in older.iterdir() if path.is_dir()]
    assert same_answers(older, model)


@pytest.mark.parametrize(("first", "second"), [("20KB", "50GB"), ("50GB", "20KB"), ("20KB", "40KB")])
def test_saving_over_an_older_checkpoint_in_another_number_of_files(first, second, tmp_path):
    tiny.model("deberta").save_pretrained(tmp_path, max_shard_size=first)
    model = tiny.model("bert")
    model.save_pretrained(tmp_path, max_shard_size=second)
    assert same_answers(tmp_path, model)
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named


def test_a_variant_lives_beside_the_main_weights(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    half = tiny.model().half()
    half.save_pretrained(tmp_path, variant="fp16")
    assert same_answers(tmp_path, model, dtype=torch.float32)
    assert same_answers(tmp_path, half, variant="fp16", dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert same_answers(tmp_path, half, variant="fp16", dtype=torch.float16)
    assert not (tmp_path / "model.fp16.safetensors").exists()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert same_answers(tmp_path, half, variant="fp16", dtype=torch.float16)
    assert same_answers(tmp_path, model, dtype=torch.float32)


def test_given_weights_are_saved_instead_of_the_model_s(tmp_path):
    model = tiny.model()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.exits[0].classifier.weight.zero_()
    model.save_pretrained(tmp_path, state_dict=state)
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(
        WithExits.from_pretrained(tmp_path).exits[0].classifier.weight, state["exits.0.classifier.weight"]
    )


def test_processes_that_are_not_the_main_one_write_nothing(tmp_path):
    tiny.model().save_pretrained(tmp_path / "checkpoint", is_main_process=False)
    assert not content(tmp_path)


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        tiny.model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_read_only_folder_is_named_and_left_alone():
    model = tiny.model()
    with tempfile.TemporaryDirectory() as folder:
        tiny.model("roberta").save_pretrained(folder)
        before = content(folder)
        os.chmod(folder, 0o555)
        with unprivileged(), pytest.raises(OSError, match="ermission") as error:
            model.save_pretrained(folder)
        with unprivileged(), pytest.raises(OSError, match="ermission"):
            model.save_pretrained(Path(folder) / "new")
        assert folder in str(error.value)
        os.chmod(folder, 0o755)
        assert content(folder) == before


@pytest.mark.parametrize("limit", [0, 1000, 30_000])
def test_full_disk_leaves_the_folder_as_it_was(limit, older):
    before = content(older)
    assert len(before["model.safetensors"]) > 30_000
    with full_disk(limit), pytest.raises(OSError, match="too large") as error:
        tiny.model("bert").save_pretrained(older)
    assert content(older) == before
    assert str(older) in str(error.value)
    assert same_answers(older, tiny.model("roberta"))


def stops_at_second_file(stop):
    """A writer of weights that stops after its first file."""
    write, written = transformers.modeling_utils.safe_save_file, []

    def writer(*args, **kwargs):
        if written:
            stop()
        written.append(write(*args, **kwargs))

    return writer


def test_interrupted_save_leaves_the_folder_as_it_was(older, monkeypatch):
    before = content(older)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", stops_at_second_file(interrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny.model("bert").save_pretrained(older, max_shard_size="20KB")
    assert content(older) == before
    with pytest.raises(KeyboardInterrupt):
        tiny.model("bert").save_pretrained(older.parent / "new", max_shard_size="20KB")
    assert not content(older.parent / "new")


def test_killed_save_leaves_the_older_checkpoint(older, monkeypatch):
    before = content(older)
    model = tiny.model("bert")
    process = os.fork()
    if process == 0:
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        transformers.modeling_utils.safe_save_file = stops_at_second_file(kill)
        try:
            model.save_pretrained(older, max_shard_size="20KB")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    after = content(older)
    assert {file: after[file] for file in before} == before
    assert any(file.startswith(".incomplete-") for file in after)
    assert same_answers(older, tiny.model("roberta"))
    model.save_pretrained(older)
    assert same_answers(older, model)


def test_push_that_fails_comes_after_the_save(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    model = tiny.model()
    with pytest.raises(ConnectionError, match="no network"):
        model.save_pretrained(tmp_path / "checkpoint", push_to_hub=True)
    assert same_answers(tmp_path / "checkpoint", model)
