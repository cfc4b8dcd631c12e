"""The tools' table: what they take, what they say of themselves, and how metrics are read."""

import time
from typing import Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from hive.client.control import ControlPlane, Result
from hive.errors import Forbidden, HiveError, WindowNotFound
from hive.gateway import problems
from hive.mcp.caller import Caller
from hive.mcp.tools import (
    TOOLS,
    Arguments,
    Chat,
    Message,
    Status,
    Tool,
    _outcome,
    _samples,
    chat,
    window_verify,
)
from hive.policy.control import OPERATIONS
from tests.client.served import Served
from tests.patience import awaited

WANTED = {
    *("window_freeze", "window_thaw", "window_list", "window_status", "window_clone"),
    *("window_delete", "session_list", "cache_stats", "health_check", "get_metrics_data"),
    *("worker_list", "chat", "window_verify"),
}


def test_these_are_the_tools_and_each_has_its_row() -> None:
    """R176, R178: what a tool may do about a failure is in the table, and fits what it does."""
    assert set(TOOLS) == WANTED == set(OPERATIONS)
    for name, tool in TOOLS.items():
        assert OPERATIONS[name].changes is tool.changes, name


class Answering(Caller):
    """Whose requests are answered from a table."""

    def request(self, method: str, path: str, **_more: Any) -> Any:  # noqa: ARG002
        async def ask(_limit_s: float) -> Any:
            answer = ANSWERS[path.partition("?")[0]]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask


ANSWERS: dict[str, Any] = {}


async def unheard(_phase: str, _done: int, _total: int) -> None:
    """Nobody listens."""


@pytest.mark.parametrize(
    ("found", "is_it"),
    [
        ({"session_id": "new", "created_at": 1.0}, True),
        ({"session_id": "old", "created_at": 1.0}, False),
        ({"session_id": "new", "created_at": -3600.0}, False),
        ({}, False),
        (None, False),
    ],
)
@awaited
async def test_an_older_window_of_that_name_is_not_the_one_that_was_asked_for(
    found: Any, is_it: bool
) -> None:
    """Its time is seconds from now."""
    caller = Answering(ControlPlane(), None, None, unheard)
    if found:
        found = {**found, "created_at": time.time() + found["created_at"]}
    ANSWERS["/hive/v1/windows/w"] = found
    look = _outcome(caller, "w", None, lambda one: one.get("session_id") == "new")
    if is_it:
        assert await look() == found
    else:
        with pytest.raises(WindowNotFound):
            await look()


@awaited
async def test_what_is_no_list_of_windows_is_not_taken_for_one() -> None:
    caller = Answering(ControlPlane(), None, None, unheard)
    ANSWERS["/hive/v1/windows/w"] = WindowNotFound()
    look = _outcome(caller, "w", None, bool)
    unlike: tuple[Any, ...] = ({}, [], {"windows": 1}, {"windows": [1]})
    for answer in unlike:
        ANSWERS["/hive/v1/windows"] = answer
        with pytest.raises(HiveError, match="not hive's"):
            await look()
    ANSWERS["/hive/v1/windows"] = {"windows": [{"name": "w"}]}
    assert await look() is None


@pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))
def test_a_tool_says_what_it_does_and_what_each_argument_is(tool: Tool) -> None:
    assert tool.help.endswith((".", ")."))
    schema = tool.takes.model_json_schema()
    assert schema["additionalProperties"] is False
    for name, about in schema.get("properties", {}).items():
        assert about.get("description"), (tool.name, name)


class Watching(Caller):
    """Whose calls are all answered the same."""

    answer: Any = None

    async def watch(self, tool: str, method: str, path: str, **more: Any) -> Result:
        assert (tool, method, more) == ("window_verify", "POST", {"json": {}})
        assert path == "/hive/v1/windows/w/verify"
        return Result(self.answer, warnings=("late",))


REPORT = {"name": "w", "whole": True, "blocks": 9, "missing": [], "corrupt": []}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, {"status": "passed", **REPORT}),
        (
            {"whole": False, "missing": ["000001-0"], "corrupt": ["000004-0"]},
            {
                "status": "validation_failed",
                "issues": ["block 000001-0 is missing", "block 000004-0 is damaged"],
                "recommended_fixes": ["hive window repair w --attempt-recovery"],
            },
        ),
    ],
)
@awaited
async def test_a_check_that_finds_damage_is_an_answer_and_no_error(found: Any, wanted: Any) -> None:
    """R196"""
    caller = Watching(ControlPlane(), None, None, unheard)
    object.__setattr__(caller, "answer", {**REPORT, **found})
    result = await window_verify(caller, Status(window_name="w"))
    assert (result.data, result.warnings) == (wanted, ("late",))
    object.__setattr__(caller, "answer", {"something": "else"})
    with pytest.raises(HiveError, match="not hive's"):
        await window_verify(caller, Status(window_name="w"))


@pytest.mark.parametrize("is_new", [True, False])
@awaited
async def test_a_session_in_which_nothing_was_said_is_not_left_behind(is_new: bool) -> None:
    """A key may be good for sessions, and for no model."""
    heard = []

    async def refuses(request: web.Request) -> web.Response:
        heard.append((request.method, request.path))
        if request.path.endswith("/completions"):
            return web.json_response(problems.body(Forbidden()), status=403)
        return web.json_response({"id": "s1"})

    asked: dict[str, Any] = {"new_session": True} if is_new else {"session_id": "theirs"}
    hello = Message(role="user", content="hi")
    async with Served(refuses) as daemon:
        caller = Caller(ControlPlane(), daemon["url"], "key", unheard)
        with pytest.raises(Forbidden):
            await chat(caller, Chat(model="m", messages=[hello], **asked))

    talk = ("POST", "/v1/chat/completions")
    begun = [("POST", "/hive/v1/sessions"), talk, ("DELETE", "/hive/v1/sessions/s1")]
    assert heard == (begun if is_new else [talk])


def test_only_what_destroys_says_so() -> None:
    assert [tool.name for tool in TOOLS.values() if tool.destroys] == ["window_delete"]


def test_every_argument_is_refused_but_the_known() -> None:
    with pytest.raises(ValueError, match="extra"):
        Arguments.model_validate({"x": 1})


def test_metrics_become_numbers_without_buckets() -> None:
    text = """# TYPE hive_queue_seconds histogram
hive_queue_seconds_bucket{model="m",le="0.1"} 1.0
hive_queue_seconds_bucket{model="m",le="+Inf"} 2.0
hive_queue_seconds_count{model="m"} 2.0
hive_queue_seconds_sum{model="m"} 0.5
# TYPE hive_waiting gauge
hive_waiting{model="m"} 3.0
# TYPE process_open_fds gauge
process_open_fds 9.0
"""
    found = _samples(text_string_to_metric_families(text), ("hive_",))
    assert found == {
        "hive_queue_seconds_count": [{"labels": {"model": "m"}, "value": 2.0}],
        "hive_queue_seconds_sum": [{"labels": {"model": "m"}, "value": 0.5}],
        "hive_waiting": [{"labels": {"model": "m"}, "value": 3.0}],
    }
