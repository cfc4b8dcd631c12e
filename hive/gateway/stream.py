"""The event stream: what hive announces, as server-sent events that can be resumed.

And `Streams`, which ends what would never end by itself.
"""

import asyncio
import json
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime

from aiohttp import web
from msgspec.structs import asdict

from hive.errors import HiveError, RequestCancelled
from hive.events import (
    DaemonMoved,
    Event,
    RequestEnded,
    WorkerMoved,
)
from hive.gateway.answer import ClientLeft
from hive.gateway.traffic import Passage
from hive.policy.redaction import for_clients, without_secrets

KEPT = 1000  # events that a client can resume from
BACKLOG = 1000  # events that a slow client may be behind before it is dropped
LAST_S = 2.0  # for a client to take the rest of a stream that hive ends


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


class Streams:
    """Answers that only their client ends, event streams and followed logs: each can be ended here."""

    def __init__(self, admit: Callable[[web.Request], object]) -> None:
        """`admit` raises a HiveError for who may not read."""
        self._admit = admit
        self._open: set[_Stream] = set()
        self.closing = asyncio.Event()  # hive stops

    @asynccontextmanager
    async def open(
        self, request: web.Request, response: web.StreamResponse, *, is_endless: bool = True
    ) -> AsyncIterator[None]:
        """Prepare `response` for the block to write to, and send its end afterwards.

        The block ends early when its request is cancelled or its key revoked, and, if it is
        endless, soon when hive stops. Raises ClientLeft when the client does not take what it got.
        """
        self._admit(request)  # again: what was read for it before took time
        passage: Passage = request["passage"]
        life = asyncio.timeout(None)
        stream = _Stream(request, passage, life, is_endless=is_endless)
        try:
            async with life:
                self._open.add(stream)
                if self.closing.is_set():
                    stream.must_end()
                with passage.ended_by(stream):
                    await response.prepare(request)
                    yield
        except TimeoutError:
            if not life.expired():
                raise
            if stream.is_behind:  # it would not take the end either
                raise ClientLeft from None
        finally:
            self._open.discard(stream)
        try:
            async with asyncio.timeout(LAST_S):
                await response.write_eof()
        except TimeoutError as exc:
            raise ClientLeft from exc

    def judge(self) -> None:
        """Other keys are in force: end the streams of those that may not read any more."""
        for stream in list(self._open):
            try:
                self._admit(stream.request)
            except HiveError as exc:
                stream.end(RequestCancelled(f"Its key may not read on: {exc.message}"))

    def close(self) -> None:
        """hive stops: who reads gets what is left."""
        self.closing.set()
        for stream in self._open:
            stream.must_end()


class _Stream:
    """One that is open. Its time is up when it is ended: so it ends wherever it waits."""

    def __init__(
        self, request: web.Request, passage: Passage, life: asyncio.Timeout, *, is_endless: bool
    ) -> None:
        self.request = request
        self._passage, self._life, self._is_endless = passage, life, is_endless
        self._is_over = False

    @property
    def is_behind(self) -> bool:
        """The client has not taken all that was written."""
        transport = self.request.transport
        return transport is None or transport.get_write_buffer_size() > 0

    def end(self, cause: Exception) -> None:
        if self._is_over or self._life.expired():
            return
        self._is_over = True
        if isinstance(cause, HiveError):
            self._passage.code = cause.code
        self._life.reschedule(asyncio.get_running_loop().time())

    def must_end(self) -> None:
        if self._is_endless and not (self._is_over or self._life.expired()):
            self._life.reschedule(asyncio.get_running_loop().time() + LAST_S)
