"""What `compare_deployments.py` compares: ways to classify texts, each as a function from texts to classes."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deployment_models import BATCH_SIZE, StaticClassifier, TaskData, TaskModels, has_openvino
from runs import in_batches

from hf_adaptive import ExitCalibrator, OnnxClassifierWithExits

REFERENCE = "torch fp32"
# What is asked of the thresholds; each gives a point.
PROMISED = "0.5 points promised"
WISHES: dict[str, dict[str, float]] = {
    PROMISED: {"max_accuracy_drop": 0.005, "confidence": 0.95},
    "0.5 points": {"max_accuracy_drop": 0.005},
    "2 points": {"max_accuracy_drop": 0.02},
}
TODAY, SMALLER, OURS = "what people use today", "smaller models", "ours"

Example = Mapping[str, Any]
# What `prepare` of the systems before returned, by name.
Known = Mapping[str, dict[str, Any]]


@dataclass
class Answers:
    """What a way said of some texts, and how long it took.

    Args:
        classes (`np.ndarray` of shape `(texts,)`): Indexes of classes.
        seconds (`float`): From the texts.
        tokenised_seconds (`float`): The part of it after the tokenizer.
        cost (`float`, *optional*): Fraction of the layers run, where there are exits.
    """

    classes: np.ndarray
    seconds: float
    tokenised_seconds: float
    cost: float | None = None


class Way:
    """A way to classify texts.

    Args:
        tokenise: From texts to what `classify` takes.
        classify: From that to the classes.
        alone (*optional*): The same for a single one, where that has a shorter path.
        cost (*optional*): The fraction of the layers that the latest `classify` ran.
    """

    def __init__(
        self,
        tokenise: Callable[[list[str]], Any],
        classify: Callable[[Any], np.ndarray],
        alone: Callable[[Any], np.ndarray] | None = None,
        cost: Callable[[], float] | None = None,
    ):
        self.tokenise = tokenise
        self.classify = classify
        self.alone = alone or classify
        self.cost = cost

    def __call__(self, texts: list[str], is_alone: bool = False) -> Answers:
        started = time.perf_counter()
        inputs = self.tokenise(texts)
        tokenised = time.perf_counter()
        classes = (self.alone if is_alone else self.classify)(inputs)
        ended = time.perf_counter()
        cost = None if self.cost is None or is_alone else self.cost()
        return Answers(classes, ended - started, ended - tokenised, cost)


# Ways to run one model


@torch.inference_mode()
def _torch_classes(
    model: Any, pad: int, is_sorted: bool, names: Sequence[str], examples: Sequence[Example]
) -> np.ndarray:
    def run(arrays: dict[str, np.ndarray]) -> np.ndarray:
        return model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.float().numpy()

    return _in_batches(run, names, pad, is_sorted, examples)


def _in_batches(
    run: Callable[[dict[str, np.ndarray]], np.ndarray],
    names: Sequence[str],
    pad: int,
    is_sorted: bool,
    examples: Sequence[Example],
) -> np.ndarray:
    """Classes by a model that takes a batch of arrays."""
    lengths = np.array([len(example["input_ids"]) for example in examples])
    order = np.argsort(-lengths, kind="stable") if is_sorted else np.arange(len(examples))
    scores = [run(_padded([examples[row] for row in rows.tolist()], names, pad)) for rows in in_batches(order)]
    classes = np.empty(len(examples), dtype=np.int64)
    classes[order] = np.concatenate(scores).argmax(-1)
    return classes


def _padded(examples: Sequence[Example], names: Sequence[str], pad: int) -> dict[str, np.ndarray]:
    longest = max(len(example["input_ids"]) for example in examples)
    arrays = {name: np.full((len(examples), longest), pad if name == "input_ids" else 0) for name in names}
    for row, example in enumerate(examples):
        for name in names:
            values = example.get(name)
            arrays[name][row, : len(example["input_ids"])] = 0 if values is None else values
    return arrays


class Loader:
    """Makes ways out of models, for one task.

    Args:
        data (`TaskData`): Has the tokenizer.
        threads (`int`): Of every engine.
    """

    def __init__(self, data: TaskData, threads: int):
        self.data = data
        self.threads = threads
        self.pad = data.tokenizer.pad_token_id or 0

    def tokenise(self, texts: list[str]) -> list[Example]:
        encoded = self.data.tokenizer(texts, truncation=True, max_length=self.data.sizes.max_length)
        return [dict(zip(encoded.keys(), values)) for values in zip(*encoded.values())]

    def torch(self, model: Any, is_sorted: bool = True) -> Way:
        names = list(self.data.tokenizer.model_input_names)
        return Way(self.tokenise, partial(_torch_classes, model, self.pad, is_sorted, names))

    def onnx(self, folder: Path) -> Way:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(folder / "stage-1.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [one.name for one in session.get_inputs()]
        run = partial(_in_batches, lambda arrays: session.run(["logits"], arrays)[0], names, self.pad, True)
        return Way(self.tokenise, run)

    def openvino(self, model: Path) -> Way:
        import openvino

        compiled = openvino.Core().compile_model(
            str(model), "CPU", {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        names = [one.get_any_name() for one in compiled.inputs]
        return Way(self.tokenise, partial(_in_batches, lambda arrays: compiled(arrays)[0], names, self.pad, True))

    def exits(self, model: Any) -> Way:
        """A classifier with exits or a cascade, in torch or exported, at the thresholds in its configuration.

        Without thresholds the last exit answers, and no other is run.
        """
        exit_at = model.config.exit_layers[-1] if model.config.exit_thresholds is None else None
        taken: list[float] = []
        costs = np.array(model.config.exit_costs)
        is_torch = isinstance(model, torch.nn.Module)

        def classify(examples: Sequence[Example]) -> np.ndarray:
            outputs = model.predict(examples, BATCH_SIZE, exit_at=exit_at, show_progress=False)
            taken[:] = [1.0 if exit_at else float(costs[np.asarray(outputs.exit_index)].mean())]
            return np.asarray(outputs.logits.argmax(-1))

        def alone(examples: Sequence[Example]) -> np.ndarray:
            arrays = {name: np.array([values]) for name, values in examples[0].items()}
            with torch.inference_mode():
                given = {name: torch.from_numpy(array) for name, array in arrays.items()} if is_torch else arrays
                return np.asarray(model(**given, exit_at=exit_at).logits.argmax(-1))

        return Way(self.tokenise, classify, alone, lambda: taken[0])

    def static(self, model: StaticClassifier) -> Way:
        def tokenise(texts: list[str]) -> list[list[int]]:
            length = self.data.sizes.max_length
            encoded = self.data.tokenizer(texts, truncation=True, max_length=length, return_attention_mask=False)
            return [ids[1:-1] or ids for ids in encoded["input_ids"]]

        @torch.inference_mode()
        def classify(tokens: list[list[int]]) -> np.ndarray:
            return model(tokens).argmax(-1).numpy()

        return Way(tokenise, classify)

    def tfidf(self) -> Way:
        """Fitted on the texts that the encoders were fine-tuned on; that takes a second, so it is not kept."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        train = self.data.train
        classifier = LogisticRegression(max_iter=1000, C=10.0).fit(words.fit_transform(train["text"]), train["label"])
        return Way(words.transform, classifier.predict)


