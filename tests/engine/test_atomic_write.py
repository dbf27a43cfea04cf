"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import atomic_write
from engine.atomic_write import atomic_file, atomic_folder, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "é")
    assert (tmp_path / "a.json").read_bytes() == "é".encode()
    write_atomically(tmp_path / "a.json", b"\x00\xff")
    assert (tmp_path / "a.json").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.json"]


def test_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with atomic_file(tmp_path / "a") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_temporary_file_is_hidden_in_the_same_folder(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.json") as part:
        assert part == tmp_path / ".a.json.part"
        part.write_text("new")
        assert not (tmp_path / "a.json").exists()
    assert names(tmp_path) == ["a.json"]


def test_temporary_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with atomic_file(tmp_path / "folder" / "a", temporary=tmp_path / "t") as part:
        part.write_text("new")
        assert names(tmp_path / "folder") == []
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["a"]


def test_file_is_flushed_to_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(atomic_write.os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    replace = os.replace
    monkeypatch.setattr(atomic_write.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "a", "12345", fsync=True)
    write_atomically(tmp_path / "b", "12345")
    assert calls == [("fsync", 5), "replace", "replace"]


def test_mode_holds_even_where_a_killed_writer_left_a_readable_file(tmp_path: Path) -> None:
    (tmp_path / ".keys.part").write_text("left by a killed writer")
    write_atomically(tmp_path / "keys", "secret", mode=0o600)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600


def test_folder_replaces_the_old_one_and_what_a_killed_writer_left(tmp_path: Path) -> None:
    for name in ("bundle", ".bundle.part", ".bundle.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    with atomic_folder(tmp_path / "bundle") as part:
        assert names(part) == []
        (part / "new").write_text("new")
        assert names(tmp_path / "bundle") == ["old"]
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == ["new"]


def test_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").write_text("old")

    def fail() -> None:
        with atomic_folder(tmp_path / "bundle") as part:
            (part / "new").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == ["old"]
