"""How alerts are sent: what a real webhook on loopback gets, and every way in which it fails.

The sender is at work in its outbox: that tries again what was not taken.
"""

import asyncio
from pathlib import Path

import pytest
from pydantic import SecretStr

from hive.telemetry.webhook import alert_name
from tests.doubles.webhook import Broken, webhook
from tests.patience import awaited, until
from tests.telemetry.sending import BEGAN, escalated, resolved, sending, taken

# ── what is sent ──────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_an_escalation_is_sent_as_alertmanager_has_it(tmp_path: Path) -> None:
    """(R193, R194)"""
    with webhook() as hook:
        labels = {"host": "gpu7"}
        async with sending(tmp_path, hook.url, labels=labels, runbook_url="https://x/y") as it:
            it.outbox.hear(escalated())
            it.outbox.hear(resolved())
            await taken(hook, 2)
    first, last = hook.deliveries

    assert first.path == "/api/v2/alerts"
    assert first.headers["content-type"] == "application/json"
    assert first.headers["idempotency-key"] == first.id != last.id
    assert first.alert == {
        "labels": {
            "host": "gpu7",
            "alertname": "HiveBreakerOpen",
            "severity": "high",
            "rule": "breaker_open",
            "operation": "worker",
            "model": "llama",
            "worker": "llama-0",
        },
        "annotations": {
            "summary": "The breaker of Worker llama-0 is open.",
            "description": "The breaker of Worker llama-0 is open. (CIRCUIT_BREAKER_OPEN) failures "
            "5. Restart it.",
            "recommended_action": "Restart it.",
            "runbook_url": "https://x/y#hivebreakeropen",
            "error_code": "CIRCUIT_BREAKER_OPEN",
            "timestamp": BEGAN,
        },
        "startsAt": "2026-01-31T12:00:00.123Z",
    }
    same = {key: value for key, value in last.alert.items() if key != "endsAt"}
    assert same == first.alert
    assert last.alert["endsAt"] > first.alert["startsAt"]


@awaited
async def test_the_token_goes_as_a_bearer_and_its_file_is_read_each_time(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("first\n")
    with webhook(token="first") as hook:
        async with sending(tmp_path, hook.url, webhook_token_file=secret) as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
            secret.unlink()
            it.outbox.hear(escalated(1))
            await until(lambda: it.tried("failed"), "a token that cannot be read is tried again")
            assert "No such file" in it.tried("failed")[0].why
            assert str(tmp_path) not in it.tried("failed")[0].why
            hook.token = "second"
            secret.write_text("second")
            await taken(hook, 2)
    assert [one.headers["authorization"] for one in hook.deliveries] == [
        *("Bearer first", "Bearer second")
    ]


def test_alert_names_are_those_of_prometheus() -> None:
    assert alert_name("breaker_open") == "HiveBreakerOpen"


# ── a webhook that fails ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [301, 307, 408, 429, 500, 503])
@awaited
async def test_what_may_be_taken_later_is_sent_until_it_is(tmp_path: Path, status: int) -> None:
    """In its order, and no redirect is followed (R235)."""
    with webhook(status=status, answer_headers={"Location": "/elsewhere"}) as hook:
        async with sending(tmp_path, hook.url) as it:
            for number in range(3):
                it.outbox.hear(escalated(number))
            await until(lambda: len(hook.deliveries) >= 3, "it is tried again")
            assert len({one.id for one in hook.deliveries}) == 1
            assert {one.path for one in hook.deliveries} == {"/api/v2/alerts"}
            assert it.waiting == 3
            hook.status = 200
            await taken(hook, 3)
            await it.queued(0)
    assert [one.alert["labels"]["worker"] for one in hook.taken] == [
        "llama-0",
        "llama-1",
        "llama-2",
    ]
    assert it.tried("failed")[0].why == f"HTTP {status}"


@pytest.mark.parametrize("status", [400, 404, 422])
@awaited
async def test_what_is_refused_for_good_is_dropped(tmp_path: Path, status: int) -> None:
    with webhook(status=status) as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated())
            await until(lambda: it.tried("dropped"), "it is dropped")
            (dropped,) = it.tried("dropped")
            view = await it.outbox.view()
    assert (dropped.why, dropped.attempts, dropped.waiting) == (f"HTTP {status}", 1, 0)
    assert [one["state"] for one in view["messages"]] == ["dropped"]
    assert len(hook.deliveries) == 1


@pytest.mark.parametrize("status", [401, 403])
@awaited
async def test_refused_credentials_lose_nothing_and_others_are_tried_at_once(
    tmp_path: Path, status: int
) -> None:
    with webhook(status=status) as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated())
            await until(lambda: it.tried("failed"), "it is refused")
            hook.status = 200
            it.outbox.apply(
                it.outbox._settings.model_copy(update={"webhook_token": SecretStr("n")})
            )
            await taken(hook, 1)
    assert it.tried("failed")[0].why == f"HTTP {status}"
    assert hook.taken[0].headers["authorization"] == "Bearer n"


def breaks_off(_number: int) -> None:
    raise Broken


@awaited
async def test_a_webhook_that_breaks_off_or_is_not_there_is_tried_again(tmp_path: Path) -> None:
    with webhook(arrived=breaks_off) as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated())
            await until(lambda: len(hook.deliveries) >= 2, "it is tried again")
            hook.stop()
            await until(
                lambda: any("refused" in one.why for one in it.tried("failed")), "nobody listens"
            )
            hook.arrived = lambda _number: None
            hook.start()
            await taken(hook, 1)
    assert len(hook.taken) == 1
    assert len({one.body for one in hook.deliveries}) == 1  # the same bytes each time
    assert all("127.0.0.1" not in one.why for one in it.tried("failed"))


@awaited
async def test_a_webhook_that_hangs_or_answers_without_end_holds_nobody_up(tmp_path: Path) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 9000)
        await reader.read()  # until it is left
        writer.close()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    for number, behaves in enumerate((endless, silent)):
        server = await asyncio.start_server(behaves, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        home = tmp_path / str(number)
        home.mkdir()
        async with server, sending(home, url, timeout_s=0.1) as it:
            it.outbox.hear(escalated())
            if behaves is endless:
                await until(lambda: it.tried("sent"), "its status was enough")
            else:
                await until(lambda: it.tried("failed"), "it is not waited for")
                assert it.tried("failed")[0].why == "no answer within 0.1 s"


@awaited
async def test_a_pause_grows_and_a_new_alert_ends_it(tmp_path: Path) -> None:
    """(R235)"""
    with webhook(status=500) as hook:
        async with sending(tmp_path, hook.url, retry_max_s=300) as it:
            it.outbox.hear(escalated(0))
            await until(lambda: len(hook.deliveries) == 2, "after 1 s", 10)
            view = await it.outbox.view()
            assert 1 < view["next_try_seconds"] <= 2.2
            hook.status = 200
            it.outbox.hear(escalated(1))
            await taken(hook, 2)
    pauses = [it.outbox._sender._policy.delay_s(n, 1.0) for n in (1, 2, 3, 8, 9, 10, 300)]
    assert pauses == pytest.approx([1.1, 2.2, 4.4, 140.8, 281.6, 330, 330])
