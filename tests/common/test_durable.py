"""What is written durably is on the disk, and there under its name, before anybody is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from choral.durable import Steadily, make_folder_durably, remove_leftovers, write_durably


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


@pytest.mark.parametrize("size", [0, 1000, 100 << 20], ids=["none", "little", "much"])
def test_a_file_that_goes_to_the_disk_steadily_has_all_its_bytes_there_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    synced = list[int]()
    really = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), really(descriptor)))
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with Steadily(tmp_path / "file") as file:
        middle = size // 2
        file.write(memoryview(content)[middle:], middle)
        file.write(memoryview(content)[:middle], 0)
    assert (tmp_path / "file").read_bytes() == content
    assert synced[-1] == size
    assert (len(synced) > 1) is (size > 32 << 20)  # what is large is begun before the end


def test_what_the_disk_refused_meanwhile_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells it once: the last call would find nothing wrong."""
    answers: list[OSError | None] = [OSError(5, "Input/output error")]

    def sync(_descriptor: int) -> None:
        if answers:
            raise answers.pop()  # type: ignore[misc]

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="Input/output"), Steadily(tmp_path / "file") as file:
        file.write(bytes(33 << 20), 0)


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder_durably(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
