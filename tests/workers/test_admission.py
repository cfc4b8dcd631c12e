"""A model's door: slots, the waiting room and breakers, by workers that stand still."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import CircuitBreakerOpen, HiveError
from hive.events import (
    Announcer,
    BreakerMoved,
    Event,
    HintJudged,
    RequestAborted,
    RequestRefused,
)
from hive.policy.admission import Priority, Ticket
from hive.policy.breaker import BreakerState
from hive.policy.lifecycle import State
from hive.settings import Breaker
from hive.workers.admission import Door, Permit
from hive.workers.worker import Worker
from tests.patience import awaited, until
from tests.workers.standing import HandPulse, admitted, die, live, move, standing, worker_named

E = TypeVar("E", bound=Event)
COOLDOWN_S = 0.05

uvloop.run(asyncio.sleep(0))  # its first loop opens a pipe of libuv's own, for good


class Entrance:
    """A door, its workers, and everything that it announced."""

    def __init__(
        self, count: int, slots: int, depth: int, failures: int, cooldown_s: float
    ) -> None:
        self.events: list[Event] = []
        announcer = Announcer()
        announcer.listen(self.events.append)
        self.workers = [worker_named(f"m-{number}") for number in range(count)]
        settings = Breaker(failures=failures, cooldown_s=cooldown_s)
        self.door = Door("m", self.workers, slots, depth, settings, announcer, lambda: 0.0)

    @property
    def worker(self) -> Worker:
        return self.workers[0]

    @property
    def pulse(self) -> HandPulse:
        return pulse_of(self.worker)

    @property
    def breaker(self) -> str:
        return self.door.breakers["m-0"].state

    def heard(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def refused(self, ticket: Ticket | None = None) -> HiveError:
        with pytest.raises(HiveError) as caught:
            await admitted(self.door, ticket or Ticket())
        return caught.value

    async def fails(self, times: int) -> None:
        for _ in range(times):
            permit = await admitted(self.door, Ticket())
            permit.judge(fault=True)
            permit.finished()


def pulse_of(worker: Worker) -> HandPulse:
    assert worker.life
    assert isinstance(worker.life.pulse, HandPulse)
    return worker.life.pulse


@asynccontextmanager
async def entrance(
    count: int = 1,
    slots: int = 1,
    depth: int = 8,
    failures: int = 2,
    cooldown_s: float = COOLDOWN_S,
) -> AsyncIterator[Entrance]:
    """A door to READY workers."""
    found = Entrance(count, slots, depth, failures, cooldown_s)
    async with AsyncExitStack() as stack:
        for worker in found.workers:
            await stack.enter_async_context(standing(worker))
        try:
            yield found
        finally:
            found.door.shut()


class Crowd:
    """Requests that wait at a door, each in a task of its own."""

    def __init__(self, door: Door, tasks: asyncio.TaskGroup) -> None:
        self._door, self._tasks = door, tasks
        self.waiting: dict[str, asyncio.Task[Permit | BaseException]] = {}
        self.order: list[str] = []  # in which they went in

    async def comes(self, name: str, **ticket: Any) -> None:
        """It has arrived, and waits where it must, before this returns."""

        async def ask() -> Permit | BaseException:
            try:
                permit = await admitted(self._door, Ticket(**ticket))
            except HiveError as error:
                return error
            self.order.append(name)
            return permit

        self.waiting[name] = self._tasks.create_task(ask(), name=name)
        await asyncio.sleep(0)

    async def got(self, name: str) -> Permit:
        permit = await self.waiting[name]
        assert isinstance(permit, Permit)
        return permit

    async def told(self, name: str) -> HiveError:
        error = await self.waiting[name]
        assert isinstance(error, HiveError)
        return error


# ── Slots and the waiting room ──────────────────────────────────────────────────────────────────


@awaited
async def test_a_free_slot_is_given_at_once() -> None:
    async with entrance(slots=2) as it:
        permits = [await admitted(it.door, Ticket()) for _ in range(2)]

        assert (it.door.in_flight, it.door.waiting) == (2, 0)
        assert permits[0].life is it.worker.life
        assert repr(permits[0]) == "<Permit m-0>"
        assert repr(it.door) == "<Door m 2 in, 0 waiting>"
        for permit in permits:
            permit.finished()
        assert it.door.in_flight == it.worker.in_flight == 0
        assert repr(permits[0]) == "<Permit m-0 closed>"


@awaited
async def test_the_last_slot_goes_to_exactly_one_of_two() -> None:
    """(Gap-C4)"""
    async with entrance(depth=0) as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        await crowd.comes("a")
        await crowd.comes("b")

        assert (await crowd.got("a")).worker is it.worker
        assert (await crowd.told("b")).status == 503


@awaited
async def test_without_a_place_it_is_refused_at_once_with_the_numbers() -> None:
    """Before anything was forwarded (R040, R055, R056, R057, R058)."""
    async with entrance(count=2, slots=2, depth=1) as it, asyncio.TaskGroup() as tasks:
        for _ in range(4):
            await admitted(it.door, Ticket())
        crowd = Crowd(it.door, tasks)
        await crowd.comes("a")
        await crowd.comes("b")
        error = await it.refused()
        it.door.shut()

    assert error.message == "Worker at maximum capacity"
    assert (error.status, error.code) == (503, "SERVICE_UNAVAILABLE")
    assert error.retry_after_s == 30
    assert error.details["reason"] == "queue_full"
    assert error.public_details["current_requests"] == 4
    assert error.public_details["max_concurrent"] == 4
    assert error.public_details["resource_info"] == {
        "slots_total": 4,
        "slots_busy": 4,
        "waiting": 2,
        "queue_depth": 1,
    }
    assert it.heard(RequestRefused)[0].reason == "queue_full"


@awaited
async def test_where_nobody_may_wait_the_slots_are_busy() -> None:
    async with entrance(depth=0) as it:
        await admitted(it.door, Ticket())

        assert (await it.refused()).details["reason"] == "slots_busy"
        assert it.heard(RequestRefused) == [RequestRefused("m", "slots_busy")]


@awaited
async def test_who_waits_goes_in_by_arrival_within_priority() -> None:
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        await crowd.comes("first")
        await crowd.comes("batch", priority=Priority.BATCH)
        await crowd.comes("a")
        await crowd.comes("b")
        await crowd.comes("urgent", priority=Priority.INTERACTIVE)
        assert it.door.waiting == 4
        for name in ("first", "urgent", "a", "b", "batch"):
            (await crowd.got(name)).finished()

    assert crowd.order == ["first", "urgent", "a", "b", "batch"]
    assert it.door.in_flight == 0


@awaited
async def test_how_far_off_a_hint_was_is_told_when_a_place_is_free() -> None:
    async with entrance(depth=0) as it:
        permit = await admitted(it.door, Ticket())
        error = await it.refused()
        assert it.heard(HintJudged) == []
        permit.finished()
        (judged,) = it.heard(HintJudged)

    assert error.retry_after_s == 30
    assert judged.model == "m"
    assert 0 <= 30 - judged.error_s < 30


@awaited
async def test_a_session_goes_to_the_same_worker_while_it_has_a_slot() -> None:
    async with entrance(count=4, slots=2) as it:
        found = set()
        for _ in range(6):
            permit = await admitted(it.door, Ticket(session="abc"))
            found.add(permit.worker.id)
            permit.finished()

        assert len(found) == 1


@awaited
async def test_whoever_waited_too_long_is_told_when_to_come_back() -> None:
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        error = it.door.queue_timeout(5)
        permit.finished()

    assert (error.code, error.details["reason"]) == ("SERVICE_UNAVAILABLE", "queue_timeout")
    assert (error.details["phase"], error.details["timeout_seconds"]) == ("queue", 5)
    assert error.retry_after_s == 30
    assert it.heard(RequestRefused) == [RequestRefused("m", "queue_timeout")]


# ── Leaving while one waits ─────────────────────────────────────────────────────────────────────


@awaited
async def test_who_leaves_while_it_waits_frees_its_place_at_once() -> None:
    async with entrance(depth=1) as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        await crowd.comes("in")
        await crowd.comes("waits")
        assert (await it.refused()).details["reason"] == "queue_full"
        crowd.waiting["waits"].cancel()
        await asyncio.wait([crowd.waiting["waits"]])

        assert it.door.waiting == 0
        await crowd.comes("next")
        (await crowd.got("in")).finished()
        (await crowd.got("next")).finished()

    assert it.door.in_flight == 0


@awaited
async def test_who_leaves_in_the_moment_in_which_it_is_let_in_gives_its_slot_back() -> None:
    """Cancelled after the slot was given, before its task ran."""
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        first = await admitted(it.door, Ticket())
        await crowd.comes("a")
        await crowd.comes("b")
        first.finished()
        assert it.door.in_flight == 1
        crowd.waiting["a"].cancel()

        (await crowd.got("b")).finished()
        assert crowd.order == ["b"]
        assert crowd.waiting["a"].cancelled()

    assert (it.door.in_flight, it.door.waiting) == (0, 0)


@awaited
async def test_who_leaves_in_the_moment_in_which_it_is_turned_away_leaves_nothing() -> None:
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        permit = await admitted(it.door, Ticket())
        await crowd.comes("a")
        move(it.worker, State.DRAINING)
        crowd.waiting["a"].cancel()
        await asyncio.wait([crowd.waiting["a"]])
        permit.finished()

    assert (it.door.in_flight, it.door.waiting) == (0, 0)


@awaited
async def test_who_leaves_just_before_a_slot_is_free_is_not_let_in() -> None:
    """Cancelled, and before its task ran the slot was given: to the next one."""
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        first = await admitted(it.door, Ticket())
        await crowd.comes("a")
        await crowd.comes("b")
        crowd.waiting["a"].cancel()
        first.finished()

        (await crowd.got("b")).finished()
        assert crowd.waiting["a"].cancelled()

    assert (it.door.in_flight, it.door.waiting) == (0, 0)


@awaited
async def test_who_leaves_just_before_its_worker_goes_stops_nobody() -> None:
    """The worker's own task would end with it, and hive with that."""
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        permit = await admitted(it.door, Ticket())
        await crowd.comes("a")
        crowd.waiting["a"].cancel()
        move(it.worker, State.DRAINING)
        permit.finished()

    assert (it.door.in_flight, it.door.waiting) == (0, 0)


