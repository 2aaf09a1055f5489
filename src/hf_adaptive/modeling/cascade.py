"""Multi-model cascades: independent classifiers of growing depth, run one after another (Rotem et al., ACL 2023,
arXiv 2306.02307, section 2)."""

import copy
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import can_return_tuple, logging

from .answers import Answers, ExitAnswer, Leaving
from .architectures import supported_architecture
from .configuration import ExitsConfigMixin, check_exit_layers
from .criteria import Policy
from .decisions import DecidesRowByRow
from .inputs import BackboneInputs
from .layers import Progress
from .loading import checkpoint_model_type
from .losses import check_labels
from .outputs import SequenceClassifierWithExitsOutput
from .prediction import PredictsDatasets
from .saving import SavesWhole

logger = logging.get_logger(__name__)

# What must be the same in all members, because one tokenizer makes the input of all.
SHARED_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "problem_type")
_OWN_NAMES = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(kw_only=True, repr=False)
class _CascadeFields(ExitsConfigMixin):
    members: list[dict[str, Any]] | None = None
    pad_token_id: int | None = None

    def _complete_exits(self) -> None:
        self.members = [] if self.members is None else self.members
        self.exit_layers = [_member_config(member).num_hidden_layers for member in self.members]
        # Of the last, largest member: what costs are a fraction of.
        self.num_hidden_layers = self.exit_layers[-1] if self.exit_layers else 0
        for name in ("exit_routing", "exit_pooling"):
            setattr(self, name, None)
        if self.exit_criterion == "learned":
            raise ValueError(
                "exit_criterion='learned' is not there for a cascade, whose members have no unit for it: use "
                "'confidence', 'entropy' or 'patience'."
            )
        self._check_decisions()

    @property
    def counts_positions(self) -> bool:
        """True: every member counts positions from the start of the row."""
        return True

    @property
    def exit_costs(self) -> list[float]:
        """Layers of all members up to each, as a fraction of the last one's: it can exceed 1."""
        return [total / self.num_hidden_layers for total in itertools.accumulate(self.exit_layers)]


class CascadeConfig(_CascadeFields, PreTrainedConfig):
    """Configuration of a cascade: its members' configurations, and when a row is answered.

    Args:
        members (`list[dict]`): The members' configurations, from the smallest to the largest.
        exit_criterion, exit_thresholds, exit_temperatures, exit_loss_weights, exit_tolerance: As for a classifier with
            exits; a member stands for an exit. `exit_layers` holds the members' numbers of layers, ascending; two may
            be alike (`exit_at` means the first of them).
        pad_token_id (`int`, *optional*): The tokenizer's, the same for all members.

    Raises:
        ValueError: For any value that cannot be used; it names the value, what is allowed, and the fix.
    """

    model_type = "cascade"
    _auto_class = "AutoConfig"


