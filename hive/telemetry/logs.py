"""Structured logs: every line with its request id, secrets taken out, one line for each fact.

JSON, unless stderr is a terminal. Levels follow C29; an error's level is its class's. Whoever
logs never waits for whoever reads: a thread writes, and what does not fit is dropped and counted.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections import deque
from functools import lru_cache
from typing import Any

import msgspec
import structlog
from aiohttp.http import HttpProcessingError
from msgspec.structs import asdict
from structlog.types import EventDict, Processor

from hive.errors import by_code
from hive.events import (
    AlertTried,
    AuditMoved,
    BreakerMoved,
    DaemonMoved,
    DeviceMoved,
    Escalated,
    EscalationResolved,
    Event,
    LeakCleared,
    LeakFound,
    ReloadEnded,
    RequestEnded,
    RequestRetried,
    RollbackMoved,
    ServiceLevelMoved,
    SessionMoved,
    StrangerSeen,
    ThawProved,
    VramChecked,
    WindowOperationEnded,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
    XidSeen,
    request_id_var,
)
from hive.policy.escalation import ServiceLevel
from hive.policy.redaction import without_secrets
from hive.policy.visible import visible
from hive.settings import Settings

STDERR = 2
HELD_CHARS = 8 * 2**20  # of lines that are not written yet
GATHER_S = 0.02  # lines of requests are written together: a write each would cost more than they
MOST_AT_ONCE = 256  # lines
FLUSH_S = 2.0  # what whoever reads gets at the end to take the last lines
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# syslog's numbers (sd-daemon(3))
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
# A request without a code is good news; the paths that probes and scrapers ask are noise.
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})


def _with_request_id(_logger: Any, _name: str, line: EventDict) -> EventDict:
    request_id = request_id_var.get()
    if request_id is not None:
        line.setdefault("request_id", request_id)
    return line


def _redacted(_logger: Any, _name: str, line: EventDict) -> EventDict:
    for key, value in line.items():
        if isinstance(value, str):
            line[key] = without_secrets(value)
    return line


def _visible(_logger: Any, _name: str, line: EventDict) -> EventDict:
    """What engines and clients said must not steer the operator's terminal."""
    return {key: visible(value) if isinstance(value, str) else value for key, value in line.items()}


def _bad_http(record: logging.LogRecord) -> bool:
    """What a client sent that is not HTTP is its fault: a line without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.msg, record.args = "a request that is not HTTP was refused", ()
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.exc_info = record.exc_text = None
    return True


class Writer(logging.Handler):
    """Writes lines to a descriptor from a thread of its own; `emit` never waits.

    Lines are formatted where they are logged: there are the request's context and its secrets.
    Once one does not fit, all are dropped until those that are held are written, so that the
    order is kept and the gap is told once, where it is.
    """

    def __init__(self, fd: int, *, is_json: bool = True) -> None:
        super().__init__()
        self.is_json = is_json
        self._fd = fd
        self._is_journal = is_journal(fd)
        self._lines: deque[str] = deque()
        self._held = self._dropped = 0
        self._is_closed = self._is_writing = self._is_urgent = False
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 (as every handler: a bad log call is no failure of hive)
            self.handleError(record)
            return
        self.hold(line, record.levelno)

    def hold(self, line: str, level: int, *, is_urgent: bool = True) -> None:
        """Write a line; one that is not urgent waits up to GATHER_S for others."""
        with self._changed:
            if self._dropped or self._held + len(line) > HELD_CHARS:
                self._dropped += 1
            else:
                self._hold(self._ranked(line, level), is_urgent=is_urgent)

    def tell(self, text: str) -> None:
        """Write lines that are no log lines after those that are; they always fit."""
        with self._changed:
            if self._dropped:
                self._hold(self._gap())
            self._hold(text)

    def flush(self) -> None:
        """Return when all is written, or when nobody has taken it within FLUSH_S."""
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_behind, FLUSH_S)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    @property
    def _is_behind(self) -> bool:
        return bool(self._lines or self._dropped or self._is_writing)

    def _hold(self, text: str, *, is_urgent: bool = True) -> None:
        is_first = not self._lines
        self._lines.append(text)
        self._held += len(text)
        if is_urgent and not self._is_urgent:
            self._is_urgent = True
            self._changed.notify_all()
        elif is_first:
            self._changed.notify_all()

    def _gap(self) -> str:
        count, self._dropped = self._dropped, 0
        said = f"{count} log lines were dropped: nobody read them in time"
        record = logging.LogRecord("hive", logging.WARNING, "", 0, said, (), None)
        return self._ranked(self.format(record), record.levelno)

    def _ranked(self, line: str, level: int) -> str:
        """As the journal wants it: it takes the number off, and `journalctl -p` filters by it."""
        return f"<{_PRIORITIES.get(level, 6)}>{line}\n" if self._is_journal else f"{line}\n"

    def _write(self) -> None:
        while (text := self._next()) is not None:
            with contextlib.suppress(OSError):  # its reader left, or its disk is full
                unwritten = text.encode(errors="backslashreplace")
                while unwritten:
                    unwritten = unwritten[os.write(self._fd, unwritten) :]

    def _next(self) -> str | None:
        """What is to be written next, when there is something; None at the end."""
        with self._changed:
            self._is_writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or self._is_behind)
            if not self._is_behind:
                return None
            self._changed.wait_for(lambda: self._is_closed or self._is_urgent, GATHER_S)
            self._is_writing = True
            if not self._lines:
                return self._gap()
            some: list[str] = []
            while self._lines and len(some) < MOST_AT_ONCE:
                self._held -= len(self._lines[0])
                some.append(self._lines.popleft())
            self._is_urgent = bool(self._lines)
            return "".join(some)

    def __repr__(self) -> str:
        return f"<Writer {len(self._lines)} lines held, {self._dropped} dropped>"


def is_journal(fd: int) -> bool:
    """Whether what is written there goes to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        there = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"


