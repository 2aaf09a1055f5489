"""Multi-model cascades: independent classifiers of growing depth, run one after another (Rotem et al., ACL 2023,
arXiv 2306.02307, section 2)."""

import copy
import inspect
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import can_return_tuple, logging

from .answers import Answers, ExitAnswer, Leaving
from .architectures import ARCHITECTURES, Architecture, supported_architecture
from .configuration import DecisionsConfigMixin, check_exit_layers, refuse_unknown_fields
from .criteria import CRITERIA
from .decisions import DecidesRowByRow
from .initialising import InitialisesAsStock
from .inputs import BackboneInputs, checked_tensors, positions_of_real_tokens, raise_misfit
from .labels import read_labels
from .layers import Progress
from .loading import checkpoint_model_type, damage_named
from .outputs import SequenceClassifierWithExitsOutput
from .prediction import PredictsDatasets
from .saving import SavesWhole
from .stock_exit import config_of_first_layers, divide_by_temperature, in_one_type
from .weight_files import LoadsSafetensors, safetensors_only

logger = logging.get_logger(__name__)

# What one tokenizer says to all members. Classes differ in which of the special tokens they declare.
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
# What the cascade says for all members; theirs are made from it.
_OF_THE_CASCADE = ("id2label", "label2id", "num_labels", "problem_type")
_OWN_NAMES = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
_MADE_BY = "CascadeForSequenceClassification.from_backbone(path, depths=[...]) or from_models([...])"


@dataclass(kw_only=True, repr=False)
class _CascadeFields(DecisionsConfigMixin):
    members: list[dict[str, Any]] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        self.members = list(self.members or [])
        configs = [_member_config(member, position) for position, member in enumerate(self.members)]
        _check_sizes(configs)
        _check_tokenizers(configs)
        said = _said_by_members(self.members, configs)
        _check_label_count(said, self.id2label, kwargs.get("num_labels"))
        if self.id2label is None:
            self.id2label, self.label2id = said["id2label"], said["label2id"]
        if self.problem_type is None:
            self.problem_type = said["problem_type"]
        if self.pad_token_id is None:
            self.pad_token_id = next((c.pad_token_id for c in configs if c.pad_token_id is not None), None)
        self.members = [_as_member(config) for config in configs]
        super().__post_init__(**kwargs)

    def _complete_exits(self) -> None:
        depths = [member.num_hidden_layers for member in self.member_configs()]
        if self.exit_layers is not None and list(self.exit_layers) != depths:
            raise ValueError(
                f"exit_layers={self.exit_layers} do not fit the members, which have {depths} layers. Leave "
                "exit_layers out: it is found from the members."
            )
        self.exit_layers = depths
        if self.exit_criterion == "learned":
            usable = ", ".join(repr(name) for name in CRITERIA if name != "learned")
            raise ValueError(
                "exit_criterion='learned' is not there for a cascade: its members, stock classifiers, have no unit "
                f"that could learn it. Use one of {usable}."
            )
        super()._complete_exits()

    def member_configs(self) -> list[PreTrainedConfig]:
        """The members' configurations, with the cascade's labels."""
        configs = [_member_config(member, position) for position, member in enumerate(self.members or [])]
        for config in configs:
            # Copies: a member's labels can be changed without the others'.
            config.id2label, config.label2id = copy.copy(self.id2label), copy.copy(self.label2id)
            config.problem_type = self.problem_type
            if config.pad_token_id is None:
                config.pad_token_id = self.pad_token_id
        return configs

    @property
    def counts_positions(self) -> bool:
        """Whether padding on the left has to stay when a batch shrinks: each member counts positions anew."""
        return True

    @property
    def exit_costs(self) -> list[float]:
        """Layers of all members up to each, as a fraction of the last one's: it can exceed 1."""
        return [total / self.exit_layers[-1] for total in itertools.accumulate(self.exit_layers)]


