"""Rows on constant heads beside attention as it is: time and memory of layers of a BERT base with random weights."""

import copy
from pathlib import Path

import torch
from measuring import Spread, measure_in_turn, measured_alone, medians, ratio
from results import Result, Target
from tqdm.auto import tqdm
from training import PROBE
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from workload import Workload

from hf_adaptive.modeling.architectures import supported_architecture
from hf_adaptive.modeling.constant_heads import install_constant_heads

LENGTHS = (24, 128, 512)
DTYPES = (torch.float32, torch.bfloat16)
# Of a batch, padding counted. All layers are alike, so that a few of them say what all do.
TOKENS, LAYERS = 4096, 4
# Of the row that the targets were set for; others have none.
TARGETED = (128, torch.float32)
TARGETS = {
    "all heads": Target(0.80),
    "every second head of each layer": Target(0.90),
    "all heads of every second layer": Target(0.90),
}


def constant_heads(workload: Workload) -> list[Result]:
    """All heads constant, and half of them, beside the stock backbone with sdpa, on batches of mixed lengths."""
    longest = AutoConfig.from_pretrained(workload.bert).max_position_embeddings
    sizes = [(length, dtype) for length in LENGTHS if length <= longest for dtype in DTYPES]
    return [result for size in sizes for result in _rows(workload, *size)]


def _rows(workload: Workload, length: int, dtype: torch.dtype) -> list[Result]:
    config = layers_config(workload.bert)
    models = {name: backbone(config, heads, length) for name, heads in choices(config).items()}
    batch = mixed_lengths(TOKENS // length, length, config.vocab_size)
    batch = {name: tensor.to(workload.device) for name, tensor in batch.items()}
    runs = {name: BatchRun(model.to(workload.device, dtype), batch) for name, model in models.items()}
    kind = f"length {length}, {str(dtype).removeprefix('torch.')}"
    seconds = measure_in_turn(runs, runs, 2 * workload.size.repeats, workload.device, f"constant heads, {kind}")
    real = batch["attention_mask"].float().mean().item()
    return [
        Result(
            "constant_heads",
            f"{name} constant, {kind}, batch of {TOKENS // length} of mixed lengths",
            "time / stock backbone with sdpa",
            target if (length, dtype) == TARGETED else None,
            ratio(seconds[name], seconds["stock"]),
            {**medians({key: seconds[key] for key in (name, "stock")}), "share of real tokens": real},
        )
        for name, target in TARGETS.items()
    ]


def constant_heads_memory(workload: Workload) -> list[Result]:
    """Peak memory of a forward with all heads constant beside stock with sdpa, each in a process of its own."""
    length = min(128, AutoConfig.from_pretrained(workload.bert).max_position_embeddings)
    peaks = {
        name: _peak(workload, name, length)
        for name in tqdm(("stock", "all heads"), desc="memory of a forward with constant heads")
    }
    return [
        Result(
            "constant_heads_memory",
            f"forward with all heads constant, {TOKENS // length} × {length} tokens",
            "peak memory / stock backbone with sdpa",
            Target(1.0),
            Spread.of([peaks["all heads"] / peaks["stock"]]),
            {f"{name}, kB": peak for name, peak in peaks.items()},
        )
    ]


def _peak(workload: Workload, name: str, length: int) -> float:
    job = {
        "of": "forward",
        "encoder": str(workload.bert),
        "choice": name,
        "device": str(workload.device),
        "rows": TOKENS // length,
        "length": length,
    }
    return measured_alone(PROBE, job)["whole"]


class BatchRun:
    """One batch through one model.

    Args:
        model: In evaluation mode.
        batch (`dict[str, torch.Tensor]`): On the device.
    """

    def __init__(self, model, batch: dict[str, torch.Tensor]):
        self.model = model
        self.batch = batch

    @torch.inference_mode()
    def __call__(self) -> None:
        self.model(**self.batch)


def layers_config(checkpoint: str | Path) -> PreTrainedConfig:
    """A few layers of a checkpoint's configuration."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
    return config


def choices(config: PreTrainedConfig) -> dict[str, list[list[int]]]:
    """Constant heads by name."""
    every = [[layer, head] for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
    return {
        "stock": [],
        "all heads": every,
        "every second head of each layer": every[::2],
        "all heads of every second layer": [pair for pair in every if pair[0] % 2 == 0],
    }


def backbone(config: PreTrainedConfig, heads: list[list[int]], length: int):
    """Random weights and constants: speed does not depend on them."""
    own = copy.deepcopy(config)
    torch.manual_seed(0)
    model = AutoModel.from_config(own, attn_implementation="sdpa").eval()
    model.config.constant_heads, model.config.constant_length = heads, length
    constants = torch.randn(config.num_hidden_layers, config.num_attention_heads, length, length).softmax(dim=-1)
    install_constant_heads(model, supported_architecture(config.model_type), model.config, constants)
    return model


def mixed_lengths(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens in rows of evenly spread lengths, from an eighth to all."""
    lengths = torch.linspace(length, length // 8, rows).long()
    mask = torch.arange(length)[None, :] < lengths[:, None]
    return {"input_ids": torch.randint(vocabulary, (rows, length)), "attention_mask": mask.long()}
