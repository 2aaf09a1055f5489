"""The row on loading with remote code beside a plain load."""

import os
import subprocess
import sys
from pathlib import Path

from measuring import medians, ratio
from results import Result, Target
from tqdm.auto import tqdm
from workload import Workload

PROBE = Path(__file__).parent / "load_probe.py"


def remote_code_load(workload: Workload) -> list[Result]:
    """Both in turn, each in a fresh process where the package is hidden; only `from_pretrained` is timed."""
    checkpoints = {"remote code": str(workload.exits_checkpoint), "plain": str(workload.plain_checkpoint)}
    # Loads the files into the system's cache, and the code into that of transformers.
    for name, checkpoint in checkpoints.items():
        _seconds(workload, checkpoint, trust=name == "remote code")
    seconds: dict[str, list[float]] = {name: [] for name in checkpoints}
    rounds = [name for _ in range(workload.size.repeats) for name in checkpoints]
    for name in tqdm(rounds, desc="remote-code load"):
        seconds[name].append(_seconds(workload, checkpoints[name], trust=name == "remote code"))
    return [
        Result(
            "remote_code_load",
            "remote-code load, package hidden",
            "time / plain load",
            Target(1.3),
            ratio(seconds["remote code"], seconds["plain"]),
            medians(seconds),
        )
    ]


def _seconds(workload: Workload, checkpoint: str, trust: bool) -> float:
    modules = str((workload.folder / "modules").resolve())
    command = [sys.executable, str(PROBE), checkpoint, *(["--trust_remote_code"] if trust else [])]
    environment = {**os.environ, "HF_MODULES_CACHE": modules}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
