"""What is written durably is on the disk, and there under its name, before anybody is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from choral.durable import remove_leftovers, write_durably


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made durable, and what is renamed, in order."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        done.append(f"{self.name} becomes {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return done


def test_first_the_bytes_then_the_name_then_the_folder(tmp_path: Path, steps: list[str]) -> None:
    write_durably(tmp_path / "model", b"some", memoryview(b" bytes"))
    assert (tmp_path / "model").read_bytes() == b"some bytes"
    assert steps == ["fsync .model.aside", ".model.aside becomes model", f"fsync {tmp_path.name}"]


def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "model", b"old")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "model", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model": b"old"}


def test_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".model.aside").write_bytes(b"half")
    (tmp_path / "model").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
