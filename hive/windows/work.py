"""How long work on windows may take, how often it is tried, and what it tells meanwhile."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from hive.errors import OperationTimeout, StorageReadFailed, StorageWriteFailed
from hive.policy.retries import RETRIES
from hive.workers.preparing import in_its_own_thread

log = logging.getLogger(__name__)

LIMIT_S, PER_TOKEN_S, MOST_S = 90.0, 0.01, 300.0  # of one freeze or thaw (C15)
THREADS = 4  # for files
HANGS_S = 2.0  # a thread that nobody waits for ends within this, or the disk hangs

Progress = Callable[[str, int, int], None]  # phase, done, of how many
T = TypeVar("T")


def unheard(phase: str, done: int, total: int) -> None:
    """Progress that nobody wants to hear of."""


def limit_s(tokens: int) -> float:
    """What an operation with so many tokens may take (C15)."""
    return min(MOST_S, LIMIT_S + tokens * PER_TOKEN_S)


class Limit:
    """How long an operation may take; more, once it is known how large it is."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timeout = asyncio.timeout(seconds)

    def extend(self, seconds: float) -> None:
        due = self.timeout.when()
        assert due is not None
        self.timeout.reschedule(due + seconds - self.seconds)
        self.seconds = seconds


@asynccontextmanager
async def limited(seconds: float, began: float) -> AsyncIterator[Limit]:
    """Raises OperationTimeout."""
    limit = Limit(seconds)
    try:
        async with limit.timeout:
            yield limit
    except TimeoutError as exc:
        if not limit.timeout.expired():
            raise
        raise OperationTimeout(
            f"The operation took longer than {limit.seconds:g} s.",
            timeout_seconds=limit.seconds,
            elapsed_seconds=round(time.monotonic() - began, 3),
        ) from exc


async def retried(operation: str, attempt: Callable[[bool], Awaitable[T]]) -> T:
    """By the table (R101): what is tried hears whether it was tried before.

    A file that went away meanwhile counts as one that could not be written.
    """
    policy = RETRIES[operation]

    async def call() -> T:
        try:
            return await attempt(retrying.statistics["attempt_number"] > 1)
        except FileNotFoundError as exc:
            raise StorageWriteFailed("A block went away while it was being linked.") from exc

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s failed, attempt %d: %s", operation, state.attempt_number, error)

    retrying = AsyncRetrying(
        stop=stop_after_attempt(policy.calls),
        wait=lambda state: policy.delay_s(state.attempt_number, random.random()),  # noqa: S311
        # C25: what no repetition helps is told at once.
        retry=retry_if_exception_type((StorageWriteFailed, StorageReadFailed)),
        before_sleep=tell,
        reraise=True,
    )
    return await retrying(call)


class _Stopped(Exception):
    """Raised in a thread whose work nobody waits for any more."""


class Teller:
    """A thread's progress, told in the loop; and the loop's wish that it stops, told in the thread."""

    def __init__(self, told: Progress, phase: str, total: int) -> None:
        self._told, self._phase, self._total = told, phase, total
        self._loop = asyncio.get_running_loop()
        self._is_stopped = False
        self._last = -1

    def stop(self) -> None:
        """Nobody waits for the thread any more: its next word ends it."""
        self._is_stopped = True

    def __call__(self, done: int) -> None:
        if self._is_stopped:
            raise _Stopped
        if self._told is not unheard and done != self._last:
            self._last = done
            self._loop.call_soon_threadsafe(self._told, self._phase, done, self._total)


# Not asyncio's own threads: however slow the disk is, engines are started and watched meanwhile.
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
_hanging: set["asyncio.Future[Any]"] = set()  # what nobody waits for any more, and goes on


async def in_thread(work: Callable[..., T], *args: Any, teller: Teller | None = None) -> T:
    """What blocks. Cancelled, it stops where it can, and nothing is done before it has: what undoes
    it would be in its way.

    A disk that hangs cannot be stopped: who is cancelled goes on after HANGS_S, `nothing_hangs`
    tells when the thread has come back, and hive's end waits for none.
    """
    turn = _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(THREADS))
    await turn.acquire()
    doing = asyncio.ensure_future(in_its_own_thread(partial(work, *args)))
    doing.add_done_callback(lambda _: turn.release())
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        if teller:
            teller.stop()
        until = time.monotonic() + HANGS_S
        while not doing.done() and (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({doing}, timeout=left_s)
        _hanging.add(doing)
        doing.add_done_callback(_came_back)
        if not doing.done():
            log.error(  # noqa: TRY400 (no traceback tells more)
                "the disk under server.state_dir hangs: %s is not waited for any more",
                getattr(work, "__name__", "work"),
            )
        raise


def _came_back(doing: "asyncio.Future[Any]") -> None:
    _hanging.discard(doing)
    if not doing.cancelled():
        doing.exception()  # nobody is there to be told


def hangs() -> bool:
    """Whether a thread is at work that nobody waits for any more."""
    return bool(_hanging)


async def nothing_hangs() -> None:
    """Return when no thread is at work any more that nobody waits for."""
    while _hanging:
        await asyncio.wait(set(_hanging))
