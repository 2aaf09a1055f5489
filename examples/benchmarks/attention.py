"""The row on constant heads beside attention as it is."""

import torch
from measuring import measure_in_turn, medians, ratio
from results import Result, Target
from transformers import AutoConfig, AutoModelForSequenceClassification
from workload import BATCH_SIZE, Workload

from hf_adaptive.modeling.architectures import papa_class


def constant_heads(workload: Workload) -> list[Result]:
    """All heads constant, and half of them, beside the stock classifier with sdpa, on a batch of mixed lengths."""
    config = AutoConfig.from_pretrained(workload.bert)
    every = [[layer, head] for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
    choices = {
        "all heads constant": (every, Target(0.85)),
        "every second head of each layer constant": (every[::2], Target(0.92)),
        "all heads of every second layer constant": ([pair for pair in every if pair[0] % 2 == 0], Target(0.92)),
    }
    models = {name: _with_constant_heads(workload, heads) for name, (heads, _) in choices.items()}
    stock = AutoModelForSequenceClassification.from_pretrained(workload.bert, attn_implementation="sdpa")
    runs = {
        name: BatchRun(model.to(workload.device).eval(), workload.long_batch)
        for name, model in {"stock": stock, **models}.items()
    }
    seconds = measure_in_turn(runs, runs, 3 * workload.size.repeats, workload.device, "constant heads")
    real = workload.long_batch["attention_mask"].float().mean().item()
    weights = "random weights, " if workload.size.bert_is_random else ""
    return [
        Result(
            "constant_heads",
            f"{name}, {weights}length {workload.longest}, batch of {BATCH_SIZE} of mixed lengths",
            "time / stock model with sdpa",
            target,
            ratio(seconds[name], seconds["stock"]),
            {**medians({key: seconds[key] for key in (name, "stock")}), "share of real tokens": real},
        )
        for name, (_, target) in choices.items()
    ]


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


def _with_constant_heads(workload: Workload, heads: list[list[int]]):
    """Random constants: speed does not depend on them."""
    config = AutoConfig.from_pretrained(workload.bert)
    model_class = papa_class(config.model_type, "ForSequenceClassification")
    shape = (config.num_hidden_layers, config.num_attention_heads, workload.longest, workload.longest)
    constants = torch.randn(shape, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    return model_class.from_pretrained(
        workload.bert, constants=constants, constant_heads=heads, attn_implementation="sdpa"
    )
