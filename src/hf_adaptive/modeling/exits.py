"""Classifiers that answer after a few layers when they are sure.

Rotem et al., ACL 2023 (arXiv 2306.02307): early exit, section 2; SWEET, section 4.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple, logging

from .answers import Answers, ExitAnswer, Leaving
from .constant_heads import install_constant_heads
from .criteria import ForcedPolicy, Policy
from .decisions import DecidesRowByRow
from .heads import CertaintyUnit, ExitHead
from .initialising import InitialisesAsStock
from .inputs import BackboneInputs, checked_tensors, positions_of_real_tokens, raise_misfit
from .labels import read_labels
from .layers import LayerList, LayerRun, Pause, Progress, install_layer_list
from .loading import CheckpointForExits, LoadsPlainCheckpoints, check_exits
from .local_gradients import LocalGradients, can_be_local, trained_parameters
from .losses import exit_loss
from .outputs import SequenceClassifierWithExitsOutput
from .prediction import PredictsDatasets
from .routing import gradient_share, pass_gradient
from .saving import SavesWhole
from .stock_exit import GivesStockClassifiers
from .weight_files import LoadsSafetensors

logger = logging.get_logger(__name__)

# What an evaluation with Trainer leaves on the device.
NOT_GATHERED = ("exit_logits", "exit_index", "exit_certainty", "hidden_states", "attentions")


class ExitsMixin(
    SavesWhole,
    LoadsPlainCheckpoints,
    LoadsSafetensors,
    InitialisesAsStock,
    GivesStockClassifiers,
    PredictsDatasets,
    DecidesRowByRow,
):
    """A head after each of `config.exit_layers` of an unmodified backbone.

    In training mode every exit is computed, and the loss is the sum of theirs (`exit_loss_weights`), routed by
    `exit_routing`; under SWEET each segment's activations are freed before the next one is run
    (`exit_local_gradients`). An exit before the last may have a branch, layers of its own (`exit_branch_layers`). In
    evaluation mode each row leaves at the first exit where `exit_criterion` reaches that exit's threshold; the batch
    shrinks, and a row's answer does not depend on the other rows.
    """

    # The loss is a mean over the batch; Trainer must scale it when it accumulates gradients (transformers#47688).
    accepts_loss_kwargs = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.num_labels = config.num_labels
        backbone = self.architecture.stock("Model")(config, **self.architecture.model_arguments)
        for parameter in backbone.parameters():
            # Some of DeBERTa's are made as float32, whatever the type of the model.
            parameter.data = parameter.data.to(torch.get_default_dtype())
        setattr(self, self.base_model_prefix, backbone)
        if config.constant_heads:
            install_constant_heads(backbone, self.architecture, config)
        install_layer_list(backbone, self.architecture.layers)
        self.exits = nn.ModuleList(self._make_exit(depth) for depth in config.exit_layers)
        self._exits_are_untrained = True
        self._check_routing_of_shared_layers()
        self._freeze_if_disjoint()
        config.keys_to_ignore_at_inference = list(NOT_GATHERED)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CertaintyUnit):
            init.zeros_(module.least)
            init.ones_(module.largest)
        if isinstance(module, ExitHead) and self.architecture.head.initialise is not None:
            self.architecture.head.initialise(module, self.config)

    # Loading

    @classmethod
    def _plain_checkpoint(
        cls, path: str | os.PathLike[str], config: Any, arguments: dict[str, Any]
    ) -> CheckpointForExits:
        return CheckpointForExits(cls, cls.architecture.plain_classifier, path, config, arguments)

    def _check_loaded(self, path: str | os.PathLike[str], info: dict[str, Any], saved: dict[str, Any]) -> None:
        # A backbone saved from a model with exits (`model.base_model.save_pretrained`) has none: all of them are new,
        # and reported as such.
        self._exits_are_untrained = all(f"exits.{key}" in info["missing_keys"] for key in self.exits.state_dict())
        if self._exits_are_untrained:
            self._start_branches_anew()
        else:
            check_exits(path, info, saved, self.config)

    def _after_loading(self) -> None:
        self._freeze_if_disjoint()

    def _freeze_if_disjoint(self) -> None:
        """No exit trains the backbone then; called again after loading, which makes new parameters."""
        if self.config.exit_routing == "disjoint":
            self.base_model.requires_grad_(False)

    def _make_exit(self, depth: int) -> ExitHead:
        path = self.architecture.final_norm
        has_own_norm = path is not None and depth < self.config.num_hidden_layers
        norm = self.base_model.get_submodule(path) if has_own_norm else None
        return ExitHead(self.config, self.architecture.head, norm, self._make_branch(depth))

    def _make_branch(self, depth: int) -> list[nn.Module]:
        """Copies of the trunk's layers before an exit."""
        # Not of the configuration that layers know: a change of the attention implementation reaches the branch, too.
        known = (self.config, self.base_model.config)
        return [
            copy.deepcopy(self._layer_at(own), {id(config): config for config in known})
            for own in range(depth - self.config.branch_length(depth), depth)
        ]

    def _layer_at(self, depth: int) -> nn.Module:
        """The module that is run as the layer at this depth (ALBERT has fewer modules than layers)."""
        return self._layers[depth * len(self._layers) // self.config.num_hidden_layers]

    def _start_branches_anew(self) -> None:
        """Copies the trunk's layers into the branches once more: it was loaded, they were not."""
        for depth, head in zip(self.config.exit_layers, self.exits):
            branch = cast(ExitHead, head).branch
            for own, layer in zip(range(depth - len(branch), depth), branch):
                layer.load_state_dict(self._layer_at(own).state_dict())

    def _check_routing_of_shared_layers(self) -> None:
        is_share = 0 < gradient_share(self.config.exit_routing) < 1
        if self.architecture.shares_layers and is_share and self._boundaries:
            raise ValueError(
                f"exit_routing={self.config.exit_routing!r} has no meaning for {self.architecture.name}, whose layers "
                "are one shared module: use 'joint', 'sweet' (the module learns from the first exit) or "
                "'disjoint'; or set exit_branch_layers=1, for layers of the exits' own."
            )

    @property
    def certainty_ranges(self) -> list[tuple[float, float]]:
        """Least and largest certainty of each exit's learned unit (`exit_criterion="learned"`)."""
        units = [cast(ExitHead, head).certainty for head in self.exits]
        return [(unit.least.item(), unit.largest.item()) for unit in units if unit is not None]

    def set_certainty_ranges(self, ranges: Sequence[tuple[float, float]]) -> None:
        """Sets them, one for each exit."""
        for head, (least, largest) in zip(self.exits, ranges):
            unit = cast(CertaintyUnit, cast(ExitHead, head).certainty)
            unit.least.fill_(least)
            unit.largest.fill_(largest)

    @property
    def _stages(self) -> tuple[int, ...]:
        """Where rows can wait for others, in layers run."""
        return tuple(self.config.exit_layers[:-1])

    @property
    def _layers(self) -> LayerList:
        return attrgetter(self.architecture.layers)(self.base_model)

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
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierWithExitsOutput:
        """Classifies a batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Tokens; or give `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 at real tokens, 0 at padding.
            token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Segment of each token.
            position_ids (`torch.LongTensor` of shape `(batch, length)` or `(1, length)`, *optional*): Positions.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*): Instead of `input_ids`.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`, *optional*): Class indexes, or 0/1 per
                label (float), or numbers (regression), as in any `…ForSequenceClassification`.
            exit_thresholds (`list[float | None]` or `float`, *optional*): Instead of those in the configuration.
                Evaluation mode only. None for an exit: nothing leaves there.
            exit_at (`int`, *optional*): Every row leaves after this layer, one of `exit_layers`. Evaluation mode only.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*), output_attentions (`bool`, *optional*): As
                in any model; everything is run then.

        Raises:
            ValueError: Empty batch; neither or both of `input_ids` and `inputs_embeds`; thresholds, `exit_at` or
                labels that cannot be used.
        """
        self.config.check_before_use()
        inputs = self._inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if labels is not None:
            labels = read_labels(labels, inputs.rows, self.config)
        policy = self._policy(exit_thresholds, exit_at)
        flags = self._output_flags(output_hidden_states, output_attentions)
        loss, outputs = None, ModelOutput()
        if policy is not None and not flags:
            answers = self._leave_early(inputs, policy)
        elif labels is not None and self._learns_locally(inputs, flags):
            answers, loss = self._learn_locally(inputs, labels)
        else:
            answers, outputs = self._run_everything(inputs, flags)
            if policy is not None:
                answers.exit_index = self._choose_exits(answers, policy)
        if labels is not None and loss is None:
            loss = self._loss(answers, labels, policy)
        return SequenceClassifierWithExitsOutput(
            loss=loss,
            **self._scores(answers, loss),
            exit_index=answers.exit_index,
            exit_certainty=answers.certainty,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    # What is asked for

    def _inputs(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> BackboneInputs:
        named = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs = BackboneInputs(checked_tensors(named), None)
        inputs.mask = self._padding_mask(input_ids, attention_mask, inputs.rows)
        if self.architecture.positions_from_mask and "position_ids" not in inputs.tensors and inputs.can_be_trimmed:
            inputs.tensors["position_ids"] = positions_of_real_tokens(inputs.tensors["attention_mask"])
        return inputs

    def _padding_mask(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, rows: int
    ) -> torch.Tensor | None:
        pooling, pad = self.config.exit_pooling, self.config.pad_token_id
        if pooling == "last" and rows > 1 and pad is None:
            raise ValueError(
                "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id (to the "
                "tokenizer's), or give one row at a time."
            )
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask
        if attention_mask is not None and pooling != "cls":
            raise ValueError(
                f"exit_pooling={pooling!r} needs an attention_mask of shape (batch, length), got "
                f"{tuple(attention_mask.shape)}."
            )
        return (input_ids != pad).long() if pooling == "last" and input_ids is not None and pad is not None else None

    def _output_flags(
        self, output_hidden_states: bool | int | list[int] | None, output_attentions: bool | None
    ) -> dict[str, bool | int | list[int]]:
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        asked = {name: getattr(self.config, name) if value is None else value for name, value in asked.items()}
        return {name: value for name, value in asked.items() if value}

    # Running everything

    def _run_everything(self, inputs: BackboneInputs, flags: dict[str, Any]) -> tuple[Answers, Any]:
        across_boundary = self._boundary()
        answers: list[ExitAnswer] = []

        def at_exit(depth: int, hidden: torch.Tensor) -> torch.Tensor:
            answers.append(self._exit_answer(len(answers), hidden, inputs))
            return across_boundary(hidden)

        outputs, _ = self._run_layers(inputs, at_exit, flags)
        answers.append(self._exit_answer(len(answers), outputs.last_hidden_state, inputs))
        return Answers.of_every_exit(answers), outputs

    def _boundary(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What a tensor goes through on its way from one segment to the next, or to an exit beside the trunk."""
        # Without gradients there is no need to look: layers are many, and batches too.
        share, is_checkpointed = self._gradient_share, torch.is_grad_enabled() and self._is_checkpointed

        def across(tensor: torch.Tensor) -> torch.Tensor:
            passed = pass_gradient(tensor, share)
            # A reentrant checkpoint gives a layer no gradient if its input needs none.
            return passed.requires_grad_(tensor.requires_grad) if is_checkpointed else passed

        return across

    @property
    def _is_checkpointed(self) -> bool:
        return any(
            layer.gradient_checkpointing for layer in self._layers if isinstance(layer, GradientCheckpointingLayer)
        )

    def _learns_locally(self, inputs: BackboneInputs, flags: dict[str, Any]) -> bool:
        """Whether this pass may compute the gradients of each segment and free its activations."""
        return (
            self.config.exit_local_gradients
            and self.config.exit_routing != "disjoint"
            and gradient_share(self.config.exit_routing) == 0
            and self.training
            and torch.is_grad_enabled()
            and not flags  # hidden states would have no gradient
            and not any(tensor.requires_grad for tensor in inputs.tensors.values())
            and not self._is_checkpointed  # saves the memory in its own way
            and can_be_local(self)
        )

    def _learn_locally(self, inputs: BackboneInputs, labels: torch.Tensor) -> tuple[Answers, torch.Tensor]:
        """Runs everything; each exit's gradients are computed before the next segment is run."""
        gradients = LocalGradients(trained_parameters(self))
        answers: list[ExitAnswer] = []

        def at_exit(depth: int, hidden: torch.Tensor) -> torch.Tensor:
            index = len(answers)
            answer = self._exit_answer(index, hidden, inputs)
            gradients.add(
                answer.tensors,
                lambda logits, certainty=None: exit_loss(index, logits, certainty, labels, self.config),
            )
            answers.append(answer.without_gradient())
            return hidden.detach()

        outputs, _ = self._run_layers(inputs, at_exit)
        at_exit(self.config.num_hidden_layers, outputs.last_hidden_state)
        return Answers.of_every_exit(answers), gradients.loss()

    def _run_layers(
        self,
        inputs: BackboneInputs,
        at_exit: Callable[[int, torch.Tensor], torch.Tensor],
        flags: dict[str, Any] | None = None,
        progress: Progress | None = None,
        stop: int | None = None,
        policy: Policy | None = None,
    ) -> tuple[Any, Progress]:
        """Runs the backbone, from `progress` on and up to the exit after `stop` layers.

        With a policy, branches that it does not ask are not run. Outputs are None where it was paused, by `at_exit` or
        at `stop`, and mean nothing where it was traced to there.
        """
        run = LayerRun(
            self._layers,
            self._branches(policy),
            at_exit,
            to_exit=self._boundary(),
            shared_gradient=self._shared_gradient,
            may_learn_again=self._may_learn_again,
            progress=progress,
            stop=stop,
            trunk_waits=policy is not None,
        )
        arguments = {**inputs.tensors, **self.architecture.forward_arguments, **(flags or {})}
        try:
            with run:
                return self.base_model(**arguments, return_dict=True), run.progress
        except Pause:
            return None, run.progress
        except (IndexError, RuntimeError) as error:
            raise_misfit(inputs, self.config, error)
            raise

    def _branches(self, policy: Policy | None) -> Mapping[int, Sequence[nn.Module]]:
        """Each exit's own layers, by the depth of the exit; of those before the last that are to be run."""
        branches = [list(cast(ExitHead, head).branch) for head in self.exits][:-1]
        return {
            depth: branch
            for index, (depth, branch) in enumerate(zip(self.config.exit_layers, branches))
            if not branch or policy is None or policy.asks(index)
        }

    def _shared_gradient(self, depth: int, tensor: torch.Tensor) -> torch.Tensor:
        # What layers share (DeBERTa's relative embeddings) learns as a layer of the first segment does.
        return pass_gradient(tensor, self._gradient_share ** self._segment(depth))

    def _may_learn_again(self, first: int, depth: int) -> bool:
        # A module that several segments run (ALBERT) learns in the first of them only.
        return self._gradient_share > 0 or self._segment(first) == self._segment(depth)

    @property
    def _gradient_share(self) -> float:
        """Share of a gradient that passes an exit; all of it but in training, for an explanation of the network."""
        return gradient_share(self.config.exit_routing) if self.training else 1.0

    def _segment(self, depth: int) -> int:
        """Index of the segment of the layer at this depth."""
        return sum(boundary <= depth for boundary in self._boundaries)

    @property
    def _boundaries(self) -> list[int]:
        """Depths of the exits that divide the trunk into segments: those that are not beside it."""
        early = self.config.exit_layers[:-1]
        return [depth for depth in early if depth > 0 and self.config.branch_length(depth) == 0]

    def _exit_answer(self, index: int, hidden: torch.Tensor, inputs: BackboneInputs) -> ExitAnswer:
        head = cast(ExitHead, self.exits[index])
        if self.training and self.config.exit_routing == "disjoint" and not head.branch:
            hidden = hidden.detach()
        mask = None if inputs.mask is None else inputs.mask.to(hidden.device)
        logits, certainty = head(hidden, self.config.exit_pooling, mask)
        temperatures = self.config.exit_temperatures
        return ExitAnswer(logits if temperatures is None else logits / temperatures[index], certainty)

    # Leaving early

    def _forced_policy(self, thresholds: Any, exit_at: int) -> Policy | None:
        policy = super()._forced_policy(thresholds, exit_at)
        if policy is None and any(self.config.exit_branch_costs) and not self.training:
            return ForcedPolicy(len(self.exits) - 1)  # without the branches of the exits before
        return policy

    def _run_until(self, inputs: BackboneInputs, index: int) -> Answers:
        """Runs all rows up to one exit, which all of them take."""
        answers: dict[int, ExitAnswer] = {}

        def note(own: int, hidden: torch.Tensor) -> None:
            answers[own] = self._exit_answer(own, hidden, inputs).to(inputs.device)

        def at_exit(depth: int, hidden: torch.Tensor) -> torch.Tensor:
            note(self.config.exit_layers.index(depth), hidden)
            return hidden

        is_last = index == len(self.exits) - 1
        stop = None if is_last else self.config.exit_layers[index]
        outputs, _ = self._run_layers(inputs, at_exit, policy=ForcedPolicy(index), stop=stop)
        if is_last:
            note(index, outputs.last_hidden_state)
        said = [answers.get(own, answers[index].like_unreached()) for own in range(index + 1)]
        return Answers.of_every_exit(said, unreached=len(self.exits) - len(said))

    def _run_until_rows_leave(self, leaving: Leaving, progress: Progress | None = None) -> Progress | None:
        """Runs a batch to the next exit where a row leaves; None if no row is left or the last layer was run."""

        def at_exit(depth: int, hidden: torch.Tensor) -> torch.Tensor:
            index = self.config.exit_layers.index(depth)
            leaving.answer(index, self._exit_answer(index, hidden, leaving.inputs))
            leaving.decide(index)
            if len(leaving.staying) < len(leaving.rows):
                raise Pause
            return hidden

        outputs, progress = self._run_layers(leaving.inputs, at_exit, progress=progress, policy=leaving.policy)
        if outputs is None:
            return progress if len(leaving.staying) else None
        last = len(self.exits) - 1
        leaving.answer(last, self._exit_answer(last, outputs.last_hidden_state, leaving.inputs))
        return None
