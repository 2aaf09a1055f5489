"""Files that belong together are all new or all old, at whatever call to the system a process stops."""

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest

from hf_adaptive.files import write_whole
from hf_adaptive.modeling import switch
from hf_adaptive.modeling.switch import replaced_files, settle

OLD = {"config.json": "old", "weights-1": "old", "weights-2": "old", "figures/plot": "old", "README.md": "mine"}
NEW = {"config.json": "new", "weights": "new", "code.py": "new", "figures/plot": "new", "figures/curve": "new"}
# What a folder is changed with.
CALLS = ("replace", "link", "mkdir", "unlink", "rmdir")


def write(folder, files):
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


def save(folder, files=NEW):
    with replaced_files(folder, "config.json", lambda name: name.startswith("weights")) as new:
        write(new, files)


class Stops:
    """Counts the calls that change files, and fails from the `first` one on, `times` times."""

    def __init__(self, monkeypatch, error, first, times=None):
        self.error, self.first, self.times, self.calls = error, first, times, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call):
        def counted(*args, **kwargs):
            self.calls += 1
            if self.calls >= self.first and (self.times is None or self.calls < self.first + self.times):
                raise self.error
            return call(*args, **kwargs)

        return counted


def stopped(act, folder, monkeypatch, call, error=KeyboardInterrupt, times=None):
    """As after a kill, nothing works from this call on: neither undoing nor cleaning."""
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, OSError):
        Stops(patch, error, call, times)
        act(folder)


def number_of_calls(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stops = Stops(patch, None, first=10**6)
        save(folder)
    return stops.calls


@pytest.fixture(params=["shards", "nothing"])
def before(request):
    return OLD if request.param == "shards" else {}


def interruptions(tmp_path, before, monkeypatch):
    """A folder with the older files for every call of a save."""
    write(tmp_path / "whole", before)
    for call in range(1, number_of_calls(tmp_path / "whole", monkeypatch) + 1):
        folder = tmp_path / str(call)
        folder.mkdir()
        write(folder, before)
        yield call, folder


def after(before):
    """What a whole save leaves."""
    return {**NEW, "README.md": "mine"} if before else NEW


def without_drafts(folder):
    return {name: text for name, text in content(folder).items() if not name.startswith(switch.DRAFT)}


def test_load_after_a_process_that_stopped_at_any_call(tmp_path, before, monkeypatch):
    seen = []
    for call, folder in interruptions(tmp_path, before, monkeypatch):
        stopped(save, folder, monkeypatch, call)
        settle(folder)
        seen.append(without_drafts(folder))
    assert all(files in (before, after(before)) for files in seen)
    assert before in seen
    assert after(before) in seen


def test_save_after_a_process_that_stopped_at_any_call(tmp_path, before, monkeypatch):
    for call, folder in interruptions(tmp_path, before, monkeypatch):
        stopped(save, folder, monkeypatch, call)
        with replaced_files(folder, "table.md") as new:
            assert without_drafts(folder) in (before, after(before))
            assert list(folder.glob(f"{switch.DRAFT}*")) == [new.parent]
            write(new, {"table.md": "newest"})
        assert content(folder) in ({**before, "table.md": "newest"}, {**after(before), "table.md": "newest"})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_save_of_which_any_call_fails_once(tmp_path, before, monkeypatch, error):
    for call, folder in interruptions(tmp_path, before, monkeypatch):
        stopped(save, folder, monkeypatch, call, error, times=1)
        assert without_drafts(folder) in (before, after(before))


def test_undoing_can_be_interrupted_at_any_call(tmp_path, monkeypatch):
    decided = number_of_calls_until_decided(tmp_path / "whole", monkeypatch)
    for call in range(1, 20):
        folder = tmp_path / str(call)
        write(folder, OLD)
        stopped(save, folder, monkeypatch, decided)
        assert without_drafts(folder) != OLD
        stopped(settle, folder, monkeypatch, call)
        settle(folder)
        assert without_drafts(folder) == OLD


def number_of_calls_until_decided(folder, monkeypatch):
    """At which call the last move, that of the deciding file, is made."""
    write(folder, OLD)
    calls = []
    with monkeypatch.context() as patch:
        stops = Stops(patch, None, first=10**6)
        counted = os.replace
        patch.setattr(os, "replace", lambda *places: calls.append(stops.calls + 1) or counted(*places))
        save(folder)
    return calls[-1]


def test_what_cannot_be_linked_is_copied(tmp_path, monkeypatch):
    folder = tmp_path / "folder"

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(folder, OLD)
    stopped(save, folder, monkeypatch, number_of_calls_until_decided(tmp_path / "whole", monkeypatch))
    assert without_drafts(folder) != OLD
    settle(folder)
    assert content(folder) == OLD


def test_writer_waits_for_another_and_leaves_its_draft(tmp_path):
    write(tmp_path, OLD)
    waiting = threading.Thread(target=save, args=(tmp_path, {**NEW, "config.json": "newest"}))
    with replaced_files(tmp_path, "config.json") as new:
        waiting.start()
        write(new, NEW)
        waiting.join(0.2)
        assert waiting.is_alive()
        assert new.exists()
    waiting.join()
    assert content(tmp_path) == {**after(OLD), "config.json": "newest"}


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    leftover = tmp_path / f"{switch.DRAFT}abc" / "new"
    leftover.mkdir(parents=True)
    (leftover / "weights").write_text("half")
    write_whole(tmp_path / "table.md", lambda draft: Path(draft).write_text("whole"))
    assert content(tmp_path) == {"table.md": "whole"}


def test_interrupted_switch_in_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    write(folder, OLD)
    stopped(save, folder, monkeypatch, number_of_calls_until_decided(tmp_path / "whole", monkeypatch))
    with monkeypatch.context() as patch:
        Stops(patch, PermissionError(errno.EACCES, "Permission denied"), 1)
        with pytest.raises(OSError, match="interrupted") as error:
            settle(folder)
    assert str(folder) in str(error.value)
    settle(folder)


def test_folder_that_is_not_there_has_nothing_to_settle(tmp_path):
    settle(tmp_path / "google-bert" / "bert-base-uncased")
