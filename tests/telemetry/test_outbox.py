"""Alerts on their way: a real webhook on loopback, a real file, and a disk that fails every way."""

import asyncio
import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hive.storage.outbox import FILE, OutboxFile
from hive.telemetry import outbox as module
from steps.alerts import ALERTMANAGER, Alertmanager
from tests.doubles.webhook import webhook
from tests.patience import awaited, until
from tests.telemetry.sending import Sending, escalated, resolved, sending, taken

# ── what is queued ────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_only_what_is_bad_enough_is_sent(tmp_path: Path) -> None:
    with webhook() as hook:
        async with sending(tmp_path, hook.url, level="critical") as it:
            for number, level in enumerate(("info", "medium", "high", "critical", "emergency")):
                it.outbox.hear(escalated(number, level))
                it.outbox.hear(resolved(number, level))
            await taken(hook, 4)
    assert [one.alert["labels"]["severity"] for one in hook.deliveries] == [
        *("critical", "critical", "emergency", "emergency")
    ]


@awaited
async def test_the_end_of_what_was_sent_is_sent_whatever_the_level_is_by_then(
    tmp_path: Path,
) -> None:
    with webhook() as hook:
        async with sending(tmp_path, hook.url, level="high") as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
            it.outbox.apply(it.outbox._settings.model_copy(update={"level": "emergency"}))
            it.outbox.hear(escalated(1))
            it.outbox.hear(resolved(1))
            it.outbox.hear(resolved(0))
            await taken(hook, 2)
    assert [one.alert["labels"]["worker"] for one in hook.taken] == ["llama-0", "llama-0"]
    assert "endsAt" in hook.taken[1].alert


@awaited
async def test_without_a_webhook_there_is_neither_file_nor_sender(tmp_path: Path) -> None:
    it = Sending(tmp_path)
    async with it.outbox.running():
        it.outbox.hear(escalated())
        view = await it.outbox.view()
    assert list(tmp_path.iterdir()) == []
    assert (view["enabled"], view["waiting"]) == (False, 0)


# ── what is dropped ───────────────────────────────────────────────────────────────────────────────


@awaited
async def test_what_is_too_old_is_dropped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """(R235)"""
    with webhook(status=500) as hook:
        async with sending(tmp_path, hook.url, keep_s=2.0) as it:
            it.outbox.hear(escalated())
            await until(lambda: it.tried("dropped"), "it is dropped")
            hook.status = 200
            it.outbox.hear(escalated(1))
            await taken(hook, 1)
    assert hook.taken[0].alert["labels"]["worker"] == "llama-1"
    assert it.tried("dropped")[0].attempts >= 2


@awaited
async def test_where_too_many_wait_the_oldest_of_the_lowest_level_goes(tmp_path: Path) -> None:
    with webhook(status=500) as hook:
        async with sending(tmp_path, hook.url, level="info", max_waiting=3) as it:
            levels = ("critical", "high", "medium", "medium", "emergency", "info")
            for number, level in enumerate(levels):
                it.outbox.hear(escalated(number, level))
            await until(lambda: len(it.tried("dropped")) == 3, "three are dropped")
            hook.status = 200
            await taken(hook, 3)
    assert [one.subject for one in it.tried("dropped")] == [
        *("Worker llama-5", "Worker llama-2", "Worker llama-3")
    ]
    names = [one.alert["labels"]["worker"] for one in hook.taken]
    assert sorted(names) == ["llama-0", "llama-1", "llama-4"]


# ── another life ──────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_what_waited_is_sent_once_by_the_next_life(tmp_path: Path) -> None:
    """(R235, R249)"""
    with webhook(status=503) as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            it.outbox.hear(escalated(1))
            it.outbox.hear(resolved(1))
            await it.queued(3)
            await until(lambda: it.tried("failed"), "one try")
        tries = it.tried("failed")[-1].attempts
        hook.status = 200
        async with sending(tmp_path, hook.url) as it:
            await taken(hook, 3)
            await it.queued(0)
            assert len(hook.taken) == 3  # it may be so still
            it.outbox.look_anew()
            await taken(hook, 4)
            assert it.tried("sent")[0].attempts > tries
        async with sending(tmp_path, hook.url) as it:
            it.outbox.look_anew()
            await it.queued(0)
    sent = [
        (one.alert["labels"]["worker"], one.alert["annotations"].get("resolved"))
        for one in hook.taken
    ]

    # What the first life told of llama-0 is over: the second one looks anew.
    assert [name for name, _ in sent] == ["llama-0", "llama-1", "llama-1", "llama-0"]
    assert sent[3][1] == "hive was started anew, and looks anew"
    assert len({one.id for one in hook.taken}) == 4


