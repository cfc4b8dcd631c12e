"""A tool's calls: parts that fail alone, and changes whose answer was lost."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hive.client.control import ControlPlane
from hive.errors import (
    DaemonUnreachable,
    HiveError,
    KvServerUnreachable,
    ServiceUnavailable,
    StorageCorrupted,
    Unauthorized,
    WindowNotFound,
)
from hive.gateway import problems
from hive.mcp import caller as of_caller
from hive.mcp.caller import Caller
from tests.client.served import Served
from tests.patience import awaited


async def unheard(phase: str, done: int, total: int) -> None:
    """Progress that nobody wants to hear of."""


@pytest.fixture
def caller() -> Caller:
    return Caller(ControlPlane(), "http://127.0.0.1:1", "key", unheard)


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_caller, "POLL_S", 0.001)


def told(error: HiveError) -> HiveError:
    error.details = {"http_status": error.status}
    return error


def lost() -> DaemonUnreachable:
    error = DaemonUnreachable()
    error.__cause__ = aiohttp.ServerDisconnectedError()
    return error


def gives(*answers: Any) -> Callable[[], Awaitable[Any]]:
    left = list(answers)

    async def look() -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return look


def part(answer: Any) -> Callable[[float], Awaitable[Any]]:
    look = gives(answer)
    return lambda _limit_s: look()


@pytest.mark.parametrize("end", ["result", "error"])
@awaited
async def test_all_progress_is_told_before_the_end_is(end: str) -> None:
    """However slowly it is told, and though the last step and the end come in one piece."""
    steps = [("link", done, 7) for done in range(8)]

    async def answers(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        told = [("progress", {"phase": p, "done": d, "total": t}) for p, d, t in steps]
        last = {"name": "w"} if end == "result" else problems.body(WindowNotFound("No w."))
        data = [f"event: {kind}\ndata: {json.dumps(one)}\n\n" for kind, one in (*told, (end, last))]
        await response.write("".join(data).encode())
        return response

    heard = []

    async def slowly(*step: Any) -> None:
        await asyncio.sleep(0)
        heard.append(step)

    async with Served(answers) as daemon:
        caller = Caller(ControlPlane(), daemon["url"], "key", slowly)
        watching = caller.watch("window_freeze", "POST", "/windows")
        if end == "result":
            assert (await watching).data == {"name": "w"}
        else:
            with pytest.raises(WindowNotFound):
                await watching
    assert heard == steps


@awaited
async def test_a_part_that_fails_is_told_and_the_rest_is_given(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R067, R172, R213, R219, R262, C20: it is skipped, and the answer says that it is less."""
    monkeypatch.setattr(of_caller, "PART_S", 0.05)

    async def hangs(_limit_s: float) -> Any:
        await asyncio.Event().wait()

    error = told(KvServerUnreachable())
    found = await caller.parts(
        "cache_stats", {"one": part(1), "two": part(error), "three": hangs, "four": part(4)}
    )
    failed = {"source": "failed"}
    assert found.data == {"one": 1, "two": failed, "three": failed, "four": 4}
    assert found.warnings == (
        "two failed (KV_SERVER_UNREACHABLE): skipping it",
        "three failed (timeout): skipping it",
    )
    assert found.is_degraded


@awaited
async def test_where_no_part_can_be_had_the_first_error_is_told(caller: Caller) -> None:
    first = told(StorageCorrupted())
    with pytest.raises(StorageCorrupted) as caught:
        await caller.parts("cache_stats", {"one": part(first), "two": part(told(WindowNotFound()))})
    assert caught.value is first


@awaited
@pytest.mark.usefixtures("_soon")
async def test_a_change_that_happened_is_found(caller: Caller) -> None:
    """R198: it may still go on, and the daemon may be starting just now."""
    look = gives(lost(), told(ServiceUnavailable(retry_after_s=1.0)), None, {"name": "w"})
    found = await caller.settled(lost(), "w", look)
    assert (found.data, found.is_degraded) == ({"name": "w"}, True)
    assert "found afterwards" in found.warnings[0]


@awaited
@pytest.mark.usefixtures("_soon")
async def test_a_change_that_did_not_happen_is_told_as_it_failed(caller: Caller) -> None:
    """R199"""
    error = lost()
    with pytest.raises(DaemonUnreachable) as caught:
        await caller.settled(error, "w", gives(None, told(WindowNotFound())))
    assert caught.value is error


@awaited
@pytest.mark.usefixtures("_soon")
async def test_a_change_of_which_nothing_is_known_is_not_lost(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R200: whoever asked knows what to ask for later."""
    polls: list[None] = []

    async def look() -> Any:
        polls.append(None)
        raise lost()

    found = await caller.settled(lost(), "w", look)
    assert found.data == {"status": "timeout", "task_id": "w"}
    assert found.is_degraded
    assert len(polls) == 60


@awaited
@pytest.mark.usefixtures("_soon")
async def test_who_may_not_look_any_more_is_told_that_nothing_is_known(caller: Caller) -> None:
    found = await caller.settled(lost(), "w", gives(told(Unauthorized()), AssertionError("again")))
    assert found.data == {"status": "timeout", "task_id": "w"}


@pytest.mark.parametrize("how", ["told", "not sent"])
@awaited
async def test_what_is_known_to_have_failed_is_not_looked_for(caller: Caller, how: str) -> None:
    async def look() -> Any:
        raise AssertionError("nobody asked")

    error: HiveError = told(StorageCorrupted())
    if how == "not sent":
        error = DaemonUnreachable()
        error.__cause__ = aiohttp.ClientConnectorError(
            connection_key=None,  # type: ignore[arg-type]
            os_error=ConnectionRefusedError(),
        )
    with pytest.raises(HiveError) as caught:
        await caller.settled(error, "w", look)
    assert caught.value is error


def test_what_is_remembered_is_kept_apart_by_key_and_not_by_its_text(caller: Caller) -> None:
    other = Caller(caller.plane, caller.url, "other", unheard)
    assert caller.key("GET", "/x") != other.key("GET", "/x")
    assert "key" not in caller.key("GET", "/x")
    assert "api_key" not in repr(caller)
