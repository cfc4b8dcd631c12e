"""A client's connection, for whoever writes to it by hand, and what aiohttp is told of that."""

import asyncio
import functools
import select
from typing import Protocol, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest

LOOK_S = 0.1  # between two looks whether a client that hive does not read from is still there


class Writer(Protocol):
    """Who writes to a client."""

    def full(self) -> None:
        """The client does not read: write no more than must be."""

    def has_room(self) -> None:
        """It has read."""


class Line(asyncio.Protocol):
    """Stands before aiohttp's own protocol and hands everything on to it.

    aiohttp tells only its own writers when a connection is full; this one tells the relay, too.
    """

    __slots__ = ("_inner", "is_full", "writer")

    def __init__(self, inner: asyncio.Protocol) -> None:
        self._inner = inner
        self.is_full = False
        self.writer: Writer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self.is_full = True
        self._inner.pause_writing()
        if self.writer is not None:
            self.writer.full()

    def resume_writing(self) -> None:
        self.is_full = False
        self._inner.resume_writing()
        if self.writer is not None:
            self.writer.has_room()


def line_of(transport: asyncio.Transport) -> Line:
    """The line that a request came on; hive/gateway/listener.py makes all of them."""
    return cast(Line, transport.get_protocol())


class Leaving:
    """Ends the connection of a client that has left while hive does not read from it.

    Where nothing is read no end is seen either; the kernel is asked, from time to time. It knows
    of a reset, and of an end that is not behind more bytes than it takes.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._kernel = select.poll()
        self._kernel.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        self._timer: asyncio.TimerHandle | None = None
        self._look()

    def _look(self) -> None:
        if self._transport.is_closing():
            return
        if self._kernel.poll(0):
            self._transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __repr__(self) -> str:
        return f"<Leaving {'looked for' if self._timer else 'not looked for'}>"


class Sent(web.StreamResponse):
    """An answer whose bytes are on their way already: aiohttp has nothing left to do."""

    def __init__(self, status: int, *, is_kept: bool) -> None:
        super().__init__(status=status)
        self._stays = is_kept

    @property
    def prepared(self) -> bool:
        return True

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can carry another request."""
        return self._stays

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


@functools.lru_cache(512)
def sent(status: int, *, is_kept: bool) -> Sent:
    """Nothing of it changes, so one is enough for all answers that are alike."""
    return Sent(status, is_kept=is_kept)
