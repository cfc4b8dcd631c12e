"""The requests that are in flight, by id, and what became of each."""

import asyncio
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from aiohttp import web

from hive.errors import Conflict, NotFound, RequestCancelled
from hive.events import Announcer, RequestEnded
from hive.gateway.clock import Clock
from hive.workers.life import User

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
ABORTED = 499  # the client left; never sent, only logged
REMEMBERED_S = 600.0  # how long an ended request is known to DELETE …
REMEMBERED = 100_000  # … and how many of them at most


class Witness(Protocol):
    """Who hears what is answered, as it is answered."""

    def begins(self) -> None:
        """An answer begins; of an earlier attempt nothing counts."""

    def heard(self, part: bytes) -> None:
        """A part of the body, without its framing."""

    def ended(self, status: int, *, is_stream: bool) -> None:
        """The answer is whole; its client has perhaps got the end of it at this moment."""


@dataclass(slots=True)
class Passage:
    """One request on its way through hive. Times are monotonic seconds, sizes bytes."""

    request_id: str
    method: str
    path: str
    key: str | None = None
    model: str | None = None
    worker: str | None = None
    status: int | None = None
    code: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    first_byte: float | None = None
    clock: Clock | None = None  # of inference, once its model is known
    cause: Exception | None = None  # it was cancelled before it had a clock
    user: User | None = None  # what it waits for before it has a clock, or without one
    # While the client reads nothing: whether it has read since this was asked last.
    has_read: Callable[[], bool] | None = None
    is_uploading: bool = False  # hive waits for more of its body, with an engine at hand
    witness: Witness | None = None  # who is to hear the whole answer: its session
    blamed: set[str] = field(default_factory=set)  # workers that failed it
    _traffic: "Traffic | None" = None  # that it is in, until it ends

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """It is over, however it ended."""
        if self._traffic is not None:
            self._traffic.ends(self)

    def cancel(self, cause: Exception | None = None) -> None:
        """End it, at once or where it waits next."""
        self.cause = cause or RequestCancelled("The request was cancelled as it was asked for.")
        if self.clock is not None:
            self.clock.cancel(self.cause)
        elif self.user is not None:
            self.user.end(self.cause)

    @contextmanager
    def ended_by(self, user: User) -> Iterator[None]:
        """What a cancel ends while the block runs. Raises the cause of an earlier one."""
        if self.cause is not None:
            raise self.cause
        self.user = user
        try:
            yield
        finally:
            self.user = None

    def view(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "worker": self.worker,
            "key": self.key,
            "began": self.began_at,
            "seconds": round(now - self.began, 3),
            "phase": "queued"
            if self.worker is None
            else "waiting"
            if self.first_byte is None
            else "answering",
            "bytes_out": self.bytes_out,
        }


class Traffic:
    """Who is in flight. Ids are unique among them."""

    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer
        self._passages: dict[str, Passage] = {}
        self._ended: OrderedDict[str, tuple[float, str | None]] = OrderedDict()
        self._emptied = asyncio.Event()

    def passage(self, request: web.Request) -> Passage:
        """Register a request until the `with` block of its passage ends, which is announced.

        A usable X-Request-Id is kept, any other replaced. Raises Conflict, inside the passage
        that gets an id of its own, when the id is already in flight.
        """
        asked = request.headers.get("X-Request-Id", "")
        is_taken = asked in self._passages
        request_id = asked if _ID.match(asked) and not is_taken else os.urandom(16).hex()
        passage = Passage(request_id, request.method, request.path, _traffic=self)
        self._passages[request_id] = passage
        return passage

    def ends(self, passage: Passage) -> None:
        """It is in flight no longer."""
        del self._passages[passage.request_id]
        if not self._passages:
            self._emptied.set()
        self._remember(passage)
        self._announce_end(passage)

    def refuse_duplicate(self, request: web.Request, passage: Passage) -> None:
        asked = request.headers.get("X-Request-Id", "")
        if asked in self._passages and asked != passage.request_id:
            raise Conflict(
                "A request with this X-Request-Id is in flight.",
                action="Use a new X-Request-Id for each request, or leave it out.",
            )

    def cancel(self, request_id: str, key: str | None, *, may_all: bool) -> None:
        """End a request that `key` may end; one that ended within REMEMBERED_S is fine as it is.

        Raises NotFound for any other.
        """
        passage = self._passages.get(request_id)
        if passage is not None and (may_all or passage.key == key):
            passage.cancel()
            return
        ended_at, owner = self._ended.get(request_id, (-REMEMBERED_S, None))
        if time.monotonic() - ended_at >= REMEMBERED_S or not (may_all or owner == key):
            raise NotFound(
                "No such request is in flight, or ended lately.",
                action="Name a request by its X-Request-Id; 'GET /hive/v1/requests' lists them.",
            )

    async def ended(self) -> None:
        """Return when nothing is in flight."""
        while self._passages:
            self._emptied.clear()
            await self._emptied.wait()

    def cancel_all(self, cause: Exception) -> None:
        """End everything that is in flight."""
        for passage in self._passages.values():
            passage.cancel(cause)

    def _remember(self, passage: Passage) -> None:
        if passage.clock is None and passage.cause is None:
            return
        now = time.monotonic()
        self._ended[passage.request_id] = now, passage.key
        self._ended.move_to_end(passage.request_id)
        while (
            len(self._ended) > REMEMBERED
            or now - next(iter(self._ended.values()))[0] > REMEMBERED_S
        ):
            self._ended.popitem(last=False)

    def _announce_end(self, passage: Passage) -> None:
        now = time.monotonic()
        first = passage.first_byte
        self._announcer.announce(
            RequestEnded(
                passage.request_id,
                passage.method,
                passage.path,
                passage.status or ABORTED,
                passage.model,
                passage.worker,
                passage.code,
                passage.key,
                now - passage.began,
                None if first is None else first - passage.began,
                passage.bytes_in,
                passage.bytes_out,
            )
        )

    def views(self, key: str | None = None) -> list[dict[str, Any]]:
        """What is in flight, oldest first; with `key` only that key's."""
        return [p.view() for p in self._passages.values() if key is None or p.key == key]

    def __len__(self) -> int:
        return len(self._passages)

    def __repr__(self) -> str:
        return f"<Traffic {len(self)} in flight>"
