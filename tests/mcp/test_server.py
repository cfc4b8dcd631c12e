"""The protocol's side: what nobody foresaw, and whose key a call is made with."""

import json
import logging
import socket
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from mcp import MCPError, types

from hive.errors import InvalidParameter
from hive.mcp.server import Hive, _arguments, _found
from hive.mcp.tools import TOOLS
from hive.policy.retries import RETRIES, RetryPolicy
from tests.patience import awaited


class Session:
    async def report_progress(self, done: float, total: float | None, phase: str) -> None:
        """Nobody listens."""


def context(headers: dict[str, str] | None = None) -> Any:
    request = None if headers is None else SimpleNamespace(headers=headers)
    return SimpleNamespace(request=request, session=Session())


def hive(key: str | None = "own") -> Hive:
    return Hive("http://127.0.0.1:1", key)


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        (None, "own"),
        ({}, None),
        ({"authorization": "Bearer theirs"}, "theirs"),
        ({"authorization": "bearer  theirs "}, "theirs"),
        ({"authorization": "Basic dTpw"}, None),
        ({"x-api-key": "theirs"}, "theirs"),
    ],
)
def test_over_http_nobody_borrows_this_programs_key(
    headers: dict[str, str] | None, key: str | None
) -> None:
    assert hive()._caller(context(headers)).api_key == key


def test_the_key_is_in_no_repr() -> None:
    assert "own" not in repr(hive())


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "session_id"),
        ({"session_id": 1, "window_name": "w"}, "session_id"),
        ({"session_id": "s", "window_name": "w", "bogus": 1}, "bogus"),
        ({"session_id": "s", "window_name": "w", "tags": "one"}, "tags"),
        ({"session_id": "s", "window_name": "w", "description": "x" * 1025}, "description"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(given: dict[str, Any], param: str) -> None:
    """R082"""
    with pytest.raises(InvalidParameter) as caught:
        _arguments(TOOLS["window_freeze"], given)
    assert (caught.value.message, caught.value.param) == (f"Invalid parameter: {param}", param)
    assert "session_id" in caught.value.suggested_action


@awaited
async def test_what_nobody_foresaw_is_an_internal_error_and_tells_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R116, R127, C19: the server goes on, and the log has the traceback."""
    it = Hive("no url at all", None)
    it.plane = None  # type: ignore[assignment]
    params = types.CallToolRequestParams(name="window_list", arguments={})
    with caplog.at_level(logging.ERROR):
        result = await it.call_tool(context(), params)
    assert result.is_error
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    assert json.loads(content.text)["error"] == "CWM-9001"
    assert "NoneType" not in content.text
    assert any(record.exc_info for record in caplog.records)


@awaited
async def test_what_was_said_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """R182, R076: of a call that failed the log has names, never words."""
    messages = [{"role": "user", "content": "a secret"}]
    params = types.CallToolRequestParams(
        name="chat", arguments={"model": "m", "messages": messages, "max_tokens": 0}
    )
    with caplog.at_level(logging.INFO):
        result = await hive().call_tool(context(), params)
    assert result.is_error
    (line,) = caplog.messages
    assert line.startswith("chat failed: CWM-1003 Invalid parameter: max_tokens (retryable False")
    assert '"model": "m"' in line
    assert "secret" not in caplog.text


@awaited
async def test_a_tool_that_is_not_there_is_no_call() -> None:
    with pytest.raises(MCPError, match="Unknown tool: nope; there are window_freeze"):
        await hive().call_tool(context(), types.CallToolRequestParams(name="nope"))


def test_a_resource_has_an_address() -> None:
    assert _found("hive://windows/a%20b")[1] == "a b"
    assert _found("hive://sessions/s1")[0].name == "session"
    for uri in (
        "hive://[bad",
        "hive://windows/",
        "hive://windows/..",
        "hive://x/y",
        "http://windows/x",
        "",
    ):
        with pytest.raises(MCPError, match="No such resource"):
            _found(uri)


@awaited
async def test_the_log_has_no_more_of_a_parameter_than_a_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R182: nor of what is no name at all."""
    for name in ("x" * 10**6, {"what": "was said"}):
        params = types.CallToolRequestParams(name="window_status", arguments={"window_name": name})
        with caplog.at_level(logging.INFO):
            assert (await hive().call_tool(context(), params)).is_error
    assert max(map(len, caplog.messages)) < 1000
    assert "was said" not in caplog.text


@awaited
async def test_what_cannot_work_is_an_answer_and_who_cannot_be_reached_an_alarm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R197, R165: the one is told at once, the other after every try."""
    monkeypatch.setitem(RETRIES, "connect", RetryPolicy(3, (0.001,)))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    nobody = Hive(f"http://127.0.0.1:{port}", None)
    wanted = {"!": ("CWM-1002", "INFO", 1), "monday": ("DAEMON_UNREACHABLE", "CRITICAL", 3)}
    for name, (code, level, calls) in wanted.items():
        caplog.clear()
        params = types.CallToolRequestParams(name="window_status", arguments={"window_name": name})
        with caplog.at_level(logging.INFO, "hive.mcp"):
            result = await nobody.call_tool(context(), params)
        assert result.is_error
        assert result.structured_content is not None
        told = result.structured_content
        assert told["recovery_details"]["retry_attempt"] == calls - 1
        assert told["user_action"]
        (record,) = [one for one in caplog.records if one.name == "hive.mcp.server"]
        assert (record.levelname, code in record.getMessage()) == (level, True)
