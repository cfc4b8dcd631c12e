"""The way of the bytes: a request to its worker's engine, the answer back to the client.

The answer passes unchanged. Its head is held until the first piece of its body is there, so an
engine that dies before saying anything still becomes a proper status; after that an error becomes
the last event of the stream, or, inside an event, a connection closed without its last chunk.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict

from hive.errors import (
    BadGateway,
    GatewayTimeout,
    HiveError,
    ServiceUnavailable,
    WorkerCrashed,
)
from hive.gateway import problems
from hive.gateway.traffic import Passage
from hive.workers.worker import Life

EXIT_S = 1.0  # how long a broken answer waits to learn whether the engine's process ended
WHOLE_BYTES = 8 * 2**20  # an answer of known length up to this is sent in one piece
_HOP_BY_HOP = frozenset(
    h.lower()
    for h in (
        hdrs.CONNECTION,
        hdrs.KEEP_ALIVE,
        hdrs.PROXY_AUTHENTICATE,
        hdrs.PROXY_AUTHORIZATION,
        hdrs.TE,
        hdrs.TRAILER,
        hdrs.TRANSFER_ENCODING,
        hdrs.UPGRADE,
    )
)
# What an engine needs not know: the caller's credentials end here.
_NOT_FORWARDED = _HOP_BY_HOP | {
    "host",
    "content-length",
    "expect",
    "authorization",
    "x-api-key",
    "cookie",
    "x-request-id",
}
# An engine that lost its core reports it in the stream and ends a moment later.
_ENGINE_ERROR = re.compile(rb'(?:\A|\n)(?:data: \{"error"|event: error)')
SERVER_ERROR = 500

Observer = Callable[[bytes], None]


class Relay:
    """Forwards one request at a time to a life's engine; holds no state between requests."""

    async def forward(
        self,
        request: web.Request,
        body: bytes,
        life: Life,
        passage: Passage,
        connect_s: float,
        observe: Observer | None = None,
    ) -> web.StreamResponse:
        """Send the request on and the answer back.

        `observe` gets the first piece of a good answer. Raises HiveError while nothing was sent;
        returns a response that has been sent, else. Cancelling closes the engine's connection.
        """
        try:
            async with life.session.request(
                request.method,
                f"http://engine{request.raw_path}",
                data=body or None,
                headers=self._forwarded(request, passage),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
                allow_redirects=False,
            ) as answer:
                try:
                    return await self._pass_on(request, answer, life, passage, observe)
                finally:
                    answer.close()  # cancelled or done: an abort is the connection's end
        except aiohttp.ServerTimeoutError as exc:
            raise GatewayTimeout(
                f"The engine did not accept the connection within {connect_s:g} s.",
                phase="connect",
                timeout_seconds=connect_s,
                model=passage.model,
            ) from exc
        except (aiohttp.ClientError, ConnectionError) as exc:
            if isinstance(exc, ClientLeft):
                raise
            raise await self._why_it_broke_off(life, passage, exc) from exc

    def _forwarded(self, request: web.Request, passage: Passage) -> CIMultiDict[str]:
        headers = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _NOT_FORWARDED
        )
        headers["X-Request-Id"] = passage.request_id
        return headers

    async def _pass_on(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        life: Life,
        passage: Passage,
        observe: Observer | None,
    ) -> web.StreamResponse:
        first = await answer.content.readany()
        if answer.status >= SERVER_ERROR and (crash := await self._crash(life, passage)):
            raise crash
        if observe and answer.status < 300:  # noqa: PLR2004
            observe(first)
        response = web.StreamResponse(
            status=answer.status, reason=answer.reason, headers=self._returned(answer, passage)
        )
        length = answer.content_length
        if length is not None and length <= WHOLE_BYTES and not _is_stream(answer):
            pieces = [first]
            async for piece in answer.content.iter_any():
                pieces.append(piece)
            first = b"".join(pieces)
        if length is None:
            with contextlib.suppress(RuntimeError):  # HTTP/1.0 has no chunks: closed at the end
                response.enable_chunked_encoding()
        downstream = _Downstream(request, response, passage)
        await downstream.begin()
        try:
            piece = first
            while piece:
                if _is_stream(answer) and (found := _ENGINE_ERROR.search(piece)):
                    await downstream.send(piece[: found.start()])
                    if crash := await self._crash(life, passage):
                        passage.code = crash.code
                        await downstream.fail(crash)
                        return response
                    piece = piece[found.start() :]
                await downstream.send(piece)
                piece = await answer.content.readany()
            await downstream.finish()
        except ClientLeft:
            raise
        except (aiohttp.ClientError, ConnectionError) as exc:
            error = await self._why_it_broke_off(life, passage, exc)
            passage.code = error.code
            if _is_stream(answer):
                await downstream.fail(error)
            else:
                downstream.cut()
        return response

    def _returned(self, answer: aiohttp.ClientResponse, passage: Passage) -> CIMultiDict[str]:
        headers = CIMultiDict(
            (name, value)
            for name, value in answer.headers.items()
            if name.lower() not in _HOP_BY_HOP
        )
        headers["X-Request-Id"] = passage.request_id
        return headers

    async def _crash(self, life: Life, passage: Passage) -> HiveError | None:
        """The error to tell if the engine's process is ending; None if it lives on."""
        exit_ = await life.over_within(EXIT_S)
        if exit_ is None:
            return None
        if life.was_asked:
            return ServiceUnavailable(
                "The worker was stopped before the answer was complete.",
                reason="draining",
                retry_after_s=30,
                model=passage.model,
            )
        return WorkerCrashed(
            f"The engine's process ended while it was answering ({exit_}).",
            cause=exit_.cause,
            exit_status=exit_.code,
            signal=exit_.signal,
            worker=passage.worker,
            model=passage.model,
        )

    async def _why_it_broke_off(
        self, life: Life, passage: Passage, exc: BaseException
    ) -> HiveError:
        if crash := await self._crash(life, passage):
            return crash
        if isinstance(exc, aiohttp.ClientConnectorError):
            what = "accepts no connection"
        elif isinstance(exc, aiohttp.ServerDisconnectedError):
            what = "closed the connection without an answer"
        elif isinstance(exc, aiohttp.ClientResponseError):
            what = "sent something that is not HTTP"
        else:
            what = "broke its answer off"
        return BadGateway(f"The engine {what}.", worker=passage.worker, model=passage.model)


