"""Sending a request again: where to, how often, how far apart, and what is told in the end."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from hive.errors import BadGateway, HiveError, RetryBackoff, ServiceUnavailable, WorkerCrashed
from hive.events import Announcer, Event, RequestRetried, RetriesEnded
from hive.gateway.clock import Clock
from hive.gateway.relay import Unanswered
from hive.gateway.retrying import Retries
from hive.gateway.traffic import Passage
from hive.policy.admission import Ticket
from hive.policy.deadlines import Deadline, Limits
from hive.policy.retries import RETRIES, RetryPolicy
from tests.patience import awaited, until
from tests.workers.standing import admitted, die
from tests.workers.test_admission import Entrance, entrance

LIMITS = Limits(
    request_s=600,
    queue_s=300,
    connect_s=2,
    inference_s=400,
    stall_s=300,
    stream_total_s=0,
    cleanup_s=5,
)
QUICK = RetryPolicy(5, (0.01, 0.02, 0.04, 0.08))
BROKEN, CRASHED = BadGateway("The engine broke off."), WorkerCrashed("It ended.")

Script = list[Exception | None]


class Expired(Exception):
    """The request's own limit passed."""


class Sent:
    """A request that has failed once, at m-0; each later attempt goes by the script."""

    def __init__(self, it: Entrance, ticket: Ticket, request_s: float, policy: RetryPolicy) -> None:
        self.it = it
        self.events: list[Event] = []
        self.to: list[str] = []
        self.at: list[float] = []
        self.script: Script = []
        self.passage = Passage("r1", "POST", "/v1/completions", worker="m-0")
        self.clock = Clock(
            Deadline(replace(LIMITS, request_s=request_s), self.passage.began),
            lambda due: Expired(due.phase),
        )
        announcer = Announcer()
        announcer.listen(self.events.append)
        self.retries = Retries(announcer, self.passage, it.door, ticket, self.clock)
        self.retries._policy = policy

    async def attempt(self, ticket: Ticket) -> web.StreamResponse:
        async with self.clock.running():
            permit = await admitted(self.it.door, ticket)
        self.passage.worker = permit.worker.id
        self.to.append(permit.worker.id)
        self.at.append(time.monotonic())
        permit.finished()
        if self.script and (failure := self.script.pop(0)):
            raise failure
        return web.Response(text="well")

    async def after(self, first: Unanswered, *script: Exception | None) -> web.StreamResponse:
        self.script = list(script)
        return await self.retries.after(first, self.attempt)

    async def fails(self, first: Unanswered, *script: Exception | None) -> HiveError:
        with pytest.raises(HiveError) as caught:
            await self.after(first, *script)
        return caught.value

    @property
    def retried(self) -> list[RequestRetried]:
        return [event for event in self.events if isinstance(event, RequestRetried)]

    @property
    def outcomes(self) -> list[str]:
        return [event.outcome for event in self.events if isinstance(event, RetriesEnded)]


@asynccontextmanager
async def sent(
    workers: int = 1,
    ticket: Ticket | None = None,
    request_s: float = 600,
    policy: RetryPolicy = QUICK,
) -> AsyncIterator[Sent]:
    async with entrance(count=workers, slots=4) as it:
        yield Sent(it, ticket or Ticket(), request_s, policy)
        assert it.door.in_flight == 0


def transient() -> Unanswered:
    """The connection did not come about: nothing can have been done twice."""
    return Unanswered(BROKEN, may_repeat=True)


def unsafe(error: HiveError = BROKEN) -> Unanswered:
    """Something may have been done, which nobody saw."""
    return Unanswered(error, may_repeat=False)


# ── The same worker ─────────────────────────────────────────────────────────────────────────────


def test_hives_own_table_is_five_calls_at_doubling_distances() -> None:
    """(R001, R002, R003)"""
    policy = RETRIES["network"]

    assert (policy.calls, policy.delays) == (5, (1, 2, 4, 8, 16))
    assert policy.jitter_s == 1.0


