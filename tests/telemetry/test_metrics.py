"""The metrics: counted from what hive announces, with names from the configuration alone."""

import asyncio
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hive.events import (
    AuditMoved,
    BreakerMoved,
    ConnectionRefused,
    DaemonMoved,
    HintJudged,
    RequestAborted,
    RequestAdmitted,
    RequestEnded,
    RequestExpired,
    RequestRefused,
    RequestRetried,
    RetriesEnded,
    ThawProved,
    WindowOperationEnded,
    WindowsCounted,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
    XidSeen,
)
from hive.policy.deadlines import Phase
from hive.policy.lifecycle import State
from hive.policy.windows import WindowState
from hive.telemetry.metrics import (
    CAUSES,
    CONFIRMED,
    LAG_S,
    OPERATIONS,
    REASONS,
    STATUSES,
    Metrics,
)
from tests.patience import awaited, until
from tests.prometheus import promtool

TOP = Path(__file__).parents[2]
WORKERS = (("m-0", "m"), ("m-1", "m"), ("n-0", "n"))
ENDED = RequestEnded(
    request_id="r1",
    method="POST",
    path="/v1/chat/completions",
    status=200,
    model="m",
    worker="m-0",
    code=None,
    key=None,
    seconds=2.0,
    first_byte_s=0.5,
    bytes_in=10,
    bytes_out=20,
)
ADMITTED = RequestAdmitted("r1", "m", "m-0", 0.25)
RETRIED = RequestRetried("r1", "network", "m", "m-0", 2, 5, 1.2, "BAD_GATEWAY")
Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Counted:
    """A model's door, as metrics see it."""

    in_flight: int = 0
    waiting: int = 0


