"""A federation for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.federation import Federation


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation in a new folder; its name is short, because a Unix socket's path must be."""
    with Federation(tmp_path_factory.mktemp("f")) as started:
        yield started