@awaited
async def test_what_is_so_again_at_the_start_is_not_ended(tmp_path: Path) -> None:
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
        again = Sending(tmp_path, webhook_url=hook.url, retry_max_s=0.02)
        again.outbox.hear(escalated(0))  # a leak that was found before the outbox ran
        async with again.outbox.running():
            again.outbox.look_anew()
            await taken(hook, 2)
            again.outbox.hear(resolved(0))
            await taken(hook, 3)
    assert len(hook.taken) == 3


@pytest.mark.parametrize("how", ["refused", "waits"])
@awaited
async def test_an_end_that_was_not_taken_is_told_by_the_next_life(tmp_path: Path, how: str) -> None:
    """Else what it ends would be open for ever."""
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
            hook.status = 400 if how == "refused" else 503
            it.outbox.hear(resolved(0))
            await until(lambda: it.tried("dropped") or it.tried("failed"), "a try")
        hook.status = 200
        for _ in range(2):  # and by that one alone
            async with sending(tmp_path, hook.url) as it:
                it.outbox.look_anew()
                await taken(hook, 2)
                await it.queued(0)
    assert ["endsAt" in one.alert for one in hook.taken] == [False, True]
    assert hook.repeats == []


@awaited
async def test_what_is_so_again_outlives_the_end_of_what_was(tmp_path: Path) -> None:
    """An end that was on its way ends the first, not the second."""
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            for event in (escalated(0), resolved(0), escalated(0)):
                it.outbox.hear(event)
            await taken(hook, 3)
            await it.queued(0)
        async with sending(tmp_path, hook.url) as it:
            it.outbox.look_anew()
            await taken(hook, 4)
    assert ["endsAt" in one.alert for one in hook.taken] == [False, True, False, True]


# ── what is open is told again ────────────────────────────────────────────────────────────────────


@awaited
async def test_what_is_open_is_repeated_until_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one list, without an id: a repeat is no delivery, and is tried again only in its turn."""
    monkeypatch.setattr(module, "REPEAT_S", 0.1)
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            it.outbox.hear(escalated(1))
            await until(lambda: any(len(one.alerts) == 2 for one in hook.repeats), "both again")
            repeat = hook.repeats[-1]
            assert not {"idempotency-key", "x-hive-delivery"} & repeat.headers.keys()
            for alert, first in zip(repeat.alerts, hook.taken, strict=True):
                ends_in = datetime.fromisoformat(alert.pop("endsAt")) - datetime.now(UTC)
                assert alert == first.alert
                assert timedelta(minutes=9) < ends_in <= timedelta(minutes=10)
            hook.status = 500
            count = len(hook.repeats)
            await until(lambda: len(hook.repeats) > count + 2, "it goes on")
            hook.status = 200
            it.outbox.hear(resolved(0))
            await taken(hook, 3)
            count = len(hook.repeats)
            await until(lambda: len(hook.repeats) > count + 1, "the other one")
            assert [one["labels"]["worker"] for one in hook.repeats[-1].alerts] == ["llama-1"]
            it.outbox.hear(resolved(1))
            await taken(hook, 4)
            count = len(hook.repeats)
            it.outbox.hear(escalated(2))
            it.outbox.hear(resolved(2))
            await taken(hook, 6)
        assert len(hook.repeats) == count
    assert not it.tried("failed")
    assert len(hook.deliveries) == 6
    assert caplog.text.count("could not be told again") == 1


@awaited
async def test_nothing_is_repeated_of_what_a_message_is_on_its_way_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be told before its message, or again after its end."""
    monkeypatch.setattr(module, "REPEAT_S", 0.02)
    with webhook(status=503) as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            await until(lambda: len(hook.deliveries) >= 2, "it is tried again")
            assert hook.repeats == []
            it.outbox.hear(resolved(0))
            hook.status = 200
            await taken(hook, 2)
    assert hook.repeats == []


