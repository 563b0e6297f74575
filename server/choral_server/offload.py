"""Tensor work beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_WORTH_A_THREAD_BYTES = 1 << 18  # below this the work takes less time than handing it over


async def offload(size_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function`, which works on `size_bytes` bytes: called in a thread, or right here if they are few."""
    if size_bytes < _WORTH_A_THREAD_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
