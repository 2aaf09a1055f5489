"""Multi-model cascades: independent classifiers of growing depth, run one after another (Rotem et al., ACL 2023,
arXiv 2306.02307, section 2)."""

import copy
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import can_return_tuple, logging

from .answers import Answers, ExitAnswer, Leaving
from .architectures import ARCHITECTURES, supported_architecture
from .cascade_configuration import CascadeConfig, as_member, check_tokenizers, plain_values
from .cascade_members import (
    MemberEmbeddings,
    as_list,
    check_classes,
    check_depths,
    check_independence,
    first_layers,
    member_arguments,
    new_member,
)
from .configuration import refuse_unknown_fields
from .decisions import DecidesRowByRow
from .initialising import InitialisesAsStock
from .inputs import BackboneInputs, checked_tensors, raise_misfit
from .labels import read_labels
from .layers import Progress
from .loading import checkpoint_model_type, damage_named
from .outputs import SequenceClassifierWithExitsOutput
from .prediction import PredictsDatasets
from .saving import SavesWhole
from .stock_exit import divide_by_temperature
from .weight_files import LoadsSafetensors, safetensors_only

logger = logging.get_logger(__name__)

# How a model may be spread over devices, and what of it stays float32. transformers asks a model's children, but the
# members are children of a list.
_SAID_BY_MEMBERS = (
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
)
_MADE_BY = "CascadeForSequenceClassification.from_backbone(path, depths=[...]) or from_models([...])"


