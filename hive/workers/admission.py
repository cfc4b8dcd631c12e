"""A model's door: who gets a slot of which worker, who waits, and who is told to come back.

Decided before anything is forwarded (R056). The decisions are policy/admission and policy/breaker;
here are their clock, their waiting tasks and their errors.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hive.errors import CircuitBreakerOpen, GpuQuarantined, HiveError, ServiceUnavailable
from hive.events import Announcer, BreakerMoved, HintJudged, RequestAborted, RequestRefused
from hive.policy.admission import Full, Room, Ticket
from hive.policy.breaker import Breaker, BreakerState
from hive.policy.lifecycle import ON_THE_WAY, State
from hive.settings import Breaker as BreakerSettings
from hive.workers.worker import Worker

DRAINING_HINT_S = 30.0


class Permit:
    """A slot of a worker, held until it is closed; closing it again does nothing.

    `weight` is how many requests of the engine's own it stands for: `n`, and lists of prompts.
    """

    def __init__(self, door: "Door", ticket: Ticket, worker: Worker, era: int) -> None:
        """`era` is what the worker's breaker knows it by."""
        self.door, self.ticket, self.worker = door, ticket, worker
        self.life = worker.take()
        self._era = era
        self._weight = 0
        self._is_closed = self._is_judged = self._is_aborting = False

    def began(self, weight: int) -> None:
        """The request is on its way to the engine, whole."""
        if self._is_closed or self._is_aborting:  # it was answered before
            return
        self._weight = weight
        if self.life.pulse is not None:
            self.life.pulse.began(weight)

    def finished(self) -> None:
        """The engine's answer came to its end, or nothing was sent: the slot is free."""
        if self._is_closed or self._is_aborting:
            return
        if self._weight and self.life.pulse is not None:
            self.life.pulse.ended(self._weight)
        self._close()

    def aborted(self, request_id: str | None) -> None:
        """Its connection was closed before; the slot is free when the engine has stopped, too.

        `request_id` is that of a request that was cancelled; None where the engine broke off.
        """
        if self._is_closed or self._is_aborting:
            return
        self._is_aborting = True
        began = time.monotonic()

        def done(confirmed: str) -> None:
            seconds = time.monotonic() - began
            if request_id is not None:
                door, worker = self.door, self.worker.id
                event = RequestAborted(request_id, door.model, worker, confirmed, seconds)
                door.announcer.announce(event)
            self._close()

        if self._weight and self.life.pulse is not None:
            self.life.pulse.aborted(self._weight, done)
        else:
            self._close()

    def judge(self, *, fault: bool | None) -> None:
        """What the attempt says of the worker, once; None is nothing."""
        if not self._is_judged:
            self._is_judged = True
            self.door.judge(self.worker, self._era, fault=fault)

    def answers(self) -> None:
        """The worker has begun an answer: a probe need not wait for its end."""
        breaker = self.door.breakers[self.worker.id]
        if self._is_judged or breaker.is_closed:
            return
        self.judge(fault=False)
        if breaker.is_closed:  # from here on it is a call like any other
            self._is_judged, self._era = False, breaker.began(time.monotonic())

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.judge(fault=None)
            self.worker.give_back()
            self.door.freed(self.ticket)

    def __repr__(self) -> str:
        return f"<Permit {self.worker.id}{' closed' if self._is_closed else ''}>"


