"""`hive alerts`: what it prints of what a daemon tells, and how it exits."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from hive import cli

ALERT = {
    "rule": "breaker_open",
    "level": "high",
    "subject": "Worker llama-0",
    "operation": "worker",
    "model": "llama",
    "worker": "llama-0",
    "device": "",
    "code": "CIRCUIT_BREAKER_OPEN",
    "message": "The breaker is open.",
    "recommended_action": "Restart it.",
    "began_at": "2026-01-31T12:00:00+00:00",
    "seconds": 61.4,
    "repeats": 3,
}
IDLE: dict[str, Any] = {
    "enabled": True,
    "waiting": 0,
    "oldest_at": None,
    "attempts": 0,
    "last_error": "",
    "next_try_seconds": 0.0,
    "disk_error": "",
    "messages": [],
}
BEHIND: dict[str, Any] = {
    **IDLE,
    "waiting": 2,
    "oldest_at": 1_700_000_000.0,
    "attempts": 4,
    "last_error": "HTTP 500",
    "next_try_seconds": 8.2,
    "disk_error": "No space left on device",
}

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HIVE_")]:
        monkeypatch.delenv(name)


@contextmanager
def daemon_with(alerts: list[dict[str, Any]], outbox: dict[str, Any]) -> Iterator[str]:
    """Something that answers as a daemon does."""
    body = {"service_level": "degraded", "alerts": alerts, "outbox": outbox}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = json.dumps(body).encode()
            self.send_response(200 if self.path == "/hive/v1/alerts" else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name there)
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_where_nothing_is_wrong_the_exit_is_0(capsys: Capture) -> None:
    with daemon_with([], IDLE) as url:
        assert cli.run(["alerts", "--url", url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "service level: degraded",
        "nothing has escalated that is not over",
        "webhook: 0 messages wait to be sent",
    ]


def test_what_escalated_is_shown_with_what_to_do_and_the_exit_is_1(capsys: Capture) -> None:
    """(R193)"""
    with daemon_with([ALERT], BEHIND) as url:
        assert cli.run(["alerts", "--url", url]) == 1
    _, _, row, webhook, disk = capsys.readouterr().out.splitlines()

    for shown in ("high", "breaker_open", "Worker llama-0", "61 s", "3", "Restart it."):
        assert shown in row
    for shown in ("2 messages wait", "4 tries", "HTTP 500", "the next in 8 s"):
        assert shown in webhook
    assert disk.endswith("No space left on device")


def test_without_a_webhook_it_says_so(capsys: Capture) -> None:
    with daemon_with([], {**IDLE, "enabled": False}) as url:
        assert cli.run(["alerts", "--url", url]) == 0
    assert "webhook: none" in capsys.readouterr().out


@pytest.mark.parametrize("alerts", [[], [ALERT]])
def test_programs_get_all_of_it(capsys: Capture, alerts: list[dict[str, Any]]) -> None:
    with daemon_with(alerts, IDLE) as url:
        assert cli.run(["alerts", "--json", "--url", url]) == len(alerts)
    assert json.loads(capsys.readouterr().out)["alerts"] == alerts
