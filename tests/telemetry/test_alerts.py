"""What escalates of what hive announces, and when it is over: events in, events out."""

import asyncio
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict, replace

from hive.errors import ConfigInvalid
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
from hive.settings import Settings
from hive.telemetry.alerts import DEAF_TO, LOOK_S, Alerts
from hive.telemetry.logs import configure, write
from tests.patience import awaited, until

MODEL = {"engine": "command", "command": ["x{socket}"]}
ENDED = RequestEnded(
    request_id="r1",
    method="POST",
    path="/v1/chat/completions",
    status=200,
    model="llama",
    worker="llama-0",
    code=None,
    key=None,
    seconds=2.0,
    first_byte_s=0.5,
    bytes_in=10,
    bytes_out=20,
)
FAILED = replace(ENDED, status=502, code="WORKER_CRASHED")
OPERATION = WindowOperationEnded("freeze", "monday", "s1", "llama", 1.0)
MANY = 1000


class Heard:
    """The listener of a hive with two models and three workers; a clock that is moved by hand."""

    def __init__(self, home: Path) -> None:
        models = {
            "llama": {**MODEL, "replicas": ["cpu", "cuda:0"]},
            "other": {**MODEL, "device": "cpu"},
        }
        server = {"state_dir": str(home / "s"), "runtime_dir": str(home / "r")}
        self.now = 1000.0
        self.announcer = Announcer()
        self.alerts = Alerts(
            Settings.model_validate({"server": server, "models": models}),
            self.announcer,
            lambda: self.now,
        )
        self.events: list[Event] = []
        self.announcer.listen(self.alerts.hear, deaf_to=DEAF_TO)
        self.announcer.listen(self.events.append)

    async def tell(self, *events: Event) -> list[Event]:
        """What it announces of these."""
        before = len(self.events)
        for event in events:
            self.announcer.announce(event)
        await asyncio.sleep(0)
        return [event for event in self.events[before:] if event not in events]

    async def told(self, *events: Event) -> list[str]:
        """The rules that escalate, and those that are over with a minus."""
        found = []
        for event in await self.tell(*events):
            if isinstance(event, Escalated):
                found.append(event.rule)
            elif isinstance(event, EscalationResolved):
                found.append(f"-{event.rule}")
        return found

    async def all_ready(self) -> None:
        for worker in ("llama-0", "llama-1", "other-0"):
            await self.tell(moved(worker, "READY"))


def moved(worker: str, new: str, code: str = "") -> WorkerMoved:
    return WorkerMoved(worker, worker.rpartition("-")[0], "LOADING", new, "a /path with hush", code)


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return Heard(tmp_path)


@awaited
async def test_an_escalation_says_everything_that_a_person_needs(heard: Heard) -> None:
    """(R193, R205, R209)"""
    await heard.all_ready()
    told = await heard.tell(BreakerMoved("llama", "llama-0", "closed", "open", 5))
    (event,) = (one for one in told if isinstance(one, Escalated))

    assert (event.rule, event.level, event.code) == (
        *("breaker_open", "high"),
        "CIRCUIT_BREAKER_OPEN",
    )
    assert (event.operation, event.model, event.worker) == ("worker", "llama", "llama-0")
    assert event.context == {"failures": 5}
    assert "Worker llama-0" in event.message
    assert "hive worker restart" in event.recommended_action
    assert re.match(r"\d{4}-\d\d-\d\dT.*\+00:00$", event.began_at)


