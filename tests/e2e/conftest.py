"""A federation for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.federation import Federation
from e2e.secure_stage import stage
from e2e.zygote import Zygote
from server.databases import postgres

__all__ = ["postgres", "stage"]


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation in a new folder; its name is short, because a Unix socket's path must be."""
    with Federation(tmp_path_factory.mktemp("f")) as started:
        yield started


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What starts processes in no time."""
    started = Zygote()
    yield started
    started.end()


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Federation]:
    """A federation whose processes start in no time, for tests that start many."""
    with Federation(tmp_path_factory.mktemp("f"), zygote=zygote) as started:
        yield started
