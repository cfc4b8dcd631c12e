"""The waiting room against a naive one: cards on a table, searched from the front."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hive.policy.admission import (
    HINT_S,
    HINT_SPREAD,
    REFUSED_KEPT,
    WEIGHT,
    Full,
    Priority,
    Room,
    Ticket,
    affinity,
)

WORKERS = ("a", "b", "c")
SESSIONS = ("s0", "s1", "s2")
picks = st.integers(0, 999)
chances = st.floats(0, 1)
pauses = st.integers(0, 40).map(lambda quarters: quarters / 4)
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


tickets = st.builds(
    lambda priority, session, pinned, avoid: Ticket(
        priority, pinned, session, frozenset() if pinned else avoid
    ),
    st.sampled_from(Priority),
    st.sampled_from([None, *SESSIONS]),
    st.sampled_from([None, None, *WORKERS]),
    st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(WORKERS), max_size=2)),
)


def a_room(slots: int = 1, depth: int = 9, workers: str = "a") -> Room:
    """A room whose workers are all open."""
    room = Room(workers, slots, depth)
    for worker in workers:
        room.open(worker, 0.0)
    return room


def held(room: Room, count: int) -> list[Ticket]:
    """So many new tickets that went in at once."""
    tickets = [Ticket() for _ in range(count)]
    for ticket in tickets:
        assert room.arrive(ticket, 0.0, 0.0)
    return tickets


def waiting(room: Room, *tickets: Ticket) -> None:
    for ticket in tickets:
        assert not room.arrive(ticket, 0.0, 0.0)


def refused(
    room: Room, now: float = 0.0, chance: float = 0.0, ticket: Ticket | None = None
) -> Full:
    with pytest.raises(Full) as full:
        room.arrive(ticket or Ticket(), now, chance)
    return full.value


# ── the naive room ──────────────────────────────────────────────────────────────────────────────


class Table:
    """The same rules played with cards: nothing is kept that can be counted again."""

    def __init__(self, slots: int, depth: int) -> None:
        self.slots, self.depth = slots, depth
        self.open: set[str] = set()
        self.once: set[str] = set()
        self.tried: set[str] = set()  # a single request runs there
        self.queue: list[Ticket] = []  # as they came
        self.places: list[tuple[Ticket, str, float]] = []  # who holds a slot, where, since when
        self.extra: set[Ticket] = set()  # let in beyond the slots, by open_once
        self.held_s: list[float] = []

    def at(self, worker: str) -> set[Ticket]:
        return {ticket for ticket, where, _ in self.places if where == worker}

    def order(self) -> list[Ticket]:
        return [t for priority in sorted(Priority) for t in self.queue if t.priority is priority]

    def opens(self, worker: str, *, once: bool = False) -> None:
        self.closes(worker)
        self.open.add(worker)
        if once:
            self.once.add(worker)

    def closes(self, worker: str) -> None:
        for workers in (self.open, self.once, self.tried):
            workers.discard(worker)

    def who_may_serve(self, ticket: Ticket) -> list[str]:
        return self.of_use(ticket, self.open)

    def of_use(self, ticket: Ticket, workers: set[str]) -> list[str]:
        if ticket.pinned is not None:
            return sorted(workers & {ticket.pinned})
        return sorted(workers - ticket.avoid)

    def free(self, ticket: Ticket) -> list[str]:
        """Where it could go in now."""
        return [
            worker
            for worker in self.who_may_serve(ticket)
            if worker in self.once or len(self.at(worker)) < self.slots
        ]

    def choice(self, ticket: Ticket) -> str:
        free = self.free(ticket)
        if ticket.session is not None:
            ranked = sorted(self.who_may_serve(ticket), key=lambda w: affinity(ticket.session, w))
            if ranked[-1] in free:
                return ranked[-1]
        return min(free, key=lambda worker: len(self.at(worker)))

    def goes_in(self, ticket: Ticket, now: float) -> None:
        worker = self.choice(ticket)
        if len(self.at(worker)) >= self.slots:
            self.extra.add(ticket)
        if worker in self.once:
            self.closes(worker)
            self.tried.add(worker)
        self.places.append((ticket, worker, now))

    def let_in(self, now: float) -> list[Ticket]:
        """Again and again the first in the order who can go."""
        went = []
        while first := next(filter(self.free, self.order()), None):
            self.queue.remove(first)
            self.goes_in(first, now)
            went.append(first)
        return went

    def bound(self) -> int:
        return self.depth * max(1, len(self.open))

    def welcomes(self, ticket: Ticket) -> bool:
        """Whether it would go in or wait, if it came now."""
        has_place = len(self.queue) < self.bound()
        return bool(self.free(ticket) or (self.who_may_serve(ticket) and has_place))

    def mean_s(self) -> float:
        mean = self.held_s[0]
        for held_s in self.held_s[1:]:
            mean = (1 - WEIGHT) * mean + WEIGHT * held_s
        return mean

    def hint_s(self, chance: float) -> float:
        if not self.held_s:
            return HINT_S
        slots = self.slots * max(1, len(self.open))
        return (len(self.queue) + 1) * self.mean_s() / slots * (1 + HINT_SPREAD * chance)


class RoomMachine(RuleBasedStateMachine):
    """Whatever happens, in whatever order, the room does what the table does (R054-R056)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.granted = self.released = 0
        self.gone: list[Ticket] = []  # released, left, refused or turned out
        self.turned_out: list[Ticket] = []
        self.is_shut = False

    @initialize(
        slots=st.integers(1, 2),
        depth=st.integers(0, 3),
        opened=st.sets(st.sampled_from(WORKERS), min_size=1),
        ends=st.booleans(),
    )
    def begin(self, slots: int, depth: int, opened: set[str], ends: bool) -> None:
        self.ends = ends
        self.room = Room(WORKERS, slots, depth)
        self.table = Table(slots, depth)
        for worker in sorted(opened):
            self.opens(worker)

    def went_in(self, tickets: list[Ticket]) -> None:
        """The room let in the same ones as the table, in the same order, to the same workers."""
        assert tickets == self.table.let_in(self.now)
        self.granted += len(tickets)
        for ticket in tickets:
            assert ticket.granted == self.now

    def were_turned_out(self, tickets: list[Ticket]) -> None:
        assert not set(tickets) & set(self.turned_out)
        self.turned_out += tickets
        self.gone += tickets
        for ticket in tickets:
            self.table.queue.remove(ticket)

    @rule(pause_s=pauses)
    def time_passes(self, pause_s: float) -> None:
        self.now += pause_s

    @rule(worker=st.sampled_from(WORKERS))
    def opens(self, worker: str) -> None:
        if not self.is_shut:
            self.table.opens(worker)
        self.went_in(self.room.open(worker, self.now))

    @rule(worker=st.sampled_from(WORKERS))
    def opens_once(self, worker: str) -> None:
        if not self.is_shut:
            self.table.opens(worker, once=True)
        self.went_in(self.room.open_once(worker, self.now))

    @rule(worker=st.sampled_from(WORKERS))
    def closes(self, worker: str) -> None:
        """Who could go nowhere else is turned out; who waits for another worker's probe stays.

        Who avoids all that is left takes that. Not judged here: who came although nobody could
        ever serve it (a door asks `can_serve`).
        """
        table = self.table
        was_of_use = worker in table.open | table.tried
        table.closes(worker)
        left = table.open | table.tried
        stuck = [t for t in table.order() if was_of_use and not table.of_use(t, left)]
        stuck = [t for t in stuck if table.of_use(t, {worker})]
        lost = [t for t in stuck if t.pinned is not None or not left]
        told, granted = self.room.close(worker, self.now)
        assert told == lost
        self.were_turned_out(told)
        self.went_in(granted)

    @precondition(lambda self: self.ends and self.table.queue)
    @rule()
    def shuts(self) -> None:
        self.is_shut = True
        for worker in WORKERS:
            self.table.closes(worker)
        everybody = self.table.order()
        told = self.room.shut()
        assert told == everybody
        self.were_turned_out(told)

    @rule(crowd=st.lists(tickets, min_size=1, max_size=6), chance=chances)
    def some_arrive(self, crowd: list[Ticket], chance: float) -> None:
        for ticket in crowd:
            self.arrives(ticket, chance)

    def arrives(self, ticket: Ticket, chance: float) -> None:
        bound, hint_s = self.table.bound(), self.table.hint_s(chance)
        assert self.room.can_serve(ticket) is bool(self.table.who_may_serve(ticket))
        try:
            went_in = self.room.arrive(ticket, self.now, chance)
        except Full as full:
            assert not self.table.free(ticket)
            assert len(self.table.queue) >= bound
            assert full.reason == ("queue_full" if self.table.depth else "slots_busy")
            assert full.hint_s == pytest.approx(hint_s)
            self.gone.append(ticket)
            return
        assert ticket.arrived == self.now
        assert went_in is bool(self.table.free(ticket))
        if went_in:
            assert ticket.granted == self.now
            self.granted += 1
            self.table.goes_in(ticket, self.now)
        else:
            self.table.queue.append(ticket)
            assert self.room.waiting_count <= bound

    @precondition(lambda self: self.table.queue)
    @rule(pick=picks)
    def leaves(self, pick: int) -> None:
        ticket = self.table.queue.pop(pick % len(self.table.queue))
        self.room.leave(ticket, self.now)
        self.gone.append(ticket)

    @precondition(lambda self: self.table.places)
    @rule(pick=picks)
    def releases(self, pick: int) -> None:
        place = self.table.places.pop(pick % len(self.table.places))
        ticket, _, since = place
        self.table.held_s.append(self.now - since)
        self.released += 1
        self.gone.append(ticket)
        self.went_in(self.room.release(ticket, self.now))

    @precondition(lambda self: self.gone)
    @rule(pick=picks)
    def ends_once_more(self, pick: int) -> None:
        """Who is gone gives nothing back, however often it tries."""
        ticket = self.gone[pick % len(self.gone)]
        assert self.room.release(ticket, self.now) == []
        self.room.leave(ticket, self.now)

    @precondition(lambda self: self.table.queue)
    @rule(pick=picks)
    def releases_without_a_slot(self, pick: int) -> None:
        assert self.room.release(self.table.queue[pick % len(self.table.queue)], self.now) == []

    @precondition(lambda self: self.table.places)
    @rule(pick=picks)
    def leaves_with_a_slot(self, pick: int) -> None:
        """Only a release gives a slot back."""
        self.room.leave(self.table.places[pick % len(self.table.places)][0], self.now)

    @rule()
    def grants(self) -> None:
        self.went_in(self.room.grant(self.now))

    @invariant()
    def the_slots_are_those_of_the_table(self) -> None:
        for worker in WORKERS:
            assert self.room.held[worker] == self.table.at(worker)
            assert self.room.in_flight(worker) == len(self.table.at(worker))
            assert {ticket.worker for ticket in self.room.held[worker]} <= {worker}

    @invariant()
    def no_worker_serves_more_than_its_slots_but_for_the_single_extra(self) -> None:
        for worker in WORKERS:
            assert len(self.room.held[worker] - self.table.extra) <= self.room.slots

    @invariant()
    def permits_are_conserved(self) -> None:
        assert self.granted == self.released + sum(map(len, self.room.held.values()))

    @invariant()
    def who_waits_waits_in_order(self) -> None:
        assert list(self.room.waiting) == self.table.order()
        assert self.room.waiting_count == len(self.table.queue)

    @invariant()
    def nobody_waits_who_could_go_in(self) -> None:
        assert not any(map(self.table.free, self.room.waiting))

    @invariant()
    def nobody_is_where_it_must_not_be(self) -> None:
        for worker, tickets in self.room.held.items():
            assert all(ticket.pinned in {None, worker} for ticket in tickets)
            assert not any(worker in ticket.avoid for ticket in tickets)

    @invariant()
    def who_was_turned_out_is_not_here(self) -> None:
        here = {*self.room.waiting, *(t for tickets in self.room.held.values() for t in tickets)}
        assert here.isdisjoint(self.turned_out)

    @invariant()
    def the_open_workers_are_known(self) -> None:
        assert self.room.open_workers == self.table.open


