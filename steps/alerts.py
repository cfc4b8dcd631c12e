"""Steps about escalations and the webhook that gets them."""

import contextlib
import errno
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from steps import leaks
from steps.driver import chat_body
from steps.story import CHAT, MODEL, WORKER, Story
from steps.waiting import must
from tests.doubles.fs import HANGS_S, Faults, Rule
from tests.doubles.webhook import Broken, Delivery, Webhook, webhook

TOKEN = "webhooks-own-token-9174"
ALERTS = "/hive/v1/alerts"
LEVELS = {"full": 0, "degraded": 1, "critical": 2, "down": 3}
FAST = {"retry_max_s": 0.1, "timeout_s": 5}
SEED = int(os.environ.get("KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")


def view(story: Story) -> Any:
    answer = story.hive.ask("GET", ALERTS)
    assert answer.status == 200, answer.body
    return answer.json


def open_rules(story: Story) -> dict[str, Any]:
    return {one["rule"]: one for one in view(story)["alerts"]}


# ── escalations ─────────────────────────────────────────────────────────────────────────────────


@when("the engine crashes, whenever it is started")
def _(story: Story) -> None:
    for _ in range(2):
        story.hive.wait_state("READY", WORKER)
        starts = story.hive.worker(WORKER)["starts"]
        story.double.die("segv")
        must(
            lambda s=starts: (  # type: ignore[misc]
                (worker := story.hive.worker(WORKER))["starts"] > s or worker["state"] == "FAILED"
            ),
            10,
            "another start, or none",
        )


@given("hive is serving with a key for clients and one for operators")
def _(story: Story) -> None:
    for name, scope in (("client", "inference"), ("operator", "admin")):
        ran = story.hive.cli("key", "new", name, "--scope", scope, "--config", _config(story))
        story.kept[name] = re.search(r"hive_[A-Za-z0-9_-]+", ran.out)[0]  # type: ignore[index]
    story.hive.keys = _keys(story)
    story.hive.key = story.kept["operator"]
    story.hive.model(MODEL)
    story.hive.start()


def _config(story: Story) -> str:
    path = story.hive.home / "keys.toml"
    path.touch()
    return str(path)


def _keys(story: Story) -> list[dict[str, Any]]:
    import tomllib  # noqa: PLC0415

    text = (story.hive.home / "keys.toml").read_text()
    keys: list[dict[str, Any]] = tomllib.loads(text)["auth"]["keys"]
    return keys


@when(parsers.parse("somebody asks {count:d} times with a key that is none"))
def _(story: Story, count: int) -> None:
    for _ in range(count):
        answer = story.hive.ask("POST", CHAT, chat_body(MODEL), {"Authorization": "Bearer wrong"})
        assert answer.status == 401


@when("somebody asks once more with a key that is none")
def _(story: Story) -> None:
    story.hive.ask("POST", CHAT, chat_body(MODEL), {"Authorization": "Bearer wrong"})


@then(
    parsers.re(
        r"the (?P<who>worker|model|service|webhook|clients) escalates? as "
        r'"(?P<rule>\w+)", level (?P<level>\w+)'
    )
)
def _(story: Story, who: str, rule: str, level: str) -> None:
    must(lambda: rule in open_rules(story), 10, lambda: f"{rule}; have {view(story)}")
    found = open_rules(story)[rule]
    named = {"worker": found["worker"] == WORKER, "model": found["model"] == MODEL}
    assert named.get(who, True), found
    assert found["level"] == level
    assert found["recommended_action"]


@then("nothing is escalated")
def _(story: Story) -> None:
    assert view(story)["alerts"] == []


@then("nothing is escalated any more")
def _(story: Story) -> None:
    must(lambda: view(story)["alerts"] == [], 10, lambda: f"the end of {view(story)['alerts']}")


@then("the operator is shown both, the worst first, each with what to do")
def _(story: Story) -> None:
    ran = story.hive.cli("alerts")
    lines = ran.out.splitlines()
    (service,) = (n for n, line in enumerate(lines) if "service_degraded" in line)
    (breaker,) = (n for n, line in enumerate(lines) if "breaker_open" in line)
    assert ran.code == 1
    assert service < breaker
    assert WORKER in lines[breaker]
    assert "hive worker restart" in lines[breaker]


@then(parsers.parse('"hive alerts" ends with exit code {code:d}'))
def _(story: Story, code: int) -> None:
    assert story.hive.cli("alerts", "--json").code == code


@then("the events tell of each once")
def _(story: Story) -> None:
    must(lambda: len(_events(story, "escalated")) == 2, 5, "both of them")
    found = _events(story, "escalated")
    assert sorted(event["rule"] for event in found) == ["breaker_open", "service_degraded"]
    for event in found:
        assert event.keys() >= {"level", "at", "operation", "code", "context", "recommended_action"}


@then("the events tell that each is over")
def _(story: Story) -> None:
    must(lambda: len(_events(story, "escalation_resolved")) == 2, 5, "the end of both")
    assert len(_events(story, "escalated")) == 2


def _events(story: Story, name: str) -> list[dict[str, Any]]:
    assert story.watcher
    events = [json.loads(event) for event in story.watcher.events if event]
    return [event for event in events if event["event"] == name]


@then("the log tells of each once")
def _(story: Story) -> None:
    counted = Counter(line["rule"] for line in story.hive.logged("escalated"))
    assert counted == {"repeated_failures": 1, "error_rate": 1}


@then(
    parsers.parse(
        "the metrics count {high:d} escalation of level high, and {critical:d} of level critical"
    )
)
def _(story: Story, high: int, critical: int) -> None:
    count = {level: story.hive.metric("hive_escalations_total", level=level) for level in _ALL}
    assert count == {"info": 0, "medium": 0, "high": high, "critical": critical, "emergency": 0}


_ALL = ("info", "medium", "high", "critical", "emergency")


@then("a key for clients may not see it")
def _(story: Story) -> None:
    headers = {"Authorization": f"Bearer {story.kept['client']}"}
    assert story.hive.ask("GET", ALERTS, headers=headers).status == 403


@then(parsers.parse("the service level is {level}"))
def _(story: Story, level: str) -> None:
    def told() -> str:
        return str(story.hive.ask("GET", "/hive/v1/status").json["service_level"])

    must(lambda: told() == level, 5, lambda: f"{level}; it is {told()}")
    assert story.hive.metric("hive_service_level") == LEVELS[level]
    assert f"service level {level}" in story.hive.cli("status").out


# ── the webhook ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook(token=TOKEN) as it:
        yield it


def _sends_to(story: Story, url: str, token: str) -> None:
    story.hive.sections["alerts"] = {**FAST, "webhook_url": url, "webhook_token": token}


@given("a webhook that takes alerts with a token")
def _(story: Story, hook: Webhook) -> None:
    _sends_to(story, hook.url, TOKEN)


@given("a webhook that takes alerts with another token")
def _(story: Story, hook: Webhook) -> None:
    _sends_to(story, hook.url, f"not-{TOKEN}")


@when("the webhook takes that token, too")
def _(hook: Webhook) -> None:
    hook.token = f"not-{TOKEN}"


@given("the webhook is down")
def _(hook: Webhook) -> None:
    hook.stop()


@when("the webhook is there again")
def _(hook: Webhook) -> None:
    hook.start()


@then(parsers.parse('the webhook gets "{name}" of the worker, with what to do'))
def _(story: Story, hook: Webhook, name: str) -> None:
    must(lambda: any(one.name == name for one in hook.taken), 10, lambda: f"{name}: {hook.taken}")
    (found,) = (one.alert for one in hook.taken if one.name == name)
    assert found["labels"]["worker"] == WORKER
    assert found["labels"]["severity"] == "high"
    assert "hive worker restart" in found["annotations"]["recommended_action"]
    assert found["annotations"]["runbook_url"].endswith(f"#{name.lower()}")


@then("it holds nothing that was asked, no key, no path and no host")
def _(story: Story, hook: Webhook) -> None:
    told = b"".join(one.body for one in hook.deliveries).decode()
    for secret in ("tag=", TOKEN, str(story.hive.home), "127.0.0.1", socket.gethostname()):
        assert secret not in told
    assert TOKEN not in story.hive.log_text
    assert TOKEN not in story.hive.ask("GET", ALERTS).body.decode()


def _fingerprint(delivery: Delivery) -> str:
    """What an Alertmanager knows an alert by."""
    return json.dumps(delivery.alert["labels"], sort_keys=True)


def _is_over(delivery: Delivery) -> bool:
    """What is open has no end."""
    ends_at = delivery.alert.get("endsAt")
    return ends_at is not None and datetime.fromisoformat(ends_at) <= datetime.now(UTC)


def _all_over(hook: Webhook) -> bool:
    last = {_fingerprint(one): one for one in hook.taken}
    return bool(last) and all(map(_is_over, last.values()))


@then("the webhook gets the end of everything that it got")
@then("the webhook was told the end of all of them")
def _(hook: Webhook) -> None:
    must(lambda: _all_over(hook), 10, lambda: f"the end of {[one.name for one in hook.taken]}")
    began: set[str] = set()
    for one in hook.taken:  # nothing was over before it began
        assert not _is_over(one) or _fingerprint(one) in began
        began.add(_fingerprint(one))


@then("no alert waits to be sent")
def _(story: Story) -> None:
    must(lambda: view(story)["outbox"]["waiting"] == 0, 10, "an empty outbox")
    assert story.hive.metric("hive_outbox_waiting") == 0


@then(parsers.parse("{count:d} alerts wait to be sent, and the operator is shown why"))
def _(story: Story, count: int) -> None:
    def told() -> Any:
        return view(story)["outbox"]

    must(lambda: told()["waiting"] == count and told()["last_error"], 10, lambda: f"{told()}")
    assert told()["last_error"] == os.strerror(errno.ECONNREFUSED)
    assert story.hive.metric("hive_outbox_waiting") == count
    assert story.hive.metric("hive_outbox_failures_total") >= 1
    assert "Connection refused" in story.hive.cli("alerts").out
    story.kept["queued"] = {one["delivery"] for one in told()["messages"]}


@when("hive is started again, and its model's engine is gone")
def _(story: Story, hook: Webhook) -> None:
    """Whoever starts it does so again and again."""
    model = story.hive.models[MODEL]
    story.hive.model(MODEL, *model.knobs, **{**model.extra, "command": ["/gone", "{socket}"]})
    for _ in range(2):
        before = len(hook.repeats)
        assert story.hive.serve_to_the_end().code not in (0, 70)
    story.kept["repeats"] = hook.repeats[before:]


@then("the webhook gets each of them once, and is told that it is still so")
def _(story: Story, hook: Webhook) -> None:
    assert {one.id for one in hook.taken} == story.kept["queued"]
    assert len(hook.deliveries) == len(hook.taken) == 2
    assert not any(map(_is_over, hook.taken))
    (repeat,) = story.kept["repeats"]
    assert [one["labels"] for one in repeat.alerts] == [one.alert["labels"] for one in hook.taken]
    assert all(
        datetime.fromisoformat(one["endsAt"]) > datetime.now(UTC) + timedelta(days=29)
        for one in repeat.alerts
    )


@then("the webhook gets each of them once, and that they are over")
def _(story: Story, hook: Webhook) -> None:
    must(lambda: len(hook.taken) >= 4, 10, lambda: f"two and their ends: {hook.taken}")
    ids = [one.id for one in hook.taken]
    assert story.kept["queued"] == set(ids[:2])
    assert len(set(ids)) == len(ids) == 4
    assert _all_over(hook)


# ── Alertmanager ────────────────────────────────────────────────────────────────────────────────


class Alertmanager:
    """The real one, without a receiver."""

    def __init__(self, program: str, home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.home, self.program = home, program
        config = home / "alertmanager.yml"
        config.write_text("route: {receiver: none}\nreceivers: [{name: none}]\n")
        self.log = home / "alertmanager.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self.program,
                    f"--config.file={self.home / 'alertmanager.yml'}",
                    f"--storage.path={self.home / 'alertmanager'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--cluster.listen-address=",
                ],
                stdout=log,
                stderr=log,
            )
        leaks.started_pids.add(self.process.pid)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.ask("GET", "/-/ready")[0] == 200
        return False

    @property
    def alerts(self) -> list[Any]:
        found: list[Any] = json.loads(self.ask("GET", "/api/v2/alerts")[1])
        return found

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def alertmanager(story: Story) -> Iterator[Alertmanager]:
    program = next(filter(None, map(shutil.which, ALERTMANAGER)), None)
    if program is None:
        pytest.skip("no Alertmanager (Debian: prometheus-alertmanager)")
    it = Alertmanager(program, story.hive.home)
    try:
        must(it.is_ready, 20, it.log.read_text)
        yield it
    finally:
        it.end()


