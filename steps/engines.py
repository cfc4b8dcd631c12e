"""Steps about the engine behind a model: how it behaves, and what happens to it."""

import os
import re
import signal
from pathlib import Path
from typing import Any

from pytest_bdd import given, parsers, then, when

from hive.workers import guard
from steps.driver import journal
from steps.requests import KINDS
from steps.story import MODEL, WORKER, Story
from steps.waiting import must

LAST_WORDS = "RuntimeError: the weights are damaged"
SECRET = "hive_abcdefghijklmnopqrstuvwx"  # has the form of one of hive's keys
# What "an engine that …" means to the engine double. The first request is hive's own probe.
BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "behaves": (),
    "takes a second to load": ("--load-s", "1"),
    "takes half a second to load": ("--load-s", "0.5"),
    "never finishes loading": ("--load-s", "60"),
    "fails to load": ("--load-fail", LAST_WORDS),
    "prints a key and fails to load": ("--load-fail", f"no access with {SECRET} in /etc/hf"),
    "is healthy but generates nothing": ("--answer-status", "500"),
    "is healthy only after half a second": ("--warm-s", "0.5"),
    "never answers its health check": ("--health-s", "inf"),
    "takes 20 ms for each token": ("--token-s", "0.02"),
    "generates for a minute": ("--token-s", "0.05", "--tokens", "1200"),
    "stops after 3 tokens, but for probes": ("--stop-after", "3", "--good-requests", "1"),
    "takes 0.4 seconds to end what was cancelled": (
        *("--token-s", "0.05", "--tokens", "1200", "--abort-s", "0.4"),
    ),
    "never ends what was cancelled, and stands still": (
        *("--stop-after", "5", "--good-requests", "1", "--abort-s", "inf"),
    ),
    "never ends what was cancelled, but generates": (
        *("--token-s", "0.05", "--tokens", "1200", "--abort-s", "inf"),
    ),
    "has a prefill of 3 seconds, in steps of 2 seconds": ("--first-token-s", "3", "--abort-s", "2"),
    "hangs up on its next 1 request": ("--good-requests", "1", "--hang-up", "1"),
    "hangs up on its next 9 requests": ("--good-requests", "1", "--hang-up", "9"),
    "never comes to the first token": ("--stop-after", "0", "--good-requests", "1"),
    "generates 5000 tokens as fast as it can": ("--tokens", "5000"),
    "runs as three processes": ("--core",),
    "ignores being asked to end": ("--ignore-term",),
    "has a process that hid in a session of its own": ("--setsid-grandchild",),
    "has a process that hid in a session of its own, without its environment": (
        "--setsid-grandchild",
        "--wipe-environment",
    ),
    "uses shared memory": ("--shm", "3"),
    "leaves temporary files": ("--tmp", "4"),
    "exits with success a moment after it was ready": ("--exit-after-s", "0.3"),
    "breaks its status line": ("--good-requests", "1", "--malformed", "status-line"),
    "breaks the size of a chunk": ("--good-requests", "1", "--malformed", "chunk-size"),
    "promises more than it sends": ("--good-requests", "1", "--malformed", "content-length"),
    "answers before it has read the request": ("--good-requests", "1", "--early-answer", "drain"),
    "logs what it is asked": ("--log-prompts",),
    "logs all the time": ("--noise", "40"),
    "says hello on its way up": ("--stderr", "hello from the engine"),
}  # fmt: skip
DEATHS = {
    "exits with success though nobody asked": "exit0",
    "crashes with a segmentation fault": "segv",
    "dies of a CUDA error": "cuda",
    "dies in the middle of an event": "midchunk",
    "closes the connection and lives on": "hangup",
    "closes the connection in the middle of an event and lives on": "hangup-midchunk",
}
MEMBERS = {"core": "VLLM::Engine", "hidden process": "VLLM::escaped", "worker": "VLLM::Worker"}


@given(parsers.parse("an engine that {behaviour}"))
@given(parsers.parse("it {behaviour}"))
def _(story: Story, behaviour: str) -> None:
    model = story.hive.models.get(MODEL)
    knobs = (*(model.knobs if model else ()), *BEHAVIOURS[behaviour])
    story.hive.model(MODEL, *knobs, **(model.extra if model else {}))


@given(parsers.parse('a second model, "{name}", with an engine that {behaviour}'))
def _(story: Story, name: str, behaviour: str) -> None:
    if MODEL not in story.hive.models:
        story.hive.model(MODEL)
    story.hive.model(name, *BEHAVIOURS[behaviour])


@given(parsers.parse("the engine refuses every request with {status:d}"))
def _(story: Story, status: int) -> None:
    story.hive.model(MODEL, "--good-requests", "1", "--answer-status", str(status))


@given(parsers.parse("the engine refuses every request with {status:d} for {seconds:d} seconds"))
def _(story: Story, status: int, seconds: int) -> None:
    story.hive.model(MODEL, "--good-requests", "1", "--answer-status", f"{status}:{seconds}")


