"""Is SWEET worth choosing, and when? The comparisons of its paper (Rotem et al., ACL 2023, arXiv 2306.02307) on your
encoder and your tasks: joint training, SWEET, independent models, and what lies between them.

The default run, on two CPU cores, 78 runs in about 70 minutes (the last part measures time, on one process alone;
without `--bf16 True` training takes half as long again):

    OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
        --dynamo_backend no examples/run_exit_study.py --use_cpu True --bf16 True --output_dir outputs/exit-study \
        --tasks sst2=data/sst2 trec=data/trec

(`--multi_gpu` is what makes accelerate start several processes; `--use_cpu True` keeps them on the CPU.) Plain
`python examples/run_exit_study.py ...` runs the same on one process. A study that was stopped is taken up where it
was: give the same command again; methods, poolings, seeds and tasks may be added.

A task is `name=source`, with what differs from the defaults behind commas: a folder with train, validation and test
files, one file, or a Hub data set; `text=`, `pair=` and `label=` name columns, `config=` the configuration of a Hub
data set, `test=validation` the split to test on where the test split has no labels. The full scale, on the GPUs of a
machine (once more with `--model google-bert/bert-large-uncased --exit_layers 1 6 12 18 24 --learning_rate 2e-5`):

    accelerate launch --multi_gpu --num_processes 8 examples/run_exit_study.py --model google-bert/bert-base-uncased \
        --exit_layers 1 4 6 12 --mean_methods joint sweet multi-model share-0.1 --cls_methods all \
        --seeds 0 1 2 3 4 --num_train_epochs 3 --learning_rate 5e-5 --max_grad_norm 1 --bf16 True \
        --max_length 128 --max_test_examples 10000 --output_dir outputs/exit-study-base \
        --tasks sst2=nyu-mll/glue,config=sst2,text=sentence,test=validation \
        cola=nyu-mll/glue,config=cola,text=sentence,test=validation \
        mrpc=nyu-mll/glue,config=mrpc,text=sentence1,pair=sentence2,test=validation \
        rte=nyu-mll/glue,config=rte,text=sentence1,pair=sentence2,test=validation \
        qnli=nyu-mll/glue,config=qnli,text=question,pair=sentence,test=validation \
        qqp=nyu-mll/glue,config=qqp,text=question1,pair=question2,test=validation \
        mnli=nyu-mll/glue,config=mnli,text=premise,pair=hypothesis,test=validation_matched

What a study would take: the same command with `--estimate True` (one process) trains a few steps of every method,
multiplies out, and prints runs and hours. The default run: README's results page says what it took. The full scale
has 490 runs an encoder, each of at most 563 steps and 10,000 test examples; at 20 steps a second (10 for a large
encoder) on a data-centre GPU that is about 6 GPU-hours for the base and 11 for the large one. This is arithmetic, not
a measurement: ask `--estimate True` on the machine.

In the output folder: results.json (everything but measured time), timing.json, results.md, figures/, runs/ (one file
for every finished run), checkpoints/ (of the first seed).
"""

import copy
import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from exit_study_figures import write_figures
from exit_study_results import results_table, summarise
from hf_adaptive import (
    AutoModelForSequenceClassificationWithExits,
    CascadeForSequenceClassification,
    ExitDistillation,
    ExitReport,
    ExitsTrainer,
    GradientConflictRecorder,
    RoutingSchedule,
    evaluate_exits,
)
from hf_adaptive.files import identified
from hf_adaptive.hub import model_card, write_model_card
from hf_adaptive.modeling.architectures import supported_architecture
from hf_adaptive.modeling.switch import replaced_files, settle
from study_files import keep_settings, write_json
from text_data import DataArguments, encoder_path, label_fields, load_splits

