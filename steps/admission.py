"""Steps about who gets a slot, who waits, who is refused, and what a request's limits do."""

import hashlib
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from pytest_bdd import given, parsers, then, when

from steps.driver import Stream, chat_body
from steps.operator import key_of
from steps.story import CHAT, MODEL, Story
from steps.waiting import must

OPERATOR = "operator"
SLOW_TOKENS = 20
# What "a chat with …" means: headers of the request, made when it is sent.
WISHES = {
    "timeout of half a second": lambda: {"X-Hive-Timeout": "0.5"},
    "timeout of an hour": lambda: {"X-Hive-Timeout": "3600"},
    "deadline of half a second": lambda: {"X-Request-Deadline": _in_seconds(0.5)},
    "deadline in the past": lambda: {"X-Request-Deadline": _in_seconds(-60)},
}


def _in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


# ── the waiting room ────────────────────────────────────────────────────────────────────────────


@given(parsers.parse("{count:d} chats are waiting for a slot"))
def _(story: Story, count: int) -> None:
    for _number in range(count):
        _wait_for_slot(story)


@given(parsers.parse("a chat with priority {priority} is waiting for a slot"))
def _(story: Story, priority: str) -> None:
    _wait_for_slot(story, X_Hive_Priority=priority)


@given(parsers.parse('a chat with the request id "{request_id}" is waiting for a slot'))
def _(story: Story, request_id: str) -> None:
    _wait_for_slot(story, X_Request_Id=request_id)


def _wait_for_slot(story: Story, **headers: str) -> None:
    """One after the other, so that the order of arrival is known."""
    waiting = story.hive.metric("hive_waiting", model=MODEL)
    story.begin(**headers)
    must(
        lambda: story.hive.metric("hive_waiting", model=MODEL) == waiting + 1,
        5,
        lambda: f"{waiting + 1} waiting",
    )


@when("the first client leaves")
def _(story: Story) -> None:
    story.clients[0].leave()


@when("every client leaves")
def _(story: Story) -> None:
    for client in story.clients:
        client.leave()


@then("the third client gets tokens, and the fourth waits on")
def _(story: Story) -> None:
    _next_in(story, 2, 3)


@then("the fourth client gets tokens, and the third waits on")
def _(story: Story) -> None:
    _next_in(story, 3, 2)


def _next_in(story: Story, who: int, waits: int) -> None:
    story.clients[who].wait_for_events(3)
    assert not story.clients[waits].pieces
    assert story.hive.metric("hive_waiting", model=MODEL) == 1


@then(parsers.parse("the metrics count {waiting:d} waiting and {busy:d} in flight"))
def _(story: Story, waiting: int, busy: int) -> None:
    _must_count(story, "hive_waiting", waiting)
    _must_count(story, "hive_in_flight", busy)


@then("a place in the waiting room is free")
def _(story: Story) -> None:
    _wait_for_slot(story)


@then("the waiting client is told REQUEST_CANCELLED")
def _(story: Story) -> None:
    answer = story.client.answer
    assert (answer.status, answer.code) == (499, "REQUEST_CANCELLED")


@then(parsers.parse("both who waited are refused with {status:d} {code}, {reason}"))
def _(story: Story, status: int, code: str, reason: str) -> None:
    for client in story.clients[-2:]:
        answer = client.answer
        assert (answer.status, answer.code) == (status, code), answer.body
        assert answer.headers["x-hive-reason"] == reason
        assert answer.seconds < 5


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@then(parsers.parse("it is told that {busy:d} of {slots:d} slots are busy"))
def _(story: Story, busy: int, slots: int) -> None:
    details = story.answer.error["details"]
    room = details["resource_info"]
    assert (room["slots_busy"], room["slots_total"]) == (busy, slots)
    assert (details["current_requests"], details["max_concurrent"]) == (busy, slots)
    assert story.answer.error["message"] == "Worker at maximum capacity"


@then(parsers.parse("the answer came within {seconds:g} seconds"))
def _(story: Story, seconds: float) -> None:
    assert story.answer.seconds < seconds


@then(parsers.parse("the answer came after {least:g} seconds, but within {most:g}"))
def _(story: Story, least: float, most: float) -> None:
    assert least <= story.answer.seconds < most


@then(parsers.parse("the metrics count {count:d} refusal as {reason}"))
def _(story: Story, count: int, reason: str) -> None:
    _must_count(story, "hive_refusals_total", count, reason=reason)


def _must_count(story: Story, name: str, count: float, **labels: str) -> None:
    labels = {"model": MODEL, **labels}
    must(
        lambda: story.hive.metric(name, **labels) == count,
        5,
        lambda: f"{name} {labels} {count}; it is {story.hive.metric(name, **labels)}",
    )


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


@given(parsers.parse('an API key "{name}" with the scope "{scope}"'))
def _(story: Story, name: str, scope: str) -> None:
    _add_key(story, name, scope)


