"""Steps about what hive tells of itself: metrics, logs and events."""

import json
from collections import Counter

from pytest_bdd import given, parsers, then, when

from steps.driver import chat_body, journal
from steps.story import CHAT, MODEL, WORKER, Story
from steps.waiting import must

# Moves of a worker in the order that a start, a crash and a restart make.
LIFE = ["STARTING", "LOADING", "READY", "STOPPING", "STARTING", "LOADING", "READY"]


# ── metrics ─────────────────────────────────────────────────────────────────────────────────────


@then("the metrics count what the engine saw")
def _(story: Story) -> None:
    story.double.wait_running(0, 5)
    seen = [line for line in journal(story.hive.journal(MODEL)) if line["what"] == "request"]
    ours = [line for line in seen if "x-request-id" in line["headers"]]
    by_status = Counter(
        "499" if line["outcome"] == "aborted" else str(line["status"]) for line in ours
    )
    for status, count in by_status.items():
        must(
            lambda s=status, c=count: (  # type: ignore[misc]
                story.hive.metric("hive_requests_total", model=MODEL, status=s) == c
            ),
            2,
            lambda s=status, c=count: f"{c} requests with {s}",  # type: ignore[misc]
        )


@then(parsers.parse("the metrics count {count:d} requests with {status:d}"))
def _(story: Story, count: int, status: int) -> None:
    found = story.hive.metric("hive_requests_total", model=MODEL, status=str(status))
    assert found == count


@then(parsers.parse("the metrics count {count:d} failure with {code}"))
def _(story: Story, count: int, code: str) -> None:
    assert story.hive.metric("hive_request_failures_total", model=MODEL, code=code) == count


@then(parsers.parse("the metrics count {count:d} requests in flight"))
def _(story: Story, count: int) -> None:
    must(lambda: story.hive.metric("hive_in_flight", model=MODEL) == count, 3, f"{count} in flight")


@then(parsers.parse("the metrics count {count:d} starts of the worker"))
def _(story: Story, count: int) -> None:
    assert story.hive.metric("hive_worker_starts_total", worker=WORKER) == count


@then(parsers.parse("the metrics count {count:d} exit by {cause}"))
def _(story: Story, count: int, cause: str) -> None:
    assert story.hive.metric("hive_worker_exits_total", worker=WORKER, cause=cause) == count


@then(parsers.parse("the metrics say that the worker is {state}"))
def _(story: Story, state: str) -> None:
    assert story.hive.metric("hive_worker_state", worker=WORKER, state=state) == 1
    assert (
        sum(
            story.hive.metric("hive_worker_state", worker=WORKER, state=other)
            for other in {*LIFE, "STOPPED", "DRAINING", "FAILED", "LOST"}
        )
        == 1
    )


@then(parsers.parse('the metrics show the family "{name}"'))
def _(story: Story, name: str) -> None:
    assert f"# TYPE {name}" in story.hive.ask("GET", "/metrics").body.decode()


# ── logs ────────────────────────────────────────────────────────────────────────────────────────


@then("every line of the log is a whole record")
def _(story: Story) -> None:
    for line in story.hive.log_text.splitlines():
        assert json.loads(line).keys() >= {"event", "level", "timestamp"}, line


@then(parsers.parse('the log has one access line for "{request_id}", with {status:d}'))
def _(story: Story, request_id: str, status: int) -> None:
    must(lambda: story.hive.logged("request", request_id=request_id), 3, "an access line")
    lines = story.hive.logged("request", request_id=request_id)
    assert [line["status"] for line in lines] == [status]
    assert lines[0]["path"] == CHAT
    assert lines[0]["seconds"] >= 0


@then(parsers.parse("that line is a {level} with the code {code}"))
def _(story: Story, level: str, code: str) -> None:
    must(lambda: any(line.get("code") for line in story.hive.logged("request")), 3, "the line")
    line = [line for line in story.hive.logged("request") if line.get("code")][-1]
    assert (line["level"], line["code"]) == (level, code)


@then("the log shows nothing of what was asked")
def _(story: Story) -> None:
    assert story.sent
    must(lambda: story.hive.logged("request", path=CHAT), 3, "the request's line")
    assert story.sent.decode() not in story.hive.log_text


@then(parsers.parse('the log has a line "{event}" with the {key} "{value}"'))
def _(story: Story, event: str, key: str, value: str) -> None:
    must(
        lambda: any(str(line.get(key)) == value for line in story.hive.logged(event)),
        5,
        lambda: f"{event} with {key} {value}; have {story.hive.logged(event)}",
    )


@then("probes and scrapes leave no access lines")
def _(story: Story) -> None:
    quiet = ("/livez", "/readyz", "/metrics")
    story.ask("POST", CHAT, chat_body(MODEL))
    must(lambda: story.hive.logged("request", path=CHAT), 3, "a line that came after theirs")
    assert not [line for line in story.hive.logged("request") if line["path"] in quiet]


# ── events ──────────────────────────────────────────────────────────────────────────────────────


@given("the operator watches the events")
def _(story: Story) -> None:
    story.watcher = story.hive.stream("/hive/v1/events", method="GET")
    must(lambda: story.watcher and story.watcher.pieces, 5, "the stream's beginning")


@given("the operator watched, and was cut off")
def _(story: Story) -> None:
    watcher = story.hive.stream("/hive/v1/events", method="GET")
    must(lambda: watcher.pieces, 5, "the stream's beginning")
    story.double.die("segv")
    must(lambda: len(watcher.ids) >= 3, 10, "some events")
    watcher.leave()
    story.kept["last_id"] = watcher.ids[0]
    story.kept["missed"] = watcher.ids[1:3]


@when("the operator comes back with the id of the last event seen")
def _(story: Story) -> None:
    headers = {"Last-Event-ID": story.kept["last_id"]}
    story.watcher = story.hive.stream("/hive/v1/events", headers=headers, method="GET")


@when("the operator comes back with an id from an earlier life of hive")
def _(story: Story) -> None:
    headers = {"Last-Event-ID": "0123abcd-99999"}
    story.watcher = story.hive.stream("/hive/v1/events", headers=headers, method="GET")


@then("the events tell the worker's crash and its way back, in order")
def _(story: Story) -> None:
    assert story.watcher
    wanted = LIFE[3:]
    must(lambda: _moves(story) == wanted, 10, lambda: f"{wanted}; have {_moves(story)}")


@then("the events follow without a gap")
def _(story: Story) -> None:
    watcher = story.watcher
    assert watcher
    must(lambda: len(watcher.ids) >= 2, 5, "events")
    missed = story.kept.get("missed")
    assert missed is None or watcher.ids[: len(missed)] == missed
    numbers = [int(one.rpartition("-")[2]) for one in watcher.ids]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@then("everything that is still known is told from the beginning")
def _(story: Story) -> None:
    must(lambda: _moves(story)[:3] == LIFE[:3], 5, lambda: f"{LIFE[:3]}; have {_moves(story)}")


@then("the stream of events ends")
def _(story: Story) -> None:
    assert story.watcher
    story.watcher.wait_for_end(5)
    assert story.watcher.is_whole


def _moves(story: Story) -> list[str]:
    assert story.watcher
    events = [json.loads(event) for event in story.watcher.events if event]
    return [event["new"] for event in events if event["event"] == "worker_moved"]
