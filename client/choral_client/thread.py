"""One long-lived thread for tensor work, so that the event loop stays free and the process can end at any moment."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class WorkThread:
    """Runs one function after the other. A daemon: it never delays the end of the process, whatever it is doing.

    One thread for all work, because torch keeps a pool of its own for each thread that calls it.
    """

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._news = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="choral-work").start()

    async def do(self, function: Callable[[], T]) -> T:
        """The result of `function()`, called in the thread; what it raises is raised here.

        Cancelled before its turn, it is not called and leaves nothing behind, however many are given up.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                self._tell(loop, _fail, future, error)
            else:
                self._tell(loop, _succeed, future, result)

        with self._news:
            self._jobs.append(job)
            self._news.notify()
        try:
            return await future
        finally:
            with self._news, suppress(ValueError):  # it had its turn
                self._jobs.remove(job)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._jobs)
                job = self._jobs.popleft()
            job()
            del job  # and with it the model that it worked on

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *values: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(what, *values)


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
