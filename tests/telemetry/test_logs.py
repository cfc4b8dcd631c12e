"""The log: one JSON object a line, at the level that the fact deserves, without secrets."""

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from hive.errors import HiveError, every_error
from hive.events import (
    BreakerMoved,
    DaemonMoved,
    Event,
    HintJudged,
    RequestAborted,
    RequestAdmitted,
    RequestEnded,
    RequestExpired,
    RequestRefused,
    RequestRetried,
    RetriesEnded,
    SessionMoved,
    ThawProved,
    WindowOperationEnded,
    WindowsCounted,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
    request_id_var,
)
from hive.telemetry import logs
from tests.terminal import shown_to

KEY = "hive_" + "k" * 43
ENDED = RequestEnded(
    request_id="r1",
    method="POST",
    path="/v1/chat/completions",
    status=200,
    model="m",
    worker="m-0",
    code=None,
    key=None,
    seconds=1.23456789,
    first_byte_s=0.1,
    bytes_in=10,
    bytes_out=20,
)
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """hive's logging, configured (the level is the parameter); what it has written since the last look."""
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryFile() as written:
        writer = logs.configure(getattr(request, "param", "info"), written.fileno())
        seen = 0

        def look() -> list[dict[str, Any]]:
            nonlocal seen
            writer.flush()
            text = os.pread(written.fileno(), 2**24, seen)
            seen += len(text)
            return [json.loads(line) for line in text.splitlines()]

        try:
            yield look
        finally:
            writer.close()
            root.handlers = []  # pytest puts its own in for every phase of a test
            root.setLevel(level)
            structlog.reset_defaults()


def test_a_fact_is_one_line_with_its_time_level_and_logger(lines: Lines) -> None:
    logs.write(WorkerReady("m-0", "m", 2.5))
    (line,) = lines()

    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "worker ready",
        "level": "info",
        "logger": "hive",
        "worker": "m-0",
        "model": "m",
        "load_s": 2.5,
    }


def test_a_request_is_one_line_when_it_ends_without_what_is_unknown(lines: Lines) -> None:
    for event in (
        RequestAdmitted("r1", "m", "m-0", 0.1),
        RequestRefused("m", "queue_full"),
        RequestExpired("r1", "m", "stall"),
        RequestAborted("r1", "m", "m-0", "yes", 0.1),
        HintJudged("m", 0.5),
        RetriesEnded("network", "success"),
    ):
        logs.write(event)
    logs.write(ENDED)
    (line,) = lines()

    assert (line["event"], line["request_id"], line["status"]) == ("request", "r1", 200)
    assert line["seconds"] == 1.2346
    assert {"code", "key"} & set(line) == set()


@pytest.mark.parametrize("error", list(every_error()), ids=lambda cls: cls.code)
def test_a_requests_level_is_its_errors(lines: Lines, error: type[HiveError]) -> None:
    """(C29)"""
    logging.getLogger().setLevel(logging.DEBUG)
    logs.write(replace(ENDED, status=error.status, code=error.code))
    (line,) = lines()

    assert line["level"] == error.level
    assert line["code"] == error.code


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (WorkerStarted("m-0", "m", 7, unasked=False), "info"),
        (WorkerMoved("m-0", "m", "LOADING", "READY"), "info"),
        (WorkerMoved("m-0", "m", "STOPPING", "FAILED"), "error"),
        (WorkerMoved("m-0", "m", "STOPPING", "LOST"), "error"),
        (WorkerExited("m-0", "m", "asked", "exit status 0", asked=True), "info"),
        (WorkerExited("m-0", "m", "crashed", "exit status 0", asked=False), "error"),
        (WorkerRestartPlanned("m-0", "m", 1.0, 1, 5), "warning"),
        (WorkerEnded("m-0", "m", "term", 0.1, 0), "info"),
        (WorkerEnded("m-0", "m", "kill", 5.1, 3), "warning"),
        (RequestRetried("r1", "network", "m", "m-0", 2, 5, 1.2, "BAD_GATEWAY"), "warning"),
        (BreakerMoved("m", "m-0", "closed", "open", 5), "error"),
        (BreakerMoved("m", "m-0", "open", "half_open", 5), "info"),
        (BreakerMoved("m", "m-0", "half_open", "closed", 0), "info"),
        (DaemonMoved("listening"), "info"),
    ],
)
def test_each_fact_has_the_level_that_it_deserves(lines: Lines, event: Event, level: str) -> None:
    logs.write(event)
    (line,) = lines()

    assert line["level"] == level


