from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from choral.codecs import BLOCK, Vector, blocks
from choral.errors import Declined
from choral.messages import Verdict
from choral_client.residual import About, Residual

SIZE = BLOCK + 3
ABOUT = About("run", "run/0/alice", SIZE)
VALUES = np.arange(SIZE, dtype=np.float32)


def used(residual: Residual, about: About, values: Vector = VALUES) -> Vector:
    """What was added to the update; `values` is what it leaves out."""
    with residual.feedback(about) as feedback:
        before = np.concatenate(list(feedback.blocks()))
        for block in blocks(values):
            feedback.keep(block)
    return before


def next_of(about: About, **changes: object) -> About:
    return About(**{"scope": about.scope, "assignment": "run/1/alice", "size": about.size} | changes)  # type: ignore[arg-type]


@pytest.fixture
def residual(tmp_path: Path) -> Residual:
    """One with what an accepted update has left out."""
    made = Residual(tmp_path)
    assert not used(made, ABOUT).any()
    made.settle(ABOUT.assignment, Verdict.ACCEPTED)
    return made


@pytest.mark.parametrize("verdict", [Verdict.ACCEPTED, Verdict.DUPLICATE])
def test_what_is_left_out_counts_once_the_update_does(tmp_path: Path, verdict: Verdict) -> None:
    residual = Residual(tmp_path)
    assert not used(residual, ABOUT).any()
    assert not used(residual, ABOUT).any()  # the same work again
    residual.settle("run/7/alice", verdict)
    assert not used(residual, ABOUT).any()
    residual.settle(ABOUT.assignment, verdict)
    residual.settle(ABOUT.assignment, verdict)  # it heard it twice
    assert np.array_equal(used(Residual(tmp_path), next_of(ABOUT)), VALUES)


def test_a_late_update_leaves_it_as_it_was_and_a_refused_one_ends_it(residual: Residual) -> None:
    for verdict in (Verdict.LATE, Verdict.REFUSED):
        assert np.array_equal(used(residual, next_of(ABOUT), 2 * VALUES), VALUES)
        residual.settle("run/1/alice", verdict)
    assert not used(residual, next_of(ABOUT)).any()


def test_work_that_ends_halfway_changes_nothing(residual: Residual, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), residual.feedback(next_of(ABOUT)) as feedback:  # noqa: PT012
        feedback.keep(VALUES[:BLOCK])
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "residual").iterdir()] == ["current"]
    (tmp_path / "residual" / ".pending.aside").write_bytes(b"of a process that was killed")
    assert np.array_equal(used(residual, next_of(ABOUT)), VALUES)
    assert sorted(path.name for path in (tmp_path / "residual").iterdir()) == ["current", "pending"]


def test_an_update_of_which_nothing_is_known_ends_it(residual: Residual) -> None:
    """It may have counted. Rather is something lost than added twice."""
    used(residual, next_of(ABOUT), 2 * VALUES)
    assert not used(residual, next_of(ABOUT, assignment="run/2/alice")).any()


def test_an_update_that_counted_and_is_asked_for_again_ends_it(residual: Residual) -> None:
    """The coordinator has lost it to a power cut, and what it left out is here already."""
    assert not used(residual, ABOUT).any()


@pytest.mark.parametrize("change", [{"scope": "another"}, {"size": SIZE - 1}])
def test_of_another_model_or_run_nothing_is_added(residual: Residual, tmp_path: Path, change: dict[str, object]) -> None:
    about = next_of(ABOUT, **change)
    assert not used(residual, about, VALUES[: about.size]).any()
    assert not (tmp_path / "residual" / "current").exists()


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1], lambda c: c + b"x", lambda c: b"", lambda c: b"x" * 16 + c[16:], _flipped, lambda c: c[:16] + b"\xff" * 4],
)
def test_a_damaged_file_is_given_up(residual: Residual, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "residual" / "current"
    path.write_bytes(damage(path.read_bytes()))
    assert not used(residual, next_of(ABOUT)).any()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(Declined, match="what the update leaves out cannot be kept in"):
        used(Residual(tmp_path), ABOUT)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "residual").write_bytes(b"")
    with pytest.raises(Declined, match=r"what the update leaves out cannot be kept in .*: make room there, or give another folder"):
        used(Residual(tmp_path), ABOUT)