TestRoom = RoomMachine.TestCase
TestRoom.settings = settings(max_examples=80, stateful_step_count=50)


# ── slots and places ────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 20), st.integers(0, 5), st.integers(1, 3))
def test_as_many_as_there_are_slots_go_in_then_as_many_wait_as_may_and_no_more(
    slots: int, depth: int, count: int
) -> None:
    """Both are settings; the one too many is refused before anything was done (R054-R056)."""
    room = a_room(slots, depth, "abc"[:count])

    held(room, slots * count)
    waiting(room, *(Ticket() for _ in range(depth * count)))
    before = repr(room)

    assert refused(room).reason == ("queue_full" if depth else "slots_busy")
    assert repr(room) == before


def test_the_last_slot_goes_to_exactly_one_of_two() -> None:
    """(Gap-C4, R056)"""
    room = a_room(slots=2, depth=0)
    held(room, 1)

    assert room.arrive(Ticket(), 0.0, 0.0)
    assert refused(room).reason == "slots_busy"


def test_one_may_come_as_soon_as_one_has_left() -> None:
    room = a_room(depth=1)
    [first] = held(room, 1)
    impatient, next_one = Ticket(), Ticket()
    waiting(room, impatient)
    refused(room)

    room.leave(impatient, 0.0)
    waiting(room, next_one)

    assert room.release(first, 0.0) == [next_one]


