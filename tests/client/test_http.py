"""Requests to the daemon: its errors as they were there, and what is known of one that was lost."""

import json
from typing import Any

import pytest
from aiohttp import web

from hive.client.http import asked, events, is_told, place, told_error, was_not_sent, watched
from hive.errors import (
    DaemonUnreachable,
    HiveError,
    OperationTimeout,
    RateLimited,
    ServiceUnavailable,
    WindowNotFound,
    every_error,
)
from hive.gateway import problems
from tests.client.served import Served
from tests.patience import awaited


@pytest.mark.parametrize("cls", [c for c in every_error() if c.code != "HTTP_ERROR"])
def test_an_error_is_what_it_was_there(cls: type[HiveError]) -> None:
    """Class, message, advice, and whether to try again."""
    there = cls("what happened", action="what to do", param="x")
    body = json.dumps(problems.body(there, "r1")).encode()
    here = told_error(body, there.status)
    assert type(here) is cls
    assert (here.message, here.suggested_action, here.param) == ("what happened", "what to do", "x")
    assert (here.retryable, is_told(here)) == (there.retryable, True)


def test_when_to_try_again_is_kept() -> None:
    for there in (RateLimited(retry_after_s=2.4), ServiceUnavailable(retry_after_s=7.0)):
        here = told_error(json.dumps(problems.body(there)).encode(), 503)
        assert here.retry_after_s == there.retry_after_seconds
        assert here.retryable
    assert not told_error(json.dumps(problems.body(ServiceUnavailable())).encode(), 503).retryable


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": 1}', b'{"error": {}}'])
def test_something_that_is_not_hives_is_told_as_such(body: bytes) -> None:
    error = told_error(body, 502)
    assert "status 502 and something that is not hive's" in error.message
    assert not is_told(error)


@awaited
async def test_a_request_that_was_never_sent_is_known() -> None:
    with pytest.raises(DaemonUnreachable) as caught:
        await asked("GET", "/x", url="http://127.0.0.1:1", api_key=None, timeout_s=5.0)
    assert was_not_sent(caught.value)
    assert not is_told(caught.value)


@awaited
async def test_an_answer_that_was_lost_is_not_taken_for_one_never_sent() -> None:
    async def leaves(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with Served(leaves) as daemon:
        with pytest.raises(DaemonUnreachable) as caught:
            await asked("POST", "/x", **daemon)
    assert not was_not_sent(caught.value)
    assert not is_told(caught.value)


@awaited
async def test_what_comes_too_late_is_a_timeout() -> None:
    async def hangs(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await request.content.read()
        while not request.transport or not request.transport.is_closing():
            await response.write(b" ")
        return response

    async with Served(hangs) as daemon:
        with pytest.raises(OperationTimeout, match=r"within 0\.2 s"):
            await asked("GET", "/x", **{**daemon, "timeout_s": 0.2})


@awaited
async def test_progress_is_heard_before_the_result() -> None:
    async def answers(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer k"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        told = {"phase": "link", "done": 1, "total": 2}
        await response.write(b"event: progress\ndata: %s\n\n" % json.dumps(told).encode())
        await response.write(b'event: result\ndata: {"name": "w"}\n\n')
        return response

    heard: list[tuple[str, int, int]] = []
    async with Served(answers) as daemon:
        found = await watched("POST", "/x", lambda *told: heard.append(told), **daemon)
    assert (found, heard) == ({"name": "w"}, [("link", 1, 2)])


@awaited
async def test_an_error_in_a_stream_is_the_daemons_own() -> None:
    async def answers(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        body = json.dumps(problems.body(WindowNotFound("Window not found: w")))
        await response.write(f"event: error\ndata: {body}\n\n".encode())
        return response

    async with Served(answers) as daemon:
        with pytest.raises(WindowNotFound, match="Window not found: w"):
            await watched("POST", "/x", lambda *_: None, **daemon)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@awaited
async def test_events_are_whole_however_they_are_cut(size: int) -> None:
    raw = b"event: progress\ndata: {}\n\ndata: [DONE]\n\nevent: a\ndata: b: c\n\n"

    class Content:
        async def iter_any(self) -> Any:
            for at in range(0, len(raw), size):
                yield raw[at : at + size]

    found = [one async for one in events(Content())]
    assert found == [("progress", b"{}"), ("", b"[DONE]"), ("a", b"b: c")]


def test_whatever_is_in_a_name_stays_one_part_of_the_path() -> None:
    assert place("windows", "a/b ?#", owner="x y", tag=None) == (
        "/hive/v1/windows/a%2Fb%20%3F%23?owner=x+y"
    )


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@awaited
async def test_nobody_is_followed_elsewhere(status: int) -> None:
    """What was asked, and with what, is for this daemon alone."""

    async def leads_away(_request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "http://127.0.0.1:1/"})

    async with Served(leads_away) as daemon:
        with pytest.raises(HiveError, match=f"status {status} and something that is not hive's"):
            await asked("DELETE", "/x", **daemon)


@pytest.mark.parametrize(
    ("body", "kind"), [(b"<html>", "text/html"), (b"{", "application/json"), (b"", "text/plain")]
)
@awaited
async def test_an_answer_that_is_no_json_is_told_as_such(body: bytes, kind: str) -> None:
    async def answers(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind)

    async with Served(answers) as daemon:
        with pytest.raises(HiveError, match="something that is not hive's"):
            await asked("GET", "/x", **daemon)


@awaited
async def test_a_proxys_own_refusal_says_when_to_try_again() -> None:
    """R162: by the response's header."""

    async def busy(_request: web.Request) -> web.Response:
        return web.Response(status=503, text="<html>", headers={"Retry-After": "3"})

    async with Served(busy) as daemon:
        with pytest.raises(HiveError) as caught:
            await asked("GET", "/x", **daemon)
    assert (caught.value.retryable, caught.value.retry_after_s) == (True, 3.0)


@pytest.mark.parametrize("told", ["soon", "Infinity", "-1", "nan", None])
def test_what_is_no_number_of_seconds_is_nothing(told: str | None) -> None:
    assert told_error(b"<html>", 503, told).retry_after_s is None
