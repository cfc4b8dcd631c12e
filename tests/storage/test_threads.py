"""A thread that hive's end does not wait for."""

import asyncio
import threading
import time

import pytest

from hive.storage.threads import in_its_own_thread
from tests.patience import awaited, within


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
