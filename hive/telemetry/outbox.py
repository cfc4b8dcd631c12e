"""Escalations on their way to the alerts' webhook: written down first, then sent until it took them.

What counts as queued is on disk (storage/outbox) and is sent once: the row is marked after the
answer. Only who is killed between the two sends it again, the same bytes under the same id. A disk
that is full or hangs is told and tried again; what it cannot keep is sent all the same, from memory.
Neither the disk nor the webhook is ever waited for by anything else of hive.

What is open is repeated every REPEAT_S, as Alertmanager wants it of its clients: it keeps alerts in
memory. A repeat is no message: it is not written down, has no id and is not tried again.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hive.errors import Severity
from hive.events import AlertTried, Announcer, Escalated, EscalationResolved, Event, OutboxCounted
from hive.policy.escalation import LEVELS
from hive.settings import Alerts
from hive.storage.damage import is_broken
from hive.storage.outbox import Kept, Message, OutboxFile, Progress
from hive.storage.threads import in_its_own_thread
from hive.telemetry.webhook import WEBHOOK, Sender, Tried, alert_of, stamp

log = logging.getLogger(__name__)

T = TypeVar("T")
SAVE_S = 2.0  # for the disk; what takes longer is not waited for
AGAIN_S = 5.0  # until a disk that failed is tried again
END_S = 3.0  # that hive's end gives what is still to be written and sent
REPEAT_S = 120.0  # what is open is told again; less than the 5 minutes after which it would lapse
LASTS = timedelta(seconds=5 * REPEAT_S)  # what was repeated, without another repeat
# What is open when hive ends: nobody repeats it, and that hive is gone does not make it over.
LASTS_ALONE = timedelta(days=30)
TOLD = 20  # of the messages that are done
_DISK = (sqlite3.Error, OSError)


class Outbox:
    """The listener, the file and what waits for the sender. Without a webhook_url it does nothing."""

    def __init__(self, settings: Alerts, directory: Path, announcer: Announcer) -> None:
        self._settings, self._announcer = settings, announcer
        self._sender = Sender(settings)
        self._least = LEVELS.index(Severity(settings.level))
        self._file = OutboxFile(directory)
        self._is_read = False
        self._heard: deque[Escalated | EscalationResolved] = deque()
        self._coming: list[Message] = []  # that the disk was not offered yet
        self._waiting: list[Message] = []  # in order
        self._alerts: dict[str, dict[str, Any]] = {}  # that the webhook is to be told the end of
        self._earlier: dict[str, dict[str, Any]] = {}  # such of an earlier life, as it left them
        # Whose end is on its way, or was dropped: its delivery, and the alert that it ends.
        self._ending: dict[str, tuple[str, dict[str, Any]]] = {}
        self._looks_anew = False
        self._number = 0
        # What the file does not have yet.
        self._unsaved: dict[str, Message] = {}
        self._opened: dict[str, str] = {}
        self._closed: set[str] = set()
        self._working: asyncio.Future[Any] | None = None  # the last call of the file
        self._disk_failed = ""  # why, where the disk failed last
        self._repeat_at = 0.0  # monotonic
        self._repeat_failed = False
        self._news = asyncio.Event()
        self._work = asyncio.Event()
        self._turn = asyncio.Lock()  # of the file

    @property
    def is_on(self) -> bool:
        return self._sender.is_on

    def apply(self, settings: Alerts) -> None:
        """A reload: how is sent what is sent from now on. Where to needs a restart."""
        self._settings = settings
        self._least = LEVELS.index(Severity(settings.level))
        self._sender.apply(settings)

    def hear(self, event: Event) -> None:
        """Keep what is to be sent; costs nothing for any other event."""
        if not self.is_on or not isinstance(event, Escalated | EscalationResolved):
            return
        if event.subject == str(WEBHOOK):
            return  # that the webhook refuses hive cannot be told to it
        if isinstance(event, Escalated) and LEVELS.index(Severity(event.level)) < self._least:
            return  # the end of what was sent is told, whatever the level is by then
        self._heard.append(event)
        self._news.set()
        self._sender.hurry()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while the block runs; at its end END_S more for what is not written or sent yet."""
        if not self.is_on:
            yield
            return
        self._news.set()  # what an earlier life has left
        self._repeat_at = time.monotonic() + REPEAT_S
        try:
            async with self._sender.connected(), asyncio.TaskGroup() as tasks:
                working = [
                    tasks.create_task(_for_ever(self._saving), name="outbox: save"),
                    tasks.create_task(_for_ever(self._sending), name="outbox: send"),
                ]
                try:
                    yield
                finally:
                    await self._finished()
                    for one in working:
                        one.cancel()
                    await asyncio.wait(working)
                    if not self._waiting:
                        await self._repeat(LASTS_ALONE, END_S)
        finally:
            async with self._turn:
                await self._in_thread(self._file.close)

    def look_anew(self) -> None:
        """From now on hive finds what is so: what an earlier life has left open, and is not so
        again, is told to be over."""
        self._looks_anew = True
        self._news.set()

    async def view(self) -> dict[str, Any]:
        """For operators: what waits, and why; never the URL."""
        first = self._waiting[0] if self._waiting else None
        done: list[Message] = []
        if self.is_on and self._is_read and not self._disk_failed:
            async with self._turn:
                done = await self._in_thread(partial(self._file.done, TOLD)) or []
        return {
            "enabled": self.is_on,
            "waiting": len(self._waiting),
            "oldest_at": first.queued_at if first else None,
            "attempts": first.attempts if first else 0,
            "last_error": first.last_error if first else "",
            "next_try_seconds": round(self._sender.next_try_s, 1) if first else 0.0,
            "disk_error": self._disk_failed,
            "messages": [_view(one) for one in [*reversed(self._waiting[-TOLD:]), *done][:TOLD]],
        }

    # ── messages ────────────────────────────────────────────────────────────────────────────────

    def _take(self, event: Escalated | EscalationResolved) -> None:
        key = _key(event)
        if isinstance(event, Escalated):
            alert = alert_of(event, self._settings)
            self._alerts[key] = alert
            self._opened[key] = json.dumps(alert)
            self._closed.discard(key)
            self._earlier.pop(key, None)
            self._ending.pop(key, None)
            self._add(event.rule, event.subject, event.level, alert, is_resolved=False)
        elif key in self._alerts:
            self._resolve(self._alerts.pop(key), event.rule, event.subject, event.level)

    def _resolve(
        self, alert: dict[str, Any], rule: str, subject: str, level: str, why: str = ""
    ) -> None:
        """Queue its end; it is open in the file until that was sent."""
        end = {**alert, "endsAt": stamp(datetime.now(UTC))}
        if why:
            end["annotations"] = {**alert["annotations"], "resolved": why}
        message = self._add(rule, subject, level, end, is_resolved=True)
        self._ending[_key(message)] = message.delivery, alert

    def _add(
        self, rule: str, subject: str, level: str, alert: dict[str, Any], *, is_resolved: bool
    ) -> Message:
        self._number = max(self._number + 1, time.time_ns())
        message = Message(
            delivery=secrets.token_hex(16),
            number=self._number,
            rule=rule,
            subject=subject,
            level=level,
            is_resolved=is_resolved,
            body=json.dumps([alert]),
            queued_at=time.time(),
        )
        self._coming.append(message)
        self._unsaved[message.delivery] = message
        return message

    def _queue(self) -> None:
        """What was offered to the disk may be sent; what is too much is dropped."""
        self._waiting += self._coming
        self._coming.clear()
        while len(self._waiting) > self._settings.max_waiting:
            least = min(
                self._waiting, key=lambda one: (LEVELS.index(Severity(one.level)), one.number)
            )
            self._done(least, Progress.DROPPED)
            least.last_error = "too many were waiting"
            self._tell(least, Tried.DROPPED)
        self._count()
        if self._waiting:
            self._work.set()

    def _done(self, message: Message, how: Progress) -> None:
        message.state = how
        self._waiting.remove(message)
        self._unsaved[message.delivery] = message
        key = _key(message)
        if how is Progress.SENT and self._ending.get(key, ("",))[0] == message.delivery:
            del self._ending[key]
            self._opened.pop(key, None)
            self._closed.add(key)
        done = [one for one in self._unsaved.values() if one.state is not Progress.WAITING]
        # A disk that fails for long has never had the newest: those that it has are older, and the
        # next life would send them again.
        for one in sorted(done, key=lambda one: one.number)[self._settings.max_waiting :]:
            del self._unsaved[one.delivery]

    def _tell(self, message: Message, outcome: Tried) -> None:
        self._announcer.announce(
            AlertTried(
                delivery=message.delivery,
                rule=message.rule,
                subject=message.subject,
                level=message.level,
                outcome=str(outcome),
                why=message.last_error if outcome is not Tried.SENT else "",
                attempts=message.attempts,
                waiting=len(self._waiting),
            )
        )
        self._count()

    def _count(self) -> None:
        self._announcer.announce(OutboxCounted(len(self._waiting)))

    # ── the disk ────────────────────────────────────────────────────────────────────────────────

    async def _saving(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN_S if self._is_unsaved else None):
                await self._news.wait()
        await self._save()

    @property
    def _is_unsaved(self) -> bool:
        return bool(not self._is_read or self._unsaved or self._opened or self._closed)

    async def _save(self) -> None:
        """Write what was heard, and what the disk did not take before; then it may be sent."""
        self._news.clear()
        while self._heard:
            self._take(self._heard.popleft())
        if not self._is_read:
            async with self._turn:
                kept = await self._in_thread(self._file.read)
            if kept is not None:
                self._adopt(kept)
        if self._is_read and self._looks_anew:
            self._end_what_was()
        await self._write_if_read()
        self._queue()

    def _adopt(self, kept: Kept) -> None:
        """What an earlier life has left goes first; what it told is open until hive looks anew."""
        self._is_read = True
        if kept.set_aside:
            log.error(
                "the outbox of alerts cannot be used (%s); what was in it is not sent",
                kept.set_aside,
            )
        self._waiting[:0] = kept.waiting
        self._number = max([self._number, *(one.number for one in kept.waiting)])
        ends = {_key(one): one for one in kept.waiting}  # the last of each
        for key, text in kept.open.items():
            if key in self._alerts or key in self._ending:
                continue  # it is so again
            try:
                alert = json.loads(text)
                Severity(alert["labels"]["severity"])
            except (ValueError, KeyError, TypeError):  # not as hive writes it
                self._closed.add(key)
                continue
            if key in ends and ends[key].is_resolved:
                self._ending[key] = ends[key].delivery, alert
            else:
                self._earlier[key] = alert

    def _end_what_was(self) -> None:
        for key, alert in self._earlier.items():
            rule, _, subject = key.partition(":")
            level = alert["labels"]["severity"]
            self._resolve(alert, rule, subject, level, "hive was started anew, and looks anew")
        self._earlier.clear()

    async def _write(self) -> None:
        """All that the file does not have, in one transaction."""
        async with self._turn:
            copies = [replace(one) for one in self._unsaved.values()]
            opened, closed = dict(self._opened), set(self._closed)
            if not (copies or opened or closed):
                return
            write = partial(self._file.write, copies, opened, closed)
            if not await self._in_thread(lambda: write() or True):
                return
        for copy in copies:
            # What has changed meanwhile is written again.
            if self._unsaved.get(copy.delivery) == copy:
                del self._unsaved[copy.delivery]
        for key, text in opened.items():
            if self._opened.get(key) == text:
                del self._opened[key]
        self._closed -= closed

    async def _in_thread(self, work: Callable[[], T]) -> T | None:
        """What came of it; None where the disk failed or hangs, which is told once.

        Whoever calls has the turn. While the disk hangs nothing more is asked of it.
        """
        if self._working is not None and not self._working.done():
            return None
        self._working = asyncio.ensure_future(in_its_own_thread(work))
        await asyncio.wait({self._working}, timeout=SAVE_S)
        if not self._working.done():
            self._working.add_done_callback(self._came_back)
            self._disk("it does not answer")
            return None
        try:
            result: T = self._working.result()
        except _DISK as exc:
            await self._replace(exc)
            self._disk(getattr(exc, "strerror", None) or str(exc))
            return None
        if self._disk_failed:
            log.warning("the outbox of alerts is on disk again")
            self._disk_failed = ""
        return result

    async def _replace(self, exc: Exception) -> None:
        """A file that breaks under hive is set aside; all that is known goes into a new one."""
        if not (self._is_read and is_broken(exc)):
            return
        self._working = asyncio.ensure_future(in_its_own_thread(self._file.put_aside))
        await asyncio.wait({self._working}, timeout=SAVE_S)
        self._unsaved |= {one.delivery: one for one in self._waiting}
        ending = {key: alert for key, (_, alert) in self._ending.items()}
        known = self._earlier | ending | self._alerts
        self._opened = {key: json.dumps(alert) for key, alert in known.items()}

    def _came_back(self, writing: "asyncio.Future[Any]") -> None:
        if not writing.cancelled():
            writing.exception()  # it is done again in any case, and the row is the same
        self._news.set()

    def _disk(self, why: str) -> None:
        if not self._disk_failed:
            log.error(
                "the outbox of alerts cannot be written (%s): alerts are sent all the same, and are "
                "lost if hive ends before; free the disk under server.state_dir",
                why,
            )
        self._disk_failed = why

    # ── what is sent ────────────────────────────────────────────────────────────────────────────

    async def _sending(self) -> None:
        """The next message, once there is one; or a repeat, once it is time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._repeat_at):
                await self._work.wait()
        # A webhook that does not take what waits is not asked for more.
        if time.monotonic() >= self._repeat_at and not (self._waiting and self._sender.is_failing):
            await self._repeat(LASTS, self._settings.timeout_s)
            return
        if not self._waiting:
            self._work.clear()
            return
        message = self._waiting[0]
        message.tried_at = time.time()
        message.attempts += 1
        await self._tried(message, *await self._sender.send(message.delivery, message.body))

    async def _repeat(self, lasts: timedelta, timeout_s: float) -> None:
        """Say in one list what is open, but for what a message is on its way about."""
        self._repeat_at = time.monotonic() + REPEAT_S
        on_its_way = {_key(one) for one in (*self._waiting, *self._coming, *self._heard)}
        ends_at = stamp(datetime.now(UTC) + lasts)
        alerts = [
            {**alert, "endsAt": ends_at}
            for key, alert in (self._earlier | self._alerts).items()
            if key not in on_its_way
        ]
        if not alerts:
            return
        how, why = await self._sender.repeat(alerts, timeout_s)
        if how is not Tried.SENT and not self._repeat_failed:
            log.warning("what is open could not be told again to the alerts' webhook (%s)", why)
        self._repeat_failed = how is not Tried.SENT

    async def _tried(self, message: Message, outcome: Tried, why: str) -> None:
        message.last_error = why
        self._unsaved[message.delivery] = message
        if outcome is Tried.FAILED:
            await self._write_if_read()
            self._tell(message, outcome)
            self._drop_what_is_old()
            await self._sender.pause()
            return
        if message in self._waiting:  # it may have made room meanwhile
            self._done(message, Progress.SENT if outcome is Tried.SENT else Progress.DROPPED)
        await self._write_if_read()
        if self._is_unsaved:
            self._news.set()  # who saves tries it again, as long as it takes
        self._tell(message, outcome)

    async def _write_if_read(self) -> None:
        if self._is_read:
            await self._write()

    def _drop_what_is_old(self) -> None:
        """After a try that failed: a webhook that is there again gets what waited, however old."""
        least = time.time() - self._settings.keep_s
        for message in [one for one in self._waiting if one.queued_at < least]:
            self._done(message, Progress.DROPPED)
            message.last_error = message.last_error or "it has waited too long"
            self._tell(message, Tried.DROPPED)
        self._news.set()

    async def _finished(self) -> None:
        """Return when all is written, and all is sent that the webhook takes; END_S at most."""

        def is_done() -> bool:
            is_kept = not (self._heard or self._coming or self._is_unsaved)
            return is_kept and (not self._waiting or self._sender.is_failing)

        until = time.monotonic() + END_S
        while not is_done() and time.monotonic() < until:
            self._news.set()
            await asyncio.sleep(0.02)
        if self._waiting:
            log.warning("%d alerts are sent at hive's next start", len(self._waiting))

    def __repr__(self) -> str:
        return f"<Outbox {len(self._waiting)} waiting, {len(self._unsaved)} not on disk>"


def _key(about: Message | Escalated | EscalationResolved) -> str:
    return f"{about.rule}:{about.subject}"


async def _for_ever(step: Callable[[], Awaitable[None]]) -> None:
    """The boundary of the outbox's tasks: what nobody foresaw ends neither them nor hive."""
    while True:
        try:
            await step()
        except Exception:
            log.exception("the outbox of alerts met what nobody foresaw")
            await asyncio.sleep(AGAIN_S)


def _view(message: Message) -> dict[str, Any]:
    return {
        "delivery": message.delivery,
        "rule": message.rule,
        "subject": message.subject,
        "level": message.level,
        "resolved": message.is_resolved,
        "state": str(message.state),
        "queued_at": message.queued_at,
        "attempts": message.attempts,
        "last_error": message.last_error,
    }
