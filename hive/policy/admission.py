"""Who may go in, who waits, who is refused: the slots and the waiting room of one model.

Pure: no clock, no loop; every call takes the monotonic time. A slot is one HTTP request at a
worker, from its grant until its answer ended or its abort was confirmed. Whoever waits is ordered
by arrival within priority (R054-R056; contract, Errors, for the hint).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

WEIGHT = 0.2  # of a new measurement in the moving average of what a slot is held for
HINT_S = 30.0  # until something was measured
HINT_SPREAD = 0.25  # so that those who were refused together do not come back together
REFUSED_KEPT = 1000  # refusals whose hint is not judged yet; more are not judged at all


class Priority(IntEnum):
    """The order in the waiting room; a lower number goes first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(slots=True, eq=False)
class Ticket:
    """One request: it waits, then holds a slot of `worker`. Times are monotonic seconds."""

    priority: Priority = Priority.NORMAL
    pinned: str | None = None  # the only worker that can serve it
    session: str | None = None  # its requests go to the same worker where that costs nothing
    avoid: frozenset[str] = frozenset()  # workers that have failed it already
    arrived: float = 0.0
    worker: str | None = None
    granted: float = 0.0


class Full(Exception):
    """There is no place; `reason` is slots_busy (nobody may wait) or queue_full."""

    def __init__(self, reason: str, hint_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint_s = hint_s


class Room:
    """All slots and places of one model. Permits are conserved: what is granted is released once.

    `slots` is what each worker serves at once, `depth` how many may wait for each open worker.
    """

    def __init__(self, workers: Iterable[str], slots: int, depth: int) -> None:
        self.slots, self.depth = slots, depth
        self.held: dict[str, set[Ticket]] = {worker: set() for worker in workers}
        # |hint - seconds until a place was next free|, for whoever takes them away
        self.hint_errors: list[float] = []
        self._open: set[str] = set()
        self._tried: set[str] = set()  # that one request was let in to; nobody else is meanwhile
        self._is_shut = False
        self._once: set[str] = set()  # of these one request more is let in, whatever is held
        self._waiting: dict[Priority, OrderedDict[Ticket, None]] = {
            priority: OrderedDict() for priority in Priority
        }
        self._held_s: float | None = None  # moving average
        self._judged: list[tuple[float, float]] = []  # when refused, and the hint

    # ── workers ─────────────────────────────────────────────────────────────────────────────────

    @property
    def open_workers(self) -> frozenset[str]:
        return frozenset(self._open)

    def open(self, worker: str, now: float) -> list[Ticket]:
        """The worker takes requests from now on; the tickets that go in at once."""
        if self._is_shut:
            return []
        self._forget(worker)
        self._open.add(worker)
        return self.grant(now)

    def open_once(self, worker: str, now: float) -> list[Ticket]:
        """The worker takes one request, to see whether it serves again; who goes in at once."""
        if self._is_shut:
            return []
        self._forget(worker)
        self._open.add(worker)
        self._once.add(worker)
        return self.grant(now)

    def close(self, worker: str, now: float) -> tuple[list[Ticket], list[Ticket]]:
        """It takes no more; the tickets that wait for nothing now, and have left the room, and
        those that go in elsewhere, where they would not before.

        What holds a slot of it goes on until it is released. Who may be served by a worker that is
        being tried (`open_once`) waits for what comes of that.
        """
        was_of_use = worker in self._open | self._tried
        self._forget(worker)
        lost = []
        for ticket in self.waiting if was_of_use else ():
            if self._may(ticket, worker) and not self._has_use(ticket):
                ticket.avoid = frozenset()  # who failed it before is better than nobody
                if not self._has_use(ticket):
                    lost.append(ticket)
        for ticket in lost:
            del self._waiting[ticket.priority][ticket]
        return lost, self.grant(now)

    def shut(self) -> list[Ticket]:
        """Nobody goes in any more, for good: every ticket that waited has left the room."""
        self._is_shut = True
        for worker in self.held:
            self._forget(worker)
        lost = list(self.waiting)
        for places in self._waiting.values():
            places.clear()
        return lost

    # ── tickets ─────────────────────────────────────────────────────────────────────────────────

    @property
    def waiting(self) -> Iterator[Ticket]:
        """Whoever waits, in the order in which they go in."""
        for places in self._waiting.values():
            yield from places

    @property
    def waiting_count(self) -> int:
        count = 0
        for places in self._waiting.values():
            count += len(places)
        return count

    def can_serve(self, ticket: Ticket) -> bool:
        """Whether any open worker may serve it, now or when it has a free slot."""
        if ticket.pinned is None and not ticket.avoid:
            return bool(self._open)
        return bool(self._candidates(ticket))

    def arrive(self, ticket: Ticket, now: float, chance: float) -> bool:
        """True: it has a slot; False: it waits, for a worker that `can_serve` it.

        Raises Full; `chance` (0 to 1) spreads the hint.
        """
        ticket.arrived = now
        if self._grant_one(ticket, now):
            return True
        if not self._has_place():
            hint_s = self.hint_s(chance)
            if len(self._judged) < REFUSED_KEPT:
                self._judged.append((now, hint_s))
            raise Full("slots_busy" if self.depth == 0 else "queue_full", hint_s)
        self._waiting[ticket.priority][ticket] = None
        return False

    def leave(self, ticket: Ticket, now: float) -> None:
        """It waits no longer: its place is free at once. Does nothing for one that is not there."""
        places = self._waiting[ticket.priority]
        if ticket in places:
            del places[ticket]
            self._judge_hints(now)

    def release(self, ticket: Ticket, now: float, *, was_used: bool = True) -> list[Ticket]:
        """It gives its slot back; the tickets that go in for it. A second call does nothing.

        How long a slot is held is learnt from those that `was_used`.
        """
        if ticket.worker is None or ticket not in self.held[ticket.worker]:
            return []
        self.held[ticket.worker].discard(ticket)
        held_s = now - ticket.granted
        if was_used and self._held_s is not None:
            self._held_s += WEIGHT * (held_s - self._held_s)
        elif was_used:
            self._held_s = held_s
        return self.grant(now)

    def grant(self, now: float) -> list[Ticket]:
        """Let in whoever waits and can go; nobody is held up by one who waits for another worker."""
        granted = []
        if self.waiting_count and any(self._free(worker) for worker in self._open):
            granted = [ticket for ticket in self.waiting if self._grant_one(ticket, now)]
        for ticket in granted:
            del self._waiting[ticket.priority][ticket]
        self._judge_hints(now)
        return granted

    def hint_s(self, chance: float) -> float:
        """When to come back, seconds: (waiting + 1) × mean seconds of a slot ÷ slots × 1 to 1.25."""  # noqa: RUF002
        if self._held_s is None:
            return HINT_S
        slots = self.slots * max(1, len(self._open))
        return (self.waiting_count + 1) * self._held_s / slots * (1 + HINT_SPREAD * chance)

    def in_flight(self, worker: str) -> int:
        return len(self.held[worker])

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _forget(self, worker: str) -> None:
        for workers in (self._open, self._once, self._tried):
            workers.discard(worker)

    def _free(self, worker: str) -> bool:
        return worker in self._once or len(self.held[worker]) < self.slots

    def _has_place(self) -> bool:
        return self.waiting_count < self.depth * max(1, len(self._open))

    def _may(self, ticket: Ticket, worker: str) -> bool:
        return worker == ticket.pinned if ticket.pinned else worker not in ticket.avoid

    def _has_use(self, ticket: Ticket) -> bool:
        """Whether any worker may serve it, once one that is being tried serves again."""
        return any(self._may(ticket, worker) for worker in self._open | self._tried)

    def _candidates(self, ticket: Ticket) -> list[str]:
        if ticket.pinned is None and not ticket.avoid:  # of most
            return list(self._open)
        return [worker for worker in self._open if self._may(ticket, worker)]

    def _grant_one(self, ticket: Ticket, now: float) -> bool:
        free = [worker for worker in self._candidates(ticket) if self._free(worker)]
        if not free:
            return False
        ticket.worker = self._best(ticket, free)
        ticket.granted = now
        self.held[ticket.worker].add(ticket)
        if ticket.worker in self._once:
            self._forget(ticket.worker)
            self._tried.add(ticket.worker)
        return True

    def _best(self, ticket: Ticket, free: Sequence[str]) -> str:
        """The least loaded; of a session the one that its id leads to, while that has a slot."""
        if ticket.session is not None:
            favourite = max(self._candidates(ticket), key=lambda w: affinity(ticket.session, w))
            if favourite in free:
                return favourite
        if len(free) == 1:
            return free[0]
        return min(free, key=lambda worker: (len(self.held[worker]), worker))

    def _judge_hints(self, now: float) -> None:
        """Once somebody who comes now would not be refused, it is known how true they were."""
        if not self._judged:
            return
        is_free = any(self._free(worker) for worker in self._open)
        if is_free or (self._open and self._has_place()):
            self.hint_errors += [abs(hint - (now - at)) for at, hint in self._judged]
            self._judged.clear()

    def __repr__(self) -> str:
        held = {worker: len(tickets) for worker, tickets in self.held.items()}
        return f"<Room held {held} waiting {self.waiting_count}>"


def affinity(session: str | None, worker: str) -> bytes:
    """Rendezvous: the end of one worker moves the sessions of that worker alone."""
    return hashlib.blake2b(f"{session}\0{worker}".encode(), digest_size=8).digest()
