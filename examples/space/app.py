"""A page on which a classifier with exits is tried: what each exit says of a text, and what speed costs.

Works on any checkpoint with exits, in a folder or on the Hub:

    pip install "hf_adaptive[space]"
    python examples/space/app.py outputs/quickstart/checkpoint
"""

import csv
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_adaptive  # registers the classes, so that no code of the checkpoint is run
from hf_adaptive import ExitReport
from hf_adaptive.evaluation import CurvePoint
from hf_adaptive.files import public_name

REPORT_FILE = "exit_report.json"
EXAMPLES = "A masterpiece: moving, funny and beautifully acted.\nIt has its moments, though they never add up."
MOST_ROWS = 10_000


class Classifier:
    """A checkpoint, its tokenizer, and what was measured on held-out data.

    Args:
        name (`str`): Folder or Hub name.
    """

    def __init__(self, name: str):
        self.name = name
        self.model = AutoModelForSequenceClassification.from_pretrained(name).eval()
        if "exit_layers" not in self.model.config.to_dict():
            raise ValueError(f"{name} has no exits: give a checkpoint that hf_adaptive saved.")
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.report = read_report(name)
        self.points = [] if self.report is None else sorted(self.report.curve, key=lambda point: point.cost)

    def classify(self, texts: list[str], threshold: float) -> list[list[Any]]:
        """A row for each text: the answer, where it left and at what cost, and what every exit says of it."""
        rows = [dict(self.tokenizer(text, truncation=True)) for text in texts]
        taken = self.model.predict(rows, exit_thresholds=threshold, show_progress=False)
        nothing_leaves = [None] * (len(self.layers) - 1)
        every_exit = self.model.predict(rows, exit_thresholds=nothing_leaves, show_progress=False).exit_logits
        answers = zip(texts, taken.logits, taken.exit_index.tolist(), every_exit)
        return [self._row(text, logits, index, exits) for text, logits, index, exits in answers]

    @property
    def layers(self) -> list[int]:
        """Layers run before each exit."""
        return self.model.config.exit_layers

    @property
    def headers(self) -> list[str]:
        """Of the columns that `classify` fills."""
        return ["text", "answer", "left after layer", "cost", *(f"layer {layer} says" for layer in self.layers)]

    def _row(self, text: str, logits: torch.Tensor, index: int, exits: torch.Tensor) -> list[Any]:
        cost = f"{self.model.config.exit_costs[index]:.0%}"
        return [text, self._in_words(logits), self.layers[index], cost, *(self._in_words(one) for one in exits)]

    def _in_words(self, logits: torch.Tensor) -> str:
        probability, label = logits.softmax(dim=-1).max(dim=-1)
        return f"{self.model.config.id2label[label.item()]} {probability:.0%}"

    def threshold(self, care: float) -> float:
        """The threshold for a place between fast (0) and careful (1)."""
        if self.points:
            return float(self._point(care).threshold)
        least = 1 / max(2, self.model.config.num_labels)
        return least + care * (1 - least)

    def held_out(self, care: float) -> str:
        """What was measured on held-out data there, in Markdown."""
        if self.report is None:
            return f"Threshold {self.threshold(care):.2f}. No `{REPORT_FILE}` lies beside the checkpoint."
        point, full = self._point(care), self.report.accuracy[-1]
        name, count = self.report.metric_name, self.report.num_examples
        return (
            f"**{point.accuracy:.1%}** {name} (all layers {full:.1%}) at **{point.cost:.0%}** of the layers, on "
            f"{count} held-out texts; threshold {point.threshold:.2f}.\n\n{self._speed_near(point)}"
        )

    def _point(self, care: float) -> CurvePoint:
        return self.points[round(care * (len(self.points) - 1))]

    def _speed_near(self, point: CurvePoint) -> str:
        timed = [one for one in self.points if one.seconds is not None]
        if not timed:
            return "Time was not measured."
        near = min(timed, key=lambda one: abs(one.cost - point.cost))
        return f"Measured at {near.cost:.0%} of the layers: {self.report.speed(near):.1f} times as fast as all layers."

    def classify_file(self, path: str, column: str, care: float) -> str:
        """Answers to a column of a CSV file, in a new file beside it.

        Raises:
            gr.Error: No such column, no rows, or too many.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if column not in (reader.fieldnames or []):
                raise gr.Error(f"the file has no column {column!r}; it has {reader.fieldnames}.")
            texts = [row[column] for row in reader]
        if not 0 < len(texts) <= MOST_ROWS:
            raise gr.Error(f"the file has {len(texts)} rows; give 1 to {MOST_ROWS}.")
        rows = [dict(self.tokenizer(text, truncation=True)) for text in texts]
        outputs = self.model.predict(rows, exit_thresholds=self.threshold(care), show_progress=False)
        target = Path(tempfile.mkdtemp()) / "answers.csv"
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([column, "label", "score", "layers"])
            for text, logits, index in zip(texts, outputs.logits, outputs.exit_index.tolist()):
                score, label = logits.softmax(dim=-1).max(dim=-1)
                writer.writerow([text, self.model.config.id2label[label.item()], f"{score:.4f}", self.layers[index]])
        return str(target)


def read_report(name: str) -> ExitReport | None:
    """The report beside a checkpoint, if there is one."""
    path = Path(name) / REPORT_FILE
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, REPORT_FILE))
        except (EntryNotFoundError, HfHubHTTPError):
            return None
    return ExitReport.from_json(path) if path.exists() else None


def make_page(classifier: Classifier) -> gr.Blocks:
    """The page."""

    def answer(text: str, care: float) -> list[list[Any]]:
        texts = [line for line in text.splitlines() if line.strip()]
        return classifier.classify(texts, classifier.threshold(care)) if texts else []

    layers = ", ".join(map(str, classifier.layers))
    with gr.Blocks(title="Early exits") as page:
        gr.Markdown(
            f"# Early exits\n`{public_name(classifier.name)}` answers after {layers} layers: easy texts leave early. "
            "Move the slider and see which."
        )
        care = gr.Slider(0, 1, value=0.7, step=0.05, label="from fast (0) to careful (1)", elem_id="care")
        measured = gr.Markdown(classifier.held_out(0.7), elem_id="measured")
        care.change(classifier.held_out, care, measured)
        with gr.Tab("Texts"):
            text = gr.Textbox(EXAMPLES, lines=4, label="One text a line", elem_id="texts")
            button = gr.Button("Classify", variant="primary", elem_id="classify")
            table = gr.Dataframe(headers=classifier.headers, wrap=True, interactive=False, elem_id="answers")
            gr.on([button.click, care.release], answer, [text, care], table)
        with gr.Tab("File"):
            file = gr.File(label="A CSV file", file_types=[".csv"])
            column = gr.Textbox("text", label="Column with the text")
            run = gr.Button("Classify the file", variant="primary")
            run.click(classifier.classify_file, [file, column, care], gr.File(label="Answers"))
        gr.Markdown(f"hf_adaptive {hf_adaptive.__version__}. Cost is the share of the layers that are run.")
    return page


def main() -> None:
    """Serves the page for the checkpoint named on the command line, or by the variable MODEL in a Space."""
    name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MODEL", "outputs/quickstart/checkpoint")
    make_page(Classifier(name)).launch()


if __name__ == "__main__":
    main()
