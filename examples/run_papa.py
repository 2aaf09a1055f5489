"""How much attention do pretrained encoders need, and what does it save to do without? The study of PAPA (Hassid et
al., 2022, arXiv 2211.03495) for any encoder and several tasks in one command: average attention matrices, a ranking of
the heads, the papers' probe with a growing share of constant heads, and constant heads beside and together with exits.

    OMP_NUM_THREADS=1 python examples/run_papa.py --models minilm --bf16 True --exits_on minilm/trec \
        --tasks trec=data/trec ud_ewt_pos=data/ud_ewt_pos mrpc=data/mrpc,length=96

A task is `name=folder`, with what differs from the defaults behind commas: the folder has train and test files
(Parquet, CSV or JSON lines) and, if it likes, a validation file; `text=`, `pair=` and `label=` name columns, `length=`
the tokens at which inputs are cut. Labels are integers; a task of tokens has lists of words and lists of labels. A
model is `minilm` or `mpnet` (from PyPI), a Hub name or a folder.

The probe is trained on what the frozen encoder gives, computed once for all epochs and seeds. A study that was stopped
is taken up where it was: give the same command again; models, tasks, fractions and seeds may be added. The page
(`page/` in the output folder: results.md, results.json, figures) is written anew after every part, from all parts that
are there. Time is not measured meanwhile, but by the same command with `--measure_time True`, on a quiet machine, in
three minutes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from papa_study_exits import FRACTION, METHODS, run_method
from papa_study_parts import Part, Task
from papa_study_results import write_page
from papa_study_timing import measure_time


@dataclass
class StudyArguments:
    """Every field is a flag."""

    tasks: list[str] = field(metadata={"help": "name=folder[,text=…,pair=…,label=…,length=…], several."})
    models: list[str] = field(
        default_factory=lambda: ["minilm"], metadata={"help": "'minilm', 'mpnet', Hub names or folders."}
    )
    output_dir: str = field(default="outputs/papa", metadata={"help": "Where everything is written."})
    fixed_positions: bool = field(default=False, metadata={"help": "The papers' fixed-position preprocessing."})
    train_examples: int = field(default=2000, metadata={"help": "At most so many, drawn at random."})
    test_examples: int = field(default=1000, metadata={"help": "At most so many, drawn at random."})
    fractions: list[float] = field(
        default_factory=lambda: [0, 1 / 2, 3 / 4, 7 / 8, 1], metadata={"help": "Shares of constant heads."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One training with each."})
    epochs: float = field(default=5, metadata={"help": "Of the probe."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the probe, and of that of the ranking."})
    ranking_examples: int = field(default=1000, metadata={"help": "Of the training examples, for the ranking."})
    ranking_epochs: float = field(default=3, metadata={"help": "Of the ranking."})
    lambda_learning_rate: float = field(default=1e-2, metadata={"help": "Of the interpolation weights."})
    exits_on: list[str] = field(
        default_factory=list,
        metadata={"help": f"model/task, several: also fine-tune {', '.join(METHODS)} ({FRACTION:g} of the heads)."},
    )
    exits_epochs: float = field(default=2, metadata={"help": "Of fine-tuning."})
    exits_learning_rate: float = field(default=2e-4, metadata={"help": "Of fine-tuning."})
    max_accuracy_drop: float = field(default=0.01, metadata={"help": "What the exits are calibrated to."})
    batch_size: int = field(default=32, metadata={"help": "For training."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 where torch deems it safe."})
    measure_time: bool = field(default=False, metadata={"help": "Only measure time of what is there."})
    timed_examples: int = field(default=96, metadata={"help": "Test examples to measure time on."})


def main() -> None:
    """Runs what is unfinished, or measures time; writes the page."""
    # Each probe would report anew which weights of the checkpoint it leaves out.
    transformers.logging.set_verbosity_error()
    parser = HfArgumentParser(StudyArguments, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    (arguments,) = parser.parse_args_into_dataclasses()
    folder = Path(arguments.output_dir)
    parts = [Part(model, Task.parse(task), arguments) for model in arguments.models for task in arguments.tasks]
    unknown = sorted(set(arguments.exits_on) - {part.name for part in parts})
    if unknown:
        raise ValueError(f"exits_on names {unknown}, but the parts are {', '.join(part.name for part in parts)}.")
    if arguments.measure_time:
        measure_time(parts, folder)
    else:
        for part in tqdm(parts, desc="parts"):
            part.probes()
            write_page(folder)
        for part in parts:
            if part.name in arguments.exits_on:
                compare_with_exits(part)
    print(write_page(folder))


def compare_with_exits(part: Part) -> None:
    """Constant heads, exits, both and neither."""
    steps = [(method, seed) for seed in part.arguments.seeds for method in METHODS]
    for method, seed in tqdm(steps, desc=f"{part.name}: exits"):
        run_method(part, method, seed)


if __name__ == "__main__":
    main()
