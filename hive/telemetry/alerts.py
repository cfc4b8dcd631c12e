"""The listener that tells a person: hears what happens, announces what escalates and what is over.

What is decided is in policy/escalation. It hears every request's end, so a success costs it one
look-up and three additions; what it announces is announced after the event that led to it.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any

from hive.devices.watch import Condition
from hive.events import (
    COUNTED,
    AlertTried,
    Announcer,
    AuditMoved,
    BreakerMoved,
    DaemonMoved,
    DeviceMoved,
    Escalated,
    EscalationResolved,
    Event,
    LeakCleared,
    LeakFound,
    RequestEnded,
    RetriesEnded,
    RollbackMoved,
    ServiceLevelMoved,
    SessionMoved,
    WindowOperationEnded,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
)
from hive.policy.breaker import BreakerState
from hive.policy.escalation import (
    AWAY,
    DAMAGED,
    LEVELS,
    NOTHING,
    REFUSED,
    Alerting,
    Change,
    Escalations,
    Open,
    Outcome,
    Over,
    Part,
    Raised,
    Rule,
    ServiceLevel,
    Subject,
    alerting,
    broken_level,
    outcome,
    service_level,
)
from hive.policy.lifecycle import State
from hive.settings import Settings
from hive.telemetry.metrics import OPERATIONS
from hive.telemetry.outbox import Outbox
from hive.telemetry.webhook import CREDENTIALS, WEBHOOK
from hive.workers.lmcache import ID as CACHE

# What is announced for each request alone, but for the end of its retries.
DEAF_TO = tuple(kind for kind in COUNTED if kind is not RetriesEnded)
LOOK_S = 1.0  # how often it is looked whether something is over
CATALOGUE = Subject("catalogue")
SERVICE = Subject("service")
HIVE = Subject("hive")
ROLLBACK = Subject("rollback")
AUDIT = Subject("audit_log")
_AUTH = frozenset({"UNAUTHORIZED", "INVALID_CREDENTIALS", "FORBIDDEN", "ACCESS_DENIED"})
# What asks the catalogue whatever it is, and the codes with which that has answered.
_OF_CATALOGUE = ("/hive/v1/windows", "/hive/v1/sessions")
_ANSWERED = frozenset({"", "SESSION_NOT_FOUND", "WINDOW_NOT_FOUND"})
_AWAY = REFUSED | {AWAY}
_EARLIER = "earlier"  # a worker that is not configured any more: an earlier life's


class Alerts:
    """Listens; tells what escalates, what is open, and how much of the service can be had."""

    def __init__(
        self,
        settings: Settings,
        announcer: Announcer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._announcer, self._clock = announcer, clock
        self.outbox = Outbox(settings.alerts, settings.server.state_dir, announcer)
        self._workers = {
            f"{name}-{number}": Part(name)
            for name, model in settings.models.items()
            for number in range(len(model.workers))
        }
        self._cache: State | None = None  # of the LMCache server, where there is one
        self._devices: dict[str, Condition] = {}
        self._leaks: dict[Subject, int] = {}
        self._undone: set[str] = set()  # windows that something could not be undone of
        self._inference = {name: Subject("inference", name) for name in settings.models}
        self._retries = {name: Subject("retry", name) for name in settings.models}
        self._starts = {
            worker: Subject("start", worker=worker) for worker in (*self._workers, CACHE)
        }
        self._operations = {name: Subject(name) for name in OPERATIONS}
        self._escalations = Escalations(
            [
                *self._inference.values(),
                *self._starts.values(),
                *self._operations.values(),
                CATALOGUE,
            ]
        )
        self._level = ServiceLevel.DOWN
        self._is_ending = False
        self._began: dict[tuple[str, str], str] = {}  # of what is open, in ISO 8601
        self._untold: deque[Change | ServiceLevelMoved] = deque()
        self._hears: dict[type[Event], Callable[[Any], Iterable[Change]]] = {
            RequestEnded: self._request,
            RetriesEnded: self._retried,
            WorkerMoved: self._worker,
            WorkerReady: self._started,
            WorkerRestartPlanned: self._crashed,
            BreakerMoved: self._breaker,
            DeviceMoved: self._device,
            LeakFound: self._leaked,
            LeakCleared: self._leak_cleared,
            WindowOperationEnded: self._operation,
            RollbackMoved: self._rollback,
            AlertTried: self._tried,
            AuditMoved: self._audit,
            SessionMoved: self._session,
            DaemonMoved: self._daemon,
        }

    def hear(self, event: Event) -> None:
        heard = self._hears.get(type(event))
        if heard is not None and (changes := heard(event)):
            self._tell(changes)

    def apply(self, settings: Settings) -> None:
        """A reload."""
        self.outbox.apply(settings.alerts)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What is over is told, and what escalates is sent, while the block runs.

        A single error that ends the block comes out as it is, not in a group.
        """

        async def look() -> None:
            while True:
                await asyncio.sleep(LOOK_S)
                self._tell(self._escalations.look(self._clock()))

        with _ungrouped():
            async with self.outbox.running(), asyncio.TaskGroup() as tasks:
                looking = tasks.create_task(look(), name="escalations")
                try:
                    yield
                finally:
                    self._tell_now()  # before the outbox ends
                    looking.cancel()

    def look_anew(self) -> None:
        """Hive has started: what an earlier life told is over, unless it is so again."""
        self.outbox.look_anew()

    # ── for operators ───────────────────────────────────────────────────────────────────────────

    @property
    def service_level(self) -> str:
        return str(self._level)

    async def view(self) -> dict[str, Any]:
        """What is open, the worst first, and what has become of the messages to the webhook."""
        now = self._clock()
        known = sorted(self._escalations.open, key=_urgency)
        return {
            "service_level": self.service_level,
            "alerts": [self._view(one, now) for one in known],
            "outbox": await self.outbox.view(),
        }

    def _view(self, one: Open, now: float) -> dict[str, Any]:
        raised = one.raised
        return {
            "rule": str(raised.rule),
            "level": str(raised.level),
            "subject": str(raised.subject),
            "operation": raised.subject.operation,
            "model": raised.subject.model,
            "worker": raised.subject.worker,
            "device": raised.subject.device,
            "code": raised.code,
            "message": raised.said,
            "recommended_action": raised.action,
            "began_at": self._began.get((raised.rule, str(raised.subject)), ""),
            "seconds": round(now - one.since, 1),
            "repeats": one.repeats,
        }

    # ── what is heard ───────────────────────────────────────────────────────────────────────────

    def _request(self, event: RequestEnded) -> Iterable[Change]:
        code = event.code or ""
        # Which names are models is the configuration's to say, not a client's.
        subject = self._inference.get(event.model or "")
        if subject is not None and code not in _AWAY and (event.worker or code):
            how = outcome(code, event.status)
            return self._escalations.ended(subject, self._clock(), how, code)
        if code in _AWAY or (code in _ANSWERED and event.path.startswith(_OF_CATALOGUE)):
            return self._of_catalogue(code)
        if code in _AUTH:
            return self._escalations.refused_client(self._clock(), code)
        if code and alerting(code) is Alerting.ALWAYS:
            return self._escalations.raised(Rule.INTERNAL_ERROR, HIVE, self._clock(), code)
        return NOTHING

    def _of_catalogue(self, code: str) -> Iterable[Change]:
        """A request has asked the catalogue; with a code of _AWAY it did not answer."""
        now, is_away = self._clock(), code in _AWAY
        changes = [*self._escalations.catalogue(CATALOGUE, now, is_away=is_away)]
        how = Outcome.FAILED if is_away else Outcome.WELL
        changes += self._escalations.ended(CATALOGUE, now, how, code if is_away else "")
        if code in REFUSED:
            changes += self._escalations.raised(Rule.CREDENTIALS_REFUSED, CATALOGUE, now, code)
        elif not is_away:
            changes += self._escalations.over(Rule.CREDENTIALS_REFUSED, CATALOGUE, now)
        return changes

    def _catalogue_answered(self, now: float) -> Iterable[Change]:
        """For another part of hive than a request's own."""
        return [
            *self._escalations.catalogue(CATALOGUE, now, is_away=False),
            *self._escalations.over(Rule.CREDENTIALS_REFUSED, CATALOGUE, now),
        ]

    def _session(self, _: SessionMoved) -> Iterable[Change]:
        return self._catalogue_answered(self._clock())  # it is told once the catalogue has it

    def _retried(self, event: RetriesEnded) -> Iterable[Change]:
        if event.outcome != "exhausted":
            return NOTHING
        subject = self._retries.get(event.model, Subject("retry"))
        return self._escalations.raised(
            Rule.RETRIES_EXHAUSTED, subject, self._clock(), "BAD_GATEWAY", policy=event.operation
        )

    def _worker(self, event: WorkerMoved) -> Iterable[Change]:
        now, state = self._clock(), State(event.new)
        part = self._workers.get(event.worker)
        if part is not None:
            part.state = state
        elif event.worker == CACHE:
            self._cache = state
        else:
            return NOTHING
        subject = Subject("worker", part.model if part else "", event.worker)
        changes: list[Change] = []
        for rule, bad in ((Rule.WORKER_FAILED, State.FAILED), (Rule.WORKER_LOST, State.LOST)):
            if state is bad:
                changes += self._escalations.raised(rule, subject, now, event.code)
            else:
                changes += self._escalations.over(rule, subject, now)
        return [*changes, *self._level_now(now)]

    def _started(self, event: WorkerReady) -> Iterable[Change]:
        subject = self._starts.get(event.worker)
        if subject is None:
            return NOTHING
        return self._escalations.ended(subject, self._clock(), Outcome.WELL)

    def _crashed(self, event: WorkerRestartPlanned) -> Iterable[Change]:
        subject = self._starts.get(event.worker)
        if subject is None:
            return NOTHING
        return self._escalations.ended(subject, self._clock(), Outcome.FAILED, "WORKER_CRASHED")

    def _breaker(self, event: BreakerMoved) -> Iterable[Change]:
        part = self._workers.get(event.worker)
        if part is None:
            return NOTHING
        now = self._clock()
        part.breaker = BreakerState(event.new)
        subject = Subject("worker", event.model, event.worker)
        changes: Iterable[Change] = NOTHING
        if part.breaker is BreakerState.OPEN:
            changes = self._escalations.raised(
                Rule.BREAKER_OPEN, subject, now, "CIRCUIT_BREAKER_OPEN", failures=event.failures
            )
        elif part.breaker is BreakerState.CLOSED:  # half open it is still on probation
            changes = self._escalations.over(Rule.BREAKER_OPEN, subject, now)
        return [*changes, *self._level_now(now)]

    def _device(self, event: DeviceMoved) -> Iterable[Change]:
        now = self._clock()
        subject = Subject("device", device=event.device)
        self._devices[event.device] = Condition(event.new)
        if event.new == Condition.OK:
            changes = self._escalations.over(Rule.DEVICE_FAILED, subject, now)
        else:
            changes = self._escalations.raised(
                Rule.DEVICE_FAILED, subject, now, event.code, condition=event.new
            )
        return [*changes, *self._level_now(now)]

    def _leak_subject(self, kind: str, worker: str) -> Subject:
        known = worker if worker in self._workers or worker == CACHE else _EARLIER
        return Subject("worker", worker=known, kind=kind)

    def _leaked(self, event: LeakFound) -> Iterable[Change]:
        subject = self._leak_subject(event.kind, event.worker)
        self._leaks[subject] = self._leaks.get(subject, 0) + 1
        return self._escalations.raised(
            Rule.LEAK_FOUND, subject, self._clock(), "RESOURCE_LEAK_DETECTED"
        )

    def _leak_cleared(self, event: LeakCleared) -> Iterable[Change]:
        subject = self._leak_subject(event.kind, event.worker)
        left = self._leaks.pop(subject, 0) - 1
        if left > 0:
            self._leaks[subject] = left
            return NOTHING
        return self._escalations.over(Rule.LEAK_FOUND, subject, self._clock())

    def _operation(self, event: WindowOperationEnded) -> Iterable[Change]:
        subject = self._operations.get(event.operation)
        if subject is None:
            return NOTHING
        now = self._clock()
        changes = self._escalations.ended(subject, now, outcome(event.code), event.code)
        # What was done is in the catalogue.
        return changes if event.code else [*changes, *self._catalogue_answered(now)]

    def _rollback(self, event: RollbackMoved) -> Iterable[Change]:
        if not event.is_undone:
            self._undone.add(event.window_id)
            return self._escalations.raised(
                Rule.ROLLBACK_FAILED, ROLLBACK, self._clock(), event.code
            )
        self._undone.discard(event.window_id)
        if self._undone:
            return NOTHING
        return self._escalations.over(Rule.ROLLBACK_FAILED, ROLLBACK, self._clock())

    def _tried(self, event: AlertTried) -> Iterable[Change]:
        now = self._clock()
        if event.outcome == "sent":
            return self._escalations.over(Rule.CREDENTIALS_REFUSED, WEBHOOK, now)
        if event.why in CREDENTIALS:
            return self._escalations.raised(Rule.CREDENTIALS_REFUSED, WEBHOOK, now, "FORBIDDEN")
        return NOTHING

    def _audit(self, event: AuditMoved) -> Iterable[Change]:
        now = self._clock()
        match event.state:
            case "failing":
                return self._escalations.raised(
                    Rule.AUDIT_FAILED, AUDIT, now, "STORAGE_WRITE_FAILED"
                )
            case "damaged":
                return self._escalations.raised(Rule.AUDIT_DAMAGED, AUDIT, now, DAMAGED)
        return self._escalations.over(Rule.AUDIT_FAILED, AUDIT, now)

    def _daemon(self, event: DaemonMoved) -> Iterable[Change]:
        # Workers that end with hive are no news.
        self._is_ending = self._is_ending or event.state in ("stopping", "stopped")
        return NOTHING

    def _level_now(self, now: float) -> Iterable[Change]:
        """How well it is after something has moved."""
        if self._is_ending:
            return NOTHING
        parts = self._workers.values()
        is_well = all(one is Condition.OK for one in self._devices.values()) and (
            self._cache in (None, State.READY)
        )
        old, self._level = self._level, service_level(parts, is_all_else_well=is_well)
        if self._level is not old:
            self._tell([ServiceLevelMoved(str(old), str(self._level))])
        broken = sum(part.is_broken for part in parts)
        if broken_level(parts) >= ServiceLevel.CRITICAL:
            if self._escalations.is_open(Rule.SERVICE_DEGRADED, SERVICE):
                return NOTHING  # another part of the same
            return self._escalations.raised(
                Rule.SERVICE_DEGRADED,
                SERVICE,
                now,
                "SERVICE_UNAVAILABLE",
                workers=len(parts),
                broken=broken,
            )
        return self._escalations.over(Rule.SERVICE_DEGRADED, SERVICE, now)

    # ── what is told ────────────────────────────────────────────────────────────────────────────

    def _tell(self, changes: Iterable[Change | ServiceLevelMoved]) -> None:
        """Once the event that they come from has been heard by everybody."""
        is_first = not self._untold
        self._untold.extend(changes)
        if self._untold and is_first:
            asyncio.get_running_loop().call_soon(self._tell_now)

    def _tell_now(self) -> None:
        while self._untold:
            change = self._untold.popleft()
            if isinstance(change, ServiceLevelMoved):
                self._announcer.announce(change)
                continue
            raised = change.raised if isinstance(change, Over) else change
            key = (str(raised.rule), str(raised.subject))
            if isinstance(change, Over):
                self._announcer.announce(_resolved(change, self._began.pop(key, "")))
            else:
                self._began[key] = datetime.now(UTC).isoformat()
                self._announcer.announce(_escalated(change, self._began[key]))

    def __repr__(self) -> str:
        return f"<Alerts {self._level} {len(self._escalations.open)} open>"


def _urgency(one: Open) -> tuple[int, float]:
    return -LEVELS.index(one.raised.level), one.since


@contextmanager
def _ungrouped() -> Iterator[None]:
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from error.__cause__


def _escalated(raised: Raised, began_at: str) -> Escalated:
    subject = raised.subject
    return Escalated(
        rule=str(raised.rule),
        level=str(raised.level),
        subject=str(subject),
        operation=subject.operation,
        code=raised.code,
        message=raised.said,
        recommended_action=raised.action,
        began_at=began_at,
        model=subject.model,
        worker=subject.worker,
        device=subject.device,
        context=dict(raised.context) | ({"kind": subject.kind} if subject.kind else {}),
    )


def _resolved(over: Over, began_at: str) -> EscalationResolved:
    raised = over.raised
    return EscalationResolved(
        rule=str(raised.rule),
        level=str(raised.level),
        subject=str(raised.subject),
        began_at=began_at,
        seconds=round(over.seconds, 3),
        repeats=over.repeats,
    )