@awaited
async def test_the_same_worker_is_asked_again_after_a_pause() -> None:
    """Each time is told, and how it ended (R001, R002, R005)."""
    async with sent() as it:
        began = time.monotonic()
        answer = await it.after(transient(), transient(), transient(), None)

        assert answer.status == 200
        assert it.to == ["m-0"] * 3
        distances = [at - before for at, before in zip(it.at, [began, *it.at], strict=False)]
        assert all(
            distance >= delay - 0.002
            for distance, delay in zip(distances, QUICK.delays, strict=False)
        )
        assert [event.delay_s for event in it.retried] == [0.01, 0.02, 0.04]
        assert [(event.attempt, event.allowed) for event in it.retried] == [(2, 5), (3, 5), (4, 5)]
        assert {(event.request_id, event.model, event.worker) for event in it.retried} == {
            ("r1", "m", "m-0")
        }
        assert {event.code for event in it.retried} == {"BAD_GATEWAY"}
        assert it.outcomes == ["success"]


@awaited
async def test_each_pause_has_its_share_of_chance() -> None:
    """(R003)"""
    async with sent(policy=RetryPolicy(5, (0.0,), jitter_s=0.02)) as it:
        await it.after(transient(), transient(), transient(), None)
        delays = [event.delay_s for event in it.retried]

    assert all(0 <= delay <= 0.02 for delay in delays)


@awaited
async def test_after_the_last_call_what_happened_is_told() -> None:
    """(R001)"""
    async with sent() as it:
        error = await it.fails(transient(), *[transient()] * 9)

        assert error is BROKEN
        assert len(it.to) == 4
        assert [event.attempt for event in it.retried] == [2, 3, 4, 5]
        assert it.outcomes == ["exhausted"]


@pytest.mark.parametrize("error", [BROKEN, CRASHED])
@awaited
async def test_what_may_have_been_done_is_not_done_again_by_the_same_worker(
    error: HiveError,
) -> None:
    """(R077)"""
    async with sent() as it:
        assert await it.fails(unsafe(error)) is error
        assert (it.to, it.events) == ([], [])


@awaited
async def test_any_other_error_of_a_later_attempt_is_told_as_it_is() -> None:
    refusal = ServiceUnavailable("no place", reason="queue_full")
    async with sent() as it:
        assert await it.fails(transient(), refusal) is refusal
        assert len(it.to) == 1


@awaited
async def test_a_worker_that_went_during_the_pause_is_told_as_it_is() -> None:
    async with sent() as it:
        await die(it.it.worker)
        error = await it.fails(transient())

        assert error.details["reason"] == "worker_stopped"
        assert [event.attempt for event in it.retried] == [2]


@pytest.mark.parametrize("last", [unsafe(), ServiceUnavailable("no", reason="queue_full")])
@awaited
async def test_a_retry_that_failed_for_good_is_counted_as_that(last: Exception) -> None:
    async with sent() as it:
        await it.fails(transient(), last)

        assert it.outcomes == ["failed"]


@awaited
async def test_what_was_not_tried_again_is_not_counted() -> None:
    async with sent() as it:
        await it.fails(unsafe())

        assert it.outcomes == []


@awaited
async def test_an_exhausted_retry_names_the_next_delay_it_would_have_used() -> None:
    """(C1, C2)"""
    error = BadGateway("The engine broke off.")
    failure = Unanswered(error, may_repeat=True)
    async with sent(policy=RetryPolicy(3, (0.01, 0.02, 7.0), jitter_s=0.01)) as it:
        assert await it.fails(failure, *[failure] * 9) is error

        assert error.retry_after_s == 7.0
        assert error.retryable


@awaited
async def test_what_was_tried_elsewhere_and_failed_there_for_good_names_no_delay() -> None:
    error = WorkerCrashed("It ended.")
    async with sent(workers=2) as it:
        assert await it.fails(unsafe(), unsafe(error)) is error

        assert error.retry_after_s is None
        assert it.outcomes == ["failed"]