def scraped(metrics: Metrics) -> dict[Series, float]:
    """What Prometheus reads; not from the text, since there are thousands of these."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return scraped(metrics).get((name, tuple(sorted(labels.items()))), 0.0)


def state_of(metrics: Metrics, worker: str) -> list[str]:
    return [
        state for state in State if value(metrics, "hive_worker_state", worker=worker, state=state)
    ]


def test_every_metric_and_every_workers_series_exist_from_the_start() -> None:
    """A rate over a series that appears with its first event misses that event."""
    metrics = Metrics(WORKERS, rooms={"m": Counted(), "n": Counted()})
    text = generate_latest(metrics.registry).decode()
    made = {name for name in vars(metrics) if name != "registry"}

    assert text.count("# TYPE hive_") >= len(made)
    read = {family.name for family in text_string_to_metric_families(text)}
    assert read >= {family.name for family in metrics.registry.collect()}
    for worker, model in WORKERS:
        assert state_of(metrics, worker) == ["STOPPED"]
        present = scraped(metrics)
        assert ("hive_worker_starts_total", (("worker", worker),)) in present
        assert (
            "hive_breaker_state",
            (("model", model), ("worker", worker)),
        ) in present
        for name in (
            "hive_in_flight",
            "hive_waiting",
            "hive_queue_seconds_count",
            "hive_retry_after_error_seconds_count",
            "hive_cancel_to_free_seconds_count",
            "hive_request_seconds_count",
            "hive_first_byte_seconds_sum",
        ):
            assert (name, (("model", model),)) in present


def test_what_is_alerted_on_is_counted_from_zero() -> None:
    """So that the first one is an increase, of a model that clients can ask for."""
    present = scraped(Metrics(WORKERS, rooms={"m": Counted()}))
    counted = [
        *(("hive_requests_total", "status", status) for status in STATUSES),
        *(("hive_refusals_total", "reason", reason) for reason in REASONS),
        *(("hive_timeouts_total", "phase", phase) for phase in Phase),
        *(("hive_cancellations_total", "confirmed", told) for told in CONFIRMED),
    ]
    for name, label, found in counted:
        assert present[name, tuple(sorted({"model": "m", label: str(found)}.items()))] == 0
    for worker, _ in WORKERS:
        for cause in CAUSES:
            exits = present["hive_worker_exits_total", (("cause", cause), ("worker", worker))]
            assert exits == 0
    assert present["hive_requests_total", (("model", ""), ("status", "401"))] == 0


def test_every_reason_and_cause_that_the_code_has_is_counted_from_zero() -> None:
    """What is announced and is not in the list would begin with its first event."""
    source = (TOP / "hive/workers/process.py").read_text()
    door = (TOP / "hive/workers/admission.py").read_text()
    causes = set(re.findall(r'^ +return "(\w+_lost|out_of_memory)"', source, re.MULTILINE))

    assert set(re.findall(r'reason="(\w+)"', door)) <= set(REASONS)
    assert {"guard_lost", "member_lost", "out_of_memory"} == causes <= set(CAUSES)


def test_an_answered_request_is_counted_once() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(ADMITTED)
    metrics.hear(ENDED)

    assert value(metrics, "hive_requests_total", model="m", status="200") == 1
    assert value(metrics, "hive_request_seconds_sum", model="m") == 2.0
    assert value(metrics, "hive_first_byte_seconds_sum", model="m") == 0.5
    assert value(metrics, "hive_queue_seconds_sum", model="m") == 0.25
    assert not any(name == "hive_request_failures_total" for name, _ in scraped(metrics))


def test_a_failed_request_is_counted_by_its_code() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(ADMITTED)
    metrics.hear(replace(ENDED, status=502, code="WORKER_CRASHED", first_byte_s=None))

    assert value(metrics, "hive_requests_total", model="m", status="502") == 1
    assert value(metrics, "hive_request_failures_total", model="m", code="WORKER_CRASHED") == 1
    assert value(metrics, "hive_first_byte_seconds_count", model="m") == 0


def test_a_request_that_no_worker_took_is_counted_without_a_time() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(replace(ENDED, status=404, model=None, worker=None, code="MODEL_NOT_FOUND"))
    metrics.hear(replace(ENDED, status=503, worker=None, code="SERVICE_UNAVAILABLE"))

    assert value(metrics, "hive_requests_total", model="", status="404") == 1
    assert value(metrics, "hive_requests_total", model="m", status="503") == 1
    assert value(metrics, "hive_request_seconds_count", model="m") == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/hive/v1/workers/m-0/stop")],
)
def test_operators_requests_are_not_inference(method: str, path: str) -> None:
    metrics = Metrics(WORKERS)
    before = scraped(metrics)
    metrics.hear(replace(ENDED, method=method, path=path, model=None, worker=None))

    assert scraped(metrics) == before


def test_in_flight_and_waiting_are_what_the_doors_say_when_somebody_looks() -> None:
    """Not sums of what was announced, which one lost event would put wrong for ever."""
    rooms = {"m": Counted(), "n": Counted()}
    metrics = Metrics(WORKERS, rooms=rooms)
    for in_flight, waiting in ((3, 2), (1, 0), (0, 0)):
        rooms["m"].in_flight, rooms["m"].waiting = in_flight, waiting

        assert value(metrics, "hive_in_flight", model="m") == in_flight
        assert value(metrics, "hive_waiting", model="m") == waiting
        assert value(metrics, "hive_in_flight", model="n") == 0


@pytest.mark.parametrize("reason", ["slots_busy", "queue_full", "queue_timeout", "draining"])
def test_a_refusal_is_counted_by_its_reason(reason: str) -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(RequestRefused("m", reason))

    assert value(metrics, "hive_refusals_total", model="m", reason=reason) == 1


def test_how_far_off_a_hint_was_is_measured() -> None:
    metrics = Metrics(WORKERS)
    for error_s in (0.5, 1.5):
        metrics.hear(HintJudged("m", error_s))

    assert value(metrics, "hive_retry_after_error_seconds_count", model="m") == 2
    assert value(metrics, "hive_retry_after_error_seconds_sum", model="m") == 2.0


@pytest.mark.parametrize("phase", Phase)
def test_a_limit_that_passed_is_counted_by_its_phase(phase: Phase) -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(RequestExpired("r1", "m", phase))

    assert value(metrics, "hive_timeouts_total", model="m", phase=phase) == 1


@pytest.mark.parametrize("confirmed", ["yes", "no", "unknown"])
def test_a_cancellation_is_counted_with_the_time_to_its_free_slot(confirmed: str) -> None:
    """(R050)"""
    metrics = Metrics(WORKERS)
    metrics.hear(RequestAborted("r1", "m", "m-0", confirmed, 0.25))

    assert value(metrics, "hive_cancellations_total", model="m", confirmed=confirmed) == 1
    assert value(metrics, "hive_cancel_to_free_seconds_sum", model="m") == 0.25


def test_a_breakers_state_is_a_number() -> None:
    metrics = Metrics(WORKERS)
    for old, new, number in (
        ("closed", "open", 2),
        ("open", "half_open", 1),
        ("half_open", "closed", 0),
    ):
        metrics.hear(BreakerMoved("m", "m-0", old, new, 5))

        assert value(metrics, "hive_breaker_state", model="m", worker="m-0") == number
        assert value(metrics, "hive_breaker_state", model="m", worker="m-1") == 0


def test_retries_are_counted_one_by_one_and_by_how_they_ended() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(RETRIED)
    metrics.hear(replace(RETRIED, attempt=3))
    for outcome in ("success", "exhausted", "deadline", "failed"):
        metrics.hear(RetriesEnded("network", outcome))

    assert value(metrics, "hive_retries_total", operation="network", outcome="retry") == 2
    for outcome in ("success", "exhausted", "deadline", "failed"):
        assert value(metrics, "hive_retries_total", operation="network", outcome=outcome) == 1


@given(st.text(), st.text(), st.text())
def test_nothing_that_a_client_chooses_becomes_a_label(an_id: str, path: str, key: str) -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(replace(ADMITTED, request_id=an_id))
    metrics.hear(RequestExpired(an_id, "m", "queue"))
    metrics.hear(RequestAborted(an_id, "m", "m-0", "yes", 0.1))
    metrics.hear(replace(RETRIED, request_id=an_id))
    metrics.hear(replace(ENDED, request_id=an_id, path="/v1/" + path, key=key))
    usual = Metrics(WORKERS)
    usual.hear(ADMITTED)
    usual.hear(RequestExpired("r1", "m", "queue"))
    usual.hear(RequestAborted("r1", "m", "m-0", "yes", 0.1))
    usual.hear(RETRIED)
    usual.hear(ENDED)

    assert set(scraped(metrics)) == set(scraped(usual))


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [
        (None, 200, "success"),
        (None, 304, "success"),
        (None, 400, "permanent"),  # the engine's own words
        (None, 408, "timeout"),
        (None, 504, "timeout"),
        (None, 429, "transient"),
        (None, 502, "transient"),
        (None, 503, "transient"),
        (None, 500, "permanent"),
        ("INFERENCE_TIMEOUT", 504, "timeout"),
        ("INFERENCE_TIMEOUT", 200, "timeout"),  # in a stream that had begun
        ("WORKER_CRASHED", 502, "transient"),
        ("SERVICE_UNAVAILABLE", 503, "transient"),
        ("RATE_LIMITED", 429, "transient"),
        ("DAEMON_UNREACHABLE", 500, "transient"),
        ("MODEL_NOT_FOUND", 404, "permanent"),
        ("UNAUTHORIZED", 401, "permanent"),
        ("GPU_VRAM_EXHAUSTED", 500, "permanent"),
        ("REQUEST_CANCELLED", 499, "cancelled"),
        ("SOME_OTHER", 500, "permanent"),
    ],
)
def test_a_call_is_counted_by_its_outcome(code: str | None, status: int, outcome: str) -> None:
    """Failed connections and limits that passed are transient (R184, R252)."""
    metrics = Metrics(WORKERS)
    zero = {key for key in scraped(metrics) if key[0] == "hive_operations_total"}
    metrics.hear(replace(ENDED, code=code, status=status))
    found = {k[1]: v for k, v in scraped(metrics).items() if k[0] == "hive_operations_total" and v}

    labels = (("operation", "inference"), ("outcome", outcome))
    assert found == {labels: 1}
    assert ("hive_operations_total", labels) in zero


def test_a_request_for_a_stored_answer_that_is_refused_is_inference() -> None:
    """`GET /v1/responses/{id}` is one that a model is known of."""
    metrics = Metrics(WORKERS)
    refused = replace(ENDED, method="GET", worker=None, status=503, code="SERVICE_UNAVAILABLE")
    metrics.hear(replace(refused, path="/v1/responses/r"))

    assert value(metrics, "hive_requests_total", model="m", status="503") == 1


def test_connections_that_were_refused_are_counted_beside_the_requests() -> None:
    metrics = Metrics(WORKERS)
    assert value(metrics, "hive_connections_refused_total") == 0
    metrics.hear(ConnectionRefused(100))

    assert value(metrics, "hive_connections_refused_total") == 1


# ── Workers ─────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_is_in_one_state_at_a_time() -> None:
    metrics = Metrics(WORKERS)
    for old, new in (("STOPPED", "STARTING"), ("STARTING", "LOADING"), ("LOADING", "READY")):
        metrics.hear(WorkerMoved("m-0", "m", old, new))
        assert state_of(metrics, "m-0") == [new]

    assert state_of(metrics, "m-1") == ["STOPPED"]


def test_a_workers_life_is_counted() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(WorkerStarted("m-0", "m", 7, unasked=False))
    metrics.hear(WorkerReady("m-0", "m", 12.0))
    metrics.hear(WorkerExited("m-0", "m", "signal", "signal SIGKILL", asked=False))
    metrics.hear(WorkerEnded("m-0", "m", "kill", 5.5, 2))

    assert value(metrics, "hive_worker_starts_total", worker="m-0") == 1
    assert value(metrics, "hive_worker_load_seconds_sum", model="m") == 12.0
    assert value(metrics, "hive_worker_exits_total", worker="m-0", cause="signal") == 1
    assert value(metrics, "hive_stop_seconds_sum", worker="m-0", how="kill") == 5.5


def test_xids_that_are_told_together_are_counted_one_by_one() -> None:
    metrics = Metrics(WORKERS, ("cuda:0",))
    for _ in range(2):
        metrics.hear(XidSeen("cuda:0", 31, "application", "", after_own_kill=False, count=700))

    assert value(metrics, "hive_xid_total", device="cuda:0", xid="31") == 1400


def test_ends_that_nobody_asked_for_are_crashes_of_the_model() -> None:
    metrics = Metrics(WORKERS)
    assert ("hive_worker_crashes_total", (("model", "n"),)) in scraped(metrics)
    metrics.hear(WorkerExited("m-0", "m", "asked", "status 0", asked=True))
    assert value(metrics, "hive_worker_crashes_total", model="m") == 0

    metrics.hear(WorkerExited("m-0", "m", "signal", "signal SIGSEGV", asked=False))
    metrics.hear(WorkerExited("m-1", "m", "hung", "signal SIGKILL", asked=True))
    assert value(metrics, "hive_worker_crashes_total", model="m") == 2
    assert value(metrics, "hive_worker_crashes_total", model="n") == 0


FAILS = ("READY", "STOPPING")


@pytest.mark.parametrize(
    ("path", "seconds"),
    [
        ((*FAILS, "STARTING", "LOADING", "READY"), 3.0),
        ((*FAILS, "FAILED", "STARTING", "LOADING", "STOPPING", "STARTING", "READY"), 6.0),
        ((*FAILS, "QUARANTINED", "STARTING", "LOADING", "READY"), 4.0),
        (("READY", "DRAINING", "STOPPING", "STARTING", "LOADING", "READY"), None),
        ((*FAILS, "STOPPED", "STARTING", "LOADING", "READY"), None),
        ((*FAILS, "LOST", "STOPPED", "STARTING", "LOADING", "READY"), None),
        (("LOADING", "STOPPING", "STARTING", "LOADING", "READY"), None),
        ((*FAILS, "STARTING", "LOADING"), None),
    ],
)
def test_a_recovery_is_from_a_workers_failure_until_it_is_ready(
    path: tuple[str, ...], seconds: float | None
) -> None:
    """MTTR (R254): by a clock that ticks once a move; what an operator stopped is none of it."""
    now = 0.0
    metrics = Metrics(WORKERS, now=lambda: now)
    for old, new in itertools.pairwise(path):
        metrics.hear(WorkerMoved("m-0", "m", old, new))
        now += 1.0

    counted = value(metrics, "hive_worker_recovery_seconds_count", model="m")
    assert counted == (0 if seconds is None else 1)
    assert value(metrics, "hive_worker_recovery_seconds_sum", model="m") == (seconds or 0.0)


def test_each_of_two_workers_recovers_by_itself() -> None:
    metrics = Metrics(WORKERS)
    for worker in ("m-0", "m-1"):
        metrics.hear(WorkerMoved(worker, "m", "READY", "STOPPING"))
    metrics.hear(WorkerMoved("m-0", "m", "LOADING", "READY"))
    assert value(metrics, "hive_worker_recovery_seconds_count", model="m") == 1

    metrics.hear(WorkerMoved("m-0", "m", "LOADING", "READY"))
    assert value(metrics, "hive_worker_recovery_seconds_count", model="m") == 1


def test_other_facts_change_nothing() -> None:
    metrics = Metrics(WORKERS)
    before = scraped(metrics)
    metrics.hear(DaemonMoved("listening"))
    metrics.hear(WorkerRestartPlanned("m-0", "m", 1.0, 1, 5))

    assert scraped(metrics) == before


# ── Windows ─────────────────────────────────────────────────────────────────────────────────────


def test_the_windows_series_exist_from_the_start() -> None:
    present = scraped(Metrics(WORKERS))

    for state in WindowState:
        assert present["hive_windows", (("state", state),)] == 0
    for operation in ("freeze", "thaw", "clone", "delete", "verify", "repair"):
        assert operation in OPERATIONS
        labels = (("operation", operation),)
        assert present["hive_window_operation_seconds_count", labels] == 0
    for kind in ("promised", "cached"):
        assert present["hive_thaw_tokens_total", (("kind", kind),)] == 0


def test_how_many_windows_there_are_is_what_was_counted_last() -> None:
    metrics = Metrics(WORKERS)
    for count in (3, 2):
        metrics.hear(WindowsCounted("FROZEN", count))
    metrics.hear(WindowsCounted("FREEZING", 1))

    assert value(metrics, "hive_windows", state="FROZEN") == 2
    assert value(metrics, "hive_windows", state="FREEZING") == 1
    assert value(metrics, "hive_windows", state="DELETING") == 0


def test_what_is_done_with_windows_is_timed_and_its_failures_are_counted() -> None:
    metrics = Metrics(WORKERS)
    done = WindowOperationEnded("freeze", "w", "s", "m", 1.5, blocks=3, bytes=4096)
    metrics.hear(done)
    metrics.hear(replace(done, seconds=0.5, code="STORAGE_WRITE_FAILED"))
    metrics.hear(replace(done, operation="thaw"))

    assert value(metrics, "hive_window_operation_seconds_count", operation="freeze") == 2
    assert value(metrics, "hive_window_operation_seconds_sum", operation="freeze") == 2.0
    assert value(metrics, "hive_window_operation_seconds_sum", operation="thaw") == 1.5
    failures = {k: v for k, v in scraped(metrics).items() if k[0] == "hive_window_failures_total"}
    operation = "hive_operations_total"
    assert value(metrics, operation, operation="freeze", outcome="success") == 1
    assert value(metrics, operation, operation="freeze", outcome="transient") == 1
    assert value(metrics, operation, operation="thaw", outcome="success") == 1
    labels = (("code", "STORAGE_WRITE_FAILED"), ("operation", "freeze"))
    assert failures == {("hive_window_failures_total", labels): 1}


def test_what_thaws_promised_and_what_engines_found_are_added_up() -> None:
    metrics = Metrics(WORKERS)
    for promised, cached in ((512, 512), (256, 0)):
        metrics.hear(ThawProved("w", "s", "m", promised, cached))

    assert value(metrics, "hive_thaw_tokens_total", kind="promised") == 768
    assert value(metrics, "hive_thaw_tokens_total", kind="cached") == 512


@given(st.text(), st.text())
def test_no_name_of_a_window_or_a_session_becomes_a_label(window: str, session: str) -> None:
    told, usual = Metrics(WORKERS), Metrics(WORKERS)
    for metrics, (one, other) in ((told, (window, session)), (usual, ("w", "s"))):
        metrics.hear(WindowOperationEnded("thaw", one, other, "m", 1.0))
        metrics.hear(ThawProved(one, other, "m", 1, 1))

    assert scraped(told) == scraped(usual)


# ── As the page says ────────────────────────────────────────────────────────────────────────────

SERIES = {
    'hive_operations_total{operation="inference",outcome="success"}': "0+6x60",
    'hive_operations_total{operation="inference",outcome="timeout"}': "0+1x60",
    'hive_operations_total{operation="inference",outcome="transient"}': "0+1x60",
    'hive_operations_total{operation="inference",outcome="permanent"}': "0+1x60",
    'hive_operations_total{operation="inference",outcome="cancelled"}': "0+3x60",
    'hive_operations_total{operation="freeze",outcome="success"}': "0x60",
    'hive_retries_total{operation="network",outcome="exhausted"}': "0+1x60",
    'hive_request_seconds_sum{model="m"}': "0+8x60",
    'hive_request_seconds_count{model="m"}': "0+4x60",
    'hive_request_seconds_bucket{model="m",le="1"}': "0+2x60",
    'hive_request_seconds_bucket{model="m",le="2"}': "0+4x60",
    'hive_request_seconds_bucket{model="m",le="+Inf"}': "0+4x60",
    'hive_worker_recovery_seconds_sum{model="m"}': "0+64x60",
    'hive_worker_recovery_seconds_count{model="m"}': "0+2x60",
    'hive_worker_crashes_total{model="m"}': "0+60x60",
}
# What each query of docs/metrics.md says of them after an hour.
SAID: dict[str, dict[str, float]] = {
    "calls, errors": {
        '{operation="inference", outcome="success"}': 360,
        '{operation="inference", outcome="timeout"}': 60,
        '{operation="inference", outcome="transient"}': 60,
        '{operation="inference", outcome="permanent"}': 60,
        '{operation="inference", outcome="cancelled"}': 180,
        '{operation="freeze", outcome="success"}': 0,
    },
    "error rate": {'{operation="inference"}': 0.25, '{operation="freeze"}': 0},
    "retries": {'hive_retries_total{operation="network", outcome="exhausted"}': 60},
    "success rate": {'{operation="inference"}': 0.5},
    "average latency": {'{model="m"}': 2},
    "p50": {'{model="m"}': 1.9},
    "MTTR": {'{model="m"}': 32},
    "crash rate": {'{model="m"}': 1},
}


def test_the_queries_that_are_told_say_what_they_are_told_for(tmp_path: Path) -> None:
    """By promtool, of series that were made for it (R185, R252, R254)."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = [line[2:].split(" | `", 1) for line in page.splitlines() if line.startswith("| ")]
    queries = {
        what: row[1].split("`")[0] for row in rows for what in SAID if row[0].startswith(what)
    }
    assert queries.keys() == SAID.keys()
    checks = [
        {
            "expr": queries[what].replace("\\|", "|"),
            "eval_time": "1h",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in found.items()],
        }
        for what, found in SAID.items()
    ]
    inputs = [{"series": series, "values": values} for series, values in SERIES.items()]
    file = tmp_path / "queries.yml"
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": checks}
    file.write_text(yaml.safe_dump({"tests": [test]}))

    promtool("test", "rules", file)


