"""The models that `compare_deployments.py` compares, of one task and seed: trained when they are asked for first,
exported, and kept in a folder each."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.append(str(Path(__file__).resolve().parent.parent))
from hf_adaptive import (
    AutoModelForSequenceClassificationWithExits,
    CascadeForSequenceClassification,
    export_onnx,
    mean_attention,
)
from hf_adaptive.modeling.architectures import supported_architecture
from hf_adaptive.modeling.switch import replaced_files, settle
from run_exit_study import SingleExitMember, Task
from text_data import encoder_path, label_fields

BATCH_SIZE = 32
# Texts that a static quantisation sees to find the ranges of activations.
RANGE_TEXTS = 128
STATIC_EPOCHS, STATIC_WIDTH = 20, 256


@dataclass(frozen=True)
class Sizes:
    """What is trained, and on how much.

    Args:
        encoder (`str`): As in `text_data.encoder_path`.
        exit_layers (`list[int]`): Layers before each exit, and of each plain shallower model.
        exit_branch_layers (`int`): Last layers of every early exit's own.
        exit_pooling (`str`): What every head sees, those of the models without early exits, too.
        train_texts, calibration_texts, test_texts (`int`): At most.
        max_length (`int`): Tokens at most; longer texts are cut.
        epochs, learning_rate (`float`): Of every model on the encoder.
        trains_words (`bool`): Whether the vectors of the words are trained, too.
        bf16 (`bool`): Whether training computes in bf16.
    """

    encoder: str
    exit_layers: list[int]
    exit_branch_layers: int
    exit_pooling: str
    train_texts: int
    calibration_texts: int
    test_texts: int
    max_length: int
    epochs: float
    learning_rate: float
    trains_words: bool
    bf16: bool


class TaskData:
    """Texts of one task, none in two of the parts.

    Args:
        task (`Task`): Which.
        sizes (`Sizes`): How many.
    """

    def __init__(self, task: Task, sizes: Sizes):
        self.name = task.name
        self.sizes = sizes
        self.path = encoder_path(sizes.encoder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        splits = task.splits(sizes.train_texts + sizes.calibration_texts, sizes.test_texts)
        rest = splits["train"]
        cut = min(sizes.train_texts, len(rest) * 2 // 3)
        self.train, self.calibration = rest.select(range(cut)), rest.select(range(cut, len(rest)))
        self.test = splits[task.test]
        self.classes: list[str] = self.train.features["label"].names

    @property
    def labels(self) -> dict[str, Any]:
        """Names of the classes, for a configuration."""
        return label_fields(self.classes)

    def tokenised(self, texts: Dataset) -> Dataset:
        """The texts as the models take them, with their labels."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return {**self.tokenizer(batch["text"], truncation=True, max_length=self.sizes.max_length)}

        return texts.map(encode, batched=True, remove_columns=["text"])