# ── Another worker ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [transient, unsafe, lambda: unsafe(CRASHED)])
@awaited
async def test_another_worker_of_the_model_takes_it_at_once(
    first: Callable[[], Unanswered],
) -> None:
    async with sent(workers=2, policy=RetryPolicy(5, (600.0,))) as it:
        await it.after(first(), None)

        assert it.to == ["m-1"]
        assert [(event.worker, event.delay_s) for event in it.retried] == [("m-0", 0)]
        assert it.outcomes == ["success"]


@awaited
async def test_each_worker_is_asked_once_before_any_is_asked_again() -> None:
    async with sent(workers=3) as it:
        await it.after(transient(), transient(), transient(), None)

        assert sorted(it.to[:2]) == ["m-1", "m-2"]
        assert [event.delay_s for event in it.retried] == [0, 0, 0.04]


@awaited
async def test_all_workers_together_are_asked_no_more_often_than_one() -> None:
    """(R001)"""
    async with sent(workers=3) as it:
        await it.fails(transient(), *[transient()] * 9)

        assert len(it.to) == 4
        assert it.outcomes == ["exhausted"]


@awaited
async def test_a_request_for_one_worker_never_moves() -> None:
    """A stored response lives in the engine that made it."""
    async with sent(workers=3, ticket=Ticket(pinned="m-0")) as it:
        await it.after(transient(), transient(), None)

        assert it.to == ["m-0"] * 2


@awaited
async def test_a_request_for_one_worker_waits_before_that_one_is_asked_again() -> None:
    """There is no other one for it, whoever else is there."""
    async with sent(workers=2, ticket=Ticket(pinned="m-0")) as it:
        await it.after(transient(), transient(), None)

        assert [event.delay_s for event in it.retried] == [0.01, 0.02]


@awaited
async def test_a_request_for_one_worker_that_may_have_been_done_is_not_done_again() -> None:
    async with sent(workers=2, ticket=Ticket(pinned="m-0")) as it:
        error = await it.fails(unsafe(CRASHED))
        assert error is CRASHED
        assert it.to == []


# ── The deadline ────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_pause_that_does_not_fit_is_not_begun_and_says_when_to_come_back() -> None:
    """At once, with the numbers (R004, C3)."""
    async with sent(request_s=5, policy=RetryPolicy(5, (600.0, 700.0))) as it:
        began = time.monotonic()
        error = await it.fails(transient())
        took_s = time.monotonic() - began

        assert isinstance(error, RetryBackoff)
        assert (error.status, error.code) == (503, "RETRY_BACKOFF")
        assert error.retry_after_s == 600
        assert error.public_details == {
            "attempt": 1,
            "max_attempts": 5,
            "next_retry_seconds": 600,
            "backoff_strategy": "exponential_with_jitter",
            "schedule": [600, 700],
            "model": "m",
            "worker": "m-0",
        }
        assert "The engine broke off." in error.message
        assert took_s < 5
        assert (it.to, it.retried, it.outcomes) == ([], [], ["deadline"])


@awaited
async def test_a_later_pause_that_does_not_fit_names_its_own_number() -> None:
    """(R004)"""
    async with sent(request_s=60, policy=RetryPolicy(5, (0.01, 700.0))) as it:
        error = await it.fails(transient(), transient())

        assert error.details["attempt"] == 2
        assert error.details["next_retry_seconds"] == 700
        assert it.outcomes == ["deadline"]


@awaited
async def test_a_pause_ends_with_the_request() -> None:
    async with sent(policy=RetryPolicy(5, (60.0,))) as it, asyncio.TaskGroup() as tasks:

        async def ask() -> str:
            with pytest.raises(Expired, match="cancelled"):
                await it.after(transient())
            return "told"

        asking = tasks.create_task(ask())
        await until(lambda: it.retried, "the pause to begin")
        it.clock.cancel(Expired("cancelled"))
        assert await asking == "told"
        assert it.to == []


@awaited
async def test_each_wait_for_a_slot_counts_from_the_end_of_its_pause() -> None:
    async with sent() as it:
        await it.after(transient(), transient(), None)

        assert it.clock.deadline.queued_at <= it.at[-1]
        assert it.clock.deadline.queued_at >= it.at[0]
