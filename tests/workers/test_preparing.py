"""What is waited for before anything starts. (The preflight itself: features/resilience.)"""

import asyncio

import pytest

from hive.workers.preparing import unless
from tests.patience import awaited


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