# Systems


@dataclass(frozen=True)
class System:
    """One line of the comparison, of one task and seed.

    Args:
        name (`str`): In the table.
        series (`str`): Systems of one series differ in `label` only; they are joined by a line in the plot.
        label (`str`): In the plot, beside the series.
        kind (`str`): `TODAY`, `SMALLER` or `OURS`.
        prepare: Trains, exports and calibrates what is not there, given what the systems before it returned; returns
            what `load` needs to know, as plain values.
        load: Makes the way, from what `prepare` returned and one of the settings.
        settings (`tuple[str, ...]`): Points of this system, by wish; a single one without a name for most.
    """

    name: str
    series: str
    label: str
    kind: str
    prepare: Callable[[Known], dict[str, Any]]
    load: "Load"
    settings: tuple[str, ...] = field(default=("",))

    def point(self, setting: str) -> str:
        """Name of a point in the table."""
        return f"{self.name}, {setting}" if setting else self.name


Load = Callable[[Loader, dict[str, Any], str], Way]


def systems(models: TaskModels) -> list[System]:
    """All that can be run here, of one task and seed."""
    depths = models.sizes.exit_layers
    whole = depths[-1]
    found = [
        _torch_plain(models, REFERENCE, whole, is_sorted=False),
        _torch_plain(models, "torch fp32, sorted by length", whole),
        _torch_plain(models, "torch bf16, sorted by length", whole, dtype=torch.bfloat16),
        _onnx_plain(models, "ONNX fp32", whole, None),
        _onnx_plain(models, "ONNX int8", whole, "int8"),
        *_with_exits(models),
    ]
    for depth in depths[:-1]:
        found.append(_torch_plain(models, f"{depth} layers fine-tuned alone, torch", depth))
        found.append(_onnx_plain(models, f"{depth} layers fine-tuned alone, ONNX int8", depth, "int8"))
    found.append(_static(models))
    if importlib.util.find_spec("sklearn") is None:
        print("TF-IDF is left out: scikit-learn is not installed. To have it: pip install scikit-learn.")
    else:
        found.append(_tfidf())
    found += [_cascade(models), _constant_heads(models)]
    for depth in depths[:-1]:
        found += [_stock_in_torch(models, depth), _stock_in_onnx(models, depth)]
    return [*found, *([_openvino(models)] if has_openvino() else [])]


def _torch_plain(
    models: TaskModels, name: str, depth: int, is_sorted: bool = True, dtype: torch.dtype = torch.float32
) -> System:
    def load(to: Loader, *_: Any) -> Way:
        return to.torch(models.plain(depth).to(dtype), is_sorted)

    return _smaller_or_whole(models, name, depth, "torch", lambda: models.plain(depth), load)


