"""Files written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from .modeling.switch import replaced_files


def write_whole(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls `write` with the path of a draft beside `path`, and moves the draft there when it is done.

    The draft has the same name, for writers that choose the kind of file by its ending. Files that belong together
    are written with `replaced_files`.

    Args:
        path (`str` or `os.PathLike`): Where the file is to be; its folder is made if it does not exist.
        write (`Callable[[str], object]`): Writes the draft.

    Raises:
        OSError: The folder cannot be written; the file is then as it was.
    """
    target = Path(path)
    with replaced_files(target.parent, target.name) as new:
        write(str(new / target.name))
