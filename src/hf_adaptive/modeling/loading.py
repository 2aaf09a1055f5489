"""Loading: a checkpoint of this package as it is, a plain one by making a model of this package of it."""

import contextlib
import logging as python_logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .bases import ModelBase
from .checks import check_count, check_path, shortened
from .constant_heads import check_constants_loaded, install_constant_heads
from .head_choice import common_length, heads_to_make_constant
from .saving import settle_checkpoint
from .weight_files import HUB_ARGUMENTS, safetensors_only

_FILE_ARGUMENTS = ("use_safetensors", "variant")
_MODEL_ARGUMENTS = ("attn_implementation", "dtype", "torch_dtype")
_CONSTANTS_ARGUMENTS = ("constants", "constant_heads", "constant_length", "head_ranking")


@runtime_checkable
class AttentionAverages(Protocol):
    """What `mean_attention` returns, as far as loading needs it."""

    average: torch.Tensor

    def average_for(self, model: PreTrainedModel) -> torch.Tensor:
        """The averages `(layers, heads, length, length)`; a ValueError if they come from another model."""


class LoadsPlainCheckpoints(ModelBase):
    """`from_pretrained` for a model of this package."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint of this class, or makes one of a plain checkpoint of the same architecture.

        A plain checkpoint is loaded by stock code. Each exit's head starts as a copy of the stock head where there is
        one, else of its pretrained pooler, and its branch as a copy of the layers before it; what is new is reported.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub name or folder.
            config (*optional*): A configuration of this class; else the checkpoint's, changed by the fields in
                `kwargs`.
            constants (`torch.Tensor` or `AttentionAverages`, *optional*): For `constant_heads` of a plain checkpoint:
                average attention `(layers, heads, length, length)`, or what `mean_attention` returned, which is also
                checked to come from this checkpoint.
            constant_heads (`str`, `float` or `list[list[int]]`, *optional*): Of a plain checkpoint: `"all"`, a
                fraction (with `head_ranking`), or `[layer, head]` pairs.
            head_ranking (`list[list[int]]`, *optional*): The order of all heads that `rank_heads` found.
            **kwargs: Configuration fields (`exit_layers`, `num_labels`, `constant_length`, …) and everything that
                `PreTrainedModel.from_pretrained` takes.

        Raises:
            ValueError: A checkpoint of another architecture; exit weights or constants missing, left over or of other
                layers; weights of another size; constants that do not fit, or given for a checkpoint that has its own;
                a bad field.
            OSError: Files that are missing, damaged or no safetensors.
        """
        check_config(cls, config)
        if pretrained_model_name_or_path is None and config is not None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        path = check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        model_type = checkpoint_model_type(path, **kwargs)
        loaders = {
            cls.config_class.model_type: cls._load_own,
            cls.architecture.model_type: cls._load_plain,
        }
        if model_type in loaders:
            kwargs = safetensors_only(path, kwargs)
            with damage_named(path):
                loaded = loaders[model_type](path, *model_args, config=config, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded)._after_loading()
            return loaded
        raise ValueError(
            f"{path} is a checkpoint of model_type={model_type!r}; {cls.__name__} loads "
            f"{cls.architecture.model_type!r} and {cls.config_class.model_type!r}. "
            "AutoModelForSequenceClassificationWithExits picks the class by the checkpoint."
        )

    @classmethod
    def _load_own(cls, path: str | os.PathLike[str], *model_args: Any, config: Any, **kwargs: Any) -> Any:
        given = [name for name in _CONSTANTS_ARGUMENTS if kwargs.get(name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} can be given for a plain checkpoint only, but {path} has its constants already. "
                "Load it without, or convert the plain checkpoint anew."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        saved = _config_dict(path, kwargs)
        model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
        model._check_loaded(path, info, saved)
        check_constants_loaded(info["missing_keys"])
        return (model, info) if wants_info else model

    def _check_loaded(self, path: str | os.PathLike[str], info: dict[str, Any], saved: dict[str, Any]) -> None:
        """Raises `ValueError` if a checkpoint of this class is not whole."""

    def _after_loading(self) -> None:
        """What is not part of a checkpoint."""

    @classmethod
    def _load_plain(cls, path: str | os.PathLike[str], *model_args: Any, config: Any, **kwargs: Any) -> Any:
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        file_arguments = {name: kwargs.pop(name) for name in _FILE_ARGUMENTS if name in kwargs}
        model_arguments = {name: kwargs.pop(name) for name in _MODEL_ARGUMENTS if name in kwargs}
        averages = kwargs.pop("constants", None)
        constants = _checked_constants(averages)
        if config is None:
            config, kwargs = cls._config_for_plain(path, constants, hub_arguments, kwargs)
        stock = cls._plain_checkpoint(path, config, {**hub_arguments, **file_arguments, **model_arguments})
        if config.constant_heads or constants is not None:
            # Averages that know where they come from are checked to come from this checkpoint.
            constants = constants if constants is averages else averages.average_for(stock.model)
            install_constant_heads(stock.model.base_model, cls.architecture, config, constants)
        weights = stock.weights(may_differ=kwargs.get("ignore_mismatched_sizes", False))
        # The ordinary loading code places the weights, fills in what is new and reports it.
        arguments = {**model_arguments, "dtype": stock.dtype, **kwargs}
        with _reports(lambda record: _name_path(record, path)):
            model = super().from_pretrained(None, *model_args, config=config, state_dict=weights, **arguments)
        loaded = model[0] if isinstance(model, tuple) else model
        loaded.config._name_or_path = loaded.name_or_path = str(path)
        return model

    @classmethod
    def _plain_checkpoint(
        cls, path: str | os.PathLike[str], config: Any, arguments: dict[str, Any]
    ) -> "PlainCheckpoint":
        return PlainCheckpoint(cls, cls._plain_class(), path, config, arguments)

    @classmethod
    def _plain_class(cls) -> Any:
        """The stock class that reads plain checkpoints."""
        raise NotImplementedError

    @classmethod
    def _config_for_plain(
        cls,
        path: str | os.PathLike[str],
        constants: torch.Tensor | None,
        hub_arguments: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, dict[str, Any]]:
        """The configuration with exits, and the arguments that are not fields of it."""
        added = cls.config_class.added_fields()
        fields = {name: kwargs.pop(name) for name in added if name in kwargs}
        stock = cls.architecture.stock("Config")
        plain, kwargs = stock.from_pretrained(path, return_unused_kwargs=True, **hub_arguments, **kwargs)
        unknown = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("exit_", "constant_"))}
        choice, ranking = fields.get("constant_heads"), kwargs.pop("head_ranking", None)
        if choice is not None or constants is not None:
            fields["constant_heads"] = heads_to_make_constant(choice, constants, plain, ranking)
            fields["constant_length"] = common_length(fields.get("constant_length"), constants)
        return cls.config_class.from_plain(plain, **fields, **unknown), kwargs


