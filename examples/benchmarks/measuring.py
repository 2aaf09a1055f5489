"""Seconds of alternatives that run in turn (A B A B …) in one process, their ratio and its spread, and the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

import hf_adaptive

Run = Callable[[], object]
# What is freed goes back to the system at once, so that a process's memory is what is in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and where the middle half of them lies.

    Args:
        median (`float`): The middle.
        lower (`float`): First quartile.
        upper (`float`): Third quartile.
        count (`int`): How many measurements.
    """

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one measurement."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float], factor: float = 1.0) -> Spread:
    """Of measurements that were made beside each other: numerator / (denominator × factor), pair by pair."""
    return Spread.of([above / (below * factor) for above, below in zip(numerators, denominators)])


def measure_in_turn(
    runs: Mapping[str, Run], warm_up: Mapping[str, Run], repeats: int, device: torch.device, title: str
) -> dict[str, list[float]]:
    """Seconds of every run, by its name.

    Args:
        runs (`Mapping[str, Callable]`): Run one after the other, `repeats` times over, so that a change of the
            machine's speed meets all of them.
        warm_up (`Mapping[str, Callable]`): Run first, untimed; the same as `runs`, or less of it.
        repeats (`int`): How often.
        device (`torch.device`): Where they run; waited for before the clock is read.
        title (`str`): Of the progress bar.
    """
    for run in tqdm(warm_up.values(), desc=f"{title}: warm-up", leave=False):
        run()
    rounds = [name for _ in range(repeats) for name in runs]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in tqdm(rounds, desc=title):
        seconds[name].append(seconds_of(runs[name], device))
    return seconds


def seconds_of(run: Run, device: torch.device) -> float:
    """Wall-clock time of one run, until the device has done all that it was given."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Returns when the device has nothing left to do; a CPU never has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The middle of each run's seconds."""
    return {f"{name}, seconds": statistics.median(values) for name, values in seconds.items()}


def measured_alone(script: Path, job: Mapping[str, Any], **environment: str) -> dict[str, float]:
    """What a script prints of a job, as JSON in its last line, in a process of its own.

    Args:
        script (`Path`): What is run.
        job (`Mapping[str, Any]`): Its only argument, as JSON.
        **environment (`str`): Variables that the process is given beside those of `ALLOCATOR`.
    """
    command = [sys.executable, str(script), json.dumps(job)]
    variables = {**os.environ, **ALLOCATOR, **environment}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers hold for."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_adaptive": hf_adaptive.__version__,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # Other kinds of CPU than x86 have no such line.
    return names[0] if names else platform.machine()
