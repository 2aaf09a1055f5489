"""`ExitsTrainer`: what a plain `Trainer` does right already, and what it cannot know of exits."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, default_compute_objective
from transformers.utils import logging

from ..evaluation.metrics import default_metric, metric_name, score
from ..evaluation.report import ExitReport, measure_exits
from ..hub.model_card import PLOT_FILE, model_card, write_model_card
from ..hub.push import keep_card_of_hub
from ..modeling.checks import has_exits, shortened
from ..modeling.criteria import problem_type
from ..modeling.examples import INPUT_NAMES
from ..modeling.labels import NO_LABEL, has_label, problem_type_of, read_labels
from ..modeling.losses import answer_loss, exits_loss
from ..modeling.outputs import SequenceClassifierWithExitsOutput
from .checkpoints import begin_writing, check_whole, last_whole_checkpoint
from .distillation import ExitDistillation
from .unwrapping import without_adapter

logger = logging.get_logger(__name__)

REPORT_FILE = "exit_report.json"
_ALL_BUT_EXIT_LOGITS = [
    field.name for field in dataclasses.fields(SequenceClassifierWithExitsOutput) if field.name != "exit_logits"
]

# What a card says of how a model was trained.
_REPRODUCED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "seed",
)


class ExitsTrainer(Trainer):
    """A `Trainer` that scores every exit at each evaluation, and ends with the speed–accuracy curve and a model card.

    `compute_metrics` is called as in `Trainer`, once with each exit's predictions; the last exit's scores keep their
    names (`eval_accuracy`), the others are told apart by their layer (`eval_layer_4_accuracy`). Without it, accuracy
    is used (Pearson's correlation for regression).

    `compute_loss_func(outputs, labels, num_items_in_batch)` is called once for every exit, with that exit's scores as
    `outputs.logits`; the losses are summed with `exit_loss_weights`. As in `Trainer`, it has to divide by
    `num_items_in_batch` itself, so that gradient accumulation and several processes change nothing. Label smoothing
    applies to the loss of every exit, too. So do class weights:

        >>> def weighted(outputs, labels, num_items_in_batch):
        ...     return cross_entropy(outputs.logits, labels, class_weights, reduction="sum") / num_items_in_batch
        >>> trainer = ExitsTrainer(model, args, compute_loss_func=weighted, ...)

    `distillation` adds what every exit before the last learns from the last one, or from a teacher, to the loss that
    is trained with, whatever it is:

        >>> trainer = ExitsTrainer(model, args, distillation=ExitDistillation(weight=1.0, temperature=2.0), ...)

    Raises:
        ValueError: A model without exits, or for distillation without any before the last; a teacher with other
            labels or tokens; `batch_eval_metrics`, `include_for_metrics=["loss"]` or
            `preprocess_logits_for_metrics` without `compute_metrics`; label smoothing of a problem that is not
            single-label classification; arguments of the wrong kind.
    """

    def __init__(self, *args: Any, distillation: ExitDistillation | None = None, **kwargs: Any):
        named = zip(inspect.signature(Trainer).parameters, args)
        _check_arguments(distillation, {**dict(named), **kwargs})
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self._teacher_logits: torch.Tensor | None = None
        self._refuse_what_is_not_for_every_exit()
        own_metrics: Callable[[EvalPrediction], dict[str, float]] | None = self.compute_metrics
        self._metrics_of_one_exit = self._default_metrics if own_metrics is None else own_metrics
        self.compute_metrics = self._metrics_of_every_exit
        self._own_preprocessing: Any = self.preprocess_logits_for_metrics
        if self._own_preprocessing is not None:
            self.preprocess_logits_for_metrics = self._preprocess_every_exit
        self._scores_every_exit = False
        self.report: ExitReport | None = None
        self._own_loss: Callable[..., torch.Tensor] | None = self.compute_loss_func
        self._smoother: LabelSmoother | None = self.label_smoother
        self._ask_for_every_exit()
        if distillation is not None:
            distillation.check(self._exits_model.config)

    def _refuse_what_is_not_for_every_exit(self) -> None:
        if not has_exits(self._exits_model):
            raise ValueError(
                f"ExitsTrainer needs a model with exits or a cascade, got a {type(self._exits_model).__name__}: use "
                "Trainer, or load it with AutoModelForSequenceClassificationWithExits."
            )
        if self.args.batch_eval_metrics:
            raise ValueError(
                "batch_eval_metrics=True is not supported by ExitsTrainer: compute_metrics is called for every exit, "
                "and what it collects over the batches would be mixed. Leave it out."
            )
        if "loss" in self.args.include_for_metrics:
            raise ValueError(
                "include_for_metrics=['loss'] is not supported by ExitsTrainer: an evaluation has one loss of all "
                "exits. Compute each exit's from its predictions in compute_metrics; 'inputs' is supported."
            )
        if self.preprocess_logits_for_metrics is not None and self.compute_metrics is None:
            raise ValueError(
                "preprocess_logits_for_metrics needs compute_metrics: accuracy, which is the default, is computed "
                "from the logits. Give both or neither."
            )

    # Loss

    def _ask_for_every_exit(self) -> None:
        """Puts the sum over the exits where `Trainer` has the loss of one answer; its own code scales what it gets."""
        if self._own_loss is not None:
            self.compute_loss_func = self._loss_of_every_exit
            if self._smoother is not None:
                logger.warning(
                    "label_smoothing_factor has no effect beside compute_loss_func: smooth there, as "
                    "cross_entropy(..., label_smoothing=...) does."
                )
        elif self._smoother is not None or self.distillation is not None:
            self.label_smoother: Any = self._loss_of_every_exit

    def _loss_of_every_exit(
        self, outputs: Any, labels: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Weighted sum of the exits' losses; of rows that left early (`predict`), the loss of their answers."""
        config = self._exits_model.config
        given = labels
        if self._own_loss is None or outputs.exit_certainty is not None:
            labels = self._read_labels(labels)

        def mean_loss(index: int, logits: torch.Tensor, read: torch.Tensor, config: Any) -> torch.Tensor:
            return self.loss_of_exit(index, logits, read if self._own_loss is None else given, num_items_in_batch)

        if not self._every_exit_was_run:
            return mean_loss(len(config.exit_layers) - 1, outputs.logits, labels, config)
        # Being right or wrong, which a learned unit is asked for, is neither smoothed nor weighted; only its mean over
        # this batch becomes a part of that over all that are accumulated, which `num_items_in_batch` counts.
        share = 1.0 if num_items_in_batch is None else (given != NO_LABEL).sum() / num_items_in_batch
        loss = exits_loss(outputs.exit_logits, outputs.exit_certainty, labels, config, mean_loss, share)
        if self.distillation is None or not self._exits_model.training:
            return loss
        distance = self.distillation.loss(
            outputs.exit_logits, self._teacher_logits, labels, config, num_items_in_batch=num_items_in_batch
        )
        return loss + distance

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`; with distillation, a batch is first shown to the teacher, where that is another model."""
        if self.distillation is not None:
            self._teacher_logits = self.distillation.teacher_logits(inputs) if model.training else None
            inputs = self._without_teacher(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _without_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch without the column of the teacher's logits, which the model does not take."""
        column = None if self.distillation is None else self.distillation.column
        return {name: value for name, value in inputs.items() if name != column}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = None if self.distillation is None else self.distillation.column
        if column is not None:
            self._signature_columns: Any = list({*(self._signature_columns or []), column})

    def loss_of_exit(
        self,
        index: int,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Loss of one exit before its weight, where it is not the model's own.

        Args:
            index (`int`): Which exit.
            logits (`torch.Tensor` of shape `(batch, labels)`): Its scores.
            labels (`torch.Tensor`): As `compute_loss_func` gets them, else from [`read_labels`].
            num_items_in_batch (`int`, *optional*): As in `Trainer.compute_loss`.

        Returns:
            `torch.Tensor`: A scalar.
        """
        if self._own_loss is not None:
            answer = SequenceClassifierWithExitsOutput(logits=logits)
            return self._own_loss(answer, labels, num_items_in_batch=num_items_in_batch)
        if self._smoother is not None:
            return self._smoother({"logits": logits}, labels)
        return answer_loss(logits, labels, self._exits_model.config)

    def _read_labels(self, labels: Any) -> torch.Tensor:
        config = self._exits_model.config
        labels = read_labels(labels, len(labels), config)
        kind = problem_type_of(labels, config)
        if self._smoother is not None and self._own_loss is None and kind != "single_label_classification":
            raise ValueError(f"label_smoothing_factor has no meaning for problem_type={kind!r}: set it to 0.")
        config.problem_type = kind
        return labels

    @property
    def _every_exit_was_run(self) -> bool:
        model = self._exits_model
        return model.training or self._scores_every_exit or model._policy(None, None) is None

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Scores of every exit, each on all examples; thresholds play no part (see `evaluate_exits` for them).

        Args:
            eval_dataset (*optional*), metric_key_prefix: As in `Trainer`.
            ignore_keys (*optional*): Of no effect: nothing but the exits' scores is gathered.
        """
        before, self._scores_every_exit = self._scores_every_exit, True
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._scores_every_exit = before

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`; within `evaluate` the scores are a tuple, `(batch, labels)` of every exit."""
        inputs = self._without_teacher(inputs)
        if not self._scores_every_exit:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        nothing_leaves = [None] * (len(self._exits_model.config.exit_layers) - 1)
        inputs = {**inputs, "exit_thresholds": nothing_leaves}
        loss, scores, labels = super().prediction_step(model, inputs, prediction_loss_only, _ALL_BUT_EXIT_LOGITS)
        return loss, None if scores is None else tuple(scores.unbind(dim=1)), labels

    def _preprocess_every_exit(self, scores: Any, labels: Any) -> Any:
        """What stands for `preprocess_logits_for_metrics`."""
        if not self._scores_every_exit:
            return self._own_preprocessing(scores, labels)
        return tuple(self._own_preprocessing(of_exit, labels) for of_exit in scores)

    def _metrics_of_every_exit(self, prediction: EvalPrediction) -> dict[str, float]:
        """What stands for `compute_metrics`."""
        if not self._scores_every_exit:
            return self._metrics_of_one_exit(prediction)
        layers = self._exits_model.config.exit_layers
        scores = [self._metrics_of_one_exit(_of_exit(prediction, index)) for index in range(len(layers))]
        earlier = {
            f"layer_{layer}_{name}": value
            for layer, values in zip(layers[:-1], scores)
            for name, value in values.items()
        }
        return {**earlier, **scores[-1]}

    def _default_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        config = self._exits_model.config
        logits, labels = (torch.as_tensor(_joined(part)) for part in (prediction.predictions, prediction.label_ids))
        labels = read_labels(labels, len(logits), config)
        kind = problem_type(config)
        metric, is_labelled = default_metric(kind), has_label(labels, kind)
        return {metric_name(metric): score(metric, logits[is_labelled], labels[is_labelled], kind)}

    # Search

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: Any = None,
        hp_name: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in `Trainer`, for the last exit: without `compute_objective` its score (`eval_accuracy`), maximised.

        Args:
            compute_objective (`Callable`, *optional*): From the metrics of `evaluate`. Defaults to the last exit's
                score, or the sum if `compute_metrics` gives several; earlier exits' (`eval_layer_...`) do not count.
            direction (`str` or `list[str]`, *optional*): Defaults to `"maximize"` for the default objective, else to
                `"minimize"`, as in `Trainer`.
            hp_space, n_trials, backend, hp_name, **kwargs: As in `Trainer`.
        """
        if compute_objective is None:
            compute_objective = self._score_of_last_exit
            direction = direction or "maximize"
            logger.warning(
                f"hyperparameter_search: the objective is the last exit's score (direction: {direction}). For "
                "another, give compute_objective, of metrics such as eval_layer_4_accuracy, and direction."
            )
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", backend, hp_name, **kwargs
        )

    def _score_of_last_exit(self, metrics: dict[str, float]) -> float:
        earlier = tuple(f"_layer_{layer}_" for layer in self._exits_model.config.exit_layers[:-1])
        of_last = {name: value for name, value in metrics.items() if not any(part in name for part in earlier)}
        of_last.pop("eval_model_preparation_time", None)
        return default_compute_objective(of_last)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains; then, where there is evaluation data, writes the report, its plot and the model card.

        A report that cannot be made is warned of: what was trained is never lost by it.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As in `Trainer`; with True, training goes on from the
                last checkpoint of the output folder that was written to its end, and says so where a later one was
                broken off.
            trial, ignore_keys_for_eval (*optional*): As in `Trainer`.

        Raises:
            ValueError: A checkpoint that was broken off, or, with True, no whole one.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self._folder)
        elif resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            check_whole(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.eval_dataset is not None and trial is None:
            self._try_to_report()
        return output

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in `Trainer`; a checkpoint of that name, if there is one, is no whole one from now on."""
        if self.args.should_save:
            begin_writing(Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As in `Trainer`; the state, which says that a checkpoint is whole, waits for every process's part of it."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    # Report and card

    def _try_to_report(self) -> None:
        if isinstance(self.eval_dataset, dict):
            logger.warning(
                f"no report: eval_dataset holds several data sets, {sorted(self.eval_dataset)}. Call "
                "write_report(dataset) with one of them."
            )
            return
        try:
            self.write_report()
        except Exception as error:  # whatever it is, training has ended well
            logger.warning(
                f"training is done, but its report could not be made: {type(error).__name__}: {error} Save the model "
                "as usual; call write_report(dataset) with other data, or evaluate_exits(model, examples)."
            )

    def write_report(self, dataset: Any = None, **kwargs: Any) -> ExitReport:
        """Measures the trade-off and writes `exit_report.json`, `exits.png` and the card into the output folder.

        Every process of a distributed run has to make the call.

        Args:
            dataset (*optional*): As for `evaluate`: examples that the data collator makes batches with labels of.
                Defaults to the evaluation data.
            **kwargs: As in `evaluate_exits`.

        Raises:
            ValueError: The batches have no tokens or no labels, or anything that `evaluate_exits` refuses.
        """
        arguments = {"batch_size": self.args.per_device_eval_batch_size, "show_progress": not self.args.disable_tqdm}
        self.report = measure_exits(self._exits_model, self._examples(dataset), **{**arguments, **kwargs})
        if self.is_world_process_zero():
            self.report.to_json(self._folder / REPORT_FILE)
            self.report.plot(self._folder / PLOT_FILE)
            self.create_model_card()
        return self.report

    def _examples(self, dataset: Any) -> list[dict[str, Any]]:
        """The examples as the data collator makes them, one by one, in every process all of them."""
        examples: list[dict[str, Any]] = []
        for batch in self.get_eval_dataloader(dataset):
            rows = _rows(batch, self.label_names)
            examples += self.accelerator.gather_for_metrics(rows, use_gather_object=True)
        return examples

    @property
    def settings(self) -> dict[str, Any]:
        """How it trains, for the card."""
        return {name: getattr(self.args, name) for name in _REPRODUCED}

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the card into the output folder, unless one is there that somebody else wrote or changed.

        Args:
            language, license, tags, model_name, finetuned_from, dataset (*optional*): As in
                `Trainer.create_model_card`; the others are known from the model and the report.
        """
        if not self.is_world_process_zero():
            return
        data = dataset if dataset is not None else dataset_tags
        card = model_card(
            self.accelerator.unwrap_model(self.model),
            self.report,
            repo_id=self.hub_model_id or model_name or self._folder.name,
            base_model=finetuned_from,
            dataset_name=data[0] if isinstance(data, list) else data,
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags,
            plot_file=PLOT_FILE if self.report is not None else None,
            training=self.settings,
        )
        write_model_card(card, self._folder)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`; a card that the repository has already is kept, in the output folder too."""
        super().init_hf_repo(token, private)
        self._keep_card_of_hub(token, None)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `Trainer`, with the card of `create_model_card` unless the repository has one of somebody's own."""
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._keep_card_of_hub(token, revision)
        return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)

    def _keep_card_of_hub(self, token: str | None, revision: str | None) -> None:
        if self.is_world_process_zero():
            token, revision = token or self.args.hub_token, revision or self.args.hub_revision
            keep_card_of_hub(str(self.hub_model_id), self._folder, token=token, revision=revision)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def _exits_model(self) -> Any:
        return without_adapter(self.accelerator.unwrap_model(self.model))


def _check_arguments(distillation: Any, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what `Trainer` would stumble over, before it does anything."""
    model, args = given.get("model"), given.get("args")
    if model is None and given.get("model_init") is None:
        raise ValueError("ExitsTrainer needs a model, or model_init, which makes one.")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ValueError(f"ExitsTrainer needs a model with exits or a cascade, got a {type(model).__name__}.")
    if args is not None and not isinstance(args, TrainingArguments):
        raise ValueError(f"args must be TrainingArguments, got {shortened(args)}.")
    for name in ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if given.get(name) is not None and not callable(given[name]):
            raise ValueError(f"{name} must be a function, got {shortened(given[name])}.")
    if distillation is not None and not isinstance(distillation, ExitDistillation):
        raise ValueError(f"distillation must be an ExitDistillation, got {shortened(distillation)}.")


def _of_exit(prediction: EvalPrediction, index: int) -> EvalPrediction:
    """What the metrics of one exit are made from; a list of batches with `eval_do_concat_batches=False`."""
    scores = prediction.predictions
    own = [batch[index] for batch in scores] if isinstance(scores, list) else scores[index]
    return EvalPrediction(own, prediction.label_ids, prediction.inputs)


def _joined(batches: Any) -> Any:
    return np.concatenate(batches) if isinstance(batches, list) else batches


def _rows(batch: Mapping[str, Any], label_names: list[str]) -> list[dict[str, Any]]:
    """The examples of a batch, with their labels under the name that the model has for them."""
    names = [name for name in INPUT_NAMES if name in batch]
    if "input_ids" not in names or len(label_names) != 1 or label_names[0] not in batch:
        raise ValueError(
            f"the data collator's batches have {sorted(batch)}; a report needs input_ids and one column of labels "
            f"(label_names={label_names})."
        )
    columns = {**{name: batch[name].tolist() for name in names}, "labels": batch[label_names[0]].tolist()}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]
