from __future__ import annotations

import pytest
import structlog
from choral_server.troubles import Troubles


@pytest.fixture
def changes() -> list[dict[str, str]]:
    """What was present after each change."""
    return []


@pytest.fixture
def troubles(changes: list[dict[str, str]]) -> Troubles:
    made = Troubles()
    made.on_change = lambda: changes.append(made.present)
    return made


def test_without_troubles_there_are_none(troubles: Troubles, changes: list[dict[str, str]]) -> None:
    troubles.over("disk")
    assert (troubles.present, changes) == ({}, [])


def test_they_come_and_go_each_by_itself(troubles: Troubles, changes: list[dict[str, str]]) -> None:
    troubles.found("disk", "full")
    troubles.found("database", "gone")
    troubles.over("disk")
    troubles.over("database")
    assert changes == [{"disk": "full"}, {"disk": "full", "database": "gone"}, {"database": "gone"}, {}]
    assert troubles.present == {}


def test_what_is_known_is_not_told_again_but_another_reason_is(troubles: Troubles, changes: list[dict[str, str]]) -> None:
    for reason in ("full", "full", "fuller", "fuller"):
        troubles.found("disk", reason)
    for _ in range(2):
        troubles.over("disk")
    assert changes == [{"disk": "full"}, {"disk": "fuller"}, {}]


def test_whoever_asks_gets_a_copy(troubles: Troubles) -> None:
    troubles.found("disk", "full")
    troubles.present.clear()
    assert troubles.present == {"disk": "full"}


def test_the_log_has_the_beginning_and_the_end(troubles: Troubles) -> None:
    with structlog.testing.capture_logs() as logged:
        troubles.found("disk", "full")
        troubles.found("disk", "full")
        troubles.over("disk")
        troubles.over("disk")
    assert logged == [
        {"event": "in trouble", "subject": "disk", "reason": "full", "log_level": "warning"},
        {"event": "trouble over", "subject": "disk", "log_level": "info"},
    ]


def test_nobody_needs_to_listen() -> None:
    troubles = Troubles()
    troubles.found("disk", "full")
    assert troubles.present == {"disk": "full"}
