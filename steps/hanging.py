"""Steps about workers that hang, that fail again and again, and of which there are several."""

import os
import signal
from collections import Counter

from pytest_bdd import given, parsers, then, when

from steps.driver import chat_body
from steps.engines import BEHAVIOURS
from steps.story import CHAT, MODEL, WORKER, Story
from steps.waiting import holds, must

REPLICAS = {
    "": (),
    " that generate for a minute": BEHAVIOURS["generates for a minute"],
    " that never come to the first token": BEHAVIOURS["never comes to the first token"],
}


# ── hanging ─────────────────────────────────────────────────────────────────────────────────────


@when("the whole engine is stopped like by a debugger")
def _(story: Story) -> None:
    story.look_at_tree()
    for process in story.processes:
        if process.name != "hive-guard":
            os.kill(process.pid, signal.SIGSTOP)


@then("the worker hangs, is ended and becomes ready again")
def _(story: Story) -> None:
    if not story.processes:
        story.look_at_tree_if_any()
    must(lambda: story.hive.logged("engine exited", cause="hung"), 15, "the end of what hung")
    story.hive.wait_state("READY", WORKER)
    reasons = [line["reason"] for line in story.hive.logged("worker moved", new="STOPPING")]
    assert any(reason.startswith("hung: ") for reason in reasons), reasons


@then(parsers.parse("every stream ends with an error, {one} or {other}"))
def _(story: Story, one: str, other: str) -> None:
    for client in story.clients:
        client.wait_for_end()
        assert client.last_error, client.body
        assert client.last_error["code"] in (one, other)


@then(parsers.parse("the worker stays ready for {seconds:g} seconds"))
def _(story: Story, seconds: float) -> None:
    holds(lambda: story.hive.worker(WORKER)["state"] == "READY", seconds, "the worker is ready")


@then("the worker's processes are the same")
def _(story: Story) -> None:
    worker = story.hive.worker(WORKER)
    assert (worker["state"], worker["starts"]) == ("READY", 1)


# ── the breaker ─────────────────────────────────────────────────────────────────────────────────


@given("the breaker has opened")
def _(story: Story) -> None:
    for _number in range(5):
        story.ask("POST", CHAT, chat_body(MODEL))
    assert _breaker(story) == 2


@when("the cooldown is over")
def _(story: Story) -> None:
    must(lambda: story.hive.readiness().status == 200, 5, "hive is ready")
    must(lambda: _is_half_open(story), 5, "a probe is let through")


def _is_half_open(story: Story) -> bool:
    worker = story.hive.worker(WORKER)
    return bool(worker["breaker"]["retry_in_seconds"] == 0)


def _breaker(story: Story) -> float:
    return story.hive.metric("hive_breaker_state", worker=WORKER)


@then(parsers.parse("the metrics say that the breaker is {state}"))
def _(story: Story, state: str) -> None:
    number = {"closed": 0, "half open": 1, "open": 2}[state]
    must(lambda: _breaker(story) == number, 5, lambda: f"{state}; it is {_breaker(story)}")


@then(
    parsers.parse("the error tells {count:d} failures of {most:d}, and a cooldown of {s:d} second")
)
def _(story: Story, count: int, most: int, s: int) -> None:
    details = story.answer.error["details"]
    assert (details["failure_count"], details["failure_threshold"]) == (count, most)
    assert (details["cooldown_seconds"], details["state"]) == (s, "open")


@when(parsers.parse("{count:d} clients ask for a slow chat at once"))
def _(story: Story, count: int) -> None:
    story.double.set(token_s=0.05)
    for number in range(count):
        story.begin(CHAT, chat_body(MODEL, f"c{number}", max_tokens=20))


@then("one of them is answered, and the others are refused with CIRCUIT_BREAKER_OPEN")
def _(story: Story) -> None:
    found = Counter(client.answer.code for client in story.clients)
    assert found == {None: 1, "CIRCUIT_BREAKER_OPEN": len(story.clients) - 1}


# ── replicas ────────────────────────────────────────────────────────────────────────────────────


@given(parsers.re(r"a model with 2 replicas(?P<behaviour>.*)"))
def _(story: Story, behaviour: str) -> None:
    story.hive.model(MODEL, *REPLICAS[behaviour], replicas=["cpu", "cpu"])


