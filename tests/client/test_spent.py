"""In which rounds a client has revealed: once each, whatever the coordinator says, and whenever the client is started."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from choral.errors import Deceived, Declined
from choral.secagg.roster import Terms
from choral_client.spent import Spent

TERMS = Terms("run/1", 3, bytes(32), bytes(32))
AGAIN = re.escape(
    "this client has revealed what it held in round 3 of run run/1, and takes no part in round 3 of it any more: the sums of two "
    "attempts differ by whoever is in one of them alone"
)


@pytest.fixture
def spent(tmp_path: Path) -> Spent:
    return Spent(tmp_path)


def test_a_round_is_revealed_once(spent: Spent) -> None:
    spent.check(TERMS)
    spent.check(TERMS)  # asking is not revealing
    spent.spend(TERMS)
    with pytest.raises(Deceived, match=f"^{AGAIN}$"):
        spent.check(TERMS)
    with pytest.raises(Deceived, match=f"^{AGAIN}$"):
        spent.spend(TERMS)


@pytest.mark.parametrize("change", [{"version": b"\x01" * 32}, {"plan": b"\x01" * 32}, {"threshold": 0.9}])
def test_another_model_or_plan_makes_it_no_other_round(spent: Spent, change: dict[str, object]) -> None:
    spent.spend(TERMS)
    with pytest.raises(Deceived, match=AGAIN):
        spent.spend(replace(TERMS, **change))  # type: ignore[arg-type]


def test_a_later_round_follows_and_an_earlier_one_does_not(spent: Spent) -> None:
    spent.spend(TERMS)
    spent.spend(replace(TERMS, round=4))
    spent.spend(replace(TERMS, round=9))
    for earlier in (0, 3, 5, 9):  # 5 was left out: a coordinator that goes back is not told apart from one that repeats
        with pytest.raises(Deceived, match=f"revealed what it held in round 9 of run run/1, and takes no part in round {earlier}"):
            spent.check(replace(TERMS, round=earlier))
    spent.check(replace(TERMS, round=10))


def test_round_0_is_one_too(spent: Spent) -> None:
    spent.spend(replace(TERMS, round=0))
    with pytest.raises(Deceived, match="in round 0 of run run/1"):
        spent.check(replace(TERMS, round=0))


def test_another_run_is_another_matter(spent: Spent) -> None:
    spent.spend(TERMS)
    other = replace(TERMS, run="run/2", round=0)
    spent.spend(other)
    with pytest.raises(Deceived, match="run run/2"):
        spent.check(other)
    with pytest.raises(Deceived, match=AGAIN):
        spent.check(TERMS)


def test_it_outlives_the_process(tmp_path: Path) -> None:
    Spent(tmp_path).spend(TERMS)
    with pytest.raises(Deceived, match=AGAIN):
        Spent(tmp_path).check(TERMS)
    Spent(tmp_path).spend(replace(TERMS, round=4))
    assert json.loads((tmp_path / "spent.json").read_bytes()) == {"run/1": 4}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'{"run/1": null}', b'{"run/1": "x"}', b'{"run/1": Infinity}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_file_declines_and_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spent.json").write_bytes(content)
    for ask in (Spent(tmp_path).check, Spent(tmp_path).spend):
        with pytest.raises(
            Declined, match=r"spent\.json says in which rounds .*, and cannot be read \(.*\): restore it, or remove it"
        ):
            ask(TERMS)
    assert (tmp_path / "spent.json").read_bytes() == content


def test_a_folder_in_its_place_declines(tmp_path: Path) -> None:
    (tmp_path / "spent.json").mkdir()
    with pytest.raises(Declined, match="cannot be read"):
        Spent(tmp_path).check(TERMS)


def test_what_cannot_be_kept_is_not_revealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Spent(tmp_path)
    spent.spend(TERMS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        Declined, match=r"spent\.json cannot be written \(No space left on device\), so nothing is revealed: make room"
    ):
        spent.spend(replace(TERMS, round=4))
    monkeypatch.undo()
    spent.spend(replace(TERMS, round=4))
