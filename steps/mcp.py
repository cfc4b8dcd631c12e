"""Steps about agents: the official MCP client, over stdio and HTTP, and `hive mcp` as a program."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters, stdio_client, types
from mcp.client.streamable_http import streamable_http_client
from pytest_bdd import given, parsers, then, when

from hive.mcp.server import PLACES
from hive.mcp.tools import TOOLS
from steps.memory import CHUNK, WORDS
from steps.operator import key_of
from steps.story import MODEL, Story

HIVE = [sys.executable, "-m", "hive", "mcp"]
LOGGED = re.compile(r"listening on (http://[^\"\s]+)")
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}


class Agent:
    """A client of `hive mcp`; its last call is what `Then` looks at."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.ends = contextlib.ExitStack()
        self.results: dict[str, types.CallToolResult] = {}
        self.last: types.CallToolResult | None = None
        self.session = ""
        self.progress: list[tuple[float, float | None, str | None]] = []
        self._client: Client | None = None
        self._portal: BlockingPortal | None = None

    def come(self, way: str, key: str | None = None) -> None:
        self.ends.close()
        self._portal = self.ends.enter_context(start_blocking_portal())
        environment = {name: value for name, value in os.environ.items() if name != "HIVE_API_KEY"}
        arguments = ["--url", self.story.hive.url]
        if way == "stdio":
            environment |= {"HIVE_API_KEY": key} if key else {}
            program = StdioServerParameters(
                command=HIVE[0], args=[*HIVE[1:], *arguments], env=environment
            )
            client = Client(stdio_client(program))
        else:
            # What this program could do in its own name is nobody's to borrow.
            environment["HIVE_API_KEY"] = key_of("operator")
            address = self.ends.enter_context(serving([*arguments, "--port", "0"], environment))
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            http = self._enter(httpx2.AsyncClient(headers=headers, timeout=30))
            client = Client(streamable_http_client(address, http_client=http))
        self._client = self._enter(client)

    def _enter(self, manager: AbstractAsyncContextManager[Any]) -> Any:
        assert self._portal is not None
        return self.ends.enter_context(self._portal.wrap_async_context_manager(manager))

    def do(self, call: Any, *args: Any) -> Any:
        assert self._portal is not None
        return self._portal.call(call, *args)

    def call(self, tool: str, **arguments: Any) -> Any:
        """The result's data, None where it failed."""
        client = self._client
        assert client is not None

        async def heard(progress: float, total: float | None, message: str | None) -> None:
            self.progress.append((progress, total, message))

        async def ask() -> Any:
            return await client.call_tool(tool, arguments, progress_callback=heard)

        self.last = self.results[tool] = self.do(ask)
        return None if self.last.is_error else self.last.structured_content["result"]

    @property
    def text(self) -> str:
        assert self.last is not None
        (content,) = self.last.content
        assert isinstance(content, types.TextContent)
        return content.text

    @property
    def told(self) -> Any:
        assert self.last is not None
        return self.last.structured_content

    def talk(self) -> None:
        messages = [{"role": "user", "content": WORDS}]
        told = self.call(
            "chat", model=MODEL, messages=messages, new_session=True, max_tokens=8, temperature=0
        )
        assert told, self.text
        self.session = told["session_id"]


