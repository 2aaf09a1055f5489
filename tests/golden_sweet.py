"""The reference's tiny models as models of this package, see tests/golden/README.md."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import hf_adaptive

FOLDER = Path(__file__).parent / "golden" / "sweet"
FAMILIES = ("bert", "deberta")
POOLER = {"bert": "bert.pooler", "deberta": "pooler"}
NAME = {"bert": "Bert", "deberta": "Deberta"}
DEBERTA_FIELDS = {"pooler_hidden_size": 32, "pooler_dropout": 0, "pooler_hidden_act": "gelu"}
DROPOUT_FIELDS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def results(family: str) -> dict:
    return json.loads((FOLDER / family / "results.json").read_text())


def tensors(family: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / family / f"{name}.safetensors")


def inputs(family: str) -> dict[str, torch.Tensor]:
    return tensors(family, "inputs")


def exit_layers(family: str) -> list[int]:
    """In layers run; the reference counts from 0."""
    return [layer + 1 for layer in results(family)["exit_layers"]]


def own_name(family: str, key: str, exit_index: int) -> str | None:
    """Name of the reference's parameter here; None for another exit's classifier."""
    if key.startswith("classifiers."):
        _, index, rest = key.split(".", 2)
        return f"exits.{index}.classifier.{rest}" if int(index) == exit_index else None
    if key.startswith(POOLER[family]):
        return f"exits.{exit_index}{key.removeprefix(POOLER[family])}"
    return key


def weights(family: str, file: str = "state_dict") -> dict[str, torch.Tensor]:
    reference = {key: tensor for key, tensor in tensors(family, file).items() if not key.endswith("position_ids")}
    return {
        name: tensor.clone()
        for index in range(len(exit_layers(family)))
        for key, tensor in reference.items()
        if (name := own_name(family, key, index)) is not None
    }


def config(family: str, **fields):
    plain = getattr(transformers, f"{NAME[family]}Config")(**results(family)["config"])
    extra = DEBERTA_FIELDS if family == "deberta" else {}
    config_class = getattr(hf_adaptive, f"{NAME[family]}WithExitsConfig")
    values = {**plain.to_dict(), **extra, **dict.fromkeys(DROPOUT_FIELDS, 0.0)}
    values = {key: value for key, value in values.items() if key not in ("model_type", "transformers_version")}
    return config_class(**{**values, "exit_layers": exit_layers(family), **fields})


def model(family: str, **fields):
    own = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_config(config(family, **fields))
    own.load_state_dict(weights(family))
    own._exits_are_untrained = False
    return own
