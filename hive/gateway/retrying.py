"""Sending a request again that nobody has answered: the table is policy/retries, tenacity runs it.

Another ready worker of the same model takes it at once; that is routing among replicas. The same
worker is asked again after the table's pause, and only where nothing can have been done twice that
anybody saw: before the first byte, inside the request's deadline (R001-R005, C1-C4).
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import NoReturn

from aiohttp import web
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from hive.errors import HiveError, RetryBackoff
from hive.events import Announcer, RequestRetried, RetriesEnded
from hive.gateway.clock import Clock
from hive.gateway.relay import Unanswered
from hive.gateway.traffic import Passage
from hive.policy.admission import Ticket
from hive.policy.retries import RETRIES
from hive.workers.admission import Door

OPERATION = "network"
Attempt = Callable[[Ticket], Awaitable[web.StreamResponse]]


class Retries:
    """Of one request, from its first failure on; `attempt` sends it once more."""

    def __init__(
        self, announcer: Announcer, passage: Passage, door: Door, ticket: Ticket, clock: Clock
    ) -> None:
        self._announcer, self._passage, self._door = announcer, passage, door
        self._ticket, self._clock = ticket, clock
        self._policy = RETRIES[OPERATION]
        self._delay_s = 0.0  # before the next attempt
        self._is_elsewhere = False  # it goes to another worker
        self._attempts = 1
        self._outcome = ""

    async def after(self, first: Unanswered, attempt: Attempt) -> web.StreamResponse:
        """The answer of a later attempt. Raises the last one's error, or RetryBackoff."""
        failures = [first]

        async def call() -> web.StreamResponse:
            # The first call was made already, and counts.
            return await attempt(self._ticket) if not failures else _fail(failures.pop())

        try:
            answer: web.StreamResponse = await AsyncRetrying(
                sleep=self._pause,
                stop=self._must_stop,
                wait=self._wait_s,
                retry=retry_if_exception(self._may_retry),
                before_sleep=self._tell,
                reraise=True,
            )(call)
            self._outcome = "success"
            return answer
        except Unanswered as last:
            raise self._last_word(last.error) from last
        finally:
            if self._attempts > 1 or self._outcome:
                self._announcer.announce(
                    RetriesEnded(OPERATION, self._outcome or "failed", self._door.model)
                )

    async def _pause(self, seconds: float) -> None:
        self._clock.queued(time.monotonic() + seconds)
        async with self._clock.running():
            await asyncio.sleep(seconds)

    def _must_stop(self, state: RetryCallState) -> bool:
        if not self._policy.allows(state.attempt_number):
            self._outcome = "exhausted"
        elif time.monotonic() + state.upcoming_sleep >= self._clock.deadline.answer_by:
            self._outcome = "deadline"
        return bool(self._outcome)

    def _last_word(self, error: HiveError) -> HiveError:
        """What the client is told in the end: what happened, or when to try again (R004)."""
        policy = self._policy
        if self._outcome != "deadline":
            if self._outcome == "exhausted":
                error.retry_after_s = policy.delay_s(self._attempts, 0.0)
            return error
        return RetryBackoff(
            f"{error.message} Another attempt would come too late for the request's deadline.",
            retry_after_s=self._delay_s,
            attempt=self._attempts,
            max_attempts=policy.calls,
            next_retry_seconds=round(self._delay_s, 3),
            backoff_strategy="exponential_with_jitter",
            schedule=list(policy.delays[: policy.calls - 1]),
            model=self._door.model,
            worker=self._passage.worker,
        )

    def _may_retry(self, exc: BaseException) -> bool:
        """Where another worker is there for it, or the same one may be asked again."""
        if not isinstance(exc, Unanswered):
            return False
        avoid = self._ticket.avoid | {self._passage.worker or ""}
        self._ticket = replace(self._ticket, avoid=avoid, worker=None)
        self._is_elsewhere = not self._ticket.pinned and self._door.room.can_serve(self._ticket)
        if not self._is_elsewhere:
            self._ticket.avoid = frozenset()
        return self._is_elsewhere or exc.may_repeat

    def _wait_s(self, state: RetryCallState) -> float:
        calls = state.attempt_number
        self._delay_s = 0 if self._is_elsewhere else self._policy.delay_s(calls, random.random())  # noqa: S311
        return self._delay_s

    def _tell(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, Unanswered)
        self._attempts = state.attempt_number + 1
        self._announcer.announce(
            RequestRetried(
                request_id=self._passage.request_id,
                operation=OPERATION,
                model=self._door.model,
                worker=self._passage.worker or "",
                attempt=self._attempts,
                allowed=self._policy.calls,
                delay_s=round(self._delay_s, 3),
                code=error.error.code,
            )
        )


def _fail(error: Exception) -> NoReturn:
    raise error
