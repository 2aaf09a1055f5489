"""A run that is stopped while it saves a checkpoint goes on from the last whole one."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerState

from hf_adaptive import ExitsTrainer
from tests import tiny
from tests.training.test_trainer import Rows, trainer

LAST_STEP = 2


class Killed(BaseException):
    """As after a kill, nobody catches it."""


class StopsWhileSaving(TrainerCallback):
    """Stops a run at one write of its last checkpoint, when half of the file is there.

    Args:
        monkeypatch: Puts itself around everything that writes a part of a checkpoint.
        at (`int`): At which write, from 1.
    """

    def __init__(self, monkeypatch, at):
        self.at, self.writes, self.is_saving = at, 0, False
        monkeypatch.setattr(torch, "save", self._halved(torch.save))
        monkeypatch.setattr(TrainerState, "save_to_json", self._halved(TrainerState.save_to_json))
        # The model's files are written whole or not at all by themselves.
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", self._stopped(PreTrainedModel.save_pretrained))

    def on_step_end(self, args, state, control, **kwargs):
        self.is_saving = state.global_step == LAST_STEP

    def _is_here(self):
        self.writes += self.is_saving
        return self.is_saving and self.writes == self.at

    def _halved(self, write):
        def halved(content, path, *args, **kwargs):
            is_here = self._is_here()
            write(content, path, *args, **kwargs)
            if is_here:
                os.truncate(path, os.path.getsize(path) // 2)
                raise Killed

        return halved

    def _stopped(self, write):
        def stopped(*args, **kwargs):
            if self._is_here():
                raise Killed
            return write(*args, **kwargs)

        return stopped


class CountsSteps(TrainerCallback):
    """How many steps a run did itself."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def run(folder, *callbacks, resume=None, learning_rate=1e-3):
    """A checkpoint after every step, with dropout; the trained weights."""
    arguments = {"max_steps": LAST_STEP, "save_strategy": "steps", "save_steps": 1, "learning_rate": learning_rate}
    own = trainer(tiny.model(), folder, Rows(), callbacks, kind=ExitsTrainer, **arguments)
    own.eval_dataset = None
    with pytest.MonkeyPatch.context() as patch:
        for kind in (type(own.model), type(own.model.config)):
            patch.setattr(kind, "_auto_class", None)  # without the code, which takes most of the time of a save
        own.train(resume_from_checkpoint=resume)
    return own.model.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """After a run that nothing stopped."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def another_run(tmp_path_factory):
    """Checkpoints of a run with other weights, which a new one writes over."""
    folder = tmp_path_factory.mktemp("another")
    run(folder, learning_rate=1e-2)
    return folder


def checkpoint(folder, step):
    return Path(folder, f"checkpoint-{step}")


def test_a_run_stopped_at_any_write_of_a_checkpoint(weights, another_run, tmp_path, monkeypatch):
    """Harder than in an empty folder: what is not written yet is there, of another run."""
    resumed_after = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        shutil.copytree(another_run, folder)
        with monkeypatch.context() as patch:
            stops = StopsWhileSaving(patch, at)
            try:
                run(folder, stops)
            except Killed:
                pass
            else:
                break
        counted = CountsSteps()
        resumed = run(folder, counted, resume=True)
        assert all(torch.equal(resumed[key], tensor) for key, tensor in weights.items()), at
        resumed_after.append(LAST_STEP - counted.steps)
    # Model, arguments, optimiser, scheduler, random numbers and state.
    assert resumed_after == [1] * 6


def test_what_was_broken_off_is_warned_of_and_refused_by_name(tmp_path, warnings_given):
    run(tmp_path)
    (checkpoint(tmp_path, 2) / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2' has no trainer_state.json that can be read"):
        run(tmp_path, resume=str(checkpoint(tmp_path, 2)))
    run(tmp_path, resume=True)
    (warning,) = [text for text in warnings_given() if "not written to its end" in text]
    assert "checkpoint-2" in warning
    assert "goes on from checkpoint-1" in warning


def test_no_whole_checkpoint_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True needs a whole checkpoint .* no checkpoint"):
        run(tmp_path, resume=True)
    checkpoint(tmp_path, 2).mkdir()
    with pytest.raises(ValueError, match=r"only checkpoint-2, not written to its end"):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint must be a folder"):
        run(tmp_path, resume=3)