def _onnx_plain(models: TaskModels, name: str, depth: int, quantize: str | None) -> System:
    def folder() -> Path:
        return models.exported(f"plain-{depth}", lambda: models.plain(depth), quantize)

    return _smaller_or_whole(models, name, depth, "ONNX int8", folder, lambda to, *_: to.onnx(folder()))


def _smaller_or_whole(
    models: TaskModels, name: str, depth: int, engine: str, make: Callable[[], Any], load: Load
) -> System:
    if depth == models.sizes.exit_layers[-1]:
        return System(name, name, name, TODAY, _made(make), load)
    return System(name, f"fewer layers, {engine}", str(depth), SMALLER, _made(make), load)


def _openvino(models: TaskModels) -> System:
    depth = models.sizes.exit_layers[-1]

    def model() -> Path:
        folder = models.exported(f"plain-{depth}", lambda: models.plain(depth))
        return models.openvino_int8(folder / "stage-1.onnx")

    name = "OpenVINO int8"
    return System(name, name, name, TODAY, _made(model), lambda to, *_: to.openvino(model()))


def _static(models: TaskModels) -> System:
    name = "static embeddings"
    return System(name, name, name, SMALLER, _made(models.static), lambda to, *_: to.static(models.static()))


def _tfidf() -> System:
    return System("TF-IDF, logistic regression", "TF-IDF", "TF-IDF", SMALLER, lambda _: {}, lambda to, *_: to.tfidf())


def _made(make: Callable[[], Any]) -> Callable[[Known], dict[str, Any]]:
    """Prepares what needs nothing but to be there."""

    def prepare(_: Known) -> dict[str, Any]:
        make()
        return {}

    return prepare


def _stock_in_torch(models: TaskModels, depth: int) -> System:
    def make() -> Any:
        return models.stock(depth)

    name = f"exit {depth} as a stock model, torch"
    return System(name, "one exit, torch", str(depth), OURS, _made(make), lambda to, *_: to.torch(make()))


def _stock_in_onnx(models: TaskModels, depth: int) -> System:
    def make() -> Path:
        return models.exported_stock(depth, "int8")

    name = f"exit {depth} as a stock model, ONNX int8"
    return System(name, "one exit, ONNX int8", str(depth), OURS, _made(make), lambda to, *_: to.onnx(make()))


def _cascade(models: TaskModels) -> System:
    return _calibrated(Calibration(models), "cascade, torch", models.cascade)


def _constant_heads(models: TaskModels) -> System:
    name = "half of the heads constant, torch"
    make = models.constant_heads
    return System(name, name, name, OURS, _made(make), lambda to, *_: to.torch(make()))


# With exits


def _with_exits(models: TaskModels) -> list[System]:
    calibration = Calibration(models)
    return [
        _calibrated(calibration, "exits, torch", models.exits),
        # The same answers as in torch, so the same thresholds.
        _calibrated(calibration, "exits, ONNX fp32", lambda: _onnx(models, None), as_in="exits, torch"),
        _calibrated(calibration, "exits, ONNX int8", lambda: _onnx(models, "int8"), reference=models.exits),
    ]


def _onnx(models: TaskModels, quantize: str | None) -> OnnxClassifierWithExits:
    folder = models.exported("exits", models.exits, quantize)
    return OnnxClassifierWithExits.from_pretrained(folder, threads=torch.get_num_threads())


def _calibrated(
    calibration: "Calibration",
    name: str,
    make: Callable[[], Any],
    reference: Callable[[], Any] | None = None,
    as_in: str | None = None,
) -> System:
    def prepare(known: Known) -> dict[str, Any]:
        model = make()
        return known[as_in] if as_in else calibration.of(model, reference)

    def load(to: Loader, own: dict[str, Any], setting: str) -> Way:
        model = make()
        model.config.exit_temperatures = own[setting]["temperatures"]
        model.config.exit_thresholds = own[setting]["thresholds"]
        return to.exits(model)

    return System(name, name, "", OURS, prepare, load, tuple(WISHES))


class Calibration:
    """Temperatures and thresholds for every wish, on texts that are used for nothing else.

    Args:
        models (`TaskModels`): Of one task and seed.
    """

    def __init__(self, models: TaskModels):
        self.models = models

    @cached_property
    def _examples(self) -> Any:
        return self.models.data.tokenised(self.models.data.calibration)

    def of(self, model: Any, reference: Callable[[], Any] | None) -> dict[str, Any]:
        """Runs the model once, and answers all wishes."""
        measured_against = None if reference is None else reference()
        calibrator = ExitCalibrator(model, self._examples, show_progress=False, reference=measured_against)
        return {wish: self._answer(calibrator, values) for wish, values in WISHES.items()}

    @staticmethod
    def _answer(calibrator: ExitCalibrator, wish: dict[str, float]) -> dict[str, Any]:
        try:
            report = calibrator.calibrate(**wish)
        except ValueError as error:  # too few texts for a promise
            return {"temperatures": None, "thresholds": None, "said": str(error)}
        calibrator.store(report)
        config = calibrator.config
        return {
            "temperatures": config.exit_temperatures,
            "thresholds": config.exit_thresholds,
            "said": str(report),
        }
