"""A request's clock: each phase's limit ends it with its own error, and a cancel ends it at once."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import uvloop

from hive.gateway.clock import Clock
from hive.policy.deadlines import Deadline, Due, Limits, Phase
from tests.patience import awaited

LONG = Limits(
    request_s=600,
    queue_s=300,
    connect_s=2,
    inference_s=400,
    stall_s=300,
    stream_total_s=0,
    cleanup_s=5,
)
SHORT_S = 0.05

uvloop.new_event_loop().close()  # libuv keeps a pipe of its own from the first one on


class Expired(Exception):
    """A limit passed."""

    def __init__(self, due: Due) -> None:
        super().__init__(due.phase)
        self.due = due


class Cancelled(Exception):
    """Somebody asked for the end."""


class Timed:
    """A clock, and how often a limit was told to have passed."""

    def __init__(self, arrived_s_ago: float = 0.0, *, is_stream: bool = False, **limits: float):
        self.began = time.monotonic()
        self.told: list[Phase] = []
        self.deadline = Deadline(
            replace(LONG, **limits), self.began - arrived_s_ago, is_stream=is_stream
        )
        self.clock = Clock(self.deadline, self._expired)

    def _expired(self, due: Due) -> Exception:
        self.told.append(due.phase)
        return Expired(due)

    async def expires(self, inside: Callable[[], None] = lambda: None) -> Due:
        """What ends a wait, `inside` done first."""
        with pytest.raises(Expired) as caught:
            await self._waits(inside)
        assert self.told == [caught.value.due.phase]
        return caught.value.due

    async def _waits(self, inside: Callable[[], None]) -> None:
        async with self.clock.running():
            inside()
            await asyncio.Event().wait()

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.began


# ── Which limit ─────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_the_wait_for_a_slot_has_its_limit() -> None:
    timed = Timed(queue_s=SHORT_S)
    due = await timed.expires()

    assert (due.phase, due.limit_s) == (Phase.QUEUE, SHORT_S)
    assert timed.took_s >= SHORT_S - 0.002


@awaited
async def test_a_caller_that_allows_less_is_told_so_and_not_of_the_queue() -> None:
    timed = Timed(request_s=SHORT_S)

    assert (await timed.expires()).phase is Phase.REQUEST


@pytest.mark.parametrize(("is_stream", "phase"), [(True, "first_token"), (False, "inference")])
@awaited
async def test_from_its_slot_to_the_first_byte_it_has_another(is_stream: bool, phase: str) -> None:
    """(R047)"""
    timed = Timed(inference_s=SHORT_S, is_stream=is_stream)
    async with timed.clock.running():
        await asyncio.sleep(0)
    timed.clock.got_slot()
    due = await timed.expires()

    assert (due.phase, due.limit_s) == (phase, SHORT_S)


@awaited
async def test_inference_ends_early_enough_to_clean_up_inside_the_requests_limit() -> None:
    """(R046, R049)"""
    timed = Timed(request_s=1, inference_s=600, cleanup_s=1 - SHORT_S)
    timed.clock.got_slot()

    assert (await timed.expires()).phase is Phase.INFERENCE
    assert timed.took_s < 1


@awaited
async def test_between_two_bytes_it_has_a_third() -> None:
    timed = Timed(stall_s=SHORT_S, is_stream=True)
    timed.clock.got_slot()
    due = await timed.expires(lambda: timed.clock.first_byte(is_stream=True))

    assert (due.phase, due.limit_s) == (Phase.STALL, SHORT_S)


@awaited
async def test_a_whole_stream_may_have_a_fourth() -> None:
    timed = Timed(stream_total_s=SHORT_S)
    timed.clock.got_slot()

    def begins() -> None:
        timed.clock.first_byte(is_stream=True)

    assert (await timed.expires(begins)).phase is Phase.TOTAL


@awaited
async def test_what_turns_out_to_be_no_stream_has_no_streams_limit() -> None:
    """The answer's own head says what it is, whatever was asked for."""
    timed = Timed(stream_total_s=SHORT_S, stall_s=2 * SHORT_S, is_stream=True)
    timed.clock.got_slot()

    assert (await timed.expires(lambda: timed.clock.first_byte(is_stream=False))).phase == "stall"


@awaited
async def test_a_limit_that_is_earlier_after_the_first_byte_is_kept() -> None:
    """The timer was set for a later one."""
    timed = Timed(inference_s=400, stall_s=SHORT_S, is_stream=True)
    timed.clock.got_slot()

    async def answers() -> None:
        async with timed.clock.running():
            await asyncio.sleep(0)
            timed.clock.first_byte(is_stream=True)
            await asyncio.Event().wait()

    with pytest.raises(Expired):
        await answers()
    assert timed.told == [Phase.STALL]
    assert timed.took_s < 30


# ── How it gets on ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_each_byte_gives_it_the_same_time_again() -> None:
    timed = Timed(stall_s=4 * SHORT_S)
    timed.clock.got_slot()
    async with timed.clock.running():
        timed.clock.first_byte(is_stream=True)
        while timed.took_s < 12 * SHORT_S:
            await asyncio.sleep(SHORT_S)
            timed.clock.byte()
    due = await timed.expires()

    assert due.phase is Phase.STALL
    assert timed.took_s >= 16 * SHORT_S - 0.01


@awaited
async def test_a_byte_costs_no_timer() -> None:
    timed = Timed()
    timed.clock.got_slot()
    async with timed.clock.running():
        timed.clock.first_byte(is_stream=True)
        timer = timed.clock._timer
        for _ in range(1000):
            timed.clock.byte()
        assert timed.clock._timer is timer


