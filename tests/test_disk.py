"""Whatever is written is whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from quantkit.disk import replacing, write_whole


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_replacing(tmp_path):
    path = tmp_path / "deep" / "note.json"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary != path
        assert temporary.name.startswith("."), "a half file is hidden"
        temporary.write_text("first")
        written = temporary.stat().st_ino
        assert not path.exists()
    assert path.read_text() == "first"
    assert path.stat().st_ino == written, "renamed, not copied: nobody ever meets half of it"

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("seco")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    with replacing(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert files(tmp_path) == ["deep/note.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    write_whole(path, "first")

    def full(self: Path, text: str, **_: str) -> int:
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "second")
    assert path.read_text() == "first"
    assert files(tmp_path) == ["card.md"]


def test_bytes_are_on_the_disk_before_their_name_is(tmp_path, monkeypatch):
    path, done = tmp_path / "card.md", []
    sync, rename = os.fsync, os.replace

    def synced(opened: int) -> None:
        done.append(("on the disk", os.fstat(opened).st_ino))
        sync(opened)

    def renamed(old: Path, new: Path) -> None:
        done.append(("named", os.stat(old).st_ino))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(path, "whole")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert done == [("on the disk", file), ("named", file), ("on the disk", folder)]


def test_two_writers_of_one_file_stand_in_no_ones_way(tmp_path):
    path = tmp_path / "kept"
    with replacing(path, several=True) as temporary:
        temporary.write_text("ours")
        with replacing(path) as other:
            other.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"
    assert files(tmp_path) == ["kept"]