class ClientLeft(ConnectionError):
    """The client's connection is gone; there is nobody to tell."""


class _Downstream:
    """The client's side of one answer: knows whether the last event was sent whole."""

    def __init__(
        self, request: web.Request, response: web.StreamResponse, passage: Passage
    ) -> None:
        self._request, self._response, self._passage = request, response, passage
        self._end = b"\n\n"  # the last bytes sent; nothing sent is a whole number of events

    async def begin(self) -> None:
        try:
            await self._response.prepare(self._request)
        except ConnectionError as exc:
            raise ClientLeft from exc
        self._passage.status = self._response.status
        self._passage.first_byte = time.monotonic()

    async def send(self, piece: bytes) -> None:
        if not piece:
            return
        try:
            await self._response.write(piece)
        except ConnectionError as exc:
            raise ClientLeft from exc
        self._passage.bytes_out += len(piece)
        self._end = (self._end + piece[-4:])[-4:]

    async def finish(self) -> None:
        try:
            await self._response.write_eof()
        except ConnectionError as exc:
            raise ClientLeft from exc

    async def fail(self, error: HiveError) -> None:
        """The error as the last event; inside an event only a cut tells the client."""
        if self._end.endswith((b"\n\n", b"\r\n\r\n")):
            await self.send(problems.event(error, self._passage.request_id))
            await self.finish()
        else:
            self.cut()

    def cut(self) -> None:
        """Close without the last chunk or the rest of the length: visibly incomplete."""
        if self._request.transport is not None:
            self._request.transport.close()


def _is_stream(answer: aiohttp.ClientResponse) -> bool:
    return answer.content_type == "text/event-stream"
