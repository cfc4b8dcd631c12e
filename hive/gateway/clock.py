"""A request's deadline at work: it ends what the request waits for when its next limit passes."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from hive.policy.deadlines import Deadline, Due
from hive.workers.interrupt import Interrupt
from hive.workers.life import User

LEAST_S = 0.001  # a loop's timer may ring so much before its time, and is set again


class Clock:
    """One timer a request, set anew only when it rings; a byte costs an assignment.

    `expired` makes the error of a limit that passed; None: it did not, something moved meanwhile.
    `cancel` ends the request from outside.
    """

    def __init__(self, deadline: Deadline, expired: Callable[[Due], Exception | None]) -> None:
        self.deadline = deadline
        self._expired = expired
        self._cause: Exception | None = None
        self._user: User | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What is done inside ends with the error of the next limit, or of `cancel`, at once."""
        interrupt = Interrupt()
        self.attach(interrupt)
        try:
            async with interrupt:
                yield
        finally:
            self.detach()

    def attach(self, user: User) -> None:
        """`user` ends with the error of the next limit, or of `cancel`, at once."""
        self._user = user
        if self._cause is not None:
            user.end(self._cause)
        else:
            self._set()

    def detach(self) -> None:
        self._user = None
        self._silence()

    def check(self) -> None:
        """Raise what has ended the request already, before it waits for anything."""
        if self._cause is not None:
            raise self._cause
        due = self.deadline.request
        if due.at <= time.monotonic() and (cause := self._expired(due)) is not None:
            raise cause

    def cancel(self, cause: Exception) -> None:
        """End it, now or where it waits next; the first cause is told."""
        if self._cause is None:
            self._cause = cause
            self._silence()
            if self._user is not None:
                self._user.end(cause)

    # ── how the request gets on ─────────────────────────────────────────────────────────────────

    def queued(self, at: float) -> None:
        """It waits for a slot from `at` on."""
        self.deadline.queued_at, self.deadline.slot_at = at, None

    def got_slot(self) -> None:
        self.deadline.slot_at = time.monotonic()

    def first_byte(self, *, is_stream: bool, is_last: bool = False) -> None:
        """`is_last`: it is all there, so no limit is near."""
        deadline = self.deadline
        deadline.is_stream = is_stream
        deadline.first_byte_at = deadline.last_byte_at = time.monotonic()
        if not is_last:
            self.look()

    def look(self) -> None:
        """Its next limit may be an earlier one now."""
        if self.deadline.due.at < self._rings_at:
            self._set()

    def byte(self) -> None:
        self.deadline.last_byte_at = time.monotonic()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _set(self) -> None:
        """Ring at the next limit; later ones are looked at when it rings."""
        self._silence()
        if self._user is None or self._cause is not None:
            return
        due = self.deadline.due
        if due.at <= time.monotonic():
            self._cause = self._expired(due)
            if self._cause is not None:
                self._user.end(self._cause)
                return
            self.byte()
            due = self.deadline.due
        self._rings_at = due.at
        left_s = max(LEAST_S, due.at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(left_s, self._set)

    def _silence(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rings_at = math.inf

    def __repr__(self) -> str:
        return f"<Clock {self.deadline.due}>"