def checkpoint_model_type(path: str | os.PathLike[str], **kwargs: Any) -> str | None:
    """`model_type` in a checkpoint's own configuration file; a save that was interrupted there is settled first.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        **kwargs: Of `from_pretrained`.

    Raises:
        ValueError: What is no path, or a `num_labels` that stock code would stumble over.
        OSError: A configuration file that is missing or damaged.
    """
    check_path("pretrained_model_name_or_path", path)
    if "num_labels" in kwargs:
        check_count("num_labels", kwargs["num_labels"])
    settle_checkpoint(path, kwargs.get("subfolder"))
    return _config_dict(path, kwargs).get("model_type")


def _config_dict(path: str | os.PathLike[str], arguments: dict[str, Any]) -> dict[str, Any]:
    hub_arguments = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    try:
        values = PreTrainedConfig.get_config_dict(path, **hub_arguments)[0]
    except (AttributeError, TypeError) as error:
        raise OSError(
            f"config.json of {path} cannot be read as the configuration of a model, a JSON object: {error}."
        ) from error
    if not isinstance(values, dict) or not values:
        raise OSError(
            f"{path} has no config.json, or one without content. Name a folder that save_pretrained wrote, "
            "or the repository of a model on the Hub."
        )
    return values


def _checked_constants(given: Any) -> torch.Tensor | None:
    """The averages that were given, as one tensor."""
    constants = given.average if isinstance(given, AttentionAverages) else given
    if constants is None:
        return None
    if not isinstance(constants, torch.Tensor) or constants.dim() != 4:
        raise ValueError(
            "constants must be what mean_attention returned, or a tensor of shape (layers, heads, length, length), "
            f"got {shortened(given)}."
        )
    return constants