# ── Permits ─────────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_an_answer_that_came_to_its_end_frees_its_slot() -> None:
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        permit.began(3)
        assert it.pulse.open_weight == 3
        permit.finished()

        assert it.pulse.open_weight == 0
        assert it.door.in_flight == 0
        assert it.heard(RequestAborted) == []


@awaited
async def test_an_abort_holds_its_slot_until_the_engine_has_stopped_too() -> None:
    """(R050)"""
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        permit = await admitted(it.door, Ticket())
        permit.began(2)
        await crowd.comes("next")
        permit.aborted("r1")

        assert (it.pulse.open_weight, it.pulse.aborted_weight) == (0, 2)
        assert (it.door.in_flight, crowd.order) == (1, [])
        assert it.heard(RequestAborted) == []
        it.pulse.confirm()
        assert (await crowd.got("next")).worker is it.worker
        (told,) = it.heard(RequestAborted)

    assert (told.request_id, told.model, told.worker) == ("r1", "m", "m-0")
    assert told.confirmed == "yes"
    assert 0 <= told.seconds < 60


@pytest.mark.parametrize("confirmed", ["yes", "unknown"])
@awaited
async def test_an_aborts_end_is_told_as_the_engine_told_it(confirmed: str) -> None:
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        permit.began(1)
        permit.aborted("r1")
        it.pulse.confirm(confirmed)

        assert [event.confirmed for event in it.heard(RequestAborted)] == [confirmed]
        assert it.door.in_flight == 0


