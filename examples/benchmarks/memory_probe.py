"""Measures peak memory alone in its process: of a training step (`training.py` starts it), or of a forward with
constant heads or without (`attention.py`).

    python memory_probe.py '{"encoder": …, "fields": {…}, "device": "cpu", "rows": 32, "length": 128}'
    python memory_probe.py '{"of": "forward", "encoder": …, "choice": "all heads", "device": "cpu", …}'

Prints JSON: `whole`, kB by which forward and backward raise the peak over what was there before (gradients
included), and for training `activations`, kB a token: how much the peak grows from half the rows to all of them.
Gradients, which do not depend on the rows, are in both and cancel out.
"""

import json
import re
import sys
from pathlib import Path

import attention
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
    measure = forward_peak if job.get("of") == "forward" else training_peaks
    print(json.dumps(measure(job, device, memory)))


def training_peaks(job: dict, device: torch.device, memory: ProcessMemory | AllocatorMemory) -> dict[str, float]:
    """Of a step of a classifier with exits."""
    model = AutoModelForSequenceClassificationWithExits.from_pretrained(
        job["encoder"], exit_pooling="mean", **job["fields"]
    )
    model = model.to(device).train()
    rows, length = job["rows"], job["length"]
    # What libraries and the file of the weights need is there after a first, small step.
    peak_of_step(model, 2, length, memory)
    half, whole = peak_of_step(model, rows // 2, length, memory), peak_of_step(model, rows, length, memory)
    return {"whole": whole, "activations": (whole - half) / ((rows - rows // 2) * length)}


@torch.inference_mode()
def forward_peak(job: dict, device: torch.device, memory: ProcessMemory | AllocatorMemory) -> dict[str, float]:
    """Of layers with constant heads or without, on rows of mixed lengths."""
    config = attention.layers_config(job["encoder"])
    model = attention.backbone(config, attention.choices(config)[job["choice"]], job["length"]).to(device)
    batch = attention.mixed_lengths(job["rows"], job["length"], config.vocab_size)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    model(**{name: tensor[:2] for name, tensor in batch.items()})
    memory.start()
    model(**batch)
    return {"whole": memory.rise()}


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