@awaited
async def test_who_waits_for_a_slot_again_waits_from_then_on() -> None:
    """The second attempt does not begin with what the first one used up."""
    timed = Timed(queue_s=SHORT_S)
    timed.clock.got_slot()
    async with timed.clock.running():
        await asyncio.sleep(2 * SHORT_S)
    timed.clock.queued(time.monotonic())
    before = time.monotonic()

    assert (await timed.expires()).phase is Phase.QUEUE
    assert time.monotonic() - before >= SHORT_S - 0.002


@awaited
async def test_no_attempt_moves_the_requests_own_limit() -> None:
    """(R049)"""
    timed = Timed(request_s=2 * SHORT_S, queue_s=SHORT_S)
    at = timed.deadline.answer_by
    timed.clock.got_slot()
    timed.clock.queued(time.monotonic() + 600)

    assert (await timed.expires()).phase is Phase.REQUEST
    assert timed.deadline.answer_by == at


@awaited
async def test_what_is_over_before_it_begins_ends_at_its_beginning() -> None:
    timed, is_inside = Timed(arrived_s_ago=700), False
    with pytest.raises(Expired):
        async with timed.clock.running():
            is_inside = True

    assert not is_inside


@awaited
async def test_whoever_is_done_in_time_hears_nothing_and_leaves_no_timer() -> None:
    timed = Timed(queue_s=SHORT_S)
    async with timed.clock.running():
        pass
    assert timed.clock._timer is None
    timed.clock.first_byte(is_stream=True)
    assert timed.clock._timer is None
    await asyncio.sleep(2 * SHORT_S)

    assert timed.told == []
    assert repr(timed.clock).startswith("<Clock Due(")


@awaited
async def test_what_the_block_raises_itself_is_raised() -> None:
    timed = Timed()
    with pytest.raises(ZeroDivisionError):
        async with timed.clock.running():
            raise ZeroDivisionError
    assert timed.clock._timer is None


# ── Cancelling ──────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_cancel_ends_what_is_waited_for() -> None:
    timed = Timed()
    cause = Cancelled()
    asyncio.get_running_loop().call_soon(timed.clock.cancel, cause)
    with pytest.raises(Cancelled) as caught:
        await timed._waits(lambda: None)

    assert caught.value is cause
    assert timed.told == []


@awaited
async def test_a_cancel_before_any_wait_ends_the_next_one() -> None:
    """Between a slot and its use, say."""
    timed = Timed()
    async with timed.clock.running():
        pass
    timed.clock.cancel(Cancelled())
    for _ in range(2):
        with pytest.raises(Cancelled):
            await timed._waits(lambda: None)


@awaited
async def test_the_first_cause_is_told() -> None:
    timed = Timed()

    def twice() -> None:
        timed.clock.cancel(Cancelled("first"))
        timed.clock.cancel(Cancelled("second"))

    with pytest.raises(Cancelled, match="first"):
        await timed._waits(twice)


@awaited
async def test_a_cancel_after_the_limit_is_too_late() -> None:
    timed = Timed(queue_s=SHORT_S)

    def both() -> None:
        timed.deadline.queued_at = 0
        timed.deadline.limits = replace(timed.deadline.limits, queue_s=0)
        timed.clock._set()
        timed.clock.cancel(Cancelled())

    assert (await timed.expires(both)).phase is Phase.QUEUE


@awaited
async def test_a_request_that_was_cancelled_first_is_not_counted_as_expired() -> None:
    """Whoever asked for the end is told that, and so are the metrics."""
    timed = Timed(arrived_s_ago=700)
    timed.clock.cancel(Cancelled())
    with pytest.raises(Cancelled):
        await timed._waits(lambda: None)

    assert timed.told == []


@awaited
async def test_nor_one_that_is_cleaning_up_after_its_cancel_when_the_limit_passes() -> None:
    timed = Timed(queue_s=SHORT_S)

    async def slow() -> None:
        async with timed.clock.running():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(3 * SHORT_S)

    asyncio.get_running_loop().call_soon(timed.clock.cancel, Cancelled())
    with pytest.raises(Cancelled):
        await slow()

    assert timed.told == []


# ── Before any wait ─────────────────────────────────────────────────────────────────────────────


def test_what_is_over_is_told_before_it_waits() -> None:
    timed = Timed(arrived_s_ago=700)
    with pytest.raises(Expired, match="request"):
        timed.clock.check()

    assert timed.told == [Phase.REQUEST]


def test_what_was_cancelled_is_told_before_it_waits() -> None:
    timed = Timed(arrived_s_ago=700)
    timed.clock.cancel(Cancelled())
    with pytest.raises(Cancelled):
        timed.clock.check()

    assert timed.told == []


def test_what_has_time_left_may_wait_whatever_its_body_took() -> None:
    """The wait for a slot begins when one is asked for."""
    timed = Timed(arrived_s_ago=6, queue_s=0)
    timed.clock.check()
    timed.clock.queued(time.monotonic())

    assert timed.told == []


@awaited
async def test_the_wait_for_a_slot_counts_from_when_one_is_asked_for() -> None:
    timed = Timed(arrived_s_ago=6, queue_s=SHORT_S)
    timed.clock.queued(time.monotonic())

    assert (await timed.expires()).phase is Phase.QUEUE
    assert timed.took_s >= SHORT_S - 0.002


def test_no_limit_passes_before_its_time_on_the_loop_that_hive_runs() -> None:
    """uvloop counts in whole milliseconds, and would ring up to one early."""
    took: list[float] = []

    async def expire() -> None:
        for _ in range(50):
            timed = Timed(queue_s=0.0045)
            await timed.expires()
            took.append(timed.took_s)

    uvloop.run(expire())
    assert min(took) >= 0.0045
