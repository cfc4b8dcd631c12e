"""Structured logs: every line with its request id, secrets taken out, one line for each fact.

JSON, unless stderr is a terminal. Levels follow C29; an error's level is its class's.
"""

import logging
import sys
from dataclasses import asdict
from typing import Any

import structlog
from aiohttp.http import HttpProcessingError
from structlog.types import EventDict, Processor

from hive.errors import by_code
from hive.events import (
    BreakerMoved,
    DaemonMoved,
    DeviceMoved,
    Event,
    LeakCleared,
    LeakFound,
    RequestEnded,
    RequestRetried,
    StrangerSeen,
    VramChecked,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
    XidSeen,
    request_id_var,
)
from hive.policy.redaction import without_secrets

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
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


def _bad_http(record: logging.LogRecord) -> bool:
    """What a client sent that is not HTTP is its fault: a line without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.msg, record.args = "a request that is not HTTP was refused", ()
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.exc_info = record.exc_text = None
    return True


def configure(level: str) -> None:
    """Send everything, the standard library's logging included, to stderr in one form."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_request_id,
    ]
    is_terminal = sys.stderr.isatty()
    last: list[Processor] = (
        [_redacted, structlog.dev.ConsoleRenderer()]
        if is_terminal
        else [structlog.processors.format_exc_info, _redacted, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.getLogger("aiohttp.server").addFilter(_bad_http)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(_LEVELS[level])
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def write(event: Event) -> None:
    """The listener: one line a fact."""
    log: Any = structlog.get_logger("hive")
    match event:
        case RequestEnded():
            if event.path in _QUIET and event.code is None:
                return
            log.log(_request_level(event), "request", **_request_facts(event))
        case RequestRetried():
            log.warning("request is sent again", **asdict(event))
        case BreakerMoved():
            is_open = event.new == "open"
            log.log(logging.ERROR if is_open else logging.INFO, "breaker moved", **asdict(event))
        case WorkerMoved():
            bad = event.new in ("FAILED", "QUARANTINED", "LOST")
            log.log(logging.ERROR if bad else logging.INFO, "worker moved", **asdict(event))
        case WorkerExited():
            level = logging.INFO if event.asked else logging.ERROR
            log.log(level, "engine exited", **asdict(event))
        case WorkerRestartPlanned():
            log.warning("worker restarts", **asdict(event))
        case WorkerEnded():
            level = logging.WARNING if event.how == "kill" else logging.INFO
            log.log(level, "process tree ended", **asdict(event))
        case WorkerStarted() | WorkerReady() | DaemonMoved():
            log.info(_TITLES[type(event)], **asdict(event))
        case _:
            _write_of_devices(log, event)


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


_XID_LEVELS = {"device": logging.ERROR, "application": logging.WARNING, "note": logging.WARNING}
_VRAM_LEVELS = {"returned": logging.INFO, "unproven": logging.WARNING, "kept": logging.ERROR}
_TITLES: dict[type[Event], str] = {
    WorkerStarted: "engine started",
    WorkerReady: "worker ready",
    DaemonMoved: "daemon",
}


def _request_facts(event: RequestEnded) -> dict[str, Any]:
    facts = {k: v for k, v in asdict(event).items() if v is not None}
    for key in ("seconds", "first_byte_s"):
        if key in facts:
            facts[key] = round(facts[key], 4)
    return facts


def _request_level(event: RequestEnded) -> int:
    cls = by_code(event.code) if event.code else None
    return _LEVELS[cls.level] if cls else logging.INFO
