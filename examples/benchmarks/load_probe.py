"""Times one load as a machine without this package does it, alone in its process, which `loading.py` starts.

    python load_probe.py CHECKPOINT [--trust_remote_code]

Prints the seconds of `from_pretrained`, imports done before.
"""

import importlib.abc
import sys
import time


class NotInstalled(importlib.abc.MetaPathFinder):
    """Hides the package, which is installed where the benchmark runs."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_adaptive":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())

import torch  # noqa: E402, F401
from transformers import AutoModelForSequenceClassification  # noqa: E402


def main() -> None:
    """Loads once."""
    checkpoint, trust = sys.argv[1], "--trust_remote_code" in sys.argv[2:]
    start = time.perf_counter()
    AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=trust)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