@pytest.mark.parametrize(
    ("event", "rule", "end"),
    [
        (
            BreakerMoved("llama", "llama-0", "closed", "open", 5),
            "breaker_open",
            BreakerMoved("llama", "llama-0", "half_open", "closed", 0),
        ),
        (
            moved("llama-0", "FAILED", "WORKER_CRASHED"),
            "worker_failed",
            moved("llama-0", "STARTING"),
        ),
        (moved("llama-0", "LOST"), "worker_lost", moved("llama-0", "STOPPED")),
        (
            DeviceMoved("cuda:0", "OK", "LOST", "CUDA_DEVICE_FAILED", "x"),
            "device_failed",
            DeviceMoved("cuda:0", "LOST", "OK", "", ""),
        ),
        (
            LeakFound("process", "7 (python)", "llama-0", "kill it"),
            "leak_found",
            LeakCleared("process", "7 (python)", "llama-0"),
        ),
        (
            RollbackMoved("w1", is_undone=False, code="STORAGE_WRITE_FAILED"),
            "rollback_failed",
            RollbackMoved("w1", is_undone=True),
        ),
        (
            AlertTried("d", "r", "s", "high", "failed", "HTTP 401", 1, 0),
            "credentials_refused",
            AlertTried("e", "r", "s", "high", "sent", "", 1, 0),
        ),
        (
            replace(ENDED, model=None, worker=None, status=502, code="STORE_CREDENTIALS_REFUSED"),
            "credentials_refused",
            replace(ENDED, model=None, worker=None, path="/hive/v1/sessions"),
        ),
        (
            AuditMoved("failing", "No space left on device"),
            "audit_failed",
            AuditMoved("writing", "No space left on device", 7),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@awaited
async def test_a_state_escalates_once_and_is_over_with_its_cause(
    heard: Heard, event: Event, rule: str, end: Event
) -> None:
    await heard.all_ready()
    assert await heard.told(event) == [rule]
    assert await heard.told(event, event) == []
    heard.now += 3600
    (open_,) = (await heard.alerts.view())["alerts"]
    assert (open_["rule"], open_["repeats"], open_["seconds"]) == (rule, 2, 3600)
    again = 2 if isinstance(event, LeakFound) else 0  # each leak is cleared by itself
    assert await heard.told(*[end] * again) == []
    assert await heard.told(end) == [f"-{rule}"]
    assert await heard.told(end) == []
    assert (await heard.alerts.view())["alerts"] == []


@awaited
async def test_a_breaker_that_is_half_open_is_on_probation(heard: Heard) -> None:
    """Its probe may fail: that is the same escalation, and no new one."""
    await heard.all_ready()
    opened = BreakerMoved("llama", "llama-0", "closed", "open", 5)
    assert await heard.told(opened) == ["breaker_open"]
    assert await heard.told(replace(opened, new="half_open"), opened) == []
    assert await heard.told(replace(opened, new="half_open"), replace(opened, new="closed")) == [
        "-breaker_open"
    ]


@pytest.mark.parametrize(
    ("event", "rule"),
    [
        (RetriesEnded("network", "exhausted", "llama"), "retries_exhausted"),  # (R191)
        (replace(OPERATION, operation="delete", code="STORAGE_WRITE_FAILED"), "operation_failed"),
        (replace(OPERATION, operation="restore", code="STORAGE_READ_FAILED"), "operation_failed"),
        (replace(OPERATION, operation="verify", code="STORAGE_CORRUPTED"), "data_damaged"),
        (replace(FAILED, code="INTERNAL_ERROR"), "internal_error"),
        (replace(FAILED, model=None, worker=None, code="INTERNAL_ERROR"), "internal_error"),
        (replace(FAILED, code="INFERENCE_TIMEOUT"), "timeout"),
    ],
)
@awaited
async def test_a_fact_escalates_at_once(heard: Heard, event: Event, rule: str) -> None:
    """(R186-R188, R191, R257)"""
    assert await heard.told(event) == [rule]
    assert await heard.told(event) == []


@pytest.mark.parametrize(
    "event",
    [
        replace(OPERATION, operation="delete", code="WINDOW_NOT_FOUND"),
        replace(OPERATION, operation="delete", code=""),
        replace(OPERATION, code="STORAGE_WRITE_FAILED"),
        RetriesEnded("network", "success", "llama"),
        replace(FAILED, code="SERVICE_UNAVAILABLE", status=503),
        replace(FAILED, code="VALIDATION_ERROR", status=400),
        replace(FAILED, code="UNAUTHORIZED", status=401, model=None, worker=None),
        moved("llama-0", "READY"),
        DaemonMoved("listening"),
    ],
)
@awaited
async def test_what_is_no_persons_business_does_not(heard: Heard, event: Event) -> None:
    """(R114, R166)"""
    assert await heard.told(*[event] * 5) == []


@awaited
async def test_the_same_operation_that_fails_again_and_again_escalates(heard: Heard) -> None:
    """Each model is one, each operation on windows, each worker's start (R189, R190)."""
    assert await heard.told(*[FAILED] * 5) == []
    assert await heard.told(*[replace(FAILED, model="other", worker="other-0")] * 5) == []
    assert await heard.told(FAILED) == ["repeated_failures"]
    assert await heard.told(*[FAILED] * 14) == ["error_rate"]
    freeze = replace(OPERATION, code="STORAGE_WRITE_FAILED")
    assert await heard.told(*[freeze] * 5, replace(freeze, operation="thaw")) == []
    assert await heard.told(freeze) == ["repeated_failures"]
    crash = WorkerRestartPlanned("llama-0", "llama", 0.1, 1, 99)
    assert await heard.told(*[crash] * 5, WorkerReady("llama-0", "llama", 1.0)) == []
    assert await heard.told(crash) == ["repeated_failures"]


@awaited
async def test_only_strangers_in_numbers_are_told(heard: Heard) -> None:
    """(R187)"""
    refused = replace(ENDED, status=401, code="UNAUTHORIZED", model=None, worker=None)
    assert await heard.told(*[refused] * 20) == []
    assert await heard.told(refused) == ["clients_refused"]


@awaited
async def test_a_catalogue_that_stays_away_is_critical(heard: Heard) -> None:
    """(R255)"""
    away = replace(
        ENDED,
        path="/hive/v1/windows",
        status=502,
        code="STORE_UNREACHABLE",
        model=None,
        worker=None,
    )
    answers: list[Event] = [
        replace(away, status=404, code="WINDOW_NOT_FOUND"),
        SessionMoved("s1", "llama", "", "active"),
        OPERATION,
    ]
    for answer in answers:
        assert await heard.told(away) == []
        heard.now += 200
        assert await heard.told(away) == []
        heard.now += 101
        assert await heard.told(away) == ["catalogue_down"]
        assert await heard.told(replace(OPERATION, code="STORAGE_WRITE_FAILED")) == []
        assert await heard.told(answer) == ["-catalogue_down"]


@awaited
async def test_an_audit_log_that_was_changed_stays_so(heard: Heard) -> None:
    """Writing again says nothing of what was changed."""
    damaged = AuditMoved("damaged", "audit.3.jsonl, record 7")
    assert await heard.told(AuditMoved("failing", "hush")) == ["audit_failed"]
    assert await heard.told(damaged, damaged) == ["audit_damaged"]
    assert await heard.told(AuditMoved("writing", "")) == ["-audit_failed"]
    heard.now += 1e6
    (open_,) = (await heard.alerts.view())["alerts"]
    assert (open_["rule"], open_["level"]) == ("audit_damaged", "critical")
    assert "hive audit verify" in open_["recommended_action"]


@awaited
async def test_the_worst_is_shown_first(heard: Heard) -> None:
    await heard.all_ready()
    await heard.tell(
        replace(FAILED, code="INFERENCE_TIMEOUT"),
        BreakerMoved("llama", "llama-0", "closed", "open", 5),
        RollbackMoved("w1", is_undone=False, code="STORAGE_WRITE_FAILED"),
        moved("llama-1", "LOST"),
    )
    levels = [one["level"] for one in (await heard.alerts.view())["alerts"]]
    assert levels == ["emergency", "critical", "critical", "high", "medium"]


@awaited
async def test_names_that_are_not_configured_are_nobodys(heard: Heard) -> None:
    """What is kept is bounded, whatever clients and earlier lives say."""
    for number in range(MANY):
        await heard.tell(
            replace(FAILED, model=f"m{number}"),
            RetriesEnded("network", "exhausted", f"m{number}"),
            moved(f"w{number}", "FAILED"),
            LeakFound("process", str(number), f"w{number}", ""),
            BreakerMoved("x", f"w{number}", "closed", "open", 5),
            replace(OPERATION, operation=f"o{number}", code="STORAGE_CORRUPTED"),
        )
    view = await heard.alerts.view()
    assert sorted((one["rule"], one["worker"]) for one in view["alerts"]) == [
        ("leak_found", "earlier"),
        ("retries_exhausted", ""),
    ]
    assert "w7" not in json.dumps(view)


@awaited
async def test_several_leaks_of_a_kind_are_over_with_the_last(heard: Heard) -> None:
    leaks = [LeakFound("process", str(number), "llama-0", "") for number in range(3)]
    assert await heard.told(*leaks) == ["leak_found"]
    cleared = [LeakCleared("process", str(number), "llama-0") for number in range(3)]
    assert await heard.told(*cleared[:2]) == []
    assert await heard.told(cleared[2]) == ["-leak_found"]


# ── the service level ───────────────────────────────────────────────────────────────────────────


def levels(events: list[Event]) -> list[str]:
    return [event.new for event in events if isinstance(event, ServiceLevelMoved)]


@awaited
async def test_breakers_workers_and_devices_make_the_service_level(heard: Heard) -> None:
    """(R263)"""
    it = heard
    assert it.alerts.service_level == "down"
    assert levels(await it.tell(moved("llama-0", "READY"))) == ["critical"]  # other is not served
    assert levels(await it.tell(moved("other-0", "READY"))) == ["degraded"]
    assert levels(await it.tell(moved("llama-1", "READY"))) == ["full"]
    opened = BreakerMoved("llama", "llama-0", "closed", "open", 5)
    assert levels(await it.tell(opened)) == ["degraded"]
    assert levels(await it.tell(replace(opened, new="half_open"))) == []
    assert levels(await it.tell(replace(opened, new="closed"))) == ["full"]
    lost = DeviceMoved("cuda:0", "OK", "LOST", "CUDA_DEVICE_FAILED", "")
    assert levels(await it.tell(lost)) == ["degraded"]
    assert levels(await it.tell(replace(lost, new="OK"))) == ["full"]
    assert levels(await it.tell(moved("lmcache", "LOADING"))) == ["degraded"]
    assert levels(await it.tell(moved("lmcache", "READY"))) == ["full"]
    assert levels(await it.tell(moved("other-0", "STOPPING"))) == ["critical"]
    assert it.alerts.service_level == "critical"


@awaited
async def test_a_model_without_a_worker_that_can_serve_is_critical(heard: Heard) -> None:
    """A restart is no such thing, a worker that is given up is (R255)."""
    await heard.all_ready()
    assert await heard.told(moved("other-0", "STOPPING"), moved("other-0", "STARTING")) == []
    assert await heard.told(moved("other-0", "FAILED")) == ["worker_failed", "service_degraded"]
    assert await heard.told(moved("llama-0", "FAILED")) == ["worker_failed"]
    found = await heard.told(moved("llama-0", "STARTING"), moved("other-0", "STARTING"))
    assert found == ["-worker_failed", "-worker_failed", "-service_degraded"]


@awaited
async def test_workers_that_end_with_hive_are_no_news(heard: Heard) -> None:
    await heard.all_ready()
    await heard.tell(DaemonMoved("stopping"))
    assert levels(await heard.tell(moved("other-0", "STOPPED"), moved("llama-0", "STOPPED"))) == []


# ── how it listens ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_the_cause_is_heard_by_everybody_before_the_escalation(heard: Heard) -> None:
    """(R205)"""
    await heard.all_ready()
    heard.events.clear()
    await heard.tell(BreakerMoved("llama", "llama-0", "closed", "open", 5))

    assert [type(event) for event in heard.events] == [BreakerMoved, ServiceLevelMoved, Escalated]


@awaited
async def test_what_is_over_by_itself_is_told_while_it_runs(heard: Heard) -> None:
    async with heard.alerts.running():
        await heard.tell(*[FAILED] * 6)
        heard.now += 301
        await until(
            lambda: any(isinstance(event, EscalationResolved) for event in heard.events),
            "it is over",
            LOOK_S + 30,
        )


@awaited
async def test_a_single_error_comes_out_as_it_is(tmp_path: Path) -> None:
    """Whoever starts hive looks at it, and systemd shows it."""
    for url in ("", "http://127.0.0.1:1/"):
        settings = Settings.model_validate(
            {
                "server": {"state_dir": str(tmp_path)},
                "models": {"m": {**MODEL, "device": "cpu"}},
                "alerts": {"webhook_url": url},
            }
        )
        with pytest.raises(ConfigInvalid):
            async with Alerts(settings, Announcer()).running():
                raise ConfigInvalid


@awaited
async def test_nothing_of_what_an_engine_or_a_client_said_is_told(heard: Heard) -> None:
    """Reasons, holders, names of windows and paths stay where they are (R076, C21)."""
    await heard.all_ready()
    await heard.tell(
        moved("llama-0", "FAILED", "WORKER_CRASHED"),
        DeviceMoved("cuda:0", "OK", "LOST", "CUDA_DEVICE_FAILED", "hush /path"),
        LeakFound("file", "/tmp/hush", "llama-0", "rm /tmp/hush"),
        replace(
            OPERATION,
            operation="delete",
            window="hush",
            session="hush",
            code="STORAGE_WRITE_FAILED",
        ),
        replace(FAILED, path="/v1/hush", key="hush", request_id="hush", code="INTERNAL_ERROR"),
    )
    told = [asdict(event) for event in heard.events if isinstance(event, Escalated)]
    assert len(told) >= 5
    assert "hush" not in json.dumps(told)
    assert "hush" not in json.dumps(await heard.alerts.view())
    assert "/path" not in json.dumps(told)


def test_it_is_deaf_to_what_it_does_not_need() -> None:
    assert RetriesEnded not in DEAF_TO
    assert set(DEAF_TO) < set(COUNTED)


@awaited
async def test_it_costs_a_request_microseconds(heard: Heard) -> None:
    """Of 200,000 requests; the bound is ten times what was measured on a laptop."""
    hear = heard.alerts.hear
    began = time.process_time()
    for _ in range(200_000):
        hear(ENDED)
    assert (time.process_time() - began) / 200_000 < 20e-6
    assert heard.alerts._untold == type(heard.alerts._untold)()


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (RollbackMoved("w1", is_undone=False, code="STORAGE_WRITE_FAILED"), "critical"),
        (moved("llama-0", "LOST"), "error"),
        (BreakerMoved("llama", "llama-0", "closed", "open", 5), "warning"),
        (replace(FAILED, code="INFERENCE_TIMEOUT"), "warning"),
    ],
)
@awaited
async def test_the_line_in_the_log_has_the_escalation_s_level(
    heard: Heard, tmp_path: Path, event: Event, level: str
) -> None:
    """EMERGENCY critical, CRITICAL error, HIGH and MEDIUM warning (R192, R194)."""
    await heard.all_ready()
    told = [one for one in await heard.tell(event) if isinstance(one, Escalated)]
    before = logging.getLogger().handlers
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR)
    writer = configure("info", fd)
    try:
        for one in told:
            write(one)
        writer.flush()
    finally:
        logging.getLogger().handlers = before
        writer.close()
        os.close(fd)
    line: dict[str, Any] = json.loads((tmp_path / "log").read_text().splitlines()[0])

    assert (line["event"], line["level"]) == ("escalated", level)
    assert line.keys() >= {
        *(
            "timestamp",
            "severity",
            "operation",
            "code",
            "context",
            "recommended_action",
            "began_at",
        ),
    }