@awaited
async def test_an_abort_that_is_never_confirmed_ends_with_its_engine() -> None:
    """No slot outlives the processes that it stands for (R051)."""
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        permit.began(1)
        permit.aborted("r1")
        assert it.door.in_flight == 1
        await die(it.worker)

        assert it.door.in_flight == it.door.room.in_flight("m-0") == 0
        assert [event.confirmed for event in it.heard(RequestAborted)] == ["yes"]


@awaited
async def test_what_was_never_sent_needs_no_confirmation() -> None:
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        permit.aborted("r1")

        assert it.door.in_flight == 0
        assert it.heard(RequestAborted) == []


@awaited
async def test_an_abort_after_the_end_changes_nothing() -> None:
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        permit.began(1)
        permit.finished()
        permit.aborted("r1")

        assert (it.pulse.open_weight, it.pulse.aborted_weight) == (0, 0)
        assert it.door.in_flight == 0
        assert it.heard(RequestAborted) == []


@awaited
async def test_a_slot_of_an_earlier_life_is_no_slot_of_the_next_ones() -> None:
    async with entrance(slots=2) as it:
        old = await admitted(it.door, Ticket())
        old.began(1)
        await die(it.worker)
        await live(it.worker)
        new = await admitted(it.door, Ticket())
        new.began(1)
        old.finished()

        assert new.life is not old.life
        assert it.pulse.open_weight == 1
        assert it.door.in_flight == 1
        new.finished()
        assert it.door.in_flight == 0