class CascadeForSequenceClassification(SavesWhole, PredictsDatasets, DecidesRowByRow, PreTrainedModel):  # type: ignore[misc]
    """Independent classifiers as one checkpoint.

    In training mode every member is run, and the loss is the sum of theirs. In evaluation mode a row is answered by
    the first member that is sure enough; the others get a smaller batch. Costs add up over the members run.
    """

    config_class = CascadeConfig
    base_model_prefix: str = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _auto_class: Any = "AutoModelForSequenceClassification"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: CascadeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(_new_member(member, config) for member in config.members or [])
        self._exits_are_untrained = True
        config.keys_to_ignore_at_inference = ["exit_logits", "exit_index"]
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a saved cascade; see `PreTrainedModel.from_pretrained`."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model._exits_are_untrained = bool(info["missing_keys"])
        return (model, info) if wants_info else model

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str | os.PathLike, depths: Sequence[int], **kwargs: Any
    ) -> "CascadeForSequenceClassification":
        """Members that are the first layers of one pretrained model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a supported architecture.
            depths (`Sequence[int]`): Layers of each member, ascending; not more than the model has.
            **kwargs: As in `from_pretrained`: `num_labels`, `id2label`, `dtype`, …

        Raises:
            ValueError: Depths that the model does not have, or an architecture that is not supported.
        """
        model_type = checkpoint_model_type(pretrained_model_name_or_path, **kwargs)
        architecture = supported_architecture(str(model_type))
        stock, info = architecture.stock("ForSequenceClassification").from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        _check_depths(list(depths), stock.config.num_hidden_layers)
        cascade = cls.from_models([_first_layers(stock, depth, set(info["missing_keys"])) for depth in depths])
        cascade._exits_are_untrained = True
        cascade.config._name_or_path = str(pretrained_model_name_or_path)
        return cascade

    @classmethod
    def from_models(cls, models: Sequence[PreTrainedModel]) -> "CascadeForSequenceClassification":
        """A cascade of classifiers that exist already, of one or of different architectures.

        They must have been made for one tokenizer (of which only vocabulary size and special tokens can be checked
        here) and for the same labels.

        Args:
            models (`Sequence[PreTrainedModel]`): Sequence classifiers, from the smallest to the largest; they become
                part of the cascade.

        Raises:
            ValueError: No models, one that is no sequence classifier, or members that do not fit together.
        """
        _check_members(models)
        first = models[0].config
        fields: dict[str, Any] = {
            "members": [_as_member(model.config) for model in models],
            "id2label": first.id2label,
            "label2id": first.label2id,
            "problem_type": first.problem_type,
            "pad_token_id": first.pad_token_id,
        }
        config = CascadeConfig(**fields)
        config._attn_implementation = first._attn_implementation
        with torch.device("meta"), no_init_weights():
            cascade = cls(config)
        cascade.members = nn.ModuleList(models)
        cascade.config.dtype = models[0].dtype
        cascade._exits_are_untrained = False
        return cascade.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
    ) -> SequenceClassifierWithExitsOutput:
        """Classifies a batch; arguments and result as for a classifier with exits, a member standing for an exit.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 at real tokens, 0 at padding.
            token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Segment of each token.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`, *optional*): By problem type.
            exit_thresholds (`list[float | None]` or `float`, *optional*): Instead of those in the configuration.
            exit_at (`int`, *optional*): Every row is answered by the member of this many layers.

        Raises:
            ValueError: Empty batch; thresholds, `exit_at` or labels that cannot be used.
        """
        if 0 in input_ids.shape:
            raise ValueError(
                f"the batch is empty: shape {tuple(input_ids.shape)}. Give at least one row and one token."
            )
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = BackboneInputs({name: t for name, t in named.items() if t is not None}, attention_mask)
        policy = self._policy(exit_thresholds, exit_at)
        if labels is not None:
            check_labels(labels, inputs.rows, self.config)
        answers = self._run_everything(inputs, {})[0] if policy is None else self._leave_early(inputs, policy)
        return SequenceClassifierWithExitsOutput(
            loss=None if labels is None else self._loss(answers, labels, policy),
            logits=None if self.training and labels is None else answers.taken,
            exit_logits=answers.logits,
            exit_index=answers.exit_index,
        )

    @property
    def _stages(self) -> tuple[int, ...]:
        """Where rows can wait for others, in members run."""
        return tuple(range(1, len(self.members)))

    def _run_everything(self, inputs: BackboneInputs, flags: dict[str, bool]) -> tuple[Answers, Any]:
        return Answers.of_every_exit([self._member_answer(index, inputs) for index in range(len(self.members))]), None

    def _member_answer(self, index: int, inputs: BackboneInputs) -> ExitAnswer:
        logits = self.members[index](**inputs.tensors, return_dict=True).logits
        if self.config.exit_temperatures is not None:
            logits = logits / self.config.exit_temperatures[index]
        return ExitAnswer(logits)

    def _leave_early(self, inputs: BackboneInputs, policy: Policy) -> Answers:
        leaving = Leaving(self.config, policy, inputs)
        progress = self._run_until_rows_leave(leaving)
        while progress is not None:
            leaving.shrink(None)
            progress = self._run_until_rows_leave(leaving, progress)
        return cast(Answers, leaving.answers)

    def _run_until_rows_leave(self, leaving: Leaving, progress: Progress | None = None) -> Progress | None:
        """Runs members until a row is answered; None if no row is left or the last member was run."""
        last = len(self.members) - 1
        for index in range(0 if progress is None else progress.depth, last):
            leaving.answer(index, self._member_answer(index, leaving.inputs))
            leaving.decide(index)
            if len(leaving.staying) == 0:
                return None
            if len(leaving.staying) < len(leaving.rows):
                return Progress(depth=index + 1)
        leaving.answer(last, self._member_answer(last, leaving.inputs))
        return None

    def _announce_backbone(self) -> None:
        """Nothing: a cascade has no one backbone."""


def _new_member(member: dict[str, Any], config: CascadeConfig) -> PreTrainedModel:
    member_config = _member_config(member)
    member_config._attn_implementation = config._attn_implementation
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(member_config)]
    return model_class(member_config)


def _member_config(member: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(**member)


def _as_member(config: PreTrainedConfig) -> dict[str, Any]:
    """A member's configuration as it can stand in a JSON file."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in _OWN_NAMES}


def _check_depths(depths: list[int], num_layers: int) -> None:
    if depths and depths[-1] < num_layers:
        num_layers = depths[-1]
    try:
        check_exit_layers(depths, num_layers)
    except ValueError as error:
        raise ValueError(f"depths={depths} do not fit a model of {num_layers} layers: {error}") from None


def _first_layers(stock: PreTrainedModel, depth: int, missing: set[str]) -> PreTrainedModel:
    """A model of the first layers of another, with its trained weights; what those lack is new."""
    config = copy.deepcopy(stock.config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:depth]
    member = type(stock)._from_config(config, dtype=stock.dtype)
    names = member.state_dict().keys()
    weights = {name: t.clone() for name, t in stock.state_dict().items() if name in names and name not in missing}
    member.load_state_dict(weights, strict=False)
    return member


def _check_members(models: Sequence[PreTrainedModel]) -> None:
    if not models:
        raise ValueError("a cascade needs at least one member, got none.")
    for model in models:
        if type(model) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values():
            raise ValueError(
                f"a member of a cascade must be a stock sequence classifier, got a {type(model).__name__}. Load it "
                f"with {AutoModelForSequenceClassification.__name__}."
            )
    depths = [model.config.num_hidden_layers for model in models]
    if depths != sorted(depths):
        raise ValueError(f"members must come from the smallest to the largest, got {depths} layers.")
    for name in SHARED_FIELDS:
        values = [getattr(model.config, name, None) for model in models]
        different = next((value for value in values if value != values[0]), values[0])
        if different != values[0]:
            raise ValueError(
                f"members of a cascade must have the same {name} (one tokenizer, one set of labels), got {values[0]} "
                f"and {different}."
            )
