"""Does a kill ever leave a checkpoint that is neither the old nor the new one? Saves are killed at random moments.

    python examples/benchmarks/kill_saves.py
    python examples/benchmarks/kill_saves.py --kills 200 --seed 1

A process saves two small models in turn over one folder, one in shards, one in a single file, with other exits and
other weights, and is killed (SIGKILL) after a random time. Then the folder is loaded, in turn by the package and by
the code that lies in it, as a machine without the package does (`trust_remote_code=True`): the configuration and every
weight must be those of one of the two. Every second time the next process finds the folder as the kill left it, so
that a save, not a load, has to put it in order. Moves of files take 10 ms each here, as on a slow disk: on a fast one
hardly a kill would fall between two of them. No network; a few minutes on one core; needs `os.fork` (Linux, macOS).
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import BertConfig, HfArgumentParser
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_adaptive import AutoModelForSequenceClassificationWithExits, BertWithExitsConfig

# How long a process may save before it is killed, in pairs of saves.
LONGEST = 1.5
SECONDS_PER_MOVE = 0.01


@dataclass
class KillArguments:
    """How many kills."""

    kills: int = field(default=200, metadata={"help": "Processes that are killed."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})


def main() -> None:
    (arguments,) = HfArgumentParser(KillArguments, description=__doc__).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    move = os.replace
    os.replace = lambda *places: (time.sleep(SECONDS_PER_MOVE), move(*places))[1]
    moments = random.Random(arguments.seed)
    old, new = _model([1, 2, 4], seed=1), _model([1, 3, 4], seed=2)
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        longest = LONGEST * seconds_of_two_saves(folder, old, new)
        for kill in tqdm(range(arguments.kills), desc="kills"):
            save_until_killed(folder, old, new, moments.uniform(0, longest))
            seen["killed in a switch"] += any(folder.glob(".incomplete-*/journal.json"))
            seen["killed in a save"] += any(folder.glob(".incomplete-*"))
            if kill % 2:
                seen[what_is_there(folder, old, new, with_package=kill % 4 == 1)] += 1
    print(", ".join(f"{name}: {count}" for name, count in sorted(seen.items())))
    bad = {name: seen[name] for name in ("mixed", "lost")}
    print(f"{arguments.kills} kills: {bad['mixed']} mixed, {bad['lost']} lost")
    raise SystemExit(any(bad.values()))


def _model(exit_layers: list[int], seed: int) -> Any:
    torch.manual_seed(seed)
    plain = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    )
    config = BertWithExitsConfig.from_plain(plain, exit_layers=exit_layers, exit_thresholds=[seed / 4] * 2)
    return AutoModelForSequenceClassificationWithExits.from_config(config).eval()


def seconds_of_two_saves(folder: Path, old: Any, new: Any) -> float:
    """The better of two tries, on this machine as busy as it is."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        save_both(folder, old, new)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def save_both(folder: Path, old: Any, new: Any) -> None:
    new.save_pretrained(folder)
    old.save_pretrained(folder, max_shard_size="40KB")


def save_until_killed(folder: Path, old: Any, new: Any, seconds: float) -> None:
    """Starts a process that saves in turn, and kills it after so many seconds."""
    process = os.fork()
    if process == 0:
        try:
            while True:
                save_both(folder, old, new)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != -signal.SIGKILL:
        raise RuntimeError(f"the process that saves ended by itself, with status {status}")


def what_is_there(folder: Path, old: Any, new: Any, with_package: bool) -> str:
    """`old`, `new`, `mixed`, or `lost` where nothing can be loaded."""
    try:
        found = _loaded(folder, with_package)
    except Exception as error:
        _keep(folder, error)
        return "lost"
    for name, model in {"old": old, "new": new}.items():
        if _is_same(found, model):
            return name
    _keep(folder, "neither the old nor the new checkpoint")
    return "mixed"


def _loaded(folder: Path, with_package: bool) -> Any:
    if with_package:
        return AutoModelForSequenceClassificationWithExits.from_pretrained(folder)
    # The steps of `AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`; itself it
    # would use the package, which is there.
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    config = get_class_from_dynamic_module(auto_map["AutoConfig"], folder).from_pretrained(folder)
    model_class = get_class_from_dynamic_module(auto_map["AutoModelForSequenceClassification"], folder)
    return model_class.from_pretrained(folder, config=config)


def _is_same(found: Any, model: Any) -> bool:
    fields = ("exit_layers", "exit_thresholds")
    weights, expected = found.state_dict(), model.state_dict()
    return (
        all(getattr(found.config, name) == getattr(model.config, name) for name in fields)
        and weights.keys() == expected.keys()
        and all(torch.equal(weights[name], expected[name]) for name in expected)
    )


def _keep(folder: Path, reason: object) -> None:
    kept = tempfile.mkdtemp(prefix="killed-save-")
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    print(f"{reason}; a copy of the folder: {kept}")


if __name__ == "__main__":
    main()
