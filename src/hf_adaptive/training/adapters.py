"""PEFT: adapters of models with exits are saved whole, with what the exits decide by, and under a card of ours.

PEFT knows the heads of stock classifiers by the names of their modules. What it is told here: which modules of an exit
belong to its head, and which layers LoRA changes by default.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import constants
from torch import nn
from transformers.utils import logging

from ..files import write_whole
from ..hub.model_card import CARD_FILE, model_card, write_model_card
from ..modeling.architectures import ARCHITECTURES
from ..modeling.exits import ExitsMixin

logger = logging.get_logger(__name__)

CONFIG_FILE = "config.json"
# Found by calibration for the weights of the adapter.
_DECISIONS = ("exit_criterion", "exit_thresholds", "exit_temperatures", "exit_tolerance", "exit_calibration")
# Of architectures for which PEFT has no default.
_QUERY_AND_VALUE = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "ernie": ["query", "value"],
    "eurobert": ["q_proj", "v_proj"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "nomic_bert": ["q_proj", "v_proj"],
}


def register() -> None:
    """Tells PEFT of models with exits. Stock models are treated as before."""
    peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["SEQ_CLS"] = PeftModelForSequenceClassification
    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
            _add_model_types(targets)


def _add_model_types(targets: dict[str, Any]) -> None:
    """Default layers of an architecture with exits: those of the stock one."""
    # Methods that change query and value of BERT do so everywhere; others (IA3) name more, and differently.
    is_query_and_value = targets.get("bert") == ["query", "value"]
    for model_type in ARCHITECTURES:
        own = targets.get(model_type, _QUERY_AND_VALUE.get(model_type) if is_query_and_value else None)
        if own is not None:
            targets.setdefault(f"{model_type}-with-exits", own)


class PeftModelForSequenceClassification(peft.PeftModelForSequenceClassification):
    """PEFT's own; for a model with exits it trains and saves whole heads, and keeps thresholds and card.

    Args:
        model: The model that the adapter changes.
        peft_config (`PeftConfig`): What the adapter is.
        adapter_name (`str`): Its name.
    """

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any):
        _add_heads(model, peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's."""
        _add_heads(self.get_base_model(), peft_config)
        return super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with the configuration of the exits beside each adapter."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if _has_exits(self) and kwargs.get("is_main_process", True):
            for name in kwargs.get("selected_adapters") or self.peft_config:
                folder = Path(save_directory) / ("" if name == "default" else name)
                write_whole(folder / CONFIG_FILE, self.config.to_json_file)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; thresholds and temperatures that were found for the adapter become those of the model.

        Raises:
            ValueError: The adapter was made for other exits.
        """
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if _has_exits(self) and adapter_name in self.active_adapters:
            _take_over_decisions(self.config, model_id, kwargs)
        return result

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes our card where there is none; PEFT's changes would be to one that says how it was measured."""
        if not _has_exits(self):
            super().create_or_update_model_card(output_dir)
        elif not (Path(output_dir) / CARD_FILE).exists():
            write_model_card(model_card(self, repo_id=Path(output_dir).name, plot_file=None), output_dir)


def _has_exits(model: Any) -> bool:
    return isinstance(model.get_base_model(), ExitsMixin)


def _add_heads(model: Any, peft_config: Any) -> None:
    """PEFT trains and saves modules that are named `classifier`; an exit's head has more."""
    if isinstance(model, ExitsMixin) and not peft_config.is_prompt_learning:
        named = list(peft_config.modules_to_save or [])
        peft_config.modules_to_save = [*named, *(part for part in _parts_of_heads(model) if part not in named)]


def _parts_of_heads(model: Any) -> Iterator[str]:
    for index, head in enumerate(model.exits):
        for name, part in head.named_children():
            if isinstance(part, nn.ModuleList):  # a branch: PEFT takes its layers one by one
                yield from (f"exits.{index}.{name}.{layer}" for layer, _ in part.named_children())
            elif name != "classifier" and part.state_dict():
                yield f"exits.{index}.{name}"


def _take_over_decisions(config: Any, model_id: str | os.PathLike[str], arguments: dict[str, Any]) -> None:
    path = _config_of_adapter(model_id, arguments)
    if path is None:
        return
    saved = type(config).from_json_file(path)
    if saved.exit_layers != config.exit_layers:
        raise ValueError(
            f"the adapter in {model_id} was made for exit_layers={saved.exit_layers}, but the model has "
            f"{config.exit_layers}. Load the model with config=AutoConfig.from_pretrained({str(model_id)!r})."
        )
    for name in _DECISIONS:
        setattr(config, name, getattr(saved, name))


def _config_of_adapter(model_id: str | os.PathLike[str], arguments: dict[str, Any]) -> str | None:
    """The file; None for an adapter that was saved without."""
    if Path(model_id).is_dir():
        path = Path(model_id, arguments.get("subfolder") or "", CONFIG_FILE)
        return str(path) if path.exists() else None
    known = {name: arguments[name] for name in ("subfolder", "revision", "token", "cache_dir") if name in arguments}
    try:
        return hf_hub_download(str(model_id), CONFIG_FILE, **known)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