def test_each_retry_is_one_line_with_its_number_and_its_requests_id(lines: Lines) -> None:
    """(R005)"""
    for attempt in (2, 3):
        logs.write(
            RequestRetried("r1", "network", "m", "m-0", attempt, 5, 1.25 * attempt, "BAD_GATEWAY")
        )
    written = lines()

    assert [(line["attempt"], line["delay_s"]) for line in written] == [(2, 2.5), (3, 3.75)]
    assert {(line["request_id"], line["allowed"], line["code"]) for line in written} == {
        ("r1", 5, "BAD_GATEWAY")
    }


def test_an_opening_breaker_is_one_line_with_its_count_of_failures(lines: Lines) -> None:
    """(R012)"""
    logs.write(BreakerMoved("m", "m-0", "closed", "open", 5))
    (line,) = lines()

    assert (line["level"], line["worker"], line["new"]) == ("error", "m-0", "open")
    assert line["failures"] == 5


# ── Windows ─────────────────────────────────────────────────────────────────────────────────────

DONE = WindowOperationEnded("freeze", "w", "s1", "m", 1.23456789, blocks=3, bytes=4096)


def test_what_was_done_with_a_window_is_one_line(lines: Lines) -> None:
    """(R115)"""
    logs.write(DONE)
    (line,) = lines()
    del line["timestamp"]

    assert line == {
        "event": "window operation done",
        "level": "info",
        "logger": "hive",
        "operation": "freeze",
        "session_id": "s1",
        "window_name": "w",
        "model": "m",
        "blocks_stored": 3,
        "bytes": 4096,
        "duration_ms": 1234.6,
    }


@pytest.mark.parametrize("error", list(every_error()), ids=lambda cls: cls.code)
def test_what_failed_with_a_window_is_at_its_errors_level(
    lines: Lines, error: type[HiveError]
) -> None:
    """With the same fields, and the error's code (R113, R115)."""
    logging.getLogger().setLevel(logging.DEBUG)
    logs.write(replace(DONE, code=error.code))
    (line,) = lines()

    assert (line["event"], line["level"]) == ("window operation failed", error.level)
    assert line["error_code"] == error.code
    told = [line[key] for key in ("operation", "session_id", "window_name", "duration_ms")]
    assert told == ["freeze", "s1", "w", 1234.6]


def test_a_code_that_nobody_knows_is_an_error(lines: Lines) -> None:
    logs.write(replace(DONE, code="SOMETHING_ELSE"))

    assert lines()[0]["level"] == "error"


def test_a_session_that_moves_is_one_line(lines: Lines) -> None:
    logs.write(SessionMoved("s1", "m", "ACTIVE", "FROZEN"))
    (line,) = lines()

    assert (line["event"], line["level"]) == ("session moved", "info")
    told = (line["session"], line["model"], line["old"], line["new"])
    assert told == ("s1", "m", "ACTIVE", "FROZEN")


@pytest.mark.parametrize(
    ("cached", "event", "level"),
    [
        (512, "thaw proved", "info"),
        (513, "thaw proved", "info"),
        (511, "thaw not proved", "warning"),
        (0, "thaw not proved", "warning"),
    ],
)
def test_a_thaw_that_kept_its_promise_is_told_otherwise_than_one_that_did_not(
    lines: Lines, cached: int, event: str, level: str
) -> None:
    logs.write(ThawProved("w", "s1", "m", 512, cached))
    (line,) = lines()

    assert (line["event"], line["level"]) == (event, level)
    assert (line["promised_tokens"], line["cached_tokens"]) == (512, cached)


