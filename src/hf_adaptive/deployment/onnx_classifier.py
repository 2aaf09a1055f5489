"""A classifier with exits, exported: the model's interface on onnxruntime. Without torch."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.checks import check_count, check_path, shortened
from ..modeling.criteria import (
    CRITERIA,
    ForcedPolicy,
    Policy,
    ThresholdPolicy,
    checked_thresholds,
    exit_position,
    problem_type,
)
from ..modeling.examples import is_list
from ..modeling.scheduling import RowAnswers, StagedFlow, StageScheduler, sorted_batches
from ..modeling.streams import stream
from ..modeling.switch import replaced_files, settle
from .folder import CONFIG_FILE, STAGES_FILE, TOKENIZER_FILE, Stages, read_json
from .onnx_graphs import StageGraphs, needed
from .onnx_stages import OnnxStages


@dataclass
class OnnxOutput:
    """Answer of an exported classifier; fields as in `SequenceClassifierWithExitsOutput`.

    Args:
        logits (`np.ndarray` of shape `(batch, labels)`): Scores of the exit that each row took.
        exit_logits (`np.ndarray` of shape `(batch, exits, labels)`): Scores of every exit, divided by its temperature;
            NaN where a row had left before.
        exit_index (`np.ndarray` of shape `(batch,)`): The exit that each row took, an index into `config.exit_layers`.
        exit_certainty (`np.ndarray` of shape `(batch, exits)`, *optional*): With `exit_criterion="learned"`.
    """

    logits: np.ndarray
    exit_logits: np.ndarray
    exit_index: np.ndarray
    exit_certainty: np.ndarray | None = None


class OnnxConfig:
    """Configuration of an exported classifier: the model's, read without `transformers`.

    Fields are attributes and can be changed (`config.exit_thresholds = …`); they are checked when they are used.

    Args:
        values (`dict`): The content of the model's `config.json`.
        stages (`Stages`): What the configuration has no field for.
    """

    exit_layers: list[int]
    exit_criterion: str
    exit_thresholds: Any = None
    exit_temperatures: list[float] | None = None
    exit_tolerance: float | None = None
    exit_calibration: dict[str, Any] | None = None
    problem_type: str | None = None
    pad_token_id: int | None = None

    def __init__(self, values: dict[str, Any], stages: Stages):
        self.__dict__.update(values)
        self.id2label = {int(index): label for index, label in values["id2label"].items()}
        self.certainty_ranges = stages.certainty_ranges
        self.limits = stages.limits
        self.exit_costs = stages.costs
        self.exit_branch_costs = stages.branch_costs
        self._names = (*values, *(name for name in OnnxConfig.__annotations__ if name not in values))

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return len(self.id2label)

    def checked_thresholds(self, thresholds: Any) -> list[float | None]:
        """The thresholds as one number (or None) for each exit but the last; a `ValueError` if they cannot be."""
        return checked_thresholds(thresholds, self.exit_layers, self.exit_criterion)

    def to_json(self) -> str:
        """The content of `config.json`."""
        own = {name: getattr(self, name) for name in self._names}
        return json.dumps(own, indent=2, sort_keys=True) + "\n"


class OnnxClassifierWithExits:
    """What [`export_onnx`] wrote, as a model: rows leave by the same rules, and get the same answers.

    Args:
        graphs (`StageGraphs`): The stages.
        config (`OnnxConfig`): The configuration; thresholds, temperatures and criterion can be changed in it.
        folder (`Path`): Where it was loaded from.
        stages (`Stages`): How it was exported.
    """

    def __init__(self, graphs: StageGraphs, config: OnnxConfig, folder: Path, stages: Stages):
        self.graphs = graphs
        self.config = config
        self.folder = folder
        self.stages = stages
        self._tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> "OnnxClassifierWithExits":
        """Loads an exported classifier. Needs onnxruntime and numpy, and tokenizers for texts; not torch.

        Args:
            folder (`str` or `os.PathLike`): What `export_onnx` was given.
            providers (`Sequence[str]`, *optional*): Execution providers of onnxruntime, the preferred first, such as
                `["CUDAExecutionProvider", "CPUExecutionProvider"]`; the CPU's by default.
            threads (`int`, *optional*): Threads of one run; onnxruntime's choice by default.

        Raises:
            OSError: A folder that is missing, holds something else or a part, or is damaged; graphs that do not fit
                its configuration.
            ValueError: Providers that this onnxruntime does not have, or a bad number of threads.
            ImportError: onnxruntime is missing.
        """
        check_path("folder", folder)
        path = Path(folder)
        if path.is_dir():
            settle(path)
        stages = Stages.read(path)
        config = OnnxConfig(read_json(path, CONFIG_FILE), stages)
        graphs = StageGraphs(path, stages.stages, providers, threads)
        _check_fit(graphs, config, path)
        return cls(graphs, config, path, stages)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the classifier with its present configuration (after a calibration, say), whole or not at all.

        Args:
            folder (`str` or `os.PathLike`): Its own, or another.

        Raises:
            OSError: The folder cannot be written; it is then as it was.
        """
        check_path("folder", folder)
        target = Path(folder)
        with replaced_files(target, STAGES_FILE) as new:
            if target.resolve() != self.folder.resolve():
                for file in self.folder.iterdir():
                    if file.is_file():
                        shutil.copy(file, new)
            (new / CONFIG_FILE).write_text(self.config.to_json())
            replace(self.stages, certainty_ranges=self.config.certainty_ranges).write(new)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
    ) -> OnnxOutput:
        """Classifies one batch, as a model's `forward` does.

        Args:
            input_ids (`np.ndarray` of shape `(batch, length)`): Tokens.
            attention_mask (`np.ndarray` of shape `(batch, length)`, *optional*): 1 at real tokens, 0 at padding.
            token_type_ids (`np.ndarray` of shape `(batch, length)`, *optional*): Segment of each token.
            exit_thresholds (`list[float | None]` or `float`, *optional*): Instead of those in the configuration.
            exit_at (`int`, *optional*): Every row leaves after this layer, one of `exit_layers`.

        Raises:
            ValueError: Inputs, thresholds or `exit_at` that cannot be used.
        """
        stages = self.staged(exit_thresholds, exit_at)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: values for name, values in given.items() if values is not None}
        batch = stages.start_arrays(given)
        if batch is None:
            for name, values in given.items():
                if not is_list(values):
                    raise ValueError(f"{name} must be an array of shape (batch, length), got {shortened(values)}.")
            examples = stages.read(given)
            batch = stages.start(examples, np.arange(len(examples)))
        result = stages.run(0, batch)
        if result.batch is None:
            return _output(result.answers)
        numbers, answers = np.arange(len(batch)), _Collected(len(batch))
        while result.batch is not None:
            answers.put(numbers[result.leaving], result.answers)
            numbers = numbers[result.staying]
            result = stages.run(result.stage, result.batch)
        answers.put(numbers, result.answers)
        return answers.output()

    def predict(
        self,
        examples: Any,
        batch_size: int = 32,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
        show_progress: bool = False,
    ) -> OnnxOutput:
        """Classifies a data set, stage by stage, in batches of similar length: the scheduling is that of the model's.

        Args:
            examples: Tokenised examples, as for the model's `predict` (see [`tokenize`] for texts).
            batch_size (`int`): Examples run at a time, at every stage.
            exit_thresholds, exit_at: As when it is called.
            show_progress (`bool`): Whether to show a bar, with tqdm.

        Returns:
            `OnnxOutput`: In the order of `examples`.

        Raises:
            ValueError: No examples, some that cannot be used, a batch size below 1, or thresholds or `exit_at` that
                cannot be used.
        """
        check_count("batch_size", batch_size)
        stages = self.staged(exit_thresholds, exit_at)
        rows = stages.read(examples)
        order = np.argsort(-rows.lengths, kind="stable")
        batches = sorted_batches(order, rows.lengths[order], batch_size, stages.start_cost)
        flow = StagedFlow(stages, StageScheduler(stages.stages, batch_size, stages.start_cost))
        answers = _Collected(len(rows))
        with _progress(len(rows), show_progress) as advance:
            for left, said in flow.run_all(rows, batches):
                answers.put(order[[row.number for row in left]], said)
                advance(len(left))
        return answers.output()

    def predict_stream(
        self,
        examples: Iterable[Any],
        batch_size: int = 32,
        window: int = 4096,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
    ) -> Iterator[OnnxOutput]:
        """Classifies whatever can be iterated over, in bounded memory: rows are read in windows, as by the model's.

        Args:
            examples (`Iterable`): Tokenised examples.
            batch_size (`int`): Examples run at a time, at every stage.
            window (`int`): Examples read at a time; the more, the more alike are the lengths in a batch.
            exit_thresholds, exit_at: As when it is called.

        Returns:
            `Iterator[OnnxOutput]`: One answer an example, in their order, without the batch dimension.

        Raises:
            ValueError: What `predict` refuses (when that row is read), or a window below 1.
        """
        return stream(
            examples, window, lambda rows: _one_by_one(self.predict(rows, batch_size, exit_thresholds, exit_at))
        )

    @property
    def input_limits(self) -> dict[str, int]:
        """How many values there are for each input that is looked up in a table: tokens, segments."""
        return self.config.limits

    @property
    def certainty_ranges(self) -> list[list[float]]:
        """Least and largest certainty of each exit's learned unit (`exit_criterion="learned"`)."""
        return self.config.certainty_ranges or []

    def set_certainty_ranges(self, ranges: Sequence[Sequence[float]]) -> None:
        """Sets them, one for each exit."""
        self.config.certainty_ranges = [list(each) for each in ranges]

    def staged(
        self, exit_thresholds: list[float | None] | float | None = None, exit_at: int | None = None
    ) -> OnnxStages:
        """The classifier as stages that can be run one at a time, for `predict` and for serving.

        Args:
            exit_thresholds, exit_at: As when it is called.
        """
        return OnnxStages(self.graphs, self.config, self._policy(exit_thresholds, exit_at))

    def tokenize(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, list[int]]]:
        """Texts, or pairs of texts, as examples for `predict`, by the tokenizer that was exported with the model.

        Args:
            texts (`Sequence[str | tuple[str, str]]`): They are cut at the tokenizer's `model_max_length`.

        Raises:
            OSError: No tokenizer was exported.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.folder)
        names = self.graphs.inputs
        encodings = self._tokenizer.encode_batch(list(texts))
        columns = [
            {"input_ids": one.ids, "attention_mask": one.attention_mask, "token_type_ids": one.type_ids}
            for one in encodings
        ]
        return [{name: values for name, values in row.items() if name in names} for row in columns]

    def _policy(self, thresholds: Any, exit_at: int | None) -> Policy | None:
        """When rows leave; None to run everything and answer with the last exit."""
        if exit_at is not None:
            if thresholds is not None:
                raise ValueError(f"give exit_at={exit_at} or exit_thresholds={thresholds}, not both.")
            position = exit_position(exit_at, self.config.exit_layers)
            is_last = position == len(self.config.exit_layers) - 1
            # Where branches are to be left out there is a policy for the last exit, too.
            return None if is_last and not any(self.config.exit_branch_costs) else ForcedPolicy(position)
        thresholds = self.config.exit_thresholds if thresholds is None else thresholds
        if thresholds is None:
            return None
        thresholds = self.config.checked_thresholds(thresholds)
        if all(threshold is None for threshold in thresholds):
            return None
        criterion = CRITERIA[self.config.exit_criterion]
        criterion.check_problem_type(problem_type(self.config))
        return ThresholdPolicy(criterion, thresholds)


class _Collected:
    """Answers to a data set, put together."""

    def __init__(self, rows: int):
        self.rows = rows
        self.answers: RowAnswers | None = None

    def put(self, numbers: np.ndarray, said: RowAnswers) -> None:
        if self.answers is None:
            certainty = (
                None if said.certainty is None else np.empty((self.rows, *said.certainty.shape[1:]), np.float32)
            )
            logits = np.empty((self.rows, *said.logits.shape[1:]), np.float32)
            self.answers = RowAnswers(logits, np.empty(self.rows, np.int64), certainty)
        self.answers.logits[numbers] = said.logits
        self.answers.exit_index[numbers] = said.exit_index
        if self.answers.certainty is not None:
            self.answers.certainty[numbers] = said.certainty

    def output(self) -> OnnxOutput:
        assert self.answers is not None, "there is at least one example"
        return _output(self.answers)


def _output(answers: RowAnswers) -> OnnxOutput:
    return OnnxOutput(answers.taken, answers.logits, answers.exit_index, answers.certainty)


def _one_by_one(outputs: OnnxOutput) -> Iterator[OnnxOutput]:
    """The answers of a batch, without the batch dimension."""
    for row in range(len(outputs.logits)):
        certainty = None if outputs.exit_certainty is None else outputs.exit_certainty[row]
        yield OnnxOutput(outputs.logits[row], outputs.exit_logits[row], outputs.exit_index[row], certainty)


def _check_fit(graphs: StageGraphs, config: OnnxConfig, folder: Path) -> None:
    """Raises `OSError` for graphs of another model than the configuration's."""
    exits = len(config.exit_layers)
    if len(graphs) != exits:
        raise OSError(
            f"{folder} has {len(graphs)} graphs for exit_layers={config.exit_layers}. Export the model again."
        )
    labels = {graphs.shape(index, "logits")[-1] for index in range(exits)}
    if labels != {config.num_labels}:
        raise OSError(
            f"the graphs in {folder} score {sorted(labels)} labels, but its configuration names {config.num_labels}: "
            f"{config.id2label}. Export the model again."
        )


def _load_tokenizer(folder: Path) -> Any:
    if not (folder / TOKENIZER_FILE).is_file():
        raise OSError(
            f"{folder} holds no {TOKENIZER_FILE}: the model was exported without its tokenizer. Give "
            "export_onnx(..., tokenizer=tokenizer), or tokenised examples."
        )
    tokenizer = needed("tokenizers").Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    settings = folder / "tokenizer_config.json"
    longest = json.loads(settings.read_text()).get("model_max_length") if settings.is_file() else None
    tokenizer.no_padding()
    if longest is not None and longest < 10**9:  # transformers writes 1e30 for "no limit"
        tokenizer.enable_truncation(int(longest))
    return tokenizer


@contextlib.contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Any]:
    if not is_shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="Classifying") as bar:
        yield bar.update
