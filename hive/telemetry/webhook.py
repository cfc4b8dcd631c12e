"""The alerts' webhook: a message in Alertmanager's words, a try to send it, and the pause after it.

Nothing is kept here: what is sent, in which order and until when is the outbox's (telemetry/outbox).
"""

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import aiohttp

from hive.events import Escalated
from hive.policy.escalation import Subject
from hive.policy.retries import RetryPolicy, until_taken
from hive.settings import Alerts, open_regular

LEAST_S = 1.0  # between two tries, whatever is heard meanwhile
ANSWER_BYTES = 4096  # of an answer's body; nobody reads them
TOKEN_BYTES = 4096
REPEATED = "X-Hive-Repeat"  # has no delivery: whoever wants each thing once leaves it out
WEBHOOK = Subject("webhook")
CREDENTIALS = ("HTTP 401", "HTTP 403")
# Of 4xx: the webhook means later, or its operator can correct hive's credentials.
_LATER = (401, 403, 408, 429)


class Tried(StrEnum):
    """What a try came to."""

    SENT = "sent"
    FAILED = "failed"
    DROPPED = "dropped"


class Sender:
    """Posts one thing after the other, and knows how often in a row the webhook did not take it."""

    def __init__(self, settings: Alerts, chance: Callable[[], float] = random.random) -> None:
        self._settings, self._chance = settings, chance
        self._url = settings.webhook_url.get_secret_value()
        self._policy: RetryPolicy = until_taken(settings.retry_max_s)
        self._session: aiohttp.ClientSession  # while it is connected
        self._failures = 0  # one after the other
        self._pause_s = 0.0  # after the last of them
        self._next_try_at = 0.0  # seconds since 1970
        self._fresh = asyncio.Event()  # something that was never tried

    @property
    def is_on(self) -> bool:
        return bool(self._url)

    @property
    def is_failing(self) -> bool:
        """Whether the last message was not taken; a repeat does not count."""
        return self._failures > 0

    @property
    def next_try_s(self) -> float:
        """Until then; 0 where it is not waited for."""
        return max(0.0, self._next_try_at - time.time())

    def apply(self, settings: Alerts) -> None:
        """How is sent what is sent from now on, but for where to."""
        self._settings = settings
        self._policy = until_taken(settings.retry_max_s)
        self.hurry()  # the token may be another one

    def hurry(self) -> None:
        """The pause is over, once LEAST_S of it are."""
        self._fresh.set()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Nothing is sent without. No cookies, no proxy of the environment, no kept connection."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "hive", "Content-Type": "application/json"},
        ) as self._session:
            yield

    async def send(self, delivery: str, body: str) -> tuple[Tried, str]:
        """Try a message once: what came of it, and why it was not taken."""
        headers = {"Idempotency-Key": delivery, "X-Hive-Delivery": delivery}
        outcome, why = await self._post(body, headers, self._settings.timeout_s)
        if outcome is Tried.FAILED:
            self._failures += 1
            self._pause_s = self._policy.delay_s(self._failures, self._chance())
            self._next_try_at = time.time() + self._pause_s
        else:
            self._failures, self._next_try_at = 0, 0.0
        return outcome, why

    async def repeat(self, alerts: list[dict[str, Any]], timeout_s: float) -> tuple[Tried, str]:
        """Say in one list what is open. Whatever comes of it, messages are tried as before."""
        return await self._post(json.dumps(alerts), {REPEATED: "true"}, timeout_s)

    async def pause(self) -> None:
        """After a try that failed. A new alert is no reason to wait for the end of a long one."""
        self._fresh.clear()
        least_s = min(LEAST_S, self._pause_s)
        await asyncio.sleep(least_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_s - least_s):
                await self._fresh.wait()

    async def _post(
        self, body: str, headers: dict[str, str], timeout_s: float
    ) -> tuple[Tried, str]:
        """What came of it, and why it was not taken: never a host, a path or what was answered."""
        try:
            if token := self._token():
                headers["Authorization"] = f"Bearer {token}"
            async with self._session.post(
                self._url,
                data=body.encode(),
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as answer:
                await answer.content.read(ANSWER_BYTES)
                status = answer.status
        except TimeoutError:
            return Tried.FAILED, f"no answer within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return Tried.FAILED, _reason(exc)
        if 200 <= status < 300:  # noqa: PLR2004
            return Tried.SENT, ""
        is_final = 400 <= status < 500 and status not in _LATER  # noqa: PLR2004
        return Tried.DROPPED if is_final else Tried.FAILED, f"HTTP {status}"

    def _token(self) -> str:
        """Raises OSError, ValueError where the file does not hold one."""
        path = self._settings.webhook_token_file
        if path is None:
            return self._settings.webhook_token.get_secret_value()
        with open_regular(path) as file:
            token = file.read(TOKEN_BYTES + 1).decode("ascii").strip()
        if not token or len(token) > TOKEN_BYTES or not token.isprintable() or " " in token:
            raise ValueError("webhook_token_file holds no token")
        return token


def _reason(exc: Exception) -> str:
    """In a few words; a file's name or an address may be in the exception's own."""
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return "its name cannot be resolved"
    if isinstance(exc, aiohttp.ClientConnectorError):
        # asyncio's own words have the address in them.
        return os.strerror(exc.errno) if exc.errno else "no connection"
    if isinstance(exc, OSError) and exc.filename:
        return f"webhook_token_file: {os.strerror(exc.errno or 0)}"
    if isinstance(exc, ValueError) and not isinstance(exc, aiohttp.ClientError):
        return "webhook_token_file holds no token"
    return type(exc).__name__


# ── Alertmanager's words ──────────────────────────────────────────────────────────────────────────


def alert_name(rule: str) -> str:
    """HiveBreakerOpen of breaker_open."""
    return "Hive" + "".join(word.capitalize() for word in rule.split("_"))


def alert_of(event: Escalated, settings: Alerts) -> dict[str, Any]:
    """As Alertmanager's API v2 takes it. It has no end: it may be long on its way."""
    name = alert_name(event.rule)
    labels = {
        **settings.labels,
        "alertname": name,
        "severity": event.level,
        "rule": event.rule,
        "operation": event.operation,
        "model": event.model,
        "worker": event.worker,
        "device": event.device,
        "kind": str(event.context.get("kind", "")),
    }
    began = datetime.fromisoformat(event.began_at)
    return {
        # To Alertmanager an empty label is none.
        "labels": {key: value for key, value in labels.items() if value},
        "annotations": {
            "summary": event.message,
            "description": _described(event),
            "recommended_action": event.recommended_action,
            "runbook_url": f"{settings.runbook_url}#{name.lower()}",
            "error_code": event.code,
            "timestamp": event.began_at,
        },
        "startsAt": stamp(began),
    }


def _described(event: Escalated) -> str:
    """The message with its numbers: calls 24, failures 13."""
    facts = ", ".join(f"{key} {value}" for key, value in event.context.items())
    code = f" ({event.code})" if event.code else ""
    return f"{event.message}{code}{f' {facts}.' if facts else ''} {event.recommended_action}"


def stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
