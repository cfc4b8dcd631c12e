"""Connections to an engine's socket for clients' requests: bytes in, bytes out, and the pool of them.

No task, future or reader for what comes: a protocol hands it on as the kernel gave it. A connection
carries one request at a time and is used again only after an answer that ended exactly where its
framing said, with nothing behind it; whatever else happens on it, it is closed.
"""

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import Protocol, cast

from hive.policy.framing import MOST_HEAD, Head, Malformed, read_head

# An engine closes idle ones after 5 s (uvicorn) or more: hive must be the first, or a request could
# be lost on one. A new one costs less than a tenth of a millisecond.
IDLE_S = 0.2
AGAIN_S = 0.005  # between two attempts to get into an engine's backlog
READ_BYTES = 64 * 1024
_SWITCHING = 101  # protocols, which nobody asked for
_OK = 200


class Taker(Protocol):
    """Who gets an answer. `data` says through Wire.release where the answer ends."""

    def begins(self, head: Head) -> None:
        """The head is there, and none of the body."""

    def data(self, data: bytes) -> None:
        """Bytes of the body, framing included, as they came."""

    def broke(self, why: Exception | None) -> None:
        """The connection is gone, or brought what is not HTTP (Malformed); nothing more comes."""


class Wire(asyncio.Protocol):
    """One connection. At most one request is under way on it."""

    def __init__(self, wires: "Wires") -> None:
        self._wires = wires
        self._taker: Taker | None = None
        self._head = b""  # what has come of it; then, for a moment, what is behind it
        self._is_headed = self._answers_head = False
        self._is_kept = self._is_paused = self._is_asked = False
        self._room: asyncio.Future[None] | None = None  # while the engine does not read
        self._spare: socket.socket | None = (
            None  # its descriptor, to read what came before a write failed
        )
        self.is_unwanted = False  # whoever connected waits no more
        self.has_answered = False  # any byte of the current answer came
        self.uses = 0
        self.idle_since = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._wires.is_closed or self.is_unwanted:  # meanwhile
            self._transport.abort()
        else:
            self._wires.opened.add(self)

    def ask(
        self, head: bytes, body: bytes, taker: Taker, *, is_head: bool, is_whole: bool = True
    ) -> None:
        """Send a request, or its beginning; `taker` gets what is answered."""
        self._taker = taker
        self._is_headed = self.has_answered = False
        self._answers_head, self._is_asked = is_head, is_whole
        self.uses += 1
        if not is_whole:
            made = self._transport.get_extra_info("socket")
            self._spare = socket.socket(fileno=os.dup(made.fileno()))
        self._transport.writelines((head, body))  # one system call, and no copy of the body

    async def send(self, data: bytes, *, is_last: bool) -> bool:
        """More of the request, when the engine has room for it; False: it wants no more of it."""
        while self._room is not None:
            await asyncio.shield(self._room)
        if self._taker is None or self._transport.is_closing():
            return False
        self._is_asked = is_last
        self._transport.write(data)
        return True

    def pause_writing(self) -> None:
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    def data_received(self, data: bytes) -> None:
        taker = self._taker
        if taker is None:  # nobody asked for anything
            self.abort()
            return
        try:
            if not self._is_headed:
                self.has_answered = True
                data = self._head + data
                head = self._next_head(data)
                if head is None:
                    return
                taker.begins(head)
                if self._taker is not taker:  # it has no body, or nobody wants it
                    return
                data, self._head = self._head, b""
                if not data:
                    return
            taker.data(data)
        except Malformed as exc:
            self.abort()
            taker.broke(exc)

    def _next_head(self, data: bytes) -> Head | None:
        """The final head, when it is whole; what is behind it is in `_head` then."""
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = read_head(data[: end + 2], answers_head=self._answers_head)
            data = data[end + 4 :]
            if head.status >= _OK:
                self._is_headed, self._is_kept, self._head = True, head.is_kept, data
                return head
            if head.status == _SWITCHING:
                raise Malformed("it switches protocols, which nobody asked for")
        if len(data) > MOST_HEAD:
            raise Malformed("its head is too long")
        self._head = data
        return None

    def release(self, *, is_clean: bool) -> None:
        """The answer has ended; `is_clean` if nothing came behind it."""
        self._taker = None
        # What is left of a request that was answered early would be the next one's beginning.
        if (
            is_clean
            and self._is_kept
            and self._is_asked
            and not self._head
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
        ):
            self.resume()
            self._drop_spare()
            self._wires.put(self)
        else:
            self.abort()

    def pause(self) -> None:
        """Take nothing more from the engine for now: its client does not read."""
        if not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close it at once; the taker hears nothing more. That is how an engine learns of an abort."""
        self._taker = None
        self._drop_spare()
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and self._spare is not None and self._taker is not None:
            exc = self._rest_of_answer(self._spare, exc)
        self._drop_spare()
        self._wires.opened.discard(self)
        self._wires.idle.pop(self, None)
        self.resume_writing()  # whoever waits for room need not wait any more
        taker, self._taker = self._taker, None
        if taker is not None:
            taker.broke(exc)

    def _rest_of_answer(self, spare: socket.socket, why: Exception) -> Exception | None:
        """What an engine said that wants no more of the request, and hung up; a write failed of it.

        None where it said all that it wanted to say, else `why` it broke.
        """
        try:
            while self._taker is not None:
                data = spare.recv(READ_BYTES)
                if not data:
                    return None
                self.data_received(data)
        except OSError:  # that was all
            pass
        return why

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def __repr__(self) -> str:
        return f"<Wire {'busy' if self._taker else 'idle'}, {self.uses} uses>"


class Wires:
    """All connections to one engine. The last one that was used is the next one to be used."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)
        self.idle: dict[Wire, None] = {}  # in the order of their last use
        self.opened: set[Wire] = set()
        self.is_closed = False
        self._timer: asyncio.TimerHandle | None = None

    def put(self, wire: Wire) -> None:
        """One that can be used again."""
        wire.idle_since = time.monotonic()
        self.idle[wire] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._tidy)

    def _tidy(self) -> None:
        self._timer = None
        oldest = time.monotonic() - IDLE_S
        while self.idle and (first := next(iter(self.idle))).idle_since <= oldest:
            del self.idle[first]
            first.abort()
        if self.idle:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._tidy)

    def take(self) -> Wire | None:
        """One that is open and was used a moment ago, if there is one."""
        while self.idle:
            wire, _ = self.idle.popitem()
            if not wire.is_closing:
                return wire
        return None

    async def connect(self, seconds: float) -> Wire:
        """A new one. Raises TimeoutError after `seconds`, or OSError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            while True:
                wire = Wire(self)
                try:
                    await loop.create_unix_connection(lambda: wire, self._socket)  # noqa: B023
                except BlockingIOError:  # its backlog is full: it is busy, not gone
                    await asyncio.sleep(AGAIN_S)
                except BaseException:
                    wire.is_unwanted = True
                    self.opened.discard(wire)  # uvloop does not tell a wire of its end then
                    raise
                else:
                    return wire

    def close(self) -> None:
        """The engine is gone: no connection stays."""
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.idle.clear()
        for wire in list(self.opened):
            wire.abort()

    def __repr__(self) -> str:
        return f"<Wires {len(self.opened)} open, {len(self.idle)} idle>"