@given(st.lists(st.sampled_from(["finished", "aborted", "broke off"]), min_size=1, max_size=6))
def test_the_first_end_of_a_permit_counts_and_every_other_does_nothing(ends: list[str]) -> None:
    """In any order, as often as one likes: the engine's count stays right (R050, R153)."""

    async def story() -> None:
        async with entrance(slots=2) as it:
            other = await admitted(it.door, Ticket())
            other.began(3)
            permit = await admitted(it.door, Ticket())
            permit.began(2)

            def end() -> None:
                for how in ends:
                    if how == "finished":
                        permit.finished()
                    else:
                        permit.aborted("r1" if how == "aborted" else None)

            end()
            is_held = ends[0] != "finished"
            assert it.pulse.open_weight == 3
            assert it.pulse.aborted_weight == 2 * is_held
            assert it.door.in_flight == 1 + is_held
            if is_held:
                it.pulse.confirm()
            end()
            assert (it.pulse.open_weight, it.pulse.aborted_weight) == (3, 0)
            assert it.door.in_flight == it.door.room.in_flight("m-0") == 1
            assert len(it.heard(RequestAborted)) == (ends[0] == "aborted")

    asyncio.run(story())


@awaited
async def test_what_the_engine_broke_off_itself_is_no_cancellation() -> None:
    """Its slot is held until the engine confirms, as for one that was cancelled."""
    async with entrance() as it:
        permit = await admitted(it.door, Ticket())
        permit.began(1)
        permit.aborted(None)
        assert (it.door.in_flight, it.pulse.aborted_weight) == (1, 1)
        it.pulse.confirm()

        assert it.door.in_flight == 0
        assert it.heard(RequestAborted) == []


# ── Workers that come and go ────────────────────────────────────────────────────────────────────


@awaited
async def test_when_a_worker_is_ready_again_nobody_is_left_outside() -> None:
    async with entrance(count=2) as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        await die(it.workers[1])
        await crowd.comes("a")
        await crowd.comes("b")
        assert it.door.waiting == 1
        await live(it.workers[1])

        assert (await crowd.got("b")).worker.id == "m-1"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.DRAINING, "draining"),
        (State.STOPPING, "worker_stopped"),
        (State.LOST, "worker_failed"),
    ],
)
@awaited
async def test_who_waits_for_a_worker_that_goes_is_told_why_at_once(
    state: State, reason: str
) -> None:
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        permit = await admitted(it.door, Ticket())
        await crowd.comes("a")
        move(it.worker, state)

        assert (await crowd.told("a")).details["reason"] == reason
        assert it.heard(RequestRefused) == [RequestRefused("m", reason)]
        permit.finished()
    assert it.door.in_flight == 0


