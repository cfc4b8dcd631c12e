"""An outbox at work: what it hears, what it announces, and that a webhook took it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hive.events import (
    AlertTried,
    Announcer,
    Escalated,
    EscalationResolved,
    Event,
    OutboxCounted,
)
from hive.settings import Alerts
from hive.telemetry.outbox import Outbox
from tests.doubles.webhook import Webhook
from tests.patience import until

BEGAN = "2026-01-31T12:00:00.123456+00:00"


def escalated(number: int = 0, level: str = "high", **fields: Any) -> Escalated:
    about: dict[str, Any] = {
        "rule": "breaker_open",
        "level": level,
        "subject": f"Worker llama-{number}",
        "operation": "worker",
        "code": "CIRCUIT_BREAKER_OPEN",
        "message": f"The breaker of Worker llama-{number} is open.",
        "recommended_action": "Restart it.",
        "began_at": BEGAN,
        "model": "llama",
        "worker": f"llama-{number}",
        "context": {"failures": 5},
    }
    return Escalated(**(about | fields))


def resolved(number: int = 0, level: str = "high") -> EscalationResolved:
    return EscalationResolved("breaker_open", level, f"Worker llama-{number}", BEGAN, 7.0, 3)


class Sending:
    """An outbox at work, and what it announced."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.events: list[Event] = []
        announcer = Announcer()
        announcer.listen(self.events.append)
        fast = {"retry_max_s": 0.02, "timeout_s": 5}
        self.outbox = Outbox(Alerts(**(fast | settings)), home, announcer)

    def tried(self, outcome: str) -> list[AlertTried]:
        return [e for e in self.events if isinstance(e, AlertTried) and e.outcome == outcome]

    @property
    def waiting(self) -> int:
        """As the metric has it."""
        return [e for e in self.events if isinstance(e, OutboxCounted)][-1].waiting

    async def queued(self, count: int) -> None:
        await until(lambda: self.events and self.waiting == count, f"{count} are queued")


@asynccontextmanager
async def sending(home: Path, url: str, **settings: Any) -> AsyncIterator[Sending]:
    it = Sending(home, webhook_url=url, **settings)
    async with it.outbox.running():
        yield it


async def taken(hook: Webhook, count: int) -> None:
    await until(lambda: len(hook.taken) >= count, f"{count} were taken")