ROUTINGS = ("joint", "sweet", "disjoint")
MULTI_MODEL = "multi-model"
SHARE = "share-"
SCHEDULES = {
    "open-to-closed": ("joint", "sweet", "linear"),
    "closed-to-open": ("sweet", "joint", "linear"),
    "joint-then-sweet": ("joint", "sweet", "step"),
    "sweet-then-joint": ("sweet", "joint", "step"),
}
# What `+` adds to a method: last layers of each exit's own, and what the exits learn from the last one.
BRANCH, DISTILLED = "branch", "distilled"
ADDITIONS = (BRANCH, DISTILLED)
METHODS = ("joint", "sweet", "disjoint", MULTI_MODEL, "share-0.1", "share-0.3", *SCHEDULES)
# What of `TrainingArguments` changes a run's result, beside its seed.
LEARNING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"),
    *("neftune_noise_alpha", "bf16", "fp16", "tf32", "train_sampling_strategy", "dataloader_drop_last", "data_seed"),
)
# What tells a process that others were started with it.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
THRESHOLDS = 41
CONFLICT_EXAMPLES = 32
# Share of training between two records of gradient conflict.
CONFLICT_EVERY = 0.2
# Points of a curve that time is measured at, and how often.
TIMED_POINTS, TIMED_ROUNDS = 7, 5
ESTIMATE_STEPS = 8
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Task:
    """What to classify.

    Args:
        name (`str`): Of the task in the results.
        source (`str`): Folder, file or Hub data set.
        config (`str`, *optional*): Configuration of a Hub data set.
        text, pair, label (`str`): Columns.
        test (`str`): Split to test on.
    """

    name: str
    source: str
    config: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    test: str = "test"

    @classmethod
    def parse(cls, words: str) -> "Task":
        """A task as it is given on the command line: `name=source[,field=value...]`."""
        pairs = [word.partition("=") for word in words.split(",")]
        known = [item.name for item in dataclasses.fields(cls)][2:]
        wrong = [name for name, _, value in pairs[1:] if name not in known or not value]
        if not pairs[0][2] or wrong:
            raise ValueError(
                f"a task must be name=source, followed by any of {', '.join(f',{name}=…' for name in known)}, got "
                f"{words!r}. For example sst2=nyu-mll/glue,config=sst2,text=sentence,test=validation."
            )
        return cls(pairs[0][0], pairs[0][2], **{name: value for name, _, value in pairs[1:]})

    def splits(self, max_train_examples: int, max_eval_examples: int) -> DatasetDict:
        """Its texts and labels, at most so many.

        Raises:
            ValueError: There is no split to test on.
        """
        splits = load_splits(
            DataArguments(
                dataset=self.source,
                dataset_config=self.config,
                text_column=self.text,
                text_pair_column=self.pair,
                label_column=self.label,
                max_train_examples=max_train_examples,
                max_eval_examples=max_eval_examples,
            )
        )
        if self.test not in splits:
            raise ValueError(
                f"task {self.name!r} has no split {self.test!r}; it has {', '.join(splits)}. Name one by test=."
            )
        return splits


@dataclass(frozen=True)
class Run:
    """One training with one seed."""

    task: str
    pooling: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.pooling}-{self.method}-seed-{self.seed}"


