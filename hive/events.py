"""Facts that hive announces, and the way they are heard.

Whoever causes a fact announces it once; metrics, logs and the event stream only listen.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any

import msgspec

log = logging.getLogger(__name__)

# The request that the running task works for; every log line made meanwhile carries it.
request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)


class Event(msgspec.Struct, frozen=True, gc=False):
    """One fact. Times are seconds; byte counts are bytes. A Struct: two are made for each request."""


class WorkerMoved(Event, frozen=True, gc=False):
    """A worker left one state for another; `reason` is a sentence or empty.

    `code` is that of the error where it is FAILED, QUARANTINED or LOST now.
    """

    worker: str
    model: str
    old: str
    new: str
    reason: str = ""
    code: str = ""


class WorkerStarted(Event, frozen=True, gc=False):
    """The engine's process exists. `unasked` says that nobody asked for this start."""

    worker: str
    model: str
    pid: int
    unasked: bool


class WorkerReady(Event, frozen=True, gc=False):
    """The engine answered its probe, `load_s` seconds after its process began."""

    worker: str
    model: str
    load_s: float


class WorkerExited(Event, frozen=True, gc=False):
    """The engine's first process ended: `cause` is asked, crashed, signal, guard_lost, …"""

    worker: str
    model: str
    cause: str
    status: str
    asked: bool
    pid: int = 0


class WorkerEnded(Event, frozen=True, gc=False):
    """The whole process tree is gone; `how` is exit, term or kill.

    `pid` was the engine's; `why` it was ended: asked, exited, or the code of the error.
    """

    worker: str
    model: str
    how: str
    stop_s: float
    members: int
    pid: int = 0
    why: str = ""


class WorkerRestartPlanned(Event, frozen=True, gc=False):
    """The worker will start again by itself after `delay_s`."""

    worker: str
    model: str
    delay_s: float
    starts: int
    allowed: int


class DeviceMoved(Event, frozen=True, gc=False):
    """A device came to be OK, QUARANTINED or LOST; `code` and `reason` say why."""

    device: str
    old: str
    new: str
    code: str
    reason: str


class DeviceRead(Event, frozen=True, gc=False):
    """A device, as the driver told it just now; None is what it does not tell."""

    device: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    temperature_c: int | None
    ecc_errors: int | None


class XidSeen(Event, frozen=True, gc=False):
    """The driver reported an Xid, `count` times at once: `kind` is device, application or note."""

    device: str
    xid: int
    kind: str
    meaning: str
    after_own_kill: bool
    count: int = 1


class StrangerSeen(Event, frozen=True, gc=False):
    """A process that is not hive's took memory of a device that hive serves on."""

    device: str
    pid: int
    name: str
    used_bytes: int


class VramChecked(Event, frozen=True, gc=False):
    """After a worker's end: its VRAM was returned, kept, or that is unproven; `detail` says why."""

    worker: str
    device: str
    outcome: str
    seconds: float
    detail: str


class LeakFound(Event, frozen=True, gc=False):
    """Something that a worker took was not given back; `how` says how to clear it."""

    kind: str
    holder: str
    worker: str
    how: str


class LeakCleared(Event, frozen=True, gc=False):
    """A leak is gone when it was looked at again."""

    kind: str
    holder: str
    worker: str


class RequestAdmitted(Event, frozen=True, gc=False):
    """A client's request got a slot of a worker, after `queue_s` in the waiting room."""

    request_id: str
    model: str
    worker: str
    queue_s: float


class RequestRefused(Event, frozen=True, gc=False):
    """A request was turned away before anything was forwarded; `reason` is bounded."""

    model: str
    reason: str


class HintJudged(Event, frozen=True, gc=False):
    """A place became free: how far off an earlier Retry-After was."""

    model: str
    error_s: float


class ConnectionRefused(Event, frozen=True, gc=False):
    """There were `allowed` connections, all that there may be: one more was answered with 503, unread."""

    allowed: int


class RequestExpired(Event, frozen=True, gc=False):
    """A limit of a request passed: `phase` names it."""

    request_id: str
    model: str
    phase: str


class RequestAborted(Event, frozen=True, gc=False):
    """What the engine did for a request was cut off; `confirmed` (yes, no, unknown): it stopped.

    `seconds` are from the abort until the slot was free.
    """

    request_id: str
    model: str
    worker: str
    confirmed: str
    seconds: float


class RequestRetried(Event, frozen=True, gc=False):
    """A request is sent again after `delay_s`, as call number `attempt` of `allowed`."""

    request_id: str
    operation: str
    model: str
    worker: str
    attempt: int
    allowed: int
    delay_s: float
    code: str


class RetriesEnded(Event, frozen=True, gc=False):
    """Retries came to an end: `outcome` is success, exhausted or deadline."""

    operation: str
    outcome: str
    model: str = ""


class BreakerMoved(Event, frozen=True, gc=False):
    """A worker's breaker came to be closed, open or half_open after `failures` in a row."""

    model: str
    worker: str
    old: str
    new: str
    failures: int


