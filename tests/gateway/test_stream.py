"""The event stream: named, numbered, resumable, and closed rather than endless."""

import asyncio
import json

from hive.events import (
    COUNTED,
    Announcer,
    BreakerMoved,
    DaemonMoved,
    Event,
    HintJudged,
    RequestAborted,
    RequestEnded,
    RequestExpired,
    RequestRefused,
    RequestRetried,
    RetriesEnded,
    WorkerExited,
    WorkerMoved,
    WorkerReady,
)
from hive.gateway.stream import BACKLOG, KEPT, EventStream, event_name
from tests.patience import awaited

READY = WorkerReady("llama-0", "llama", 1.5)


def ended(code: str | None) -> Event:
    return RequestEnded(
        request_id="req-1",
        method="POST",
        path="/v1/chat/completions",
        status=200 if code is None else 502,
        model="llama",
        worker="llama-0",
        code=code,
        key="ci",
        seconds=1.0,
        first_byte_s=None,
        bytes_in=1,
        bytes_out=2,
    )


def waiting(queue: "asyncio.Queue[bytes | None]") -> list[bytes | None]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


def id_of(message: bytes | None) -> str:
    assert message is not None
    return message.decode().partition("\n")[0].removeprefix("id: ")


def data_of(message: bytes | None) -> dict[str, object]:
    assert message is not None
    lines = dict(line.split(": ", 1) for line in message.decode().strip().split("\n"))
    found: dict[str, object] = json.loads(lines["data"])
    assert found["event"] == lines["event"]
    return found


@awaited
async def test_an_event_is_named_numbered_and_one_line_of_json() -> None:
    stream = EventStream()
    with stream.reader(None) as queue:
        stream.hear(READY)
        (message,) = waiting(queue)

    assert message is not None
    assert message.endswith(b"\n\n")
    assert message.count(b"\n") == 4
    assert data_of(message) | {"at": ""} == {
        "event": "worker_ready",
        "at": "",
        "worker": "llama-0",
        "model": "llama",
        "load_s": 1.5,
    }


@awaited
async def test_a_new_reader_gets_nothing_old() -> None:
    stream = EventStream()
    stream.hear(READY)
    with stream.reader(None) as queue:
        assert queue.empty()


@awaited
async def test_a_reader_that_comes_back_gets_what_it_missed_once_and_in_order() -> None:
    stream = EventStream()
    with stream.reader(None) as queue:
        stream.hear(READY)
        (first,) = waiting(queue)
    stream.hear(DaemonMoved("listening"))
    stream.hear(READY)
    with stream.reader(id_of(first)) as queue:
        missed = waiting(queue)

    assert [data_of(message)["event"] for message in missed] == ["daemon_moved", "worker_ready"]
    with stream.reader(id_of(missed[-1])) as queue:
        assert queue.empty()


@awaited
async def test_an_id_of_another_life_of_hive_gets_all_that_is_kept() -> None:
    stream = EventStream()
    stream.hear(READY)
    for last_id in ("0badcafe-1", "nonsense", "-", ""):
        with stream.reader(last_id) as queue:
            assert queue.qsize() == 1


@awaited
async def test_only_so_many_are_kept() -> None:
    stream = EventStream()
    for _ in range(KEPT + 10):
        stream.hear(READY)
    with stream.reader("another-1") as queue:
        assert queue.qsize() == KEPT
        assert id_of(queue.get_nowait()).endswith("-11")


@awaited
async def test_a_reader_that_falls_behind_is_dropped_and_told_by_the_end() -> None:
    """Else its queue would grow as long as it sleeps."""
    stream = EventStream()
    with stream.reader(None) as queue:
        for _ in range(BACKLOG + 10):
            stream.hear(READY)
        messages = waiting(queue)

    assert len(messages) == BACKLOG + 1
    assert messages[-1] is None


@awaited
async def test_when_hive_stops_the_last_event_says_so_and_the_stream_ends() -> None:
    stream = EventStream()
    with stream.reader(None) as queue:
        stream.hear(DaemonMoved("stopping"))
        last, end = waiting(queue)

    assert data_of(last)["state"] == "stopping"
    assert end is None


@awaited
async def test_good_requests_are_not_in_the_stream_and_failed_ones_are() -> None:
    stream = EventStream()
    with stream.reader(None) as queue:
        stream.hear(ended(None))
        stream.hear(ended("WORKER_CRASHED"))
        (only,) = waiting(queue)

    assert data_of(only)["code"] == "WORKER_CRASHED"


@awaited
async def test_what_only_the_metrics_count_is_not_in_the_stream() -> None:
    """Every refusal of a busy hour would push what matters out of what is kept."""
    stream, announcer = EventStream(), Announcer()
    announcer.listen(stream.hear, deaf_to=COUNTED)
    with stream.reader(None) as queue:
        for event in (
            RequestRefused("llama", "queue_full"),
            RequestExpired("req-1", "llama", "stall"),
            RequestAborted("req-1", "llama", "llama-0", "yes", 0.1),
            HintJudged("llama", 0.5),
            RetriesEnded("network", "success"),
        ):
            announcer.announce(event)

        assert queue.empty()


@awaited
async def test_an_operator_hears_of_breakers_and_of_what_is_sent_again() -> None:
    stream = EventStream()
    retried = RequestRetried("req-1", "network", "llama", "llama-0", 2, 5, 1.2, "BAD_GATEWAY")
    with stream.reader(None) as queue:
        stream.hear(BreakerMoved("llama", "llama-0", "closed", "open", 5))
        stream.hear(retried)
        told = [data_of(message) for message in waiting(queue)]

    assert [(fact["event"], fact["worker"]) for fact in told] == [
        ("breaker_moved", "llama-0"),
        ("request_retried", "llama-0"),
    ]
    assert (told[0]["new"], told[1]["attempt"]) == ("open", 2)


@awaited
async def test_an_events_text_is_redacted() -> None:
    """What an engine said last may hold a key (R076)."""
    stream = EventStream()
    with stream.reader(None) as queue:
        stream.hear(WorkerExited("a-0", "a", "crashed", "token=s3cr3t\n\ndata: x", asked=False))
        (message,) = waiting(queue)

    assert message is not None
    assert b"s3cr3t" not in message
    assert message.count(b"\n\n") == 1


@awaited
async def test_an_engines_last_words_lose_their_paths_as_in_an_answer() -> None:
    """(R076)"""
    stream = EventStream()
    with stream.reader(None) as queue:
        reason = "last output: no /opt/models/x at http://10.0.0.7:8000/x"
        stream.hear(WorkerMoved("a-0", "a", "LOADING", "FAILED", reason))
        (message,) = waiting(queue)

    assert message is not None
    assert b"last output: no [path] at [url]" in message


def test_names_are_in_snake_case() -> None:
    assert event_name(READY) == "worker_ready"
    assert event_name(DaemonMoved("stopping")) == "daemon_moved"
