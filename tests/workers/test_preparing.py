"""What is waited for before anything starts. (The preflight itself: features/resilience.)"""

import asyncio
import threading
import time

import pytest

from hive.workers.preparing import in_its_own_thread, unless
from tests.patience import awaited, within


@awaited
async def test_work_that_ends_first_is_not_stopped() -> None:
    async def works() -> int:
        await asyncio.sleep(0)
        return 7

    assert await unless(asyncio.Event(), works()) == 7


@awaited
async def test_work_that_fails_raises() -> None:
    async def fails() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await unless(asyncio.Event(), fails())


@awaited
async def test_work_is_cancelled_and_waited_for_when_it_is_to_be_stopped() -> None:
    began, stopped, ended = asyncio.Event(), asyncio.Event(), False

    async def never() -> int:
        nonlocal ended
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended = True
        return 1

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(unless(stopped, never()))
        await began.wait()
        stopped.set()
        assert await waiting is None
    assert ended


@awaited
async def test_a_thread_gives_its_result_or_raises() -> None:
    def fails() -> None:
        raise ValueError("no")

    assert await in_its_own_thread(lambda: threading.current_thread().daemon) is True
    with pytest.raises(ValueError, match="no"):
        await in_its_own_thread(fails)


def test_the_end_does_not_wait_for_a_thread_that_hangs() -> None:
    """A driver's call may never return."""
    release = threading.Event()

    async def gives_up() -> None:
        with pytest.raises(TimeoutError):
            await within(in_its_own_thread(release.wait), 0.01)

    began = time.monotonic()
    asyncio.run(gives_up())
    took_s = time.monotonic() - began
    release.set()
    assert took_s < 5
