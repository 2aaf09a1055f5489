"""Checkpoints of a run that were written to their end.

`Trainer` writes a checkpoint file by file: the model, the optimiser, the scheduler, the random numbers, and last the
state of training. So a folder with a state that can be read is whole, as long as nobody begins to write over it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_whole(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end.

    Args:
        checkpoint (`str` or `os.PathLike`): Its folder.
    """
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # there is none, or it breaks off
        return False
    return True


def begin_writing(checkpoint: str | os.PathLike[str]) -> None:
    """Makes a checkpoint that will be written over count as broken off until it is whole again."""
    Path(checkpoint, TRAINER_STATE_NAME).unlink(missing_ok=True)


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str:
    """The checkpoint of a run to go on from; later ones that were broken off are warned of.

    Args:
        folder (`str` or `os.PathLike`): The run's output folder.

    Raises:
        ValueError: There is no checkpoint, or none is whole.
    """
    broken_off: list[str] = []
    for checkpoint in _latest_first(Path(folder)):
        if is_whole(checkpoint):
            if broken_off:
                logger.warning(
                    f"{', '.join(broken_off)} in {folder} was not written to its end: training goes on from "
                    f"{checkpoint.name}, the last whole checkpoint."
                )
            return str(checkpoint)
        broken_off.append(checkpoint.name)
    found = f"only {', '.join(broken_off)}, not written to its end" if broken_off else "no checkpoint at all"
    raise ValueError(
        f"resume_from_checkpoint=True needs a whole checkpoint in {folder}, which has {found}. Leave it out to train "
        "from the start, or name a checkpoint elsewhere."
    )


def check_whole(checkpoint: Any) -> None:
    """Raises `ValueError` for a checkpoint that was broken off, or that is none."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise ValueError(
            f"resume_from_checkpoint must be a folder, or True for the last whole checkpoint, got {checkpoint!r}."
        )
    if not is_whole(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} has no {TRAINER_STATE_NAME} that can be read, which is "
            "written last: this is no checkpoint, or a save of it was broken off. Name another, or give "
            "resume_from_checkpoint=True for the last whole one of the output folder."
        )


def _latest_first(folder: Path) -> list[Path]:
    numbered = [(_NUMBERED.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    checkpoints = [(int(match[1]), path) for match, path in numbered if match is not None and path.is_dir()]
    return [path for _, path in sorted(checkpoints, reverse=True)]
