"""The fields that exits add to a configuration, and their checks."""

import difflib
import itertools
import re
from dataclasses import dataclass, fields
from typing import Any

from .bases import ConfigBase
from .checks import check_choice, check_count, is_number, is_whole_number
from .criteria import CRITERIA, ThresholdPolicy, checked_thresholds
from .exit_profile import calibration_in_force, check_profile
from .head_choice import check_constant_heads
from .heads import POOLINGS
from .routing import SHARES
from .saving import ReadsWhole


def default_exit_layers(num_layers: int) -> list[int]:
    """Exits after each quarter of the layers."""
    return sorted({max(1, round(num_layers * quarter / 4)) for quarter in (1, 2, 3, 4)})


class ExtendsStockConfig(ConfigBase):
    """A stock configuration with fields added, and the way to it and back."""

    @classmethod
    def added_fields(cls) -> tuple[str, ...]:
        """Names of the fields that this configuration adds to the plain one."""
        raise NotImplementedError

    @classmethod
    def from_plain(cls, plain: Any, **fields: Any) -> Any:
        """A plain configuration with fields added.

        Args:
            plain: The base architecture's configuration.
            **fields: Those that are added: `exit_layers`, `constant_heads`, …
        """
        config = cls(**_transferable(plain.to_dict()), **fields)
        config._attn_implementation = plain._attn_implementation
        return config

    def to_plain(self) -> Any:
        """The base architecture's configuration, without the added fields."""
        values = _transferable(self.to_dict())
        plain = self.architecture.stock("Config")(
            **{name: value for name, value in values.items() if name not in self.added_fields()}
        )
        plain._attn_implementation = self._attn_implementation
        return plain


