"""Loading: a checkpoint with exits as it is, a plain one by giving it exits."""

import contextlib
import logging as python_logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_MODEL_ARGUMENTS = ("attn_implementation", "dtype", "torch_dtype")


class LoadsPlainCheckpoints:
    """`from_pretrained` for a classifier with exits."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint saved with exits, or gives exits to a plain one of the same architecture.

        From a plain checkpoint the backbone is loaded by the stock classifier's own code; each exit's head starts as a
        copy of the stock head where the checkpoint has one, else of its pretrained pooler; what is new is reported.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub name or folder.
            config (*optional*): A configuration with exits; else the checkpoint's, changed by the fields in `kwargs`.
            **kwargs: Configuration fields (`exit_layers`, `exit_routing`, `num_labels`, …) and everything that
                `PreTrainedModel.from_pretrained` takes.

        Raises:
            ValueError: A checkpoint of another architecture; exit weights missing or left over; a bad field.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        model_type = checkpoint_model_type(path, **kwargs)
        loaders = {
            cls.config_class.model_type: cls._load_with_exits,
            cls.architecture.model_type: cls._load_plain,
        }
        if model_type in loaders:
            loaded = loaders[model_type](path, *model_args, config=config, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_if_disjoint()
            return loaded
        raise ValueError(
            f"{path} is a checkpoint of model_type={model_type!r}; {cls.__name__} loads "
            f"{cls.architecture.model_type!r} and {cls.config_class.model_type!r}. "
            "AutoModelForSequenceClassificationWithExits picks the class by the checkpoint."
        )

    @classmethod
    def _load_with_exits(cls, path: str | os.PathLike, *model_args: Any, config: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
        _check_exit_weights(path, info)
        model._exits_are_untrained = False
        return (model, info) if wants_info else model

    @classmethod
    def _load_plain(cls, path: str | os.PathLike, *model_args: Any, config: Any, **kwargs: Any) -> Any:
        hub_arguments = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        model_arguments = {name: kwargs.pop(name) for name in _MODEL_ARGUMENTS if name in kwargs}
        if config is None:
            config, kwargs = cls._config_for_plain(path, hub_arguments, kwargs)
        weights, dtype = _stock_weights(cls, path, config, {**hub_arguments, **model_arguments})
        # The ordinary loading code places the weights and fills in what is new.
        arguments = {**model_arguments, "dtype": dtype, **kwargs}
        model = super().from_pretrained(None, *model_args, config=config, state_dict=weights, **arguments)
        (model[0] if isinstance(model, tuple) else model).config._name_or_path = str(path)
        return model

    @classmethod
    def _config_for_plain(
        cls, path: str | os.PathLike, hub_arguments: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The configuration with exits, and the arguments that are not fields of it."""
        added = cls.config_class.added_fields()
        fields = {name: kwargs.pop(name) for name in added if name in kwargs}
        stock = cls.architecture.stock("Config")
        plain, kwargs = stock.from_pretrained(path, return_unused_kwargs=True, **hub_arguments, **kwargs)
        unknown = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("exit_")}
        return cls.config_class.from_plain(plain, **fields, **unknown), kwargs


def checkpoint_model_type(path: str | os.PathLike, **kwargs: Any) -> str | None:
    """`model_type` in a checkpoint's own configuration file."""
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    return PreTrainedConfig.get_config_dict(path, **hub_arguments)[0].get("model_type")


def _check_exit_weights(path: str | os.PathLike, info: dict[str, Any]) -> None:
    missing = sorted(key for key in info["missing_keys"] if key.startswith("exits."))
    surplus = sorted(key for key in info["unexpected_keys"] if key.startswith("exits."))
    if missing or surplus:
        raise ValueError(
            f"the exits in {path} do not fit its configuration: missing {missing}, left over {surplus}. Load it with "
            "the exit_layers that it was saved with, or start from the plain checkpoint to change them."
        )


def _stock_weights(
    model_class: Any, path: str | os.PathLike, config: Any, arguments: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """A stock classifier's weights under the names that they have here, and their type."""
    architecture = model_class.architecture
    stock_class = architecture.stock("ForSequenceClassification")
    with _quiet():
        stock, info = stock_class.from_pretrained(
            path, config=config.to_plain(), output_loading_info=True, **arguments
        )
        parts = _trained_parts(architecture, stock, info["missing_keys"])
        if "dense" in architecture.head.sources and "dense" not in parts:
            parts.update(_pretrained_pooler(architecture, path, config, arguments))
    copies = {
        f"exits.{index}.{part}.{name}": tensor.clone()
        for index in range(len(config.exit_layers))
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    with torch.device("meta"), no_init_weights():
        names = model_class(config).state_dict().keys()
    weights = {name: tensor for name, tensor in {**stock.state_dict(), **copies}.items() if name in names}
    return weights, stock.dtype


def _trained_parts(architecture: Any, stock: Any, missing: set[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the parts of the stock head that the checkpoint has, by part; every exit gets a copy."""
    sources = dict(architecture.head.sources)
    if architecture.final_norm is not None:
        sources["final_norm"] = f"{stock.base_model_prefix}.{architecture.final_norm}"
    parts = {part: stock.get_submodule(source).state_dict() for part, source in sources.items()}
    return {
        part: tensors
        for part, tensors in parts.items()
        if not any(f"{sources[part]}.{name}" in missing for name in tensors)
    }


def _pretrained_pooler(
    architecture: Any, path: str | os.PathLike, config: Any, arguments: dict[str, Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """The pooler of a backbone whose stock classifier leaves it out, if the checkpoint has one."""
    pooler = architecture.pretrained_pooler
    if pooler is None:
        return {}
    backbone_class = architecture.stock("Model")
    backbone, info = backbone_class.from_pretrained(
        path, config=config.to_plain(), output_loading_info=True, **arguments
    )
    tensors = backbone.get_submodule(pooler).state_dict()
    is_new = any(f"{pooler}.{name}" in info["missing_keys"] for name in tensors)
    return {} if is_new else {"dense": tensors}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the report of a load whose weights are loaded once more, with their final names, to itself."""

    def is_error(record: python_logging.LogRecord) -> bool:
        return record.levelno >= python_logging.ERROR

    # Not the logger's level: transformers decides by it what to check.
    reporter = python_logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(is_error)
    try:
        yield
    finally:
        reporter.removeFilter(is_error)
