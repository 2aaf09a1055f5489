"""Tiny random models of every architecture, and the tables of them in README.md and model_cards/architectures.md.

    python -m tests.modeling.architectures

writes those tables again after an entry was added or changed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_adaptive
from tests import tiny

ROOT = Path(__file__).parents[2]
MARKERS = "<!-- architectures -->", "<!-- /architectures -->"
# The table that is folded into the README, and the page with what is particular to each.
PAGES = (ROOT / "README.md", ROOT / "model_cards" / "architectures.md")
DOCUMENTATION = "https://huggingface.co/docs/transformers/model_doc"

NAMES = tuple(sorted(hf_adaptive.ARCHITECTURES))
DECODERS = tuple(name for name in NAMES if hf_adaptive.ARCHITECTURES[name].pooling == "last")
HIDDEN, LAYERS, VOCABULARY, PAD = 32, 4, tiny.VOCABULARY, tiny.PAD
EXIT_LAYERS = [1, 2, 4]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    # Larger than the usual 0.02, so that exits differ and thresholds between them exist.
    "initializer_range": 0.2,
}
_ENCODER = {"intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "pooler_hidden_size": HIDDEN,
    "pooler_dropout": 0.0,
    "type_vocab_size": 0,
}
# Half of the layers see a window that is shorter than the longest row.
_WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_ROTARY = {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")}
_FIELDS: dict[str, dict[str, Any]] = {
    "albert": {**_ENCODER, "embedding_size": 16, "classifier_dropout_prob": 0.0},
    "deberta": {**_DEBERTA, "max_relative_positions": 16},
    # As DeBERTa-v3: buckets, one projection for content and position, a normalised table of positions; and the
    # convolution of v2's largest sizes.
    "deberta-v2": {
        **_DEBERTA,
        "max_relative_positions": 16,
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "distilbert": {"hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "electra": {**_ENCODER, "embedding_size": 16},
    "eurobert": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": 8, "layer_types": _WINDOWS},
    "gemma3_text": {**_GROUPED, "sliding_window": 8, "layer_types": _WINDOWS, "rope_parameters": _ROTARY},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "modernbert": {
        "intermediate_size": 48,
        "local_attention": 8,
        "layer_types": _WINDOWS,
        "cls_token_id": 0,
        "sep_token_id": 2,
    },
    "nomic_bert": _ENCODER,
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 8, "layer_types": _WINDOWS},
    "qwen3": _GROUPED,
}


def fields(name: str, **changed: Any) -> dict[str, Any]:
    """Fields of a tiny stock configuration with three labels and without dropout."""
    values = {**_SIZES, **_FIELDS.get(name, _ENCODER), "num_labels": 3, **changed}
    # GPT-2 has heads of one size only.
    return {key: value for key, value in values.items() if not (name == "gpt2" and key == "head_dim")}


def two_layers(name: str) -> dict[str, Any]:
    """Fields that leave the first two layers, one of each kind where there are two, for tests that compile them."""
    types = fields(name).get("layer_types")
    return {"num_hidden_layers": 2, **({} if types is None else {"layer_types": types[:2]})}


def kinds(names: Sequence[str], *chosen: str) -> list[Any]:
    """Parameters of a test that takes long: one name of each kind, and the others as slow ones."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


def stock(name: str, suffix: str = "ForSequenceClassification", **changed: Any):
    """A stock model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    architecture = hf_adaptive.ARCHITECTURES[name]
    return architecture.stock(suffix)(architecture.stock("Config")(**fields(name, **changed))).eval()


def config(name: str, **changed: Any):
    """A tiny configuration with exits after 1, 2 and 4 layers."""
    config_class = hf_adaptive.make_class(hf_adaptive.ARCHITECTURES[name].config_name)
    return config_class(**fields(name, **{"exit_layers": EXIT_LAYERS, **changed}))


def model(name: str, **changed: Any):
    """A tiny model with exits and random weights that counts as trained, in evaluation mode."""
    torch.manual_seed(0)
    own = hf_adaptive.make_class(hf_adaptive.ARCHITECTURES[name].classifier_name)(config(name, **changed))
    own._exits_are_untrained = False
    return own.eval()


def details() -> str:
    """The page's table of architectures, made from the registry."""
    heading = ("`model_type`", "Class", "Layers", "Head", "Pooling", "Rows tested with padding", "Constant attention")
    rows = []
    for name in NAMES:
        own = hf_adaptive.ARCHITECTURES[name]
        head = " → ".join(f"`{path}`" for path in own.head.sources.values())
        pooling = f"`{own.pooling}`" if isinstance(own.pooling, str) else "of `classifier_pooling`"
        layers = f"`{own.layers}`, one shared module" if own.shares_layers else f"`{own.layers}`"
        padding = "right, left" if name in DECODERS else "right"
        cells = (f"`{name}`", f"`{own.classifier_name}`", layers, head, pooling, padding)
        rows.append((*cells, _constant_attention(own)))
    return _table(heading, rows)


def names_and_links() -> str:
    """The README's table of architectures, folded."""
    rows = []
    for name in NAMES:
        own = hf_adaptive.ARCHITECTURES[name]
        page = name.removesuffix("_text")
        rows.append((f"[`{name}`]({DOCUMENTATION}/{page})", f"`{own.classifier_name}`", _constant_attention(own)))
    folded = _table(("`model_type`", "Class", "Constant attention"), rows)
    return f"<details>\n<summary>All {len(NAMES)} architectures</summary>\n\n{folded}\n\n</details>"


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ("---",) * len(heading), *rows))


def _constant_attention(own: hf_adaptive.Architecture) -> str:
    """What was verified of constant heads: with which attention, and what is particular."""
    if own.attention is None:
        return "–"
    particular = {
        "windows": own.attention.window is not None,
        "causal": own.attention.is_causal,
        "a layer each instead of one shared": own.shares_layers,
    }
    kinds = ("eager", "sdpa") if own.stock("Model")._supports_sdpa else ("eager",)
    return ", ".join((*kinds, *(what for what, holds in particular.items() if holds)))


def sections() -> dict[Path, str]:
    """What stands between the markers of each page."""
    return {
        page: f"{MARKERS[0]}\n{content}\n{MARKERS[1]}"
        for page, content in zip(PAGES, (names_and_links(), details()), strict=True)
    }


def write_tables() -> None:
    """Replaces the tables."""
    for page, section in sections().items():
        text = page.read_text()
        start, end = text.index(MARKERS[0]), text.index(MARKERS[1]) + len(MARKERS[1])
        page.write_text(text[:start] + section + text[end:])


if __name__ == "__main__":
    write_tables()