class RequestEnded(Event, frozen=True, gc=False):
    """A client's request is over. `status` is the HTTP status sent (499: the client left)."""

    request_id: str
    method: str
    path: str
    status: int
    model: str | None
    worker: str | None
    code: str | None
    key: str | None
    seconds: float
    first_byte_s: float | None
    bytes_in: int
    bytes_out: int


class SessionMoved(Event, frozen=True, gc=False):
    """A session came to another state; a new one was nothing before."""

    session: str
    model: str
    old: str
    new: str


class WindowsCounted(Event, frozen=True, gc=False):
    """How many windows there are in a state."""

    state: str
    count: int


class WindowOperationEnded(Event, frozen=True, gc=False):
    """Something was done with a window, or failed with `code`: freeze, thaw, verify … (R115)."""

    operation: str
    window: str
    session: str
    model: str
    seconds: float
    code: str = ""
    blocks: int = 0
    bytes: int = 0


class RollbackMoved(Event, frozen=True, gc=False):
    """A window that is half made or half deleted could not be removed, for `code`; or it is now."""

    window_id: str
    is_undone: bool
    code: str = ""


class ThawProved(Event, frozen=True, gc=False):
    """The first request after a thaw: what was promised of its prompt, and what the engine found."""

    window: str
    session: str
    model: str
    promised_tokens: int
    cached_tokens: int


class Escalated(Event, frozen=True, gc=False):
    """Somebody is to be told (R193): `level` is an errors.Severity, `began_at` in ISO 8601.

    Every name is one of the configuration; `context` holds numbers and such names.
    """

    rule: str
    level: str
    subject: str
    operation: str
    code: str
    message: str
    recommended_action: str
    began_at: str
    model: str = ""
    worker: str = ""
    device: str = ""
    context: Mapping[str, Any] = {}


class EscalationResolved(Event, frozen=True, gc=False):
    """What was told is over, after `seconds`; it happened `repeats` times more meanwhile."""

    rule: str
    level: str
    subject: str
    began_at: str
    seconds: float
    repeats: int


class ServiceLevelMoved(Event, frozen=True, gc=False):
    """How much of what is configured can be had: full, degraded, critical or down (R263)."""

    old: str
    new: str


class AlertTried(Event, frozen=True, gc=False):
    """A message to the alerts' webhook was sent, failed and will be tried again, or was dropped.

    `why` says why not; `waiting` messages are left to be sent.
    """

    delivery: str
    rule: str
    subject: str
    level: str
    outcome: str
    why: str
    attempts: int
    waiting: int


class OutboxCounted(Event, frozen=True, gc=False):
    """How many messages wait to be sent to the alerts' webhook."""

    waiting: int


class KeyRefused(Event, frozen=True, gc=False):
    """A request was not let in, for `code`: its key's name, or the fingerprint of an unknown one."""

    code: str
    key: str
    fingerprint: str


class ReloadBegan(Event, frozen=True, gc=False):
    """The settings are read again, for `by`: SIGHUP or HTTP."""

    by: str


class ReloadEnded(Event, frozen=True, gc=False):
    """They are in force, or were refused with `code`: keys by their dotted names, never values.

    `changed` is what is different now, `refused` what needs a restart, `problems` what is wrong.
    """

    by: str
    changed: tuple[str, ...] = ()
    code: str = ""
    refused: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class AuditMoved(Event, frozen=True, gc=False):
    """The audit log is failing, writing again, or damaged: not as hive left it.

    `late` records were held meanwhile and are written now, `lost` ones were too many.
    """

    state: str
    reason: str
    late: int = 0
    lost: int = 0


class DaemonMoved(Event, frozen=True, gc=False):
    """The daemon itself: listening, stopping, stopped.

    `by` says what makes it stop: SIGTERM, SIGINT, drain, or the code of an error.
    """

    state: str
    detail: str = ""
    by: str = ""


Listener = Callable[[Event], None]


# What metrics count, and what the end of a request tells in logs and streams: there would be too many.
COUNTED: tuple[type[Event], ...] = (
    ConnectionRefused,
    DeviceRead,
    HintJudged,
    KeyRefused,
    OutboxCounted,
    RequestAborted,
    RequestAdmitted,
    RequestExpired,
    RequestRefused,
    RetriesEnded,
    WindowsCounted,
)


class Announcer:
    """Hands each event to every listener, in order, in the announcing task."""

    def __init__(self) -> None:
        self._listeners: list[tuple[Listener, frozenset[type[Event]]]] = []
        self._hearing: dict[type[Event], list[Listener]] = {}  # worked out once for each kind

    def listen(self, listener: Listener, deaf_to: Collection[type[Event]] = ()) -> None:
        """`listener` hears whatever is announced from now on, but for some kinds of events."""
        self._listeners.append((listener, frozenset(deaf_to)))
        self._hearing.clear()

    def announce(self, event: Event) -> None:
        kind = type(event)
        hearing = self._hearing.get(kind)
        if hearing is None:
            hearing = [listener for listener, deaf_to in self._listeners if kind not in deaf_to]
            self._hearing[kind] = hearing
        for listener in hearing:
            try:
                listener(event)
            except Exception:  # a boundary: a broken listener must not stop the fact's cause
                log.exception("a listener failed on %s", type(event).__name__)

    def __repr__(self) -> str:
        return f"<Announcer {len(self._listeners)} listeners>"
