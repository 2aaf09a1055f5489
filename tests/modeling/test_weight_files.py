"""Nothing is unpickled, whatever the files of a checkpoint or its user ask for."""

import json

import pytest
import torch

from hf_adaptive import AutoModelForSequenceClassificationWithExits as AutoWithExits
from hf_adaptive import CascadeForSequenceClassification, PapaBertForSequenceClassification
from tests import tiny

PICKLED = "(?s)safetensors.*can run code when it is read"


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    """Anything unpickled fails the test."""

    def load(*_, **__):
        pytest.fail("torch.load was called")

    monkeypatch.setattr(torch, "load", load)


def plain(path, **arguments):
    return AutoWithExits.from_pretrained(path, **arguments)


def papa(path, **arguments):
    return PapaBertForSequenceClassification.from_pretrained(path, constant_length=8, **arguments)


def backbone_of_a_cascade(path, **arguments):
    return CascadeForSequenceClassification.from_backbone(path, depths=[1, 2], **arguments)


LOADERS = [plain, papa, backbone_of_a_cascade]


@pytest.fixture
def checkpoint(tmp_path):
    tiny.plain_model().save_pretrained(tmp_path)
    return tmp_path


def pickle_weights(folder, name):
    torch.save(tiny.plain_model().state_dict(), folder / name)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("load", LOADERS)
def test_use_safetensors_false_is_refused(load, checkpoint):
    with pytest.raises(ValueError, match="use_safetensors=False is refused"):
        load(checkpoint, use_safetensors=False)
    load(checkpoint, use_safetensors=None)


@pytest.mark.parametrize("load", LOADERS)
def test_a_pickled_checkpoint_is_no_checkpoint(load, checkpoint):
    pickle_weights(checkpoint, "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_index_of_pickled_files_is_refused(load, variant, checkpoint):
    pickle_weights(checkpoint, "w.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny.plain_model().state_dict(), "w.bin")}
    name = f"model.safetensors.index{'' if variant is None else '.' + variant}.json"
    (checkpoint / name).write_text(json.dumps(index))
    with pytest.raises(OSError, match=PICKLED):
        load(checkpoint, variant=variant)


@pytest.mark.parametrize("load", LOADERS)
def test_a_configuration_that_names_a_pickled_file_is_refused(load, checkpoint):
    pickle_weights(checkpoint, "adapter_model.bin")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(OSError, match=PICKLED):
        load(checkpoint)


def test_a_pickled_adapter_is_refused(checkpoint):
    pytest.importorskip("peft")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(checkpoint), "target_modules": ["query"], "r": 1}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({}, checkpoint / "adapter_model.bin")
    with pytest.raises(OSError, match=PICKLED):
        plain(checkpoint)
    with pytest.raises(OSError, match=PICKLED):
        tiny.model().load_adapter(str(checkpoint))


def test_own_checkpoints_are_checked_too(tmp_path):
    cascade = tiny.cascade(depths=(1, 2))
    for model in (tiny.model(), cascade):
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match="use_safetensors=False is refused"):
            type(model).from_pretrained(folder, use_safetensors=False)
        index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "w.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(OSError, match=PICKLED):
            type(model).from_pretrained(folder)