class CascadeConfig(_CascadeFields, PreTrainedConfig):
    """Configuration of a cascade: its members' configurations, and when a row is answered.

    A member plays the part of an exit. Cost is counted as in the papers (Rotem et al., 2023, section 2): the layers of
    all members that were run, as a fraction of the last one's, also where members are of different architectures and a
    layer of one takes longer than a layer of another; measured time stands beside it in reports.

    Args:
        members (`list[dict]`): Configurations of stock classifiers (`config.to_dict()`), from the smallest to the
            largest; they must agree on `vocab_size`, on special tokens and on labels where they name them.
        exit_layers (`list[int]`, *optional*): Found from the members: their numbers of layers, ascending. Two may be
            alike; `exit_at` then means the first of them.
        exit_loss_weights (`list[float]`, *optional*): Weight of each member's loss; None for 1 each.
        exit_criterion (`str`): What is compared with the thresholds: `confidence`, `entropy` or `patience`.
        exit_thresholds (`list[float | None]`, *optional*): One for each member but the last; None for a member that
            may not answer. A single number stands for all. None: run everything.
        exit_temperatures (`list[float]`, *optional*): Each member's logits are divided by its temperature.
        exit_tolerance (`float`, *optional*): For `exit_criterion="patience"` in regression: numbers that differ by no
            more than this are the same answer.
        pad_token_id (`int`, *optional*): The tokenizer's; members that have none get it.

    Raises:
        ValueError: For any value that cannot be used; it names the value, what is allowed, and the fix.
    """

    model_type = "cascade"
    _auto_class = "AutoConfig"


