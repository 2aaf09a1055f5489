"""An exported classifier run one stage at a time: the `StagedModel` of `scheduling.py` in numpy and onnxruntime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..modeling.criteria import Evidence, Policy, problem_type
from ..modeling.examples import TokenisedExamples, read_examples
from ..modeling.scheduling import RowAnswers, StageResult
from ..warning import warn_caller
from .folder import NEXT_STATE, STATE
from .onnx_graphs import StageGraphs

# What starting a batch costs, in tokens that could be run through a layer instead, as in torch on a CPU.
_TOKENS_PER_START = 28


@dataclass
class OnnxRows:
    """Rows of one stage, padded on the right to a common length.

    Args:
        arrays (`dict[str, np.ndarray]`): What the graphs read, batch first; `state` where a stage goes on from one.
        lengths (`np.ndarray` of shape `(rows,)`): Tokens of each row.
        answers (`RowAnswers`): What the exits said so far.
    """

    arrays: dict[str, np.ndarray]
    lengths: np.ndarray
    answers: RowAnswers

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int] | np.ndarray) -> "OnnxRows":
        """Some of them, no longer than they need."""
        lengths = self.lengths[rows]
        longest = lengths.max()
        arrays = {name: array[rows, :longest] for name, array in self.arrays.items()}
        return OnnxRows(arrays, lengths, self.answers.select(rows))


class OnnxStages:
    """The stages of an exported classifier.

    Args:
        graphs (`StageGraphs`): What is run.
        config: Its configuration.
        policy (`Policy`, *optional*): When rows leave; None: all run to the last exit.
    """

    start_cost = _TOKENS_PER_START

    def __init__(self, graphs: StageGraphs, config: Any, policy: Policy | None):
        self.graphs = graphs
        self.config = config
        self.policy = policy
        self.padding = dict.fromkeys(graphs.inputs, 0) | {"input_ids": config.pad_token_id or 0}

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.graphs)

    def read(self, examples: Any) -> TokenisedExamples:
        """Checks examples, see [`read_examples`]."""
        rows = read_examples(examples, self.config.limits)
        if "position_ids" in rows.names:
            raise ValueError(
                "an exported classifier counts positions itself: leave the column position_ids out of the examples."
            )
        return rows

    def start(self, examples: TokenisedExamples, rows: np.ndarray) -> OnnxRows:
        """A batch of some of the examples for the first stage."""
        arrays = {
            name: examples.batch(name, rows, padding)
            for name, padding in self.padding.items()
            if name in examples.names
        }
        shape = arrays["input_ids"].shape
        missing = {name: np.zeros(shape, dtype=np.int64) for name in self.padding if name not in arrays}
        return OnnxRows(arrays | missing, examples.lengths[rows], self._no_answers(len(rows)))

    def start_arrays(self, arrays: Mapping[str, Any]) -> OnnxRows | None:
        """A batch that is ready as it was given: arrays of one shape, in range, without padding.

        For one text, reading examples would take a good part of the time of its first layers.

        Returns:
            `OnnxRows`, or None where the arrays have to be read as examples (or refused).
        """
        ids = arrays.get("input_ids")
        if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.size == 0:
            return None
        limits = {**self.config.limits, "attention_mask": 2}
        for name, array in arrays.items():
            if not _is_ready(array, ids.shape, least=int(name == "attention_mask"), limit=limits.get(name, 2**31)):
                return None
        ready = {name: arrays[name] for name in self.padding if name in arrays}
        for name in self.padding.keys() - ready.keys():
            ready[name] = np.full(ids.shape, int(name == "attention_mask"), dtype=np.int64)
        return OnnxRows(ready, np.full(ids.shape[0], ids.shape[1]), self._no_answers(len(ids)))

    def join(self, parts: Sequence[tuple[OnnxRows, Sequence[int]]]) -> OnnxRows:
        """One batch of rows of several, no longer than these rows need."""
        chosen = [rows.select(np.asarray(positions)) for rows, positions in parts]
        lengths = np.concatenate([rows.lengths for rows in chosen])
        arrays = {
            name: _padded([rows.arrays[name] for rows in chosen], lengths.max(), self.padding.get(name, 0))
            for name in chosen[0].arrays
        }
        return OnnxRows(arrays, lengths, _joined([rows.answers for rows in chosen]))

    def run(self, stage: int, batch: OnnxRows) -> StageResult[OnnxRows, RowAnswers]:
        """Runs a batch from a stage on until a row leaves."""
        if self.policy is None:
            return StageResult(list(range(len(batch))), self.run_whole(batch))
        arrays, answers = dict(batch.arrays), batch.answers.copy()
        for index in range(stage, self.stages - 1):
            if not self._is_asked(index):
                self._run_trunk(index, arrays)
                continue
            self._run_graph(index, arrays, answers)
            leaves = self._leaves(index, answers)
            if leaves.any():
                answers.exit_index[leaves] = index
                return _parted(index, leaves, OnnxRows(arrays, batch.lengths, answers))
        self._run_graph(self.stages - 1, arrays, answers)
        return StageResult(list(range(len(batch))), answers)

    def run_whole(self, batch: OnnxRows) -> RowAnswers:
        """Runs a batch to the last exit, noting what all say."""
        arrays, answers = dict(batch.arrays), batch.answers.copy()
        for index in range(self.stages):
            self._run_graph(index, arrays, answers)
        return answers

    def as_arrays(self, answers: RowAnswers) -> RowAnswers:
        """They are that already."""
        return answers

    def _run_trunk(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Runs one stage without what is its exit's alone; `arrays` get the new state."""
        arrays[STATE] = self.graphs.run(index, arrays, is_asked=False)[NEXT_STATE]

    def _run_graph(self, index: int, arrays: dict[str, np.ndarray], answers: RowAnswers) -> None:
        """Runs one stage; `arrays` get the new state, `answers` what its exit says."""
        found = self.graphs.run(index, arrays)
        if NEXT_STATE in found:
            arrays[STATE] = found[NEXT_STATE]
        temperatures = self.config.exit_temperatures
        answers.logits[:, index] = found["logits"] if temperatures is None else found["logits"] / temperatures[index]
        if answers.certainty is not None:
            least, largest = self.config.certainty_ranges[index]
            answers.certainty[:, index] = ((found["certainty"] - least) / (largest - least)).clip(0, 1)

    def _is_asked(self, index: int) -> bool:
        """Whether an exit says something. As in torch, where a branch is not run if it decides nothing."""
        return self.policy is None or self.config.exit_branch_costs[index] == 0 or self.policy.asks(index)

    def _leaves(self, index: int, answers: RowAnswers) -> np.ndarray:
        assert self.policy is not None, "without a policy no row leaves early"
        logits = answers.logits[:, : index + 1]
        certainty = None if answers.certainty is None else answers.certainty[:, index]
        evidence = Evidence(logits, problem_type(self.config), certainty, self.config.exit_tolerance)
        if evidence.is_nan.any():
            warn_caller(
                f"the exit after layer {self.config.exit_layers[index]} gave NaN for {evidence.is_nan.sum()} of "
                f"{len(logits)} rows. They are never counted as sure and went on."
            )
        return self.policy.leaves(index, evidence)

    def _no_answers(self, rows: int) -> RowAnswers:
        exits = len(self.config.exit_layers)
        logits = np.full((rows, exits, self.config.num_labels), np.nan, dtype=np.float32)
        certainty = None if self.config.certainty_ranges is None else np.full((rows, exits), np.nan, dtype=np.float32)
        return RowAnswers(logits, np.full(rows, exits - 1, dtype=np.int64), certainty)


def _is_ready(array: Any, shape: tuple[int, ...], least: int, limit: int) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.int64
        and array.shape == shape
        and array.min() >= least
        and array.max() < limit
    )


def _parted(index: int, leaves: np.ndarray, rows: OnnxRows) -> StageResult[OnnxRows, RowAnswers]:
    """Those that leave at an exit, and the others."""
    if leaves.all():
        return StageResult(list(range(len(rows))), rows.answers)
    leaving, staying = np.flatnonzero(leaves), np.flatnonzero(~leaves)
    left, rest = rows.answers.select(leaving), rows.select(staying)
    return StageResult(leaving.tolist(), left, staying.tolist(), index + 1, rest)


def _joined(parts: list[RowAnswers]) -> RowAnswers:
    certainties = [part.certainty for part in parts if part.certainty is not None]
    return RowAnswers(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.exit_index for part in parts]),
        np.concatenate(certainties) if certainties else None,
    )


def _padded(arrays: list[np.ndarray], length: int, value: int) -> np.ndarray:
    """Arrays of shape `(rows, length, ...)` one after another, padded to a length."""
    widths = [[(0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)] for array in arrays]
    return np.concatenate([np.pad(array, width, constant_values=value) for array, width in zip(arrays, widths)])
