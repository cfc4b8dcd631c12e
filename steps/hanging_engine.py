"""Clients of the real engine that leave, time out or wait while it hangs."""

import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from steps.deaths import ENDLESS, LONG, SAY, Reader
from steps.driver import Answer, Hive, Stream
from steps.real import START_S
from steps.starts import Start
from steps.waiting import must

CHAT = "/v1/chat/completions"
ID = "to-be-cancelled"


@dataclass
class Cancelled:
    """What was counted before a cancellation."""

    confirmed: float
    starts: int


def _confirmed(hive: Hive) -> float:
    return hive.metric("hive_cancellations_total", model="m", confirmed="yes")


@pytest.fixture
def before(real_hive: Hive) -> Cancelled:
    real_hive.wait_state("READY", within_s=START_S)
    return Cancelled(_confirmed(real_hive), real_hive.worker()["starts"])


def _begin(hive: Hive, tokens: int, **headers: str) -> Stream:
    body: dict[str, Any] = {"model": "m", "messages": SAY, "max_tokens": tokens, "stream": True}
    return hive.stream(CHAT, body | ENDLESS, headers)


@given("a client is reading a long answer", target_fixture="reading")
def _reading(served: Hive, before: Cancelled) -> Iterator[Stream]:
    del before  # made before the client came
    stream = _begin(served, LONG, **{"X-Request-Id": ID})
    stream.wait_for_events(5, 60)
    yield stream
    stream.leave()


@given(
    parsers.parse("a client is reading an answer of {tokens:d} tokens"), target_fixture="reading"
)
def _short(served: Hive, tokens: int) -> Stream:
    stream = _begin(served, tokens)
    stream.wait_for_events(3, 60)
    return stream


@when("the reader leaves")
def _leaves(reading: Stream) -> None:
    reading.leave()


@when("the reader cancels its request")
def _cancels(served: Hive, reading: Stream) -> None:
    assert served.ask("DELETE", f"/hive/v1/requests/{ID}").status == 204
    reading.wait_for_end()
    assert reading.last_error
    assert reading.last_error["code"] == "REQUEST_CANCELLED"


@when("the reader has a deadline of a second, and it passes")
def _passes(served: Hive, reading: Stream) -> None:
    reading.leave()
    body = {"model": "m", "prompt": "once", "max_tokens": LONG, **ENDLESS}
    answer = served.ask("POST", "/v1/completions", body, {"X-Hive-Timeout": "1"})
    assert (answer.status, answer.code) == (504, "REQUEST_TIMEOUT"), answer.body


@then("the engine runs nothing any more, by its own count")
def _idle(served: Hive) -> None:
    """Asked on its own socket: hive's count is not what is looked at."""
    must(lambda: _running(served) == 0, 30, lambda: f"an idle engine; it runs {_running(served)}")


def _running(hive: Hive) -> float:
    (home,) = (hive.runtime / "w").iterdir()
    connection = http.client.HTTPConnection("engine", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(home / "s"))
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    counts = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(counts))


@then("the slot is free, and the cancellation was confirmed")
def _free(served: Hive, before: Cancelled) -> None:
    must(lambda: served.worker()["in_flight"] == 0, 10, lambda: f"a free slot: {served.worker()}")
    must(lambda: _confirmed(served) > before.confirmed, 10, "the confirmation is counted")


@when("a client asks about 15000 tokens, and has no patience", target_fixture="told")
def _impatient(served: Hive, before: Cancelled) -> Answer:
    del before
    body = {"model": "m", "prompt": list(range(10, 110)) * 150, "max_tokens": 1}
    return served.ask("POST", "/v1/completions", body, {"X-Hive-Timeout": "0.2"})


@then("it is told REQUEST_TIMEOUT")
def _timeout(told: Answer) -> None:
    assert (told.status, told.code) == (504, "REQUEST_TIMEOUT"), told.body


@then("the worker is still the same")
def _same(served: Hive, before: Cancelled) -> None:
    must(lambda: served.worker()["in_flight"] == 0, 20, lambda: f"a free slot: {served.worker()}")
    worker = served.worker()
    assert (worker["state"], worker["starts"]) == ("READY", before.starts)


@pytest.fixture
def stopped_at() -> list[float]:
    return []


@when("EngineCore is stopped, and one more client leaves", target_fixture="old_engine")
def _stopped(served: Hive, stopped_at: list[float]) -> Start:
    """A third one leaves, too: what the engine has begun it does not end any more."""
    leaver = _begin(served, LONG)
    leaver.wait_for_events(3, 60)
    old, processes = Start.of(served), served.tree()
    core = next(p.pid for p in processes if p.name.startswith("VLLM::EngineCor"))
    for process in processes:
        if process.pid == core or process.name.startswith("VLLM::Worker"):
            os.kill(process.pid, signal.SIGSTOP)
    stopped_at.append(time.monotonic())
    leaver.leave()
    return old


@then(parsers.parse("the others are told {code} within {seconds:g} seconds"))
def _hung(readers: list[Reader], code: str, seconds: float, stopped_at: list[float]) -> None:
    for reader in readers:
        must(lambda r=reader: r.ended_at, seconds + 10, "every client's end")  # type: ignore[misc]
        assert reader.code == code, repr(reader.error)
        assert reader.ended_at
        assert reader.ended_at - stopped_at[0] < seconds


@when("the worker is drained")
def _drained(served: Hive) -> None:
    assert served.ask("POST", "/hive/v1/workers/m-0/drain").status == 202


@then("the whole answer arrives")
def _whole(reading: Stream) -> None:
    reading.wait_for_end(60)
    assert reading.is_whole
    assert reading.events[-1] == "[DONE]"
    assert len(reading.events) >= 300


@then("the worker is stopped, and begins to start when that is asked for")
def _again(served: Hive) -> None:
    """Whoever needs it next waits for it to be READY; where nobody does, hive stops while it loads."""
    served.wait_state("STOPPED", within_s=30)
    starts = served.worker()["starts"]
    assert served.ask("POST", "/hive/v1/workers/m-0/start").status == 202
    must(lambda: served.worker()["starts"] > starts and served.worker()["pid"], 10, "a new start")