def test_how_many_windows_there_are_is_for_the_metrics_alone(lines: Lines) -> None:
    logs.write(WindowsCounted("FROZEN", 3))

    assert lines() == []


def test_alembic_says_nothing_of_each_start(lines: Lines) -> None:
    logging.getLogger("alembic.runtime.migration").info("Context impl SQLiteImpl.")
    logging.getLogger("alembic.runtime.migration").warning("something is wrong")

    assert [line["event"] for line in lines()] == ["something is wrong"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_are_not_logged_unless_they_are_refused(lines: Lines, path: str) -> None:
    logs.write(replace(ENDED, method="GET", path=path, model=None, worker=None))
    assert lines() == []

    logs.write(replace(ENDED, method="GET", path=path, status=401, code="UNAUTHORIZED"))
    assert len(lines()) == 1


def test_every_line_made_for_a_request_carries_its_id(lines: Lines) -> None:
    """Also those of libraries, which log as the standard library does."""
    token = request_id_var.set("r7")
    try:
        structlog.get_logger("x").warning("one")
        logging.getLogger("aiohttp.server").warning("two of %d", 2)
        logs.write(ENDED)
    finally:
        request_id_var.reset(token)
    logging.getLogger("aiohttp.server").warning("three")

    told = [(line["event"], line.get("request_id")) for line in lines()]
    assert told == [("one", "r7"), ("two of 2", "r7"), ("request", "r1"), ("three", None)]


def test_secrets_are_in_no_line(lines: Lines) -> None:
    """Neither in a message nor in a field nor in a traceback (R076)."""
    log = logging.getLogger("x")
    log.warning("asked with Authorization: Bearer %s", KEY)
    structlog.get_logger("x").warning("key", url=f"http://me:{KEY}@host/", given=KEY)
    log.error("failed", exc_info=ValueError(f"cannot use {KEY}"))
    logs.write(replace(ENDED, path=f"/v1/x?api_key={KEY}"))
    written = lines()

    assert len(written) == 4
    assert KEY not in json.dumps(written)
    assert all("[secret]" in json.dumps(line) for line in written)
    assert "ValueError" in written[2]["exception"]


@pytest.mark.parametrize("lines", ["debug"], indirect=True)
def test_a_database_tells_no_statement_at_any_level(lines: Lines) -> None:
    """With their parameters go what was said, and salts (R076)."""
    for name in ("aiosqlite", "sqlalchemy.engine.Engine", "asyncpg"):
        logging.getLogger(name).info("executing %s", "INSERT … 'my salt'")
        logging.getLogger(name).debug("executing %s", "INSERT … 'my salt'")
    logging.getLogger("x").debug("the end")

    assert [line["event"] for line in lines()] == ["the end"]


@pytest.mark.parametrize("lines", ["error"], indirect=True)
def test_what_is_below_the_configured_level_is_not_written(lines: Lines) -> None:
    logs.write(WorkerReady("m-0", "m", 2.5))
    logs.write(WorkerMoved("m-0", "m", "STOPPING", "FAILED", "gave up"))

    assert [line["reason"] for line in lines()] == ["gave up"]


# ── Nobody who logs waits ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def unread() -> Iterator[tuple[int, logs.Writer]]:
    """A pipe that nobody reads yet, full, and the log that goes into it."""
    reader, fd = os.pipe()
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"." * 4096)
    os.set_blocking(fd, True)
    root = logging.getLogger()
    level = root.level
    writer = logs.configure("info", fd)
    try:
        yield reader, writer
    finally:
        root.handlers = []
        root.setLevel(level)
        structlog.reset_defaults()
        os.close(reader)
        writer.close()
        writer.flush()
        os.close(fd)


