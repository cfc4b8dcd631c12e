"""Who did what: each fact becomes the record that it must, and nothing that is nobody's business."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from docs.generate import application
from hive.errors import CudaDeviceFailed
from hive.events import (
    COUNTED,
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
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
    request_id_var,
)
from hive.gateway import openapi
from hive.settings import Settings
from hive.storage.audit import page, verify
from hive.storage.audit_writer import HANGS, Journal, News
from hive.telemetry import audit
from hive.telemetry.audit import Audit, action_of, auditing
from tests.gateway.serving import key
from tests.patience import awaited, until

SECRET = "hive_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"


def settings(tmp_path: Path, *keys: dict[str, Any]) -> Settings:
    server = {"state_dir": tmp_path / "s", "runtime_dir": tmp_path / "r"}
    return Settings.model_validate({"server": server, "auth": {"keys": keys}})


class Listening:
    """An audit log that hears what the test says."""

    def __init__(self, tmp_path: Path, *keys: dict[str, Any], refusals_s: float = 60) -> None:
        self.directory = tmp_path / "audit"
        self.news: list[News] = []
        self.journal = Journal(self.directory, 10, 10, self.news.append)
        self.audit = Audit(self.journal, settings(tmp_path, *keys), refusals_s)

    def hear(self, *events: Event, request_id: str | None = None) -> None:
        token = request_id_var.set(request_id)
        for event in events:
            self.audit.hear(event)
        request_id_var.reset(token)

    def records(self) -> list[dict[str, Any]]:
        """All of them, in order; no more can follow."""
        self.audit.close()
        assert self.journal.close() == 0
        assert verify(self.directory).problem is None
        return page(self.directory, 10_000)[::-1]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    it = Listening(tmp_path, key("ops", "admin"), key("ci"))
    yield it
    it.journal.close()


def request(
    method: str,
    path: str,
    status: int,
    code: str | None = None,
    name: str | None = "ops",
    **more: Any,
) -> RequestEnded:
    facts = {"model": None, "worker": None, "code": code, "key": name} | more
    return RequestEnded(
        more.pop("request_id", "r1"),
        method,
        path,
        status,
        facts["model"],
        facts["worker"],
        facts["code"],
        facts["key"],
        0.1,
        None,
        0,
        0,
    )


def said(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[name] for name in ("actor", "action", "target", "outcome"))


OPS = f"ops:{key('ops')['sha256'][:6]}"


# ── requests ────────────────────────────────────────────────────────────────────────────────────


def test_whatever_changes_something_has_an_action() -> None:
    """A route that is added later, too."""
    looked_at = {
        (route.method, route.path)
        for route in openapi.served(application())
        if route.is_own and route.method not in ("GET", "HEAD")
    }
    assert len(looked_at) > 10

    silent = []
    for method, path in looked_at:
        real = path.replace("{action}", "start").replace("{name}/{action}", "w/thaw")
        real = "/".join("x" if part.startswith("{") else part for part in real.split("/"))
        if action_of(method, real) is None:
            silent.append((method, path))
    assert silent == []


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (request("POST", "/hive/v1/workers/m-0/restart", 202), ("worker.restart", "m-0", "202")),
        (
            request("POST", "/hive/v1/workers/m-0/start", 409, "CONFLICT"),
            ("worker.start", "m-0", "409 CONFLICT"),
        ),
        (
            request("POST", "/hive/v1/devices/cuda:0/release", 202),
            ("device.release", "cuda:0", "202"),
        ),
        (request("DELETE", "/hive/v1/requests/abc", 204), ("request.cancel", "abc", "204")),
        (request("POST", "/hive/v1/drain", 202), ("daemon.drain", "", "202")),
        (request("DELETE", "/hive/v1/sessions/s1", 204), ("session.delete", "s1", "204")),
        (request("DELETE", "/hive/v1/windows/w", 204), ("window.delete", "w", "204")),
        (request("DELETE", "/hive/v1/backups/w/t", 204), ("backup.delete", "w/t", "204")),
        (
            request("POST", "/v1/load_lora_adapter", 200, model="m"),
            ("model.load_lora_adapter", "m", "200"),
        ),
    ],
)
def test_what_a_key_did_is_a_record(
    listening: Listening, event: RequestEnded, expected: tuple[str, ...]
) -> None:
    """With the key's name and fingerprint, what it was done to and what came of it."""
    listening.hear(event)

    used, record = listening.records()
    assert said(used) == (OPS, "key.used", "ops", "first since the start")
    assert said(record) == (OPS, *expected)
    assert record["request_id"] == "r1"


