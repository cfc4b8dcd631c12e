"""Clients of the real engine, and what they see when it dies."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from pytest_bdd import given, parsers, then, when

from steps.driver import Hive
from steps.starts import Start
from steps.waiting import must

SAY: Any = [{"role": "user", "content": "hello"}]
LONG = 15_000  # tokens: half a minute of generating
ENDLESS: Any = {"ignore_eos": True}
BACK_S = 170


@dataclass
class Reader:
    """One client in a thread: what it read, how it ended, and what readiness was then."""

    hive: Hive
    read: Callable[["Reader"], None]
    pieces: int = 0
    error: Exception | None = None
    ended_at: float | None = None
    readiness: int | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.read(self)
        except openai.APIError as exc:
            self.error = exc
        self.ended_at = time.monotonic()
        self.readiness = self.hive.readiness().status

    @property
    def code(self) -> str | None:
        body: Any = getattr(self.error, "body", None)
        if isinstance(body, dict):
            found = body.get("error", body)
            return found.get("code") if isinstance(found, dict) else None
        return None


def _stream(reader: Reader) -> None:
    with openai.OpenAI(base_url=f"{reader.hive.url}/v1", api_key="x", max_retries=0) as client:
        for _ in client.chat.completions.create(
            model="m", messages=SAY, max_tokens=LONG, stream=True, extra_body=ENDLESS
        ):
            reader.pieces += 1


def _plain(reader: Reader) -> None:
    with openai.OpenAI(base_url=f"{reader.hive.url}/v1", api_key="x", max_retries=0) as client:
        client.completions.create(model="m", prompt="once", max_tokens=LONG, extra_body=ENDLESS)


@given("the real engine is serving", target_fixture="served")
def _serving(real_hive: Hive) -> Hive:
    real_hive.wait_state("READY", within_s=BACK_S)
    return real_hive


@given(
    "one client is reading a long answer, and one waits for a whole answer",
    target_fixture="readers",
)
def _reading(served: Hive) -> Iterator[list[Reader]]:
    readers = [Reader(served, _stream), Reader(served, _plain)]
    must(lambda: readers[0].pieces > 5, 60, lambda: f"the stream is being read: {readers}")
    must(lambda: served.worker()["in_flight"] == 2, 20, lambda: f"both in flight: {readers}")
    yield readers
    for reader in readers:
        reader.thread.join(60)


@pytest.fixture
def killed_at() -> list[float]:
    return []


@when(parsers.parse("the engine's {victim} is killed"), target_fixture="old_engine")
def _kill(served: Hive, victim: str, killed_at: list[float]) -> Start:
    worker, old = served.worker(), Start.of(served)
    core = next(p.pid for p in served.tree() if p.name.startswith("VLLM::EngineCor"))
    pid = {"API server": worker["pid"], "EngineCore": core, "guard": worker["guard_pid"]}[victim]
    killed_at.append(time.monotonic())
    os.kill(pid, signal.SIGKILL)
    return old


@then(parsers.parse('each client has a proper exception "{code}" within {seconds:g} seconds'))
def _told(readers: list[Reader], code: str, seconds: float, killed_at: list[float]) -> None:
    must(lambda: all(r.ended_at for r in readers), 30, "every client's end")
    assert [r.code for r in readers] == [code] * len(readers), [repr(r.error) for r in readers]
    late = [(r.ended_at or 0) - killed_at[0] for r in readers]
    assert max(late) < seconds, late


@then("readiness was already denied when they saw it")
def _denied(readers: list[Reader]) -> None:
    for reader in readers:
        reader.thread.join(10)
    assert [r.readiness for r in readers] == [503] * len(readers)


@then("the worker is ready again by itself")
def _heals(served: Hive) -> None:
    served.wait_state("READY", within_s=BACK_S)


@then("no process, socket or shared memory of the old engine remains")
def _nothing(old_engine: Start) -> None:
    assert old_engine.left() == []
