"""PAPA models: encoders with constant attention heads, and the papers' probe over all their layers (Hassid et al.,
Findings of EMNLP 2022, arXiv 2211.03495).

For every architecture in `PAPA_ARCHITECTURES` this module has `Papa<Name>Config` and
`Papa<Name>ForSequenceClassification`, `…ForTokenClassification` and `…ForMaskedLM`. The classes are made when they
are first asked for, so that a checkpoint loaded without this package imports the code of its own architecture only.
"""

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple, logging

from .constant_attention import (
    StockClass,
    check_constant_heads,
    check_constants_loaded,
    check_length,
    common_length,
    heads_to_make_constant,
    install_constant_heads,
)
from .initialising import InitialisesAsStock
from .labels import NO_LABEL, read_labels, read_token_labels
from .loading import checkpoint_model_type
from .losses import answer_loss
from .saving import ReadsWhole, SavesWhole
from .weight_files import LoadsSafetensors, safetensors_only

logger = logging.get_logger(__name__)

TRAINABLE_PARTS = ("probe", "constants", "all")


@dataclass(frozen=True)
class PapaArchitecture:
    """What is needed to build the PAPA models of one architecture.

    Args:
        prefix (`str`): With which the names of the stock classes begin.
        drops_pooler (`bool`): Whether the stock backbone has a pooler that must be left out.
        dropout_field (`str`, *optional*): The configuration field of the dropout before the classifier, None in it
            meaning `hidden_dropout_prob`; None if the papers' code has no such dropout.
    """

    prefix: str
    drops_pooler: bool
    dropout_field: str | None

    def stock(self, suffix: str) -> Any:
        """The class of transformers with this suffix, imported only now."""
        return getattr(transformers, self.prefix + suffix)

    def backbone_kwargs(self) -> dict[str, bool]:
        return {"add_pooling_layer": False} if self.drops_pooler else {}

    def classifier_dropout(self, config: Any) -> float:
        if self.dropout_field is None:
            return 0.0
        dropout = getattr(config, self.dropout_field, None)
        return config.hidden_dropout_prob if dropout is None else dropout


PAPA_ARCHITECTURES = {
    "bert": PapaArchitecture("Bert", drops_pooler=True, dropout_field="classifier_dropout"),
    "roberta": PapaArchitecture("Roberta", drops_pooler=True, dropout_field=None),
    "deberta": PapaArchitecture("Deberta", drops_pooler=False, dropout_field="cls_dropout"),
}


class AttentionAverages(Protocol):
    """What `mean_attention` returns, as far as `from_pretrained` needs it."""

    def average_for(self, model: PreTrainedModel) -> torch.Tensor:
        """The averages `(layers, heads, length, length)`; a ValueError if they come from another model."""


@dataclass(kw_only=True)
class PapaConfigFields(ReadsWhole, StockClass):
    """Configuration fields of every PAPA model, beside those of its architecture.

    Args:
        constant_heads (`list`, *optional*): `[layer, head]` pairs, counted from 0, whose attention is constant.
        constant_length (`int`, *optional*): Size of the constant matrices, and the longest input, in tokens. The
            sequence classifiers need it even without constant heads: their pooler has one weight for each position.
        trainable_part (`str`): What the classifiers train: `"probe"`, the pooler or token head and the classifier,
            everything else being frozen as in the paper; `"constants"`, the probe and the constants; `"all"`. Masked
            language models have no probe and train everything.
    """

    constant_heads: list | None = None
    constant_length: int | None = None
    trainable_part: str = "probe"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_constant_heads(self)
        check_trainable_part(self.trainable_part)


def check_trainable_part(part: str) -> None:
    if part not in TRAINABLE_PARTS:
        raise ValueError(f"trainable_part must be one of {', '.join(map(repr, TRAINABLE_PARTS))}, got {part!r}.")