def tell(text: str) -> None:
    """Write lines for people, in order with the log."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Writer):
            handler.tell(text)


def set_level(level: str) -> None:
    logging.getLogger().setLevel(_LEVELS[level])


def apply(settings: Settings) -> None:
    """From now on this level is the least that is logged."""
    set_level(settings.server.log_level)


def configure(level: str = "info", fd: int = STDERR) -> Writer:
    """Send everything, the standard library's logging included, to stderr in one form."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_request_id,
    ]
    is_terminal = os.isatty(fd)
    # Tracebacks plain: the pretty ones show local variables, which nothing would redact.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    last: list[Processor] = (
        [_visible, plain] if is_terminal else [structlog.processors.JSONRenderer()]
    )
    handler = Writer(fd, is_json=not is_terminal)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                _redacted,
                *last,
            ],
        )
    )
    logging.getLogger("aiohttp.server").addFilter(_bad_http)
    # A line for each start says nothing; what it does to the catalogue is told as an error.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # At the debug level these tell every statement with its parameters: what was said, and salts.
    for name in ("aiosqlite", "sqlalchemy", "asyncpg"):
        logging.getLogger(name).setLevel(logging.WARNING)
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return handler


def write(event: Event) -> None:
    """The listener: one line a fact."""
    if isinstance(event, RequestEnded):  # most of them are
        _write_access(event)
        return
    log: Any = structlog.get_logger("hive")
    match event:
        case RequestRetried():
            log.warning("request is sent again", **asdict(event))
        case BreakerMoved():
            is_open = event.new == "open"
            log.log(logging.ERROR if is_open else logging.INFO, "breaker moved", **asdict(event))
        case WorkerMoved():
            bad = event.new in ("FAILED", "QUARANTINED", "LOST")
            log.log(logging.ERROR if bad else logging.INFO, "worker moved", **asdict(event))
        case WorkerExited():
            is_wanted = event.asked and event.cause == "asked"  # not so one that hung
            log.log(logging.INFO if is_wanted else logging.ERROR, "engine exited", **asdict(event))
        case WorkerRestartPlanned():
            log.warning("worker restarts", **asdict(event))
        case WorkerEnded():
            level = logging.WARNING if event.how == "kill" else logging.INFO
            log.log(level, "process tree ended", **asdict(event))
        case ReloadEnded() | AuditMoved():
            _write_of_hive(log, event)
        case WorkerStarted() | WorkerReady() | DaemonMoved():
            log.info(_TITLES[type(event)], **asdict(event))
        case _:
            _write_of_devices(log, event)


def _write_of_hive(log: Any, event: ReloadEnded | AuditMoved) -> None:
    """Of its settings and its audit log."""
    match event:
        case ReloadEnded(code=""):
            log.info("settings reloaded", by=event.by, changed=", ".join(event.changed))
        case ReloadEnded():
            facts = {"by": event.by, "code": event.code, "refused": ", ".join(event.refused)}
            log.error(
                "reload refused; nothing changed", **facts, problems="; ".join(event.problems)
            )
        case AuditMoved():
            is_well = event.state == "writing"
            log.log(logging.INFO if is_well else logging.ERROR, "audit log", **asdict(event))


def _write_of_devices(log: Any, event: Event) -> None:
    match event:
        case DeviceMoved():
            is_well = event.new == "OK"
            log.log(logging.INFO if is_well else logging.ERROR, "device moved", **asdict(event))
        case XidSeen():
            level = logging.INFO if event.after_own_kill else _XID_LEVELS[event.kind]
            log.log(level, "xid", **asdict(event))
        case StrangerSeen():
            log.warning("a process that is not hive's holds a device", **asdict(event))
        case VramChecked():
            log.log(_VRAM_LEVELS[event.outcome], "vram after the end", **asdict(event))
        case LeakFound():
            log.error("leak", **asdict(event))
        case LeakCleared():
            log.info("leak cleared", **asdict(event))
        case _:
            _write_of_windows(log, event)