def test_a_worker_that_ends_takes_its_places_along() -> None:
    """Whoever waited already goes on waiting (R055)."""
    room = a_room(depth=1, workers="ab")
    held(room, 2)
    waiting(room, Ticket(), Ticket())

    assert room.close("b", 0) == ([], [])
    assert room.waiting_count == 2
    refused(room)


def test_the_room_tells_where_everybody_is() -> None:
    room = a_room(workers="ab")
    held(room, 2)
    waiting(room, Ticket())

    assert repr(room) == "<Room held {'a': 1, 'b': 1} waiting 1>"


# ── order ───────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.sampled_from(Priority), max_size=20))
def test_they_go_in_by_arrival_within_priority(priorities: list[Priority]) -> None:
    room = a_room(depth=20)
    [inside] = held(room, 1)
    tickets = [Ticket(priority) for priority in priorities]
    waiting(room, *tickets)

    went: list[Ticket] = []
    while granted := room.release(inside, 0.0):
        [inside] = granted
        went.append(inside)

    assert went == sorted(tickets, key=lambda ticket: ticket.priority)  # sorted is stable


def test_interactive_goes_first_and_batch_last() -> None:
    assert sorted(Priority) == [Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH]


def test_nobody_is_held_up_by_one_who_waits_for_another_worker() -> None:
    room = a_room(workers="ab")
    on_a, on_b = held(room, 2)
    pinned, behind = Ticket(Priority.INTERACTIVE, pinned="a"), Ticket(Priority.BATCH)
    waiting(room, pinned, behind)

    assert room.release(on_b, 0.0) == [behind]
    assert behind.worker == "b"
    assert room.release(on_a, 0.0) == [pinned]
    assert pinned.worker == "a"


