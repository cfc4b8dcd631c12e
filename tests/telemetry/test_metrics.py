"""The metrics: counted from what hive announces, with names from the configuration alone."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hive.events import (
    DaemonMoved,
    RequestArrived,
    RequestEnded,
    WorkerEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
    WorkerRestartPlanned,
    WorkerStarted,
)
from hive.policy.lifecycle import State
from hive.telemetry.metrics import LAG_S, Metrics
from tests.patience import awaited, until

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
ARRIVED = RequestArrived("r1", "m", ENDED.path)
Series = tuple[str, tuple[tuple[str, str], ...]]


def scraped(metrics: Metrics) -> dict[Series, float]:
    """What Prometheus reads."""
    text, _ = metrics.text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
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
    metrics = Metrics(WORKERS)
    text = metrics.text()[0].decode()
    made = {name for name in vars(metrics) if name != "registry"}

    assert text.count("# TYPE hive_") >= len(made)
    for worker, model in WORKERS:
        assert state_of(metrics, worker) == ["STOPPED"]
        present = scraped(metrics)
        assert ("hive_worker_starts_total", (("worker", worker),)) in present
        for name in ("hive_in_flight", "hive_request_seconds_count", "hive_first_byte_seconds_sum"):
            assert (name, (("model", model),)) in present


def test_an_answered_request_is_counted_once() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(ARRIVED)
    assert value(metrics, "hive_in_flight", model="m") == 1
    metrics.hear(ENDED)

    assert value(metrics, "hive_in_flight", model="m") == 0
    assert value(metrics, "hive_requests_total", model="m", status="200") == 1
    assert value(metrics, "hive_request_seconds_sum", model="m") == 2.0
    assert value(metrics, "hive_first_byte_seconds_sum", model="m") == 0.5
    assert not any(name == "hive_request_failures_total" for name, _ in scraped(metrics))


def test_a_failed_request_is_counted_by_its_code() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(ARRIVED)
    metrics.hear(replace(ENDED, status=502, code="WORKER_CRASHED", first_byte_s=None))

    assert value(metrics, "hive_requests_total", model="m", status="502") == 1
    assert value(metrics, "hive_request_failures_total", model="m", code="WORKER_CRASHED") == 1
    assert value(metrics, "hive_first_byte_seconds_count", model="m") == 0


def test_a_request_that_no_worker_took_moves_no_gauge() -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(replace(ENDED, status=404, model=None, worker=None, code="MODEL_NOT_FOUND"))
    metrics.hear(replace(ENDED, status=503, worker=None, code="SERVICE_UNAVAILABLE"))

    assert value(metrics, "hive_requests_total", model="", status="404") == 1
    assert value(metrics, "hive_requests_total", model="m", status="503") == 1
    assert value(metrics, "hive_in_flight", model="m") == 0
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


@given(st.lists(st.sampled_from([("m", "m-0"), ("m", "m-1"), ("n", "n-0")])), st.randoms())
def test_in_flight_counts_who_is_there_and_returns_to_zero(
    asked: list[tuple[str, str]], chance: object
) -> None:
    metrics = Metrics(WORKERS)
    for model, _ in asked:
        metrics.hear(replace(ARRIVED, model=model))
    for name in ("m", "n"):
        count = sum(model == name for model, _ in asked)
        assert value(metrics, "hive_in_flight", model=name) == count
    chance.shuffle(asked)  # type: ignore[attr-defined]
    for model, worker in asked:
        metrics.hear(replace(ENDED, model=model, worker=worker))

    assert value(metrics, "hive_in_flight", model="m") == 0
    assert value(metrics, "hive_in_flight", model="n") == 0


def test_fetching_a_stored_response_leaves_nothing_in_flight() -> None:
    """GET /v1/responses/{id} goes to a worker, too."""
    metrics = Metrics(WORKERS)
    path = "/v1/responses/resp_1"
    metrics.hear(replace(ARRIVED, path=path))
    metrics.hear(replace(ENDED, method="GET", path=path))

    assert value(metrics, "hive_in_flight", model="m") == 0


@given(st.text(), st.text(), st.text())
def test_nothing_that_a_client_chooses_becomes_a_label(an_id: str, path: str, key: str) -> None:
    metrics = Metrics(WORKERS)
    metrics.hear(replace(ARRIVED, request_id=an_id, path=path))
    metrics.hear(replace(ENDED, request_id=an_id, path="/v1/" + path, key=key))
    usual = Metrics(WORKERS)
    usual.hear(ARRIVED)
    usual.hear(ENDED)

    assert set(scraped(metrics)) == set(scraped(usual))


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


def test_other_facts_change_nothing() -> None:
    metrics = Metrics(WORKERS)
    before = scraped(metrics)
    metrics.hear(DaemonMoved("listening"))
    metrics.hear(WorkerRestartPlanned("m-0", "m", 1.0, 1, 5))

    assert scraped(metrics) == before


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