def _write_of_windows(log: Any, event: Event) -> None:
    match event:
        case SessionMoved():
            log.info("session moved", **asdict(event))
        case ThawProved():
            is_proved = event.cached_tokens >= event.promised_tokens
            level = logging.INFO if is_proved else logging.WARNING
            log.log(level, "thaw proved" if is_proved else "thaw not proved", **asdict(event))
        case WindowOperationEnded():
            _write_operation(log, event)
        case RollbackMoved():
            level = logging.INFO if event.is_undone else logging.ERROR
            log.log(level, "rollback moved", **asdict(event))
        case _:
            _write_of_alerts(log, event)


def _write_of_alerts(log: Any, event: Event) -> None:
    """An escalation at its own level's (R194); `level` is the line's, `severity` the escalation's."""
    match event:
        case Escalated() | EscalationResolved():
            facts = asdict(event)
            severity = facts.pop("level")
            if isinstance(event, Escalated):
                log.log(_SEVERITIES[severity], "escalated", severity=severity, **facts)
            else:
                log.info("escalation resolved", severity=severity, **facts)
        case ServiceLevelMoved():
            is_better = _SERVICE.index(event.new) < _SERVICE.index(event.old)
            level = logging.INFO if is_better else logging.WARNING
            log.log(level, "service level moved", **asdict(event))
        case AlertTried():
            facts = asdict(event)
            severity = facts.pop("level")
            log.log(_TRIED[event.outcome], "alert tried", severity=severity, **facts)


def _write_operation(log: Any, event: WindowOperationEnded) -> None:
    """R115: the same fields for all of them; a failure at its error's own level (R113)."""
    facts: dict[str, Any] = {
        "operation": event.operation,
        "session_id": event.session,
        "window_name": event.window,
        "model": event.model,
        "duration_ms": round(event.seconds * 1000, 1),
    }
    if event.code:
        error = by_code(event.code)
        level = _LEVELS[error.level if error else "error"]
        log.log(level, "window operation failed", **facts, error_code=event.code)
    else:
        done = {"blocks_stored": event.blocks, "bytes": event.bytes}
        log.info("window operation done", **facts, **done)


_SEVERITIES = {
    "info": logging.INFO,
    "medium": logging.WARNING,
    "high": logging.WARNING,
    "critical": logging.ERROR,
    "emergency": logging.CRITICAL,
}
_TRIED = {"sent": logging.INFO, "failed": logging.WARNING, "dropped": logging.ERROR}
_XID_LEVELS = {"device": logging.ERROR, "application": logging.WARNING, "note": logging.WARNING}
_VRAM_LEVELS = {"returned": logging.INFO, "unproven": logging.WARNING, "kept": logging.ERROR}
_SERVICE = [str(level) for level in ServiceLevel]  # the best first
_TITLES: dict[type[Event], str] = {
    WorkerStarted: "engine started",
    WorkerReady: "worker ready",
    DaemonMoved: "daemon",
}


def _write_access(event: RequestEnded) -> None:
    """The line of a request: there are so many that it is made by hand, where it is JSON."""
    if event.path in _QUIET and event.code is None:
        return
    cls = by_code(event.code) if event.code else None
    name = cls.level if cls else "info"
    level = _LEVELS[name]
    root = logging.getLogger()
    if not root.isEnabledFor(level):
        return
    first_s = event.first_byte_s
    line = _Access(
        # What comes from the client; the rest is hive's own words.
        event.request_id if _OWN_ID.match(event.request_id) else without_secrets(event.request_id),
        event.method,
        _without_secrets(event.path),
        event.status,
        round(event.seconds, 4),
        event.bytes_in,
        event.bytes_out,
        event.model,
        event.worker,
        event.code,
        event.key,
        None if first_s is None else round(first_s, 4),
        "request",
        name,
        "hive",
        _now(),
    )
    writer = root.handlers[0] if root.handlers else None
    if isinstance(writer, Writer) and writer.is_json:
        writer.hold(_encode(line).decode(), level, is_urgent=False)
        return
    facts = msgspec.to_builtins(line)
    for own in ("event", "level", "logger", "timestamp"):
        del facts[own]
    structlog.get_logger("hive").log(level, "request", **facts)


class _Access(msgspec.Struct, omit_defaults=True, gc=False):
    """The line of a request; what is None is left out."""

    request_id: str
    method: str
    path: str
    status: int
    seconds: float
    bytes_in: int
    bytes_out: int
    model: str | None = None
    worker: str | None = None
    code: str | None = None
    key: str | None = None
    first_byte_s: float | None = None
    event: str = ""
    level: str = ""
    logger: str = ""
    timestamp: str = ""


_encode = msgspec.json.Encoder().encode
_without_secrets = lru_cache(1024)(without_secrets)
_OWN_ID = re.compile(r"[0-9a-f]{32}\Z")


def _now() -> str:
    seconds, nanos = divmod(time.time_ns(), 10**9)
    return f"{_second(seconds)}.{nanos // 1000:06d}Z"


@lru_cache(4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