def test_a_new_worker_takes_as_many_as_it_has_slots_in_their_order() -> None:
    room = a_room(slots=2)
    room.held["b"] = set()
    held(room, 2)
    first, second, third = Ticket(), Ticket(), Ticket(Priority.INTERACTIVE)
    waiting(room, first, second, third)

    assert room.open("b", 5.0) == [third, first]
    assert (third.worker, third.granted) == ("b", 5.0)
    assert list(room.waiting) == [second]


# ── where they go ───────────────────────────────────────────────────────────────────────────────


def test_the_least_loaded_worker_is_chosen() -> None:
    room = a_room(slots=3, workers="abc")

    assert [ticket.worker for ticket in held(room, 7)] == ["a", "b", "c", "a", "b", "c", "a"]


@pytest.mark.parametrize("ticket", [Ticket(pinned="b"), Ticket(avoid=frozenset("a"))])
def test_who_needs_a_busy_worker_waits_for_it_beside_a_free_one(ticket: Ticket) -> None:
    room = a_room(workers="ab")
    waiter = Ticket(pinned="b")
    assert room.arrive(waiter, 0.0, 0.0)

    assert room.can_serve(ticket)
    assert not room.arrive(ticket, 0.0, 0.0)
    assert room.release(waiter, 1.0) == [ticket]
    assert ticket.worker == "b"


