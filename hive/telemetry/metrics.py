"""Prometheus metrics, counted from what hive announces; all registered at start."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hive.devices.faults import XIDS
from hive.devices.watch import Condition, Receipt
from hive.errors import Family, RequestCancelled, Severity, by_code
from hive.events import (
    AlertTried,
    AuditMoved,
    BreakerMoved,
    ConnectionRefused,
    DeviceMoved,
    DeviceRead,
    Escalated,
    Event,
    HintJudged,
    LeakFound,
    OutboxCounted,
    RequestAborted,
    RequestAdmitted,
    RequestEnded,
    RequestExpired,
    RequestRefused,
    RequestRetried,
    RetriesEnded,
    ServiceLevelMoved,
    ThawProved,
    VramChecked,
    WindowOperationEnded,
    WindowsCounted,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerStarted,
    XidSeen,
)
from hive.policy.deadlines import Phase
from hive.policy.escalation import ServiceLevel
from hive.policy.lifecycle import State
from hive.policy.windows import WindowState
from hive.workers.leftovers import KINDS

LAG_S = 0.5  # how often the event loop's lag is measured
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


OPERATIONS = ("freeze", "thaw", "clone", "delete", "verify", "repair", "backup", "restore")
INFERENCE = "inference"
OUTCOMES = ("success", "timeout", "transient", "permanent", "cancelled")
_STATUS_OUTCOMES = {
    408: "timeout",
    504: "timeout",
    429: "transient",
    502: "transient",
    503: "transient",
}
_REFUSED = 400  # the lowest status of an answer that is an error
_BREAKER = {"closed": 0, "half_open": 1, "open": 2}
# Series that are there before their first event: what is alerted on must not begin with it.
STATUSES = ("200", "400", "401", "429", "499", "500", "502", "503", "504")
REASONS = (
    *("slots_busy", "queue_full", "queue_timeout", "loading", "draining", "worker_failed"),
    *("worker_stopped", "quarantined", "circuit_breaker_open"),
)
CONFIRMED = ("yes", "no", "unknown")
CAUSES = ("asked", "hung", "crashed", "signal", "out_of_memory", "member_lost", "guard_lost")


M = TypeVar("M", Counter, Gauge, Histogram)


class Room(Protocol):
    """What is counted when somebody looks."""

    @property
    def in_flight(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class Metrics:
    """The registry and the listener that fills it. Labels are names from the configuration."""

    def __init__(
        self,
        workers: Iterable[tuple[str, str]],
        devices: Iterable[str] = (),
        rooms: Mapping[str, Room] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`workers` are (worker id, model) pairs, `devices` ids; their series exist from the start.

        `rooms` maps each model to what tells how many requests hold slots, and how many wait.
        `now` tells monotonic seconds.
        """
        self._now = now
        self._down_since: dict[str, float] = {}  # workers that failed while they were READY
        self.registry = CollectorRegistry()
        self._series: dict[tuple[Any, tuple[str, ...]], Any] = {}
        r = self.registry
        self.requests = Counter(
            "hive_requests", "Client requests by HTTP status sent.", ["model", "status"], registry=r
        )
        self.failures = Counter(
            "hive_request_failures",
            "Client requests that ended with a coded error.",
            ["model", "code"],
            registry=r,
        )
        self.request_s = Histogram(
            "hive_request_seconds",
            "Arrival to the end of the answer, seconds.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.first_byte_s = Histogram(
            "hive_first_byte_seconds",
            "Arrival to the answer's first byte, seconds.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.in_flight = Gauge(
            "hive_in_flight",
            "Slots held: requests that a worker answers, or has not stopped working on yet.",
            ["model"],
            registry=r,
        )
        self.waiting = Gauge("hive_waiting", "Requests in the waiting room.", ["model"], registry=r)
        self.queue_s = Histogram(
            "hive_queue_seconds",
            "Arrival in the waiting room to a slot, seconds.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.refusals = Counter(
            "hive_refusals",
            "Requests turned away before anything was forwarded, by reason.",
            ["model", "reason"],
            registry=r,
        )
        self.connections_refused = Counter(
            "hive_connections_refused",
            "Connections beyond as many as there may be: answered with 503, in no request's count.",
            registry=r,
        )
        self.hint_error_s = Histogram(
            "hive_retry_after_error_seconds",
            "How far off Retry-After was: from the hint to when a place was next free, seconds.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.timeouts = Counter(
            "hive_timeouts",
            "Limits of requests that passed, by phase.",
            ["model", "phase"],
            registry=r,
        )
        self.cancellations = Counter(
            "hive_cancellations",
            "Requests cut off at the engine; confirmed: yes, no, or unknown where it has no gauges.",
            ["model", "confirmed"],
            registry=r,
        )
        self.cancel_s = Histogram(
            "hive_cancel_to_free_seconds",
            "From the abort of a request to its free slot, seconds.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.breaker_state = Gauge(
            "hive_breaker_state",
            "A worker's breaker: 0 closed, 1 half open, 2 open.",
            ["model", "worker"],
            registry=r,
        )
        self.retries = Counter(
            "hive_retries",
            "Calls made again (outcome retry), and how it ended: success, exhausted, deadline, failed.",
            ["operation", "outcome"],
            registry=r,
        )
        self._register_workers()
        self.lag_s = Histogram(
            "hive_event_loop_lag_seconds",
            "How late the event loop ran a timer, seconds.",
            buckets=_LAG,
            registry=r,
        )
        self.vram_bytes = Gauge(
            "hive_device_vram_bytes",
            "Memory of a device, bytes: total, used and free.",
            ["device", "kind"],
            registry=r,
        )
        self.temperature_c = Gauge(
            "hive_device_temperature_celsius",
            "Temperature of a device, degrees Celsius.",
            ["device"],
            registry=r,
        )
        self.ecc_errors = Gauge(
            "hive_device_ecc_errors",
            "Memory errors of a device that could not be corrected, since its driver was loaded.",
            ["device"],
            registry=r,
        )
        self.device_state = Gauge(
            "hive_device_state",
            "1 for the state that a device is in.",
            ["device", "state"],
            registry=r,
        )
        self.xids = Counter(
            "hive_xid",
            'Xid errors that the driver reported; "other" for numbers that are not in hive\'s catalogue.',
            ["device", "xid"],
            registry=r,
        )
        self.vram_receipts = Counter(
            "hive_vram_receipts",
            "Looks at a device's memory after a worker's end: returned, kept or unproven.",
            ["device", "outcome"],
            registry=r,
        )
        self.leaks = Counter(
            "hive_leaks", "What workers did not give back, by kind.", ["kind"], registry=r
        )
        self._register_windows()
        self._register_alerts()
        self._begin(workers, devices)
        for model, room in (rooms or {}).items():
            self._count_from_zero(model)
            self._of(self.in_flight, model).set_function(partial(getattr, room, "in_flight"))
            self._of(self.waiting, model).set_function(partial(getattr, room, "waiting"))

    def _begin(self, workers: Iterable[tuple[str, str]], devices: Iterable[str]) -> None:
        """Series that are there before their first event."""
        for device in devices:
            self._set_device_state(device, Condition.OK)
            for receipt in Receipt:
                self._of(self.vram_receipts, device, str(receipt))
        for kind in KINDS:
            self._of(self.leaks, kind)
        for worker, model in workers:
            self._of(self.queue_s, model)
            self._of(self.hint_error_s, model)
            self._of(self.cancel_s, model)
            self._of(self.breaker_state, model, worker)
            self._of(self.worker_starts, worker)
            self._of(self.request_s, model)
            self._of(self.first_byte_s, model)
            self._of(self.load_s, model)
            for cause in CAUSES:
                self._of(self.worker_exits, worker, cause)
            self._set_state(worker, State.STOPPED)
            self._of(self.crashes, model)
            self._of(self.recovery_s, model)
        self._of(self.requests, "", "401")
        for operation in (INFERENCE, *OPERATIONS):
            for outcome in OUTCOMES:
                self._of(self.operations, operation, outcome)

    def _count_from_zero(self, model: str) -> None:
        for status in STATUSES:
            self._of(self.requests, model, status)
        for reason in REASONS:
            self._of(self.refusals, model, reason)
        for phase in Phase:
            self._of(self.timeouts, model, str(phase))
        for confirmed in CONFIRMED:
            self._of(self.cancellations, model, confirmed)

    def _register_workers(self) -> None:
        r = self.registry
        self.worker_state = Gauge(
            "hive_worker_state",
            "1 for the state that a worker is in.",
            ["worker", "state"],
            registry=r,
        )
        self.worker_starts = Counter(
            "hive_worker_starts", "Engine processes started.", ["worker"], registry=r
        )
        self.worker_exits = Counter(
            "hive_worker_exits",
            "Ends of engine processes by cause: asked, hung, crashed, signal, out_of_memory (the "
            "kernel's), member_lost, guard_lost.",
            ["worker", "cause"],
            registry=r,
        )
        self.load_s = Histogram(
            "hive_worker_load_seconds",
            "Process start to READY, seconds.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.crashes = Counter(
            "hive_worker_crashes",
            "Ends of engine processes that nobody asked for, of hung ones, too.",
            ["model"],
            registry=r,
        )
        self.recovery_s = Histogram(
            "hive_worker_recovery_seconds",
            "From a worker's failure while it was READY until it is READY again, seconds (MTTR); "
            "one that an operator stops meanwhile is not counted.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.engine_up = Gauge(
            "hive_engine_scrape_up",
            "Whether the engine's own metrics could be read for this scrape: 1 yes, 0 no; without a "
            "series the worker has no engine that answers now, or it has no metrics.",
            ["worker"],
            registry=r,
        )
        self.engine_left_out = Gauge(
            "hive_engine_families_left_out",
            "Families of the engine's own metrics that this scrape leaves out, whole or in part: not "
            "valid, called hive_, or of another type than another engine's.",
            ["worker"],
            registry=r,
        )
        self.operations = Counter(
            "hive_operations",
            "Calls of an operation (inference, or of windows) by outcome: success, timeout, transient "
            "(may succeed when tried again), permanent, cancelled (by its caller).",
            ["operation", "outcome"],
            registry=r,
        )
        self.stop_s = Histogram(
            "hive_stop_seconds",
            "First signal to the last process's end, seconds.",
            ["worker", "how"],
            buckets=_SECONDS,
            registry=r,
        )

    def _register_alerts(self) -> None:
        r = self.registry
        self.escalations = Counter(
            "hive_escalations",
            "Escalations by level; what happens again while one is open is not counted.",
            ["level"],
            registry=r,
        )
        self.service_level = Gauge(
            "hive_service_level",
            "How much can be had: 0 full, 1 degraded, 2 critical (a model is not served, or most "
            "workers are not there), 3 down.",
            registry=r,
        )
        self.outbox_waiting = Gauge(
            "hive_outbox_waiting",
            "Messages that are to be sent to the alerts' webhook.",
            registry=r,
        )
        self.outbox_failures = Counter(
            "hive_outbox_failures",
            "Messages to the alerts' webhook that it did not take, each try, and that were dropped.",
            registry=r,
        )
        self.outbox_messages = Counter(
            "hive_outbox_messages",
            "Messages to the alerts' webhook by what became of them: sent, dropped.",
            ["outcome"],
            registry=r,
        )
        self.audit_failing = Gauge(
            "hive_audit_failing",
            "Whether the audit log cannot be written, or an old file of it not removed: 1 yes, 0 no.",
            registry=r,
        )
        self.audit_damaged = Gauge(
            "hive_audit_damaged",
            "Whether this hive has found the audit log not to be as it was left: 1 yes, 0 no.",
            registry=r,
        )
        for level in Severity:
            self._of(self.escalations, str(level))
        for outcome in ("sent", "dropped"):
            self._of(self.outbox_messages, outcome)
        self.service_level.set(ServiceLevel.DOWN)  # until a worker serves

    def _register_windows(self) -> None:
        r = self.registry
        self.windows = Gauge("hive_windows", "Context windows, by state.", ["state"], registry=r)
        self.window_s = Histogram(
            "hive_window_operation_seconds",
            "What was done with a window: freeze, thaw, verify, repair, clone, delete, backup, restore; seconds.",
            ["operation"],
            buckets=_SECONDS,
            registry=r,
        )
        self.window_failures = Counter(
            "hive_window_failures",
            "What was done with a window and failed, by the error's code.",
            ["operation", "code"],
            registry=r,
        )
        self.thaw_tokens = Counter(
            "hive_thaw_tokens",
            "Tokens of thawed windows: promised by the receipt, and cached by the engine's own "
            "count at the next request.",
            ["kind"],
            registry=r,
        )
        for state in WindowState:
            self._of(self.windows, str(state))
        for operation in OPERATIONS:
            self._of(self.window_s, operation)
        for kind in ("promised", "cached"):
            self._of(self.thaw_tokens, kind)

    def _of(self, metric: M, *labels: str) -> M:
        """One series of a metric; looked up by hive, which is a tenth of what the library needs."""
        series = self._series.get((metric, labels))
        if series is None:
            series = self._series[metric, labels] = metric.labels(*labels)
        return series

    def hear(self, event: Event) -> None:
        match event:
            case RequestEnded() if event.model is None and (
                event.path.startswith("/hive/") or event.method == "GET"
            ):
                pass  # operators' requests are not inference
            case RequestEnded():
                self._count(event)
            case RequestAdmitted():
                self._of(self.queue_s, event.model).observe(event.queue_s)
            case RequestRefused():
                self._of(self.refusals, event.model, event.reason).inc()
            case _:
                self._hear_of_requests(event)

    def _hear_of_requests(self, event: Event) -> None:
        match event:
            case HintJudged():
                self._of(self.hint_error_s, event.model).observe(event.error_s)
            case ConnectionRefused():
                self.connections_refused.inc()
            case RequestExpired():
                self._of(self.timeouts, event.model, event.phase).inc()
            case RequestAborted():
                self._of(self.cancellations, event.model, event.confirmed).inc()
                self._of(self.cancel_s, event.model).observe(event.seconds)
            case RequestRetried():
                self._of(self.retries, event.operation, "retry").inc()
            case RetriesEnded():
                self._of(self.retries, event.operation, event.outcome).inc()
            case BreakerMoved():
                self._of(self.breaker_state, event.model, event.worker).set(_BREAKER[event.new])
            case _:
                self._hear_of_workers(event)

    def _hear_of_workers(self, event: Event) -> None:
        match event:
            case WorkerMoved():
                self._set_state(event.worker, State(event.new))
                self._time_recovery(event)
            case WorkerStarted():
                self._of(self.worker_starts, event.worker).inc()
            case WorkerReady():
                self._of(self.load_s, event.model).observe(event.load_s)
            case WorkerExited():
                self._of(self.worker_exits, event.worker, event.cause).inc()
                if not event.asked or event.cause == "hung":
                    self._of(self.crashes, event.model).inc()
            case WorkerEnded():
                self._of(self.stop_s, event.worker, event.how).observe(event.stop_s)
            case _:
                self._hear_of_devices(event)

    def _hear_of_devices(self, event: Event) -> None:
        match event:
            case DeviceMoved():
                self._set_device_state(event.device, Condition(event.new))
            case DeviceRead():
                for kind in ("total", "used", "free"):
                    self._of(self.vram_bytes, event.device, kind).set(
                        getattr(event, f"{kind}_bytes")
                    )
                if event.temperature_c is not None:
                    self._of(self.temperature_c, event.device).set(event.temperature_c)
                if event.ecc_errors is not None:
                    self._of(self.ecc_errors, event.device).set(event.ecc_errors)
            case XidSeen():
                xid = str(event.xid) if event.xid in XIDS else "other"
                self._of(self.xids, event.device, xid).inc(event.count)
            case VramChecked():
                self._of(self.vram_receipts, event.device, event.outcome).inc()
            case LeakFound():
                self._of(self.leaks, event.kind).inc()
            case _:
                self._hear_of_windows(event)

    def _hear_of_windows(self, event: Event) -> None:
        match event:
            case WindowsCounted():
                self._of(self.windows, event.state).set(event.count)
            case WindowOperationEnded():
                self._of(self.window_s, event.operation).observe(event.seconds)
                outcome = outcome_of(event.code) if event.code else "success"
                self._of(self.operations, event.operation, outcome).inc()
                if event.code:
                    self._of(self.window_failures, event.operation, event.code).inc()
            case ThawProved():
                self._of(self.thaw_tokens, "promised").inc(event.promised_tokens)
                self._of(self.thaw_tokens, "cached").inc(event.cached_tokens)
            case _:
                self._hear_of_alerts(event)

    def _hear_of_alerts(self, event: Event) -> None:
        match event:
            case Escalated():
                self._of(self.escalations, event.level).inc()
            case ServiceLevelMoved():
                self.service_level.set(ServiceLevel[event.new.upper()])
            case AuditMoved(state="damaged"):
                self.audit_damaged.set(1)
            case AuditMoved():
                self.audit_failing.set(event.state == "failing")
            case OutboxCounted():
                self.outbox_waiting.set(event.waiting)
            case AlertTried():
                if event.outcome != "sent":
                    self.outbox_failures.inc()
                if event.outcome != "failed":
                    self._of(self.outbox_messages, event.outcome).inc()

    def _count(self, event: RequestEnded) -> None:
        model = event.model or ""  # refused before a model was known
        self._of(self.requests, model, str(event.status)).inc()
        self._of(self.operations, INFERENCE, outcome_of(event.code, event.status)).inc()
        if event.code:
            self._of(self.failures, model, event.code).inc()
        if event.worker:
            self._of(self.request_s, model).observe(event.seconds)
        if event.first_byte_s is not None:
            self._of(self.first_byte_s, model).observe(event.first_byte_s)

    def _time_recovery(self, event: WorkerMoved) -> None:
        """R254. Who is asked to stop drains first; with haste it comes to STOPPED."""
        match State(event.old), State(event.new):
            case State.READY, State.STOPPING:
                self._down_since[event.worker] = self._now()
            case _, State.STOPPED:
                self._down_since.pop(event.worker, None)
            case _, State.READY:
                since = self._down_since.pop(event.worker, None)
                if since is not None:
                    self._of(self.recovery_s, event.model).observe(self._now() - since)

    def engines_were_read(self, was_read: Mapping[str, bool], left_out: Mapping[str, int]) -> None:
        """Of the workers that have metrics: whether they could be read, and what was left out."""
        self.engine_up.clear()
        self.engine_left_out.clear()
        for worker, is_up in was_read.items():
            self.engine_up.labels(worker).set(is_up)
        for worker, count in left_out.items():
            self.engine_left_out.labels(worker).set(count)

    def _set_state(self, worker: str, now: State) -> None:
        for state in State:
            self._of(self.worker_state, worker, str(state)).set(state is now)

    def _set_device_state(self, device: str, now: Condition) -> None:
        for state in Condition:
            self._of(self.device_state, device, str(state)).set(state is now)

    @asynccontextmanager
    async def measuring_lag(self, clock: Callable[[], float] | None = None) -> AsyncIterator[None]:
        """Observe how late the loop is while the block runs."""
        now = clock or asyncio.get_running_loop().time

        async def measure() -> None:
            while True:
                due = now() + LAG_S
                await asyncio.sleep(LAG_S)
                self.lag_s.observe(max(0.0, now() - due))

        async with asyncio.TaskGroup() as tasks:
            measuring = tasks.create_task(measure(), name="event loop lag")
            try:
                yield
            finally:
                measuring.cancel()


@lru_cache(1024)
def outcome_of(code: str | None, status: int = 500) -> str:
    """What became of a call, by its error's code or by the status that the engine itself gave it.

    R184: failed connections and limits that passed are transient; so is what hive calls retryable.
    """
    if code == RequestCancelled.code:
        return "cancelled"
    error = by_code(code) if code else None
    if error is None:
        is_well = code is None and status < _REFUSED
        return "success" if is_well else _STATUS_OUTCOMES.get(status, "permanent")
    if error.family is Family.TIMEOUT:
        return "timeout"
    return "transient" if error.retryable or error.family is Family.CONNECTION else "permanent"
