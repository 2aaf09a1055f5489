"""Classifies sentences with a saved checkpoint where hf_adaptive is not installed (here: may not be imported).

python examples/classify.py outputs/quickstart/checkpoint "A masterpiece." "Dull and far too long."
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main(checkpoint: str, sentences: list[str]) -> None:
    """Prints each sentence's class, the layer after which it left, and how sure the model was."""
    sys.modules["hf_adaptive"] = None  # any import of the package fails: the code comes with the checkpoint
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**tokenizer(sentences, padding=True, truncation=True, return_tensors="pt"))
    for sentence, logits, exit_index in zip(sentences, outputs.logits, outputs.exit_index):
        probability, label = logits.softmax(dim=-1).max(dim=-1)
        layer = model.config.exit_layers[exit_index]
        print(f"{model.config.id2label[label.item()]:>12} {probability:.0%} sure, after layer {layer}: {sentence}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