def test_nobody_can_serve_one_that_all_have_failed() -> None:
    room = a_room(workers="ab")

    assert not room.can_serve(Ticket(avoid=frozenset("ab")))
    assert not room.can_serve(Ticket(pinned="c"))


def test_who_loses_its_last_worker_is_told_once_and_the_others_wait_on() -> None:
    room = a_room(workers="ab")
    _, in_b = held(room, 2)
    pinned, avoiding, free = Ticket(pinned="a"), Ticket(avoid=frozenset("b")), Ticket()
    waiting(room, pinned, free, avoiding)

    assert room.close("a", 0) == ([pinned], [])
    assert room.close("a", 0) == ([], [])
    assert list(room.waiting) == [free, avoiding]  # who failed it is better than nobody
    assert room.release(in_b, 0) == [free]
    assert room.release(free, 0) == [avoiding]
    assert avoiding.worker == "b"
    assert room.shut() == []


def test_who_avoids_the_last_worker_takes_its_free_slot() -> None:
    room = a_room(workers="ab")
    in_a, _ = held(room, 2)
    avoiding = Ticket(avoid=frozenset("b"))
    waiting(room, avoiding)
    (in_b,) = room.held["b"]
    room.release(in_b, 0)

    assert in_a.worker == "a"
    assert room.close("a", 0) == ([], [avoiding])


@pytest.mark.parametrize(
    "where", [{"pinned": "a"}, {"avoid": frozenset("b")}], ids=["pinned", "avoiding"]
)
def test_who_waits_for_a_workers_probe_is_not_turned_out_by_anothers_end(
    where: dict[str, Any],
) -> None:
    """Only the probe decides on it."""
    room = a_room(workers="ab")
    held(room, 2)
    first, second = Ticket(**where), Ticket(**where)
    waiting(room, first, second)
    assert room.open_once("a", 0.0) == [first]

    assert room.close("b", 0) == ([], [])
    assert list(room.waiting) == [second]
    assert room.close("a", 0) == ([second], [])


def test_a_room_that_is_shut_stays_shut() -> None:
    """Whatever a worker does: hive is stopping."""
    room = a_room(workers="ab")
    on_a, on_b = held(room, 2)
    waiter = Ticket()
    waiting(room, waiter)
    assert room.shut() == [waiter]

    assert room.open("a", 1.0) == room.open_once("b", 1.0) == []
    assert room.release(on_a, 1.0) == room.release(on_b, 1.0) == room.grant(1.0) == []
    assert room.open_workers == frozenset()
    assert not room.can_serve(Ticket())
    assert waiter.worker is None


def test_what_a_closed_worker_still_serves_goes_on_and_nothing_follows_it() -> None:
    room = a_room(workers="ab")
    on_a, _ = held(room, 2)
    waiting(room, Ticket())
    room.close("a", 0)

    assert room.in_flight("a") == 1
    assert room.release(on_a, 1.0) == []
    assert room.in_flight("a") == 0


# ── one request, to see whether it serves again ─────────────────────────────────────────────────


def test_a_worker_opened_once_takes_exactly_one() -> None:
    """However many slots it has (R009)."""
    room = Room("a", slots=4, depth=0)

    assert room.open_once("a", 0.0) == []
    held(room, 1)
    refused(room)

    assert room.open_workers == frozenset()


def test_it_takes_that_one_though_all_of_its_slots_are_held() -> None:
    """Else requests that hang would keep a worker from being tried."""
    room = a_room(slots=2)
    first, second = held(room, 2)
    room.close("a", 0)

    assert room.open_once("a", 0.0) == []
    assert room.arrive(Ticket(), 0.0, 0.0)
    assert room.in_flight("a") == 3

    room.open("a", 0.0)
    waiter = Ticket()
    waiting(room, waiter)
    assert room.release(first, 0.0) == []
    assert room.release(second, 0.0) == [waiter]


