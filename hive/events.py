"""Facts that hive announces, and the way they are heard.

Whoever causes a fact announces it once; metrics, logs and the event stream only listen.
"""

import logging
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass

log = logging.getLogger(__name__)

# The request that the running task works for; every log line made meanwhile carries it.
request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)


@dataclass(frozen=True, slots=True)
class Event:
    """One fact. Times are seconds; byte counts are bytes."""


@dataclass(frozen=True, slots=True)
class WorkerMoved(Event):
    """A worker left one state for another; `reason` is a sentence or empty."""

    worker: str
    model: str
    old: str
    new: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    """The engine's process exists. `unasked` says that nobody asked for this start."""

    worker: str
    model: str
    pid: int
    unasked: bool


@dataclass(frozen=True, slots=True)
class WorkerReady(Event):
    """The engine answered its probe, `load_s` seconds after its process began."""

    worker: str
    model: str
    load_s: float


@dataclass(frozen=True, slots=True)
class WorkerExited(Event):
    """The engine's first process ended: `cause` is asked, crashed, signal, guard_lost, …"""

    worker: str
    model: str
    cause: str
    status: str
    asked: bool


@dataclass(frozen=True, slots=True)
class WorkerEnded(Event):
    """The whole process tree is gone; `how` is exit, term or kill."""

    worker: str
    model: str
    how: str
    stop_s: float
    members: int


@dataclass(frozen=True, slots=True)
class WorkerRestartPlanned(Event):
    """The worker will start again by itself after `delay_s`."""

    worker: str
    model: str
    delay_s: float
    starts: int
    allowed: int


@dataclass(frozen=True, slots=True)
class DeviceMoved(Event):
    """A device came to be OK, QUARANTINED or LOST; `code` and `reason` say why."""

    device: str
    old: str
    new: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceRead(Event):
    """A device, as the driver told it just now; None is what it does not tell."""

    device: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    temperature_c: int | None
    ecc_errors: int | None


@dataclass(frozen=True, slots=True)
class XidSeen(Event):
    """The driver reported an Xid, `count` times at once: `kind` is device, application or note."""

    device: str
    xid: int
    kind: str
    meaning: str
    after_own_kill: bool
    count: int = 1


@dataclass(frozen=True, slots=True)
class StrangerSeen(Event):
    """A process that is not hive's took memory of a device that hive serves on."""

    device: str
    pid: int
    name: str
    used_bytes: int


@dataclass(frozen=True, slots=True)
class VramChecked(Event):
    """After a worker's end: its VRAM was returned, kept, or that is unproven; `detail` says why."""

    worker: str
    device: str
    outcome: str
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True)
class LeakFound(Event):
    """Something that a worker took was not given back; `how` says how to clear it."""

    kind: str
    holder: str
    worker: str
    how: str


@dataclass(frozen=True, slots=True)
class LeakCleared(Event):
    """A leak is gone when it was looked at again."""

    kind: str
    holder: str
    worker: str


@dataclass(frozen=True, slots=True)
class RequestAdmitted(Event):
    """A client's request got a slot of a worker, after `queue_s` in the waiting room."""

    request_id: str
    model: str
    worker: str
    queue_s: float


@dataclass(frozen=True, slots=True)
class RequestRefused(Event):
    """A request was turned away before anything was forwarded; `reason` is bounded."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class HintJudged(Event):
    """A place became free: how far off an earlier Retry-After was."""

    model: str
    error_s: float


@dataclass(frozen=True, slots=True)
class RequestExpired(Event):
    """A limit of a request passed: `phase` names it."""

    request_id: str
    model: str
    phase: str


@dataclass(frozen=True, slots=True)
class RequestAborted(Event):
    """What the engine did for a request was cut off; `confirmed` (yes, no, unknown): it stopped.

    `seconds` are from the abort until the slot was free.
    """

    request_id: str
    model: str
    worker: str
    confirmed: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RequestRetried(Event):
    """A request is sent again after `delay_s`, as call number `attempt` of `allowed`."""

    request_id: str
    operation: str
    model: str
    worker: str
    attempt: int
    allowed: int
    delay_s: float
    code: str


@dataclass(frozen=True, slots=True)
class RetriesEnded(Event):
    """Retries came to an end: `outcome` is success, exhausted or deadline."""

    operation: str
    outcome: str


@dataclass(frozen=True, slots=True)
class BreakerMoved(Event):
    """A worker's breaker came to be closed, open or half_open after `failures` in a row."""

    model: str
    worker: str
    old: str
    new: str
    failures: int


@dataclass(frozen=True, slots=True)
class RequestEnded(Event):
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


@dataclass(frozen=True, slots=True)
class DaemonMoved(Event):
    """The daemon itself: listening, stopping, stopped."""

    state: str
    detail: str = ""


Listener = Callable[[Event], None]


# What metrics count, and what the end of a request tells in logs and streams: there would be too many.
COUNTED: tuple[type[Event], ...] = (
    DeviceRead,
    HintJudged,
    RequestAborted,
    RequestAdmitted,
    RequestExpired,
    RequestRefused,
    RetriesEnded,
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
