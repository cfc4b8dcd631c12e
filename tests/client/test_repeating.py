"""A call that is made again: who is told, and how the command line does it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hive import cli
from hive.client.repeating import Tried, repeated, tried_of
from hive.errors import EngineUnreachable, HiveError, ServiceUnavailable
from hive.gateway import problems
from hive.policy.control import Operation, command
from hive.policy.retries import RETRIES, RetryPolicy
from tests.patience import awaited

ROW = Operation(5.0, 20.0, "control.read", changes=False)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RETRIES, "control.read", RetryPolicy(3, (0.01, 0.02)))


class Daemon:
    """Refuses so many requests, then answers."""

    def __init__(self, refusals: int, error: HiveError) -> None:
        self.asked: list[str] = []
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                daemon.asked.append(f"{self.command} {self.path}")
                is_refused = len(daemon.asked) <= refusals
                told: Any = problems.body(error) if is_refused else {"sessions": []}
                body = json.dumps(told).encode()
                self.send_response(error.status if is_refused else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_DELETE = _answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nobody wants to hear of it."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    made: list[Daemon] = []
    yield made
    for one in made:
        one.end()


@awaited
async def test_each_failure_is_told_before_the_next_call() -> None:
    heard: list[tuple[str, Tried]] = []
    errors = [EngineUnreachable("one"), EngineUnreachable("two")]
    for error in errors:
        error.details = {"http_status": 502}

    async def ask(_limit_s: float) -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    def tell(error: HiveError, tried: Tried) -> None:
        heard.append((error.message, tried))

    assert await repeated(ROW, ask, tell, lambda: 0.0) == "done"
    assert heard == [("one", Tried(1, 3, 0.01)), ("two", Tried(2, 3, 0.02))]


@awaited
async def test_each_call_hears_how_long_it_may_take() -> None:
    row = Operation(5.0, 0.2, "control.read", changes=False)
    limits: list[float] = []

    async def ask(limit_s: float) -> None:
        limits.append(limit_s)
        await asyncio.sleep(0.05)
        raise EngineUnreachable

    with pytest.raises(EngineUnreachable) as caught:
        await repeated(row, ask, lambda *_: None, lambda: 0.0)
    assert limits[0] <= 0.2
    assert limits == sorted(limits, reverse=True)
    assert tried_of(caught.value).calls == len(limits) == 3


def test_a_person_waits_so_long_and_no_longer() -> None:
    row = command(30.0, changes=False)
    assert (row.limit_s, row.deadline_s, row.retry) == (30.0, 30.0, "control.read")
    assert command(30.0, changes=True).retry is None


def test_a_command_that_only_reads_asks_again_and_says_so(
    daemons: list[Daemon], capsys: pytest.CaptureFixture[str]
) -> None:
    """R005, R176"""
    daemon = Daemon(2, EngineUnreachable("Cannot connect to inference server"))
    daemons.append(daemon)
    assert cli.run(["session", "list", "--url", daemon.url]) == 0
    assert daemon.asked == ["GET /hive/v1/sessions?limit=100"] * 3
    told = capsys.readouterr().err.splitlines()
    said = "failed: Cannot connect to inference server; the next one follows in"
    assert told == [
        f"hive: attempt 1 of 3 {said} 0.01 s",
        f"hive: attempt 2 of 3 {said} 0.02 s",
    ]


def test_a_command_that_changes_something_asks_once(
    daemons: list[Daemon], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = Daemon(9, ServiceUnavailable("hive is draining.", retry_after_s=1.0))
    daemons.append(daemon)
    args = ["window", "clone", "a", "b", "--url", daemon.url]
    assert cli.run(args) == 1
    assert daemon.asked == ["POST /hive/v1/windows/a/clone"]
    assert "hive is draining." in capsys.readouterr().err