def test_of_those_who_wait_one_goes_in_and_the_others_share_its_fate() -> None:
    well, badly = Room("a", slots=2, depth=9), Room("a", slots=2, depth=9)
    for room, end in ((well, Room.open), (badly, None)):
        first, second = Ticket(), Ticket()
        waiting(room, first, second)
        assert room.open_once("a", 0.0) == [first]
        assert list(room.waiting) == [second]
        assert (end(room, "a", 1.0) if end else room.close("a", 0)[0]) == [second]
        assert second.worker == ("a" if end else None)


# ── the hint ────────────────────────────────────────────────────────────────────────────────────


@given(chances)
def test_the_hint_is_thirty_seconds_until_something_was_measured(chance: float) -> None:
    room = a_room(depth=0)
    held(room, 1)

    assert refused(room, chance=chance).hint_s == HINT_S == 30


@given(
    slots=st.integers(1, 9),
    depth=st.integers(0, 9),
    count=st.integers(1, 3),
    held_s=st.lists(st.floats(0, 1e4), min_size=1, max_size=9),
    chance=chances,
)
def test_the_hint_is_what_the_room_takes_to_drain(
    slots: int, depth: int, count: int, held_s: list[float], chance: float
) -> None:
    """(waiting + 1) x mean seconds of a slot / slots, and up to a quarter more (R040)."""
    room = a_room(slots, depth, "abc"[:count])
    mean_s = held_s[0]
    for seconds in held_s:
        [ticket] = held(room, 1)
        room.release(ticket, seconds)
        mean_s += 0.2 * (seconds - mean_s)
    held(room, slots * count)
    waiting(room, *(Ticket() for _ in range(depth * count)))

    least = (depth * count + 1) * mean_s / (slots * count)
    assert room.hint_s(0.0) == pytest.approx(least)
    assert room.hint_s(1.0) == pytest.approx(1.25 * least)
    assert refused(room, chance=chance).hint_s == pytest.approx(least * (1 + chance / 4))


def test_an_idle_night_does_not_count_as_slow_drain() -> None:
    """Seconds for which a slot is held, not those between two ends."""
    room = a_room()
    for begin in (0.0, 30_000.0, 60_000.0):
        ticket = Ticket()
        room.arrive(ticket, begin, 0.0)
        room.release(ticket, begin + 2.0)

    assert room.hint_s(0.0) == pytest.approx(2.0)


def test_seconds_in_the_waiting_room_are_not_seconds_of_a_slot() -> None:
    room = a_room()
    [first] = held(room, 1)
    second = Ticket()
    waiting(room, second)

    room.release(first, 10.0)
    room.release(second, 20.0)

    assert room.hint_s(0.0) == pytest.approx(10.0)


def test_a_second_release_is_not_measured() -> None:
    room = a_room()
    [ticket] = held(room, 1)
    room.release(ticket, 4.0)

    assert room.release(ticket, 1000.0) == []
    assert room.hint_s(0.0) == 4.0


@pytest.mark.parametrize(
    "free", [lambda room, held, _: room.release(held, 40.0), lambda room, _, t: room.leave(t, 40.0)]
)
def test_a_hint_is_judged_by_the_next_place_that_is_free(
    free: Callable[[Room, Ticket, Ticket], None],
) -> None:
    """Each by the seconds since its own refusal: the first was 10 short, the second 5 too long."""
    room = a_room(depth=1)
    [inside] = held(room, 1)
    waiter = Ticket()
    waiting(room, waiter)
    assert [refused(room, now).hint_s for now in (0.0, 15.0)] == [30.0, 30.0]
    room.leave(inside, 20.0)  # it has a slot and does not wait
    room.release(waiter, 20.0)  # it waits and has no slot
    assert room.hint_errors == []

    free(room, inside, waiter)

    assert room.hint_errors == [10.0, 5.0]


def test_who_gives_nothing_back_judges_no_hint() -> None:
    room = a_room(depth=0)
    [gone] = held(room, 1)
    room.release(gone, 1.0)
    held(room, 1)
    refused(room, 2.0)

    room.release(gone, 3.0)
    room.leave(gone, 3.0)

    assert room.hint_errors == []


