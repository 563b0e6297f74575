from __future__ import annotations

import re
from pathlib import Path

import pytest
from choral.heads import Head, from_line, signed_part, to_line
from choral_client.heads import Heads
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from structlog.testing import capture_logs

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))


def head(sequence: int, content: int = 0, key: Ed25519PrivateKey = KEY) -> Head:
    digest = bytes([content]) * 32
    return Head(sequence, digest, key.sign(signed_part(sequence, digest)), key.public_key().public_bytes_raw())


def lines(folder: Path) -> list[int]:
    return [from_line(line).sequence for line in (folder / "heads.jsonl").read_text().splitlines()]


def test_heads_are_kept_across_a_restart(tmp_path: Path) -> None:
    heads = Heads(tmp_path)
    assert heads.newest is None
    assert heads.take(None) is None
    for sequence in (3, 3, 7):  # an assignment may come with the head of the welcome
        assert heads.take(head(sequence)) is None
    assert Heads(tmp_path).newest == heads.newest == head(7)
    assert lines(tmp_path) == [3, 7]


@pytest.mark.parametrize(
    ("handed", "told"),
    [
        (head(6), "it stands at entry 6 .*, and stood at entry 7 .*: it was cut off or written anew, or restored from a backup"),
        (head(7, 1), "it stands at entry 7 .*, and stood at entry 7 .*: it was cut off or written anew"),
        (head(8, 0, OTHER), "it is signed with key .*, and was with .*: it is another coordinator's or was replaced"),
        (Head(8, bytes(32), bytes(64), head(7).key), "entry 8 has no good signature"),
        (None, "no head is handed out any more, and it stood at entry 7"),
    ],
)
def test_a_history_that_is_not_what_it_was_is_told_and_its_head_not_kept(handed: Head | None, told: str, tmp_path: Path) -> None:
    Heads(tmp_path).take(head(7))
    heads = Heads(tmp_path)
    fault = heads.take(handed)
    assert fault is not None
    assert re.search(told, fault)
    assert heads.newest == head(7)
    assert lines(tmp_path) == [7]


def test_only_the_newest_stay(tmp_path: Path) -> None:
    heads = Heads(tmp_path, kept=3)
    for sequence in range(1, 30):
        heads.take(head(sequence))
        assert len(lines(tmp_path)) <= 6
        assert lines(tmp_path)[-3:] == [n for n in range(sequence - 2, sequence + 1) if n > 0]
    assert Heads(tmp_path).newest == head(29)


def test_what_a_crash_left_half_written_is_passed_over(tmp_path: Path) -> None:
    heads = Heads(tmp_path)
    for sequence in (1, 2):
        heads.take(head(sequence))
    path = tmp_path / "heads.jsonl"
    path.write_text(path.read_text() + to_line(head(3))[:50])
    heads = Heads(tmp_path)
    assert heads.newest == head(2)
    assert heads.take(head(4)) is None
    assert lines(tmp_path) == [1, 2, 4]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "null", "7", '{"sequence": 1}'])
def test_a_line_that_is_no_head_is_passed_over(tmp_path: Path, line: str) -> None:
    (tmp_path / "heads.jsonl").write_text(f"{line}\n{to_line(head(2))}")
    assert Heads(tmp_path).newest == head(2)


def test_a_disk_that_takes_nothing_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "heads.jsonl").mkdir()
    heads = Heads(tmp_path)
    with capture_logs() as logs:
        assert heads.take(head(1)) is None
    assert logs[-1]["event"] == "head of the history not kept"
    assert heads.newest == head(1)
