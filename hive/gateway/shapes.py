"""What hive answers on its own surface, as types: the schemas of the OpenAPI document.

Times are seconds since 1970 unless a name says otherwise, byte counts are bytes. Clients must be ready for
more members than these: a version may add some.
"""

from typing import Any, Literal, NotRequired, TypedDict

from hive.devices.watch import Condition
from hive.errors import Family, Severity
from hive.policy.breaker import BreakerState
from hive.policy.lifecycle import State
from hive.policy.windows import SessionState, WindowState

Level = Literal["full", "degraded", "critical", "down"]


# ── the daemon ──────────────────────────────────────────────────────────────────────────────────


class Livez(TypedDict):
    status: Literal["alive"]
    version: str
    api_version: str


class ModelStates(TypedDict):
    """A model: whether it can serve, and the states of its workers by their ids."""

    ready: bool
    workers: dict[str, State]


class Readiness(TypedDict):
    status: Literal["ready", "draining", "unavailable"]
    models: dict[str, ModelStates]
    devices: NotRequired[dict[str, Condition]]


class DaemonStatus(TypedDict):
    version: str
    pid: int
    began: float
    uptime_seconds: float
    ready: bool
    draining: bool
    in_flight: int
    service_level: Level
    models: dict[str, ModelStates]


class Draining(TypedDict):
    status: Literal["draining"]


class RequestInFlight(TypedDict):
    request_id: str
    method: str
    path: str
    model: str | None
    worker: str | None
    key: str | None
    began: float
    seconds: float
    phase: Literal["queued", "waiting", "answering"]
    bytes_out: int


class Requests(TypedDict):
    requests: list[RequestInFlight]


# ── escalations ─────────────────────────────────────────────────────────────────────────────────


class Alert(TypedDict):
    """What escalated and is not over. Names are of the configuration, empty where they do not apply."""

    rule: str
    level: Severity
    subject: str
    operation: str
    model: str
    worker: str
    device: str
    code: str
    message: str
    recommended_action: str
    began_at: str
    seconds: float
    repeats: int


class AlertMessage(TypedDict):
    """A message to the webhook."""

    delivery: str
    rule: str
    subject: str
    level: Severity
    resolved: bool
    state: Literal["waiting", "sent", "dropped"]
    queued_at: float
    attempts: int
    last_error: str


class OutboxView(TypedDict):
    """Messages that wait for the webhook; `attempts` and `last_error` are the oldest one's."""

    enabled: bool
    waiting: int
    oldest_at: float | None
    attempts: int
    last_error: str
    next_try_seconds: float
    disk_error: str
    messages: list[AlertMessage]


class Alerts(TypedDict):
    service_level: Level
    alerts: list[Alert]
    outbox: OutboxView


# ── workers and devices ─────────────────────────────────────────────────────────────────────────


class BreakerView(TypedDict):
    state: BreakerState
    failures: int
    retry_in_seconds: float


class WorkerView(TypedDict):
    """A worker; the LMCache server, which takes no requests, has no slots and no breaker."""

    id: str
    model: str
    state: State
    device: str | list[str]
    pid: int | None
    guard_pid: int | None
    reason: str
    since: float
    in_flight: int
    starts: int
    unasked_restarts: int
    load_seconds: float | None
    last_exit: str | None
    last_exit_code: int | None
    error: str | None
    slots: NotRequired[int]
    waiting: NotRequired[int]
    breaker: NotRequired[BreakerView]
    cache: NotRequired[Literal["ok", "none", "lost"]]


class Workers(TypedDict):
    workers: list[WorkerView]


class DeviceProcess(TypedDict):
    pid: int
    name: str
    vram_bytes: int | None
    is_ours: bool


class XidView(TypedDict):
    at: float
    xid: int


class DeviceView(TypedDict):
    """A GPU; what the driver has not told yet is missing, what it does not tell is null."""

    id: str
    uuid: str
    name: str
    vram_total_bytes: NotRequired[int]
    vram_used_bytes: NotRequired[int]
    vram_free_bytes: NotRequired[int]
    temperature_celsius: NotRequired[int | None]
    ecc_uncorrectable_errors: NotRequired[int | None]
    rows_remap_pending: NotRequired[bool | None]
    rows_remap_failed: NotRequired[bool | None]
    processes: NotRequired[list[DeviceProcess]]
    state: Condition
    reason: str
    error: str | None
    since: float
    read_at: float | None
    xids: list[XidView]
    events: Literal["event set", "polling"]
    workers: list[str]