@awaited
async def test_while_another_worker_serves_whoever_waits_goes_on_waiting() -> None:
    async with entrance(count=2) as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        held = [await admitted(it.door, Ticket()) for _ in range(2)]
        await crowd.comes("a")
        await crowd.comes("pinned", pinned="m-0")
        await die(it.workers[0])
        assert (await crowd.told("pinned")).details["reason"] == "worker_stopped"
        assert it.door.waiting == 1
        next(permit for permit in held if permit.worker.id == "m-1").finished()

        assert (await crowd.got("a")).worker.id == "m-1"


@awaited
async def test_when_hive_stops_everybody_who_waits_is_told_and_nobody_goes_in() -> None:
    async with entrance() as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        permit = await admitted(it.door, Ticket())
        for name in ("a", "b"):
            await crowd.comes(name)
        it.door.shut()
        for name in ("a", "b"):
            error = await crowd.told(name)
            assert (error.details["reason"], error.retry_after_s) == ("draining", 30)
        permit.finished()
        move(it.worker, State.READY)

        assert (await it.refused()).details["reason"] == "draining"
    assert it.door.in_flight == 0


@awaited
async def test_who_avoids_the_only_worker_that_serves_gets_it_after_all() -> None:
    """Who failed it before is better than nobody."""
    async with entrance(count=2) as it:
        await die(it.workers[1], State.LOADING)
        permit = await admitted(it.door, Ticket(avoid=frozenset({"m-0"})))

        assert permit.worker.id == "m-0"


@awaited
async def test_who_waits_avoiding_a_worker_is_not_told_of_a_breaker_that_is_closed() -> None:
    async with entrance(count=2) as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        held = [await admitted(it.door, Ticket()) for _ in range(2)]
        await crowd.comes("a", avoid=frozenset({"m-0"}))
        await die(it.workers[1], State.LOADING)
        for permit in held:
            permit.finished()
        told = await crowd.waiting["a"]
        assert not isinstance(told, HiveError) or told.code != "CIRCUIT_BREAKER_OPEN"


# ── Breakers ────────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_worker_that_failed_so_often_in_a_row_is_not_asked_for_a_while() -> None:
    """Refused at once, with the numbers and the time (R006, R007, R011)."""
    async with entrance(failures=5, cooldown_s=60, slots=8) as it:
        await it.fails(4)
        assert it.heard(BreakerMoved) == []
        await it.fails(1)
        error = await it.refused()

    assert isinstance(error, CircuitBreakerOpen)
    assert error.public_details == {
        "failure_count": 5,
        "failure_threshold": 5,
        "cooldown_seconds": 60,
        "state": "open",
        "model": "m",
    }
    assert error.retry_after_s
    assert 59 < error.retry_after_s <= 60
    assert "Wait for cooldown" in error.suggested_action
    assert it.heard(BreakerMoved) == [BreakerMoved("m", "m-0", "closed", "open", 5)]
    assert it.heard(RequestRefused) == [RequestRefused("m", "circuit_breaker_open")]


@awaited
async def test_a_success_resets_the_count_and_what_says_nothing_does_not() -> None:
    """(R006)"""
    async with entrance(failures=2, slots=8) as it:
        for fault in (True, False, True, None):
            permit = await admitted(it.door, Ticket())
            permit.judge(fault=fault)
            permit.finished()
        assert it.breaker == BreakerState.CLOSED
        await it.fails(1)

        assert it.breaker == BreakerState.OPEN


@awaited
async def test_an_attempt_is_judged_once() -> None:
    async with entrance(failures=2) as it:
        permit = await admitted(it.door, Ticket())
        for _ in range(5):
            permit.judge(fault=True)
        permit.finished()

        assert it.door.breakers["m-0"].count == 1