@dataclass
class StudyArguments:
    """Every field is a flag; so is every field of `TrainingArguments`."""

    tasks: list[str] = field(metadata={"help": "name=source[,text=…,pair=…,label=…,config=…,test=…], several."})
    output_dir: str = field(default="outputs/exit-study", metadata={"help": "Where everything is written."})
    model: str = field(default="minilm", metadata={"help": "'minilm' (from PyPI), a Hub name or a local folder."})
    exit_layers: list[int] = field(default_factory=lambda: [1, 2, 4, 6], metadata={"help": "Layers before each exit."})
    mean_methods: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": f"Methods with mean pooling: {', '.join(METHODS)}, any share-<number>; 'all' or 'none'. To all "
            f"but multi-model, +{' and +'.join(ADDITIONS)} may be added (joint+{BRANCH}+{DISTILLED})."
        },
    )
    cls_methods: list[str] = field(
        default_factory=lambda: ["joint", "sweet", MULTI_MODEL],
        metadata={"help": "Methods with the first token, as mean_methods."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of everything with each."})
    max_train_examples: int = field(default=6000, metadata={"help": "Training examples at most, as in the paper."})
    max_test_examples: int = field(default=1000, metadata={"help": "Test examples at most."})
    max_length: int = field(default=64, metadata={"help": "Tokens at most; longer texts are cut."})
    conflict_methods: list[str] = field(
        default_factory=lambda: ["joint", "share-0.1", "sweet"],
        metadata={"help": "Methods whose gradient conflict is recorded, with the first seed."},
    )
    timed_methods: list[str] = field(
        default_factory=lambda: ["joint", "sweet", MULTI_MODEL], metadata={"help": "Methods that time is measured of."}
    )
    timed_examples: int = field(default=256, metadata={"help": "Test examples to measure time on; 0 for none."})
    estimate: bool = field(default=False, metadata={"help": "Only say how long the study would take."})
    cards_dir: str | None = field(
        default=None, metadata={"help": "Also write a model card and its plot for every one of card_methods here."}
    )
    card_methods: list[str] = field(
        default_factory=lambda: ["joint", "sweet", MULTI_MODEL, "share-0.1"], metadata={"help": "As mean_methods."}
    )


@dataclass
class StudyTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the study."""

    num_train_epochs: float = field(default=1.5)
    per_device_train_batch_size: int = field(default=32)
    per_device_eval_batch_size: int = field(default=32)
    # On TREC's validation data (mean pooling, seed 0) better than 1e-4 for SWEET and for joint training at every exit.
    learning_rate: float = field(default=2e-4)
    warmup_steps: float = field(default=0.1)
    # The norm of all gradients together would couple models, and segments, that are to be independent.
    max_grad_norm: float = field(default=0.0)
    # Less padding.
    train_sampling_strategy: str = field(default="group_by_length")
    save_strategy: str = field(default="no")
    logging_strategy: str = field(default="no")
    disable_tqdm: bool = field(default=True)
    report_to: str = field(default="none")


def main() -> None:
    """Runs what is unfinished, this process's share of it, and ends with results and figures."""
    # Every run would report anew which weights of the checkpoint it leaves out.
    transformers.logging.set_verbosity_error()
    # Results must not depend on how many processes share the cores.
    torch.set_num_threads(1)
    parser = HfArgumentParser(StudyArguments, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    tasks = [Task.parse(words) for words in arguments.tasks]
    folder = Path(arguments.output_dir)
    runs = planned_runs(arguments, tasks)
    share, index = own_share([run for run in runs if not run_file(folder, run).exists()])
    # Not before: `TrainingArguments` would see the other processes, and every run would be spread over them.
    parser = HfArgumentParser(StudyTrainingArguments)
    (training,) = parser.parse_args_into_dataclasses([*others, "--output_dir", str(folder / "trainer")])
    study = Study(arguments, training, tasks)
    if arguments.estimate:
        study.estimate(runs)
        return
    study.check_settings()
    for run in tqdm(share, desc=f"runs of process {index}", position=index):
        study.run(run)
    if index == 0:
        wait_for([run_file(folder, run) for run in runs])
        study.finish(runs)


# Which runs


def planned_runs(arguments: StudyArguments, tasks: list[Task]) -> list[Run]:
    """All runs of the study, the long ones first."""
    runs = [
        Run(task.name, pooling, method, seed)
        for seed in arguments.seeds
        for pooling, names in (("mean", arguments.mean_methods), ("cls", arguments.cls_methods))
        for method in methods_named(names)
        for task in tasks
    ]
    return sorted(runs, key=lambda run: run.method != MULTI_MODEL)


def methods_named(names: list[str]) -> list[str]:
    """The methods of a flag, checked."""
    if names == ["none"]:
        return []
    methods = list(METHODS) if names == ["all"] else names
    for method in methods:
        base, *added = method.split("+")
        is_known = base in METHODS or _is_share(base)
        if not is_known or (added and base == MULTI_MODEL) or added != [one for one in ADDITIONS if one in added]:
            raise ValueError(
                f"unknown method {method!r}: use any of {', '.join(METHODS)}, share-<number from 0 to 1>, 'all' or "
                f"'none'; to all but {MULTI_MODEL}, +{' and +'.join(ADDITIONS)} may be added, in this order."
            )
    return methods


def base_of(method: str) -> str:
    """A method without what was added to it."""
    return method.split("+")[0]


def has(method: str, addition: str) -> bool:
    """Whether a method has one of the additions."""
    return addition in method.split("+")[1:]


def _is_share(method: str) -> bool:
    number = method.removeprefix(SHARE)
    return method.startswith(SHARE) and number.replace(".", "", 1).isdigit() and 0 <= float(number) <= 1


def own_share(runs: list[Run]) -> tuple[list[Run], int]:
    """This process's part of the unfinished runs, and its number among the processes that accelerate started.

    Afterwards the process is on its own, as if accelerate had started it alone, and sees one GPU at most.
    """
    state = PartialState(cpu=True)
    # All processes divide what the first one found: a run may have been finished since.
    (runs,) = broadcast_object_list([runs])
    index, count = state.process_index, state.num_processes
    # The parts that accelerate makes are contiguous; long runs stand first.
    dealt = [run for first in range(count) for run in runs[first::count]]
    with state.split_between_processes(dealt) as share:
        own = list(share)
    _leave_the_others(state)
    return own, index


def _leave_the_others(state: PartialState) -> None:
    count, local = state.num_processes, state.local_process_index
    state.destroy_process_group()
    PartialState._reset_state()
    if count == 1:
        return
    for name in LAUNCHED:
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]:
        del os.environ[name]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(device) for device in range(count)] if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]