class Devices(TypedDict):
    devices: list[DeviceView]


class LeakView(TypedDict):
    kind: str
    holder: str
    worker: str
    mark: str
    how_to_clear: str
    since: float


class Leaks(TypedDict):
    leaks: list[LeakView]


# ── health ──────────────────────────────────────────────────────────────────────────────────────


class ComponentHealth(TypedDict):
    ok: bool
    seconds: NotRequired[float]
    code: NotRequired[str]
    found: NotRequired[str]


class Health(TypedDict):
    status: Literal["ok", "degraded", "down"]
    components: dict[str, ComponentHealth]


class EnginesHealth(TypedDict):
    status: Literal["ok"]
    seconds: dict[str, float]


class CacheHealth(TypedDict):
    status: Literal["ok"]
    seconds: float


# ── sessions, windows, backups ──────────────────────────────────────────────────────────────────


class SessionView(TypedDict):
    id: str
    state: SessionState
    model: str
    owner: str | None
    created_at: float
    used_at: float
    has_conversation: bool


class SessionWithMessages(SessionView):
    """With the conversation, as the next request would send it again."""

    messages: list[Any]


class Sessions(TypedDict):
    sessions: list[SessionView]


class Receipt(TypedDict):
    """What the last thaw found, and `cached_tokens`, which the engine counted afterwards."""

    blocks_found: int
    blocks_missing: int
    usable_tokens: int
    recompute_tokens: int
    partial: bool
    linked_files: int
    thawed_at: float
    session_id: str
    cached_tokens: NotRequired[int]


class WindowView(TypedDict):
    name: str
    state: WindowState
    session_id: str
    owner: str | None
    model: str
    created_at: float
    tokens: int
    blocks: int
    bytes: int
    description: str
    tags: list[str]
    identity: dict[str, Any]
    receipt: Receipt | None


class Windows(TypedDict):
    windows: list[WindowView]
    next_offset: NotRequired[int]


class Lineage(TypedDict):
    ancestors: list[str]
    clones: list[str]


class InCache(TypedDict):
    files_in_tier: int | None


class WindowStatus(WindowView):
    """With its family, and how much of it the KV cache has at hand."""

    lineage: Lineage
    cache: InCache


class Thawed(TypedDict):
    session_id: str
    model: str
    messages: list[Any]
    receipt: Receipt
    warnings: list[str]


class WindowReport(TypedDict):
    name: str
    whole: bool
    blocks: int
    blocks_whole: int
    missing: list[str]
    corrupt: list[str]
    recovered: int
    recomputed: int


class BackupView(TypedDict):
    window: str
    timestamp: str
    owner: str | None
    session_id: str
    model: str
    created_at: float
    frozen_at: float
    tokens: int
    blocks: int
    bytes: int
    file_bytes: int
    whole: bool
    description: str
    tags: list[str]


class UnreadableBackup(TypedDict):
    file: str
    why: str


class Backups(TypedDict):
    """`unreadable` is told to an admin who asks for everybody's."""

    backups: list[BackupView]
    next_offset: NotRequired[int]
    unreadable: NotRequired[list[UnreadableBackup]]


class RestoredFrom(TypedDict):
    window: str
    timestamp: str


class RestoredWindow(WindowView):
    backup: RestoredFrom


# ── errors ──────────────────────────────────────────────────────────────────────────────────────


class ErrorDetails(TypedDict):
    """What every error has; each code adds what docs/errors.md says of it."""

    suggested_action: str
    retryable: bool
    request_id: NotRequired[str]
    timestamp: str
    http_status: int
    category: Family
    severity: Severity
    retry_after_seconds: NotRequired[int]
    number: NotRequired[str]
    reason: NotRequired[str]


class ErrorFacts(TypedDict):
    message: str
    type: str
    code: str
    param: str | None
    details: ErrorDetails


class Error(TypedDict):
    """Both OpenAI's and Anthropic's clients make an exception of it."""

    type: Literal["error"]
    error: ErrorFacts
