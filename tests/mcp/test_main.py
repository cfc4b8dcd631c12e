"""`hive mcp` as a program: where it listens, and what is wrong at its start."""

import os
import socket
import subprocess
import sys

import httpx2
import pytest

from hive.mcp.__main__ import _is_loopback
from steps.driver import run_hive
from steps.mcp import INITIALIZE, serving


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_it_listens_for_this_host_alone(host: str, is_loopback: bool) -> None:
    assert _is_loopback(host) is is_loopback


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_hive("mcp", "--transport", "http", "--port", str(port), within_s=20)
    assert ran.code == 70
    assert f"cannot listen on port {port} of 127.0.0.1" in ran.err
    assert "--port" in ran.err


def test_the_key_is_no_argument_for_others_to_read() -> None:
    """Its environment is its own user's alone; arguments are everybody's."""
    with subprocess.Popen(
        [sys.executable, "-m", "hive", "mcp", "--api-key", "hive_secret_key"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "HIVE_API_KEY"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(
            b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18",'
            b'"capabilities":{},"clientInfo":{"name":"t","version":"1"}}}\n'
        )
        process.stdin.flush()
        assert b"serverInfo" in process.stdout.readline()
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            arguments = file.read()
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            environment = file.read()
        process.stdin.close()
        assert process.wait(10) == 0
    assert b"hive.mcp" in arguments
    assert b"hive_secret_key" not in arguments
    assert b"HIVE_API_KEY=hive_secret_key" in environment


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_page_in_somebodys_browser_is_refused(host: str) -> None:
    """DNS rebinding: it would name a host of its own, or come from one."""
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"Accept": "application/json, text/event-stream"}
    with serving(["--host", host, "--port", "0"], dict(os.environ)) as address:
        for more in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            answer = httpx2.post(address, json=body, headers=headers | more)
            assert answer.status_code in (403, 421), answer.text
        assert httpx2.post(address, json=body, headers=headers).status_code not in (403, 421)


def test_its_end_waits_for_no_agent_that_listens() -> None:
    """`serving` sends SIGTERM, and looks for an exit code of 0 and no traceback."""
    accepted = {"Accept": "application/json, text/event-stream"}
    with httpx2.Client(headers=accepted, timeout=10) as client:
        with serving(["--port", "0"], dict(os.environ)) as address:
            began = client.post(address, json=INITIALIZE)
            session = {"Mcp-Session-Id": began.headers["mcp-session-id"]}
            listening = client.send(
                client.build_request("GET", address, headers=session), stream=True
            )
            assert listening.status_code == 200
        listening.close()


def test_a_url_with_a_password_is_refused() -> None:
    """Arguments are everybody's to read."""
    ran = run_hive("mcp", "--url", "http://ann:secret@127.0.0.1:1", within_s=20)
    assert ran.code == 2
    assert "HIVE_API_KEY" in ran.err
