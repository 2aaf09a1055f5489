"""Loads checkpoints as a machine without this package does: `fresh_process` runs it in a process of its own.

The job named in its argument has checkpoints and a file of inputs; answers go to a file, and a model is saved again
where that is asked.
"""

import json
import sys
import traceback

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

torch.set_num_threads(1)


def answers(model, inputs, thresholds):
    """The answers of a classifier in every mode."""
    with torch.no_grad():
        everything, early = model(**inputs), model(**inputs, exit_thresholds=thresholds)
        forced = model(**inputs, exit_at=model.config.exit_layers[0])
    return {
        "logits": everything.logits,
        "exit_logits": everything.exit_logits,
        "early/logits": early.logits,
        "early/exit_index": early.exit_index,
        "forced/logits": forced.logits,
        "configured/exit_index": everything.exit_index,
    }


def classified(model, tokenizer, texts):
    """What a pipeline says, in batches."""
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, trust_remote_code=True)
    return classify(texts, batch_size=5, top_k=None)


def run(checkpoint, job):
    """Everything that is asked of one checkpoint; without texts, what depends on its architecture."""
    path = checkpoint["path"]
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(path, trust_remote_code=True)
    inputs = load_file(job["inputs"])
    tensors = answers(model, inputs, checkpoint["thresholds"])
    tensors["backbone"] = backbone(**inputs).last_hidden_state.detach()
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    texts = None
    if job["texts"]:
        texts = classified(path, tokenizer, job["texts"])
        changed = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True, exit_thresholds=0.0)
        tensors["changed/exit_index"] = changed(**inputs).exit_index
    if checkpoint["save_to"]:
        model.save_pretrained(checkpoint["save_to"])
        tokenizer.save_pretrained(checkpoint["save_to"])
    classes = {"config": config, "model": model, "backbone": backbone}
    names = {name: f"{type(value).__module__}.{type(value).__name__}" for name, value in classes.items()}
    return {"classes": names, "texts": texts, "config": config.to_dict()}, tensors


def main():
    """Runs the job; the files of answers are named after the checkpoints."""
    try:
        import hf_adaptive  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("the package can be imported here")
    with open(sys.argv[1]) as file:
        job = json.load(file)
    for name, checkpoint in job["checkpoints"].items():
        try:
            found, tensors = run(checkpoint, job)
        except Exception:
            traceback.print_exc()
            raise SystemExit(f"{name} failed") from None
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, f"{job['out']}/{name}.safetensors")
        with open(f"{job['out']}/{name}.json", "w") as file:
            json.dump(found, file, default=str)


if __name__ == "__main__":
    main()
