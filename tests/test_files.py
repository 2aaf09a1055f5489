"""Single files, and names that tell nothing of the machine they come from."""

from pathlib import Path

import pytest

from hf_adaptive.files import identified, public_name, write_whole


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "table.md"

    def fail(draft):
        Path(draft).write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_whole(path, fail)
    assert not list(path.parent.iterdir())
    write_whole(path, lambda draft: Path(draft).write_text("whole"))
    with pytest.raises(RuntimeError, match="no more"):
        write_whole(path, fail)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_public_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google-bert").mkdir()
    (tmp_path / "google-bert" / "here").mkdir()
    names = {
        "google-bert/bert-base-uncased": "google-bert/bert-base-uncased",
        "google-bert/here": "here",
        "minilm": "minilm",
        str(tmp_path / "model"): "model",
        "/home/me/model": "model",
        "../model": "model",
        "~/model": "model",
        "a/b/c": "c",
        "": "",
    }
    assert {name: public_name(name) for name in names} == names


def test_content_tells_files_of_one_name_apart(tmp_path):
    for folder, content in (("first", "a"), ("second", "b"), ("third", "a")):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "train.csv").write_text(content)
    for name in ("data/train.csv", "data"):
        first, second, third = (identified(str(tmp_path / folder / name)) for folder in ("first", "second", "third"))
        assert first == third != second
        assert first.startswith(f"{Path(name).name} (sha256 ")
        assert str(tmp_path) not in first
    assert identified("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