class PapaPreTrainedMixin(SavesWhole, LoadsSafetensors, InitialisesAsStock, StockClass):
    """Loading, converting, saving and initialising, the same for all tasks.

    Attributes:
        architecture: Set on every class made from this one.
    """

    architecture: PapaArchitecture
    # Each forward takes keyword arguments for the backbone, none of which may reach the loss (transformers#47688).
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        constants: "torch.Tensor | AttentionAverages | None" = None,
        constant_heads: str | float | Sequence[Sequence[int]] | None = None,
        constant_length: int | None = None,
        head_ranking: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a PAPA checkpoint, or converts a plain one of the same architecture.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): As in transformers. The next four are for plain
                checkpoints.
            constants (`torch.Tensor` or `AttentionAverages`, *optional*): Average attention `(layers, heads, length,
                length)`, or what `mean_attention` returned, which is also checked to come from this checkpoint.
            constant_heads (`str`, `float` or `list[list[int]]`, *optional*): `"all"`, a fraction (with
                `head_ranking`), or `[layer, head]` pairs.
            constant_length (`int`, *optional*): Needed where there are no constants to take it from.
            head_ranking (`list[list[int]]`, *optional*): The order of all heads that `rank_heads` found.
            **kwargs: As in transformers.

        Raises:
            OSError: Files that are missing, damaged or no safetensors.
            ValueError: If the checkpoint has another architecture, or lacks constants for its constant heads; if the
                constants do not fit the model; if PAPA arguments are given for a checkpoint that is converted already.
        """
        conversion: dict[str, Any] = {
            "constants": constants,
            "constant_heads": constant_heads,
            "constant_length": constant_length,
            "head_ranking": head_ranking,
        }
        if kwargs.get("config") is None and cls._is_plain(pretrained_model_name_or_path, kwargs):
            arguments = safetensors_only(pretrained_model_name_or_path, kwargs)
            return cls._convert(pretrained_model_name_or_path, **conversion, **arguments)
        given = [name for name, value in conversion.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} can be given for a plain checkpoint only, but {pretrained_model_name_or_path} "
                "has its constants already. Load it without, or convert the plain checkpoint anew."
            )
        arguments = safetensors_only(pretrained_model_name_or_path, kwargs)
        return cls._load(pretrained_model_name_or_path, *model_args, **arguments)

    @classmethod
    def _is_plain(cls, path: str | os.PathLike, kwargs: dict[str, Any]) -> bool:
        own, plain = cls.config_class.model_type, cls.architecture.stock("Config").model_type
        model_type = checkpoint_model_type(path, **kwargs)
        if model_type not in (own, plain):
            raise ValueError(
                f"{cls.__name__} loads checkpoints of type {plain!r} and {own!r}, but {path} is of type "
                f"{model_type!r}. PAPA supports {', '.join(PAPA_ARCHITECTURES)}."
            )
        return model_type == plain

    @classmethod
    def _load(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_constants_loaded(loading_info["missing_keys"])
        model.freeze_backbone()
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _convert(
        cls,
        path: str | os.PathLike,
        *,
        constants: "torch.Tensor | AttentionAverages | None",
        constant_heads: str | float | Sequence[Sequence[int]] | None,
        constant_length: int | None,
        head_ranking: Sequence[Sequence[int]] | None,
        trainable_part: str = "probe",
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        stock, loading_info = cls._load_stock(path, output_loading_info=True, **kwargs)
        if constants is not None and not isinstance(constants, torch.Tensor):
            constants = constants.average_for(stock)
        heads = heads_to_make_constant(constant_heads, constants, stock.config, head_ranking)
        config = cls.config_class.from_dict(
            {
                **stock.config.to_dict(),
                "model_type": cls.config_class.model_type,
                "architectures": [cls.__name__],
                "constant_heads": heads,
                "constant_length": common_length(constant_length, constants),
                "trainable_part": trainable_part,
            }
        )
        model = cls._from_config(config, dtype=stock.dtype, attn_implementation=stock.config._attn_implementation)
        # The plain backbone is changed in the same way as ours was when it was built, so all names and shapes agree.
        install_constant_heads(stock.base_model, model.config, constants)
        new = model._copy_weights(stock, loading_info["missing_keys"])
        model.to(stock.device).eval()
        if new:
            logger.warning(f"{cls.__name__} was made from {path}; new and to be trained: {', '.join(new)}.")
        return (model, {"missing_keys": set(new)}) if output_loading_info else model

    def _copy_weights(self, stock: PreTrainedModel, made_up: Collection[str]) -> list[str]:
        """Takes over all weights of a stock model; returns those that it lacks, or that are `made_up` there."""
        prefix = f"{self.base_model_prefix}." if stock.base_model is stock else ""
        weights = {prefix + name: weight for name, weight in stock.state_dict().items()}
        outcome = self.load_state_dict(weights, strict=False)
        if outcome.unexpected_keys:
            raise RuntimeError(f"{type(self).__name__} has no place for {outcome.unexpected_keys}.")
        return sorted({*outcome.missing_keys, *(prefix + name for name in made_up)})

    def freeze_backbone(self) -> None:
        """Freezes what `config.trainable_part` leaves out. Nothing here: only the probes leave something out."""

    def _announce_backbone(self) -> None:
        """Nothing: `AutoModel` has no backbone class for these checkpoints."""


class PapaMaskedLMMixin(PapaPreTrainedMixin):
    """Constant heads under the stock language-model head."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        install_constant_heads(self.base_model, config)

    @classmethod
    def _load_stock(cls, path: str | os.PathLike, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return cls.architecture.stock("ForMaskedLM").from_pretrained(path, **kwargs)


class PapaProbeMixin(PapaPreTrainedMixin):
    """The frozen backbone with a probe over its embeddings and the outputs of all layers (arXiv 2211.03495)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        backbone = self.architecture.stock("Model")(config, **self.architecture.backbone_kwargs())
        install_constant_heads(backbone, config)
        setattr(self, self.base_model_prefix, backbone)
        self._add_probe(config)
        self.post_init()
        self.freeze_backbone()

    @classmethod
    def _load_stock(cls, path: str | os.PathLike, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return cls.architecture.stock("Model").from_pretrained(path, **cls.architecture.backbone_kwargs(), **kwargs)

    def set_trainable_part(self, part: str) -> None:
        """Changes what is trained: `"probe"`, `"constants"` or `"all"` (see the configuration)."""
        check_trainable_part(part)
        self.config.trainable_part = part
        self.freeze_backbone()

    def freeze_backbone(self) -> None:
        """Freezes what `config.trainable_part` leaves out, and nothing else."""
        part = self.config.trainable_part
        self.requires_grad_(True)
        for name, parameter in self.base_model.named_parameters():
            is_constant = name.endswith(".attention.self.constants")
            parameter.requires_grad_(part == "all" or (part == "constants" and is_constant))

    def _hidden_states(
        self, attention_mask: torch.Tensor | None, **inputs: Any
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """Embeddings and every layer's output, each `(batch, length, hidden)`; and the attentions if asked for."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "constant attention takes an attention_mask of shape (batch, length), got "
                f"{tuple(attention_mask.shape)}."
            )
        inputs["output_hidden_states"] = True
        outputs = self.base_model(attention_mask=attention_mask, return_dict=True, **inputs)
        return outputs.hidden_states, outputs.attentions

    def _wants_hidden_states(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.pop("output_hidden_states", None)
        return self.config.output_hidden_states if wanted is None else wanted

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PapaPooler):
            init.constant_(module.position_weights, 1 / module.position_weights.shape[1])


