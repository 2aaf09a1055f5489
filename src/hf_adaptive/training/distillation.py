"""Early exits that learn from the last one, or from a teacher model, beside the labels.

Hinton et al., 2015 (arXiv 1503.02531): the softened probabilities, and the square of the temperature that keeps the
gradients' size. Exits that learn from the last one: FastBERT (Liu et al., ACL 2020), there in a second stage.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.checks import is_number
from ..modeling.criteria import problem_type
from ..modeling.labels import has_label, problem_type_of

logger = logging.get_logger(__name__)

# Labels' names that transformers makes up where there are none.
_MADE_UP = "LABEL_"
_READ_BY_A_TEACHER = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


@dataclass(frozen=True)
class ExitDistillation:
    """What every exit before the last learns from the scores of a teacher, beside the labels.

    An exit's loss becomes its loss from the labels plus `weight` times its distance to the teacher: the
    Kullback-Leibler divergence of the softened probabilities (of each yes/no answer where there are several labels)
    times the temperature's square, or for numbers the mean squared difference. `exit_loss_weights` weigh both. The
    teacher gets no gradient, and an evaluation's loss is from the labels only. Rows without a label (-100) are left
    out, as they are everywhere.

    Without a teacher, the last exit is it. Under SWEET without branches that feeds on itself: the last exit reads
    layers that are the earlier exits' own, which learn from it (in the study, exits lost 6 to 15 points on SST-2 and 8
    to 28 on TREC against models of their own). Give the exits branches then, or another teacher.

    Also without a teacher, SWEET's segments cannot be learned one after another, because the
    first would have to wait for the last, and a step needs the memory that joint training needs
    (`exit_local_gradients` has no effect).

    Args:
        weight (`float`): Of the distance to the teacher.
        temperature (`float`): Scores are divided by it on both sides; without meaning for numbers.
        teacher (`PreTrainedModel` or `str`, *optional*): A classifier with the same labels and tokens; or the name of
            the column of the training data that holds a teacher's logits, see [`add_teacher_logits`]; None for the
            model's own last exit.

    Raises:
        ValueError: A weight below 0, or a temperature that is not above 0.
        TypeError: A teacher that is none of these.
    """

    weight: float = 1.0
    temperature: float = 2.0
    teacher: PreTrainedModel | str | None = None

    def __post_init__(self) -> None:
        if not is_number(self.weight) or self.weight < 0:
            raise ValueError(f"weight must be a finite number of at least 0, got {self.weight!r}.")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature!r}.")
        if self.teacher is not None and not isinstance(self.teacher, (PreTrainedModel, str)):
            raise TypeError(
                "teacher must be a classifier, the name of a column with its logits, or None (the own last exit), got "
                f"a {type(self.teacher).__name__}."
            )

    @property
    def column(self) -> str | None:
        """Column of the data that holds the teacher's logits."""
        return self.teacher if isinstance(self.teacher, str) else None

    def check(self, config: Any) -> None:
        """Raises `ValueError` unless a model of this configuration can learn from this teacher."""
        if len(config.exit_layers) == 1:
            raise ValueError(
                f"distillation needs exits before the last, which learn from it, but exit_layers="
                f"{config.exit_layers}. Add exits, or leave distillation out."
            )
        if isinstance(self.teacher, PreTrainedModel):
            check_teacher(self.teacher.config, config)

    def teacher_logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The teacher's scores of a batch, `(batch, labels)`; None where the own last exit is the teacher.

        Raises:
            ValueError: The batch has no column of that name.
        """
        if isinstance(self.teacher, PreTrainedModel):
            return scores_of(self.teacher, inputs)
        if self.column is None:
            return None
        if self.column not in inputs:
            raise ValueError(
                f"the batch has no column {self.column!r} with the teacher's logits, only {sorted(inputs)}: add it "
                f"with add_teacher_logits(dataset, teacher, column={self.column!r})."
            )
        return inputs[self.column]

    def loss(
        self,
        exit_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        labels: torch.Tensor | None,
        config: Any,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Weighted sum over the exits before the last of their distance to the teacher.

        Args:
            exit_logits (`torch.Tensor` of shape `(batch, exits, labels)`): Scores of every exit.
            teacher_logits (`torch.Tensor` of shape `(batch, labels)`, *optional*): None: those of the last exit.
            labels (`torch.Tensor`, *optional*): Rows without one are left out.
            config: The model's configuration.
            num_items_in_batch (`int`, *optional*): What the sum over the rows is divided by, as in
                `Trainer.compute_loss`; None for their number.

        Returns:
            `torch.Tensor`: A scalar.

        Raises:
            ValueError: The teacher's scores are of another shape.
        """
        teacher = exit_logits[:, -1] if teacher_logits is None else teacher_logits
        if teacher.shape != exit_logits[:, -1].shape:
            raise ValueError(
                f"the teacher's logits must have shape {tuple(exit_logits[:, -1].shape)}, got {tuple(teacher.shape)}."
            )
        kind = problem_type(config) if labels is None else problem_type_of(labels, config)
        distances = self._distances(exit_logits[:, :-1], teacher.detach().to(exit_logits).unsqueeze(1), kind)
        counted = torch.ones_like(distances[:, 0]) if labels is None else has_label(labels, kind).to(distances)
        items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        by_exit = (distances * counted.unsqueeze(1)).sum(dim=0) / items
        weights = [1.0] * exit_logits.shape[1] if config.exit_loss_weights is None else config.exit_loss_weights
        return self.weight * (by_exit * by_exit.new_tensor(weights[:-1])).sum()

    def _distances(self, students: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
        """Of each exit's answer to the teacher's, `(batch, exits - 1)`; in float32 at least."""
        students, teacher = (_at_least_float32(scores) for scores in (students, teacher))
        if kind == "regression":
            return ((students - teacher) ** 2).mean(dim=-1)
        students, teacher = students / self.temperature, teacher / self.temperature
        if kind == "multi_label_classification":
            yes = _divergence(students, teacher) + _divergence(-students, -teacher)
            return self.temperature**2 * yes.mean(dim=-1)
        expected = teacher.log_softmax(dim=-1)
        divergence = expected.exp() * (expected - students.log_softmax(dim=-1))
        return self.temperature**2 * divergence.sum(dim=-1)


def _divergence(students: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """What one of the two answers adds to the divergence of yes/no answers."""
    expected = nn.functional.logsigmoid(teacher)
    return expected.exp() * (expected - nn.functional.logsigmoid(students))


def check_teacher(teacher: Any, config: Any) -> None:
    """Raises `ValueError` where the configurations of a teacher and a model do not speak of the same."""
    if teacher.num_labels != config.num_labels:
        raise ValueError(
            f"the teacher has {teacher.num_labels} labels, the model {config.num_labels}: they must be the same ones."
        )
    theirs, own = (_names(one) for one in (teacher, config))
    if theirs is not None and own is not None and theirs != own:
        raise ValueError(
            f"the teacher's labels are {theirs}, the model's {own}: they must be the same, in the same order. Set "
            "id2label of the one that is wrong, or train the teacher again."
        )
    if problem_type(teacher) != problem_type(config):
        raise ValueError(
            f"the teacher's problem_type is {problem_type(teacher)!r}, the model's {problem_type(config)!r}: set "
            "problem_type in both configurations if they are meant to be the same."
        )
    if getattr(teacher, "vocab_size", None) != getattr(config, "vocab_size", None):
        raise ValueError(
            f"the teacher has vocab_size={getattr(teacher, 'vocab_size', None)}, the model "
            f"{getattr(config, 'vocab_size', None)}: they read different tokens. Tokenise the data for the teacher, "
            "compute its logits with add_teacher_logits, and give the column's name instead."
        )


def _names(config: Any) -> list[str] | None:
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    return None if all(name.startswith(_MADE_UP) for name in names) else names


@torch.no_grad()
def scores_of(teacher: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A classifier's scores of a batch, `(batch, labels)`, in evaluation mode, on the device of the batch."""
    parameters = inspect.signature(teacher.forward).parameters
    given = {name: inputs[name] for name in _READ_BY_A_TEACHER if name in inputs and name in parameters}
    device = next(iter(given.values())).device
    if teacher.device != device:
        teacher.to(device)  # type: ignore[arg-type]
    return teacher.eval()(**given).logits


def add_teacher_logits(
    dataset: Any,
    teacher: PreTrainedModel,
    *,
    collator: Any,
    column: str = "teacher_logits",
    batch_size: int = 32,
    show_progress: bool = True,
) -> Any:
    """The data set with a teacher's logits of every example in one more column, computed once for all epochs.

    Args:
        dataset (`datasets.Dataset`): Tokenised for the teacher.
        teacher (`PreTrainedModel`): Any classifier.
        collator (`Callable`): Makes a batch of examples, such as `DataCollatorWithPadding` of the teacher's tokenizer.
        column (`str`): Name of the new column, a list of numbers an example.
        batch_size (`int`): Examples run at a time.
        show_progress (`bool`): Whether to show a bar.

    Raises:
        ValueError: No examples, or a column of that name is there already.
    """
    if len(dataset) == 0:
        raise ValueError("there are no examples: give at least one.")
    if column in dataset.column_names:
        raise ValueError(f"the data set has a column {column!r} already: give the new one another name.")
    names = [name for name in _READ_BY_A_TEACHER if name in dataset.column_names]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = np.argsort(lengths, kind="stable")
    logits: list[Sequence[float]] = [()] * len(dataset)
    starts = range(0, len(order), batch_size)
    for start in logging.tqdm(starts, desc="Asking the teacher", disable=not show_progress):
        rows = order[start : start + batch_size].tolist()
        examples = [dataset[row] for row in rows]
        batch = collator([{name: example[name] for name in names} for example in examples])
        scores = scores_of(teacher, {name: tensor.to(teacher.device) for name, tensor in batch.items()})
        for row, values in zip(rows, scores.float().tolist()):
            logits[row] = values
    return dataset.add_column(column, logits)


def _at_least_float32(scores: torch.Tensor) -> torch.Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