@awaited
async def test_what_is_open_at_the_end_stays_so_for_long(tmp_path: Path) -> None:
    """And when the next life cannot start: nothing is over because hive is gone."""
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
        async with sending(tmp_path, hook.url) as it:
            await it.queued(0)
    assert len(hook.deliveries) == 1
    for repeat in hook.repeats:
        (alert,) = repeat.alerts
        assert datetime.fromisoformat(alert["endsAt"]) > datetime.now(UTC) + timedelta(days=29)
    assert len(hook.repeats) == 2


@awaited
async def test_an_alertmanager_that_was_started_anew_knows_what_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one: it keeps alerts in memory."""
    program = next(filter(None, map(shutil.which, ALERTMANAGER)), None)
    if program is None:
        pytest.skip("no Alertmanager (Debian: prometheus-alertmanager)")
    monkeypatch.setattr(module, "REPEAT_S", 0.2)
    now = datetime.now(UTC).isoformat()

    def ends_in() -> timedelta:
        (alert,) = it.alerts
        return datetime.fromisoformat(alert["endsAt"]) - datetime.now(UTC)

    it = await asyncio.to_thread(Alertmanager, program, tmp_path)
    try:
        await until(it.is_ready, "it is ready", 20)
        url = f"http://127.0.0.1:{it.port}/api/v2/alerts"
        async with sending(tmp_path, url) as hive:
            hive.outbox.hear(escalated(0, began_at=now))
            await until(lambda: it.alerts and ends_in() > timedelta(minutes=9), "it has it")
            it.end()
            it.start()
            await until(it.is_ready, "it is ready again", 20)
            await until(lambda: it.alerts, "it has it again")
            assert ends_in() < timedelta(minutes=10)
        assert ends_in() > timedelta(days=29)
        async with sending(tmp_path, url) as hive:
            hive.outbox.look_anew()
            await until(lambda: not it.alerts, "it is over")
    finally:
        it.end()


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_a_message_is_on_disk_before_it_is_sent(tmp_path: Path) -> None:
    found: list[list[str]] = []

    def looks(_number: int) -> None:
        file = OutboxFile(tmp_path)
        try:
            found.append([one.delivery for one in file.read().waiting])
        finally:
            file.close()

    with webhook(arrived=looks) as hook:
        async with sending(tmp_path, hook.url) as it:
            for number in range(5):
                it.outbox.hear(escalated(number))
                await taken(hook, number + 1)
            await it.queued(0)
    assert [one.id in there for one, there in zip(hook.deliveries, found, strict=True)] == [
        True
    ] * 5


@asynccontextmanager
async def full_disk() -> AsyncIterator[Callable[[], None]]:
    """No file of this process can grow while the block runs, or until what it yields is called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def works_again() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield works_again
    finally:
        works_again()
        signal.signal(signal.SIGXFSZ, handler)


@awaited
async def test_a_full_disk_is_told_once_and_alerts_are_sent_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            await it.queued(0)
            async with full_disk() as works_again:
                it.outbox.hear(escalated(0))
                it.outbox.hear(escalated(1))
                await taken(hook, 2)
                view = await it.outbox.view()
                assert view["disk_error"]
                errors = [r for r in caplog.records if r.levelno == logging.ERROR]
                assert len(errors) == 1
                assert "cannot be written" in errors[0].message
                works_again()
                await until(lambda: not it.outbox._is_unsaved, "it is on disk again")
            view = await it.outbox.view()
    assert view["disk_error"] == ""
    assert [one["state"] for one in view["messages"]] == ["sent", "sent"]
    assert len(hook.deliveries) == 2


