"""Work on windows: its limit, its tries, and threads that end when nobody waits for them."""

import asyncio
import threading

import pytest

from hive.errors import OperationTimeout, StorageCorrupted, StorageReadFailed, StorageWriteFailed
from hive.policy.retries import RETRIES, RetryPolicy
from hive.windows.work import (
    HANGS_S,
    LIMIT_S,
    MOST_S,
    STATE,
    THREADS,
    Disk,
    Teller,
    in_thread,
    left_behind,
    limit_s,
    limited,
    retried,
    unheard,
)
from tests.patience import awaited, until


def test_a_larger_window_may_take_longer_but_not_for_ever() -> None:
    """C15"""
    assert limit_s(0) == LIMIT_S
    assert limit_s(1000) == LIMIT_S + 10
    assert limit_s(10**9) == MOST_S


@awaited
async def test_what_takes_longer_than_its_limit_is_told_so() -> None:
    began = asyncio.get_running_loop().time()

    async def for_ever() -> None:
        async with limited(0.01, began) as limit:
            limit.extend(0.05)
            await asyncio.Event().wait()

    with pytest.raises(OperationTimeout) as caught:
        await for_ever()
    told = caught.value.details
    assert told["timeout_seconds"] == 0.05
    assert 0.05 <= told["elapsed_seconds"] < 30


@awaited
async def test_another_timeout_inside_is_not_taken_for_its_own() -> None:
    with pytest.raises(TimeoutError, match="another"):
        async with limited(60, 0.0):
            raise TimeoutError("another")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as the table says, but sooner."""
    policy = RetryPolicy(RETRIES["storage"].calls, (0.001,))
    monkeypatch.setitem(RETRIES, "storage", policy)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("error", [StorageReadFailed, StorageWriteFailed, FileNotFoundError])
@awaited
async def test_what_may_work_the_next_time_is_tried_by_the_table(error: type[Exception]) -> None:
    """R101"""
    heard: list[bool] = []

    async def attempt(is_again: bool) -> str:
        heard.append(is_again)
        if len(heard) < RETRIES["storage"].calls:
            raise error("not now")
        return "done"

    assert await retried("storage", attempt) == "done"
    assert heard == [False, *[True] * (RETRIES["storage"].calls - 1)]


@pytest.mark.usefixtures("soon")
@awaited
async def test_after_the_last_try_its_error_is_the_answer() -> None:
    tries: list[bool] = []

    async def attempt(is_again: bool) -> None:
        tries.append(is_again)
        raise FileNotFoundError

    with pytest.raises(StorageWriteFailed, match="went away"):
        await retried("storage", attempt)
    assert len(tries) == RETRIES["storage"].calls


@awaited
async def test_what_no_repetition_helps_is_told_at_once() -> None:
    """C25"""
    tries: list[bool] = []

    async def attempt(is_again: bool) -> None:
        tries.append(is_again)
        raise StorageCorrupted

    with pytest.raises(StorageCorrupted):
        await retried("storage", attempt)
    assert tries == [False]


@awaited
async def test_a_threads_progress_is_heard_in_the_loop() -> None:
    heard: list[tuple[str, int, int, bool]] = []
    here = threading.get_ident()

    def told(phase: str, done: int, total: int) -> None:
        heard.append((phase, done, total, threading.get_ident() == here))

    tell = Teller(told, "check", 2)

    def work() -> None:
        tell(1)
        tell(1)  # nothing new, and told to nobody
        tell(2)

    await in_thread(work, teller=tell)
    await until(lambda: len(heard) == 2, "the progress")
    assert heard == [("check", 1, 2, True), ("check", 2, 2, True)]


@awaited
async def test_a_thread_nobody_waits_for_ends_at_its_next_word() -> None:
    """What undoes its work must not find it at work."""
    tell = Teller(unheard, "link", 3)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    done: list[int] = []

    def work() -> None:
        try:
            for at in range(3):
                begun.set()
                assert go_on.wait(30)
                tell(at)
                done.append(at)
        finally:
            ended.set()

    waiting = asyncio.ensure_future(in_thread(work, teller=tell))
    await until(begun.is_set, "the thread")
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
    assert done == []


@awaited
async def test_a_disk_that_hangs_is_left_after_a_while_and_told_when_it_comes_back() -> None:
    """R107: what undoes its work waits until it is over, its client does not."""
    go_on = threading.Event()
    doing = [asyncio.ensure_future(in_thread(go_on.wait, 60)) for _ in range(THREADS)]
    queued = asyncio.ensure_future(in_thread(go_on.wait, 60))
    await asyncio.sleep(0)
    began = asyncio.get_running_loop().time()
    for one in (*doing, queued):
        one.cancel()
    ended = await asyncio.gather(*doing, queued, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended)
    assert HANGS_S <= asyncio.get_running_loop().time() - began < HANGS_S + 20
    assert STATE.hangs
    back = asyncio.ensure_future(STATE.nothing_hangs())
    await asyncio.sleep(0)
    assert not back.done()
    go_on.set()
    await back
    assert not STATE.hangs
    assert await in_thread(lambda: "its turn") == "its turn"


@awaited
async def test_a_disk_that_hangs_keeps_nobody_from_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And who left something there knows what, until it is back."""
    monkeypatch.setattr("hive.windows.work.HANGS_S", 0.1)
    go_on, far = threading.Event(), Disk("windows.backup_dir", threads=1)
    with left_behind() as left:
        doing = asyncio.ensure_future(far.run(go_on.wait, 60))
        await asyncio.sleep(0)
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing
    with left_behind() as others:
        assert await in_thread(lambda: "at once") == "at once"
    assert (len(left), len(others), far.hangs, STATE.hangs) == (1, 0, True, False)
    go_on.set()
    await asyncio.wait(left)
    await until(lambda: not far.hangs, "the thread")
    assert await far.run(lambda: "its turn") == "its turn"