def test_who_only_looks_or_asks_for_tokens_leaves_no_record(listening: Listening) -> None:
    listening.hear(
        request("GET", "/hive/v1/workers", 200, name=None),
        request("POST", "/v1/chat/completions", 200, name=None, model="m", worker="m-0"),
        request("POST", "/hive/v1/nothing", 404, "NOT_FOUND", name=None),
        WorkerReady("m-0", "m", 1.0),
        WorkerMoved("m-0", "m", "LOADING", "READY"),
    )

    assert listening.records() == []


def test_without_keys_it_was_somebody_on_this_host(tmp_path: Path) -> None:
    it = Listening(tmp_path)
    it.hear(request("POST", "/hive/v1/drain", 202, name=None))

    assert [one["actor"] for one in it.records()] == ["local"]


def test_what_was_done_in_a_request_is_in_its_record(listening: Listening) -> None:
    """Once, with the window's name, which only the body had."""
    done = WindowOperationEnded("freeze", "w1", "s1", "m", 0.5)
    listening.hear(SessionMoved("s1", "m", "ACTIVE", "FROZEN"), done, request_id="r1")
    listening.hear(SessionMoved("s2", "m", "", "ACTIVE"), request_id="r2")
    listening.hear(
        request("POST", "/hive/v1/windows", 201),
        request("POST", "/hive/v1/sessions", 201, request_id="r2"),
        request("POST", "/hive/v1/windows", 404, "SESSION_NOT_FOUND"),
    )

    _, freeze, session, failed = listening.records()
    assert said(freeze) == (OPS, "window.freeze", "w1", "201")
    assert freeze["detail"] == {"session": "s1", "model": "m", "window": "w1"}
    assert said(session) == (OPS, "session.create", "s2", "201")
    assert said(failed) == (OPS, "window.freeze", "", "404 SESSION_NOT_FOUND")


def test_what_hive_did_to_a_window_by_itself_is_its_own(listening: Listening) -> None:
    listening.hear(WindowOperationEnded("verify", "w1", "s1", "m", 0.5, "STORAGE_CORRUPTED"))

    (record,) = listening.records()
    assert said(record) == ("hive", "window.verify", "w1", "STORAGE_CORRUPTED")


