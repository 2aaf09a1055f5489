"""Tiny random models, batches and a tokenizer, made without a network."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hf_adaptive

# What the library rightly says of a handful of random rows, where a test is about something else.
on_few_rows = pytest.mark.filterwarnings("ignore:No temperature between")
on_rows_used_before = pytest.mark.filterwarnings("ignore:these examples are used for calibration")

ARCHITECTURES = ("bert", "deberta", "mpnet", "roberta")
LAYERS, HIDDEN, VOCABULARY, LABELS = 4, 16, 64, 3
EXIT_LAYERS = [1, 2, 4]
PAD = 1
WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "is", "very", "not", "actor", "music", "dull", "bright"]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    # Larger than the usual 0.02, so that exits differ and thresholds between them exist.
    "initializer_range": 0.3,
}
_FIELDS = {
    "deberta": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "max_relative_positions": 16,
        "pooler_hidden_size": HIDDEN,
        "type_vocab_size": 0,
    },
}


def plain_config(name: str = "bert", **fields):
    """A stock configuration of tiny size; three labels unless said otherwise."""
    values = {**_SIZES, **_FIELDS.get(name, {}), "num_labels": LABELS, **fields}
    return getattr(transformers, f"{_prefix(name)}Config")(**values)


def plain_model(name: str = "bert", suffix: str = "ForSequenceClassification", **fields):
    """A stock model with random weights."""
    torch.manual_seed(0)
    return getattr(transformers, _prefix(name) + suffix)(plain_config(name, **fields)).eval()


def cascade(name: str = "bert", depths=EXIT_LAYERS, **fields):
    """A cascade of stock models of these depths, with random weights."""
    members = [plain_model(name, num_hidden_layers=depth, **fields) for depth in depths]
    return hf_adaptive.CascadeForSequenceClassification.from_models(members)


def config(name: str = "bert", **fields):
    """A tiny configuration with exits after 1, 2 and 4 layers."""
    values = {**_SIZES, **_FIELDS.get(name, {}), "num_labels": LABELS, "exit_layers": EXIT_LAYERS, **fields}
    return getattr(hf_adaptive, f"{_prefix(name)}WithExitsConfig")(**values)


def model(name: str = "bert", **fields):
    """A tiny model with exits and random weights that counts as trained, in evaluation mode."""
    torch.manual_seed(0)
    own = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_config(config(name, **fields))
    own._exits_are_untrained = False
    return own.eval()


def without_dropout(name: str = "bert", **fields):
    """As `model`, with nothing random in training mode."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    pooler = {"pooler_dropout": 0.0} if name == "deberta" else {}
    return model(name, **none, **pooler, **fields)


def batch(rows: int = 6, length: int = 12, seed: int = 0, padding: str = "right") -> dict[str, torch.Tensor]:
    """Random tokens, padded to `length` on one side; the first row has no padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    if padding == "left":
        mask = mask.flip(dims=(1,))
    return {"input_ids": input_ids.where(mask == 1, torch.tensor(PAD)), "attention_mask": mask}


def labels(rows: int = 6, seed: int = 0, num_labels: int = LABELS) -> torch.Tensor:
    """Random class indexes."""
    return torch.randint(0, num_labels, (rows,), generator=torch.Generator().manual_seed(seed))


def row(inputs: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding."""
    keep = inputs["attention_mask"][index] == 1
    return {name: tensor[index : index + 1, keep] for name, tensor in inputs.items()}


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Answers of the same weights in another process or at another address.

    Not bit by bit: some kernels add in another order there. Types, shapes and places of NaN have to be the same.
    """
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5, equal_nan=True)


def thresholds_between(model, inputs: dict[str, torch.Tensor], share: float = 0.5) -> list[float]:
    """One threshold an exit that about this share of the rows does not reach, far from every row's confidence."""
    with torch.no_grad():
        confidence = model(**inputs, exit_thresholds=[None] * (len(model.exits) - 1)).exit_logits
    confidence = confidence.float().softmax(dim=-1).amax(dim=-1)[:, :-1].sort(dim=0).values
    position = min(int(share * len(confidence)), len(confidence) - 1)
    lower = confidence[position - 1] if position else torch.zeros_like(confidence[0])
    return ((lower + confidence[position]) / 2).tolist()


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; unknown ones become [UNK]."""
    tokens = ["<s>", "<pad>", "</s>", "[UNK]", *WORDS]
    own = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token="<pad>",
        unk_token="[UNK]",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=40,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_encoder(folder) -> None:
    """A plain encoder without a classifier, and its tokenizer, as a user of the examples has them on disk."""
    plain_model("bert", "Model").save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def sentences(count: int = 12, seed: int = 0) -> list[str]:
    """Random sentences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]


def _prefix(name: str) -> str:
    return hf_adaptive.ARCHITECTURES[name].name