def run_file(folder: Path, run: Run) -> Path:
    """The file that says that a run is finished."""
    return folder / "runs" / f"{run.name}.json"


def wait_for(files: list[Path]) -> None:
    """Waits for the other processes; accelerate ends all if one fails."""
    while not all(file.exists() for file in files):
        time.sleep(SECONDS_BETWEEN_LOOKS)


# Data and models


@dataclass
class TaskData:
    """Tokenised splits.

    Args:
        train, test (`Dataset`): To train and to test on.
        held_out (`Dataset`): A few examples that are neither, for gradient conflict.
        classes (`list[str]`): Names of the classes.
    """

    train: Dataset
    test: Dataset
    held_out: Dataset
    classes: list[str]


def load_task(task: Task, arguments: StudyArguments, tokenizer: Any) -> TaskData:
    """Reads and tokenises a task."""
    splits = task.splits(arguments.max_train_examples, arguments.max_test_examples)

    def encode(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=arguments.max_length)
        return {**encoded, "length": [len(row) for row in encoded["input_ids"]]}

    texts = [name for name in ("text", "text_pair") if name in splits["train"].column_names]
    encoded = splits.map(encode, batched=True, remove_columns=texts, desc=f"Tokenising {task.name}")
    held_out = encoded["validation"].select(range(min(CONFLICT_EXAMPLES, len(encoded["validation"]))))
    return TaskData(encoded["train"], encoded[task.test], held_out, splits["train"].features["label"].names)