class CascadeForSequenceClassification(  # type: ignore[misc]
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
        self.members = nn.ModuleList(_new_member(member, attention) for member in config.member_configs())
        self._exits_are_untrained = True
        config.keys_to_ignore_at_inference = ["exit_logits", "exit_index"]
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
        if path is not None:
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
        cls, pretrained_model_name_or_path: str | os.PathLike, depths: Sequence[int], **kwargs: Any
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
        _check_depths(depths, stock.config, architecture)
        new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        cascade = cls.from_models([_first_layers(stock, depth, new) for depth in depths], **fields)
        cascade._exits_are_untrained = True
        cascade.config._name_or_path = str(path)
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
        models = list(models)
        _check_classes(models)
        _check_independence(models)
        fields = _pop_fields(cls, fields)
        config = cls.config_class(members=[_plain_values(model.config) for model in models], **fields)
        with torch.device("meta"), no_init_weights():
            cascade = cls(config)
        cascade.members = nn.ModuleList(models)
        config.dtype = models[0].dtype
        cascade._exits_are_untrained = False
        return cascade.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
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
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`, *optional*): By problem type.
            exit_thresholds (`list[float | None]` or `float`, *optional*): Instead of those in the configuration.
                Evaluation mode only. None for a member: it answers nothing.
            exit_at (`int`, *optional*): Every row is answered by the member of this many layers, one of
                `exit_layers`; the smaller ones are run before it. Evaluation mode only.
            output_hidden_states, output_attentions (`bool`, *optional*): Refused: each member has its own.

        Raises:
            ValueError: Empty batch; thresholds, `exit_at` or labels that cannot be used; hidden states or attentions.
        """
        self._refuse_insides(output_hidden_states, output_attentions)
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

    def _refuse_insides(self, output_hidden_states: bool | None, output_attentions: bool | None) -> None:
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

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
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
        _check_tokenizers(configs)
        self.config.members = [_as_member(config) for config in configs]

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
            logits = member(**_arguments(member, inputs), return_dict=True).logits
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


class MemberEmbeddings:
    """Several tables of embeddings that are treated as one.

    Args:
        tables (`list[nn.Module]`): Those of a cascade's members; what is read is read from the first.
    """

    def __init__(self, tables: list[nn.Module]):
        object.__setattr__(self, "tables", tables)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tables[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        for table in self.tables:
            setattr(table, name, value)

    def __delattr__(self, name: str) -> None:
        for table in self.tables:
            delattr(table, name)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> "HookHandles":
        """As `nn.Module.register_forward_hook`, on every table."""
        return HookHandles([table.register_forward_hook(*args, **kwargs) for table in self.tables])


@dataclass
class HookHandles:
    """What removes several hooks at once."""

    handles: list[Any]

    def remove(self) -> None:
        """Removes all of them."""
        for handle in self.handles:
            handle.remove()


def _arguments(member: PreTrainedModel, inputs: BackboneInputs) -> dict[str, Any]:
    """What a member is called with."""
    # A tokenizer made for BERT gives segments, which DistilBERT does not have.
    known = inspect.signature(type(member).forward).parameters
    arguments: dict[str, Any] = {name: tensor for name, tensor in inputs.tensors.items() if name in known}
    architecture = ARCHITECTURES.get(member.config.model_type)
    if architecture is None:
        return arguments
    if architecture.positions_from_mask and "position_ids" not in arguments and inputs.can_be_trimmed:
        arguments["position_ids"] = positions_of_real_tokens(inputs.tensors["attention_mask"])
    return {**arguments, **architecture.forward_arguments}


# Making


def _new_member(config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    config._attn_implementation = attention
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return in_one_type(model_class(config), torch.get_default_dtype())


def _member_config(member: Any, position: int) -> PreTrainedConfig:
    if not isinstance(member, dict) or "model_type" not in member:
        raise ValueError(
            f"members[{position}] must be a configuration as a dict with a model_type (config.to_dict()), "
            f"got {member!r}."
        )
    # It changes what it is given.
    return AutoConfig.for_model(**copy.deepcopy(member))


def _plain_values(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as it can stand in a JSON file."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in _OWN_NAMES}


def _as_member(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in _plain_values(config).items() if name not in _OF_THE_CASCADE}


def _pop_fields(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of a cascade's configuration out of the arguments."""
    known = tuple(name for name in cls.config_class.added_fields() if name != "exit_layers")
    fields = {name: given.pop(name) for name in known if name in given}
    refuse_unknown_fields(given, ("exit_", "constant_"), known)
    return fields


def _first_layers(stock: PreTrainedModel, depth: int, new: set[str]) -> PreTrainedModel:
    """A model of the first layers of another, with its trained weights; the weights named in `new` start anew."""
    member = type(stock)._from_config(config_of_first_layers(stock.config, depth), dtype=stock.dtype)
    # Layers are numbered from the first on, so that those of the smaller model have the same names in both.
    names = member.state_dict().keys()
    weights = {name: tensor for name, tensor in stock.state_dict().items() if name in names and name not in new}
    member.load_state_dict(weights, strict=False)
    return in_one_type(member, stock.dtype)


# Checks


def _check_depths(depths: Sequence[int], config: PreTrainedConfig, architecture: Architecture) -> None:
    depths, num_layers = list(depths), config.num_hidden_layers
    # The last member may be smaller than the model.
    largest = depths[-1] if depths and depths[-1] in range(1, num_layers) else num_layers
    try:
        check_exit_layers(depths, largest)
    except ValueError as error:
        reason = str(error).replace("exit_layers", "depths")
        raise ValueError(f"depths={depths} do not fit a model of {num_layers} layers: {reason}") from None
    if architecture.shares_layers and config.num_hidden_groups > 1 and depths[0] < num_layers:
        raise ValueError(
            f"depths={depths} cannot be taken from a model of num_hidden_groups={config.num_hidden_groups}, which are "
            "spread over all layers: a smaller model would use them elsewhere. Use one with a single group."
        )


def _check_classes(models: list[PreTrainedModel]) -> None:
    if not models:
        raise ValueError("a cascade needs at least one member, got none.")
    for model in models:
        # One look into the mapping: its values would import the code of every architecture.
        is_classifier = isinstance(model, PreTrainedModel) and (
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None) is type(model)
        )
        # Code of its own does not travel with the cascade, and a model with exits has costs of its own.
        if not is_classifier or type(model)._auto_class is not None:
            raise ValueError(
                f"a member of a cascade must be a stock sequence classifier, got a {type(model).__name__}. Load it "
                "with AutoModelForSequenceClassification from a plain checkpoint."
            )
        if model.dtype != models[0].dtype:
            raise ValueError(
                f"members of a cascade must have one dtype, which is that of the checkpoint, got {models[0].dtype} "
                f"and {model.dtype}. Convert them with model.to(dtype)."
            )


def _check_independence(models: list[PreTrainedModel]) -> None:
    owners: dict[int, int] = {}
    for position, model in enumerate(models):
        for parameter in model.parameters():
            owner = owners.setdefault(id(parameter), position)
            if owner != position:
                raise ValueError(
                    f"members {owner} and {position} share weights, but members of a cascade are independent of each "
                    "other. Load or copy (copy.deepcopy) each of them."
                )


def _check_sizes(configs: list[PreTrainedConfig]) -> None:
    for position, config in enumerate(configs):
        if "exit_layers" in config.to_dict():
            raise ValueError(
                f"members[{position}], of model_type={config.model_type!r}, leaves early itself, so that its cost is "
                "not that of its layers: use a plain classifier."
            )
        if config.is_encoder_decoder or getattr(config, "num_hidden_layers", None) is None:
            raise ValueError(
                f"members[{position}], of model_type={config.model_type!r}, has not one stack of num_hidden_layers "
                "layers, in which cost is counted: use an encoder or a decoder."
            )
    depths = [config.num_hidden_layers for config in configs]
    if depths != sorted(depths):
        raise ValueError(
            f"members must come from the one of the fewest layers to the one of the most, got {depths} layers. Give "
            "them in that order."
        )


def _check_tokenizers(configs: list[PreTrainedConfig]) -> None:
    for name in ("vocab_size", *_SPECIAL_TOKENS):
        values = [getattr(config, name, None) for config in configs]
        _agreed(name, values, "one tokenizer makes the input of all. Use models made for one tokenizer")


def _said_by_members(members: list[dict[str, Any]], configs: list[PreTrainedConfig]) -> dict[str, Any]:
    """Labels and problem type that all members that name any agree on; None where none does."""
    naming = [
        config if {"id2label", "num_labels"} & member.keys() else None for member, config in zip(members, configs)
    ]
    fix = "the answer may come from any. Load each with the same id2label and label2id"
    return {
        "id2label": _agreed("id2label", [config and config.id2label for config in naming], fix),
        "label2id": next((config.label2id for config in naming if config is not None), None),
        "problem_type": _agreed("problem_type", [config.problem_type for config in configs], "set the same in all"),
    }


def _agreed(name: str, values: list[Any], fix: str) -> Any:
    """The value that all agree on that have one, or None.

    Raises:
        ValueError: Two differ.
    """
    given = [(position, value) for position, value in enumerate(values) if value is not None]
    for position, value in given[1:]:
        first, expected = given[0]
        if value != expected:
            raise ValueError(
                f"members of a cascade must have the same {name}, got {expected} in members[{first}] and {value} in "
                f"members[{position}]: {fix}."
            )
    return given[0][1] if given else None


def _check_label_count(said: dict[str, Any], id2label: Any, num_labels: int | None) -> None:
    count = num_labels if id2label is None else len(id2label)
    if said["id2label"] is not None and count not in (None, len(said["id2label"])):
        raise ValueError(
            f"the cascade has {count} labels, but its members have {len(said['id2label'])}: {said['id2label']}. Leave "
            "the cascade's out (they are taken from the members), or mend the members'."
        )
