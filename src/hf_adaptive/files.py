"""Files written whole or not at all, and what of their names is anybody's business."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from .modeling.switch import replaced_files


def write_whole(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
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


def public_name(name: str) -> str:
    """A Hub name as it is; of a folder or file the last part, because where it lies tells of nothing but a machine."""
    path = Path(name)
    is_local = path.exists() or path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    return path.name if is_local else name


def identified(name: str) -> str:
    """The public name, and of a file or folder a checksum of what is in it: another one may have the same name."""
    path = Path(name)
    if not path.exists():
        return public_name(name)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"{path.name} (sha256 {digest.hexdigest()[:16]})"