class SingleExitMember(nn.Module):
    """A model with one exit in the place of a cascade's stock classifier, for poolings that those do not have."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput:
        outputs = self.model(input_ids, attention_mask, token_type_ids, position_ids)
        return SequenceClassifierOutput(logits=outputs.exit_logits[:, 0])

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


def make_model(run: Run, path: str, exit_layers: list[int], classes: list[str]) -> Any:
    """The encoder with untrained exits, or a cascade of its first layers."""
    set_seed(run.seed)
    labels = label_fields(classes)
    if run.method == MULTI_MODEL:
        return _make_cascade(run.pooling, path, exit_layers, labels)
    return AutoModelForSequenceClassificationWithExits.from_pretrained(
        path,
        exit_layers=exit_layers,
        exit_routing=_first_routing(run.method),
        exit_pooling=run.pooling,
        exit_branch_layers=int(has(run.method, BRANCH)),
        **labels,
    )


def _make_cascade(pooling: str, path: str, depths: list[int], labels: dict[str, Any]) -> Any:
    cascade = CascadeForSequenceClassification.from_backbone(path, depths, **labels)
    if not _is_stock_pooling(pooling, path):
        cascade.members = nn.ModuleList(
            SingleExitMember(
                AutoModelForSequenceClassificationWithExits.from_pretrained(
                    path,
                    num_hidden_layers=depth,
                    exit_layers=[depth],
                    exit_pooling=pooling,
                    exit_routing="joint",
                    **labels,
                )
            )
            for depth in depths
        )
    return cascade


def _is_stock_pooling(pooling: str, path: str) -> bool:
    plain = AutoConfig.from_pretrained(path)
    return supported_architecture(plain.model_type).default_pooling(plain) == pooling


def _first_routing(method: str) -> str | float:
    method = base_of(method)
    if method in SCHEDULES:
        return SCHEDULES[method][0]
    return method if method in ROUTINGS else float(method.removeprefix(SHARE))


def save_model(model: Any, folder: Path) -> None:
    """Saves a checkpoint; the members of a cascade of single exits each in a folder of its own."""
    if isinstance(model, CascadeForSequenceClassification) and isinstance(model.members[0], SingleExitMember):
        with replaced_files(folder, "member-0/config.json") as new:
            for place, member in enumerate(model.members):
                member.save_pretrained(new / f"member-{place}")
    else:
        model.save_pretrained(folder)


def load_model(run: Run, folder: Path, path: str, exit_layers: list[int], classes: list[str]) -> Any:
    """A model that `save_model` saved."""
    settle(folder)
    if run.method != MULTI_MODEL:
        return AutoModelForSequenceClassificationWithExits.from_pretrained(folder)
    if not (folder / "member-0").exists():
        return CascadeForSequenceClassification.from_pretrained(folder)
    cascade = make_model(run, path, exit_layers, classes)
    cascade.members = nn.ModuleList(
        SingleExitMember(AutoModelForSequenceClassificationWithExits.from_pretrained(folder / f"member-{place}"))
        for place in range(len(exit_layers))
    )
    # Every one was trained.
    cascade._exits_are_untrained = False
    return cascade


# The study


class Study:
    """The steps of the study. Each one's result is a file; a step whose file is there is not repeated."""

    def __init__(self, arguments: StudyArguments, training: TrainingArguments, tasks: list[Task]):
        self.arguments = arguments
        self.training = training
        self.tasks = {task.name: task for task in tasks}
        self.folder = Path(arguments.output_dir)
        self.path = encoder_path(arguments.model)
        self._loaded: dict[str, TaskData] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def data(self, task: str) -> TaskData:
        """A task's data, read and tokenised once."""
        if task not in self._loaded:
            self._loaded[task] = load_task(self.tasks[task], self.arguments, self.tokenizer)
        return self._loaded[task]

    def check_settings(self) -> None:
        """Runs of other settings must not be mixed with these; methods, poolings, seeds and tasks may be added."""
        keep_settings(self.folder, self._settings(), growing="tasks")

    def _settings(self) -> dict[str, Any]:
        """What changes a run's result."""
        learning = self.training.to_dict()
        names = ("model", "exit_layers", "max_train_examples", "max_test_examples", "max_length", "conflict_methods")
        tasks = {name: dataclasses.asdict(task) for name, task in self.tasks.items()}
        return {
            **{name: getattr(self.arguments, name) for name in names},
            # Names and checksums of files and folders, not where they lie on this machine.
            "model": identified(self.arguments.model),
            "first_seed": self.arguments.seeds[0],
            **{name: learning[name] for name in LEARNING},
            "tasks": {name: {**task, "source": identified(task["source"])} for name, task in tasks.items()},
        }

    # One run

    def run(self, run: Run) -> None:
        """Trains and evaluates; the run's file is written last."""
        started = time.perf_counter()
        data = self.data(run.task)
        model = make_model(run, self.path, self.arguments.exit_layers, data.classes)
        recorder = self._recorder(run, data)
        trainer = self._trainer(run, model, data, self._callbacks(run, recorder))
        trainer.train()
        trained = time.perf_counter()
        report = self._evaluate(model, data.test)
        is_first_seed = run.seed == self.arguments.seeds[0]
        if is_first_seed:
            save_model(model, self._checkpoint(run))
        seconds = {"training": trained - started, "all": time.perf_counter() - started}
        write_json(self.folder / "seconds" / f"{run.name}.json", seconds)
        content = {
            **dataclasses.asdict(run),
            "classes": data.classes,
            "train_examples": len(data.train),
            "steps": trainer.state.global_step,
            "report": report.to_dict(),
            "gradient_conflict": _records(recorder),
        }
        write_json(run_file(self.folder, run), content)

    def _checkpoint(self, run: Run) -> Path:
        return self.folder / "checkpoints" / run.name

    def _recorder(self, run: Run, data: TaskData) -> GradientConflictRecorder | None:
        if run.method not in self.arguments.conflict_methods or run.seed != self.arguments.seeds[0]:
            return None
        rows = [{name: value for name, value in row.items() if name != "length"} for row in data.held_out]
        return GradientConflictRecorder(dict(DataCollatorWithPadding(self.tokenizer)(rows)), every=CONFLICT_EVERY)

    def _callbacks(self, run: Run, recorder: GradientConflictRecorder | None) -> list[TrainerCallback]:
        base = base_of(run.method)
        schedule = [RoutingSchedule(*SCHEDULES[base])] if base in SCHEDULES else []
        return [*schedule, *([recorder] if recorder is not None else [])]

    def _trainer(
        self, run: Run, model: Any, data: TaskData, callbacks: list[TrainerCallback], **changes: Any
    ) -> ExitsTrainer:
        training = copy.copy(self.training)
        for name, value in {"seed": run.seed, **changes}.items():
            setattr(training, name, value)
        return ExitsTrainer(
            model=model,
            args=training,
            train_dataset=data.train,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            callbacks=callbacks,
            distillation=ExitDistillation() if has(run.method, DISTILLED) else None,
        )

    def _evaluate(self, model: Any, dataset: Dataset) -> ExitReport:
        return evaluate_exits(
            model,
            dataset,
            thresholds=thresholds(model.config.num_labels),
            batch_size=self.training.per_device_eval_batch_size,
            timed_examples=0,
            show_progress=False,
        )

    # After all runs

    def finish(self, runs: list[Run]) -> None:
        """Measures time, and writes results, tables, figures and cards."""
        contents = [json.loads(run_file(self.folder, run).read_text(encoding="utf-8")) for run in runs]
        timing = self.timing(runs)
        summary = summarise(contents)
        settings = {**self._settings(), "seeds": self.arguments.seeds}
        table = results_table(settings, summary, timing)
        # Together, so that no table stands beside numbers of another run.
        with replaced_files(self.folder, "results.json") as new:
            write_json(new / "results.json", {"settings": settings, "summary": summary, "runs": contents})
            (new / "results.md").write_text(table, encoding="utf-8")
            write_figures(summary, contents, timing, new / "figures")
        if self.arguments.cards_dir is not None:
            self.write_cards(runs, Path(self.arguments.cards_dir))
        print(table)

    def timing(self, runs: list[Run]) -> dict[str, Any]:
        """Measured time of some points of the first seed's curves, methods in turn."""
        # Pooling takes next to no time: one of them stands for all.
        pooling = "mean" if any(run.pooling == "mean" for run in runs) else "cls"
        wanted_of = (self.arguments.seeds[0], pooling)
        timed = [
            run for run in runs if run.method in self.arguments.timed_methods and (run.seed, run.pooling) == wanted_of
        ]
        path = self.folder / "timing.json"
        wanted = {"examples": self.arguments.timed_examples, "runs": sorted(run.name for run in timed)}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["wanted"] == wanted:
                return stored
        points: list[dict[str, Any]] = []
        for task in self.tasks if self.arguments.timed_examples else ():
            points += self._timed_points([run for run in timed if run.task == task], self.data(task))
        timing = {
            "wanted": wanted,
            "device": str(self.training.device),
            "threads": torch.get_num_threads(),
            "batch_size": self.training.per_device_eval_batch_size,
            "rounds": TIMED_ROUNDS,
            "points": points,
        }
        write_json(path, timing)
        return timing

    def _timed_points(self, runs: list[Run], data: TaskData) -> list[dict[str, Any]]:
        rows = data.test.select(range(min(self.arguments.timed_examples, len(data.test))))
        examples = list(rows)
        batch_size = self.training.per_device_eval_batch_size
        models, points = {}, []
        for run in runs:
            model = load_model(run, self._checkpoint(run), self.path, self.arguments.exit_layers, data.classes)
            models[run] = model.eval().to(self.training.device)
            report = json.loads(run_file(self.folder, run).read_text(encoding="utf-8"))["report"]
            for threshold in timed_thresholds(report):
                outputs = models[run].predict(examples, batch_size, exit_thresholds=threshold, show_progress=False)
                costs = torch.tensor(model.config.exit_costs)[outputs.exit_index]
                points.append({"run": run, "threshold": threshold, "cost": costs.mean().item(), "seconds": []})
        # Rounds over all points, so that a slow moment of the machine does not fall on one method.
        for _ in tqdm(range(TIMED_ROUNDS), desc=f"Measuring time of {runs[0].task}" if runs else None):
            for point in points:
                start = time.perf_counter()
                models[point["run"]].predict(
                    examples, batch_size, exit_thresholds=point["threshold"], show_progress=False
                )
                point["seconds"].append(time.perf_counter() - start)
        return [{**point, "run": dataclasses.asdict(point["run"])} for point in points]

    def write_cards(self, runs: list[Run], folder: Path) -> None:
        """A card for the first seed's models; every number on it is of the run's file."""
        for run in runs:
            if run.method not in methods_named(self.arguments.card_methods) or run.seed != self.arguments.seeds[0]:
                continue
            content = json.loads(run_file(self.folder, run).read_text(encoding="utf-8"))
            report = ExitReport.from_dict(content["report"])
            own = folder / f"{run.task}-{run.method}" / ("" if run.pooling == "mean" else run.pooling)
            model = load_model(run, self._checkpoint(run), self.path, self.arguments.exit_layers, content["classes"])
            card = model_card(
                model,
                report,
                repo_id=f"{run.task}-{run.method}",
                base_model=self.arguments.model,
                dataset_name=run.task,
                training=self._reproduction(run, content),
            )
            with replaced_files(own, "README.md") as new:
                write_model_card(card, new)
                report.plot(new / "exits.png")

    def _reproduction(self, run: Run, content: dict[str, Any]) -> dict[str, Any]:
        settings = self._settings()
        learning = {name: settings[name] for name in LEARNING if settings[name] is not None}
        return {**learning, "seed": run.seed, "training examples": content["train_examples"]}

    # Before any run

    def estimate(self, runs: list[Run]) -> None:
        """Trains and evaluates a little of every method, and prints what all runs would take."""
        seconds = 0.0
        first_seed = [run for run in runs if run.seed == self.arguments.seeds[0]]
        for run in tqdm(first_seed, desc="Measuring methods"):
            seconds += self._seconds_of(run)
        hours = seconds * len(self.arguments.seeds) / 3600
        print(
            f"{len(runs)} runs, {hours:.2f} hours on one process (device {self.training.device}), "
            f"{hours / 2:.2f} on two, {hours / 8:.2f} on eight, if each has a device or core of its own."
        )

    def _seconds_of(self, run: Run) -> float:
        data = self.data(run.task)
        started = time.perf_counter()
        model = make_model(run, self.path, self.arguments.exit_layers, data.classes)
        loading = time.perf_counter() - started
        self._trainer(run, model, data, [], max_steps=2).train()
        trainer = self._trainer(run, model, data, [], max_steps=ESTIMATE_STEPS)
        step = trainer.train().metrics["train_runtime"] / ESTIMATE_STEPS
        few = data.test.select(range(min(64, len(data.test))))
        started = time.perf_counter()
        self._evaluate(model, few)
        evaluating = (time.perf_counter() - started) * len(data.test) / len(few)
        return loading + step * self._steps(len(data.train)) + evaluating

    def _steps(self, examples: int) -> int:
        if self.training.max_steps > 0:
            return self.training.max_steps
        rows = self.training.train_batch_size * self.training.gradient_accumulation_steps
        return int(-(-examples // rows) * self.training.num_train_epochs)


def thresholds(num_labels: int) -> list[float]:
    """Of confidence: from the least possible value up, ever denser towards 1, where trained models' values lie."""
    least = 1 / num_labels
    return [1 - (1 - least) * 10 ** (-4 * place / (THRESHOLDS - 1)) for place in range(THRESHOLDS)]


def timed_thresholds(report: dict[str, Any]) -> list[float | None]:
    """Thresholds whose costs are about equally far apart; the last entry, None for every exit, runs everything."""
    curve = report["curve"]
    cheapest, dearest = curve[0]["cost"], report["costs"][-1]
    wanted = [cheapest + (dearest - cheapest) * place / (TIMED_POINTS - 1) for place in range(TIMED_POINTS - 1)]
    nearest = [min(curve, key=lambda point: abs(point["cost"] - cost))["threshold"] for cost in wanted]
    return [*dict.fromkeys(nearest), [None] * (len(report["costs"]) - 1)]


def _records(recorder: GradientConflictRecorder | None) -> list[dict[str, Any]] | None:
    if recorder is None:
        return None
    return [{"step": step, **conflict.to_dict()} for step, conflict in recorder.records.items()]


if __name__ == "__main__":
    main()