@given(parsers.parse("{count:d} clients stream a chat"))
@when(parsers.parse("{count:d} clients stream a chat"))
def _(story: Story, count: int) -> None:
    for _number in range(count):
        story.begin().wait_for_events(3)


@given("a chat is being generated that is not streamed by one of them")
def _(story: Story) -> None:
    story.begin(CHAT, chat_body(MODEL))
    must(lambda: any(w["in_flight"] for w in story.hive.workers), 5, "one of them has it")


@then(parsers.parse("each replica answers {count:d} of them"))
def _(story: Story, count: int) -> None:
    assert [w["in_flight"] for w in story.hive.workers] == [count, count]


@then("one replica has answered all of them")
def _(story: Story) -> None:
    asked = int(story.hive.metric("hive_requests_total", model=MODEL, status="200"))
    must(lambda: len(story.hive.logged("request", path=CHAT)) == asked, 3, "a line for each")
    assert len({line["worker"] for line in story.hive.logged("request", path=CHAT)}) == 1


@when(parsers.parse('the engine of "{worker}" is killed'))
def _(story: Story, worker: str) -> None:
    _kill(story, worker)


@when("the engine that has it is killed")
def _(story: Story) -> None:
    (busy,) = (w["id"] for w in story.hive.workers if w["in_flight"])
    _kill(story, busy)


def _kill(story: Story, worker: str) -> None:
    told = story.hive.ask("GET", "/hive/v1/requests").json["requests"]
    story.kept["workers"] = {one["request_id"]: one["worker"] for one in told}
    os.kill(story.hive.worker(worker)["pid"], signal.SIGKILL)


def _clients_of(story: Story, worker: str) -> list[int]:
    workers = story.kept["workers"]
    ids = [client.headers["x-request-id"] for client in story.clients]
    return [number for number, one in enumerate(ids) if workers[one] == worker]


@then(parsers.parse('the streams of "{worker}" end with {code}'))
def _(story: Story, worker: str, code: str) -> None:
    numbers = _clients_of(story, worker)
    assert numbers
    for number in numbers:
        client = story.clients[number]
        client.wait_for_end()
        assert client.last_error
        assert client.last_error["code"] == code


@then(parsers.parse('the streams of "{worker}" go on'))
def _(story: Story, worker: str) -> None:
    numbers = _clients_of(story, worker)
    assert numbers
    for number in numbers:
        already = len(story.clients[number].events)
        story.clients[number].wait_for_events(already + 5)


# ── retries ─────────────────────────────────────────────────────────────────────────────────────


@then(parsers.parse("the metrics count {count:d} retry that ended in {outcome}"))
def _(story: Story, count: int, outcome: str) -> None:
    for name in ("retry", outcome):
        must(
            lambda n=name: story.hive.metric("hive_retries_total", outcome=n) == count,  # type: ignore[misc]
            5,
            f"{count} {name}",
        )


@then("the metrics count no retries")
def _(story: Story) -> None:
    assert story.hive.metric("hive_retries_total") == 0


@then("the error names attempt, schedule and strategy")
def _(story: Story) -> None:
    details = story.answer.error["details"]
    assert details["attempt"] >= 1
    assert details["max_attempts"] == 5
    assert details["schedule"] == [1, 2, 4, 8]
    assert details["backoff_strategy"] == "exponential_with_jitter"
    assert 1 <= details["next_retry_seconds"] <= 9


# ── draining ────────────────────────────────────────────────────────────────────────────────────


@given("a chat will be sent again in a moment")
def _(story: Story) -> None:
    story.begin()
    must(
        lambda: any(line["event"] == "request is sent again" for line in story.hive.log),
        5,
        "the pause before the second attempt",
    )


@then("the waiting client is told to come back, for hive drains")
def _(story: Story) -> None:
    answer = story.client.answer
    assert (answer.status, answer.code) == (503, "SERVICE_UNAVAILABLE"), answer.body
    assert answer.headers["x-hive-reason"] == "draining"
    assert int(answer.headers["retry-after"]) >= 1


@then("hive is not ready, and says that it drains")
def _(story: Story) -> None:
    answer = story.hive.readiness()
    assert (answer.status, answer.json["status"]) == (503, "draining")


@then(parsers.parse('a client can chat with "{model}"'))
def _(story: Story, model: str) -> None:
    assert story.ask("POST", CHAT, chat_body(model)).status == 200
