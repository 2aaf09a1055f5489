"""`ExitsTrainer`: what a plain `Trainer` does right already, and what it cannot know of exits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from ..evaluation.metrics import default_metric, metric_name, score
from ..evaluation.report import ExitReport, measure_exits
from ..hub.model_card import PLOT_FILE, model_card, write_model_card
from ..hub.push import keep_card_of_hub
from ..modeling.labels import has_label, problem_type, problem_type_of, read_labels
from ..modeling.losses import exits_loss

logger = logging.get_logger(__name__)

REPORT_FILE = "exit_report.json"

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
    is used (Pearson's correlation for regression). Label smoothing applies to the loss of every exit.

    Raises:
        ValueError: `batch_eval_metrics`, or label smoothing of a problem that is not single-label classification.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.batch_eval_metrics:
            raise ValueError("batch_eval_metrics=True is not supported by ExitsTrainer: leave it out.")
        own_metrics: Callable[[EvalPrediction], dict[str, float]] | None = self.compute_metrics
        self._metrics_of_one_exit = self._default_metrics if own_metrics is None else own_metrics
        self.compute_metrics = self._metrics_of_every_exit
        self.report: ExitReport | None = None

    # Loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; with label smoothing, the weighted sum of every exit's smoothed loss."""
        if self.label_smoother is None or self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Without labels, so that the exits' scores carry the gradient.
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self._smoothed_loss(self.label_smoother, outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _smoothed_loss(self, smoother: LabelSmoother, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        config = self._exits_model.config
        labels = read_labels(labels, len(labels), config)
        kind = problem_type_of(labels, config)
        if kind != "single_label_classification":
            raise ValueError(f"label_smoothing_factor has no meaning for problem_type={kind!r}: set it to 0.")
        config.problem_type = kind

        def smoothed(logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
            return smoother({"logits": logits}, labels)

        # Being right or wrong, which a learned unit is asked for, is not smoothed.
        return exits_loss(outputs.exit_logits, outputs.exit_certainty, labels, config, smoothed)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Scores of every exit, each on all examples; thresholds play no part (see `evaluate_exits` for them)."""
        if ignore_keys is None:
            ignore_keys = [key for key in self._exits_model.config.keys_to_ignore_at_inference if key != "exit_logits"]
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Runs every exit where their scores are wanted."""
        if ignore_keys is not None and "exit_logits" not in ignore_keys:
            nothing_leaves = [None] * (len(self._exits_model.config.exit_layers) - 1)
            inputs = {**inputs, "exit_thresholds": nothing_leaves}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _metrics_of_every_exit(self, prediction: EvalPrediction) -> dict[str, float]:
        if not isinstance(prediction.predictions, tuple):
            return self._metrics_of_one_exit(prediction)
        exit_logits = list(prediction.predictions)[1]
        layers = self._exits_model.config.exit_layers
        scores = [
            self._metrics_of_one_exit(EvalPrediction(exit_logits[:, index], prediction.label_ids))
            for index in range(len(layers))
        ]
        earlier = {
            f"layer_{layer}_{name}": value
            for layer, values in zip(layers[:-1], scores)
            for name, value in values.items()
        }
        return {**earlier, **scores[-1]}

    def _default_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        config, logits = self._exits_model.config, torch.as_tensor(prediction.predictions)
        labels = read_labels(torch.as_tensor(prediction.label_ids), len(logits), config)
        kind = problem_type(config)
        metric, is_labelled = default_metric(kind), has_label(labels, kind)
        return {metric_name(metric): score(metric, logits[is_labelled], labels[is_labelled], kind)}

    # Report and card

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; then, where there is evaluation data, writes the report, its plot and the model card."""
        output = super().train(*args, **kwargs)
        if self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            self.write_report()
        return output

    def write_report(self, dataset: Any = None, **kwargs: Any) -> ExitReport:
        """Measures the trade-off and writes `exit_report.json`, `exits.png` and the card into the output folder.

        Every process of a distributed run has to make the call.

        Args:
            dataset (*optional*): Tokenised examples with labels; defaults to the evaluation data.
            **kwargs: As in `evaluate_exits`.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        arguments = {"batch_size": self.args.per_device_eval_batch_size, "show_progress": not self.args.disable_tqdm}
        self.report = measure_exits(self._exits_model, dataset, **{**arguments, **kwargs})
        if self.is_world_process_zero():
            self.report.to_json(self._folder / REPORT_FILE)
            self.report.plot(self._folder / PLOT_FILE)
            self.create_model_card()
        return self.report

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
            self._exits_model,
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
        return self.accelerator.unwrap_model(self.model)
