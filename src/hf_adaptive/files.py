"""Files written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls `write` with the path of a draft beside `path`, and moves the draft there when it is done.

    The draft has the same ending, for writers that choose the kind of file by it.

    Args:
        path (`str` or `os.PathLike`): Where the file is to be; its folder is made if it does not exist.
        write (`Callable[[str], object]`): Writes the draft.

    Raises:
        OSError: The folder cannot be written; the file is then as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".incomplete-") as folder:
        draft = os.path.join(folder, target.name)
        write(draft)
        os.replace(draft, target)