@awaited
async def test_whoever_waits_for_a_worker_whose_breaker_opens_is_told() -> None:
    """(R007)"""
    async with entrance(failures=1, cooldown_s=60) as it, asyncio.TaskGroup() as tasks:
        crowd = Crowd(it.door, tasks)
        permit = await admitted(it.door, Ticket())
        await crowd.comes("a")
        permit.judge(fault=True)

        assert (await crowd.told("a")).code == "CIRCUIT_BREAKER_OPEN"
        permit.finished()
    assert (it.door.in_flight, it.door.waiting) == (0, 0)


@awaited
async def test_other_workers_of_the_model_are_asked_meanwhile() -> None:
    async with entrance(count=2, failures=1, cooldown_s=60, slots=4) as it:
        await it.fails(1)

        for _ in range(3):
            assert (await admitted(it.door, Ticket())).worker.id == "m-1"
        assert (await it.refused(Ticket(pinned="m-0"))).code == "CIRCUIT_BREAKER_OPEN"


@asynccontextmanager
async def half_open(**options: Any) -> AsyncIterator[tuple[Entrance, Permit]]:
    """A breaker whose pause is over, and its one probe on its way."""
    async with entrance(failures=1, **options) as it:
        await it.fails(1)
        await until(lambda: it.door.room.open_workers, "the pause to be over")
        yield it, await admitted(it.door, Ticket())


@awaited
async def test_after_the_pause_exactly_one_request_is_let_through() -> None:
    """(R008, R009)"""
    async with half_open(slots=4) as (it, probe):
        assert it.breaker == BreakerState.HALF_OPEN
        errors = [await it.refused() for _ in range(5)]
        probe.finished()

    assert {error.code for error in errors} == {"CIRCUIT_BREAKER_OPEN"}
    assert {error.details["state"] for error in errors} == {"half_open"}


@awaited
async def test_one_success_closes_it() -> None:
    """(R010)"""
    async with half_open(slots=2) as (it, probe):
        probe.judge(fault=False)
        assert it.breaker == BreakerState.CLOSED
        permits = [await admitted(it.door, Ticket())]
        probe.finished()
        permits.append(await admitted(it.door, Ticket()))

        assert len(permits) == 2
        assert [(event.old, event.new) for event in it.heard(BreakerMoved)] == [
            ("closed", "open"),
            ("open", "half_open"),
            ("half_open", "closed"),
        ]


@awaited
async def test_one_failure_opens_it_again_and_the_pause_begins_anew() -> None:
    """(R010)"""
    async with half_open() as (it, probe):
        probe.judge(fault=True)
        probe.finished()
        assert it.breaker == BreakerState.OPEN
        error = await it.refused()
        assert error.retry_after_s
        assert it.door.breakers["m-0"].count == 2
        await until(lambda: it.door.room.open_workers, "the second pause to be over")

        await admitted(it.door, Ticket())
        assert it.breaker == BreakerState.HALF_OPEN


@pytest.mark.parametrize("how", ["judged", "finished", "aborted"])
@awaited
async def test_a_probe_that_says_nothing_lets_the_next_one_through(how: str) -> None:
    async with half_open() as (it, probe):
        probe.began(1)
        if how == "judged":
            probe.judge(fault=None)
        elif how == "finished":
            probe.finished()
        else:
            probe.aborted("r1")
            assert it.door.room.open_workers == frozenset()
            it.pulse.confirm()
        await admitted(it.door, Ticket())

        assert it.breaker == BreakerState.HALF_OPEN
        assert (await it.refused()).code == "CIRCUIT_BREAKER_OPEN"


