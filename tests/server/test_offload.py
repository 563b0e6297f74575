from __future__ import annotations

import threading

import pytest
from choral_server.offload import offload


@pytest.mark.parametrize(("size_bytes", "beside"), [(0, False), (2**18 - 1, False), (2**18, True), (10**9, True)])
async def test_only_much_work_is_handed_to_a_thread(size_bytes: int, beside: bool) -> None:
    assert (await offload(size_bytes, threading.get_ident) != threading.get_ident()) is beside


@pytest.mark.parametrize("size_bytes", [0, 2**20])
async def test_arguments_results_and_errors_pass_through(size_bytes: int) -> None:
    assert await offload(size_bytes, int, "ff", base=16) == 255
    with pytest.raises(ValueError, match="invalid literal"):
        await offload(size_bytes, int, "no number")