@given("an Alertmanager that gets everything twice")
def _(story: Story, hook: Webhook, alertmanager: Alertmanager) -> None:
    """As after a kill at the worst moment: the same bytes again."""

    def pass_on(number: int) -> None:
        for _ in range(2):
            delivery = hook.deliveries[number - 1]
            status, text = alertmanager.ask("POST", delivery.path, delivery.body)
            story.kept["refused"] = story.kept.get("refused", "") or (
                "" if status == 200 else text.decode()
            )
            if status != 200:
                raise Broken

    hook.arrived = pass_on
    _sends_to(story, hook.url, TOKEN)


@then(parsers.parse('the Alertmanager has "{name}" once'))
def _(story: Story, alertmanager: Alertmanager, name: str) -> None:
    def found() -> list[Any]:
        return [one for one in alertmanager.alerts if one["labels"]["alertname"] == name]

    must(found, 10, lambda: f"{name}; have {alertmanager.alerts}, {story.kept}")
    (alert,) = found()
    assert alert["labels"]["worker"] == WORKER
    assert alert["status"]["state"] in ("active", "unprocessed")


@then("the Alertmanager has nothing any more")
def _(alertmanager: Alertmanager) -> None:
    must(lambda: alertmanager.alerts == [], 10, lambda: f"nothing; have {alertmanager.alerts}")


