from __future__ import annotations

import hashlib
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from choral.errors import Declined
from choral.messages import UploadHeader
from choral.metrics import Metric
from choral.plan import Kind
from choral_client.outbox import KEPT, Outbox, Parcel
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

PAYLOAD = bytes(range(256)) * 5


def parcel(assignment: str = "run/0/alice", payload: bytes = PAYLOAD) -> Parcel:
    held_out, work = (Metric("loss", 0.1, 3),), (Metric("train_loss", 1e300, 7), Metric("train_s", 0.25, 7))
    digest = hashlib.sha256(payload).digest()
    return Parcel(UploadHeader(assignment, "alice", 7, Kind.TRAINING, len(payload), held_out, work, digest), 3)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def files(outbox: Outbox) -> list[Path]:
    return sorted(outbox._folder.iterdir())


def found(outbox: Outbox, assignment: str) -> tuple[Parcel, bytes] | None:
    loaded = outbox.load(assignment)
    return None if loaded is None else (loaded[0], loaded[1][:])


@pytest.mark.parametrize("payload", [b"", b"x", PAYLOAD])
@pytest.mark.parametrize("kind", Kind)
def test_a_result_outlives_the_process(outbox: Outbox, payload: bytes, kind: Kind) -> None:
    kept = parcel(payload=payload)
    kept = replace(kept, header=replace(kept.header, kind=kind))
    outbox.save(kept, [payload])
    another = Outbox(outbox._folder)
    assert "run/0/alice" in another
    assert another.assignments() == ["run/0/alice"]
    assert found(another, "run/0/alice") == (kept, payload)


def test_measurements_that_are_no_numbers_are_kept(outbox: Outbox) -> None:
    kept = parcel()
    outbox.save(replace(kept, header=replace(kept.header, work=(Metric("train_loss", math.nan, 1),))), [PAYLOAD])
    loaded = outbox.load("run/0/alice")
    assert loaded is not None
    assert math.isnan(loaded[0].header.work[0].value)


def test_nothing_is_here_at_first(outbox: Outbox) -> None:
    assert outbox.assignments() == []
    assert "run/0/alice" not in outbox
    assert outbox.load("run/0/alice") is None
    outbox.remove("run/0/alice")
    assert not outbox._folder.exists()  # a client that never has a result makes no folder for them


def test_what_was_removed_is_gone(outbox: Outbox) -> None:
    outbox.save(parcel(), [PAYLOAD])
    outbox.remove("run/0/alice")
    assert "run/0/alice" not in outbox
    assert files(outbox) == []


@pytest.mark.parametrize("assignment", ["../../etc/passwd", "/", "", ".", "..", "a" * 10_000, "nul\0", "Ärger/😀"])
def test_an_assignment_may_be_called_anything(outbox: Outbox, assignment: str) -> None:
    outbox.save(parcel(assignment), [PAYLOAD])
    assert len(files(outbox)) == 1
    assert outbox.assignments() == [assignment]
    assert found(outbox, assignment) == (parcel(assignment), PAYLOAD)


def test_a_second_result_of_an_assignment_takes_the_place_of_the_first(outbox: Outbox) -> None:
    outbox.save(parcel(), [PAYLOAD])
    outbox.save(parcel(payload=b"other"), [b"other"])
    assert found(outbox, "run/0/alice") == (parcel(payload=b"other"), b"other")


def test_a_result_that_is_being_sent_is_not_touched_by_its_removal(outbox: Outbox) -> None:
    outbox.save(parcel(), [PAYLOAD])
    loaded = outbox.load("run/0/alice")
    assert loaded is not None
    outbox.remove("run/0/alice")
    assert loaded[1][:] == PAYLOAD


def test_only_the_newest_are_kept(outbox: Outbox) -> None:
    with capture_logs() as logs:
        for round in range(KEPT + 2):
            outbox.save(parcel(f"run/{round}/alice"), [PAYLOAD])
            os.utime(outbox._path(f"run/{round}/alice"), ns=(round, round))
    assert outbox.assignments() == [f"run/{round}/alice" for round in range(2, KEPT + 2)]
    assert [entry["kept"] for entry in logs] == [KEPT, KEPT]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"buy milk"),
        (".x.result.aside", b"half of a resu"),  # the client was killed while it wrote
        ("empty.result", b""),
        ("short.result", b"choral-2"),
        ("zeros.result", bytes(5000)),
        ("z" * 64 + ".result", b"[]" + hashlib.sha256(b"[]").digest() + b"\2\0\0\0choral-2"),
    ],
)
def test_what_is_no_result_is_removed(outbox: Outbox, name: str, content: bytes) -> None:
    outbox.save(parcel(), [PAYLOAD])
    (outbox._folder / name).write_bytes(content)
    assert outbox.assignments() == ["run/0/alice"]
    assert files(outbox) == [outbox._path("run/0/alice")]


def test_a_result_under_another_name_is_removed(outbox: Outbox) -> None:
    outbox.save(parcel(), [PAYLOAD])
    with capture_logs() as logs:
        outbox._path("run/0/alice").rename(outbox._path("run/1/alice"))
        assert outbox.assignments() == []
    assert [(entry["event"], entry["reason"]) for entry in logs] == [
        ("a saved result cannot be used", "it is named after another assignment")
    ]


def test_a_folder_among_the_results_is_passed_over(outbox: Outbox) -> None:
    outbox.save(parcel(), [PAYLOAD])
    (outbox._folder / "folder").mkdir()
    (outbox._folder / "folder.result").mkdir()
    assert outbox.assignments() == ["run/0/alice"]
    outbox._path("run/9/alice").mkdir()
    assert outbox.load("run/9/alice") is None


@given(st.data())
def test_a_damaged_byte_anywhere_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder) / "outbox")
        outbox.save(parcel(), [PAYLOAD])
        (path,) = files(outbox)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        assert outbox.load("run/0/alice") is None
        assert files(outbox) == []


@given(st.integers(0, len(PAYLOAD) + 100), st.booleans())
def test_a_truncated_or_longer_file_is_found(size: int, longer: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder) / "outbox")
        outbox.save(parcel(), [PAYLOAD])
        (path,) = files(outbox)
        content = path.read_bytes()
        path.write_bytes(content + bytes(size + 1) if longer else content[:size])
        assert outbox.assignments() == []
        assert files(outbox) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("in the way")
    with pytest.raises(Declined, match=r"the result cannot be kept in .*outbox \(Not a directory\): make room there"):
        Outbox(tmp_path / "outbox").save(parcel(), [PAYLOAD])


def test_a_write_that_fails_leaves_nothing(outbox: Outbox) -> None:
    outbox.save(parcel(), [PAYLOAD])
    outbox._path("run/1/alice").mkdir()  # the rename will fail
    with pytest.raises(Declined, match="the result cannot be kept"):
        outbox.save(parcel("run/1/alice"), [PAYLOAD])
    assert files(outbox) == sorted([outbox._path("run/0/alice"), outbox._path("run/1/alice")])
