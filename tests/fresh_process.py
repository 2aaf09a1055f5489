"""Starts processes that know nothing of this one's packages, caches and settings."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parent / "without_package.py"
# Goes before a script: what is hidden may be installed for the tests.
_HIDING = """
import importlib.abc, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """This process's environment without the package, and with caches below `home`."""
    ours = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}


def run(
    script: str,
    *arguments: object,
    folder: Path,
    hidden: Collection[str] = ("hf_adaptive",),
    python: str = sys.executable,
    **variables: str,
) -> str:
    """What a script prints that runs where some packages are not installed; it must end without an error.

    Args:
        script: Its source.
        *arguments: It finds them in `sys.argv[1:]`.
        folder: Where it runs, with its caches.
        hidden: Packages that it cannot import.
        python: The interpreter.
        **variables: Further environment variables.
    """
    done = subprocess.run(
        [python, "-c", _HIDING.format(hidden=tuple(hidden)) + script, *map(str, arguments)],
        cwd=folder,
        env=environment(folder / "home", **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def answers_without_package(folder: Path, checkpoints: dict[str, dict], inputs, texts, **variables: str):
    """Answers of checkpoints in a process without the package.

    Args:
        folder: Where files of the job are kept.
        checkpoints: By name: `path` (folder or Hub name), `thresholds`, and `save_to` (a folder or None).
        inputs: Tensors of a batch.
        texts: Sentences for a pipeline; none if what does not depend on the architecture is not asked.
        **variables: Further environment variables.

    Returns:
        By name: what the process found, and the tensors of its answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(inputs, folder / "inputs.safetensors")
    job = {
        "checkpoints": checkpoints,
        "inputs": str(folder / "inputs.safetensors"),
        "texts": texts,
        "out": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    run(SCRIPT.read_text(), folder / "job.json", folder=folder, **variables)
    return {
        name: (json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))
        for name in checkpoints
    }


def put_into_hub_cache(source: Path, home: Path, repository: str) -> None:
    """Lays a checkpoint out as the Hub's client does after a download."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    for made in (snapshot, blobs, root / "refs"):
        made.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = blobs / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