# ── kills ───────────────────────────────────────────────────────────────────────────────────────


@given(parsers.parse("{count:d} models whose engines fail"))
def _(story: Story, count: int) -> None:
    story.hive.sections["breaker"] = {"failures": 1, "cooldown_s": 600}
    for number in range(count):
        story.hive.model(f"m{number}", "--good-requests", "1", "--answer-status", "500")


@when(
    parsers.parse("hive is killed {count:d} times: while alerts wait, arrive, and were just taken")
)
def _(story: Story, hook: Webhook, count: int) -> None:
    """Which message of a life it is, chance decides; each kind comes as often as the others."""
    print(f"KILLS_SEED={SEED}")
    chance = random.Random(SEED)
    kinds = [("waits", "arrives", "taken")[number % 3] for number in range(count)]
    chance.shuffle(kinds)
    story.kept["queued"], story.kept["doubtful"] = set(), Counter()
    for kind in kinds:
        _one_life(story, hook, kind, chance.randint(1, 3))
    assert len(kinds) == count


def _one_life(story: Story, hook: Webhook, kind: str, number: int) -> None:
    """A life of hive in which every model fails, up to a kill at this message."""
    hive = story.hive
    if kind == "waits":
        hook.stop()
    until = len(hook.deliveries) + number

    def kill(this: int) -> None:
        if this == until:
            hive.signal(signal.SIGKILL)
            if kind == "arrives":
                raise Broken
            story.kept["doubtful"][hook.deliveries[this - 1].id] += 1

    hook.arrived = kill if kind == "arrives" else lambda _number: None
    hook.answered = kill if kind == "taken" else lambda _number: None
    with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
        hive.start()
        for model in hive.models:
            hive.chat(model)
        while kind != "waits" or len(_queued(story)) < 3:  # else until it is killed
            _queued(story)
    if kind == "waits":
        hive.signal(signal.SIGKILL)
    assert hive.wait_exit() == -signal.SIGKILL
    if kind == "waits":
        hook.start()


