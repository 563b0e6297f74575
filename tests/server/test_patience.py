from __future__ import annotations

import asyncio

import pytest
from choral.errors import ArtifactsGone, ConfigError
from choral_server import patience
from choral_server.patience import patiently
from choral_server.troubles import Troubles


class Work:
    """Raises these, one at each attempt, and then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.attempts = 0
        self._errors = list(errors)

    async def __call__(self) -> str:
        self.attempts += 1
        if self._errors:
            raise self._errors.pop(0)
        return "done"


@pytest.fixture
def told() -> list[dict[str, str]]:
    """The troubles after each change."""
    return []


@pytest.fixture
def troubles(told: list[dict[str, str]]) -> Troubles:
    troubles = Troubles()
    troubles.on_change = lambda: told.append(troubles.present)
    return troubles


async def test_what_works_is_no_trouble(troubles: Troubles, told: list[dict[str, str]]) -> None:
    assert await patiently(troubles, "artifacts", Work()) == "done"
    assert told == []


async def test_it_is_tried_until_it_works_and_the_trouble_is_told_once(troubles: Troubles, told: list[dict[str, str]]) -> None:
    work = Work(ArtifactsGone("refused"), ArtifactsGone("refused"), OSError(28, "No space left on device"))
    assert await patiently(troubles, "artifacts", work) == "done"
    assert work.attempts == 4
    assert told == [{"artifacts": "refused"}, {"artifacts": "[Errno 28] No space left on device"}, {}]


async def test_other_troubles_stay(troubles: Troubles) -> None:
    troubles.found("disk", "full")
    await patiently(troubles, "artifacts", Work(ArtifactsGone("refused")))
    assert troubles.present == {"disk": "full"}


async def test_what_waiting_does_not_cure_passes(troubles: Troubles, told: list[dict[str, str]]) -> None:
    for error in (ConfigError("wrong"), ValueError("wrong")):
        work = Work(error)
        with pytest.raises(type(error), match="wrong"):
            await patiently(troubles, "artifacts", work)
        assert work.attempts == 1
    assert told == []


async def test_cancelled_while_it_waits_it_ends(troubles: Troubles) -> None:
    present = asyncio.Event()
    troubles.on_change = present.set
    waiting = asyncio.create_task(patiently(troubles, "artifacts", Work(*[ArtifactsGone("refused")] * 1000)))
    await present.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_pauses_grow_up_to_the_longest(troubles: Troubles, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(patience.asyncio, "sleep", sleep)  # the only way to see them without waiting for them
    await patiently(troubles, "artifacts", Work(*[ArtifactsGone("refused")] * 8))
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
