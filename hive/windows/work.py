"""How long work on windows may take, how often it is tried, and what it tells meanwhile."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tenacity import RetryCallState

from hive.errors import OperationTimeout, StorageReadFailed, StorageWriteFailed
from hive.policy.retries import RETRIES
from hive.storage.threads import in_its_own_thread
from hive.storage.trying import by_table

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

    A file that went away meanwhile counts as one that could not be written. What no repetition helps
    is told at once (C25).
    """
    is_again = False

    async def call() -> T:
        try:
            return await attempt(is_again)
        except FileNotFoundError as exc:
            raise StorageWriteFailed("A block went away while it was being linked.") from exc

    def tell(state: RetryCallState) -> None:
        nonlocal is_again
        is_again = True
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s failed, attempt %d: %s", operation, state.attempt_number, error)

    again = (StorageWriteFailed, StorageReadFailed)
    return await by_table(RETRIES[operation], call, again, tell)


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


class Disk:
    """Threads for one disk, not asyncio's own: however slow it is, all else goes on meanwhile."""

    def __init__(self, name: str, threads: int = THREADS) -> None:
        self._name, self._threads = name, threads
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
        self._turns = WeakKeyDictionary()
        self._hanging: set[asyncio.Future[Any]] = set()  # nobody waits for it, and it goes on

    async def run(self, work: Callable[..., T], *args: Any, teller: Teller | None = None) -> T:
        """What blocks. Cancelled, it stops where it can, and nothing is done before it has: what
        undoes it would be in its way.

        A disk that hangs cannot be stopped: who is cancelled goes on after HANGS_S,
        `nothing_hangs` and `left_behind` tell when the thread has come back, and hive's end waits
        for none.
        """
        loop = asyncio.get_running_loop()
        turn = self._turns.setdefault(loop, asyncio.Semaphore(self._threads))
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
            if not doing.done():
                self._leave(doing, getattr(work, "__name__", "work"))
            elif not doing.cancelled():
                doing.exception()  # nobody is there to be told
            raise

    def _leave(self, doing: "asyncio.Future[Any]", name: str) -> None:
        log.error("the disk under %s hangs: %s is not waited for any more", self._name, name)
        self._hanging.add(doing)
        if (mine := _left_behind.get()) is not None:
            mine.add(doing)
        doing.add_done_callback(self._came_back)

    def _came_back(self, doing: "asyncio.Future[Any]") -> None:
        self._hanging.discard(doing)
        if not doing.cancelled():
            doing.exception()  # nobody is there to be told

    @property
    def hangs(self) -> bool:
        """Whether a thread is at work that nobody waits for any more."""
        return bool(self._hanging)

    async def nothing_hangs(self) -> None:
        """Return when no thread is at work any more that nobody waits for."""
        while self._hanging:
            await asyncio.wait(set(self._hanging))

    def __repr__(self) -> str:
        return f"<Disk under {self._name}>"


STATE = Disk("server.state_dir")  # the one that windows are on
in_thread = STATE.run

_left_behind: ContextVar[set["asyncio.Future[Any]"] | None] = ContextVar("left", default=None)


@contextmanager
def left_behind() -> Iterator[set["asyncio.Future[Any]"]]:
    """What the block leaves in threads of a disk that hangs, and may yet come back."""
    left: set[asyncio.Future[Any]] = set()
    token = _left_behind.set(left)
    try:
        yield left
    finally:
        _left_behind.reset(token)