def test_requests_that_never_end_are_not_kept_for_ever(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MOST_OPEN", 3)
    for number in range(5):
        done = WindowOperationEnded("freeze", f"w{number}", "s", "m", 0.5)
        listening.hear(done, request_id=f"r{number}")

    assert len(listening.audit._done) == 3
    assert [one["target"] for one in listening.records()] == ["w0", "w1"]


def test_a_reload_by_a_signal_is_the_signals_and_by_a_key_the_keys(listening: Listening) -> None:
    listening.hear(ReloadEnded("SIGHUP", ("server.drain_s",)))
    refused = ReloadEnded("HTTP", (), "RELOAD_REFUSED", ("server.port",), (SECRET,))
    listening.hear(refused, request_id="r1")
    listening.hear(request("POST", "/hive/v1/reload", 409, "RELOAD_REFUSED"))

    signal, _, http = listening.records()
    assert said(signal) == ("signal", "settings.reload", "settings", "ok")
    assert signal["detail"] == {"changed": ["server.drain_s"], "refused": []}
    assert said(http) == (OPS, "settings.reload", "settings", "409 RELOAD_REFUSED")
    assert http["detail"] == {"changed": [], "refused": ["server.port"]}


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


def test_a_keys_first_use_is_told_once_a_day(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = request("POST", "/v1/chat/completions", 200, name="ci")
    listening.hear(chat, chat, chat)
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    listening.hear(chat, chat)

    found = [said(one) for one in listening.records()]
    who = f"ci:{key('ci')['sha256'][:6]}"
    assert found == [
        (who, "key.used", "ci", "first since the start"),
        (who, "key.used", "ci", "first of the day"),
    ]


def test_another_key_under_the_same_name_is_a_new_one(listening: Listening, tmp_path: Path) -> None:
    chat = request("POST", "/v1/chat/completions", 200, name="ci")
    listening.hear(chat)
    listening.audit.apply(
        settings(tmp_path, key("ops"), {**key("ci"), "sha256": "abc123" + "0" * 58})
    )
    listening.hear(chat, request("POST", "/v1/chat/completions", 200, name="gone"))

    _, second, gone = listening.records()
    assert said(second)[0] == "ci:abc123"
    assert said(gone)[0] == "gone:revoked"


@awaited
async def test_a_flood_of_refused_keys_is_two_records(tmp_path: Path) -> None:
    """The first at once, the others together, however many they are."""
    it = Listening(tmp_path, key("ci"), refusals_s=0.2)
    it.hear(KeyRefused("UNAUTHORIZED", "", "aaaaaa"), request_id="r1")
    for number in range(5000):
        it.hear(KeyRefused("UNAUTHORIZED", "", f"{number:06}"))
        it.hear(request("POST", "/hive/v1/drain", 401, "UNAUTHORIZED", name=None))
    it.hear(KeyRefused("FORBIDDEN", "ci", ""))
    await until(lambda: it.audit._refused == 0, "the record of the others")
    await until(lambda: it.audit._refusals_timer is None, "a quiet minute")
    it.hear(KeyRefused("FORBIDDEN", "ci", ""))

    first, rest, again = it.records()
    assert said(first) == ("unknown:aaaaaa", "key.refused", "", "UNAUTHORIZED")
    assert first["request_id"] == "r1"
    assert rest["detail"]["count"] == 5001
    assert len(rest["detail"]["by"]) == audit.MOST_NAMED
    assert said(again)[2:] == ("ci", "FORBIDDEN")


@awaited
async def test_a_flood_of_what_fails_for_a_key_is_two_records(tmp_path: Path) -> None:
    """Whoever has a key for inference cannot fill the log; an operator's failures are each told."""
    it = Listening(tmp_path, key("ops", "admin"), key("ci"), key("cd"), refusals_s=0.2)
    for number in range(2000):
        path = f"/hive/v1/requests/{number}"
        it.hear(request("DELETE", path, 404, "NOT_FOUND", name="ci"))
    it.hear(request("POST", "/hive/v1/windows", 409, "CONFLICT", name="ci"))
    it.hear(request("DELETE", "/hive/v1/sessions/s", 204, name="ci"))
    it.hear(request("DELETE", "/hive/v1/requests/x", 404, "NOT_FOUND", name="cd"))
    for _ in range(3):
        it.hear(request("DELETE", "/hive/v1/requests/x", 404, "NOT_FOUND"))
    await until(lambda: it.audit._failures_timer is None, "a quiet minute")
    it.hear(request("DELETE", "/hive/v1/requests/y", 404, "NOT_FOUND", name="ci"))

    found = [one for one in it.records() if one["action"] != "key.used"]
    who, cd = (f"{name}:{key(name)['sha256'][:6]}" for name in ("ci", "cd"))
    cancel = ("request.cancel", "x", "404 NOT_FOUND")
    assert [said(one) for one in found] == [
        (who, "request.cancel", "0", "404 NOT_FOUND"),
        (who, "session.delete", "s", "204"),
        (cd, *cancel),
        *[(OPS, *cancel)] * 3,
        (who, "key.failures", "ci", "aggregated"),
        (who, "request.cancel", "y", "404 NOT_FOUND"),
    ]
    failures = {"request.cancel NOT_FOUND": 1999, "window.freeze CONFLICT": 1}
    assert found[-2]["detail"] == {"count": 2000, "failures": failures}


# ── hive itself ─────────────────────────────────────────────────────────────────────────────────


def test_a_workers_life_has_pid_reason_and_signal(listening: Listening) -> None:
    """LIFE: audit fields worker_id, pid, reason, signal, timestamp."""
    listening.hear(
        WorkerStarted("m-0", "m", 11, unasked=False),
        WorkerExited("m-0", "m", "signal", "signal SIGSEGV", asked=False, pid=11),
        WorkerEnded("m-0", "m", "exit", 0.1, 0, 11, "exited"),
        WorkerRestartPlanned("m-0", "m", 1.0, 1, 5),
        WorkerStarted("m-0", "m", 12, unasked=True),
        WorkerExited("m-0", "m", "asked", "signal SIGKILL", asked=True, pid=12),
        WorkerEnded("m-0", "m", "kill", 5.0, 3, 12, "WORKER_HUNG"),
        WorkerMoved("m-0", "m", "STOPPING", "FAILED", "last words: a prompt", "WORKER_HUNG"),
    )

    records = listening.records()
    assert [said(one)[1:] for one in records] == [
        ("worker.started", "m-0", "ok"),
        ("worker.exited", "m-0", "signal"),
        ("worker.ended", "m-0", "exit"),
        ("worker.restart_planned", "m-0", "ok"),
        ("worker.started", "m-0", "ok"),
        ("worker.ended", "m-0", "kill"),
        ("worker.failed", "m-0", "WORKER_HUNG"),
    ]
    assert records[1]["detail"] == {"pid": 11, "status": "signal SIGSEGV"}
    ended = {"pid": 12, "reason": "WORKER_HUNG", "signal": "SIGKILL", "killed": 3}
    assert records[5]["detail"] == ended
    assert records[4]["detail"] == {"pid": 12, "reason": "crash"}
    assert all(one["timestamp"].endswith("+00:00") for one in records)


def test_devices_and_the_daemon_are_told_with_why(listening: Listening) -> None:
    listening.hear(
        DaemonMoved("listening", "http://127.0.0.1:1"),
        DeviceMoved("cuda:0", "OK", "QUARANTINED", "CUDA_DEVICE_FAILED", "an engine's words"),
        DeviceMoved("cuda:0", "QUARANTINED", "OK", "", ""),
        DaemonMoved("stopping", "", "SIGTERM"),
        DaemonMoved("stopping", "", "drain"),
    )

    assert [said(one) for one in listening.records()] == [
        ("hive", "daemon.listening", "hive", "ok"),
        ("hive", "device.quarantined", "cuda:0", "CUDA_DEVICE_FAILED"),
        ("hive", "device.released", "cuda:0", "ok"),
        ("signal", "daemon.stopping", "hive", "ok"),
        ("hive", "daemon.stopping", "hive", "ok"),
    ]


def test_nothing_that_was_said_gets_in(listening: Listening) -> None:
    """R076: no prompt, key, salt or engine's word, wherever it comes from."""
    words = f"the prompt, {SECRET}, cache_salt=abcdefghijklmnopqrstuv"
    listening.hear(
        DaemonMoved("stopping", words, "SIGTERM"),
        DeviceMoved("cuda:0", "OK", "LOST", "CUDA_DEVICE_FAILED", words),
        WorkerMoved("m-0", "m", "READY", "FAILED", words, "WORKER_CRASHED"),
        ReloadEnded("SIGHUP", (), "CONFIG_INVALID", (), (words,)),
        request("DELETE", f"/hive/v1/windows/{SECRET}", 404, "WINDOW_NOT_FOUND"),
        request("DELETE", f"/hive/v1/windows/{'x' * 5000}", 404, "WINDOW_NOT_FOUND"),
    )

    text = json.dumps(listening.records())
    assert "prompt" not in text
    assert SECRET not in text
    assert "abcdefghijklmnopqrstuv" not in text
    assert "x" * (audit.LENGTH + 1) not in text


def test_hearing_costs_microseconds(listening: Listening) -> None:
    """In the loop's own time: what is most often heard, and what is recorded."""
    chat = request("POST", "/v1/chat/completions", 200, name="ci")
    began = time.process_time()
    for _ in range(10_000):
        listening.audit.hear(chat)
    spent = (time.process_time() - began) / 10_000

    assert spent < 20e-6


# ── its own life ────────────────────────────────────────────────────────────────────────────────


@contextmanager
def life(tmp_path: Path, events: list[Event]) -> Iterator[Audit]:
    (tmp_path / "s").mkdir(exist_ok=True)
    with auditing(settings(tmp_path), events.append) as it:
        yield it


@awaited
async def test_a_life_begins_and_ends_with_a_record(tmp_path: Path) -> None:
    events: list[Event] = []
    with life(tmp_path, events):
        pass
    with pytest.raises(CudaDeviceFailed), life(tmp_path, events):
        raise CudaDeviceFailed
    with pytest.raises(BaseExceptionGroup), life(tmp_path, events):
        raise BaseExceptionGroup("x", [ValueError(), CudaDeviceFailed()])

    records = page(tmp_path / "s" / "audit", 10)[::-1]
    assert [said(one) for one in records[:4]] == [
        ("local", "daemon.start", "hive", "ok"),
        ("hive", "daemon.stop", "hive", "ok"),
        ("local", "daemon.start", "hive", "ok"),
        ("hive", "daemon.stop", "hive", "CUDA_DEVICE_FAILED"),
    ]
    assert records[0]["detail"]["pid"] == os.getpid()
    assert records[-1]["outcome"] == "ValueError"
    assert events == []


@awaited
async def test_a_life_that_was_killed_is_told_by_the_next(tmp_path: Path) -> None:
    with life(tmp_path, []):
        pass
    directory = tmp_path / "s" / "audit"
    killed = Journal(directory, 10, 10, lambda _: None)
    killed.put({"action": "daemon.start", "detail": {}})
    killed.close()
    with life(tmp_path, []):
        pass

    actions = [one["action"] for one in page(directory, 10)[::-1]]
    start, stop = "daemon.start", "daemon.stop"
    assert actions == [start, stop, start, "daemon.vanished", start, stop]


@awaited
async def test_a_disk_that_takes_nothing_is_announced_in_the_loop(tmp_path: Path) -> None:
    events: list[Event] = []
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "audit").write_text("in the way")
    with life(tmp_path, events):
        await until(lambda: events, "the news")

    first, last = events
    assert isinstance(first, AuditMoved)
    assert first.state == "failing"
    assert isinstance(last, AuditMoved)
    assert last.lost == 2


@awaited
async def test_a_disk_that_hangs_is_announced_by_the_loop(tmp_path: Path) -> None:
    """A pipe that nobody reads hangs like one."""
    events: list[Event] = []
    pipe = tmp_path / "s" / "audit" / ".head.json"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    with auditing(settings(tmp_path), events.append, stuck_s=0.1):
        await until(lambda: events, "the news")
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        pipe.unlink()
        await until(lambda: len(events) > 2, "the end of it")
        os.close(reader)

    assert events[0] == AuditMoved("failing", HANGS)
    assert [one.state for one in events if isinstance(one, AuditMoved)][-1] == "writing"


@awaited
async def test_what_was_wrong_at_the_start_is_told_again_to_who_listens_since(
    tmp_path: Path,
) -> None:
    """Metrics are not there yet when the files are opened."""
    with life(tmp_path, []):
        pass
    (tmp_path / "s" / "audit" / "head.json").unlink()
    events: list[Event] = []
    with life(tmp_path, events) as it:
        await until(lambda: events, "the news")
        it.hear(DaemonMoved("listening"))
        await until(lambda: len(events) > 1, "the news again")

    assert events == [AuditMoved("damaged", "head.json: it is missing")] * 2


def test_what_is_counted_is_not_heard_but_for_refused_keys() -> None:
    """The daemon listens so: an event that is counted must not be one that is recorded."""
    assert KeyRefused in COUNTED
    assert not {WorkerEnded, RequestEnded, WindowOperationEnded} & set(COUNTED)
