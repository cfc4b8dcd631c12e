"""The event stream: what hive announces, as server-sent events that can be resumed."""

import asyncio
import json
import re
import secrets
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from msgspec.structs import asdict

from hive.events import (
    DaemonMoved,
    Event,
    RequestEnded,
    WorkerMoved,
)
from hive.policy.redaction import for_clients, without_secrets

KEPT = 1000  # events that a client can resume from
BACKLOG = 1000  # events that a slow client may be behind before it is dropped


def event_name(event: Event) -> str:
    """WorkerMoved is worker_moved."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


class EventStream:
    """Keeps the last events and hands new ones to each open stream.

    Every request has an access line in the log; here only those appear that failed at a worker.
    """

    def __init__(self) -> None:
        self._life = secrets.token_hex(4)  # ids of an earlier life of hive are not ours
        self._number = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._readers: set[asyncio.Queue[bytes | None]] = set()

    def hear(self, event: Event) -> None:
        if isinstance(event, RequestEnded) and not (event.code and event.worker):
            return  # a flood of refusals would drive everything else out of memory
        self._number += 1
        name = event_name(event)
        facts = {"event": name, "at": datetime.now(UTC).isoformat(), **asdict(event)}
        if isinstance(event, WorkerMoved):  # it may quote the engine: redacted as an answer is
            facts["reason"] = for_clients(event.reason)
        text = without_secrets(json.dumps(facts))
        message = f"id: {self._life}-{self._number}\nevent: {name}\ndata: {text}\n\n".encode()
        self._kept.append((self._number, message))
        for queue in list(self._readers):
            if queue.qsize() >= BACKLOG:
                self._readers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(message)
        if isinstance(event, DaemonMoved) and event.state == "stopping":
            self.close()

    @contextmanager
    def reader(self, last_id: str | None) -> Iterator["asyncio.Queue[bytes | None]"]:
        """A queue of messages from after `last_id` on (all that are kept where it is unknown).

        None in the queue ends the stream: hive is stopping, or the reader fell too far behind.
        """
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        for number, message in self._kept:
            if number > self._seen(last_id):
                queue.put_nowait(message)
        self._readers.add(queue)
        try:
            yield queue
        finally:
            self._readers.discard(queue)

    def _seen(self, last_id: str | None) -> int:
        if last_id is None:
            return self._number  # nothing old was asked for
        life, _, number = last_id.partition("-")
        return int(number) if life == self._life and re.fullmatch("[0-9]{1,15}", number) else 0

    def close(self) -> None:
        for queue in self._readers:
            queue.put_nowait(None)
        self._readers.clear()