@awaited
async def test_late_news_of_an_earlier_request_is_not_the_probes() -> None:
    """(R009)"""
    async with entrance(failures=1, slots=4) as it:
        early = [await admitted(it.door, Ticket()) for _ in range(3)]
        early[0].judge(fault=True)
        await until(lambda: it.door.room.open_workers, "the pause to be over")
        await admitted(it.door, Ticket())
        early[1].judge(fault=False)
        early[2].judge(fault=True)

        assert it.breaker == BreakerState.HALF_OPEN
        assert it.door.room.open_workers == frozenset()


@awaited
async def test_a_new_process_begins_with_a_closed_breaker() -> None:
    async with entrance(failures=1, cooldown_s=60) as it:
        await it.fails(1)
        await die(it.worker)
        assert (await it.refused()).code == "SERVICE_UNAVAILABLE"
        await live(it.worker)

        assert it.breaker == BreakerState.CLOSED
        await admitted(it.door, Ticket())
        assert it.heard(BreakerMoved)[-1].new == "closed"


@awaited
async def test_the_pause_of_a_worker_that_went_opens_nothing() -> None:
    async with entrance(failures=1) as it:
        await it.fails(1)
        await die(it.worker)
        await live(it.worker)
        await it.fails(1)
        at = it.door.breakers["m-0"].opened_at
        await until(lambda: it.door.room.open_workers, "the pause to be over")

        assert it.door.breakers["m-0"].retry_in_s(at + COOLDOWN_S) == 0
        assert asyncio.get_running_loop().time() - at >= COOLDOWN_S - 0.002


@awaited
async def test_when_hive_stops_no_probe_goes_any_more() -> None:
    async with entrance(failures=1, cooldown_s=0.01) as it:
        await it.fails(1)
        it.door.shut()

        assert it.door._cooling == {}
        assert (await it.refused()).details["reason"] == "draining"


def test_the_pause_is_over_when_its_timer_rings_even_a_little_early() -> None:
    """uvloop's timers count whole milliseconds of a clock that it reads once a turn."""

    async def story() -> None:
        async with entrance(failures=1, cooldown_s=0.0105) as it:
            for _ in range(50):
                permit = await admitted(it.door, Ticket())
                permit.judge(fault=True)
                permit.finished()
                await until(lambda: it.door.room.open_workers, "the pause to be over")
                probe = await admitted(it.door, Ticket())
                probe.judge(fault=False)
                probe.finished()

    uvloop.run(story())


@awaited
async def test_a_late_fault_of_an_earlier_life_is_not_the_new_ones() -> None:
    async with entrance(failures=1, cooldown_s=60) as it:
        permit = await admitted(it.door, Ticket())
        await die(it.worker)
        await live(it.worker)
        permit.judge(fault=True)
        permit.finished()

        assert it.breaker is BreakerState.CLOSED
        assert await admitted(it.door, Ticket())


@awaited
async def test_a_late_probe_of_an_earlier_life_does_not_shut_the_new_one() -> None:
    async with half_open() as (it, probe):
        await die(it.worker)
        await live(it.worker)
        probe.finished()  # its answer was on its way to a slow client, say
        for _ in range(3):
            (await admitted(it.door, Ticket())).finished()


# ── Conservation ────────────────────────────────────────────────────────────────────────────────