def _queued(story: Story) -> set[str]:
    """What hive says is queued: from then on it must not be lost."""
    messages = {one["delivery"] for one in view(story)["outbox"]["messages"]}
    story.kept["queued"] |= messages
    return messages


@when("hive is started again, and nothing fails any more")
def _(story: Story, hook: Webhook) -> None:
    hook.arrived = hook.answered = lambda _number: None
    story.hive.start()
    must(lambda: view(story)["outbox"]["waiting"] == 0, 20, "an empty outbox")


@then("every alert that was queued has arrived")
def _(story: Story, hook: Webhook) -> None:
    assert len(story.kept["queued"]) >= 9
    assert story.kept["queued"] <= {one.id for one in hook.taken}


@then("each has arrived once, but for those that were taken at the moment of a kill")
def _(story: Story, hook: Webhook) -> None:
    often = {
        one: count - 1 for one, count in Counter(d.id for d in hook.taken).items() if count > 1
    }
    assert Counter(often) <= story.kept["doubtful"]


@then("those that came twice are the same to the byte")
def _(hook: Webhook) -> None:
    bodies: dict[str, set[bytes]] = {}
    for one in hook.deliveries:
        bodies.setdefault(one.id, set()).add(one.body)
    assert all(len(found) == 1 for found in bodies.values())


# ── the disk ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def outbox_disk(story: Story) -> Iterator[Faults]:
    faults = Faults(story.hive.home / "faults")
    story.hive.starter = faults.starter
    yield faults
    faults.off()


@given("the disk of the outbox is full")
def _(outbox_disk: Faults) -> None:
    outbox_disk.add(Rule("*/outbox.db*", "write", error=errno.ENOSPC))


@given("the disk of the outbox hangs")
def _(outbox_disk: Faults) -> None:
    outbox_disk.add(Rule("*/outbox.db*", "write|sync", delay_s=HANGS_S))


@then("the operator is told that alerts cannot be written down")
def _(story: Story) -> None:
    must(lambda: view(story)["outbox"]["disk_error"], 10, "why the disk failed")
    told = [line for line in story.hive.log if "cannot be written" in line.get("event", "")]
    assert [line["level"] for line in told] == ["error"]  # once
    assert "cannot be written down" in story.hive.cli("alerts").out


@then(parsers.parse("hive stops within {seconds:g} seconds, whatever the disk does"))
def _(story: Story, seconds: float) -> None:
    story.hive.signal(signal.SIGTERM)
    assert story.hive.wait_exit(seconds) == 0
