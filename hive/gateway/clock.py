"""A request's deadline at work: it ends what the request waits for when its next limit passes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from hive.policy.deadlines import Deadline, Due
from hive.workers.interrupt import Interrupt

EARLY_S = 0.001  # a loop's timer may ring so much before its time


class Clock:
    """One timer a request, set anew only when it rings; a byte costs an assignment.

    `expired` makes the error of a limit that passed. `cancel` ends the request from outside.
    """

    def __init__(self, deadline: Deadline, expired: Callable[[Due], Exception]) -> None:
        self.deadline = deadline
        self._expired = expired
        self._cause: Exception | None = None
        self._interrupt: Interrupt | None = None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What is done inside ends with the error of the next limit, or of `cancel`, at once."""
        self._interrupt = interrupt = Interrupt()
        if self._cause is not None:
            interrupt.end(self._cause)
        self._ring()
        try:
            async with interrupt:
                yield
        finally:
            self._interrupt = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def check(self) -> None:
        """Raise what has ended the request already, before it waits for anything."""
        if self._cause is not None:
            raise self._cause
        due = self.deadline.request
        if due.at <= time.monotonic():
            raise self._expired(due)

    def cancel(self, cause: Exception) -> None:
        """End it, now or where it waits next; the first cause is told."""
        if self._cause is None:
            self._cause = cause
            if self._interrupt is not None:
                self._interrupt.end(cause)

    # ── how the request gets on ─────────────────────────────────────────────────────────────────

    def queued(self, at: float) -> None:
        """It waits for a slot from `at` on."""
        self.deadline.queued_at, self.deadline.slot_at = at, None

    def got_slot(self) -> None:
        self.deadline.slot_at = time.monotonic()

    def first_byte(self, *, is_stream: bool) -> None:
        deadline = self.deadline
        deadline.is_stream = is_stream
        deadline.first_byte_at = deadline.last_byte_at = time.monotonic()
        self._ring()  # the next limit may be an earlier one

    def byte(self) -> None:
        self.deadline.last_byte_at = time.monotonic()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _ring(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._interrupt is None or self._interrupt.cause is not None:
            return
        due = self.deadline.due
        left_s = due.at - time.monotonic()
        if left_s > EARLY_S:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._ring)
        else:
            self._interrupt.end(self._expired(due))

    def __repr__(self) -> str:
        return f"<Clock {self.deadline.due}>"
