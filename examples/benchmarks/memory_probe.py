"""Measures the peak memory of a training step, alone in its process, which `training.py` starts.

    python memory_probe.py '{"encoder": …, "fields": {…}, "device": "cpu", "rows": 32, "length": 128}'

Prints JSON: `whole`, kB by which forward and backward raise the peak over what was there before (gradients
included), and `activations`, kB a token: how much the peak grows from half the rows to all of them. Gradients,
which do not depend on the rows, are in both and cancel out.
"""

import json
import re
import sys
from pathlib import Path

import torch

from hf_adaptive import AutoModelForSequenceClassificationWithExits


class ProcessMemory:
    """Of this process, as Linux counts it."""

    def start(self) -> None:
        """The peak counts from now on."""
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def rise(self) -> float:
        """kB (1000 bytes) from the start to the peak."""
        return (self._read("VmHWM") - self._before) / 1000

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None, "every Linux process has it"
        return int(found[1]) * 1024


class AllocatorMemory:
    """Of the GPU, as torch's allocator counts it."""

    def start(self) -> None:
        """The peak counts from now on."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def rise(self) -> float:
        """kB (1000 bytes) from the start to the peak."""
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self._before) / 1000


def main() -> None:
    """Runs the job."""
    job = json.loads(sys.argv[1])
    device = torch.device(job["device"])
    memory = AllocatorMemory() if device.type == "cuda" else ProcessMemory()
    model = AutoModelForSequenceClassificationWithExits.from_pretrained(
        job["encoder"], exit_pooling="mean", **job["fields"]
    )
    model = model.to(device).train()
    rows, length = job["rows"], job["length"]
    # What libraries and the file of the weights need is there after a first, small step.
    peak_of_step(model, 2, length, memory)
    half, whole = peak_of_step(model, rows // 2, length, memory), peak_of_step(model, rows, length, memory)
    activations = (whole - half) / ((rows - rows // 2) * length)
    print(json.dumps({"whole": whole, "activations": activations}))


def peak_of_step(model, rows: int, length: int, memory: ProcessMemory | AllocatorMemory) -> float:
    """kB by which forward and backward raise the peak, without gradients before."""
    model.zero_grad()
    shape = (rows, length)
    input_ids = torch.randint(10, model.config.vocab_size, shape, device=model.device)
    labels = torch.zeros(rows, dtype=torch.long, device=model.device)
    memory.start()
    model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels).loss.backward()
    return memory.rise()


if __name__ == "__main__":
    main()
