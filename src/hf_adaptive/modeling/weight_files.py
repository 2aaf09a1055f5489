"""Weights come from safetensors only: nothing is unpickled, whatever a checkpoint's files or its user ask for."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    cached_file,
    is_peft_available,
)

from .bases import ModelBase

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_CONVERT = (
    "A pickled file can run code when it is read. Convert it on a machine where that does no harm: load it there with "
    "its stock class, and save it with save_pretrained."
)


class LoadsSafetensors(ModelBase):
    """A model whose adapters, too, are safetensors only."""

    def load_adapter(self, peft_model_id: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors only.

        Raises:
            OSError: An adapter whose weights are pickled.
        """
        if peft_model_id is not None and kwargs.get("load_config") is None:  # not while the model itself is loaded
            _check_adapter(peft_model_id, {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        return super().load_adapter(peft_model_id, *args, **kwargs)


def safetensors_only(path: str | os.PathLike[str] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with which no pickled weights are read.

    transformers takes them, asked for safetensors, still where the path is one file, where an index or the
    configuration names such a file, and for an adapter beside the weights.

    Args:
        path (`str` or `os.PathLike`, *optional*): Hub name or folder.
        arguments (`dict`): Of `from_pretrained`.

    Raises:
        ValueError: `use_safetensors=False`.
        OSError: A checkpoint whose weights, or some of them, are pickled.
    """
    if arguments.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False is refused: weights are read from safetensors only. {_CONVERT}")
    if path is not None:
        _refuse_pickles(path, arguments)
    return {**arguments, "use_safetensors": True}


def _refuse_pickles(path: str | os.PathLike[str], arguments: dict[str, Any]) -> None:
    hub_arguments = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    if Path(path).is_file():
        _check_names(path, [Path(path).name])
        return
    named = PreTrainedConfig.get_config_dict(path, **hub_arguments)[0].get("transformers_weights")
    index = SAFE_WEIGHTS_INDEX_NAME
    if arguments.get("variant") is not None:
        index = index.replace(".json", f".{arguments['variant']}.json")
    if named is not None and named.endswith(".index.json"):
        index = named
    elif named is not None:
        _check_names(path, [named])
    index_file = _found(path, index, hub_arguments)
    if index_file is not None:
        _check_names(path, json.loads(Path(index_file).read_text())["weight_map"].values())
    if is_peft_available() and _found(path, ADAPTER_CONFIG_NAME, hub_arguments) is not None:
        _check_adapter(path, hub_arguments)


def _check_adapter(path: str | os.PathLike[str], hub_arguments: dict[str, Any]) -> None:
    is_safe = _found(path, ADAPTER_SAFE_WEIGHTS_NAME, hub_arguments) is not None
    _check_names(path, [ADAPTER_SAFE_WEIGHTS_NAME if is_safe else ADAPTER_WEIGHTS_NAME])


def _found(path: str | os.PathLike[str], name: str, hub_arguments: dict[str, Any]) -> str | None:
    """Where a file of the checkpoint lies on this machine; None if there is none."""
    return cached_file(
        path,
        name,
        **hub_arguments,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _check_names(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    pickled = sorted({name for name in names if not name.endswith(".safetensors")})
    if pickled:
        raise OSError(f"{path} has weights that are no safetensors ({', '.join(pickled)}). {_CONVERT}")
