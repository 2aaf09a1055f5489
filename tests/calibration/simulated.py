"""Plausible outputs of exits: later exits see the same evidence with less noise and are surer of themselves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_adaptive.calibration.exit_table import ExitTable

GOLDEN = Path(__file__).parents[1] / "golden" / "sweet"


def simulated_exits(num_examples: int, seed: int = 0, exits: tuple[int, ...] = (0, 1, 2, 3)) -> ExitTable:
    """Two classes, exits with accuracies of about 83, 88, 91 and 92 %, overconfident towards the end."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (num_examples,), generator=generator)
    evidence = (2 * labels - 1) * (1.3 + 0.9 * torch.randn(num_examples, generator=generator))
    margins = [
        2 * sharpness * (evidence + noise * torch.randn(num_examples, generator=generator))
        for noise, sharpness in ((1.0, 1.0), (0.6, 1.3), (0.35, 1.6), (0.2, 2.0))
    ]
    margin = torch.stack(margins, dim=1)[:, exits]
    costs = [(1 / 12, 4 / 12, 6 / 12, 1.0)[exit_index] for exit_index in exits]
    return ExitTable.from_predictions(
        torch.sigmoid(margin.abs()), (margin > 0).long(), costs, labels, lowest_score=0.0
    )


def golden_cascade() -> ExitTable:
    """The four models of the golden multi-model run, 64 examples, with the costs that it charges."""
    tensors = load_file(GOLDEN / "multi_model.safetensors")
    layers = json.loads((GOLDEN / "multi_model.json").read_text())
    probabilities = torch.softmax(tensors["logits"], dim=-1).transpose(0, 1)
    costs = [total / layers["last_model_layers"] for total in layers["cumulative_layers"]]
    return ExitTable.from_predictions(
        probabilities.amax(-1), probabilities.argmax(-1), costs, tensors["labels"], lowest_score=0.0
    )