# ── The audit log ───────────────────────────────────────────────────────────────────────────────


def test_whether_the_audit_log_is_well_is_there_from_the_start() -> None:
    """It works again; what was changed stays so until hive is started again."""
    metrics = Metrics(WORKERS)

    def now() -> tuple[float, ...]:
        return tuple(scraped(metrics)[f"hive_audit_{one}", ()] for one in ("failing", "damaged"))

    assert now() == (0, 0)
    metrics.hear(AuditMoved("failing", "No space left on device"))
    assert now() == (1, 0)
    metrics.hear(AuditMoved("damaged", "head.json: it is missing"))
    assert now() == (1, 1)
    metrics.hear(AuditMoved("writing", "No space left on device", 3))
    assert now() == (0, 1)


# ── The event loop ──────────────────────────────────────────────────────────────────────────────


@awaited
async def test_the_loops_lag_is_how_late_a_timer_ran() -> None:
    """By a clock that says that each timer came 2 s late."""
    metrics = Metrics(WORKERS)
    ticks = iter(range(1000))
    async with metrics.measuring_lag(lambda: next(ticks) * (LAG_S + 2.0)):
        await until(lambda: value(metrics, "hive_event_loop_lag_seconds_count"), "a measurement")

    assert value(metrics, "hive_event_loop_lag_seconds_sum") >= 2.0
    assert [t.get_name() for t in asyncio.all_tasks() if "lag" in t.get_name()] == []