@given("the engine is well again")
@when("the engine is well again")
def _(story: Story) -> None:
    story.double.set(answer_status="")


@given("the other replica is well again")
def _(story: Story) -> None:
    (idle,) = (worker["id"] for worker in story.hive.workers if not worker["in_flight"])
    story.hive.double_of(idle).set(stop_after=None)


@when(parsers.parse("the engine refuses everything with {status:d} again"))
def _(story: Story, status: int) -> None:
    story.double.set(answer_status=str(status))


@given("a model whose program is not there")
def _(story: Story) -> None:
    story.hive.model(MODEL, command=["/nonexistent/engine", "--uds", "{socket}"])


@given("hive has noted what the engine uses")
def _(story: Story) -> None:
    names = story.double.state["tree"]["shm"]
    must(lambda: all(name in story.hive.records for name in names), 5, "the guard's record")


@when("the engine begins to generate")
def _(story: Story) -> None:
    must(story.hive.control(MODEL).exists, 5, "the engine listens")
    story.double.set(answer_status="")


@when(parsers.re(r"the engine (?P<death>exits|crashes|dies|closes)(?P<how>.*)"))
def _(story: Story, death: str, how: str) -> None:
    story.look_at_tree()
    story.double.die(DEATHS[death + how])


@when("the worker's first process is killed")
def _(story: Story) -> None:
    story.look_at_tree()
    os.kill(story.hive.worker(WORKER)["pid"], signal.SIGKILL)


@when("the worker's guard is killed")
def _(story: Story) -> None:
    story.look_at_tree()
    os.kill(story.hive.worker(WORKER)["guard_pid"], signal.SIGKILL)


@when(parsers.re(r"the worker's (?P<member>core|worker|hidden process) is killed"))
def _(story: Story, member: str) -> None:
    story.look_at_tree()
    os.kill(story.member(MEMBERS[member]).pid, signal.SIGKILL)


@then("the engine is idle")
def _(story: Story) -> None:
    story.double.wait_running(0, 2)


@then(parsers.parse("the engine still generates for {count:d}"))
def _(story: Story, count: int) -> None:
    story.double.wait_running(count, 2)


@then(parsers.parse("the engine saw {count:d} request"))
@then(parsers.parse("the engine saw {count:d} requests"))
def _(story: Story, count: int) -> None:
    found = [r for r in story.double.requests if "x-request-id" in r["headers"]]
    assert len(found) == count, found


@then("the engine saw that the client had left")
def _(story: Story) -> None:
    must(lambda: story.double.requests[-1]["outcome"] == "aborted", 2, "the engine sees an abort")


@then(parsers.parse('the engine was told the request id "{request_id}"'))
def _(story: Story, request_id: str) -> None:
    assert story.double.requests[-1]["headers"]["x-request-id"] == request_id


@then("the engine was told the same request id")
def _(story: Story) -> None:
    told = story.double.requests[-1]["headers"]["x-request-id"]
    assert told == story.answer.headers["x-request-id"]


@then(parsers.parse('the engine was not told "{header}"'))
def _(story: Story, header: str) -> None:
    assert header.lower() not in story.double.requests[-1]["headers"]


@then(parsers.re(r"the answer to the (?P<kind>\w+) is what the engine itself answers"))
def _(story: Story, kind: str) -> None:
    path, body = KINDS[kind]
    assert story.answer.status == 200
    assert _without_ids(story.answer.json) == _without_ids(story.double.ask("POST", path, body))


@then("every process of the engine is gone")
def _(story: Story) -> None:
    assert story.processes, "no process was looked at"
    story.must_be_gone(7)


@then("its shared memory is gone")
def _(story: Story) -> None:
    assert story.shared_memory, "the engine used none"
    left = [name for name in story.shared_memory if Path(guard.SHM, name).exists()]
    assert not left, left


@then("its sockets and temporary files are gone")
def _(story: Story) -> None:
    must(lambda: not story.hive.leftovers(), 2, lambda: f"no leftovers: {story.hive.leftovers()}")


@then(parsers.parse("the engine was started {count:d} time"))
@then(parsers.parse("the engine was started {count:d} times"))
def _(story: Story, count: int) -> None:
    starts = [line for line in journal(story.hive.journal(MODEL)) if line["what"] == "start"]
    assert len(starts) == count, starts


@then("no engine was ever started")
def _(story: Story) -> None:
    assert journal(story.hive.journal(MODEL)) == []


def _without_ids(answer: Any) -> Any:
    """An answer less what differs from one to the next: ids and the time."""
    if isinstance(answer, dict):
        fixed = {k: v for k, v in answer.items() if k not in ("id", "created", "created_at")}
        return {k: _without_ids(v) for k, v in fixed.items()}
    if isinstance(answer, list):
        return [_without_ids(part) for part in answer]
    return (
        re.sub(r"^(resp|msg|chatcmpl|embd)[-_]\w+$", "ID", answer)
        if isinstance(answer, str)
        else answer
    )
