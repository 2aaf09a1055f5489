"""Average attention matrices over real text, the constants of PAPA (arXiv 2211.03495)."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..files import public_name, write_whole
from ..modeling.checks import check_count, check_path, shortened

_FORMAT = "hf_adaptive.mean_attention"
_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PRINT_TOLERANCE = 1e-2


@dataclass
class MeanAttention:
    """Sums of attention probabilities and how many examples they come from, so that runs can be merged and resumed.

    Args:
        sums (`torch.Tensor`): `(layers, heads, length, length)` float64. Cell (i, j) sums the probability that
            position i gives to j, over the examples in which both are real.
        counts (`torch.Tensor`): `(length, length)` float64, the number of those examples.
        model_print (`torch.Tensor`): One norm for each weight of the backbone, by which another model is recognised.
        batches (`int`): Batches seen so far.
        model_name (`str`): The model's name on the Hub or its folder's own name, for messages.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    model_print: torch.Tensor = field(repr=False)
    batches: int = 0
    model_name: str = ""

    @classmethod
    def empty(cls, model: PreTrainedModel, max_length: int) -> "MeanAttention":
        """Sums over nothing, for `model` and inputs of at most `max_length` tokens."""
        config = model.config
        shape = (config.num_hidden_layers, config.num_attention_heads, max_length, max_length)
        return cls(
            sums=torch.zeros(shape, dtype=torch.float64, device=model.device),
            counts=torch.zeros(shape[2:], dtype=torch.float64, device=model.device),
            model_print=model_print(model),
            model_name=public_name(config.name_or_path or ""),
        )

    @property
    def max_length(self) -> int:
        return self.counts.shape[-1]

    @property
    def average(self) -> torch.Tensor:
        """`(layers, heads, length, length)` float32; 0 where no example had both positions. Rows need not sum to 1."""
        return (self.sums / self.counts.clamp(min=1)).float()

    def average_for(self, model: PreTrainedModel) -> torch.Tensor:
        """The average, if it was collected from `model`.

        Raises:
            ValueError: If the weights of the backbone are others. Pass `.average` where that is intended.
        """
        if not _same_print(self.model_print, model_print(model)):
            raise ValueError(
                f"these averages were collected from another model ({self.model_name or 'unnamed'}), not from "
                f"{model.config.name_or_path or 'this one'}. Collect them again with mean_attention, or pass the "
                "tensor `.average` if you mean it."
            )
        return self.average

    @torch.no_grad()
    def add_batch(self, attentions: Sequence[torch.Tensor], attention_mask: torch.Tensor) -> None:
        """Adds one batch.

        Args:
            attentions (`list[torch.Tensor]`): For every layer `(batch, heads, length, length)`.
            attention_mask (`torch.Tensor`): `(batch, length)`, 0 at padding.
        """
        length = attention_mask.shape[1]
        real = (attention_mask != 0).to(attentions[0].dtype)
        pairs = torch.einsum("bi,bj->bij", real, real)
        for layer_sums, probabilities in zip(self.sums, attentions, strict=True):
            layer_sums[:, :length, :length] += torch.einsum("bhij,bij->hij", probabilities, pairs)
        self.counts[:length, :length] += pairs.sum(0)
        self.batches += 1

    def merge(self, other: "MeanAttention") -> "MeanAttention":
        """The averages over both runs' examples.

        Raises:
            ValueError: If the runs used other models or lengths.
        """
        if self.sums.shape != other.sums.shape or not _same_print(self.model_print, other.model_print):
            raise ValueError(
                f"averages can be merged only for one model and length, got {self.model_name or 'a model'} with "
                f"{tuple(self.sums.shape)} and {other.model_name or 'a model'} with {tuple(other.sums.shape)}."
            )
        return MeanAttention(
            sums=self.sums + other.sums.to(self.sums.device),
            counts=self.counts + other.counts.to(self.counts.device),
            model_print=self.model_print,
            batches=self.batches + other.batches,
            model_name=self.model_name,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors = {"sums": self.sums, "counts": self.counts, "model_print": self.model_print}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": _FORMAT, "batches": str(self.batches), "model_name": self.model_name}
        write_whole(path, lambda draft: save_file(tensors, draft, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MeanAttention":
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is not one that `save` wrote.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} does not hold averages written by mean_attention (format {metadata.get('format')!r} instead "
                f"of {_FORMAT!r})."
            )
        return cls(**tensors, batches=int(metadata["batches"]), model_name=metadata["model_name"])


def mean_attention(
    model: PreTrainedModel,
    dataloader_or_dataset: Iterable[Any],
    max_length: int,
    *,
    batch_size: int = 8,
    path: str | os.PathLike[str] | None = None,
    save_every: int = 500,
) -> MeanAttention:
    """The average attention matrix of every head over real text, as PAPA takes it (arXiv 2211.03495).

    The model runs in eval mode where it is, and is left as it was. Only one batch is held at a time.

    Args:
        model (`PreTrainedModel`): A pretrained model of transformers that returns attentions.
        dataloader_or_dataset (`Iterable[Any]`): Batches of tensors (a `DataLoader`), or tokenized examples:
            dictionaries with `input_ids` and, if there is padding, `attention_mask`. Other columns are ignored.
        max_length (`int`): Size of the matrices; no input may be longer.
        batch_size (`int`): For a dataset; a `DataLoader` has its own.
        path (`str` or `os.PathLike`, *optional*): Where the sums are saved, every `save_every` batches and at the end.
            If the file is there already, the run is resumed after the batches that it holds, so the data must come in
            the same order.
        save_every (`int`): In batches.

    Raises:
        ValueError: If there is no example, an input is longer than `max_length`, or the file at `path` belongs to
            another model or length.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a pretrained model of transformers, got a {type(model).__name__}.")
    for name, value in (("max_length", max_length), ("batch_size", batch_size), ("save_every", save_every)):
        check_count(name, value)
    if path is not None:
        check_path("path", path)
    averages = _started(model, max_length, path)
    loader = _batches(dataloader_or_dataset, batch_size, model.config)
    total = len(loader) if isinstance(loader.dataset, Sized) else None
    progress = tqdm(
        islice(loader, averages.batches, None), total=total, initial=averages.batches, desc="mean attention"
    )
    with _eager_eval(model):
        for batch in progress:
            _add(averages, model, batch)
            if path is not None and averages.batches % save_every == 0:
                averages.save(path)
    if averages.batches == 0:
        raise ValueError("mean_attention got no batches: the dataloader or dataset is empty.")
    if path is not None:
        averages.save(path)
    return averages


def model_print(model: PreTrainedModel) -> torch.Tensor:
    """One norm for each weight of the backbone `(weights,)` float64; poolers differ between tasks and are left out."""
    weights = [
        weight
        for name, weight in model.base_model.named_parameters()
        if not name.startswith(("pooler.", "classifier."))
    ]
    return torch.stack([torch.linalg.vector_norm(weight.detach().double()) for weight in weights]).cpu()


def _same_print(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Half precision may change a norm a little; other weights change some of them a lot."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=_PRINT_TOLERANCE, atol=_PRINT_TOLERANCE)


def _started(model: PreTrainedModel, max_length: int, path: str | os.PathLike[str] | None) -> MeanAttention:
    averages = MeanAttention.empty(model, max_length)
    if path is None or not Path(path).exists():
        return averages
    try:
        return averages.merge(MeanAttention.load(path))
    except ValueError as error:
        raise ValueError(f"cannot resume from {path}: {error} Choose another path, or remove the file.") from error


def _batches(data: Iterable[Any], batch_size: int, config: PreTrainedConfig) -> DataLoader[Any]:
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, Mapping):
        raise ValueError(
            f"expected a dataset or a DataLoader, got a mapping with the keys {list(data)}. Did you mean one of "
            "its splits?"
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise ValueError(f"dataloader_or_dataset must give batches or tokenized examples, got {shortened(data)}.")
    dataset: Any = data if isinstance(data, Sized) else _Examples(data)
    return DataLoader(
        dataset, batch_size=batch_size, collate_fn=lambda examples: _padded(examples, config.pad_token_id)
    )


class _Examples(torch.utils.data.IterableDataset[Any]):
    """A stream of examples as a dataset."""

    def __init__(self, examples: Iterable[Mapping[str, Any]]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.examples)


def _padded(examples: Sequence[Mapping[str, Any]], pad_token_id: int | None) -> dict[str, torch.Tensor]:
    padding = {"input_ids": pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    for example in examples:
        if _present(example) != _present(examples[0]):
            raise ValueError(f"examples must be mappings with the same columns, got {shortened(example)}.")
    columns = {name: [_row(name, example[name]) for example in examples] for name in _present(examples[0])}
    if any(ids.dim() != 1 for ids in columns["input_ids"]):
        raise ValueError("expected examples with one text each, got batches. Wrap them in a DataLoader.")
    columns.setdefault("attention_mask", [torch.ones_like(ids) for ids in columns["input_ids"]])
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding[name])
        for name, rows in columns.items()
    }


def _row(name: str, values: Any) -> torch.Tensor:
    try:
        row = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} of the examples must be lists of whole numbers, got {shortened(values)}.") from error
    if row.is_floating_point() or not row.numel():
        raise ValueError(f"{name} of the examples must be lists of whole numbers, got {shortened(values)}.")
    return row


def _present(example: Mapping[str, Any]) -> list[str]:
    if not isinstance(example, Mapping):
        raise ValueError(f"examples and batches must be mappings with input_ids, got {shortened(example)}.")
    if "input_ids" not in example:
        raise ValueError(f"examples must be tokenized, with input_ids, got the columns {list(example)}.")
    return [name for name in _MODEL_INPUTS if name in example]


def _add(averages: MeanAttention, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    inputs = {name: batch[name].to(model.device) for name in _present(batch)}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    length = inputs["input_ids"].shape[1]
    if length > averages.max_length:
        raise ValueError(
            f"an input has {length} tokens, but max_length is {averages.max_length}. Tokenize with truncation=True, "
            f"max_length={averages.max_length}, or raise max_length."
        )
    outputs = model.base_model(**inputs, output_attentions=True, return_dict=True)
    averages.add_batch(outputs.attentions, inputs["attention_mask"])


@contextmanager
def _eager_eval(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model is in eval mode, without gradients, and its attention gives probabilities."""
    training, implementation = model.training, model.config._attn_implementation
    model.eval()
    try:
        if implementation != "eager":
            model.set_attn_implementation("eager")
        with torch.no_grad():
            yield
    finally:
        if implementation != "eager":
            model.set_attn_implementation(implementation)
        model.train(training)
