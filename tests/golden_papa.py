"""The tiny models that PAPA's own code was run on, as models of this package (see tests/golden/README.md)."""

import json
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

import hf_adaptive
from hf_adaptive.modeling.constant_heads import install_constant_heads

FOLDER = Path(__file__).parent / "golden" / "papa"
FAMILIES = ("bert", "roberta", "deberta")
HEAD_SETS = ("none", "half", "all_but_one", "all")
LENGTH = 16
_RENAMED = {
    "weights_per_layer": "position_weights",
    "dense_across_layers_1": "dense",
    "dense_across_layers": "dense",
    "classifier.decoder": "classifier.out_proj",
}


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def results(family: str) -> dict:
    return json.loads((FOLDER / family / "results.json").read_text())


def averages(family: str) -> torch.Tensor:
    return tensors(f"{family}/averages")["avgs"]


def batches(stored: dict[str, torch.Tensor], prefix: str = "") -> list[dict[str, torch.Tensor]]:
    """The batches `batch0`, `batch1`, … of a file."""
    names = sorted({key.removeprefix(prefix).split("/")[0] for key in stored if key.startswith(f"{prefix}batch")})
    return [under(f"{prefix}{name}/", stored) for name in names]


def under(prefix: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


def class_of(family: str, suffix: str) -> type:
    return getattr(hf_adaptive, f"Papa{hf_adaptive.ARCHITECTURES[family].name}{suffix}")


def stock_class_of(family: str, suffix: str) -> type:
    return hf_adaptive.ARCHITECTURES[family].stock(suffix)


def stock_backbone(family: str, state: str = "state_dict") -> PreTrainedModel:
    """The plain backbone with the reference's weights."""
    config = transformers.AutoConfig.for_model(family, **results(family)["config"], attn_implementation="eager")
    backbone = stock_class_of(family, "Model")(config, **hf_adaptive.ARCHITECTURES[family].model_arguments)
    weights = {
        name: weight
        for name, weight in under(f"{family}.", tensors(f"{family}/{state}")).items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }
    backbone.load_state_dict(weights)
    return backbone


def model(
    family: str,
    heads: list,
    *,
    task: str = "ForSequenceClassification",
    state: str = "state_dict",
    constants: torch.Tensor | None = None,
    attn_implementation: str = "eager",
) -> PreTrainedModel:
    """The reference's model with these constant heads, every parameter trainable, in eval mode."""
    config = class_of(family, "Config")(
        **results(family)["config"],
        constant_heads=heads,
        constant_length=LENGTH,
        trainable_part="all",
        attn_implementation=attn_implementation,
    )
    converted = class_of(family, task)(config)
    backbone = stock_backbone(family, state)
    install_constant_heads(
        backbone, hf_adaptive.ARCHITECTURES[family], config, averages(family) if constants is None else constants
    )
    converted.base_model.load_state_dict(backbone.state_dict())
    outcome = converted.load_state_dict(probe_weights(family, tensors(f"{family}/{state}")), strict=False)
    assert not outcome.unexpected_keys
    return converted.eval()


def probe_weights(family: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pooler and classifier under our names."""
    own = {}
    for name, weight in stored.items():
        name = name.removeprefix(f"{family}.")
        if name.startswith(("pooler.", "classifier.")):
            for reference, ours in _RENAMED.items():
                name = name.replace(reference, ours)
            own[name] = weight
    return own