def check_config(model_class: Any, config: Any) -> None:
    """Raises `ValueError` for a plain configuration (never test its class: code from elsewhere has its own copy)."""
    expected = model_class.config_class
    if config is not None and getattr(config, "model_type", None) != expected.model_type:
        raise ValueError(
            f"{model_class.__name__} needs a {expected.__name__}, got a {type(config).__name__}. Make one with "
            f"{expected.__name__}.from_plain(config, exit_layers=...), or give exit_layers=... instead of a "
            "configuration."
        )


class PlainCheckpoint:
    """A plain checkpoint, read by stock code.

    Args:
        model_class: The class that is loaded.
        stock_class: Reads the checkpoint.
        path (`str` or `os.PathLike`): Hub name or folder.
        config: Configuration of `model_class`.
        arguments (`dict`): Of `from_pretrained`, about files and types.
    """

    def __init__(
        self, model_class: Any, stock_class: Any, path: str | os.PathLike[str], config: Any, arguments: dict[str, Any]
    ):
        self.model_class = model_class
        self.architecture = model_class.architecture
        self.path = path
        self.config = config
        # The report of this load is kept quiet: its weights are loaded once more, with their final names.
        self.arguments = {"config": config.to_plain(), "output_loading_info": True, **arguments}
        with _reports(_is_error):
            self.model, self.info = stock_class.from_pretrained(path, ignore_mismatched_sizes=True, **self.arguments)
        self.resized = {key: shapes for key, *shapes in self.info["mismatched_keys"]}
        self.new = {*self.info["missing_keys"], *self.resized}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    def weights(self, may_differ: bool) -> dict[str, torch.Tensor]:
        """The checkpoint's weights under the names that they have in the new model; what it has not is left out.

        Args:
            may_differ (`bool`): Whether to leave out, too, what has another size than the configuration says.

        Raises:
            ValueError: Something has another size.
        """
        if self.resized and not may_differ:
            raise ValueError(
                f"weights in {self.path} have other sizes than its configuration asks for: "
                f"{_as_text(self.resized)}. Give the num_labels (or other sizes) that it was saved with, or "
                "ignore_mismatched_sizes=True to start these weights anew."
            )
        with torch.device("meta"), no_init_weights():
            names = self.model_class(self.config).state_dict().keys()
        own = {key: tensor for key, tensor in self.model.state_dict().items() if key not in self.new}
        known = {name: tensor for name, tensor in {**own, **self._copies(own)}.items() if name in names}
        # A weight of the backbone is read also without its prefix: "bert.pooler" would be taken for "pooler".
        taken = {*names, *(f"{self.model.base_model_prefix}.{name}" for name in names)}
        # Without content, so that the final load reports them as any load does.
        return {**{key: torch.empty(0) for key in self._surplus() if key not in taken}, **known}

    def _copies(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights that start as copies of the checkpoint's `own`."""
        return {}

    def _surplus(self) -> set[str]:
        """Weights of the checkpoint that have no place."""
        return set(self.info["unexpected_keys"])


def check_exits(path: str | os.PathLike[str], info: dict[str, Any], saved: dict[str, Any], config: Any) -> None:
    """Raises `ValueError` unless a checkpoint has all exits that it should have, and no others."""
    missing = sorted(key for key in info["missing_keys"] if key.startswith("exits."))
    surplus = sorted(key for key in info["unexpected_keys"] if key.startswith("exits."))
    exits, saved_exits = config.exit_layers, saved.get("exit_layers")
    if not missing and not surplus and saved_exits in (None, exits):
        return
    raise ValueError(
        f"the exits in {path} do not fit its configuration: exit_layers={exits}, saved with {saved_exits}; "
        f"exit_branch_layers={config.exit_branch_layers}, saved with {saved.get('exit_branch_layers', 0)}; missing "
        f"{missing}, left over {surplus}. Load it with the exit_layers and exit_branch_layers that it was saved with, "
        "or start from the plain checkpoint to change them."
    )


class CheckpointForExits(PlainCheckpoint):
    """A plain checkpoint whose head, or else whose pretrained pooler, every exit gets a copy of."""

    def _copies(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = self._head_parts()
        heads = {
            f"exits.{index}.{part}.{name}": tensor.clone()
            for index in range(len(self.config.exit_layers))
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        return {**heads, **self._branches(own)}

    def _branches(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of the exits' own layers: copies of those of the trunk's layers at the same depths."""
        modules = len(self.model.base_model.get_submodule(self.architecture.layers))
        copies: dict[str, torch.Tensor] = {}
        for index, depth in enumerate(self.config.exit_layers):
            length = self.config.branch_length(depth)
            for position in range(length):
                source = (depth - length + position) * modules // self.config.num_hidden_layers
                prefix = f"{self.model.base_model_prefix}.{self.architecture.layers}.{source}."
                copies |= {
                    f"exits.{index}.branch.{position}.{key.removeprefix(prefix)}": tensor.clone()
                    for key, tensor in own.items()
                    if key.startswith(prefix)
                }
        return copies

    def _surplus(self) -> set[str]:
        pooler = self.architecture.pretrained_pooler
        prefixes = () if pooler is None else (f"{pooler}.", f"{self.model.base_model_prefix}.{pooler}.")
        return {key for key in super()._surplus() if not key.startswith(prefixes)}

    def _head_parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """Weights of the parts of the stock head that the checkpoint has, by part; every exit gets a copy."""
        sources = dict(self.architecture.head.sources)
        if self.architecture.final_norm is not None:
            sources["final_norm"] = f"{self.model.base_model_prefix}.{self.architecture.final_norm}"
        parts = {part: self.model.get_submodule(source).state_dict() for part, source in sources.items()}
        known = {
            part: tensors
            for part, tensors in parts.items()
            if not any(f"{sources[part]}.{name}" in self.new for name in tensors)
        }
        if "dense" in sources and "dense" not in known:
            known.update(self._pretrained_pooler())
        return known

    def _pretrained_pooler(self) -> dict[str, dict[str, torch.Tensor]]:
        """The pooler of a backbone whose stock classifier leaves it out, if the checkpoint has one."""
        pooler = self.architecture.pretrained_pooler
        if pooler is None:
            return {}
        with _reports(_is_error):
            backbone, info = self.architecture.stock("Model").from_pretrained(
                self.path, ignore_mismatched_sizes=True, **self.arguments
            )
        tensors = backbone.get_submodule(pooler).state_dict()
        is_new = any(f"{pooler}.{name}" in info["missing_keys"] for name in tensors)
        return {} if is_new else {"dense": tensors}


def _as_text(resized: dict[str, list[Any]]) -> str:
    return ", ".join(f"{key} {tuple(there)} instead of {tuple(here)}" for key, (there, here) in resized.items())


@contextlib.contextmanager
def damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says which checkpoint cannot be read; safetensors does not."""
    try:
        yield
    except SafetensorError as error:
        files = sorted(file.name for file in Path(path).glob("*.safetensors") if not _is_readable(file))
        raise OSError(
            f"the weights in {path} ({', '.join(files) or 'model.safetensors'}) are truncated or damaged: {error}. "
            "Copy or download them again (force_download=True)."
        ) from error


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def _is_error(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.ERROR


def _name_path(record: python_logging.LogRecord, path: str | os.PathLike[str]) -> bool:
    """Completes the report of a load from weights in memory, which knows of no path."""
    record.msg = str(record.msg).replace("from: None\n", f"from: {path}\n")
    return True


@contextlib.contextmanager
def _reports(keep: Callable[[python_logging.LogRecord], bool]) -> Iterator[None]:
    """Filters what loading reports. Its logger's level stays: transformers decides by it what to check."""
    reporter = python_logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(keep)
    try:
        yield
    finally:
        reporter.removeFilter(keep)