class CascadeForSequenceClassification(
    SavesWhole, LoadsSafetensors, InitialisesAsStock, PredictsDatasets, DecidesRowByRow, PreTrainedModel
):
    """Independent classifiers of growing depth as one checkpoint (Rotem et al., 2023, section 2: "multi-model").

    In training mode every member is run, and the loss is the sum of theirs; they share nothing. In evaluation mode a
    row is answered by the first member that is sure enough; the others get a smaller batch. Costs add up over the
    members run.
    """

    config_class = CascadeConfig
    base_model_prefix: str = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch; Trainer must scale it when it accumulates gradients (transformers#47688).
    accepts_loss_kwargs = False
    _auto_class: Any = "AutoModelForSequenceClassification"
    # An implementation that a member lacks is refused by that member, by name.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CascadeConfig):
        if not config.members:
            raise ValueError(f"a cascade needs at least one member, got members={config.members}. Use {_MADE_BY}.")
        attention = config._attn_implementation
        super().__init__(config)
        # Left open here, so that each member takes the best that it has (DeBERTa has "eager" only).
        config._attn_implementation_internal = attention
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(new_member(member, attention) for member in config.member_configs())
        self._exits_are_untrained = True
        config.keys_to_ignore_at_inference = ["exit_logits", "exit_index"]
        for name in _SAID_BY_MEMBERS:
            setattr(self, name, set().union(*(getattr(member, name) for member in self.members)))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a saved cascade; arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: A checkpoint of something else, or a bad field.
            OSError: Files that are missing, damaged or no safetensors.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        path = pretrained_model_name_or_path
        if path is not None or kwargs.get("config") is None:
            model_type = checkpoint_model_type(path, **kwargs)
            if model_type != cls.config_class.model_type:
                raise ValueError(
                    f"{path} is a checkpoint of model_type={model_type!r}, not a cascade. Use {_MADE_BY}."
                )
        arguments = safetensors_only(path, kwargs)
        with damage_named(path):
            model, info = super().from_pretrained(path, *model_args, output_loading_info=True, **arguments)
        model._exits_are_untrained = bool(info["missing_keys"] or info["mismatched_keys"])
        return (model, info) if wants_info else model

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], depths: Sequence[int], **kwargs: Any
    ) -> "CascadeForSequenceClassification":
        """Members that are the first layers of one pretrained model, each with a classifier of its own.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a supported architecture.
            depths (`Sequence[int]`): Layers of each member, ascending; not more than the model has.
            **kwargs: Fields of [`CascadeConfig`] (`exit_thresholds`, …), and those of
                `AutoModelForSequenceClassification.from_pretrained` (`num_labels`, `id2label`, `dtype`, …).

        Raises:
            ValueError: Depths that the model does not have, an architecture that is not supported, or a bad field.
            OSError: Files that are missing, damaged or no safetensors.
        """
        fields = _pop_fields(cls, kwargs)
        depths = as_list("depths", depths)
        path = pretrained_model_name_or_path
        architecture = supported_architecture(str(checkpoint_model_type(path, **kwargs)))
        if architecture.head.classifier is None:
            raise ValueError(
                f"{architecture.name} has no stock classifier that a cascade could be made of. Use another "
                "architecture, or exits (AutoModelForSequenceClassificationWithExits)."
            )
        stock, info = architecture.stock("ForSequenceClassification").from_pretrained(
            path, output_loading_info=True, **safetensors_only(path, kwargs)
        )
        check_depths(depths, stock.config, architecture)
        new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        cascade = cls.from_models([first_layers(stock, depth, new) for depth in depths], **fields)
        cascade._exits_are_untrained = True
        cascade.config._name_or_path = cascade.name_or_path = str(path)
        return cascade

    @classmethod
    def from_models(cls, models: Sequence[PreTrainedModel], **fields: Any) -> "CascadeForSequenceClassification":
        """A cascade of classifiers that exist already, of one or of different architectures.

        They must have been made for one tokenizer and for the same labels. A model does not know its tokenizer:
        `vocab_size` and special tokens are compared, the vocabularies themselves cannot be.

        Args:
            models (`Sequence[PreTrainedModel]`): Stock sequence classifiers, from the one of the fewest layers to the
                one of the most; they become part of the cascade.
            **fields: Fields of [`CascadeConfig`]: `exit_criterion`, `exit_thresholds`, …

        Raises:
            ValueError: No models, one that is no stock sequence classifier, members that do not fit together or share
                weights, or a bad field.
        """
        models = as_list("models", models)
        check_classes(models)
        check_independence(models)
        fields = _pop_fields(cls, fields)
        config = cls.config_class(members=[plain_values(model.config) for model in models], **fields)
        with torch.device("meta"), no_init_weights():
            cascade = cls(config)
        cascade.members = nn.ModuleList(models)
        config.dtype = models[0].dtype
        cascade._exits_are_untrained = False
        return cascade.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierWithExitsOutput:
        """Classifies a batch; arguments and result as for a classifier with exits, a member standing for an exit.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 at real tokens, 0 at padding.
            token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Segment of each token, for the
                members that have segments.
            position_ids (`torch.LongTensor` of shape `(batch, length)` or `(1, length)`, *optional*): Positions.
            inputs_embeds (`torch.FloatTensor`, *optional*): Refused: each member has its own embeddings.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`, *optional*): By problem type.
            exit_thresholds (`list[float | None]` or `float`, *optional*): Instead of those in the configuration.
                Evaluation mode only. None for a member: it answers nothing.
            exit_at (`int`, *optional*): Every row is answered by the member of this many layers, one of
                `exit_layers`; the smaller ones are run before it. Evaluation mode only.
            output_hidden_states, output_attentions (`bool`, *optional*): Refused: each member has its own.

        Raises:
            ValueError: Empty batch; thresholds, `exit_at` or labels that cannot be used; embeddings, hidden states or
                attentions.
        """
        self.config.check_before_use()
        self._refuse_insides(inputs_embeds, output_hidden_states, output_attentions)
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs = BackboneInputs(checked_tensors(named), attention_mask)
        if labels is not None:
            labels = read_labels(labels, inputs.rows, self.config)
        policy = self._policy(exit_thresholds, exit_at)
        answers = self._run_everything(inputs, {})[0] if policy is None else self._leave_early(inputs, policy)
        loss = None if labels is None else self._loss(answers, labels, policy)
        return SequenceClassifierWithExitsOutput(
            loss=loss,
            **self._scores(answers, loss),
            exit_index=answers.exit_index,
        )

    def _refuse_insides(
        self, inputs_embeds: Any, output_hidden_states: bool | None, output_attentions: bool | None
    ) -> None:
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds cannot be given to a cascade: each of its models has embeddings of its own. Give "
                "input_ids, or ask one of them: cascade.members[0](inputs_embeds=...)."
            )
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        for name, value in asked.items():
            if getattr(self.config, name) if value is None else value:
                raise ValueError(
                    f"{name}=True is not there for a cascade: each of its models has its own. Ask one of them: "
                    f"cascade.members[0](**batch, {name}=True)."
                )

    # Embeddings: every member has its own

    def get_input_embeddings(self) -> Any:
        """The members' input embeddings as one: hooks and attributes (NEFTune's) reach all of them."""
        return MemberEmbeddings([cast(PreTrainedModel, member).get_input_embeddings() for member in self.members])

    def set_input_embeddings(self, value: Any) -> None:
        """Refused: members cannot share one table."""
        raise ValueError(
            "the members of a cascade share no weights, so it cannot be given one table of embeddings. Set each "
            "member's: cascade.members[0].set_input_embeddings(...)."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resizes every member's embeddings; arguments as in `PreTrainedModel`."""
        for member in self.members:
            cast(PreTrainedModel, member).resize_token_embeddings(*args, **kwargs)
        self._note_members()
        return self.get_input_embeddings()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the members' sizes as they are now.

        Raises:
            ValueError: Members that have become of different vocabularies.
            OSError: The folder cannot be written; it names the folder.
        """
        self._note_members()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _note_members(self) -> None:
        """Writes the members' configurations, as they are now, into the cascade's."""
        configs = [cast(PreTrainedModel, member).config for member in self.members]
        check_tokenizers(configs)
        self.config.members = [as_member(config) for config in configs]

    @property
    def _stages(self) -> tuple[int, ...]:
        """Where rows can wait for others, in members run."""
        return tuple(range(1, len(self.members)))

    @property
    def _backbone_configs(self) -> list[Any]:
        return [cast(PreTrainedModel, member).config for member in self.members]

    @property
    def _unmarked_padding(self) -> int | None:
        """None: stock classifiers see to it themselves."""
        return None

    def _run_everything(self, inputs: BackboneInputs, flags: dict[str, bool]) -> tuple[Answers, Any]:
        return Answers.of_every_exit([self._member_answer(index, inputs) for index in range(len(self.members))]), None

    def _member_answer(self, index: int, inputs: BackboneInputs) -> ExitAnswer:
        member = cast(PreTrainedModel, self.members[index])
        if member.config.pad_token_id is None:
            # One that was set after the cascade was made.
            member.config.pad_token_id = self.config.pad_token_id
        try:
            logits = member(**member_arguments(member, inputs), return_dict=True).logits
        except (IndexError, RuntimeError) as error:
            raise_misfit(inputs, member.config, error)
            raise
        if self.config.exit_temperatures is not None:
            logits = logits / self.config.exit_temperatures[index]
        return ExitAnswer(logits)

    def _run_until(self, inputs: BackboneInputs, index: int) -> Answers:
        """Runs the members up to one, which answers all rows."""
        answers = [self._member_answer(position, inputs) for position in range(index + 1)]
        return Answers.of_every_exit(answers, unreached=len(self.members) - len(answers))

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

    @torch.no_grad()
    def to_stock(self, exit_at: int) -> PreTrainedModel:
        """A copy of the member of so many layers, with its temperature in its last linear layer.

        Args:
            exit_at (`int`): Its layers, one of `exit_layers`; of two members alike, the first.

        Raises:
            ValueError: No such member, or one of an architecture whose last linear layer is not known.
        """
        index = self._exit_index(exit_at)
        member = copy.deepcopy(cast(PreTrainedModel, self.members[index]))
        architecture = ARCHITECTURES.get(member.config.model_type)
        if self.config.exit_temperatures is not None and architecture is None:
            raise ValueError(
                f"the temperature of members[{index}] cannot be made part of a {type(member).__name__}, whose last "
                "linear layer is not known. Set model.config.exit_temperatures = None first."
            )
        if architecture is not None:
            divide_by_temperature(member.get_submodule(cast(str, architecture.head.classifier)), self.config, index)
        return member.eval()

    def _announce_backbone(self) -> None:
        """Nothing: a cascade has no one backbone."""


def _pop_fields(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of a cascade's configuration out of the arguments."""
    known = tuple(name for name in cls.config_class.added_fields() if name != "exit_layers")
    fields = {name: given.pop(name) for name in known if name in given}
    refuse_unknown_fields(given, ("exit_", "constant_"), known)
    return fields
