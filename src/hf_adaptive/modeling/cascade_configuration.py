"""Configuration of a cascade: its members' configurations and labels, which have to fit together."""

import copy
import itertools
import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration import DecisionsConfigMixin
from .criteria import CRITERIA

# What one tokenizer says to all members. Classes differ in which of the special tokens they declare.
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
# What the cascade says for all members; theirs are made from it.
_OF_THE_CASCADE = ("id2label", "label2id", "num_labels", "problem_type")
_OWN_NAMES = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(kw_only=True, repr=False)
class _CascadeFields(DecisionsConfigMixin):
    members: list[dict[str, Any]] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.members = list(self.members or [])
        configs = [member_config(member, position) for position, member in enumerate(self.members)]
        _check_sizes(configs)
        check_tokenizers(configs)
        said = _said_by_members(self.members, configs)
        _check_label_count(said, self.id2label, kwargs.get("num_labels"))
        if self.id2label is None:
            self.id2label, self.label2id = said["id2label"], said["label2id"]
        if self.problem_type is None:
            self.problem_type = said["problem_type"]
        if self.pad_token_id is None:
            self.pad_token_id = next((c.pad_token_id for c in configs if c.pad_token_id is not None), None)
        self.members = [as_member(config) for config in configs]
        super().__post_init__(**kwargs)

    def _complete_exits(self) -> None:
        depths = [member.num_hidden_layers for member in self.member_configs()]
        if self.exit_layers is not None and list(self.exit_layers) != depths:
            raise ValueError(
                f"exit_layers={self.exit_layers} do not fit the members, which have {depths} layers. Leave "
                "exit_layers out: it is found from the members."
            )
        self.exit_layers = depths
        super()._complete_exits()

    def check_before_use(self) -> None:
        """As in any configuration of exits; `learned` is not there.

        Raises:
            ValueError: A value that cannot be used.
        """
        super().check_before_use()
        if self.exit_criterion == "learned":
            usable = ", ".join(repr(name) for name in CRITERIA if name != "learned")
            raise ValueError(
                "exit_criterion='learned' is not there for a cascade: its members, stock classifiers, have no unit "
                f"that could learn it. Use one of {usable}."
            )

    def member_configs(self) -> list[PreTrainedConfig]:
        """The members' configurations, with the cascade's labels."""
        configs = [member_config(member, position) for position, member in enumerate(self.members or [])]
        for config in configs:
            # Copies: a member's labels can be changed without the others'.
            config.id2label, config.label2id = copy.copy(self.id2label), copy.copy(self.label2id)
            config.problem_type = self.problem_type
            if config.pad_token_id is None:
                config.pad_token_id = self.pad_token_id
        return configs

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the members know: one tokenizer makes the input of all."""
        sizes = (member.get("vocab_size") for member in self.members or [])
        return next((size for size in sizes if size is not None), None)

    @vocab_size.setter
    def vocab_size(self, value: Any) -> None:
        raise ValueError(
            f"vocab_size={value!r} cannot be given to a cascade: its members have it, {self.vocab_size}. Change that "
            "of all with model.resize_token_embeddings(...), and save the model."
        )

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


def member_config(member: Any, position: int) -> PreTrainedConfig:
    """A member's configuration from what the cascade's holds of it; a `ValueError` names its place."""
    if not isinstance(member, dict) or "model_type" not in member:
        raise ValueError(
            f"members[{position}] must be a configuration as a dict with a model_type (config.to_dict()), "
            f"got {member!r}."
        )
    # It changes what it is given.
    return AutoConfig.for_model(**copy.deepcopy(member))


def plain_values(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as it can stand in a JSON file."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in _OWN_NAMES}


def as_member(config: PreTrainedConfig) -> dict[str, Any]:
    """What a cascade's configuration holds of a member's."""
    return {name: value for name, value in plain_values(config).items() if name not in _OF_THE_CASCADE}


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


def check_tokenizers(configs: list[PreTrainedConfig]) -> None:
    """A `ValueError` for members that one tokenizer cannot serve."""
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
