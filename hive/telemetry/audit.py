"""Who did what: a record of each fact that somebody may have to answer for (docs/audit.md).

Listens to events and hands records to the journal's thread (storage/audit_writer). A request of an
operator becomes one record when it ends, with what was done meanwhile; what hive does by itself is
its own. A record holds names and codes only: no prompt, key, salt, or word of an engine.
"""

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hive import __version__
from hive.errors import HiveError
from hive.events import (
    AuditMoved,
    DaemonMoved,
    DeviceMoved,
    Event,
    KeyRefused,
    ReloadEnded,
    RequestEnded,
    SessionMoved,
    WindowOperationEnded,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerRestartPlanned,
    WorkerStarted,
    request_id_var,
)
from hive.policy.redaction import without_secrets
from hive.settings import Settings
from hive.storage.audit import Facts
from hive.storage.audit_writer import STUCK_S, Journal, News, now

DIRECTORY = "audit"
LOCAL, HIVE, SIGNAL = "local", "hive", "signal"  # actors that no key has: a key's has a colon
REFUSALS_S = 60.0  # so often the refused keys of a flood are told, and what failed for a key
LOOK_S = 1.0  # how often it is looked whether the disk hangs
MOST_NAMED = 8  # of those that were refused
MOST_OPEN = 10_000  # requests that something was done in and that have not ended
STOP = "daemon.stop"  # a life without this record was killed
LENGTH = 128  # of a name that a client chose
DAY_S = 86_400

# What changes something, by method and path; the groups of a path are the record's target.
ACTIONS: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (method, re.compile(rf"{path}\Z"), action)
    for method, path, action in (
        ("POST", r"/hive/v1/workers/([^/]+)/(start|stop|restart|drain|release)", "worker.{}"),
        ("POST", r"/hive/v1/devices/([^/]+)/release", "device.release"),
        ("POST", r"/hive/v1/drain", "daemon.drain"),
        ("POST", r"/hive/v1/reload", "settings.reload"),
        ("DELETE", r"/hive/v1/requests/([^/]+)", "request.cancel"),
        ("POST", r"/hive/v1/sessions", "session.create"),
        ("DELETE", r"/hive/v1/sessions/([^/]+)", "session.delete"),
        ("POST", r"/hive/v1/windows", "window.freeze"),
        ("DELETE", r"/hive/v1/windows/([^/]+)", "window.delete"),
        ("POST", r"/hive/v1/windows/([^/]+)/(thaw|clone|verify|repair)", "window.{}"),
        ("POST", r"/hive/v1/backups", "backup.create"),
        ("POST", r"/hive/v1/backups/restore", "backup.restore"),
        ("DELETE", r"/hive/v1/backups/([^/]+/[^/]+)", "backup.delete"),
        ("POST", r"/v1/load_lora_adapter", "model.load_lora_adapter"),
        ("POST", r"/v1/unload_lora_adapter", "model.unload_lora_adapter"),
    )
)
_OWN = ("/hive/v1/", "/v1/load_lora", "/v1/unload_lora")
_SIGNALS = {"term": "SIGTERM", "kill": "SIGKILL"}
_FAILED = 400  # the lowest status of an answer that is an error
_BAD_STATES = frozenset({"FAILED", "QUARANTINED", "LOST"})


def action_of(method: str, path: str) -> tuple[str, str] | None:
    """The action that a request asks for, and its target; None where it only looks."""
    for wanted, pattern, action in ACTIONS:
        if method == wanted and (found := pattern.match(path)):
            target, *more = *found.groups(), ""
            return action.format(*more), target
    return None