@contextlib.contextmanager
def serving(arguments: list[str], environment: dict[str, str]) -> Iterator[str]:
    """`hive mcp` over HTTP: its address."""
    process = subprocess.Popen(
        [*HIVE, "--transport", "http", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "hive mcp ended before it listened"
            found = LOGGED.search(line)
        yield found.group(1)
        process.terminate()
        _, said = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in said
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


@pytest.fixture
def agent(story: Story) -> Iterator[Agent]:
    it = Agent(story)
    try:
        yield it
    finally:
        it.ends.close()


# ── coming ──────────────────────────────────────────────────────────────────────────────────────


@given(parsers.parse("an agent over {way}"))
def _(agent: Agent, way: str) -> None:
    agent.come(way)


@given(parsers.parse('an agent with the key of "{who}" over {way}'))
def _(agent: Agent, who: str, way: str) -> None:
    agent.come(way, key_of(who))


@when("an agent without a key comes over HTTP")
def _(agent: Agent) -> None:
    agent.come("HTTP")


@given(parsers.parse('the key "{name}" may ask {count:d} times a minute'))
def _(story: Story, name: str, count: int) -> None:
    (key,) = (key for key in story.hive.keys if key["name"] == name)
    key["requests_per_minute"] = count


# ── calling ─────────────────────────────────────────────────────────────────────────────────────


@when(parsers.parse('the agent has a conversation, and freezes it as "{name}"'))
def _(agent: Agent, name: str) -> None:
    agent.talk()
    told = agent.call("window_freeze", session_id=agent.session, window_name=name)
    assert told, agent.text
    assert told["blocks"] == told["tokens"] // CHUNK > 0


@when(
    parsers.parse(
        'the agent looks at "{name}", clones it as "{clone}", thaws "{again}" and deletes it'
    )
)
def _(agent: Agent, name: str, clone: str, again: str) -> None:
    assert agent.call("window_status", window_name=name)["name"] == name
    assert agent.call("window_verify", window_name=name)["status"] == "passed"
    assert agent.call("window_clone", window_name=name, new_name=clone)["name"] == clone
    thawed = agent.call("window_thaw", window_name=again)
    assert thawed["receipt"]["partial"] is False
    messages = [*thawed["messages"], {"role": "user", "content": "go on"}]
    said = agent.call(
        "chat", model=MODEL, messages=messages, session_id=thawed["session_id"], max_tokens=4
    )
    cached = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == thawed["receipt"]["usable_tokens"] > 0
    assert agent.call("window_delete", window_name=again) == {"name": again, "status": "deleted"}
    assert [one["name"] for one in agent.call("window_list")["windows"]] == [name]


@when("the agent asks for sessions, workers, the cache, health and metrics")
def _(agent: Agent) -> None:
    assert agent.session in [one["id"] for one in agent.call("session_list")["sessions"]]
    assert "lmcache" in [one["id"] for one in agent.call("worker_list")["workers"]]
    cache = agent.call("cache_stats")
    assert set(cache) == {"lmcache", "windows", "thaws"}
    assert cache["windows"]["count"] == 1
    assert agent.call("health_check")["status"] == "ok"
    found = agent.call("get_metrics_data", prefix="hive_windows")
    assert {"labels": {"state": "FROZEN"}, "value": 1.0} in found["metrics"]["hive_windows"]
    assert found["tools"]["window_freeze"]["total_calls"] == 1


@then("every tool was used, and each answered live")
def _(agent: Agent) -> None:
    assert set(agent.results) == set(TOOLS)
    for name, result in agent.results.items():
        told = result.structured_content
        assert (told["source"], told["degraded"]) == ("live", False), (name, told)
        (content,) = result.content
        assert isinstance(content, types.TextContent)
        assert json.loads(content.text) == told
    # An agent that talks to a model leaves no request behind that looks cancelled.
    assert not agent.story.hive.logged("request", status=499)


@then("the agent can read every resource")
def _(agent: Agent) -> None:
    client = agent._client
    assert client is not None
    listed = agent.do(client.list_resources).resources
    assert {str(one.uri) for one in listed} == set(PLACES)
    templates = agent.do(client.list_resource_templates).resource_templates
    assert len(templates) == 2
    for uri in (*PLACES, f"hive://sessions/{agent.session}", "hive://windows/monday"):
        (content,) = agent.do(client.read_resource, uri).contents
        assert json.loads(content.text)["source"] == "live", uri
    for uri in ("hive://windows/nope", "hive://windows/..", "hive://nothing", "file:///etc/passwd"):
        with pytest.raises(MCPError):
            agent.do(client.read_resource, uri)


@then("the agent has heard of its progress")
def _(agent: Agent) -> None:
    phases = [phase for _, _, phase in agent.progress]
    assert "link" in phases
    assert "generate" in phases
    done, total, _ = next(one for one in reversed(agent.progress) if one[2] == "link")
    assert done == total


@when(parsers.parse("the agent calls {tool} with {arguments}"))
def _(agent: Agent, tool: str, arguments: str) -> None:
    agent.call(tool, **json.loads(arguments))


@when("the agent chats until it may not")
def _(agent: Agent) -> None:
    for _ in range(10):
        messages = [{"role": "user", "content": "hello"}]
        if agent.call("chat", model=MODEL, messages=messages, max_tokens=1) is None:
            return
    raise AssertionError("it might ask for ever")


@given("the agent has asked for its windows and for hive's health")
def _(agent: Agent) -> None:
    agent.call("window_list")
    agent.call("health_check")


@when("hive stops")
def _(story: Story) -> None:
    story.hive.stop()


@when("the agent asks for its windows")
def _(agent: Agent) -> None:
    agent.call("window_list")


@when("the agent asks for hive's health")
def _(agent: Agent) -> None:
    agent.call("health_check")


@when(parsers.parse('the agent tries to delete "{name}"'))
def _(agent: Agent, name: str) -> None:
    agent.call("window_delete", window_name=name)


# ── what comes of it ────────────────────────────────────────────────────────────────────────────


@then(parsers.re(r"the tool fails with (?P<text>\{.*\})"))
def _(agent: Agent, text: str) -> None:
    assert agent.last is not None
    assert (agent.last.is_error, agent.text) == (True, text)


@then(parsers.re(r"the tool fails with (?P<code>[A-Z_]+)"))
def _(agent: Agent, code: str) -> None:
    assert agent.last is not None
    assert agent.last.is_error
    assert json.loads(agent.text)["error"] == code


@then(parsers.re(r'the tool fails as "(?P<message>.*)" with (?P<number>CWM-\d+)'))
def _(agent: Agent, message: str, number: str) -> None:
    told = json.loads(agent.text)
    assert list(told) == ["error", "message", "retryable"]
    assert (told["error"], told["retryable"]) == (number, True)
    seconds = r"\d+"
    assert re.fullmatch(message.replace("{seconds}", seconds), told["message"]), told


@then("these calls fail, and a workflow can read the same:")
def _(agent: Agent, datatable: list[list[str]]) -> None:
    for tool, arguments, text in datatable[1:]:
        agent.call(tool, **json.loads(arguments))
        assert agent.last is not None
        assert (agent.last.is_error, agent.text) == (True, text)
        told = json.loads(text)
        assert agent.told["message"] == told["message"]
        assert agent.told["details"]["number"] == told["error"]
        assert (agent.told["workflow_phase"], agent.told["recovery_strategy"]) == (tool, "abort")


@then("it gets what it was told before, marked as such and with its age")
def _(agent: Agent) -> None:
    told = agent.told
    assert [one["name"] for one in told["result"]["windows"]] == ["monday"]
    assert (told["source"], told["degraded"]) == ("cache", True)
    assert told["age_seconds"] > 0
    assert told["warnings"][0].startswith("Using cached data from ")


@then("the tool fails, and what was known last is told as such")
def _(agent: Agent) -> None:
    assert json.loads(agent.text)["error"] == "DAEMON_UNREACHABLE"
    cached = agent.told["details"]["cached_data"]
    assert (cached["still_valid"], cached["data"]["status"]) == (False, "ok")


@then("it gets the parts there are, and is told which one is missing")
def _(agent: Agent) -> None:
    told = agent.told
    assert told["result"].pop("lmcache") == {"source": "failed"}
    assert all("source" not in part for part in told["result"].values())
    assert set(told["result"]) == {"windows", "thaws"}
    assert told["degraded"] is True
    assert told["warnings"] == ["lmcache failed (KV_SERVER_UNREACHABLE): skipping it"]


# ── the program ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def program(story: Story) -> Iterator["subprocess.Popen[bytes]"]:
    """`hive mcp` on pipes of the test's own, which has answered once."""
    process = subprocess.Popen(
        [*HIVE, "--url", story.hive.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(INITIALIZE).encode() + b"\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
        assert told["result"]["serverInfo"]["name"] == "hive"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()


@when("the agent closes its input")
def _(program: "subprocess.Popen[bytes]") -> None:
    assert program.stdin is not None
    program.stdin.close()


@when(parsers.parse("hive mcp gets {name}"))
def _(program: "subprocess.Popen[bytes]", name: str) -> None:
    program.send_signal(signal.Signals[name])


@then(parsers.parse("hive mcp ends with {code:d}"))
def _(program: "subprocess.Popen[bytes]", code: int) -> None:
    assert program.wait(10) == code