def test_a_hint_is_judged_by_a_worker_that_opens() -> None:
    room = Room("ab", slots=1, depth=1)
    room.open("a", 0.0)
    held(room, 1)
    waiter = Ticket()
    waiting(room, waiter)
    refused(room)

    assert room.open("b", 10.0) == [waiter]
    assert room.hint_errors == [20.0]


def test_a_hint_is_judged_by_a_worker_that_takes_one_who_waited() -> None:
    """Its place is free, though the worker takes no more."""
    room = Room("ab", slots=1, depth=1)
    room.open("a", 0.0)
    held(room, 1)
    waiter = Ticket()
    waiting(room, waiter)
    refused(room)

    assert room.open_once("b", 10.0) == [waiter]
    assert room.hint_errors == [20.0]


def test_no_hint_is_judged_while_more_wait_than_may() -> None:
    """A worker that ended took its places along: one slot later a newcomer is still refused."""
    room = a_room(depth=1, workers="ab")
    on_a, _ = held(room, 2)
    first, second = Ticket(), Ticket()
    waiting(room, first, second)
    refused(room)
    room.close("b", 0)

    assert room.release(on_a, 10.0) == [first]
    assert room.hint_errors == []
    refused(room, 10.0)
    assert room.release(first, 25.0) == [second]
    assert room.hint_errors == [5.0, pytest.approx(5.0)]


def test_no_hint_is_judged_while_nobody_is_let_in() -> None:
    """A slot that is given back at a worker that serves nobody is of no use."""
    room = a_room(depth=0)
    [inside] = held(room, 1)
    refused(room)
    room.close("a", 0)

    assert room.release(inside, 10.0) == room.grant(12.0) == []
    assert room.hint_errors == []
    room.open("a", 35.0)
    assert room.hint_errors == [5.0]


def happens(room: Room, table: Table, what: str, pick: int, now: float) -> bool:
    """At both; False if it cannot happen now."""
    worker = WORKERS[pick % len(WORKERS)]
    if what == "ends" and table.places:
        ticket = table.places.pop(pick % len(table.places))[0]
        assert room.release(ticket, now) == table.let_in(now)
    elif what == "leaves" and table.queue:
        room.leave(table.queue.pop(pick % len(table.queue)), now)
    elif what == "grants":
        assert room.grant(now) == table.let_in(now)
    elif what.startswith("opens"):
        opens, is_once = (room.open_once, True) if what == "opens once" else (room.open, False)
        table.opens(worker, once=is_once)
        assert opens(worker, now) == table.let_in(now)
    elif what == "closes" and not any(ticket.pinned for ticket in table.queue):
        table.closes(worker)
        lost, granted = room.close(worker, now)
        for ticket in lost:
            table.queue.remove(ticket)
        assert granted == table.let_in(now)
    else:
        return False
    return True


@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.lists(
        st.tuples(
            pauses,
            st.sampled_from(["leaves", "ends", "grants", "opens", "opens once", "closes"]),
            st.lists(st.sampled_from([None, None, *WORKERS]), max_size=4),
            picks,
        ),
        max_size=30,
    ),
)
def test_every_hint_is_judged_when_a_newcomer_would_not_be_refused_any_more(
    slots: int, depth: int, history: list[tuple[float, str, list[str | None], int]]
) -> None:
    """By each event that lets one in or lets one wait, and by no other."""
    room, table = Room(WORKERS, slots, depth), Table(slots, depth)
    hints: list[tuple[float, float]] = []
    errors: list[float] = []
    now = 0.0
    for pause_s, what, arrivals, pick in [(0.0, "opens", [], 0), *history]:
        now += pause_s
        if happens(room, table, what, pick, now) and table.welcomes(Ticket()):
            errors += [abs(at + hint_s - now) for at, hint_s in hints]
            hints.clear()
        assert room.hint_errors == pytest.approx(errors, abs=1e-6)
        for pinned in arrivals:
            ticket = Ticket(pinned=pinned)
            if not table.welcomes(ticket):
                ticket = Ticket()  # only who would go anywhere is refused here
            if not table.who_may_serve(ticket):
                continue
            try:
                is_in = room.arrive(ticket, now, pick / 999)
            except Full as full:
                hints.append((now, full.hint_s))
            else:
                table.goes_in(ticket, now) if is_in else table.queue.append(ticket)
            assert room.hint_errors == pytest.approx(errors, abs=1e-6)


