"""What `predict`, `evaluate_exits` and `calibrate_exits` find in one of two processes."""

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from hf_adaptive import CascadeForSequenceClassification, calibrate_exits, evaluate_exits
from tests import tiny

LENGTHS = (1, 2, 7, 21)
CALLS = {"everything": {"exit_thresholds": [None, None]}, "early": {"exit_thresholds": 0.6}, "forced": {"exit_at": 2}}


def models():
    """Classifiers with exits, one with learned units, and a cascade."""
    members = [tiny.plain_model("bert", num_hidden_layers=depth) for depth in tiny.EXIT_LAYERS]
    return {
        "bert": tiny.model("bert"),
        "learned": tiny.model("roberta", exit_criterion="learned"),
        "cascade": CascadeForSequenceClassification.from_models(members),
    }


def examples(count):
    """Rows of different lengths, with labels."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(2, 20, (count,), generator=generator).tolist()
    rows = [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    labels = torch.randint(0, tiny.LABELS, (count,), generator=generator).tolist()
    return [{"input_ids": row, "label": label} for row, label in zip(rows, labels)]


def answers():
    """Everything that `predict` says, by model, call and number of examples."""
    found = {}
    for name, model in models().items():
        for call, arguments in CALLS.items():
            for count in LENGTHS:
                outputs = model.predict(examples(count), batch_size=4, show_progress=False, **arguments)
                fields = ("logits", "exit_logits", "exit_index", "exit_certainty")
                found |= {
                    f"{name}/{call}/{count}/{field}": outputs[field].contiguous()
                    for field in fields
                    if outputs.get(field) is not None
                }
    return found


def report_and_thresholds():
    """Accuracy and curve of an evaluation, and thresholds of a calibration."""
    model = tiny.model("bert")
    calibrate_exits(model, examples(64), target_cost=0.6, show_progress=False)
    report = evaluate_exits(model, examples(63), timed_examples=8, show_progress=False)
    curve = [[point.threshold, point.cost, point.accuracy] for point in report.curve]
    return {
        "thresholds": torch.tensor(model.config.exit_thresholds),
        "accuracy": torch.tensor(report.accuracy),
        "curve": torch.tensor(curve),
    }


def own_answers(seed):
    """Of examples that only this process has."""
    rows = [{"input_ids": [3 + (seed + place) % 9] * (2 + place)} for place in range(5 + seed)]
    return tiny.model("bert").predict(rows, show_progress=False, split_between_processes=False).logits.contiguous()


def refusal(seed):
    """What is said of data that differ between processes."""
    try:
        tiny.model("bert").predict(examples(6 + seed), show_progress=False)
    except ValueError as error:
        return str(error)
    return "nothing"


def predict_in_processes(out):
    """Writes what each process found."""
    found = {**answers(), **report_and_thresholds()}
    state = PartialState()
    assert state.num_processes == 2, state
    said = refusal(state.process_index)
    assert "2 processes were given different data: [6, 7] examples" in said, said
    found["own"] = own_answers(state.process_index)
    save_file(found, out / f"{state.process_index}.safetensors")
