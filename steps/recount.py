"""Steps that recount: what clients got and what engines wrote down, beside what the metrics say.

Three books are kept of one load: each client's own, each engine's journal, and hive's metrics.
Nobody reads another's.
"""

import asyncio
import hashlib
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from pytest_bdd import given, then, when

from steps.driver import chat_body, journal
from steps.load import Line, Reply, all_of, event, must_rest, run
from steps.story import CHAT, MODEL, WORKER, Story
from steps.waiting import must

OTHER = "other"
OTHERS_WORKER = "other-0"
KEY = "hive-load-" + "x" * 32
CLIENTS, ASKED = 10, 10  # and so many times each
FLOOD = 40  # of what clients make up
# Of the families that are compared whole, which part of a client's book each of them is.
BOOKS = {
    "hive_requests_total": ("model", "status"),
    "hive_request_failures_total": ("model", "code"),
    "hive_refusals_total": ("model", "reason"),
    "hive_timeouts_total": ("model", "phase"),
}
Key = tuple[str, ...]


class Book:
    """What clients have seen, in the words of the metrics."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[Key]] = {name: Counter() for name in BOOKS}
        self.outcomes: Counter[str] = Counter()
        self.left = 0  # streams that their clients left
        self.cut_off: Counter[str] = Counter()  # whole heads whose engine then died, by model

    def got(self, model: str, reply: Reply) -> None:
        """An answer came to its end; `model` is empty where none was asked for that there is."""
        error = reply.error or {}
        details = error.get("details", {})
        if error.get("code") == "RATE_LIMITED":
            model = ""  # refused before its body was read
        self.counts["hive_requests_total"][model, str(reply.status)] += 1
        if not details:  # well, or an error of the engine's own
            kind = "permanent" if reply.status >= 400 else "success"
            self.outcomes["transient" if reply.status == 429 else kind] += 1
            return
        code, reason = error["code"], details.get("reason")
        self.counts["hive_request_failures_total"][model, code] += 1
        if reply.status == 503:
            assert reason == reply.headers["x-hive-reason"]
            self.counts["hive_refusals_total"][model, reason] += 1
        phase = "queue" if reason == "queue_timeout" else details.get("phase")
        if phase:
            self.counts["hive_timeouts_total"][model, phase] += 1
        kind = "transient" if details["retryable"] else "permanent"
        self.outcomes["timeout" if reply.status == 504 else kind] += 1
        if reply.is_stream:
            self.cut_off[model] += 1

    def left_it(self, model: str) -> None:
        self.counts["hive_requests_total"][model, "499"] += 1
        self.counts["hive_request_failures_total"][model, "REQUEST_CANCELLED"] += 1
        self.outcomes["cancelled"] += 1
        self.left += 1


class Client:
    """One client with a connection of its own; what it asks is drawn from its seed."""

    def __init__(self, port: int, book: Book, seed: str) -> None:
        self.line = Line(port, KEY)
        self.stranger = Line(port, "no-key-of-anybody")
        self.book = book
        self.chance = random.Random(seed)
        self.seed = seed

    async def asks(self) -> None:
        kinds = [
            *(self.chat, self.chat, self.stream, self.stream, self.leaves, self.is_late),
            *(self.is_wrong, self.is_wrong_for_the_engine, self.is_nobody, self.is_lost),
        ]
        try:
            for number in range(ASKED):
                model = self.chance.choice((MODEL, OTHER))
                # Everything in its turn, so that every book has something of everything.
                kind = kinds[number % len(kinds)]
                await kind(model, f"{self.seed}-{number}")
        finally:
            self.line.leave()
            self.stranger.leave()

    async def chat(self, model: str, tag: str) -> None:
        self.book.got(model, await self.line.ask(CHAT, chat_body(model, tag, max_tokens=5)))

    async def stream(self, model: str, tag: str) -> None:
        body = chat_body(model, tag, max_tokens=5, stream=True)
        self.book.got(model, await self.line.ask(CHAT, body))

    async def leaves(self, model: str, tag: str) -> None:
        body = chat_body(model, tag, max_tokens=5000, stream=True)
        reply = await self.line.begin(CHAT, body)
        if reply.status == 200:
            assert await self.line.until_events(reply, 2)
            self.line.leave()
            self.book.left_it(model)
            return
        while await self.line.more(reply):
            pass
        self.book.got(model, reply)

    async def is_late(self, model: str, tag: str) -> None:
        """Its own limit passes long before the answer would be there."""
        body, limit = chat_body(model, tag, max_tokens=5000), {"X-Hive-Timeout": "1"}
        self.book.got(model, await self.line.ask(CHAT, body, limit))

    async def is_wrong(self, _model: str, _tag: str) -> None:
        self.book.got("", await self.line.ask(CHAT, b'{"model": '))

    async def is_wrong_for_the_engine(self, model: str, tag: str) -> None:
        self.book.got(model, await self.line.ask(CHAT, chat_body(model, tag, max_tokens=0)))

    async def is_nobody(self, model: str, tag: str) -> None:
        self.book.got("", await self.stranger.ask(CHAT, chat_body(model, tag)))

    async def is_lost(self, _model: str, tag: str) -> None:
        if self.chance.random() < 0.5:
            self.book.got("", await self.line.ask(CHAT, chat_body(f"no-{tag}")))
        else:
            self.book.got("", await self.line.ask("/v1/nothing", b"{}", method="PUT"))


# ── what is there ───────────────────────────────────────────────────────────────────────────────


@given("two models, the first with little room")
def _(story: Story) -> None:
    knobs = ("--token-s", "0.01")
    limits = {"request_s": 10, "queue_s": 0.3, "inference_s": 8, "stall_s": 8, "cleanup_s": 1}
    story.hive.model(MODEL, *knobs, max_concurrent=2, queue_depth=2, timeouts=limits)
    story.hive.model(OTHER, *knobs, max_concurrent=20, queue_depth=0, timeouts=limits)


@given("hive serves whoever has a key")
def _(story: Story) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    scopes = ["inference", "metrics", "admin"]
    story.hive.keys.append({"name": "load", "sha256": digest, "scopes": scopes})
    story.hive.key = KEY
    story.hive.start()


# ── the load ────────────────────────────────────────────────────────────────────────────────────


@when("many clients ask both for everything, some too soon, some too long, and some leave")
def _(story: Story) -> None:
    book = story.kept["book"] = Book()
    clients = [Client(story.hive.port, book, f"client-{number}") for number in range(CLIENTS)]
    run(all_of([client.asks() for client in clients]), 60)
    rest(story)


@when("the second engine hangs up once and fails now and then")
def _(story: Story) -> None:
    book, double = story.kept["book"], story.hive.double(OTHER)
    for status in ("500", "429:7"):
        double.set(answer_status=status)
        ask(story, book, OTHER)
        double.set(answer_status="")
        ask(story, book, OTHER)
    # Connections that are kept are not what is tried again: a new start has none.
    story.ask("POST", f"/hive/v1/workers/{OTHERS_WORKER}/restart")
    must(lambda: story.hive.worker(OTHERS_WORKER)["starts"] == 2, 10, "another start")
    story.hive.wait_state("READY", OTHERS_WORKER)
    double.set(hang_up=1)
    ask(story, book, OTHER)
    rest(story)


def ask(story: Story, book: Book, model: str) -> None:
    line = Line(story.hive.port, KEY)

    async def once() -> None:
        book.got(model, await line.ask(CHAT, chat_body(model, "once", max_tokens=3)))
        line.leave()

    run(once(), 20)


@when("the first engine crashes while it answers")
def _(story: Story) -> None:
    book, double = story.kept["book"], story.hive.double(MODEL)

    async def cut_off(line: Line) -> None:
        reply = await line.begin(CHAT, chat_body(MODEL, "cut", max_tokens=5000, stream=True))
        assert reply.status == 200
        while await line.more(reply):
            pass
        book.got(MODEL, reply)

    async def crash() -> None:
        async with asyncio.TaskGroup() as tasks:
            lines = [Line(story.hive.port, KEY) for _ in range(2)]
            for line in lines:
                tasks.create_task(cut_off(line))

            async def both_run() -> bool:
                return bool((await asyncio.to_thread(lambda: double.state))["running"] == 2)

            await event(both_run, 10, "two streams")
            await asyncio.to_thread(double.die, "sigkill")
        for line in lines:
            line.leave()

    run(crash(), 30)
    must(lambda: story.hive.worker(WORKER)["starts"] == 2, 10, "another start")
    story.hive.wait_state("READY", WORKER)
    rest(story)


def rest(story: Story) -> None:
    doubles = {WORKER: story.hive.double(MODEL), OTHERS_WORKER: story.hive.double(OTHER)}
    must_rest(story.hive, doubles, 10, "after the load")


# ── the books ───────────────────────────────────────────────────────────────────────────────────


def page(story: Story, accept: str = "") -> str:
    answer = story.hive.ask("GET", "/metrics", headers={"Accept": accept} if accept else {})
    assert answer.status == 200, answer.body
    return answer.body.decode()


def counted(text: str, name: str, *labels: str) -> Counter[Key]:
    """The series of a family that are not zero, by the values of their labels."""
    return Counter(
        {
            tuple(sample.labels[label] for label in labels): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and sample.value
        }
    )


@then("the metrics count what the clients counted")
def _(story: Story) -> None:
    book: Book = story.kept["book"]
    for name, labels in BOOKS.items():
        found = counted(page(story), name, *labels)
        assert found == book.counts[name], f"{name}: {found} beside {book.counts[name]}"
    # A load that shows nothing of them proves nothing.
    statuses = {status for _, status in book.counts["hive_requests_total"]}
    assert statuses >= {"200", "400", "401", "404", "405", "429", "499", "500", "503", "504"}
    assert book.counts["hive_refusals_total"][MODEL, "queue_full"]
    assert book.cut_off == {MODEL: 2}


@then("the metrics count what the engines wrote down")
def _(story: Story) -> None:
    text, book = page(story), story.kept["book"]
    by_status = counted(text, "hive_requests_total", "model", "status")
    cancelled: Counter[Key] = Counter()
    for (model, _), count in counted(
        text, "hive_cancellations_total", "model", "confirmed"
    ).items():
        cancelled[model] += count  # type: ignore[index]
    tries = 0
    for model, worker in ((MODEL, WORKER), (OTHER, OTHERS_WORKER)):
        lines = journal(story.hive.journal(model))
        asked = [line for line in lines if "x-request-id" in line.get("headers", {})]
        seen: Counter[Any] = Counter(
            (line["outcome"], line["status"] if line["outcome"] == "refused" else None)
            for line in asked
        )
        assert by_status[model, "200"] == seen["finished", None] + book.cut_off[model]
        for status in (400, 429, 500):
            assert by_status[model, str(status)] == seen["refused", status], status
        assert cancelled[model] == seen["aborted", None]  # type: ignore[index]
        slots = counted(text, "hive_queue_seconds_count", "model")
        assert slots[(model,)] == len(asked) + book.cut_off[model]
        starts = counted(text, "hive_worker_starts_total", "worker")
        assert starts[(worker,)] == len([line for line in lines if line["what"] == "start"]) == 2
        ids = Counter(line["headers"]["x-request-id"] for line in asked)
        tries += sum(count - 1 for count in ids.values())
    retries = counted(text, "hive_retries_total", "operation", "outcome")
    assert retries == {("network", "retry"): tries, ("network", "success"): 1}
    assert tries == 1
    exits = counted(text, "hive_worker_exits_total", "worker", "cause")
    assert exits == {(WORKER, "signal"): 1, (OTHERS_WORKER, "asked"): 1}
    assert counted(text, "hive_worker_crashes_total", "model") == {(MODEL,): 1}


@then("the metrics count each call of an operation by its outcome")
def _(story: Story) -> None:
    found = counted(page(story), "hive_operations_total", "operation", "outcome")
    outcomes = story.kept["book"].outcomes
    assert found == {("inference", outcome): count for outcome, count in outcomes.items()}
    assert outcomes.keys() == {"success", "timeout", "transient", "permanent", "cancelled"}


@then("the metrics time one recovery of the first engine")
def _(story: Story) -> None:
    text = page(story)
    assert counted(text, "hive_worker_recovery_seconds_count", "model") == {(MODEL,): 1}
    assert 0 < story.hive.metric("hive_worker_recovery_seconds_sum", model=MODEL) < 15


# ── what clients make up ────────────────────────────────────────────────────────────────────────


@when("clients make up models, paths, methods, keys and ids")
def _(story: Story) -> None:
    # What a status that was not seen yet adds is no client's word: each is seen once before.
    def once(number: int) -> None:
        name = f"made-up-{number}"
        asked: list[tuple[str, str, Any, dict[str, str]]] = [
            ("POST", CHAT, chat_body(name), {}),
            ("POST", f"/v1/made/up/{name}", {"model": name}, {}),
            ("POST", f"/made/up/{name}", {}, {}),
            (f"MADEUP{number}", CHAT, {}, {}),
            ("DELETE", f"/v1/responses/{name}", None, {}),
            ("PATCH", f"/v1/models/{name}?x={name}", {}, {}),
            ("POST", CHAT, {}, {"X-Request-Id": name}),
            ("POST", CHAT, {}, {"Authorization": f"Bearer {name}"}),
            ("POST", CHAT, {}, {"X-Hive-Session": name}),
            ("GET", f"/hive/v1/workers/{name}", None, {}),
        ]
        for method, path, body, headers in asked:
            assert story.hive.ask(method, path, body, headers).status >= 400

    once(0)
    story.kept["series"] = labels_of(page(story))
    for number in range(1, FLOOD):
        once(number)


@then("no series has been added by that")
def _(story: Story) -> None:
    text = page(story)
    assert labels_of(text) == story.kept["series"]
    assert "made-up" not in text
    assert "MADEUP" not in text


def labels_of(text: str) -> set[tuple[str, Key]]:
    """Every series of hive's own."""
    return {
        (sample.name, tuple(sorted(f"{k}={v}" for k, v in sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("hive_")
    }


# ── the engines' own ────────────────────────────────────────────────────────────────────────────


def running(families: Iterable[Any]) -> set[str]:
    """The workers whose engines' gauges are on the page."""
    return {
        sample.labels["worker"]
        for family in families
        for sample in family.samples
        if sample.name == "vllm:num_requests_running"
    }


@then("the page has both engines' numbers beside hive's")
def _(story: Story) -> None:
    text = page(story)
    assert running(text_string_to_metric_families(text)) == {WORKER, OTHERS_WORKER}
    assert text.count("# TYPE vllm:num_requests_running ") == 1
    up = counted(text, "hive_engine_scrape_up", "worker")
    assert up == {(WORKER,): 1, (OTHERS_WORKER,): 1}


@then("the page can be read as text, as OpenMetrics and by promtool")
def _(story: Story) -> None:
    strict = page(story, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    families = openmetrics.text_string_to_metric_families(strict)  # type: ignore[no-untyped-call]
    assert running(families) == {WORKER, OTHERS_WORKER}
    if promtool := shutil.which("promtool"):  # tests/telemetry/test_engines.py says when it is not
        text = page(story).encode()
        checked = subprocess.run(  # noqa: PLW1510 (its status says more)
            [promtool, "check", "metrics"], input=text, capture_output=True
        )
        assert checked.returncode in (0, 3), checked.stderr
        said = checked.stderr.decode().splitlines()
        assert [line for line in said if line.startswith("hive_")] == []


@when("the second engine does not answer for its metrics any more")
def _(story: Story) -> None:
    story.hive.double(OTHER).set(metrics_s=1e6)


@then("the page is there without the second engine's numbers, and says so")
def _(story: Story) -> None:
    answer = story.hive.ask("GET", "/metrics")
    text = answer.body.decode()
    assert running(text_string_to_metric_families(text)) == {WORKER}
    assert f'hive_engine_scrape_up{{worker="{OTHERS_WORKER}"}} 0.0' in text
    assert 0.9 < answer.seconds < 5


@when("the second engine does not exist any more")
def _(story: Story) -> None:
    assert story.ask("POST", f"/hive/v1/workers/{OTHERS_WORKER}/stop").status == 202
    story.hive.wait_state("STOPPED", OTHERS_WORKER)


@then("the page is there without the second engine's numbers")
def _(story: Story) -> None:
    text = page(story)
    assert running(text_string_to_metric_families(text)) == {WORKER}
    assert counted(text, "hive_engine_scrape_up", "worker") == {(WORKER,): 1}
    assert OTHERS_WORKER not in "".join(
        line for line in text.splitlines() if line.startswith("hive_engine_scrape_up")
    )