class PapaForSequenceClassificationMixin(PapaProbeMixin):
    """Sequence classification with the PAPA pooler."""

    def _add_probe(self, config: Any) -> None:
        self.pooler = PapaPooler(config)
        self.dropout = nn.Dropout(self.architecture.classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids (`torch.Tensor`, *optional*): `(batch, length)`, with length at most `config.constant_length`.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 at real positions; padding may lie
                anywhere. None: no padding.
            labels (`torch.Tensor`, *optional*): `(batch,)` int64 classes, or float targets `(batch,)` / `(batch,
                labels)` for regression and multi-label problems.

        Returns:
            Loss if labels are given, logits `(batch, labels)`, hidden states and attentions on request.
        """
        wants_hidden_states = self._wants_hidden_states(kwargs)
        hidden_states, attentions = self._hidden_states(
            attention_mask,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(self.pooler(hidden_states, attention_mask)))
        if labels is not None:
            labels = read_labels(labels, len(logits), self.config)
        return SequenceClassifierOutput(
            loss=None if labels is None else answer_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=hidden_states if wants_hidden_states else None,
            attentions=attentions,
        )


class PapaForTokenClassificationMixin(PapaProbeMixin):
    """Token classification with the PAPA token head."""

    def _add_probe(self, config: Any) -> None:
        self.classifier = PapaTokenHead(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """
        Args:
            input_ids (`torch.Tensor`, *optional*): `(batch, length)`, with length at most `config.constant_length`.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 at real positions; padding may lie
                anywhere. None: no padding.
            labels (`torch.Tensor`, *optional*): `(batch, length)` int64, -100 where there is none. Padding never
                counts.

        Returns:
            Loss if labels are given, logits `(batch, length, labels)`, hidden states and attentions on request.
        """
        wants_hidden_states = self._wants_hidden_states(kwargs)
        hidden_states, attentions = self._hidden_states(
            attention_mask,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(hidden_states)
        if labels is not None:
            labels = read_token_labels(labels, logits.shape[:2], self.config.num_labels)
            labels = labels if attention_mask is None else labels.masked_fill(attention_mask == 0, NO_LABEL)
        return TokenClassifierOutput(
            loss=None if labels is None else self.loss_function(logits, labels, self.config),
            logits=logits,
            hidden_states=hidden_states if wants_hidden_states else None,
            attentions=attentions,
        )


class PapaPooler(nn.Module):
    """One vector for a text, from all layers and positions (arXiv 2211.03495).

    Every hidden state is summed over its real positions with weights of its own, one for each position, not
    renormalised; a linear layer and tanh follow on all the sums.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if config.constant_length is None:
            raise ValueError(
                "constant_length is None, but the PAPA pooler has one weight for each position. Set constant_length "
                "to the longest input in tokens."
            )
        states = config.num_hidden_layers + 1
        self.position_weights = nn.Parameter(torch.full((states, config.constant_length), 1 / config.constant_length))
        self.dense = nn.Linear(states * config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`list[torch.Tensor]`): Embeddings and the output of every layer, each `(batch, length,
                hidden)`.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 0 at padding.

        Returns:
            `(batch, hidden)`.
        """
        length = hidden_states[0].shape[1]
        check_length(length, self.position_weights.shape[1])
        weights = self.position_weights[:, None, :length]
        if attention_mask is not None:
            weights = weights * (attention_mask != 0)
        sums = [(state_weights.unsqueeze(-1) * state).sum(1) for state_weights, state in zip(weights, hidden_states)]
        return torch.tanh(self.dense(torch.cat(sums, dim=-1)))


class PapaTokenHead(nn.Module):
    """Logits for every token, from all layers (arXiv 2211.03495): concatenate, linear, tanh, linear."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear((config.num_hidden_layers + 1) * config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """From states `(batch, length, hidden)` to logits `(batch, length, labels)`."""
        return self.out_proj(torch.tanh(self.dense(torch.cat(tuple(hidden_states), dim=-1))))


_TASKS = {
    "ForSequenceClassification": PapaForSequenceClassificationMixin,
    "ForTokenClassification": PapaForTokenClassificationMixin,
    "ForMaskedLM": PapaMaskedLMMixin,
}

__all__ = [
    f"Papa{architecture.prefix}{suffix}"
    for architecture in PAPA_ARCHITECTURES.values()
    for suffix in ("Config", *_TASKS)
]


def __getattr__(name: str) -> Any:
    """Makes the configuration or model class `name` on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base, architecture = next(item for item in PAPA_ARCHITECTURES.items() if name.startswith(f"Papa{item[1].prefix}"))
    suffix = name.removeprefix(f"Papa{architecture.prefix}")
    made = _config_class(name, base, architecture) if suffix == "Config" else _model_class(name, suffix, architecture)
    return globals().setdefault(name, made)


def _config_class(name: str, base: str, architecture: PapaArchitecture) -> Any:
    stock = architecture.stock("Config")
    fields = {
        "model_type": f"papa-{base}",
        "_auto_class": "AutoConfig",
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with PAPA's fields.\n\n{PapaConfigFields.__doc__}",
    }
    return type(name, (PapaConfigFields, stock), fields)


def _model_class(name: str, suffix: str, architecture: PapaArchitecture) -> Any:
    task = _TASKS[suffix]
    stock = architecture.stock("PreTrainedModel" if issubclass(task, PapaProbeMixin) else suffix)
    fields = {
        "config_class": getattr(sys.modules[__name__], f"Papa{architecture.prefix}Config"),
        "architecture": architecture,
        "_auto_class": f"AutoModel{suffix}",
        "__module__": __name__,
        "__doc__": f"{architecture.prefix}: {task.__doc__}",
    }
    return type(name, (task, stock), fields)


def register() -> None:
    """Registers all PAPA classes with the Auto classes of transformers."""
    this_module = sys.modules[__name__]
    for architecture in PAPA_ARCHITECTURES.values():
        config_class = getattr(this_module, f"Papa{architecture.prefix}Config")
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for suffix in _TASKS:
            model_class = getattr(this_module, f"Papa{architecture.prefix}{suffix}")
            getattr(transformers, f"AutoModel{suffix}").register(config_class, model_class, exist_ok=True)