class Door:
    """Of one model: its workers' slots, its waiting room and its workers' breakers."""

    def __init__(
        self,
        model: str,
        workers: Iterable[Worker],
        slots: int,
        depth: int,
        breaker: BreakerSettings,
        announcer: Announcer,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.model = model
        self.workers = {worker.id: worker for worker in workers}
        self.announcer = announcer
        self.is_draining = False
        self.room = Room(self.workers, slots, depth)
        self._chance = chance
        self.breakers = {
            worker: Breaker(breaker.failures, breaker.cooldown_s) for worker in self.workers
        }
        self._futures: dict[Ticket, asyncio.Future[Permit]] = {}
        self._cooling: dict[str, asyncio.TimerHandle] = {}
        self._uploads = 0  # requests whose body is sent on as it comes
        for worker in self.workers.values():
            worker.on_move = self.worker_moved

    def apply(self, depth: int, breaker: BreakerSettings) -> None:
        """Other limits from now on; whoever waits already keeps its place."""
        self.room.depth = depth
        for worker, its in self.breakers.items():
            its.failures, its.cooldown_s = breaker.failures, breaker.cooldown_s
            if worker in self._cooling:
                self._cool(self.workers[worker], its.retry_in_s(time.monotonic()))

    @property
    def in_flight(self) -> int:
        """Slots held, those of aborts that are not confirmed included."""
        return sum(worker.in_flight for worker in self.workers.values())

    @property
    def waiting(self) -> int:
        return self.room.waiting_count

    def takes_upload(self) -> bool:
        """Whether one slot more may wait for a slow client: of half of them at most, and no probe."""
        slots = self.room.slots * len(self.room.open_workers)
        is_whole = all(breaker.is_closed for breaker in self.breakers.values())
        return is_whole and self._uploads < slots // 2

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """A request whose body is sent on as it comes."""
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    def serves(self, worker: Worker) -> bool:
        """Whether the worker would take a request, when it has a slot."""
        return worker.id in self.room.open_workers

    def view(self, worker: Worker) -> dict[str, Any]:
        """What operators see of a worker's door; `waiting` is for all workers of the model."""
        breaker = self.breakers[worker.id]
        return {
            "slots": self.room.slots,
            "waiting": self.waiting,
            "breaker": {
                "state": str(breaker.state),
                "failures": breaker.count,
                "retry_in_seconds": round(breaker.retry_in_s(time.monotonic()), 3),
            },
        }

    def enter(self, ticket: Ticket) -> Permit | None:
        """A slot; None: it has a place in the waiting room, and must `wait`.

        Raises ServiceUnavailable whose reason says why not (C12), CircuitBreakerOpen or
        GpuQuarantined.
        """
        if not self.room.can_serve(ticket):
            ticket.avoid = frozenset()  # who failed it before is better than nobody
        if not self.room.can_serve(ticket):
            raise self._told(self._why_not(ticket))
        try:
            is_in = self.room.arrive(ticket, time.monotonic(), self._chance())
        except Full as full:
            raise self._told(self._no_place(full)) from None
        if is_in:
            return self._permit(ticket)
        self._futures[ticket] = asyncio.get_running_loop().create_future()
        return None

    async def wait(self, ticket: Ticket) -> Permit:
        """The slot that it waits for; may be cancelled at any time. Raises like `enter`."""
        future = self._futures[ticket]
        try:
            permit: Permit = await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().finished()  # let in just as it left
            self.leave(ticket)
            raise
        return permit

    def leave(self, ticket: Ticket) -> None:
        """It waits no longer; does nothing for one that does not wait."""
        if self._futures.pop(ticket, None) is not None:
            self.room.leave(ticket, time.monotonic())
            self._tell_of_hints()

    def shut(self) -> None:
        """hive is stopping: nobody goes in any more, and whoever waits is told."""
        self.is_draining = True
        self._turn_away(self.room.shut())
        for timer in self._cooling.values():
            timer.cancel()
        self._cooling.clear()

    # ── workers ─────────────────────────────────────────────────────────────────────────────────

    def worker_moved(self, worker: Worker) -> None:
        """Follow a worker's state; a new process is a new start for its breaker."""
        if worker.state is State.READY and not self.is_draining:
            breaker = self.breakers[worker.id]
            old = breaker.state
            breaker.reset()
            self._breaker_moved(worker, old)
            self._stop_cooling(worker)
            self._let_in(self.room.open(worker.id, time.monotonic()))
        else:
            self._stop_cooling(worker)
            self._close(worker)

    def judge(self, worker: Worker, era: int, *, fault: bool | None) -> None:
        """Note how an attempt ended: a fault, a success (False), or neither (None)."""
        breaker, now = self.breakers[worker.id], time.monotonic()
        old = breaker.state
        if fault is None:
            if breaker.left(era):
                self._half_open(worker)
        elif fault:
            breaker.failed(era, now)
        else:
            breaker.succeeded(era)
        if not self._breaker_moved(worker, old):
            return
        if breaker.state is BreakerState.OPEN:
            self._close(worker)
            self._cool(worker, breaker.cooldown_s)
        elif worker.state is State.READY and not self.is_draining:
            self._let_in(self.room.open(worker.id, now))

    def _close(self, worker: Worker) -> None:
        lost, granted = self.room.close(worker.id, time.monotonic())
        self._turn_away(lost)
        self._let_in(granted)

    def _half_open(self, worker: Worker) -> None:
        self._stop_cooling(worker)
        if worker.state is not State.READY or self.is_draining:
            return
        if (left_s := self.breakers[worker.id].retry_in_s(time.monotonic())) > 0:
            self._cool(worker, left_s)  # a loop's timer may ring a little early
        else:
            self._let_in(self.room.open_once(worker.id, time.monotonic()))

    def _cool(self, worker: Worker, seconds: float) -> None:
        self._stop_cooling(worker)
        timer = asyncio.get_running_loop().call_later(seconds, self._half_open, worker)
        self._cooling[worker.id] = timer

    def _stop_cooling(self, worker: Worker) -> None:
        if timer := self._cooling.pop(worker.id, None):
            timer.cancel()

    def _breaker_moved(self, worker: Worker, old: BreakerState) -> bool:
        """Announce its breaker's change since it was `old`; False if there is none."""
        breaker = self.breakers[worker.id]
        if breaker.state is old:
            return False
        self.announcer.announce(
            BreakerMoved(self.model, worker.id, str(old), str(breaker.state), breaker.count)
        )
        return True

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def freed(self, ticket: Ticket) -> None:
        """A permit was closed: let the next one in."""
        self._let_in(self.room.release(ticket, time.monotonic()))
        self._tell_of_hints()

    def _permit(self, ticket: Ticket) -> Permit:
        assert ticket.worker is not None
        worker = self.workers[ticket.worker]
        breaker = self.breakers[worker.id]
        old = breaker.state
        era = breaker.began(time.monotonic())
        self._breaker_moved(worker, old)
        return Permit(self, ticket, worker, era)

    def _let_in(self, tickets: Iterable[Ticket]) -> None:
        pending = list(tickets)
        while pending:
            ticket = pending.pop(0)
            future = self._futures.pop(ticket)
            if not future.done():
                future.set_result(self._permit(ticket))
                continue
            # Cancelled at this very moment: the next one may go.
            worker = self.workers[ticket.worker or ""]
            pending += self.room.release(ticket, time.monotonic(), was_used=False)
            if self.breakers[worker.id].state is not BreakerState.CLOSED:
                self._half_open(worker)  # it was to be the probe

    def _turn_away(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            future = self._futures.pop(ticket)
            if not future.done():
                future.set_exception(self._told(self._why_not(ticket)))

    def _told(self, error: HiveError) -> HiveError:
        reason = error.details.get("reason") or error.code.lower()
        self.announcer.announce(RequestRefused(self.model, str(reason)))
        return error

    def _tell_of_hints(self) -> None:
        errors, self.room.hint_errors = self.room.hint_errors, []
        for error_s in errors:
            self.announcer.announce(HintJudged(self.model, error_s))

    def _no_place(self, full: Full) -> HiveError:
        """R057: the body says how much there is, and how much of it is in use."""
        slots = self.room.slots * max(1, len(self.room.open_workers))
        return ServiceUnavailable(
            "Worker at maximum capacity",
            reason=full.reason,
            retry_after_s=full.hint_s,
            model=self.model,
            current_requests=self.in_flight,
            max_concurrent=slots,
            resource_info={
                "slots_total": slots,
                "slots_busy": self.in_flight,
                "waiting": self.waiting,
                "queue_depth": self.room.depth,
            },
        )

    def queue_timeout(self, seconds: float) -> HiveError:
        """For a request that waited for a slot as long as it may."""
        return self._told(
            ServiceUnavailable(
                f"No slot of model {self.model} became free within {seconds:g} s.",
                reason="queue_timeout",
                retry_after_s=self.room.hint_s(self._chance()),
                phase="queue",
                timeout_seconds=seconds,
                model=self.model,
            )
        )

    def _why_not(self, ticket: Ticket) -> HiveError:
        """Why no worker can serve it now, and when one may."""
        workers = list(self.workers.values())
        if ticket.pinned is not None:
            workers = [self.workers[ticket.pinned]]
        ready = [self.breakers[w.id] for w in workers if w.state is State.READY]
        broken = [breaker for breaker in ready if breaker.state is not BreakerState.CLOSED]
        if broken and not self.is_draining:
            now = time.monotonic()
            first = min(broken, key=lambda breaker: breaker.retry_in_s(now))
            return CircuitBreakerOpen(
                f"Model {self.model} failed {first.count} times in a row and is not asked for a "
                "while.",
                retry_after_s=max(first.retry_in_s(now), 1.0),
                failure_count=first.count,
                failure_threshold=first.failures,
                cooldown_seconds=first.cooldown_s,
                state=str(first.state),
                model=self.model,
            )
        return unavailable(self.model, workers, is_draining=self.is_draining)

    def __repr__(self) -> str:
        return f"<Door {self.model} {self.in_flight} in, {self.waiting} waiting>"


def unavailable(model: str, workers: list[Worker], *, is_draining: bool) -> HiveError:
    """Why no worker of a model can take a request now, and when one may (contract, Errors)."""
    hints = [hint for worker in workers if (hint := worker.ready_in_s) is not None]
    states = {worker.state for worker in workers}
    state = str(workers[0].state)
    if is_draining:
        return ServiceUnavailable(
            "hive is stopping and takes no new requests.",
            reason="draining",
            retry_after_s=DRAINING_HINT_S,
            model=model,
        )
    if hints:
        return ServiceUnavailable(
            f"Model {model} is loading.",
            reason="loading",
            retry_after_s=min(hints),
            model=model,
            state=state,
        )
    if states & {State.DRAINING, *ON_THE_WAY}:
        return ServiceUnavailable(
            f"Model {model} is draining.",
            reason="draining",
            retry_after_s=DRAINING_HINT_S,
            model=model,
            state=state,
        )
    if State.QUARANTINED in states:
        waiting = next(w for w in workers if w.state is State.QUARANTINED)
        return GpuQuarantined(
            f"Model {model} cannot be served: a device that it needs is quarantined.",
            reason="quarantined",
            device=", ".join(waiting.plan.devices),
            model=model,
        )
    if states <= {State.STOPPED, State.STOPPING}:
        return ServiceUnavailable(
            f"Model {model} is stopped.",
            reason="worker_stopped",
            action="An operator can start it with 'hive worker start'.",
            model=model,
            state=state,
        )
    return ServiceUnavailable(
        f"Model {model} has failed and is not restarted any more.",
        reason="worker_failed",
        action="An operator finds the cause with 'hive worker show' and starts it again.",
        model=model,
        state=state,
    )