@dataclass(kw_only=True, repr=False)
class DecisionsConfigMixin(ReadsWhole):
    """What classifiers with exits and cascades have in common: when a row is answered, and what is learned.

    Args:
        exit_layers (`list[int]`, *optional*): Layers run before each exit, or layers of each member of a cascade.
        exit_loss_weights (`list[float]`, *optional*): Weight of each exit's loss; None for 1 each.
        exit_criterion (`str`): What is compared with the thresholds.
        exit_thresholds (`list[float | None]`, *optional*): One for each exit but the last; None for an exit that
            nothing may take. A single number stands for all. None: run everything.
        exit_temperatures (`list[float]`, *optional*): Each exit's logits are divided by its temperature; None for 1.
        exit_tolerance (`float`, *optional*): For `exit_criterion="patience"` in regression: numbers that differ by no
            more than this are the same answer.
        exit_calibration (`dict`, *optional*): What `calibrate_exits` was asked for, promised and saw when it stored
            thresholds and temperatures, in plain values; the card and the serving monitor read it.
    """

    exit_layers: list[int] = None  # type: ignore[assignment] # None is replaced at once
    exit_loss_weights: list[float | int] | None = None
    exit_criterion: str = "confidence"
    exit_thresholds: list[float | int | None] | float | int | None = None
    exit_temperatures: list[float | int] | None = None
    exit_tolerance: float | int | None = None
    exit_calibration: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(kwargs, ("exit_", "constant_"), self.added_fields())
        if "num_labels" in kwargs:
            check_count("num_labels", kwargs["num_labels"])
        super().__post_init__(**kwargs)
        self._complete_exits()

    def _complete_exits(self) -> None:
        """Checks the fields that are added to the plain configuration, and fills in the defaults."""
        self._check_decisions()

    def _check_decisions(self) -> None:
        """Checks the fields that say when rows leave and what is learned."""
        check_count("num_labels", self.num_labels)
        self.check_before_use()
        if self.exit_loss_weights is not None:
            self.exit_loss_weights = list(self.exit_loss_weights)
        if self.exit_temperatures is not None:
            self.exit_temperatures = list(self.exit_temperatures)
        check_calibration(self.exit_calibration, len(self.exit_layers))
        if self.exit_thresholds is not None:
            self.exit_thresholds = self.checked_thresholds(self.exit_thresholds)

    def check_before_use(self) -> None:
        """Checks what may have been set since the configuration was made; thresholds are checked with their policy.

        Raises:
            ValueError: A value that cannot be used; it names the value, what is allowed, and the fix.
        """
        check_choice("exit_criterion", self.exit_criterion, tuple(CRITERIA))
        self._check_list("exit_loss_weights", "a finite number of at least 0", lambda x: x >= 0)
        if self.exit_loss_weights is not None and not any(self.exit_loss_weights):
            raise ValueError("exit_loss_weights must have at least one number above 0: nothing would be learned.")
        self._check_list("exit_temperatures", "a finite number above 0", lambda x: x > 0)
        if self.exit_tolerance is not None and not (is_number(self.exit_tolerance) and self.exit_tolerance >= 0):
            raise ValueError(
                "exit_tolerance must be a finite number of at least 0, in the unit of the labels, or None, got "
                f"{self.exit_tolerance!r}."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from the content of its file, with fields changed by `kwargs`; those are checked too.

        Raises:
            ValueError: As when a configuration is made.
        """
        if "num_labels" in kwargs:
            check_count("num_labels", kwargs["num_labels"])
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        # Stock code would set them after the configuration was made and checked, and then write it to a log.
        own = {name: kwargs.pop(name) for name in cls.added_fields() if name in kwargs}
        config, unused = super().from_dict({**config_dict, **own}, return_unused_kwargs=True, **kwargs)
        refuse_unknown_fields(unused, ("exit_", "constant_"), cls.added_fields())
        config._complete_exits()
        return (config, unused) if wants_unused else config

    def checked_thresholds(self, thresholds: Any) -> list[float | None]:
        """The thresholds as one number (or None) for each exit but the last.

        Raises:
            ValueError: Wrong number of thresholds, or one outside the criterion's range.
        """
        return checked_thresholds(thresholds, self.exit_layers, self.exit_criterion)

    @property
    def calibration_in_force(self) -> dict[str, Any] | None:
        """`exit_calibration`, if the thresholds and temperatures are still those that it speaks of."""
        return calibration_in_force(self)

    def _check_list(self, name: str, allowed: str, is_allowed: Any) -> None:
        values = getattr(self, name)
        if values is None:
            return
        expected = len(self.exit_layers)
        if not isinstance(values, (list, tuple)) or len(values) != expected:
            raise ValueError(
                f"{name} must be a list of {expected} numbers, one for each exit (exit_layers={self.exit_layers}), "
                f"got {values!r}."
            )
        for position, value in enumerate(values):
            if not is_number(value) or not is_allowed(value):
                raise ValueError(f"{name}[{position}] must be {allowed}, got {value!r}.")

    @property
    def exit_branch_costs(self) -> list[float]:
        """The part of each exit's cost that is its branch: what a row that goes on has paid for it.

        Saved where the exit's threshold is None, unless `exit_criterion="patience"` compares it with a later exit.
        """
        return [0.0] * len(self.exit_layers)

    def exit_costs_under(self, thresholds: Any) -> list[float]:
        """`exit_costs` with these thresholds: without the branches that are not run then.

        Raises:
            ValueError: As `checked_thresholds`.
        """
        thresholds = self.checked_thresholds(thresholds)
        policy = ThresholdPolicy(CRITERIA[self.exit_criterion], thresholds)
        runs_everything = all(threshold is None for threshold in thresholds)
        saved = [
            0.0 if runs_everything or policy.asks(index) else cost
            for index, cost in enumerate(self.exit_branch_costs[:-1])
        ]
        return [cost - gone for cost, gone in zip(self.exit_costs, itertools.accumulate(saved, initial=0.0))]

    @classmethod
    def added_fields(cls) -> tuple[str, ...]:
        """Names of the fields that this configuration adds to the plain one."""
        return tuple(field.name for field in fields(DecisionsConfigMixin))


@dataclass(kw_only=True, repr=False)
class ExitsConfigMixin(DecisionsConfigMixin, ExtendsStockConfig):
    """Configuration of a classifier with exits: the base architecture's fields and the following.

    Args:
        exit_layers (`list[int]`, *optional*): Layers run before each exit, ascending, the last one the number of
            layers; 0 is an exit on the embeddings. Defaults to an exit after each quarter of the layers.
        exit_routing (`str` or `float`): Which layers an exit's loss may update: `joint` all below it, `sweet` only
            those since the exit before it, `disjoint` none (heads on a frozen backbone); or the share of a later
            exit's gradient that passes each boundary, from 0 (as `sweet`) to 1 (as `joint`). The boundary of an exit
            beside the trunk (with a branch, or on the embeddings) lies between the trunk and the exit: with `sweet`
            it updates its branch and head only, and the trunk learns from the last exit as in plain fine-tuning.
        exit_branch_layers (`int` or `list[int]`): Own last layers of every exit but the last and one on the
            embeddings: a branch, copied from the pretrained layers, that reads the trunk's state so many layers before
            the exit. At most the distance to the exit before. A list has one number for each exit but the last.
        exit_loss_weights (`list[float]`, *optional*): Weight of each exit's loss; None for 1 each.
        exit_pooling (`str`, *optional*): What an exit's head sees: `cls` (first token), `mean` (of the real tokens) or
            `last` (last real token), or `late` (mean after the head's dense layer). Default by architecture.
        exit_criterion (`str`): What is compared with the thresholds.
        exit_thresholds (`list[float | None]`, *optional*): One for each exit but the last; None for an exit that
            nothing may take. A single number stands for all. None: run everything.
        exit_temperatures (`list[float]`, *optional*): Each exit's logits are divided by its temperature; None for 1.
        exit_tolerance (`float`, *optional*): For `exit_criterion="patience"` in regression: numbers that differ by no
            more than this are the same answer.
        exit_calibration (`dict`, *optional*): What `calibrate_exits` was asked for, promised and saw when it stored
            thresholds and temperatures, in plain values; the card and the serving monitor read it.
        exit_local_gradients (`bool`): Under SWEET, compute the gradients of each segment during the forward pass and
            free its activations before the next one is run: the same gradients in a fraction of the memory. Where that
            cannot be done (sharded parameters, gradient checkpointing, hooks on gradients) it has no effect.
        constant_heads (`list[list[int]]`, *optional*): `[layer, head]` pairs, counted from 0, of heads whose attention
            matrix is a constant (PAPA).
        constant_length (`int`, *optional*): Size of the constant matrices, and then the longest input, in tokens.

    Raises:
        ValueError: For any value that cannot be used; it names the value, what is allowed, and the fix.
    """

    exit_routing: str | float | int = "sweet"
    exit_branch_layers: int | list[int] = 0
    exit_pooling: str | None = None
    exit_local_gradients: bool = True
    constant_heads: list[Any] | None = None
    constant_length: int | None = None

    def _complete_exits(self) -> None:
        if self.architectures is not None:
            self.architectures = named_by_task(self.architectures)
        if self.exit_layers is None:
            self.exit_layers = default_exit_layers(self.num_hidden_layers)
        if self.exit_pooling is None:
            self.exit_pooling = self.architecture.default_pooling(self)
        if self.constant_heads is not None:
            check_constant_heads(self)
        check_exit_layers(self.exit_layers, self.num_hidden_layers, first=0)
        self.exit_layers = list(self.exit_layers)
        check_routing(self.exit_routing)
        check_branch_layers(self.exit_branch_layers, self.exit_layers)
        if isinstance(self.exit_branch_layers, tuple):
            self.exit_branch_layers = list(self.exit_branch_layers)
        check_choice("exit_pooling", self.exit_pooling, POOLINGS)
        check_pooling_of_embeddings(self.exit_pooling, self.exit_layers)
        check_choice("exit_local_gradients", self.exit_local_gradients, (True, False))
        self._check_decisions()

    def check_before_use(self) -> None:
        """As in any configuration of exits; of the pooling, too.

        Raises:
            ValueError: A value that cannot be used.
        """
        check_choice("exit_pooling", self.exit_pooling, POOLINGS)
        check_pooling_of_embeddings(str(self.exit_pooling), self.exit_layers)
        super().check_before_use()

    @classmethod
    def added_fields(cls) -> tuple[str, ...]:
        """Names of the fields that this configuration adds to the plain one."""
        return exit_field_names()

    @property
    def counts_positions(self) -> bool:
        """Whether padding on the left has to stay when a batch shrinks: constant attention goes by the position."""
        return bool(self.constant_heads)

    def branch_length(self, depth: int) -> int:
        """Own layers of the exit at this depth."""
        if not 0 < depth < self.num_hidden_layers:
            return 0
        lengths = self.exit_branch_layers
        return lengths if isinstance(lengths, int) else lengths[self.exit_layers.index(depth)]

    @property
    def exit_costs(self) -> list[float]:
        """Fraction of the layers run up to each exit, the branches of the exits before among them: it can exceed 1.

        A branch that nothing asks (see `exit_branch_costs`) is not run; `exit_at` runs the branch of one exit only.
        """
        passed = itertools.accumulate(self.exit_branch_costs, initial=0.0)
        return [depth / self.num_hidden_layers + cost for depth, cost in zip(self.exit_layers, passed)]

    @property
    def exit_branch_costs(self) -> list[float]:
        """As in any configuration with exits; branches are what this one has."""
        return [self.branch_length(depth) / self.num_hidden_layers for depth in self.exit_layers]


def named_by_task(architectures: list[str]) -> list[str]:
    """The names of classes, and the same with the task at the end, where stock classes have it.

    sentence-transformers' `CrossEncoder` takes a checkpoint for one without a head, of one label, unless one of the
    names ends in `ForSequenceClassification`.
    """
    moved = [re.sub(r"(For\w+)WithExits$", r"WithExits\1", name) for name in architectures]
    return list(dict.fromkeys([*architectures, *moved]))


def _transferable(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values without those that name its own class and origin."""
    own = ("architectures", "auto_map", "keys_to_ignore_at_inference", "model_type", "transformers_version")
    return {name: value for name, value in values.items() if name not in own}


def exit_field_names() -> tuple[str, ...]:
    """Names of the fields that exits add."""
    return tuple(field.name for field in fields(ExitsConfigMixin))


def refuse_unknown_fields(given: dict[str, Any], prefixes: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises `ValueError` for an unknown field that starts so; a typing error would go unnoticed."""
    for name in given:
        if name.startswith(prefixes):
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {closest[0]}?" if closest else ""
            raise ValueError(f"unknown configuration field {name!r}; the fields are {', '.join(known)}.{hint}")


def check_exit_layers(exit_layers: Any, num_layers: int, first: int = 1) -> None:
    """Raises `ValueError` unless ascending, from `first` on within the layers, and ending at the last one."""
    fix = f"Count layers run, ascending, the last one {num_layers} (the number of layers)"
    is_list = isinstance(exit_layers, (list, tuple)) and len(exit_layers) > 0
    if not is_list or not all(isinstance(depth, int) and not isinstance(depth, bool) for depth in exit_layers):
        raise ValueError(f"exit_layers must be a list of whole numbers, got {exit_layers!r}. {fix}.")
    outside = [depth for depth in exit_layers if not first <= depth <= num_layers]
    if outside:
        raise ValueError(
            f"exit_layers must lie between {first} and {num_layers}, got {outside} in {exit_layers}. {fix}; "
            "after the first layer is 1, not 0."
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(exit_layers)):
        raise ValueError(
            f"exit_layers must be ascending without repeats, got {exit_layers}. Use {sorted(set(exit_layers))}."
        )
    if exit_layers[-1] != num_layers:
        raise ValueError(
            f"exit_layers must end at the last layer, {num_layers}, got {exit_layers}. "
            f"Use {[*exit_layers, num_layers]}."
        )


def check_calibration(record: Any, exits: int) -> None:
    """Raises `ValueError` unless None or a record as `CalibrationReport.to_record` makes it for so many exits."""
    keys = {"wish", "guarantee", "measured", "num_examples", "thresholds", "temperatures", "profile"}
    if record is not None and (not isinstance(record, dict) or set(record) != keys):
        raise ValueError(
            f"exit_calibration must be None or a dict with the keys {', '.join(sorted(keys))}, got {record!r}. It is "
            "written by calibrate_exits; leave it out."
        )
    if record is not None:
        check_profile(record["profile"], exits)


def check_branch_layers(lengths: Any, exit_layers: list[int]) -> None:
    """Raises `ValueError` unless branches of so many layers fit between every exit and the one before it."""
    early = exit_layers[:-1]
    steps = [later - earlier for earlier, later in itertools.pairwise([0, *early])]
    if isinstance(lengths, (list, tuple)):
        allowed = f"a list of {len(early)} whole numbers, one for each exit but the last (exit_layers={exit_layers})"
        if len(lengths) != len(early) or not all(_is_count(length) for length in lengths):
            raise ValueError(f"exit_branch_layers must be {allowed}, or one number for all, got {lengths!r}.")
    elif not _is_count(lengths):
        raise ValueError(f"exit_branch_layers must be a whole number of layers, 0 for no branches, got {lengths!r}.")
    else:
        if lengths > 0 and not any(steps):
            raise ValueError(
                f"exit_branch_layers={lengths}, but there is no exit between the embeddings and the last layer "
                f"(exit_layers={exit_layers}) that could have a branch. Add exits, or set it to 0."
            )
        lengths = [lengths if depth > 0 else 0 for depth in early]
    too_long = [depth for depth, length, step in zip(early, lengths, steps) if length > step]
    if too_long:
        raise ValueError(
            f"exit_branch_layers={lengths} is longer than the way from one exit to the next: the exits in exit_layers="
            f"{exit_layers} are {steps} layers apart, which is too little for those after {too_long}. Use shorter "
            "branches (a list may give each exit another length), or move the exits apart."
        )


def check_pooling_of_embeddings(pooling: str, exit_layers: list[int]) -> None:
    """Raises `ValueError` for an exit on the embeddings that would look at one of them only."""
    if exit_layers[0] == 0 and pooling in ("cls", "last"):
        raise ValueError(
            f"exit_layers={exit_layers} has an exit on the embeddings, where no token knows of the others yet: with "
            f"exit_pooling={pooling!r} it would see one token, most often the same in every text. Use "
            "exit_pooling='mean', or leave 0 out of exit_layers."
        )


def check_routing(routing: Any) -> None:
    """Raises `ValueError` unless a known routing or a share from 0 to 1."""
    if isinstance(routing, str) and routing in SHARES:
        return
    if is_number(routing) and 0 <= routing <= 1:
        return
    raise ValueError(
        f"exit_routing must be one of {', '.join(map(repr, SHARES))}, or a number from 0 (sweet) to 1 (joint), "
        f"got {routing!r}."
    )


def _is_count(value: Any) -> bool:
    return is_whole_number(value) and value >= 0
