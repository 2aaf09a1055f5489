"""Several files of a folder replaced in one switch: all of them are new, or all are as they were, also after a kill.

New files are written to a draft inside the folder. What they are to replace gets a second name in the draft, a journal
says what will be done, and the new files are moved to their places, the deciding one last. Whoever opens the folder
after a process that stopped in between undoes the switch, unless the deciding file was moved: then nothing is left to
be done. So the deciding file always tells how it will end.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DRAFT = ".incomplete-"
_NEW, _KEPT, _JOURNAL = "new", "kept", "journal.json"


@contextlib.contextmanager
def replaced_files(
    folder: str | os.PathLike[str], deciding: str, is_stale: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Yields an empty folder for new files, and moves them into `folder` when the block ends without an error.

    What killed processes left in the folder is settled and removed first. One process at a time writes to a folder;
    the others wait (where the file system has locks).

    Args:
        folder (`str` or `os.PathLike`): Where the files are to be; made if it does not exist.
        deciding (`str`): The new file that is moved last. Where there is none of this name, another one is.
        is_stale (`Callable[[str], bool]`): Tells from its name whether an old file has to go where no new one takes
            its place.

    Raises:
        OSError: The folder cannot be written; it is then as it was.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with _alone_in(target) as is_alone:
        for draft in target.glob(f"{DRAFT}*"):
            # Without a lock it may be a living process's; a journal is there for moments only.
            if is_alone or (draft / _JOURNAL).exists():
                _settle(draft)
        draft = Path(tempfile.mkdtemp(dir=target, prefix=DRAFT))
        try:
            (draft / _NEW).mkdir()
            yield draft / _NEW
            _switch(draft, deciding, is_stale)
        finally:
            _settle(draft)


def settle(folder: str | os.PathLike[str]) -> None:
    """Undoes a switch that was interrupted in this folder, if there is one, or ends it where it was decided.

    Raises:
        OSError: The folder cannot be written.
    """
    interrupted = f"{DRAFT}*/{_JOURNAL}"
    if not any(Path(folder).glob(interrupted)):
        return
    with _alone_in(Path(folder)):
        # Those that are left: a living process has ended its own in the meantime.
        for journal in Path(folder).glob(interrupted):
            try:
                _settle(journal.parent)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}; a save into {folder} was interrupted, and cannot be undone. Load it once as "
                    "somebody who may write there; at",
                    error.filename,
                ) from error


def _switch(draft: Path, deciding: str, is_stale: Callable[[str], bool]) -> None:
    folder, new = draft.parent, draft / _NEW
    paths = (path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    names = sorted(paths, key=lambda name: (name == deciding, name))
    if not names:
        return
    stale = [path.name for path in folder.iterdir() if is_stale(path.name) and path.name not in names]
    kept = [name for name in [*names, *stale] if (folder / name).exists()]
    for name in kept:
        _give_second_name(folder / name, draft / _KEPT / name)
    _write_journal(draft, {"new": names, "kept": kept})
    for name in names[:-1]:
        _move(new / name, folder / name)
    for name in stale:
        (folder / name).unlink()
    _move(new / names[-1], folder / names[-1])


def _settle(draft: Path) -> None:
    """Undoes what was begun and not decided; then the draft is removed."""
    journal = draft / _JOURNAL
    if journal.exists():
        plan = json.loads(journal.read_text(encoding="utf-8"))
        if (draft / _NEW / plan["new"][-1]).exists():
            _undo(draft, plan)
        # From here on the draft is but a leftover.
        journal.unlink()
    shutil.rmtree(draft, ignore_errors=True)


def _undo(draft: Path, plan: dict[str, list[str]]) -> None:
    """Can itself be interrupted and begun again."""
    for name in plan["kept"]:
        if (draft / _KEPT / name).exists():
            os.replace(draft / _KEPT / name, draft.parent / name)
    for name in set(plan["new"]).difference(plan["kept"]):
        (draft.parent / name).unlink(missing_ok=True)


def _write_journal(draft: Path, plan: dict[str, list[str]]) -> None:
    begun = draft / f"{_JOURNAL}.begun"
    begun.write_text(json.dumps(plan), encoding="utf-8")
    os.replace(begun, draft / _JOURNAL)


def _give_second_name(file: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, name)
    except OSError:  # a file system without links
        shutil.copy2(file, name)


def _move(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, place)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Waits until no other process writes to this folder; False where the file system cannot tell.

    The lock is on the folder itself: no file of it can be left, and it ends with the process that holds it.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile holds the handle, too
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