class Audit:
    """The listener. Hears in the event loop, in microseconds: it only hands records on."""

    def __init__(
        self, journal: Journal, settings: Settings, refusals_s: float = REFUSALS_S
    ) -> None:
        self._journal, self._refusals_s = journal, refusals_s
        self._fingerprints: dict[str, str] = {}
        self._seen: dict[str, int] = {}  # by key: the day of its last use
        self._done: dict[str, list[Event]] = {}  # by request: what was done in it so far
        self._refused = 0  # since the last record of them …
        self._refusers: set[str] = set()
        self._refusals_timer: asyncio.TimerHandle | None = None
        self._failures: dict[str, Counter[str]] = {}  # by key: since its last record of them
        self._failures_timer: asyncio.TimerHandle | None = None
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """These keys and limits, from now on; a key that is another one is used for the first time."""
        known = {key.name: key.sha256[:6] for key in settings.auth.keys}
        for name, old in self._fingerprints.items():
            if known.get(name) != old:
                self._seen.pop(name, None)
        self._fingerprints = known
        self._operators = {key.name for key in settings.auth.keys if "admin" in key.scopes}
        self._journal.limit(settings.audit.max_mib, settings.audit.keep)

    def hear(self, event: Event) -> None:
        match event:
            case RequestEnded():  # most of them are
                self._hear_request(event)
            case KeyRefused():
                self._hear_refused(event)
            case WindowOperationEnded() | ReloadEnded() | SessionMoved(old=""):
                self._hear_done(event)
            case DaemonMoved(state="stopping"):
                actor = SIGNAL if event.by.startswith("SIG") else HIVE
                self.record(actor, "daemon.stopping", "hive", "ok", {"by": event.by})
            case DaemonMoved(state="listening"):
                self.record(HIVE, "daemon.listening", "hive", "ok")
                self._journal.tell_again()  # to what listens since the start, such as metrics
            case DeviceMoved():
                action = "released" if event.new == "OK" else event.new.lower()
                self.record(HIVE, f"device.{action}", event.device, event.code or "ok")
            case _:
                self._hear_worker(event)

    def record(
        self,
        actor: str,
        action: str,
        target: str,
        outcome: str,
        detail: Facts | None = None,
        request_id: str | None = None,
    ) -> None:
        """One record; strings that clients chose are cut and lose what looks like a secret."""
        self._journal.put(
            {
                "timestamp": now(),
                "actor": actor,
                "action": action,
                "target": without_secrets(target)[:LENGTH],
                "outcome": outcome,
                "request_id": request_id and without_secrets(request_id),
                "detail": detail or {},
            }
        )

    def close(self) -> None:
        """Tell what is still to be told."""
        self._tell_refusals()
        self._tell_failures()

    # ── workers ─────────────────────────────────────────────────────────────────────────────────

    def _hear_worker(self, event: Event) -> None:
        match event:
            case WorkerStarted():
                detail: Facts = {"pid": event.pid, "reason": "crash" if event.unasked else "asked"}
                self.record(HIVE, "worker.started", event.worker, "ok", detail)
            case WorkerRestartPlanned():
                detail = {"reason": "restart policy", "restart": event.starts}
                detail["allowed"] = event.allowed
                self.record(HIVE, "worker.restart_planned", event.worker, "ok", detail)
            case WorkerExited(asked=False):
                detail = {"pid": event.pid, "status": event.status}
                self.record(HIVE, "worker.exited", event.worker, event.cause, detail)
            case WorkerEnded():
                detail = {"pid": event.pid, "reason": event.why, "killed": event.members}
                detail["signal"] = _SIGNALS.get(event.how)
                self.record(HIVE, "worker.ended", event.worker, event.how, detail)
            case WorkerMoved() if event.new in _BAD_STATES:
                self.record(HIVE, f"worker.{event.new.lower()}", event.worker, event.code or "ok")

    # ── requests ────────────────────────────────────────────────────────────────────────────────

    def _hear_request(self, event: RequestEnded) -> None:
        done = self._done.pop(event.request_id, ()) if self._done else ()
        if event.key is not None:
            today = int(time.time()) // DAY_S
            if self._seen.get(event.key) != today:
                self._first_use(event.key, today, event.request_id)
        if (
            not event.path.startswith(_OWN)
            or (asked := action_of(event.method, event.path)) is None
        ):
            return
        if event.code == "UNAUTHORIZED" or (event.code == "FORBIDDEN" and event.key is None):
            return  # that is the record of a refused key
        action, target = asked
        if self._is_one_of_many(event, action, done):
            return
        actor = self._actor(event.key)
        outcome = f"{event.status} {event.code}" if event.code else str(event.status)
        detail: Facts = {}
        for one in done:
            more, about = _told(one)
            target, detail = target or about, {**detail, **more}
        if event.model and not target:
            target = event.model
        self.record(actor, action, target, outcome, detail, event.request_id)

    def _is_one_of_many(self, event: RequestEnded, action: str, done: Iterable[Event]) -> bool:
        """Of what fails for a key that is no operator's, only the first of a minute is told alone.

        Else whoever has such a key could fill the log with nothing, until the oldest of it goes.
        """
        is_failed = event.status >= _FAILED and all(getattr(one, "code", "") for one in done)
        if event.key is None or event.key in self._operators or not is_failed:
            return False
        if (counted := self._failures.get(event.key)) is None:
            self._failures[event.key] = Counter()
            if self._failures_timer is None:
                self._time_failures()
            return False
        what = f"{action} {event.code or event.status}"
        counted[what if what in counted or len(counted) < MOST_NAMED else "other"] += 1
        return True

    def _time_failures(self) -> None:
        loop = asyncio.get_running_loop()
        self._failures_timer = loop.call_later(self._refusals_s, self._tell_failures)

    def _tell_failures(self) -> None:
        if self._failures_timer is not None:
            self._failures_timer.cancel()
            self._failures_timer = None
        told = {key: counted for key, counted in self._failures.items() if counted}
        for key, counted in told.items():
            detail: Facts = {"count": counted.total(), "failures": dict(counted)}
            self.record(self._actor(key), "key.failures", key, "aggregated", detail)
        self._failures = {key: Counter() for key in told}
        if told:
            self._time_failures()

    def _first_use(self, key: str, today: int, request_id: str) -> None:
        outcome = "first of the day" if key in self._seen else "first since the start"
        self._seen[key] = today
        self.record(self._actor(key), "key.used", key, outcome, None, request_id)

    def _actor(self, key: str | None) -> str:
        """A key's name and the fingerprint of its hash; whoever has none is on this host."""
        if key is None:
            return LOCAL
        return f"{key}:{self._fingerprints.get(key, 'revoked')}"

    def _hear_done(self, event: Event) -> None:
        """It belongs to the request that it was done for, if to any."""
        request_id = request_id_var.get()
        if request_id is None:
            self._record_own(event)
            return
        while len(self._done) >= MOST_OPEN:
            for forgotten in self._done.pop(next(iter(self._done))):
                self._record_own(forgotten)
        if not isinstance(event, SessionMoved) or request_id not in self._done:
            self._done.setdefault(request_id, []).append(event)

    def _record_own(self, event: Event) -> None:
        """What nobody asked for over HTTP."""
        detail, target = _told(event)
        match event:
            case WindowOperationEnded():
                action = f"window.{event.operation}"
                self.record(HIVE, action, target, event.code or "ok", detail)
            case ReloadEnded():
                self.record(SIGNAL, "settings.reload", target, event.code or "ok", detail)

    # ── refused keys ────────────────────────────────────────────────────────────────────────────

    def _hear_refused(self, event: KeyRefused) -> None:
        """The first one at once; then all of a minute in one record, however many they are."""
        who = self._actor(event.key) if event.key else f"unknown:{event.fingerprint or 'none'}"
        if self._refusals_timer is None:
            request_id = request_id_var.get()
            self.record(who, "key.refused", event.key, event.code, {"count": 1}, request_id)
            self._time_refusals()
            return
        self._refused += 1
        if len(self._refusers) < MOST_NAMED:
            self._refusers.add(who)

    def _time_refusals(self) -> None:
        loop = asyncio.get_running_loop()
        self._refusals_timer = loop.call_later(self._refusals_s, self._tell_refusals)

    def _tell_refusals(self) -> None:
        if self._refusals_timer is not None:
            self._refusals_timer.cancel()
            self._refusals_timer = None
        if self._refused:
            detail = {"count": self._refused, "by": sorted(self._refusers)}
            self.record(HIVE, "key.refused", "", "aggregated", detail)
            self._refused = 0
            self._refusers.clear()
            self._time_refusals()

    def __repr__(self) -> str:
        return f"<Audit of {self._journal!r}>"


