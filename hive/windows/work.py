"""How long work on windows may take, how often it is tried, and what it tells meanwhile."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from hive.errors import OperationTimeout, StorageReadFailed, StorageWriteFailed
from hive.policy.retries import RETRIES
from hive.storage.finishing import to_the_end

log = logging.getLogger(__name__)

LIMIT_S, PER_TOKEN_S, MOST_S = 90.0, 0.01, 300.0  # of one freeze or thaw (C15)
THREADS = 4  # for files

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

    def stop(self) -> None:
        """Nobody waits for the thread any more: its next word ends it."""
        self._is_stopped = True

    def __call__(self, done: int) -> None:
        if self._is_stopped:
            raise _Stopped
        if self._told is not unheard:
            self._loop.call_soon_threadsafe(self._told, self._phase, done, self._total)


# Its own threads: however slow the disk is, engines are started and watched meanwhile.
_threads = ThreadPoolExecutor(THREADS, "windows")


async def in_thread(work: Callable[..., T], *args: Any, teller: Teller | None = None) -> T:
    """What blocks. Cancelled, it stops where it can, and nothing is done before it has: what undoes
    it would be in its way."""
    doing = asyncio.get_running_loop().run_in_executor(_threads, partial(work, *args))
    return await (to_the_end(doing, teller.stop) if teller else to_the_end(doing))
