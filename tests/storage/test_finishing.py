"""What was begun is done before whoever was cancelled goes on."""

import asyncio

import pytest

from hive.storage.finishing import to_the_end
from tests.patience import awaited


class Work:
    """Something that ends when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_end = asyncio.Event()
        self.is_done = False
        self._error = error

    async def __call__(self) -> str:
        await self.may_end.wait()
        self.is_done = True
        if self._error:
            raise self._error
        return "done"


@awaited
async def test_what_it_gives_and_raises_is_what_was_begun() -> None:
    for work in (Work(), Work(KeyError("x"))):
        work.may_end.set()
        if work._error is None:
            assert await to_the_end(work()) == "done"
        else:
            with pytest.raises(KeyError):
                await to_the_end(work())


@pytest.mark.parametrize("error", [None, KeyError("nobody hears of it")])
@awaited
async def test_cancelled_over_and_over_it_is_done_first(error: Exception | None) -> None:
    work, hastened = Work(error), list[int]()
    waiting = asyncio.ensure_future(to_the_end(work(), lambda: hastened.append(1)))
    await asyncio.sleep(0)
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    assert hastened == [1]
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.is_done
