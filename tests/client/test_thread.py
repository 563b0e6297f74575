from __future__ import annotations

import asyncio
import threading

import pytest
from choral_client.thread import WorkThread
from choral_client.train import Stopped

PATIENCE_S = 60.0


async def test_results_come_back_and_all_work_is_done_in_one_thread() -> None:
    thread = WorkThread()
    names = [await thread.do(threading.get_ident) for _ in range(3)]
    assert len(set(names)) == 1
    assert names[0] != threading.get_ident()
    assert await asyncio.gather(*(thread.do(lambda n=n: n * n) for n in range(5))) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("error", [ValueError("wrong"), Stopped(), KeyError("x")])
async def test_what_is_raised_there_is_raised_here(error: BaseException) -> None:
    def fail() -> None:
        raise error

    thread = WorkThread()
    with pytest.raises(type(error)) as raised:
        await thread.do(fail)
    assert raised.value is error
    assert await thread.do(lambda: "still there") == "still there"


@pytest.mark.parametrize("ending", [lambda: None, lambda: 1 / 0])
async def test_nobody_need_wait_for_the_result(ending: object) -> None:
    """A wait that is cancelled leaves the work running; neither its result nor what it raises disturbs what comes after."""
    thread = WorkThread()
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        ending()

    waiting = asyncio.create_task(thread.do(work))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    following = asyncio.create_task(thread.do(lambda: "next"))
    go_on.set()
    assert await following == "next"


async def test_work_given_up_before_its_turn_is_not_begun() -> None:
    thread = WorkThread()
    begun, go_on, done = threading.Event(), threading.Event(), []
    first = asyncio.create_task(thread.do(lambda: (begun.set(), go_on.wait(PATIENCE_S))))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    others = [asyncio.create_task(thread.do(lambda n=n: done.append(n))) for n in range(100)]
    await asyncio.sleep(0)  # they wait for their turn
    for task in others[:-1]:
        task.cancel()
    await asyncio.wait(others[:-1])
    go_on.set()
    await asyncio.gather(first, others[-1])
    assert done == [99]


async def test_the_event_loop_is_free_meanwhile() -> None:
    thread = WorkThread()
    go_on = threading.Event()
    working = asyncio.create_task(thread.do(lambda: go_on.wait(PATIENCE_S)))
    await asyncio.sleep(0)
    go_on.set()  # only a free loop gets here
    assert await working is True


def test_a_loop_that_has_closed_meanwhile_does_not_break_the_thread() -> None:
    thread = WorkThread()
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(PATIENCE_S)

    async def leave_early() -> None:
        task = asyncio.create_task(thread.do(work))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        task.cancel()

    asyncio.run(leave_early())
    go_on.set()

    async def use_again() -> str:
        return await thread.do(lambda: "still there")

    assert asyncio.run(use_again()) == "still there"
