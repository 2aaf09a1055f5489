"""What two processes do together, for `accelerate launch`, which starts this in both.

    accelerate launch --multi_gpu --num_processes 2 two_processes.py FOLDER

(`--multi_gpu` starts the processes; the arguments of `Trainer` keep them on the CPU.) First they train, then they
predict; what they found is in the folder. They are started once, because their imports take longest.
"""

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState

from tests.modeling.predicting_processes import predict_in_processes
from tests.training.two_processes import train_in_processes

if __name__ == "__main__":
    # Two processes on few cores.
    torch.set_num_threads(1)
    # As in conftest.py.
    gc.freeze()
    folder = Path(sys.argv[1])
    train_in_processes(json.loads((folder / "runs.json").read_text()), folder)
    predict_in_processes(folder)
    PartialState().destroy_process_group()