@awaited
async def test_what_was_sent_while_the_disk_was_full_is_written_down_once_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing else is heard: the next life would send it again."""
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it, full_disk() as works_again:
            works_again()
            full = (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])

            def fills(_number: int) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, full)

            hook.arrived = fills
            it.outbox.hear(escalated(0))
            await until(lambda: it.tried("sent"), "it is sent")
            await until(lambda: it.outbox._disk_failed, "it cannot be written down")
            works_again()
            await until(lambda: not it.outbox._is_unsaved, "it is written down")
            hook.arrived = lambda _number: None


@awaited
async def test_a_disk_that_fails_for_ever_costs_no_more_and_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was on it is not sent again by the next life, where it works again in the end."""
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    with webhook() as hook:
        async with sending(tmp_path, hook.url, max_waiting=5) as it:
            async with full_disk() as works_again:
                works_again()
                hook.status = 503
                it.outbox.hear(escalated(0))
                await until(lambda: it.tried("failed"), "it waits, and is on disk")
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
                )
                hook.status = 200
                for number in range(1, 40):
                    it.outbox.hear(escalated(number))
                    await until(lambda n=number: len(hook.taken) > n, "it is taken")  # type: ignore[misc]
                assert len(it.outbox._unsaved) <= 6
                works_again()
            await until(lambda: not it.outbox._is_unsaved, "it is written down")
        async with sending(tmp_path, hook.url) as it:
            await it.queued(0)
    assert len({one.id for one in hook.taken}) == len(hook.taken) == 40


@awaited
async def test_a_file_that_breaks_or_cannot_be_had_keeps_nothing_from_being_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    (tmp_path / FILE).mkdir()
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
            (tmp_path / FILE).rmdir()
            await until(lambda: not it.outbox._is_unsaved, "it is on disk")
            assert it.outbox._file.path.stat().st_mode & 0o777 == 0o600


@awaited
async def test_a_damaged_file_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(b"this is no database" * 200)
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
    assert len(list(tmp_path.glob(f"{FILE}.damaged-*"))) == 1
    assert "set" not in caplog.text or f"{FILE}.damaged-" in caplog.text


@awaited
async def test_a_disk_that_hangs_keeps_neither_alerts_nor_the_end_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is a pipe that nobody reads: to open it takes for ever."""
    monkeypatch.setattr(module, "SAVE_S", 0.05)
    monkeypatch.setattr(module, "END_S", 0.2)
    os.mkfifo(tmp_path / "hangs")
    with webhook() as hook:
        it = Sending(tmp_path, webhook_url=hook.url)
        monkeypatch.setattr(it.outbox._file, "read", (tmp_path / "hangs").read_text)
        async with it.outbox.running():
            it.outbox.hear(escalated(0))
            await taken(hook, 1)
            assert (await it.outbox.view())["disk_error"] == "it does not answer"
        await asyncio.to_thread((tmp_path / "hangs").write_text, "")  # let the thread go


@awaited
async def test_hive_s_end_lets_go_out_what_was_just_heard(tmp_path: Path) -> None:
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0, "emergency"))
    assert len(hook.taken) == 1


@awaited
async def test_what_nobody_foresaw_ends_neither_the_outbox_nor_hive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    with webhook() as hook:
        async with sending(tmp_path, hook.url) as it:
            it.outbox.hear(escalated(0, context={"odd": object()}, began_at="no time at all"))
            it.outbox.hear(escalated(1))
            await taken(hook, 1)
    assert "nobody foresaw" in caplog.text
    assert hook.taken[0].alert["labels"]["worker"] == "llama-1"


@awaited
async def test_the_view_shows_no_secret(tmp_path: Path) -> None:
    """(R249)"""
    with webhook(status=500) as hook:
        async with sending(tmp_path, hook.url, webhook_token="hush-hush") as it:
            it.outbox.hear(escalated())
            await until(lambda: it.tried("failed"), "a try")
            view = await it.outbox.view()
    text = json.dumps(view)
    assert view["last_error"] == "HTTP 500"
    assert view["waiting"] == 1
    assert view["messages"][0]["attempts"] >= 1
    assert "hush" not in text
    assert "127.0.0.1" not in text