class TaskModels:
    """The models of one task and seed.

    Args:
        data (`TaskData`): Texts.
        seed (`int`): Of the new weights and of the order of the texts.
        folder (`Path`): Where they are kept; what is there is not trained again.
    """

    def __init__(self, data: TaskData, seed: int, folder: Path):
        self.data = data
        self.sizes = data.sizes
        self.seed = seed
        self.folder = folder

    # Trained

    def plain(self, depth: int) -> Any:
        """The encoder's first layers with one head at their end, fine-tuned alone."""
        return self._load_exits(self._trained(f"plain-{depth}", partial(self._first_layers, depth)))

    def exits(self, pooling: str | None = None) -> Any:
        """The encoder with exits, trained jointly."""
        pooling = pooling or self.sizes.exit_pooling
        fields = {
            "exit_layers": self.sizes.exit_layers,
            "exit_branch_layers": self.sizes.exit_branch_layers,
            "exit_pooling": pooling,
        }
        return self._load_exits(self._trained(f"exits-{pooling}", lambda: self._with_exits(fields)))

    def constant_heads(self) -> Any:
        """The encoder with every second head of each layer constant, and one head for the answer at its end."""
        return self._load_exits(self._trained("constant-heads", self._with_constant_heads))

    def cascade(self) -> Any:
        """Plain models of every depth, one after another."""
        depths = self.sizes.exit_layers
        cascade = CascadeForSequenceClassification.from_backbone(self.data.path, depths, **self.data.labels)
        cascade.members = nn.ModuleList(SingleExitMember(self.plain(depth)) for depth in depths)
        cascade._exits_are_untrained = False  # every one was trained
        return cascade.eval()

    def stock(self, depth: int) -> Any:
        """One exit as an ordinary model; of exits that see what stock classifiers see."""
        plain = AutoConfig.from_pretrained(self.data.path)
        pooling = supported_architecture(plain.model_type).default_pooling(plain)
        folder = self.folder / f"stock-{depth}"
        self._keep(folder, lambda new: self.exits(pooling).to_stock(exit_at=depth).save_pretrained(new))
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def static(self) -> "StaticClassifier":
        """A small network on the mean of vectors that do not depend on the context."""
        folder = self.folder / "static"
        self._keep(folder, self._train_static, "model.safetensors")
        return StaticClassifier.load(folder)

    # Exported

    def exported(self, name: str, make: Callable[[], Any], quantize: str | None = None) -> Path:
        """A classifier with exits, or a cascade, as ONNX; made if it is not there."""
        folder = self.folder / f"{name}-onnx-{quantize or 'fp32'}"
        self._keep(folder, lambda new: export_onnx(make(), new, quantize=quantize), "stages.json")
        return folder

    def exported_stock(self, depth: int, quantize: str | None = None) -> Path:
        """One exit as an ordinary model, as ONNX: a classifier with one exit, at its end, computes the same."""

        def make() -> Any:
            self.stock(depth)
            with_exit = AutoModelForSequenceClassificationWithExits.from_pretrained
            return with_exit(self.folder / f"stock-{depth}", exit_layers=[depth]).eval()

        return self.exported(f"stock-{depth}", make, quantize)

    def openvino_int8(self, graph: Path) -> Path:
        """A graph with weights and activations in 8 bits, whose ranges come from texts of the training data."""
        folder = self.folder / "openvino-int8"
        self._keep(folder, lambda new: self._quantise_openvino(graph, new), "model.xml")
        return folder / "model.xml"

    # How

    def _keep(self, folder: Path, write: Callable[[Path], object], deciding: str = "config.json") -> None:
        """Writes a folder, whole or not at all, unless it is there."""
        if folder.exists():
            settle(folder)
        if (folder / deciding).exists():
            return
        with replaced_files(folder, deciding) as new:
            write(new)

    def _trained(self, name: str, make: Callable[[], Any]) -> Path:
        folder = self.folder / name

        def train(new: Path) -> None:
            set_seed(self.seed)
            model = make()
            self._trainer(model).train()
            model.save_pretrained(new)

        self._keep(folder, train)
        return folder

    def _trainer(self, model: Any) -> Trainer:
        return Trainer(
            model=model,
            args=self._training_arguments(),
            train_dataset=self._train_examples,
            data_collator=DataCollatorWithPadding(self.data.tokenizer),
        )

    def _training_arguments(self) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            num_train_epochs=self.sizes.epochs,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=self.sizes.learning_rate,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length",
            seed=self.seed,
            bf16=self.sizes.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )

    @cached_property
    def _train_examples(self) -> Dataset:
        return self.data.tokenised(self.data.train)

    def _with_exits(self, fields: dict[str, Any]) -> Any:
        model = AutoModelForSequenceClassificationWithExits.from_pretrained(
            self.data.path, exit_routing="joint", **fields, **self.data.labels
        )
        model.get_input_embeddings().requires_grad_(self.sizes.trains_words)
        return model

    @staticmethod
    def _load_exits(folder: Path) -> Any:
        return AutoModelForSequenceClassificationWithExits.from_pretrained(folder).eval()

    def _first_layers(self, depth: int) -> Any:
        return self._with_exits(
            {"num_hidden_layers": depth, "exit_layers": [depth], "exit_pooling": self.sizes.exit_pooling}
        )

    def _with_constant_heads(self) -> Any:
        backbone = AutoModel.from_pretrained(self.data.path)
        averages = mean_attention(backbone, self._train_examples, self.sizes.max_length, batch_size=BATCH_SIZE)
        layers, heads = backbone.config.num_hidden_layers, backbone.config.num_attention_heads
        return self._with_exits(
            {
                "exit_layers": [layers],
                "exit_pooling": self.sizes.exit_pooling,
                "constants": averages,
                "constant_heads": [[layer, head] for layer in range(layers) for head in range(0, heads, 2)],
            }
        )

    def _train_static(self, folder: Path) -> None:
        set_seed(self.seed)
        tokens = self._without_special_tokens(self._train_examples)
        model = StaticClassifier(self._token_vectors(), len(self.data.classes))
        train_static(model, tokens, torch.tensor(self._train_examples["label"]))
        model.save(folder)

    def _token_vectors(self) -> torch.Tensor:
        """What the encoder makes of each token alone, as model2vec does; one for all tasks and seeds."""
        folder = self.folder.parent.parent / "token-vectors"
        self._keep(
            folder,
            lambda new: save_file({"vectors": token_vectors(self.data)}, new / "model.safetensors"),
            "model.safetensors",
        )
        return load_file(folder / "model.safetensors")["vectors"]

    def _without_special_tokens(self, examples: Dataset) -> list[list[int]]:
        return [ids[1:-1] or ids for ids in examples["input_ids"]]

    def _quantise_openvino(self, graph: Path, folder: Path) -> None:
        import nncf
        import openvino

        rows = self._train_examples.select(range(min(RANGE_TEXTS, len(self._train_examples))))
        model = openvino.convert_model(graph)
        names = [one.get_any_name() for one in model.inputs]

        def inputs(row: dict[str, Any]) -> dict[str, Any]:
            zeros = [0] * len(row["input_ids"])
            return {name: torch.tensor([row.get(name, zeros)]).numpy() for name in names}

        quantised = nncf.quantize(
            model, nncf.Dataset(list(rows), inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
        )
        openvino.save_model(quantised, folder / "model.xml", compress_to_fp16=False)


class StaticClassifier(nn.Module):
    """A small network on the mean of its tokens' vectors.

    Args:
        vectors (`torch.Tensor` of shape `(vocabulary, width)`): To begin with.
        num_labels (`int`): Classes.
    """

    def __init__(self, vectors: torch.Tensor, num_labels: int):
        super().__init__()
        self.vectors = nn.EmbeddingBag.from_pretrained(vectors.clone(), freeze=False, mode="mean", sparse=True)
        self.network = nn.Sequential(
            nn.Linear(vectors.shape[1], STATIC_WIDTH), nn.ReLU(), nn.Linear(STATIC_WIDTH, num_labels)
        )

    def forward(self, texts: list[list[int]]) -> torch.Tensor:
        """Scores `(texts, labels)` of texts as tokens."""
        starts = torch.tensor([0, *map(len, texts[:-1])]).cumsum(0)
        return self.network(self.vectors(torch.tensor([token for text in texts for token in text]), starts))

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "StaticClassifier":
        weights = load_file(folder / "model.safetensors")
        model = cls(weights["vectors.weight"], len(weights["network.2.bias"]))
        model.load_state_dict(weights)
        return model.eval()


def train_static(model: StaticClassifier, texts: list[list[int]], labels: torch.Tensor) -> None:
    """Trains vectors and network."""
    optimizers = [
        torch.optim.SparseAdam(list(model.vectors.parameters()), lr=1e-3),
        torch.optim.AdamW(model.network.parameters(), lr=1e-3),
    ]
    for _ in range(STATIC_EPOCHS):
        for rows in torch.randperm(len(texts)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model([texts[row] for row in rows.tolist()]), labels[rows])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()


@torch.inference_mode()
def token_vectors(data: TaskData) -> torch.Tensor:
    """The mean of what the encoder says of each token of its vocabulary, alone between the special ones."""
    encoder, tokenizer = AutoModel.from_pretrained(data.path).eval(), data.tokenizer
    ids = torch.arange(encoder.config.vocab_size)
    begin, end = (torch.full_like(ids, token) for token in (_begin(tokenizer), _end(tokenizer)))
    rows = torch.stack([begin, ids, end], dim=1)
    return torch.cat([encoder(input_ids=part).last_hidden_state.mean(1) for part in rows.split(1024)])


def _begin(tokenizer: Any) -> int:
    return tokenizer("a")["input_ids"][0]


def _end(tokenizer: Any) -> int:
    return tokenizer("a")["input_ids"][-1]


def has_openvino() -> bool:
    """Whether OpenVINO and its quantiser are installed; a line says so if not."""
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        print(f"OpenVINO int8 is left out: {error}. To have it: pip install openvino nncf.")
        return False
    return True