@given(parsers.parse('an API key "{name}" with the scope "{scope}", at most {count:d} at once'))
def _(story: Story, name: str, scope: str, count: int) -> None:
    _add_key(story, name, scope, max_concurrent=count)


@given(parsers.parse('an API key "{name}" with the scope "{scope}", at most {count:d} in a minute'))
def _(story: Story, name: str, scope: str, count: int) -> None:
    _add_key(story, name, scope, requests_per_minute=count)


def _add_key(story: Story, name: str, scope: str, **limits: Any) -> None:
    """An operator looks on with a key of its own."""
    if not story.hive.keys:
        story.hive.key = key_of(OPERATOR)
        story.hive.keys.append({"name": OPERATOR, "sha256": _sha(OPERATOR), "scopes": ["admin"]})
    story.hive.keys.append({"name": name, "sha256": _sha(name), "scopes": [scope], **limits})


def _sha(name: str) -> str:
    return hashlib.sha256(key_of(name).encode()).hexdigest()


def _bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


@given(parsers.parse('"{name}" streams a chat'))
@then(parsers.parse('"{name}" can stream a chat'))
def _(story: Story, name: str) -> None:
    story.begin(**_bearer(name)).wait_for_events(3)


@given(parsers.parse('"{name}" streams a chat with the request id "{request_id}"'))
def _(story: Story, name: str, request_id: str) -> None:
    story.begin(**_bearer(name), X_Request_Id=request_id).wait_for_events(3)


@when(parsers.parse('"{name}" asks for a chat'))
def _(story: Story, name: str) -> None:
    story.ask("POST", CHAT, chat_body(MODEL, max_tokens=1), **_bearer(name))


@given(parsers.parse('"{name}" asked for {count:d} chats'))
def _(story: Story, name: str, count: int) -> None:
    for _number in range(count):
        body = chat_body(MODEL, max_tokens=1)
        assert story.ask("POST", CHAT, body, **_bearer(name)).status == 200


@when(parsers.parse('"{name}" cancels "{request_id}"'))
def _(story: Story, name: str, request_id: str) -> None:
    story.ask("DELETE", f"/hive/v1/requests/{request_id}", **_bearer(name))


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


@when("a client asks for a streamed chat")
def _(story: Story) -> None:
    story.begin()


@when(parsers.parse("a client asks for {count:d} tokens as a stream"))
def _(story: Story, count: int) -> None:
    body = chat_body(MODEL, f"c{len(story.clients)}", stream=True, max_tokens=count)
    story.begin(CHAT, body)


@when(parsers.parse("a client asks for a chat with a {wish}"))
def _(story: Story, wish: str) -> None:
    story.ask("POST", CHAT, chat_body(MODEL), **WISHES[wish]())


@when(parsers.parse('a client asks for a chat with "{header}: {value}"'))
def _(story: Story, header: str, value: str) -> None:
    story.ask("POST", CHAT, chat_body(MODEL), **{header: value})


@then(parsers.parse("the client is told the timeout of phase {phase} after {seconds:g} seconds"))
def _(story: Story, phase: str, seconds: float) -> None:
    answer = story.answer
    if answer.status == 200:
        client: Stream = story.client
        assert client.is_whole
        assert "[DONE]" not in client.events
        error, took_s = client.last_error, answer.seconds
    else:
        assert answer.status == 504
        error, took_s = answer.error, answer.seconds
    assert error, answer.body
    assert error["code"] == "INFERENCE_TIMEOUT"
    details = error["details"]
    assert (details["phase"], details["timeout_seconds"]) == (phase, seconds)
    assert seconds <= details["elapsed_seconds"] < seconds + 1
    assert seconds <= took_s < seconds + 1.5


@then(parsers.parse("the metrics count {count:d} timeout in phase {phase}"))
def _(story: Story, count: int, phase: str) -> None:
    _must_count(story, "hive_timeouts_total", count, phase=phase)


# ── cancelling ──────────────────────────────────────────────────────────────────────────────────


@given(parsers.parse('a client has asked for a chat with the request id "{request_id}"'))
def _(story: Story, request_id: str) -> None:
    assert story.ask("POST", CHAT, chat_body(MODEL), X_Request_Id=request_id).status == 200


@then(parsers.parse("the next chat gets its slot after {seconds:g} seconds"))
def _(story: Story, seconds: float) -> None:
    began = time.monotonic()
    story.begin().wait_for_events(1)
    assert seconds * 0.7 <= time.monotonic() - began < seconds + 1.5


@then(parsers.parse("the metrics count {count:d} {confirmed} cancellation"))
@then(parsers.parse("the metrics count {count:d} {confirmed} cancellations"))
def _(story: Story, count: int, confirmed: str) -> None:
    told = {"confirmed": "yes"}.get(confirmed, confirmed)
    _must_count(story, "hive_cancellations_total", count, confirmed=told)
    _must_count(story, "hive_cancel_to_free_seconds_count", count)