def _told(event: Event) -> tuple[Facts, str]:
    """What an event adds to its request's record, and what it was done to."""
    match event:
        case WindowOperationEnded():
            more: Facts = {"session": event.session, "model": event.model, "window": event.window}
            return more, event.window
        case ReloadEnded():
            return {"changed": list(event.changed), "refused": list(event.refused)}, "settings"
        case SessionMoved():
            return {"session": event.session, "model": event.model}, event.session
    return {}, ""


@contextmanager
def auditing(
    settings: Settings, announce: Callable[[Event], None], stuck_s: float = STUCK_S
) -> Iterator[Audit]:
    """Record while the block runs; its beginning and its end are records, too.

    A disk that takes nothing delays the end of it by some seconds, and nothing else.
    """
    loop = asyncio.get_running_loop()

    def told(news: News) -> None:
        event = AuditMoved(news.state, news.reason, news.late, news.lost)
        if not loop.is_closed():
            loop.call_soon_threadsafe(announce, event)

    limits = settings.audit
    directory = settings.server.state_dir / DIRECTORY
    journal = Journal(directory, limits.max_mib, limits.keep, told, stop=STOP, stuck_s=stuck_s)
    audit = Audit(journal, settings)
    looking: asyncio.TimerHandle

    def look() -> None:
        nonlocal looking
        journal.look()
        looking = loop.call_later(LOOK_S, look)

    look()
    about: dict[str, Any] = {"pid": os.getpid(), "uid": os.getuid(), "version": __version__}
    audit.record(LOCAL, "daemon.start", "hive", "ok", about)
    outcome = "ok"
    try:
        yield audit
    except HiveError as exc:
        outcome = exc.code
        raise
    except BaseException as exc:
        outcome = _outcome_of(exc)
        raise
    finally:
        looking.cancel()
        audit.close()
        audit.record(HIVE, STOP, "hive", outcome, {"pid": os.getpid()})
        if unwritten := journal.close():
            announce(AuditMoved("failing", "hive ends before they could be written", 0, unwritten))


def _outcome_of(exc: BaseException) -> str:
    """The code of the first error of hive's in a group; else the exception's name."""
    if isinstance(exc, BaseExceptionGroup):
        return _outcome_of(exc.exceptions[0])
    return exc.code if isinstance(exc, HiveError) else type(exc).__name__