def read_all(reader: int, writer: logs.Writer) -> list[str]:
    """What is in the pipe once everything was written, without what had filled it."""
    text = b""
    os.set_blocking(reader, False)
    flushing = threading.Thread(target=writer.flush)
    flushing.start()
    while flushing.is_alive():
        with contextlib.suppress(BlockingIOError):
            text += os.read(reader, 2**20)
    with contextlib.suppress(BlockingIOError):
        text += os.read(reader, 2**20)
    return text.decode().lstrip(".").splitlines()


def test_what_nobody_reads_is_dropped_and_counted_and_the_order_is_kept(
    unread: tuple[int, logs.Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "HELD_CHARS", 100_000)
    log, began = logging.getLogger("x"), time.monotonic()
    for number in range(5000):
        log.warning("line %d", number)
    assert time.monotonic() - began < 10
    lines = [json.loads(line)["event"] for line in read_all(*unread)]
    log.warning("after")
    lines += [json.loads(line)["event"] for line in read_all(*unread)]
    kept = len(lines) - 2

    assert 500 < kept < 5000
    assert lines[:kept] == [f"line {number}" for number in range(kept)]
    assert lines[kept] == f"{5000 - kept} log lines were dropped: nobody read them in time"
    assert lines[-1] == "after"


def test_what_is_told_last_comes_out_whatever_was_dropped(
    unread: tuple[int, logs.Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "HELD_CHARS", 1000)
    for number in range(100):
        logging.getLogger("x").warning("line %d", number)
    logs.tell("the last words\n")
    lines = read_all(*unread)

    assert "log lines were dropped" in lines[-2]
    assert lines[-1] == "the last words"


def test_the_end_does_not_wait_long_for_whoever_does_not_read(
    unread: tuple[int, logs.Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FLUSH_S", 0.2)
    logging.getLogger("x").warning("a line")
    began = time.monotonic()
    unread[1].flush()

    assert 0.1 < time.monotonic() - began < 5


def test_a_line_is_made_where_it_is_logged(lines: Lines) -> None:
    """What it names may have changed by the time that it is written."""
    facts = ["first"]
    logging.getLogger("x").warning("now %s", facts)
    facts.append("second")

    assert lines()[0]["event"] == "now ['first']"


def test_a_log_that_cannot_be_written_harms_nobody() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    writer = logs.Writer(fd)
    writer.emit(logging.LogRecord("x", logging.INFO, "", 0, "lost", (), None))
    writer.flush()
    assert repr(writer) == "<Writer 0 lines held, 0 dropped>"
    writer.close()
    os.close(fd)


def test_on_a_terminal_nothing_steers_it_and_no_secret_is_shown() -> None:
    reader, fd = os.openpty()
    root = logging.getLogger()
    level = root.level
    writer = logs.configure("info", fd)
    try:
        structlog.get_logger("x").warning("said", words="\x1b[2Jred", key=KEY)
        secret = KEY  # a local variable of a frame that is shown
        root.error("failed", exc_info=_raised(f"cannot use {secret}"))
        root.error("failed", exc_info=ValueError("\x1b]0;PWN\x07"))
        writer.flush()
    finally:
        root.handlers = []
        root.setLevel(level)
        structlog.reset_defaults()
        writer.close()
        os.close(fd)
        shown = shown_to(reader).decode()
        os.close(reader)

    assert r"\x1b[2Jred" in shown
    assert r"\x1b]0;PWN\x07" in shown
    assert "Traceback" in shown
    assert KEY not in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown


def _raised(text: str) -> Exception:
    try:
        int(text)
    except ValueError as exc:
        return exc
    raise AssertionError


def test_the_journal_is_told_how_bad_a_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `journalctl -p warning` finds it; whoever else reads stderr gets plain JSON."""
    path = tmp_path / "journal"
    with path.open("wb") as file:
        about = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{about.st_dev}:{about.st_ino}")
        writer = logs.configure("info", file.fileno())
        logging.getLogger("hive").warning("bad news")
        logs.write(ENDED)
        writer.flush()
        writer.close()
    first, second = path.read_text().splitlines()
    assert first.startswith('<4>{"event": "bad news"')
    assert second.startswith('<6>{"request_id"')