def test_a_flood_of_refusals_is_not_remembered_whole() -> None:
    room = a_room(depth=0)
    [inside] = held(room, 1)
    for _ in range(REFUSED_KEPT + 5):
        refused(room)

    room.release(inside, 1.0)

    assert room.hint_errors == [29.0] * REFUSED_KEPT


# ── sessions ────────────────────────────────────────────────────────────────────────────────────


def where(room: Room, session: str, now: float = 0.0) -> str | None:
    """Where a request of the session goes while nothing else runs."""
    ticket = Ticket(session=session)
    assert room.arrive(ticket, now, 0.0)
    room.release(ticket, now)
    return ticket.worker


@given(
    workers=st.lists(names, min_size=2, max_size=6, unique=True),
    sessions=st.lists(names, min_size=1, max_size=9),
    pick=picks,
)
def test_the_end_of_a_worker_moves_its_sessions_alone_and_its_return_brings_them_back(
    workers: list[str], sessions: list[str], pick: int
) -> None:
    room = Room(workers, slots=1, depth=0)
    for worker in workers:
        room.open(worker, 0.0)
    ended = workers[pick % len(workers)]
    before = {session: where(room, session) for session in sessions}

    room.close(ended, 0.0)
    for session in sessions:
        assert where(room, session) != ended
        assert before[session] in {ended, where(room, session)}

    room.open(ended, 0.0)
    assert {session: where(room, session) for session in sessions} == before


def test_sessions_spread_evenly_and_so_do_those_of_a_worker_that_ended() -> None:
    room = a_room(workers="abcd")
    sessions = [f"session-{number}" for number in range(4000)]
    before = {session: where(room, session) for session in sessions}
    assert all(900 < count < 1100 for count in Counter(before.values()).values())

    room.close("d", 0)
    moved = Counter(where(room, session) for session in sessions if before[session] == "d")

    assert sum(moved.values()) > 900
    assert set(moved) == set("abc")
    assert all(270 < count < 400 for count in moved.values())


def test_a_session_goes_elsewhere_rather_than_wait_and_returns_when_it_costs_nothing() -> None:
    room = a_room(workers="ab")
    home = where(room, "s")
    assert home is not None
    busy = Ticket(pinned=home)
    assert room.arrive(busy, 0.0, 0.0)

    assert {where(room, "s"), home} == set("ab")
    room.release(busy, 0.0)
    assert where(room, "s") == home


def test_away_from_home_a_session_goes_where_there_is_least_to_do() -> None:
    room = a_room(slots=2, workers="abc")
    home = where(room, "s")
    assert home is not None
    for _ in range(2):
        assert room.arrive(Ticket(pinned=home), 0.0, 0.0)

    for other in {"a", "b", "c"} - {home}:
        busy = Ticket(pinned=other)
        assert room.arrive(busy, 0.0, 0.0)
        assert {where(room, "s"), other, home} == {"a", "b", "c"}
        room.release(busy, 0.0)


def test_a_session_goes_home_though_others_have_less_to_do() -> None:
    room = a_room(slots=3, workers="ab")
    home = where(room, "s")
    for _ in range(2):
        assert room.arrive(Ticket(pinned=home), 0.0, 0.0)

    assert where(room, "s") == home


def test_a_session_leaves_a_worker_that_has_failed_its_request() -> None:
    room = a_room(workers="ab")
    home = where(room, "s")
    assert home is not None
    again = Ticket(session="s", avoid=frozenset({home}))

    assert room.arrive(again, 0.0, 0.0)
    assert {again.worker, home} == set("ab")


@given(names, names, names, names)
def test_no_two_pairs_of_session_and_worker_are_taken_for_one(
    session: str, worker: str, session2: str, worker2: str
) -> None:
    if (session, worker) != (session2, worker2):
        assert affinity(session, worker) != affinity(session2, worker2)