class Play:
    """Requests and workers that do at random what they can; everything is counted."""

    def __init__(self, it: Entrance, tasks: asyncio.TaskGroup) -> None:
        self.it = it
        self.crowd = Crowd(it.door, tasks)
        self.names = iter(range(1000))
        self.permits: list[Permit] = []  # open ones
        self.aborted: list[Permit] = []  # … whose abort is not confirmed

    def act(self, what: str, which: int) -> None:
        """At once, without a turn of the loop."""
        worker = self.it.workers[which % 2]
        match what:
            case "finish" | "abort" | "well" | "fault" | "neutral" if self.permits:
                self.end(what, self.permits[which % len(self.permits)])
            case "confirm" if worker.life and pulse_of(worker).aborted_weight:
                pulse_of(worker).confirm()
            case "leave" if self.waiting:
                self.waiting[which % len(self.waiting)].cancel()
            case "drain" if worker.state is State.READY:
                move(worker, State.DRAINING)
            case "undrain" if worker.state is State.DRAINING:
                move(worker, State.READY)

    def end(self, what: str, permit: Permit) -> None:
        if what in ("well", "fault", "neutral"):
            permit.judge(fault={"well": False, "fault": True, "neutral": None}[what])
            return
        self.permits.remove(permit)
        if what == "finish":
            permit.finished()
        else:
            self.aborted.append(permit)
            permit.aborted("r")

    @property
    def waiting(self) -> list[asyncio.Task[Permit | BaseException]]:
        return [task for task in self.crowd.waiting.values() if not task.done()]

    async def settle(self) -> None:
        """Let everybody hear what happened; then everything must add up."""
        for _ in range(5):
            await asyncio.sleep(0)
        for name, task in list(self.crowd.waiting.items()):
            if task.done():
                del self.crowd.waiting[name]
                if not task.cancelled() and isinstance(permit := task.result(), Permit):
                    permit.began(2)
                    self.permits.append(permit)
        self.aborted = [permit for permit in self.aborted if "closed" not in repr(permit)]
        door, room = self.it.door, self.it.door.room
        assert door.in_flight == len(self.permits) + len(self.aborted)
        assert door.waiting == len(self.waiting) == len(door._futures)
        for worker in self.it.workers:
            assert worker.in_flight == room.in_flight(worker.id)
            alive = [p for p in self.permits if p.life is worker.life]
            if worker.life:
                assert pulse_of(worker).open_weight == 2 * len(alive)
                waits = [permit for permit in self.aborted if permit.life is worker.life]
                assert pulse_of(worker).aborted_weight == 2 * len(waits)

    async def over(self) -> None:
        """Everything ends in some way: nothing is held, nobody waits."""
        for worker in self.it.workers:
            await die(worker)
        self.it.door.shut()
        await self.settle()
        for permit in list(self.permits):
            self.end("finish", permit)
        await self.settle()

        assert (self.permits, self.aborted, self.waiting) == ([], [], [])
        assert self.it.door.room.held == {"m-0": set(), "m-1": set()}


COMES = ("come", "come urgently", "come pinned")
ACTS = (
    *COMES,
    "finish",
    "abort",
    "confirm",
    "leave",
    "fault",
    "well",
    "neutral",
    "drain",
    "undrain",
    "die",
    "settle",
)
# Mostly a full house: then the moments in which somebody leaves or is let in matter.
OFTEN = ("come", "come", "come", "finish", "leave")
STORY = st.lists(st.tuples(st.sampled_from(ACTS + OFTEN), st.integers(0, 7)), max_size=60)
FULL = [("come", number) for number in range(6)] + [("settle", 0)]


async def play(story: list[tuple[str, int]], *, in_one_moment: bool) -> None:
    """`in_one_moment`: much happens between two turns of the loop."""
    async with (
        entrance(count=2, slots=1, depth=2, cooldown_s=1e-6) as it,
        asyncio.TaskGroup() as tasks,
    ):
        playing = Play(it, tasks)
        for what, which in FULL + story:
            worker = it.workers[which % 2]
            if what in COMES:
                pinned = worker.id if what == "come pinned" else None
                priority = Priority.INTERACTIVE if what == "come urgently" else Priority.NORMAL
                await playing.crowd.comes(
                    str(next(playing.names)), pinned=pinned, priority=priority
                )
            elif what == "die":
                if worker.life:
                    await die(worker)
                else:
                    await live(worker)
            else:
                playing.act(what, which)
            if what == "settle" or not in_one_moment:
                await playing.settle()
        await playing.settle()
        await playing.over()


@given(STORY)
def test_whatever_happens_every_slot_that_was_given_comes_back(
    story: list[tuple[str, int]],
) -> None:
    asyncio.run(play(story, in_one_moment=False))


@given(STORY)
def test_also_when_much_happens_in_one_moment(story: list[tuple[str, int]]) -> None:
    asyncio.run(play(story, in_one_moment=True))
